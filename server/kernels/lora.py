"""Whose rows take which adapters: `SlotTable`, `Segment`, `Segments`, and the ALL_SLOTS form of a low-rank update.

Owns the grouping of a step's rows by mix, the side-by-side copies of the active adapters and their product. Knows slots
and digests as keys only, never an adapter's name; the arithmetic of one update is the backends'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from adapters.weights import LoraWeights

SlotWeights = tuple[tuple[int, float], ...]
"""The (slot, weight) pairs of one sequence's mix, in the order of its mix."""

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears of a layer that read the same input."""
TARGET_MODULES = tuple(name for names in TOGETHER for name in names)
"""All of them, in the order of a step."""

Shapes = tuple[tuple[str, tuple[int, int]], ...]
"""(module path, (out, in)) of each module of an adapter."""

SHARED_ROWS = 16
"""Rows of one mix up to which they share the ALL_SLOTS product; longer ones (prefills) go adapter by adapter."""


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a step, all of one mix of (slot, weight) pairs."""

    start: int
    stop: int
    mix: SlotWeights


@dataclass(frozen=True)
class Shrink:
    """The A's of modules that read the same input, side by side: `A` [R, in], packed, one product for all of them.

    `members` is ((place in the set, rank, scale), ...) along R; equal members share the row weights of a step.
    """

    A: torch.Tensor
    members: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class Site:
    """One module's part: its columns of X A^T [rows, R], and its B's side by side, packed [out, ranks]."""

    shrink: Shrink
    columns: slice
    B: torch.Tensor


def site_finder(linears: Mapping[str, tuple[int, int]]) -> Callable[[Shapes], np.ndarray]:
    """What tells where an adapter's modules are, int64 [modules], in a table of all `linears` of a base in their order.

    It raises ValueError for one that the base lacks. Most adapters have the modules of others, and ask alike.
    """
    places = {path: place for place, path in enumerate(linears)}

    @lru_cache(maxsize=256)
    def find(shapes: Shapes) -> np.ndarray:
        for path, shape in shapes:
            if path not in places:
                raise ValueError(f"the base has no linear {path} that an adapter could change")
            if shape != linears[path]:
                raise ValueError(f"the update of {path} is {shape} (out, in), the module is {linears[path]}")
        return np.array([places[path] for path, _ in shapes], np.int64)

    return find


@lru_cache(maxsize=1)
def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bf16 here: with AVX512 it does, with AVX2 alone it does not."""
    there: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return there and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_in(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype in a plain loop here, a tenth as fast as it does float32."""
    return dtype == torch.bfloat16 and not has_bf16_products()


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix [n, k] as `times` reads it fastest: bf16 in oneDNN's own order where torch has it, else as it is.

    A plain one is put in that order by every product, which takes as long again as 16 rows of it do.
    """
    if matrix.dtype != torch.bfloat16 or not has_bf16_products():
        return matrix
    ordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), SHARED_ROWS)
    return ordered


def times(x: torch.Tensor, matrix: torch.Tensor, to: torch.Tensor | None = None) -> torch.Tensor:
    """`to` + x matrix^T, [rows, n] of x's dtype, rounded once. x [rows, k], `matrix` [n, k] as `packed` gives it."""
    if not matrix.is_mkldnn:
        if slow_in(x.dtype):
            product = F.linear(x.float(), matrix.float())
            return (product if to is None else product.add_(to)).to(x.dtype)
        return F.linear(x, matrix) if to is None else torch.addmm(to, x, matrix.t())
    y: torch.Tensor
    if to is None:
        y = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, to, matrix, None, "add")
    return y


class SideBySide:
    """Adapters of a set along the rank, modules of one input together, concatenated when they are first asked for."""

    def __init__(self, adapters: Sequence[LoraWeights]) -> None:
        self._adapters = list(adapters)
        self._sites: dict[str, Site | None] = {}
        self.place = {adapter.digest: i for i, adapter in enumerate(adapters)}
        self.rank_bytes = sum(adapter.nbytes for adapter in adapters)

    def site(self, path: str) -> Site | None:
        """The module's part, or None where no adapter of the set has that module."""
        if path not in self._sites:
            self._sites |= self._concatenate(path)
        return self._sites[path]

    @property
    def nbytes(self) -> int:
        sites = [site for site in self._sites.values() if site is not None]
        matrices = {id(site.shrink): site.shrink.A for site in sites}
        return sum(matrix.numel() * matrix.itemsize for matrix in (*matrices.values(), *(site.B for site in sites)))

    def _concatenate(self, path: str) -> dict[str, Site | None]:
        """The sites of `path` and of the modules that read what it reads."""
        parent, _, name = path.rpartition(".")
        together = next((names for names in TOGETHER if name in names), (name,))
        paths = [f"{parent}.{sibling}" if parent else sibling for sibling in together]
        found = {p: [(i, a.modules[p]) for i, a in enumerate(self._adapters) if p in a.modules] for p in paths}
        updates = [update for p in paths for update in found[p]]
        if not updates:
            return dict.fromkeys(paths)
        shrink = Shrink(packed(torch.cat([m.A for _, m in updates])), tuple((i, m.rank, m.scale) for i, m in updates))
        sites: dict[str, Site | None] = {}
        start = 0
        for p in paths:
            stop = start + sum(m.rank for _, m in found[p])
            expand = packed(torch.cat([m.B for _, m in found[p]], 1)) if found[p] else None
            sites[p] = None if expand is None else Site(shrink, slice(start, stop), expand)
            start = stop
        return sites


