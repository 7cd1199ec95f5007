"""Lays out an adapter's matrices in one piece of memory, in the order in which a step reads them.

Adjacent matrices suit the hardware prefetcher and need few page table entries.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from adapters.weights import LoraWeights, LowRank, all_finite
from server.kernels import huge_pages
from server.kernels.lora import SHARED_INPUT, TARGET_MODULES
from server.kernels.reference import check_finite

LINE = 32
"""Values per cache line of bf16, at which every matrix is aligned."""


def in_one_piece(weights: LoraWeights, dtype: torch.dtype = torch.bfloat16, pinned: bool = False) -> LoraWeights:
    """Copy an adapter to A [rank, in] row-major and B [out, rank] column-major, views of one tensor.

    Args:
        weights: The adapter.
        dtype: Dtype of the copy.
        pinned: Use pinned memory, for asynchronous copies to a GPU.

    Raises:
        InvalidAdapter: A value is not finite in `dtype`.
    """
    order = step_order(tuple(weights.modules))
    offsets, size = [], 0
    for path, part in order:
        offsets.append(size)
        size += -(-getattr(weights.modules[path], part).numel() // LINE) * LINE
    flat = torch.zeros(size, dtype=dtype, pin_memory=True) if pinned else huge_pages.zeros(size, dtype)
    parts: dict[tuple[str, str], torch.Tensor] = {}
    for (path, part), offset in zip(order, offsets, strict=True):
        source = getattr(weights.modules[path], part)
        rows = source if part == "A" else source.t()
        view = flat[offset : offset + rows.numel()].view(rows.shape)
        view.copy_(rows)
        parts[path, part] = view if part == "A" else view.t()
    modules = {
        path: LowRank(parts[path, "A"], parts[path, "B"], update.scale) for path, update in weights.modules.items()
    }
    copy = LoraWeights(weights.name, weights.digest, modules, weights.metadata)
    if not all_finite(flat):
        check_finite(copy, dtype)
    return copy


@lru_cache(maxsize=64)
def step_order(paths: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(module path, "A" or "B") in the order of a step. Most adapters of a base have the same modules."""
    group = {name: i for i, names in enumerate(SHARED_INPUT) for name in names}

    def key(item: tuple[str, str]) -> tuple[int, int, str, int, str]:
        path, part = item
        names = path.split(".")
        layer = next((int(name) for name in names if name.isdigit()), -1)
        name = names[-1]
        index = TARGET_MODULES.index(name) if name in TARGET_MODULES else len(TARGET_MODULES)
        return layer, group.get(name, len(SHARED_INPUT)), part, index, path

    return tuple(sorted(((path, part) for path in paths for part in ("A", "B")), key=key))
