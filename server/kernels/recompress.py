"""Adapters whose ranks cancel each other, written anew before they are rounded: to be served, and where training reads
or writes them.

Owns which these are. One that PEFT has converted from PiSSA or OLoRA is what was trained less what that began with: two
products, each hundreds of times their difference, whose roundings would stay while they themselves cancel. The same
update by its singular values has ranks that add up, and is rounded like any other. Does not know to what.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch

from adapters.weights import LoraWeights

LEAST = 1 / 16
"""Of what the squares of a module's ranks come to one by one, the square of their sum: below that they cancel. What is
trained plainly has about 1, and is rounded as it is."""
AT_ONCE = 16
"""Modules of one shape that are looked at together: they are copied for that."""


def recompress(weights: LoraWeights) -> LoraWeights:
    """The adapter, itself if no ranks cancel; else with the modules where they do as their singular values have them,
    float32 of scale 1 and of no higher rank."""
    alike = defaultdict(list)
    for path, (a, b, *_) in weights.modules.items():
        if a.shape[0] == b.shape[1] > 1:  # others are refused, or have nothing to cancel
            alike[a.shape, a.dtype, b.shape, b.dtype].append(path)
    some = [paths[i : i + AT_ONCE] for paths in alike.values() for i in range(0, len(paths), AT_ONCE)]
    found = [path for paths in some for path in _cancelling(weights, paths)]
    if not found:
        return weights
    anew = {path: weights.modules[path].spectrum().low_rank(weights.modules[path].rank) for path in found}
    return replace(weights, modules={**weights.modules, **anew})


def _cancelling(weights: LoraWeights, paths: list[str]) -> list[str]:
    """Of modules of one shape, those whose ranks cancel."""
    a = torch.stack([weights.modules[path].A for path in paths]).float()
    b = torch.stack([weights.modules[path].B for path in paths]).float()
    products = (a @ a.mT) * (b.mT @ b)  # [modules, rank, rank], what two ranks have in common
    whole, apart = products.sum((1, 2)), products.diagonal(dim1=1, dim2=2).sum(-1)
    cancels = (whole < LEAST * apart) & whole.isfinite() & apart.isfinite()
    return [path for path, yes in zip(paths, cancels.tolist(), strict=True) if yes]
