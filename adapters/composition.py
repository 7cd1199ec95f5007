"""Makes one adapter of several, ahead of serving: exactly, or by the merges of the literature.

`exact` is the weighted sum itself. Serving gives the same without it, but for what holding each adapter in few bits
costs: a share of that adapter, which is little of most sums, and much of one in which adapters nearly cancel, such as
one version less another. So `exact` is for files that leave the house, and for such sums. The others are other
functions of the same adapters: `linear`, TIES (Yadav et al. 2023) and DARE (Yu et al. 2024) as PEFT's
add_weighted_adapter defines them, on the factors, which PEFT's tests are held against. Knows no files and no models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from adapters import pruning
from adapters.errors import AdapterError, InvalidChoice
from adapters.seeds import check_seed
from adapters.weights import LoraWeights, LowRank, check_weight, is_nonzero, with_digest

Pairs = Sequence[tuple[LoraWeights, float]]
"""Adapters and their weights."""
Merge = Callable[[list[torch.Tensor], list[float]], torch.Tensor]
"""One factor of several adapters and the factor's weights -> the merged factor. All [r, in] or all [out, r]."""

METHODS = ("exact", "linear", "ties", "dare_linear", "dare_ties")


def compose(
    pairs: Pairs,
    name: str,
    method: str = "exact",
    *,
    rank: int | None = None,
    density: float = 0.5,
    seed: int = 0,
) -> LoraWeights:
    """One adapter of several, by one of `METHODS`, float32 and of scale 1; cut to `rank` afterwards if that is given.

    `density` is the share of values that TIES and DARE keep, `seed` DARE's draw. The metadata say what was done
    (`composition`), a cut's error included (`pruning`). Raises InvalidChoice for the pairs and AdapterError for the
    rest.
    """
    if method == "exact":
        result = exact(pairs, name)
    elif method == "linear":
        result = linear(pairs, name)
    elif method == "ties":
        result = ties(pairs, name, density=density)
    elif method in ("dare_linear", "dare_ties"):
        result = dare(pairs, name, density=density, seed=seed, elect=method == "dare_ties")
    else:
        raise AdapterError(f"{method!r} is no way to compose; there are {', '.join(METHODS)}", "method")
    return result if rank is None else pruning.truncate(result, rank)[0]


def exact(pairs: Pairs, name: str) -> LoraWeights:
    """The weighted sum of the updates, without error: ranks are concatenated, so they add up. One content under two
    names adds its weights, as where it is served. Raises InvalidChoice for the pairs, as all of the following do.
    """
    _check(pairs)
    summed: dict[str, tuple[LoraWeights, float]] = {}
    for weights, weight in pairs:
        summed[weights.digest] = weights, summed.get(weights.digest, (weights, 0.0))[1] + weight
    modules = {}
    for path in _paths(pairs):
        present = [
            (w.modules[path], weight) for w, weight in summed.values() if path in w.modules and is_nonzero(weight)
        ]
        if present:
            a = torch.cat([m.A.float() for m, _ in present])
            b = torch.cat([m.B.float() * (m.scale * weight) for m, weight in present], dim=1)
            modules[path] = LowRank(a, b, 1.0)
    if not modules:
        why = "the weights of each content add up to zero" if any(w for _, w in pairs) else "every weight is zero"
        raise InvalidChoice(f"{why}; nothing is left", "adapters")
    return _result(pairs, name, modules, {"method": "exact"})


def linear(pairs: Pairs, name: str) -> LoraWeights:
    """PEFT's `linear`: both factors are summed with the root of their weight. This is *not* the sum of the updates
    (the cross terms B_i A_j are in it), and exists for those who want PEFT's result. Ranks must be equal.
    """
    return _merged(pairs, name, lambda factors, weights: _weighted(factors, weights).sum(0), {"method": "linear"})


