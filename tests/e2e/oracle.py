"""Reference answers of Transformers and PEFT in float32, on the embedded base's dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.weights import content_digest
from server.model.loader import Base


def config_of(base: Base) -> LlamaConfig:
    """The base's architecture as a Transformers config."""
    c = base.config
    return LlamaConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        vocab_size=c.vocab_size,
        rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings,
        tie_word_embeddings=c.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
    )


def llama_of(base: Base) -> LlamaForCausalLM:
    """The base's weights as a float32 Transformers model, without Transformers' GGUF reader."""
    config = config_of(base)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    state = {f"{path}.weight": base.backend.dequantize(w) for path, w in base.weights.items()}
    state |= {name: t.float() for name, t in base.tensors.items()}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert not unexpected and not missing, (missing, unexpected)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Difference:
    """The first token in which two greedy answers differ.

    Attributes:
        index: Index of the token.
        margin: The oracle's logit of its own token minus its logit of our token.
    """

    index: int
    margin: float


class Oracle:
    """A PEFT model with adapters that are identified by content.

    Only the modules of active adapters are attached, because PEFT iterates over all attached ones.
    """

    def __init__(self, base: Base) -> None:
        self._plain = llama_of(base)
        self._peft: PeftModel | None = None
        self._names: dict[str, str] = {}
        self._modules: dict[str, list[tuple[LoraLayer, nn.Module, nn.Module]]] = {}
        """The layers of each adapter, with the LoRA A and B modules that PEFT loaded."""
        self._active: tuple[tuple[str, float], ...] = ()
        self._ids: dict[str, int] | None = None

    def add(self, folder: Path) -> str:
        """Load a PEFT folder and return the oracle's name for its content."""
        config = json.loads((folder / "adapter_config.json").read_text())
        from safetensors.torch import load_file

        digest = content_digest(config, load_file(folder / "adapter_model.safetensors"))
        if digest not in self._names:
            name = self._names[digest] = f"v{len(self._names)}"
            self._activate(())
            # Skip the random initialization of weights that are loaded from the file.
            how: dict[str, Any] = {"adapter_name": name, "low_cpu_mem_usage": True}
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self._plain, str(folder), **how)
            else:
                self._peft.load_adapter(str(folder), **how)
            self._peft.eval().float()
            layers = [m for m in self._peft.modules() if isinstance(m, LoraLayer) and name in m.lora_A]
            self._modules[name] = [(layer, layer.lora_A.pop(name), layer.lora_B.pop(name)) for layer in layers]
        return self._names[digest]

    def model(self, mix: Sequence[tuple[str, float]]) -> Any:
        """The model with the mix active. PEFT sums the active adapters; the weights multiply their scales."""
        if self._peft is None:
            return self._plain
        if tuple(mix) != self._active:
            self._activate(tuple(mix))
        return self._peft

    def _activate(self, mix: tuple[tuple[str, float], ...]) -> None:
        for name, _ in self._active:
            for layer, _, _ in self._modules[name]:
                del layer.lora_A[name], layer.lora_B[name]
        for name, weight in mix:
            for layer, a, b in self._modules[name]:
                layer.lora_A[name], layer.lora_B[name] = a, b
                layer.set_scale(name, weight)
        if mix:
            assert self._peft is not None
            self._peft.base_model.set_adapter([name for name, _ in mix])
        self._active = mix

    @torch.no_grad()
    def logits(self, prompt: Sequence[int], mix: Sequence[tuple[str, float]] = (), last: int = 0) -> torch.Tensor:
        """Float32 logits [tokens, vocab] of a prompt, or of its last `last` tokens if that is not 0."""
        ids = torch.tensor([list(prompt)])
        return self.model(mix)(input_ids=ids, use_cache=False, logits_to_keep=last).logits[0].float()

    @torch.no_grad()
    def next_logits(self, prompts: Sequence[Sequence[int]], mix: Sequence[tuple[str, float]] = ()) -> torch.Tensor:
        """Float32 logits [prompts, vocab] after the last token of each prompt, in one right-padded batch."""
        ends = [len(prompt) - 1 for prompt in prompts]
        ids = torch.tensor([[*prompt, *[0] * (max(ends) - end)] for prompt, end in zip(prompts, ends, strict=True)])
        step = self.model(mix)(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor(ends))
        each = torch.arange(len(ends))
        return step.logits[each, each].float()

    def compare(
        self,
        prompt: Sequence[int],
        ours: Sequence[str],
        decode: Callable[[int], str],
        count: int,
        mix: Sequence[tuple[str, float]],
        eos: set[int],
    ) -> Difference | None:
        """Compare our greedy answer with the oracle's.

        One forward pass over the prompt and our answer gives the oracle's next token after each prefix. The first
        prefix after which it differs from ours is the difference. Several token ids may have the same text: if the
        oracle chooses another id with our text, the pass is repeated with that id.

        Args:
            prompt: Token ids.
            ours: Our answer, each token as text.
            decode: Returns the text of a token id.
            count: Length of a greedy answer that does not end with an end token.
            mix: Names of the oracle's adapters with weights.
            eos: End token ids.

        Returns:
            None if the answers are equal.
        """
        ids = [self._id(token, decode) for token in ours[:count]]
        i = 0
        while i < len(ids):
            rows = self.logits([*prompt, *ids[:-1]], mix, last=len(ids))
            for row in rows[i:]:
                choice = int(row.argmax())
                if decode(choice) != ours[i]:
                    same = [t for t in row.topk(50).indices.tolist() if decode(t) == ours[i]]
                    return Difference(i, float(row[choice] - max((row[t] for t in same), default=-torch.inf)))
                i += 1
                if choice in eos:
                    return None if i == len(ours) else Difference(i, float("inf"))
                if choice != ids[i - 1]:
                    ids[i - 1] = choice
                    break
        return None if len(ours) == count else Difference(min(len(ours), count), float("inf"))

    def _id(self, token: str, decode: Callable[[int], str]) -> int:
        """The lowest id with this text, or 0 if there is none: then the oracle's choice differs anyway."""
        if self._ids is None:
            self._ids = {decode(t): t for t in reversed(range(self._plain.config.vocab_size))}
        return self._ids.get(token, 0)


def write_peft(path: Path, model: LlamaConfig, seed: int, strength: float = 0.15, **config: Any) -> Path:
    """Write a random adapter with PEFT, for any LoraConfig on the architecture of `model`."""
    with torch.device("meta"):
        shell = LlamaForCausalLM(model)
    peft = get_peft_model(shell, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, torch.Tensor] = {}
    for name, p in peft.named_parameters():
        if "lora_" not in name:
            continue
        rank = p.shape[0] if "lora_A" in name else p.shape[1]
        deviation = p.shape[1] ** -0.5 if "lora_A" in name else strength / rank**0.5
        state[name] = torch.randn(p.shape, generator=generator) * deviation
    peft.load_state_dict(state, strict=False, assign=True)
    if path.exists():
        shutil.rmtree(path)
    peft.save_pretrained(str(path), save_embedding_layers=False)
    return path
