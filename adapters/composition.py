"""Composition of several adapters into one: exactly, or by linear, TIES or DARE merging.

`exact` is the weighted sum that serving computes for a mix, without the error of 8-bit adapter weights. Use it for
adapters that nearly cancel (version A minus version B), and for files. The other methods merge the factors as PEFT's
`add_weighted_adapter` does: linear, TIES (Yadav et al. 2023), DARE (Yu et al. 2024).
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
"""Merges one factor of several adapters, all [r, in] or all [out, r], with their weights."""

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
    """Compose adapters into one, float32 with scale 1.

    Args:
        method: one of `METHODS`.
        rank: truncate the result to this rank; the error is in `metadata["pruning"]`.
        density: share of values that TIES and DARE keep.
        seed: of DARE's random mask.

    Returns:
        The composed adapter, with `metadata["composition"]`.

    Raises:
        InvalidChoice: the pairs cannot be composed.
        AdapterError: another argument is invalid.
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
        raise AdapterError(f"unknown method {method!r}; use one of {', '.join(METHODS)}", "method")
    return result if rank is None else pruning.truncate(result, rank)[0]


def exact(pairs: Pairs, name: str) -> LoraWeights:
    """The exact weighted sum of the updates, by concatenating ranks. Equal contents add their weights.

    Raises InvalidChoice, as all methods do.
    """
    _check(pairs)
    summed: dict[str, tuple[LoraWeights, float]] = {}
    for weights, weight in pairs:
        summed[weights.digest] = weights, summed.get(weights.digest, (weights, 0.0))[1] + weight
    modules = {}
    for path in _paths(pairs):
        present = [(w.modules[path], x) for w, x in summed.values() if path in w.modules and is_nonzero(x)]
        if present:
            a = torch.cat([m.A.float() for m, _ in present])
            b = torch.cat([m.B.float() * (m.scale * weight) for m, weight in present], dim=1)
            modules[path] = LowRank(a, b, 1.0)
    if not modules:
        why = "the weights of each content add up to zero" if any(w for _, w in pairs) else "every weight is zero"
        raise InvalidChoice(f"{why}; nothing is left", "adapters")
    return _result(pairs, name, modules, {"method": "exact"})


def linear(pairs: Pairs, name: str) -> LoraWeights:
    """PEFT's `linear`: both factors are summed, weighted by the square root of the weight. Ranks must be equal.

    The result is not the sum of the updates: it contains the cross terms B_i A_j.
    """
    return _merged(pairs, name, lambda factors, weights: _weighted(factors, weights).sum(0), {"method": "linear"})


def ties(pairs: Pairs, name: str, *, density: float) -> LoraWeights:
    """TIES on the factors: keep the largest values, elect the sign of the sum for each element, average the values with
    that sign. Raises AdapterError for an invalid density."""
    _check_density(density)

    def merge(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        return _agreeing([_largest(f, density) for f in factors], weights)

    return _merged(pairs, name, merge, {"method": "ties", "density": density})


def dare(pairs: Pairs, name: str, *, density: float, seed: int, elect: bool = False) -> LoraWeights:
    """DARE on the factors: drop values at random and rescale the rest, then sum, or `elect` signs as TIES.

    Raises AdapterError for an invalid density or seed."""
    _check_density(density)
    draw = torch.Generator().manual_seed(check_seed(seed))

    def merge(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
        kept = [f * torch.bernoulli(torch.full_like(f, density), generator=draw) / density for f in factors]
        return _agreeing(kept, weights) if elect else _weighted(kept, weights).sum(0)

    method = "dare_ties" if elect else "dare_linear"
    return _merged(pairs, name, merge, {"method": method, "density": density, "seed": seed})


def _merged(pairs: Pairs, name: str, merge: Merge, how: dict[str, object]) -> LoraWeights:
    """Merge both factors of each module with sqrt(|weight * scale|); the sign goes to A."""
    _check(pairs)
    modules = {}
    for path in _paths(pairs):
        present = [(w.modules[path], weight * w.modules[path].scale) for w, weight in pairs if path in w.modules]
        ranks = sorted({m.rank for m, _ in present})
        if len(ranks) > 1:
            raise InvalidChoice(
                f"{how['method']} needs equal ranks, but {path} has {ranks}; use exact, or change the ranks first",
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
    """The `density` share of values with the largest magnitude; zeros elsewhere."""
    count = int(density * factor.numel())
    mask = torch.zeros(factor.numel())
    mask[factor.abs().flatten().topk(count).indices] = 1.0
    return factor * mask.view_as(factor)


def _agreeing(factors: list[torch.Tensor], weights: list[float]) -> torch.Tensor:
    """The weighted mean of the values that have the sign of the sum, for each element."""
    stacked = torch.stack(factors)
    elected = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = (stacked.sign() == elected).float()
    return (_weighted(factors, weights) * agree).sum(0) / agree.sum(0).clamp(min=1.0)


def _paths(pairs: Pairs) -> list[str]:
    return sorted({path for weights, _ in pairs for path in weights.modules})


def _check(pairs: Pairs) -> None:
    if not pairs:
        raise InvalidChoice("no adapters to compose; name at least one", "adapters")
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
        raise AdapterError(f"density must be over 0 and at most 1, not {density!r}", "density")


def _result(pairs: Pairs, name: str, modules: dict[str, LowRank], how: dict[str, object]) -> LoraWeights:
    parts = [{"version": w.version.label, "weight": weight} for w, weight in pairs]
    metadata: dict[str, object] = {"composition": {**how, "of": parts}}
    for key in ("base", "quantization"):
        values = [w.metadata.get(key) for w, _ in pairs]
        if all(v == values[0] for v in values):
            metadata[key] = values[0]
    return with_digest(name, modules, metadata)