def ties(pairs: Pairs, name: str, *, density: float) -> LoraWeights:
    """TIES on the factors: keep the largest values, elect a sign for each place (that of the sum), average what agrees
    with it. Raises AdapterError for a density that is none."""
    _check_density(density)

    def merge(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        return _agreeing([_largest(f, density) for f in factors], weights)

    return _merged(pairs, name, merge, {"method": "ties", "density": density})


def dare(pairs: Pairs, name: str, *, density: float, seed: int, elect: bool = False) -> LoraWeights:
    """DARE on the factors: drop values at random and rescale the rest; then sum, or `elect` signs as TIES.

    Raises AdapterError for a density or a seed that is none."""
    _check_density(density)
    draw = torch.Generator().manual_seed(check_seed(seed))

    def merge(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        kept = [f * torch.bernoulli(torch.full_like(f, density), generator=draw) / density for f in factors]
        return _agreeing(kept, weights) if elect else _weighted(kept, weights).sum(0)

    method = "dare_ties" if elect else "dare_linear"
    return _merged(pairs, name, merge, {"method": method, "density": density, "seed": seed})


def _merged(pairs: Pairs, name: str, merge: Merge, how: dict[str, object]) -> LoraWeights:
    """Both factors of each module by `merge`, with the root of |weight * scale|, its sign on A's side."""
    _check(pairs)
    modules = {}
    for path in _paths(pairs):
        present = [(w.modules[path], weight * w.modules[path].scale) for w, weight in pairs if path in w.modules]
        ranks = sorted({m.rank for m, _ in present})
        if len(ranks) > 1:
            raise InvalidChoice(
                f"{how['method']} needs equal ranks, but {path} has {ranks}; use exact, or re-rank them first",
                "adapters",
            )
        roots = [math.sqrt(abs(weight)) for _, weight in present]
        signed = [math.copysign(root, weight) for root, (_, weight) in zip(roots, present, strict=True)]
        a = merge([m.A.float() for m, _ in present], signed)
        b = merge([m.B.float() for m, _ in present], roots)
        modules[path] = LowRank(a, b, 1.0)
    return _result(pairs, name, modules, how)


def _weighted(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    return torch.stack(factors) * torch.tensor(weights)[:, None, None]


def _largest(factor: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` largest values of a factor, by size, and zeros elsewhere."""
    count = int(density * factor.numel())
    mask = torch.zeros(factor.numel())
    mask[factor.abs().flatten().topk(count).indices] = 1.0
    return factor * mask.view_as(factor)


def _agreeing(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """At each place the weighted mean of the values that have the sum's sign."""
    stacked = torch.stack(factors)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = (stacked.sign() == elected).float()
    return (_weighted(factors, weights) * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def _paths(pairs: Pairs) -> list[str]:
    return sorted({path for weights, _ in pairs for path in weights.modules})


def _check(pairs: Pairs) -> None:
    if not pairs:
        raise InvalidChoice("there is nothing to compose", "adapters")
    for _, weight in pairs:
        check_weight(weight)
    for path in _paths(pairs):
        shapes = {m.shape for m in (w.modules.get(path) for w, _ in pairs) if m is not None}
        if len(shapes) > 1:
            raise InvalidChoice(
                f"the adapters are of different bases: {path} has the shapes {sorted(shapes)}", "adapters"
            )


def _check_density(density: float) -> None:
    if not 0.0 < density <= 1.0:
        raise AdapterError(f"the density is a share over 0 and up to 1, not {density!r}", "density")


def _result(pairs: Pairs, name: str, modules: dict[str, LowRank], how: dict[str, object]) -> LoraWeights:
    parts = [{"version": w.version.label, "weight": weight} for w, weight in pairs]
    metadata: dict[str, object] = {"composition": {**how, "of": parts}}
    for key in ("base", "quantization"):
        values = [w.metadata.get(key) for w, _ in pairs]
        if all(v == values[0] for v in values):
            metadata[key] = values[0]
    return with_digest(name, modules, metadata)
