"""Random adapters for load tests. The same seed gives the same adapter on every machine.

They change the output of a model by a moderate amount that does not depend on the rank, so that errors in rank, scale
or weight are visible in the answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
STRENGTH = 0.15
"""Standard deviation of an update's output relative to the norm of its input, before alpha/r."""


def write_adapter(
    path: Path,
    shapes: Mapping[str, tuple[int, int]],
    *,
    rank: int,
    seed: int,
    targets: Iterable[str] = ATTENTION,
    alpha: float | None = None,
    strength: float = STRENGTH,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a random adapter in PEFT format.

    Args:
        path: folder to create.
        shapes: module path -> (out, in) of the base's linear layers.
        targets: last parts of the module paths to adapt.
        alpha: default is 2 * rank.
        strength: A has standard deviation 1/sqrt(in), B has strength/sqrt(rank).

    Returns:
        `path`.
    """
    generator = torch.Generator().manual_seed(seed)
    wanted = tuple(targets)
    tensors: dict[str, torch.Tensor] = {}
    for module, (n_out, n_in) in sorted(shapes.items()):
        if module.rsplit(".", 1)[-1] not in wanted:
            continue
        a = torch.randn(rank, n_in, generator=generator) / math.sqrt(n_in)
        b = torch.randn(n_out, rank, generator=generator) * (strength / math.sqrt(rank))
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(wanted),
    }
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return path
