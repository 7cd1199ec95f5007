"""Quantizes adapters to int8 in the layout that the C++ kernels read.

Reading the adapters of a batch is bound by memory bandwidth, so each value takes one byte.
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
from server.kernels.adapter_memory import step_order
from server.kernels.cpu import bindings
from server.kernels.cpu.packing import GROUP

LINE = 64
"""Bytes of a cache line, to which each module's scales are padded."""

_SOURCE = np.dtype(bindings.LoraSource)
_TYPES = {torch.float32: bindings.FLOAT32, torch.bfloat16: bindings.BFLOAT16, torch.float16: bindings.FLOAT16}


def encoded(weights: LoraWeights) -> LoraWeights:
    """Quantize an adapter to int8, as `LoraModule` in kernels.h describes it.

    Each rank's row of A and column of B has its own scale, its largest magnitude / 127. `units` holds the product of
    both. So truncating or concatenating ranks changes no code.

    Returns:
        The adapter with A uint8 [`bytes_of_a`] and B uint8 [`b_shape`], views of one tensor.

    Raises:
        InvalidAdapter: A value or a scale is not finite.
        ValueError: A and B of a module have different ranks.
        MemoryError: There is not enough memory.
    """
    layout = _layout(tuple((path, update.rank, *update.shape) for path, update in weights.modules.items()))
    flat = huge_pages.zeros(sum(layout.sizes), torch.uint8)
    views = dict(zip(layout.parts, torch.split_with_sizes(flat, layout.sizes), strict=True))
    table = layout.table.copy()
    for offsets in (table["a"]["codes"], table["b"]["codes"], table["rank_scales"]):
        offsets += flat.data_ptr()
    modules: dict[str, LowRank] = {}
    factors: dict[str, list[torch.Tensor]] = {"a": [], "b": []}  # keeps converted tensors alive
    for path, rank, out, width in layout.modules:
        a, b, scale, *_ = weights.modules[path]
        if b.shape[1] != rank:
            raise ValueError(f"the update of {path} is {tuple(b.shape)} x {tuple(a.shape)}")
        if a.dtype not in _TYPES or b.dtype not in _TYPES:
            a, b = a.float(), b.float()
        factors["a"].append(a)
        factors["b"].append(b)
        units = views[path, "units"].view(torch.float32)
        modules[path] = LowRank(views[path, "A"], views[path, "B"].view(b_shape(rank, out)), scale, units, (out, width))
    for part, matrices in factors.items():
        columns = table[part]
        columns["values"] = [matrix.data_ptr() for matrix in matrices]
        columns["type"] = [_TYPES[matrix.dtype] for matrix in matrices]
        strides = np.array([matrix.stride() for matrix in matrices]).reshape(-1, 2)
        columns["rank_stride"], columns["stride"] = strides.T if part == "a" else strides.T[::-1]
    done = bindings.library().loramux_encode_lora(table.ctypes.data, len(table))
    if done < 0:
        raise MemoryError("not enough memory to quantize an adapter")
    if done < len(table):
        path = list(modules)[done]
        raise InvalidAdapter(f"the adapter {weights.name!r} has values in {path} that are not finite, or too large")
    return LoraWeights(weights.name, weights.digest, modules, weights.metadata)


def bytes_of_a(rank: int, width: int) -> int:
    """Bytes of a quantized A: ranks padded to 8, inputs padded to GROUP."""
    return -(-rank // 8) * 8 * -(-width // GROUP) * GROUP


def b_shape(rank: int, out: int) -> tuple[int, int, int, int]:
    """Shape of a quantized B: tiles of 16 columns, groups of 4 ranks."""
    return -(-out // 16), -(-rank // 4), 16, 4


@dataclass(frozen=True)
class _Layout:
    """How the modules of an adapter lie in one piece of memory.

    Attributes:
        modules: (path, rank, out, in) of each module.
        parts: (path, "units", "A", "B" or "padding") of each part, in memory order.
        sizes: Bytes of each part.
        table: The `LoraSource` of each module, with offsets in place of the addresses of codes and scales.
    """

    modules: tuple[tuple[str, int, int, int], ...]
    parts: list[tuple[str, str]]
    sizes: list[int]
    table: np.ndarray


@lru_cache(maxsize=64)
def _layout(modules: tuple[tuple[str, int, int, int], ...]) -> _Layout:
    """The layout in `step_order`. Many adapters of a base share it."""
    shapes = {path: (rank, out, width) for path, rank, out, width in modules}
    parts: list[tuple[str, str]] = []
    sizes: list[int] = []
    offsets: dict[tuple[str, str], int] = {}
    end = 0
    for path, part in step_order(tuple(shapes)):
        rank, out, width = shapes[path]
        if part == "B":
            pieces = {"B": math.prod(b_shape(rank, out))}
        else:
            pieces = {"units": 4 * rank, "padding": -4 * rank % LINE, "A": bytes_of_a(rank, width)}
        for name, size in pieces.items():
            offsets[path, name] = end
            parts.append((path, name))
            sizes.append(size)
            end += size
    table = np.zeros(len(modules), _SOURCE)
    for row, (path, rank, out, width) in zip(table, modules, strict=True):
        row["rank"], row["rank_scales"] = rank, offsets[path, "units"]
        row["a"]["width"], row["a"]["codes"] = width, offsets[path, "A"]
        row["b"]["width"], row["b"]["codes"] = out, offsets[path, "B"]
    return _Layout(modules, parts, sizes, table)
