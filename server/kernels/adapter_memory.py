"""An adapter's memory: all its matrices in one piece, in the order in which a step walks them.

Owns that order, for all backends that keep adapters so. Sixteen adapters of a batch are read from memory once a step,
each a few kilobytes a layer: what lies together is found by the processor's prefetching and by few page table entries.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from adapters.weights import LoraWeights, LowRank, all_finite
from server.kernels import huge_pages
from server.kernels.lora import TARGET_MODULES, TOGETHER
from server.kernels.reference import check_finite

LINE = 32
"""Values that every matrix begins at a multiple of: a cache line of bf16."""


def in_one_piece(weights: LoraWeights, dtype: torch.dtype = torch.bfloat16, pinned: bool = False) -> LoraWeights:
    """The adapter, copied: A [rank, in] row-major and B [out, rank] column-major, views of one tensor of `dtype`.

    With `pinned` that is memory which a GPU copies from by itself. Raises InvalidAdapter if a value is not finite in
    that dtype.
    """
    order = walk(tuple(weights.modules))
    places, size = [], 0
    for path, part in order:
        places.append(size)
        size += -(-getattr(weights.modules[path], part).numel() // LINE) * LINE
    flat = torch.zeros(size, dtype=dtype, pin_memory=True) if pinned else huge_pages.zeros(size, dtype)
    parts: dict[tuple[str, str], torch.Tensor] = {}
    for (path, part), place in zip(order, places, strict=True):
        source = getattr(weights.modules[path], part)
        rows = source if part == "A" else source.t()
        view = flat[place : place + rows.numel()].view(rows.shape)
        view.copy_(rows)
        parts[path, part] = view if part == "A" else view.t()
    modules = {
        path: LowRank(parts[path, "A"], parts[path, "B"], update.scale) for path, update in weights.modules.items()
    }
    kept = LoraWeights(weights.name, weights.digest, modules, weights.metadata)
    if not all_finite(flat):
        check_finite(kept, dtype)
    return kept


@lru_cache(maxsize=64)
def walk(paths: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """(module path, "A" or "B") in the order of a step. Most adapters of a base have the same modules."""
    group = {name: i for i, names in enumerate(TOGETHER) for name in names}

    def key(item: tuple[str, str]) -> tuple[int, int, str, int, str]:
        path, part = item
        pieces = path.split(".")
        layer = next((int(piece) for piece in pieces if piece.isdigit()), -1)
        name = pieces[-1]
        return (
            layer,
            group.get(name, len(TOGETHER)),
            part,
            TARGET_MODULES.index(name) if name in TARGET_MODULES else len(TARGET_MODULES),
            path,
        )

    return tuple(sorted(((path, part) for path in paths for part in ("A", "B")), key=key))
