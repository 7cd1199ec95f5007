"""The reference kernels: each operation in plain torch and float32. Tests compare the other backends with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank, not_finite
from server.kernels.lora import Segments
from server.kernels.packed_format import decode_tiles, dequantize_stored
from server.kernels.weight import STORED, Weight


def low_rank(x: torch.Tensor, update: LowRank, weight: float) -> torch.Tensor:
    """weight * scale * B (A x) of each row of x [T, in]: [T, out] (LoRA, Hu et al. 2021)."""
    return ((x @ update.A.t()) @ update.B.t()) * (weight * update.scale)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] / sqrt(mean(x^2) + eps) * weight [n] (Zhang & Sennrich 2019)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [T, heads, d] by angles with cos and sin [T, d/2]; i pairs with i + d/2 (Su et al. 2021)."""
    first, second = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    return gate * torch.sigmoid(gate) * up


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """exp(s - max) / sum over the last axis."""
    exponentials = torch.exp(scores - scores.amax(-1, keepdim=True))
    return exponentials / exponentials.sum(-1, keepdim=True)


def attention(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor, context: int
) -> torch.Tensor:
    """Causal attention of the last n tokens of one sequence over its KV blocks.

    Args:
        q: Queries of the last n tokens [n, heads, d]. Consecutive query heads share a KV head.
        keys: Key cache [blocks, block_size, kv_heads, d].
        values: Value cache, like `keys`.
        blocks: The sequence's block table, int [>= ceil(context / block_size)].
        context: Tokens of the sequence in the cache, those of q included.

    Returns:
        [n, heads, d].
    """
    n, heads, d = q.shape
    used = blocks[: -(-context // keys.shape[1])].long()
    k = keys[used].flatten(0, 1)[:context]
    v = values[used].flatten(0, 1)[:context]
    group = heads // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("nhd,chd->hnc", q, k) * d**-0.5
    future = torch.arange(context) > torch.arange(context - n, context)[:, None]
    return torch.einsum("hnc,chd->nhd", softmax(scores.masked_fill(future, float("-inf"))), v)


def prepared(weights: LoraWeights, dtype: torch.dtype) -> LoraWeights:
    """The adapter with A row-major [rank, in] and B column-major [out, rank].

    Raises InvalidAdapter if a value is not finite in that dtype.
    """
    modules = {}
    for path, update in weights.modules.items():
        b = update.B.to(dtype).t().contiguous().t()
        modules[path] = LowRank(update.A.to(dtype).contiguous(), b, update.scale)
    converted = LoraWeights(weights.name, weights.digest, modules, weights.metadata)
    check_finite(converted, dtype)
    return converted


def check_finite(weights: LoraWeights, dtype: torch.dtype) -> None:
    """Raise InvalidAdapter if a value is not finite after the conversion to `dtype`."""
    if (bad := not_finite(weights.modules)) is not None:
        raise InvalidAdapter(f"the adapter {weights.name!r} has values in {bad[0]} that are not finite in {dtype}")


def stored_rows(weight: Weight, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64 [n]) of a matrix in the stored layout as float32 [n, in]."""
    tensors = {"codes": weight.tensors["codes"][ids]}
    for name in ("scale", "zero"):
        if name in weight.tensors:
            tensors[name] = weight.tensors[name][ids]
        elif f"{name}_codes" in weight.tensors:
            codes, step, base = (weight.tensors[f"{name}_{part}"] for part in ("codes", "step", "base"))
            tensors[name] = decode_tiles(codes[ids], step, base, ids)
    return dequantize_stored(Weight(weight.scheme, STORED, (len(ids), weight.shape[1]), weight.group, tensors))


CHUNK = 2**22
"""Weights that are dequantized at a time."""


class Reference:
    """The backend of these functions, on stored weights and float32 adapters.

    Products with the base accumulate in float64. In float32 the order of additions depends on the processor and the
    number of rows, which changes logits by 1e-4 over thirty layers, more than the tolerance for adapters.
    """

    name = "reference"
    layout = "stored-1"
    dtype = torch.float32

    def pack(self, stored: Weight) -> Weight:
        return stored

    def dequantize(self, weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
        return dequantize_stored(weight, start, stop)

    def prepare(self, weights: LoraWeights, scheme: str) -> LoraWeights:
        return prepared(weights, torch.float32)

    def linear(self, weight: Weight, x: torch.Tensor, update: torch.Tensor | None = None) -> torch.Tensor:
        out, width = weight.shape
        step, wide = max(1, CHUNK // width), x.double()
        chunks = [
            F.linear(wide, dequantize_stored(weight, start, min(start + step, out)).double())
            for start in range(0, out, step)
        ]
        y = torch.cat(chunks, 1)
        return (y if update is None else y.add_(update)).to(x.dtype)

    def embed(self, weight: Weight, ids: torch.Tensor) -> torch.Tensor:
        return stored_rows(weight, ids)

    def add_lora(self, y: torch.Tensor, x: torch.Tensor, path: str, segments: Segments) -> None:
        for segment in segments.all:
            rows = slice(segment.start, segment.stop)
            for slot, weight in segment.mix:
                update = segments.table[slot].modules.get(path)
                if update is not None:
                    y[rows] += low_rank(x[rows], update, weight)
