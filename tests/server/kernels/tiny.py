"""Tiny random models, adapters and batches for the tests of all runners."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from adapters.weights import LoraWeights, LowRank
from server.engine.batch import Batch
from server.kernels import Backend
from server.kernels.lora import SlotWeights
from server.kernels.weight import Weight
from server.model.config import ModelConfig, RopeScaling
from server.model.quantization import quantize

BLOCK = 16
"""Tokens per KV block."""


@dataclass(frozen=True)
class Tiny:
    """A base model, packed for one backend."""

    config: ModelConfig
    weights: dict[str, Weight]
    tensors: dict[str, torch.Tensor]
    backend: Backend

    def prepare(self, weights: LoraWeights) -> LoraWeights:
        scheme = next(iter(self.weights.values())).scheme  # of a linear
        return self.backend.prepare(weights, scheme)


def llama(**changes: Any) -> ModelConfig:
    """A small Llama configuration."""
    return ModelConfig(
        **{
            "architecture": "LlamaForCausalLM",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "rope_scaling": RopeScaling(),
            "tie_word_embeddings": True,
            **changes,
        }
    )


def bases(
    config: ModelConfig, scheme: str, group: int, double: bool, table: str, packer: Backend, plain: Backend
) -> tuple[Tiny, Tiny]:
    """The same weights, packed by `packer` and by `plain`."""
    torch.manual_seed(11)
    stored = {
        path: quantize(torch.randn(shape) * shape[1] ** -0.5, scheme, group, double)
        for path, shape in config.linear_shapes().items()
    }
    stored |= {path: quantize(torch.randn(shape), table, 32) for path, shape in config.table_shapes().items()}
    tensors = {
        name: torch.randn(shape) * 0.1 + (0.0 if name.endswith("bias") else 1.0)
        for name, shape in config.tensor_shapes().items()
    }
    packed = {path: packer.pack(weight) for path, weight in stored.items()}
    return Tiny(config, packed, tensors, packer), Tiny(config, stored, tensors, plain)


def adapter(config: ModelConfig, seed: int, rank: int, targets: tuple[str, ...] = (), size: float = 1.0) -> LoraWeights:
    """A random adapter for linears whose path ends with one of `targets`; for all linears without any."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(
            torch.randn(rank, width, generator=generator) * width**-0.5,
            torch.randn(out, rank, generator=generator) * rank**-0.5 * size,
            0.5,
        )
        for path, (out, width) in config.linear_shapes().items()
        if not targets or path.endswith(targets)
    }
    return LoraWeights(f"a{seed}", f"{seed:064x}", modules)


def codes_of(kept: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes of a native int8 module: A [rank, in] and B [out, rank], int64."""
    columns, ranks = kept.B.shape[0] * kept.B.shape[2], kept.B.shape[1] * kept.B.shape[3]
    b = kept.B.permute(0, 2, 1, 3).reshape(columns, ranks)
    out, into = kept.coded
    wide, eight = kept.rank // 16 + (kept.rank % 16 > 8), 0 < kept.rank % 16 <= 8
    padded = len(kept.A) // (wide * 16 + eight * 8) if kept.rank else 0
    parts = [kept.A[: wide * 16 * padded].view(-1, padded // 4, 16, 4)] if wide else []
    if eight:
        parts.append(kept.A[wide * 16 * padded :].view(1, padded // 4, 8, 4))
    a = torch.cat([part.transpose(1, 2).reshape(-1, padded) for part in parts]) if parts else kept.A.view(0, into)
    return a[: kept.rank, :into].long() - 128, b[:out, : kept.rank].long() - 128


@dataclass
class Sequence:
    """A sequence: tokens, number of tokens in the cache, blocks and mix."""

    tokens: list[int]
    blocks: list[int]
    mix: SlotWeights = ()
    done: int = 0


def batch_of(new: list[tuple[Sequence, int]], every_row: bool = True) -> Batch:
    """A step that runs `count` more tokens of each sequence, with logits of all rows or of each sequence's last row."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, context = [0], []
    for sequence, count in new:
        end = sequence.done + count
        tokens += sequence.tokens[sequence.done : end]
        positions += range(sequence.done, end)
        starts.append(len(tokens))
        context.append(end)
        sequence.done = end
    blocks = np.full((len(new), max(len(s.blocks) for s, _ in new)), -1, np.int32)
    for i, (sequence, _) in enumerate(new):
        blocks[i, : len(sequence.blocks)] = sequence.blocks
    return Batch(
        np.array(tokens, np.int64),
        np.array(positions, np.int64),
        np.array(starts, np.int32),
        np.array(context, np.int32),
        blocks,
        np.arange(len(tokens)) if every_row else np.array(starts[1:]) - 1,
        tuple(s.mix for s, _ in new),
    )


def random_tokens(config: ModelConfig, seed: int, count: int) -> list[int]:
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    ours, exact = ours.float().cpu(), exact.float()
    assert torch.isfinite(ours).all()
    return float((ours - exact).norm() / exact.norm())


def uncut(weights: LoraWeights) -> LoraWeights:
    """A prepared adapter that may not be split."""
    return replace(weights, layout=replace(weights.layout, cuts=weights.layout.cuts[[0, -1]]))


def lies_in(pool: Any, slot: int, weights: LoraWeights) -> bool:
    """Whether the pool has exactly the adapter's matrices in that slot."""
    for path, update in weights.modules.items():
        (site,) = pool._find_modules(((path, update.shape),))
        a, b, units = pool.pool.offsets[slot, site].tolist()
        values = pool.pool.values.cpu()
        same = torch.equal(values[a : a + update.A.numel()], update.A.flatten())
        same &= torch.equal(values[b : b + update.B.numel()], update.B.t().flatten())
        if update.units is not None:
            same &= torch.equal(pool.pool.units[units : units + update.rank].cpu(), update.units)
        if not same or pool.pool.ranks[slot, site] != update.rank:
            return False
    return True
