"""Adapters in codes on a GPU: what they are copied, kept and read as beside a base in codes.

Owns the form. A step of many adapters reads each of them, and each waits in RAM and crosses to the device, so a value
is a byte: a code from -127 to 127 in a unit of its rank's own, as on a CPU (kernels/cpu/adapter_codes.py). The matrix
units take codes as whole numbers, which bf16 holds exactly. Does not know the arithmetic of an update.
"""

from __future__ import annotations

import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels import huge_pages
from server.kernels.adapter_memory import step_order
from server.kernels.cuda.adapter_layout import LINE

_LEAST = 1e-30
"""Below this a reciprocal would overflow; a rank whose values are all smaller is as good as zero."""


def encoded(weights: LoraWeights, pinned: bool) -> LoraWeights:
    """The adapter in codes: A int8 [rank, in] row-major, B int8 [out, rank] column-major, views of one tensor.

    A rank's row of A and column of B count in a 127th of their largest value each, and the product of both is among the
    `units`. With `pinned` that is memory which a GPU copies from by itself. Raises InvalidAdapter if a value is not
    finite, or such a product in float32.
    """
    places: dict[tuple[str, str], int] = {}
    end = 0
    for path, part in step_order(tuple(weights.modules)):
        update = weights.modules[path]
        if part == "A":
            places[path, "units"] = end
            end += _lines(4 * update.rank)
        places[path, part] = end
        end += _lines(getattr(update, part).numel())
    flat = torch.zeros(end, dtype=torch.int8, pin_memory=True) if pinned else huge_pages.zeros(end, torch.int8)
    modules: dict[str, LowRank] = {}
    for path, update in weights.modules.items():
        kept, units = [], torch.ones(update.rank)
        for part, rows in (("A", update.A), ("B", update.B.t())):
            start = places[path, part]
            codes = flat[start : start + rows.numel()].view(rows.shape)
            units *= _encode(rows.float(), codes)
            kept.append(codes)
        if not torch.isfinite(units).all():
            raise InvalidAdapter(f"the adapter {weights.name!r} has values in {path} that are not finite, or too large")
        start = places[path, "units"]
        held = flat[start : start + units.nbytes].view(torch.float32)
        held.copy_(units)
        modules[path] = LowRank(kept[0], kept[1].t(), update.scale, held, update.shape)
    return LoraWeights(weights.name, weights.digest, modules, weights.metadata)


def _encode(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Put the codes of float32 `rows` [rank, n] into int8 `codes`; their units, float32 [rank]."""
    largest = rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))
    inverse = torch.where(largest < _LEAST, 0.0, 127.0 / largest)
    codes.copy_((rows * inverse[:, None]).round_())
    return largest / 127.0


def _lines(nbytes: int) -> int:
    return -(-nbytes // LINE) * LINE
