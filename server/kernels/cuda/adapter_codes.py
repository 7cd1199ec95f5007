"""Quantizes adapters to int8 for the GPU, like kernels/cpu/adapter_codes.py for the CPU.

Tensor cores read the codes as 16-bit floats, which hold them exactly.
"""

from __future__ import annotations

import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels import huge_pages
from server.kernels.adapter_memory import step_order
from server.kernels.cuda.adapter_layout import LINE

_LEAST = 1e-30
"""Below this a reciprocal would overflow; ranks with smaller values count as zero."""


def encoded(weights: LoraWeights, pinned: bool) -> LoraWeights:
    """Quantize an adapter to int8: A [rank, in] row-major, B [out, rank] column-major, views of one tensor.

    Each rank's row of A and column of B has its own scale, its largest magnitude / 127. `units` holds the product of
    both.

    Args:
        weights: The adapter.
        pinned: Use pinned memory, for asynchronous copies to a GPU.

    Raises:
        InvalidAdapter: A value or a scale is not finite.
    """
    adapter_count: dict[tuple[str, str], int] = {}
    end = 0
    for path, part in step_order(tuple(weights.modules)):
        update = weights.modules[path]
        if part == "A":
            adapter_count[path, "units"] = end
            end += _lines(4 * update.rank)
        adapter_count[path, part] = end
        end += _lines(getattr(update, part).numel())
    flat = torch.zeros(end, dtype=torch.int8, pin_memory=True) if pinned else huge_pages.zeros(end, torch.int8)
    modules: dict[str, LowRank] = {}
    for path, update in weights.modules.items():
        kept, units = [], torch.ones(update.rank)
        for part, rows in (("A", update.A), ("B", update.B.t())):
            start = adapter_count[path, part]
            codes = flat[start : start + rows.numel()].view(rows.shape)
            units *= _encode(rows.float(), codes)
            kept.append(codes)
        if not torch.isfinite(units).all():
            raise InvalidAdapter(f"the adapter {weights.name!r} has values in {path} that are not finite, or too large")
        start = adapter_count[path, "units"]
        held = flat[start : start + units.nbytes].view(torch.float32)
        held.copy_(units)
        modules[path] = LowRank(kept[0], kept[1].t(), update.scale, held, update.shape)
    return LoraWeights(weights.name, weights.digest, modules, weights.metadata)


def _encode(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Quantize float32 `rows` [rank, n] into int8 `codes`; returns the scales, float32 [rank]."""
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    inverse = torch.where(largest < _LEAST, 0.0, 127.0 / largest)
    codes.copy_((rows * inverse[:, None]).round_())
    return largest / 127.0


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE
