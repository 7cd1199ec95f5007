"""Recompresses adapters whose ranks cancel each other, before they are quantized.

Adapters that PEFT converts from PiSSA or OLoRA are the difference of two products, each hundreds of times larger than
the difference. Rounding errors of the products would dominate it. The singular value decomposition of the update has
ranks that do not cancel.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch

from adapters.weights import LoraWeights

CANCELLING = 1 / 16
"""Ranks cancel if the squared norm of a module's update is below this share of the sum over its ranks.
Ordinary training gives about 1."""
BATCH = 16
"""Modules of one shape that are checked at a time."""


def recompress(weights: LoraWeights) -> LoraWeights:
    """Replace modules whose ranks cancel by their SVD, in float32 with scale 1 and no higher rank.

    Returns the same object if no ranks cancel.
    """
    by_shape = defaultdict(list)
    for path, (a, b, *_) in weights.modules.items():
        if a.shape[0] == b.shape[1] > 1:  # a mismatch is refused later
            by_shape[a.shape, a.dtype, b.shape, b.dtype].append(path)
    batches = [paths[i : i + BATCH] for paths in by_shape.values() for i in range(0, len(paths), BATCH)]
    cancelling = [path for paths in batches for path in _cancelling(weights, paths)]
    if not cancelling:
        return weights
    modules = {path: weights.modules[path].spectrum().low_rank(weights.modules[path].rank) for path in cancelling}
    return replace(weights, modules={**weights.modules, **modules})


def _cancelling(weights: LoraWeights, paths: list[str]) -> list[str]:
    """The modules, all of one shape, whose ranks cancel."""
    a = torch.stack([weights.modules[path].A for path in paths]).float()
    b = torch.stack([weights.modules[path].B for path in paths]).float()
    gram = (a @ a.mT) * (b.mT @ b)  # inner products of ranks [modules, rank, rank]
    total, by_rank = gram.sum((1, 2)), gram.diagonal(dim1=1, dim2=2).sum(-1)
    cancels = (total < CANCELLING * by_rank) & total.isfinite() & by_rank.isfinite()
    return [path for path, yes in zip(paths, cancels.tolist(), strict=True) if yes]
