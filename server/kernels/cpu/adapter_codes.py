"""Adapters in codes: what updates beside a 4-bit or 8-bit base are computed with.

Owns the form and the layout. A step reads each of its batch's adapters from memory once, and memory is what many of
them cost, so a value is a byte: a code from -127 to 127, in a unit of its rank's own. Activations are rounded as much,
and the base's weights more. Both lie as products read them, A sixteen ranks by four inputs at a time, B sixteen columns
by four ranks. Does not know the arithmetic of an update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels import huge_pages
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
    layout = _layout(tuple((path, update.rank, *update.shape) for path, update in weights.modules.items()))
    flat = huge_pages.zeros(sum(layout.pieces), torch.uint8)
    lying = dict(zip(layout.order, torch.split_with_sizes(flat, layout.pieces), strict=True))
    table = layout.table.copy()
    for codes in (table["a"]["codes"], table["b"]["codes"], table["units"]):
        codes += flat.data_ptr()
    modules: dict[str, LowRank] = {}
    read: dict[str, list[torch.Tensor]] = {"a": [], "b": []}  # which have to live until they are
    for path, rank, out, width in layout.sizes:
        a, b, scale, *_ = weights.modules[path]
        if b.shape[1] != rank:
            raise ValueError(f"the update of {path} is {tuple(b.shape)} x {tuple(a.shape)}")
        if a.dtype not in _TYPES or b.dtype not in _TYPES:
            a, b = a.float(), b.float()
        read["a"].append(a)
        read["b"].append(b)
        units = lying[path, "units"].view(torch.float32)
        modules[path] = LowRank(lying[path, "A"], lying[path, "B"].view(tiles(rank, out)), scale, units, (out, width))
    for part, matrices in read.items():
        factors = table[part]
        factors["values"] = [matrix.data_ptr() for matrix in matrices]
        factors["type"] = [_TYPES[matrix.dtype] for matrix in matrices]
        strides = np.array([matrix.stride() for matrix in matrices]).reshape(-1, 2)
        factors["rank_stride"], factors["stride"] = strides.T if part == "a" else strides.T[::-1]
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


@dataclass(frozen=True)
class _Layout:
    """Of modules `sizes` (path, rank, out, in): what lies one after the other, `order` of (path, "units", "A", "B", or
    "rest" for what fills a line of units), and the bytes of each, `pieces`.

    `table` is what the kernels are told of the modules, with `codes` and `units` counted from the beginning.
    """

    sizes: tuple[tuple[str, int, int, int], ...]
    order: list[tuple[str, str]]
    pieces: list[int]
    table: np.ndarray


@lru_cache(maxsize=64)
def _layout(sizes: tuple[tuple[str, int, int, int], ...]) -> _Layout:
    """As a step walks them. Many adapters of a base have the same."""
    by_path = {path: (rank, out, width) for path, rank, out, width in sizes}
    order: list[tuple[str, str]] = []
    pieces: list[int] = []
    at: dict[tuple[str, str], int] = {}
    end = 0
    for path, part in walk(tuple(by_path)):
        rank, out, width = by_path[path]
        if part == "B":
            parts = {"B": math.prod(tiles(rank, out))}
        else:
            parts = {"units": 4 * rank, "rest": -4 * rank % LINE, "A": bytes_of_a(rank, width)}
        for what, size in parts.items():
            at[path, what] = end
            order.append((path, what))
            pieces.append(size)
            end += size
    table = np.zeros(len(sizes), _SOURCE)
    for row, (path, rank, out, width) in zip(table, sizes, strict=True):
        row["rank"], row["units"] = rank, at[path, "units"]
        row["a"]["width"], row["a"]["codes"] = width, at[path, "A"]
        row["b"]["width"], row["b"]["codes"] = out, at[path, "B"]
    return _Layout(sizes, order, pieces, table)
