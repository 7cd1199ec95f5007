"""Adapters in codes: what updates beside a 4-bit or 8-bit base are computed with.

Owns the form and the layout. A step reads each of its batch's adapters from memory once, and memory is what many of
them cost, so a value is a byte: a code from -127 to 127, in a unit of its rank's own. Activations are rounded as much,
and the base's weights more. Both lie as products read them, A sixteen ranks by four inputs at a time, B sixteen columns
by four ranks. Does not know the arithmetic of an update.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels import pages
from server.kernels.adapter_memory import walk
from server.kernels.cpu import bindings
from server.kernels.cpu.packing import GROUP

LINE = 64
"""Bytes of a cache line, where whatever is walked begins."""

_SOURCE = np.dtype(bindings.LoraSource)
_TYPES = {torch.float32: bindings.FLOAT32, torch.bfloat16: bindings.BFLOAT16, torch.float16: bindings.FLOAT16}


def encoded(weights: LoraWeights) -> LoraWeights:
    """The adapter in codes, as kernels.h has them: A uint8 [`bytes_of_a`], B uint8 [tiles, fours, 16, 4], of one
    tensor.

    A rank's row of A and column of B count in a 127th of their largest value each, and the product of both is among the
    `units`. So each value is off by half of that at most, and ranks that are cut off, or put beside others, change no
    code. Raises InvalidAdapter if a value is not finite, or such a product in float32; ValueError if A and B are of
    different ranks; and MemoryError.
    """
    places, size = _places(weights)
    flat = pages.zeros(size, torch.uint8)
    modules: dict[str, LowRank] = {}
    sources = []
    kept = []  # copies of what is in none of the types that are read
    for path, update in weights.modules.items():
        a, b = update.A, update.B
        (rank, width), (out, inner) = a.shape, b.shape
        if inner != rank:
            raise ValueError(f"the update of {path} is {tuple(b.shape)} x {tuple(a.shape)}")
        if a.dtype not in _TYPES or b.dtype not in _TYPES:
            a, b = a.float(), b.float()
            kept.append((a, b))
        units, start_a, start_b = places[path]
        module = LowRank(
            flat[start_a : start_a + bytes_of_a(rank, width)],
            flat[start_b : start_b + math.prod(tiles(rank, out))].view(tiles(rank, out)),
            update.scale,
            flat[units : units + 4 * rank].view(torch.float32),
            (out, width),
        )
        modules[path] = module
        sources.append(
            (
                (a.data_ptr(), module.A.data_ptr(), width, *a.stride(), _TYPES[a.dtype]),
                (b.data_ptr(), module.B.data_ptr(), out, *b.t().stride(), _TYPES[b.dtype]),
                flat.data_ptr() + units,
                rank,
            )
        )
    table = np.array(sources, _SOURCE)
    done = bindings.library().loramux_codes(table.ctypes.data, len(table))
    if done < 0:
        raise MemoryError("no memory to encode an adapter")
    if done < len(table):
        path = list(modules)[done]
        raise InvalidAdapter(f"the adapter {weights.name!r} has values in {path} that are not finite, or too large")
    return LoraWeights(weights.name, weights.digest, modules, weights.metadata)


def bytes_of_a(rank: int, width: int) -> int:
    """Of A in codes: tiles of sixteen ranks, and of eight where no more are left, by whole groups of inputs."""
    return -(-rank // 8) * 8 * -(-width // GROUP) * GROUP


def tiles(rank: int, out: int) -> tuple[int, int, int, int]:
    """The shape of B in codes: columns by sixteens, their ranks by fours."""
    return -(-out // 16), -(-rank // 4), 16, 4


def _places(weights: LoraWeights) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Where each module's units, A and B begin, in the order in which a step walks them, and where all of it ends."""
    places: dict[tuple[str, str], int] = {}
    end = 0
    for path, part in walk(tuple(weights.modules)):
        (rank, width), out = weights.modules[path].A.shape, len(weights.modules[path].B)
        if part == "A":
            places[path, "units"] = end
            end += -(-4 * rank // LINE) * LINE
        places[path, part] = end
        size = bytes_of_a(rank, width) if part == "A" else math.prod(tiles(rank, out))
        end += -(-size // LINE) * LINE
    return {path: (places[path, "units"], places[path, "A"], places[path, "B"]) for path in weights.modules}, end