class SlotTable:
    """Slot -> adapter, as the runner holds it, and the side-by-side copy of the set that was last active.

    That copy is remade when a step needs an adapter that it lacks, and kept while it is not much larger than what
    is active: requests that come and go on the same adapters copy nothing.
    """

    SLACK = 2.0
    """How many times the bytes of the active set the copy may hold before it is remade for the active set alone."""

    def __init__(self, slots: int) -> None:
        self._slots: list[LoraWeights | None] = [None] * slots
        self._active: SideBySide | None = None

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Put prepared weights into a slot. Raises IndexError for a slot that does not exist."""
        self._slots[slot] = weights

    def unload_adapter(self, slot: int) -> None:
        """Empty a slot and drop whatever copy holds its adapter."""
        gone = self._slots[slot]
        self._slots[slot] = None
        if gone is not None and self._active is not None and gone.digest in self._active.place:
            self._active = None

    def __getitem__(self, slot: int) -> LoraWeights:
        weights = self._slots[slot]
        assert weights is not None, f"slot {slot} is empty"
        return weights

    def side_by_side(self, slots: Iterable[int]) -> SideBySide:
        """The copy that holds at least the adapters in `slots`."""
        wanted = {self[slot].digest: self[slot] for slot in slots}
        size = sum(weights.nbytes for weights in wanted.values())
        kept = self._active
        if kept is None or not wanted.keys() <= kept.place.keys() or kept.rank_bytes > self.SLACK * size:
            kept = self._active = SideBySide([wanted[digest] for digest in sorted(wanted)])
        return kept

    @property
    def nbytes(self) -> int:
        """Bytes of the side-by-side copy; the adapters themselves are the RAM tier's."""
        return 0 if self._active is None else self._active.nbytes


class Run:
    """Neighbouring short segments of several mixes, computed together: rows `start` to `stop`.

    Per module: V = X A^T over all ranks of the set, times each row's weight for each rank, times B. Two products
    whatever the number of adapters, ranks and weights, and modules of one input share the first.
    """

    def __init__(self, segments: Sequence[Segment], table: SlotTable, side: SideBySide) -> None:
        self.start, self.stop = segments[0].start, segments[-1].stop
        self.site = side.site
        self._by_members: dict[tuple[tuple[int, int, float], ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._shrunk: tuple[Shrink, torch.Tensor] | None = None
        weights = torch.zeros(self.stop - self.start, len(side.place))
        for segment in segments:
            for slot, weight in segment.mix:
                place = side.place[table[slot].digest]
                weights[segment.start - self.start : segment.stop - self.start, place] += weight
        self._weights = weights

    def shrunk(self, shrink: Shrink, x: torch.Tensor) -> torch.Tensor:
        """X A^T of the run's rows of x [T, in], each row's weight and each rank's scale in it: [rows, R] of x's dtype.

        A step asks for the modules of one input in turn, so the last product is kept until another is wanted.
        """
        if self._shrunk is None or self._shrunk[0] is not shrink:
            weights, unused = self._ranked(shrink.members, x.dtype)
            v = times(x[self.start : self.stop], shrink.A)
            # Filled, not only multiplied by zero: what overflows in one row's adapter must not reach another row.
            self._shrunk = shrink, v.mul_(weights).masked_fill_(unused, 0.0)
        return self._shrunk[1]

    def _ranked(
        self, members: tuple[tuple[int, int, float], ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's weight for each rank [rows, R], and where that is zero.

        In `dtype` if that holds every one of them exactly, as it holds most scales: a product of two dtypes is two
        conversions more. Else in float32.
        """
        known = self._by_members.get(members)
        if known is None:
            places = [place for place, rank, _ in members for _ in range(rank)]
            scales = torch.tensor([scale for _, rank, scale in members for _ in range(rank)])
            ranked = self._weights[:, places] * scales
            if torch.equal(ranked.to(dtype).float(), ranked):
                ranked = ranked.to(dtype)
            known = self._by_members[members] = (ranked, ranked == 0)
        return known


class Segments:
    """The adapters of a step: `all`, rows by mix; or, for the ALL_SLOTS form, `runs` and the `long` segments.

    Segments without adapters are left out, neighbours of one mix are joined. Rows are ascending and disjoint.
    """

    def __init__(self, table: SlotTable, segments: Iterable[Segment]) -> None:
        self.table = table
        self.all: list[Segment] = []
        for segment in segments:
            if not segment.mix or segment.start == segment.stop:
                continue
            last = self.all[-1] if self.all else None
            if last is not None and last.stop == segment.start and last.mix == segment.mix:
                self.all[-1] = Segment(last.start, segment.stop, segment.mix)
            else:
                self.all.append(segment)

    def __bool__(self) -> bool:
        return bool(self.all)

    @property
    def runs(self) -> list[Run]:
        return self._plan[0]

    @property
    def long(self) -> list[Segment]:
        return self._plan[1]

    @cached_property
    def _plan(self) -> tuple[list[Run], list[Segment]]:
        long: list[Segment] = []
        groups: list[list[Segment]] = []
        for segment in self.all:
            if segment.stop - segment.start > SHARED_ROWS:
                long.append(segment)
            elif groups and segment.start - groups[-1][-1].stop <= SHARED_ROWS:
                groups[-1].append(segment)
            else:
                groups.append([segment])
        shared: list[list[Segment]] = []
        for group in groups:
            if len(group) == 1 and len(group[0].mix) <= 2:
                long.append(group[0])  # two products an adapter are no more than the shared form costs
            else:
                shared.append(group)
        active = {slot for group in shared for segment in group for slot, _ in segment.mix}
        side = self.table.side_by_side(active) if active else None
        return [Run(group, self.table, side) for group in shared if side is not None], long
