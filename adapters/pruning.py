"""Smaller adapters with a stated error: truncated ranks, dropped modules, one global threshold.

Ranks are truncated by SVD of the update, the best approximation of its rank (Eckart and Young 1936).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

import torch

from adapters.errors import AdapterError
from adapters.weights import LoraWeights, LowRank, Spectrum, with_digest


@dataclass(frozen=True)
class Cut:
    """The effect of a cut. Errors are relative in the Frobenius norm, |new - old| / |old|, over all modules and for the
    worst module. They include the rounding of the new tensors.
    """

    parameters_before: int
    parameters: int
    error: float
    worst_module: str | None
    worst_error: float
    dropped: tuple[str, ...] = ()


def spectra(weights: LoraWeights) -> dict[str, Spectrum]:
    """The spectrum of every module."""
    return {path: module.spectrum() for path, module in weights.modules.items()}


def parameters(weights: LoraWeights) -> int:
    """The number of values in all factors."""
    return sum(m.A.numel() + m.B.numel() for m in weights.modules.values())


def truncate(
    weights: LoraWeights, rank: int, name: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[LoraWeights, Cut]:
    """Truncate every module to at most `rank`. Modules of lower rank are unchanged.

    Args:
        dtype: dtype of the new tensors; None keeps that of each module.

    Raises:
        AdapterError: `rank` is below 1.
    """
    if rank < 1:
        raise AdapterError(f"a rank must be at least 1, not {rank}", "rank")
    found = spectra(weights)
    return keep(weights, found, {path: min(rank, len(s.S)) for path, s in found.items()}, name, dtype)


def truncate_globally(
    weights: LoraWeights,
    *,
    budget: int | None = None,
    energy: float | None = None,
    name: str | None = None,
) -> tuple[LoraWeights, Cut]:
    """Truncate by one threshold over the singular values of all modules. Modules below it are dropped.

    Args:
        budget: most parameters to keep. Exactly one of `budget` and `energy` is given.
        energy: share (0 to 1) of the sum of squared singular values to keep.

    Raises:
        AdapterError: the bounds cannot be met.
    """
    if (budget is None) == (energy is None):
        raise AdapterError("give either a budget of parameters or an energy to keep", "budget")
    if energy is not None and not 0.0 < energy <= 1.0:
        raise AdapterError(f"the energy to keep is a share over 0 and up to 1, not {energy!r}", "energy")
    found = spectra(weights)
    values = sorted(
        ((float(s), path) for path, sp in found.items() for s in sp.S.tolist()), key=lambda v: (-v[0], v[1])
    )
    cost = {path: sp.U.shape[0] + sp.Vh.shape[1] for path, sp in found.items()}
    total = sum(s * s for s, _ in values)
    ranks: dict[str, int] = {}
    spent, kept = 0, 0.0
    for value, path in values:
        if budget is not None and spent + cost[path] > budget:
            break
        if energy is not None and kept >= energy * total * (1.0 - 1e-9):
            break
        ranks[path] = ranks.get(path, 0) + 1
        spent += cost[path]
        kept += value * value
    if not ranks and energy is not None:
        raise AdapterError("every update of the adapter is zero; there is no energy to keep", "energy")
    if not ranks:
        smallest = min(cost.values())
        raise AdapterError(f"a budget of {budget} parameters keeps nothing; the least is {smallest}", "budget")
    return keep(weights, found, ranks, name)


def drop_modules(weights: LoraWeights, modules: Collection[str], name: str | None = None) -> tuple[LoraWeights, Cut]:
    """Drop the modules of these paths. Raises AdapterError for an unknown path, or if nothing is left."""
    unknown = sorted(set(modules) - set(weights.modules))
    if unknown:
        raise AdapterError(f"the adapter has no module {unknown[0]!r}", "modules")
    left = {path: m for path, m in weights.modules.items() if path not in modules}
    if not left:
        raise AdapterError("no module would be left", "modules")
    norms = {path: norm(m) for path, m in weights.modules.items()}
    cut = _account(weights, left, {path: norms[path] for path in modules}, norms)
    return _result(weights, left, cut, name), cut


def weakest_modules(weights: LoraWeights, share: float) -> list[str]:
    """The given share of modules with the smallest updates (Frobenius norm), smallest first. Raises AdapterError for a
    share outside [0, 1)."""
    if not 0.0 <= share < 1.0:
        raise AdapterError(f"the share of modules to drop is from 0 to under 1, not {share!r}", "share")
    ranked = sorted(weights.modules, key=lambda path: norm(weights.modules[path]))
    return ranked[: int(share * len(ranked) + 1e-9)]


def norm(module: LowRank) -> float:
    """The Frobenius norm of `scale * B @ A`, from the Gram matrices of its factors."""
    a, b = module.A.double(), module.B.double()
    return abs(module.scale) * math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def keep(
    weights: LoraWeights,
    found: Mapping[str, Spectrum],
    ranks: Mapping[str, int],
    name: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LoraWeights, Cut]:
    """Keep the first `ranks[path]` singular values of each module; a module without a rank is dropped.

    A module that is not truncated keeps its factors, so that it is not rounded again.
    """
    left = {}
    for path, old in weights.modules.items():
        if (rank := ranks.get(path, 0)) > 0:
            a, b, scale, *_ = old if rank >= old.rank else found[path].low_rank(rank)
            left[path] = LowRank(a.to(dtype or old.A.dtype), b.to(dtype or old.B.dtype), scale)
    norms = {path: float(s.S.double().norm()) for path, s in found.items()}
    lost = {path: _distance(left[path], old) if path in left else norms[path] for path, old in weights.modules.items()}
    cut = _account(weights, left, lost, norms)
    return _result(weights, left, cut, name), cut


def _distance(new: LowRank, old: LowRank) -> float:
    """The Frobenius norm of the difference of two updates, by its singular values: Gram matrices are not accurate
    enough below 1e-8.
    """
    if new.A is old.A and new.B is old.B and new.scale == old.scale:
        return 0.0
    if not (new.A.isfinite().all() and new.B.isfinite().all()):  # overflow of the dtype
        return math.inf
    a = torch.cat([new.A.double(), old.A.double()])
    b = torch.cat([new.B.double() * new.scale, old.B.double() * -old.scale], dim=1)
    return float(LowRank(a, b, 1.0).spectrum().S.double().norm())


def _account(
    weights: LoraWeights, left: Mapping[str, LowRank], lost: Mapping[str, float], norms: Mapping[str, float]
) -> Cut:
    whole = math.sqrt(sum(n * n for n in norms.values()))
    errors = {path: lost.get(path, 0.0) / norms[path] if norms[path] > 0.0 else 0.0 for path in weights.modules}
    worst = max(errors, key=lambda path: errors[path], default=None)
    return Cut(
        parameters_before=parameters(weights),
        parameters=sum(m.A.numel() + m.B.numel() for m in left.values()),
        error=math.sqrt(sum(n * n for n in lost.values())) / whole if whole > 0.0 else 0.0,
        worst_module=worst,
        worst_error=errors[worst] if worst is not None else 0.0,
        dropped=tuple(sorted(set(weights.modules) - set(left))),
    )


def _result(weights: LoraWeights, left: Mapping[str, LowRank], cut: Cut, name: str | None) -> LoraWeights:
    from_version = weights.version.label
    return with_digest(name or weights.name, left, {**weights.metadata, "pruning": {"of": from_version, **asdict(cut)}})
