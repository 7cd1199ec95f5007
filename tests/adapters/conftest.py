"""A tiny Llama, and adapters written by PEFT and by this package."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from adapters.peft_format import save
from adapters.weights import LoraWeights, LowRank, with_digest


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=48,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def shapes(llama: PreTrainedModel) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in llama.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


MakePeft = Callable[..., tuple[PeftModel, Path]]


@pytest.fixture
def make_peft(llama: PreTrainedModel, tmp_path: Path) -> MakePeft:
    """`make_peft(seed=0, **lora_config)`: a PEFT model with random A and B, and the folder that it wrote."""

    def make(seed: int = 0, folder: str = "adapter", **config: Any) -> tuple[PeftModel, Path]:
        torch.manual_seed(seed)
        model = get_peft_model(copy.deepcopy(llama), LoraConfig(task_type="CAUSAL_LM", **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.2)
        model.save_pretrained(tmp_path / folder, save_embedding_layers=False)
        return model.eval(), tmp_path / folder

    return make


TINY_SHAPES = {f"model.layers.{i}.self_attn.{p}": (6, 4) for i in range(2) for p in ("q_proj", "v_proj")}


@pytest.fixture(scope="session")
def tiny_shapes() -> dict[str, tuple[int, int]]:
    """(out, in) of the four linears that `write_adapter` adapts."""
    return TINY_SHAPES


@pytest.fixture(scope="session")
def write_adapter() -> Callable[..., LoraWeights]:
    """`write_adapter(folder, seed=0, rank=2, **extras)`: a tiny random adapter there; equal seeds are equal content."""

    def write(folder: Path, seed: int = 0, rank: int = 2, **extras: Any) -> LoraWeights:
        generator = torch.Generator().manual_seed(seed)
        modules = {
            path: LowRank(
                torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator), 2.0
            )
            for path, (out, into) in TINY_SHAPES.items()
        }
        weights = with_digest(folder.name, modules)
        save(weights, folder, **extras)
        return weights

    return write


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip fsync, for tests with thousands of writes."""
    monkeypatch.setattr("os.fsync", lambda fd: None)
