"""Grouping of a step's rows by adapter mix, and the batched LoRA products of torch's backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from adapters.weights import LoraWeights

SlotWeights = tuple[tuple[int, float], ...]
"""(slot, weight) pairs of a sequence's mix, in order."""

SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The linears of a layer, grouped by common input."""
TARGET_MODULES = tuple(name for names in SHARED_INPUT for name in names)
"""The linears that adapters can change, in the order of a step."""

Shapes = tuple[tuple[str, tuple[int, int]], ...]
"""(path, (out, in)) of each module of an adapter."""

SHARED_ROWS = 16
"""Most rows of a segment that shares the batched product. Longer segments (prefills) run adapter by adapter."""


@dataclass(frozen=True)
class Segment:
    """Rows `start` to `stop` of a step, with one mix."""

    start: int
    stop: int
    mix: SlotWeights


@dataclass(frozen=True)
class Shrink:
    """The concatenated A's of modules with a common input.

    Attributes:
        A: Packed, [R, in].
        members: ((adapter index, rank, scale), ...) along R. Shrinks with equal members share the row weights.
    """

    A: torch.Tensor
    members: tuple[tuple[int, int, float], ...]


@dataclass(frozen=True)
class ModuleAdapters:
    """The adapters of one module: their columns of X A^T [rows, R], and their concatenated B's, packed [out, ranks]."""

    shrink: Shrink
    columns: slice
    B: torch.Tensor


def module_finder(linears: Mapping[str, tuple[int, int]]) -> Callable[[Shapes], np.ndarray]:
    """A cached function that returns the indexes of an adapter's modules among a base's `linears`, int64 [modules].

    It raises ValueError for a module that does not fit the base.
    """
    indexes = {path: index for index, path in enumerate(linears)}

    @lru_cache(maxsize=256)
    def find(shapes: Shapes) -> np.ndarray:
        for path, shape in shapes:
            if path not in indexes:
                raise ValueError(f"the base has no linear {path} that an adapter could change")
            if shape != linears[path]:
                raise ValueError(f"the update of {path} is {shape} (out, in), the module is {linears[path]}")
        return np.array([indexes[path] for path, _ in shapes], np.int64)

    return find


@lru_cache(maxsize=1)
def has_bf16_products() -> bool:
    """Whether oneDNN supports bf16 here: with AVX512 but not with AVX2."""
    available: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return available and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def slow_in(dtype: torch.dtype) -> bool:
    """Whether torch multiplies this dtype with scalar code here, at a tenth of the speed of float32."""
    return dtype == torch.bfloat16 and not has_bf16_products()


def packed(matrix: torch.Tensor) -> torch.Tensor:
    """Reorder a bf16 matrix [n, k] for `matmul`, if oneDNN supports it; otherwise every product would reorder it."""
    if matrix.dtype != torch.bfloat16 or not has_bf16_products():
        return matrix
    ordered: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), SHARED_ROWS)
    return ordered


def matmul(x: torch.Tensor, matrix: torch.Tensor, add_to: torch.Tensor | None = None) -> torch.Tensor:
    """x matrix^T + add_to, [rows, n] in the dtype of x, rounded once. `matrix` [n, k] may be `packed`."""
    if not matrix.is_mkldnn:
        if slow_in(x.dtype):
            product = F.linear(x.float(), matrix.float())
            return (product if add_to is None else product.add_(add_to)).to(x.dtype)
        return F.linear(x, matrix) if add_to is None else torch.addmm(add_to, x, matrix.t())
    y: torch.Tensor
    if add_to is None:
        y = torch.ops.mkldnn._linear_pointwise(x, matrix, None, "none", [], "")
    else:
        y = torch.ops.mkldnn._linear_pointwise.binary(x, add_to, matrix, None, "add")
    return y


class ConcatenatedAdapters:
    """Adapters concatenated along the rank, module by module at the first access."""

    def __init__(self, adapters: Sequence[LoraWeights]) -> None:
        self._adapters = list(adapters)
        self._modules: dict[str, ModuleAdapters | None] = {}
        self.index = {adapter.digest: i for i, adapter in enumerate(adapters)}
        self.adapter_bytes = sum(adapter.nbytes for adapter in adapters)

    def module(self, path: str) -> ModuleAdapters | None:
        """The adapters of a module, None if no adapter has it."""
        if path not in self._modules:
            self._modules |= self._concatenate(path)
        return self._modules[path]

    @property
    def nbytes(self) -> int:
        modules = [module for module in self._modules.values() if module is not None]
        matrices = {id(module.shrink): module.shrink.A for module in modules}
        return sum(
            matrix.numel() * matrix.itemsize for matrix in (*matrices.values(), *(module.B for module in modules))
        )

    def _concatenate(self, path: str) -> dict[str, ModuleAdapters | None]:
        """The adapters of `path` and of the modules with the same input."""
        parent, _, name = path.rpartition(".")
        siblings = next((names for names in SHARED_INPUT if name in names), (name,))
        paths = [f"{parent}.{sibling}" if parent else sibling for sibling in siblings]
        found = {p: [(i, a.modules[p]) for i, a in enumerate(self._adapters) if p in a.modules] for p in paths}
        updates = [update for p in paths for update in found[p]]
        if not updates:
            return dict.fromkeys(paths)
        shrink = Shrink(packed(torch.cat([m.A for _, m in updates])), tuple((i, m.rank, m.scale) for i, m in updates))
        modules: dict[str, ModuleAdapters | None] = {}
        start = 0
        for p in paths:
            stop = start + sum(m.rank for _, m in found[p])
            expand = packed(torch.cat([m.B for _, m in found[p]], 1)) if found[p] else None
            modules[p] = None if expand is None else ModuleAdapters(shrink, slice(start, stop), expand)
            start = stop
        return modules


class SlotTable:
    """The adapters in slots, and a concatenated copy of those that were active last.

    The copy is rebuilt if a step needs an adapter that it lacks, or if it is much larger than the active adapters.
    """

    SLACK = 2.0
    """Largest size of the copy, relative to the active adapters, before it is rebuilt."""

    def __init__(self, slots: int) -> None:
        self._slots: list[LoraWeights | None] = [None] * slots
        self._active: ConcatenatedAdapters | None = None

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Put a prepared adapter into a slot. Raises IndexError if there is no such slot."""
        self._slots[slot] = weights

    def unload_adapter(self, slot: int) -> None:
        """Empty a slot, and drop the copy if it contains the adapter."""
        removed = self._slots[slot]
        self._slots[slot] = None
        if removed is not None and self._active is not None and removed.digest in self._active.index:
            self._active = None

    def __getitem__(self, slot: int) -> LoraWeights:
        weights = self._slots[slot]
        assert weights is not None, f"slot {slot} is empty"
        return weights

    def concatenated(self, slots: Iterable[int]) -> ConcatenatedAdapters:
        """A copy with at least the adapters in `slots`."""
        wanted = {self[slot].digest: self[slot] for slot in slots}
        size = sum(weights.nbytes for weights in wanted.values())
        current = self._active
        if current is None or not wanted.keys() <= current.index.keys() or current.adapter_bytes > self.SLACK * size:
            current = self._active = ConcatenatedAdapters([wanted[digest] for digest in sorted(wanted)])
        return current

    @property
    def nbytes(self) -> int:
        """Bytes of the copy. The adapters themselves belong to the adapter cache."""
        return 0 if self._active is None else self._active.nbytes


class Run:
    """Adjacent short segments of several mixes, computed together: rows `start` to `stop`.

    Per module: V = X A^T over the ranks of all adapters, times each row's weight per rank, times B^T. These are two
    products for any number of adapters, and modules with a common input share the first.
    """

    def __init__(self, segments: Sequence[Segment], table: SlotTable, adapters: ConcatenatedAdapters) -> None:
        self.start, self.stop = segments[0].start, segments[-1].stop
        self.module = adapters.module
        self._by_members: dict[tuple[tuple[int, int, float], ...], tuple[torch.Tensor, torch.Tensor]] = {}
        self._shrunk: tuple[Shrink, torch.Tensor] | None = None
        weights = torch.zeros(self.stop - self.start, len(adapters.index))
        for segment in segments:
            for slot, weight in segment.mix:
                index = adapters.index[table[slot].digest]
                weights[segment.start - self.start : segment.stop - self.start, index] += weight
        self._weights = weights

    def shrunk(self, shrink: Shrink, x: torch.Tensor) -> torch.Tensor:
        """X A^T of the run's rows of x [T, in], times row weights and scales: [rows, R] in the dtype of x.

        The last product is cached, since modules with a common input follow each other.
        """
        if self._shrunk is None or self._shrunk[0] is not shrink:
            weights, unused = self._ranked(shrink.members, x.dtype)
            v = matmul(x[self.start : self.stop], shrink.A)
            # Masked as well as multiplied by zero, since an overflow in one adapter must not reach other rows.
            self._shrunk = shrink, v.mul_(weights).masked_fill_(unused, 0.0)
        return self._shrunk[1]

    def _ranked(
        self, members: tuple[tuple[int, int, float], ...], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's weight for each rank [rows, R], and where it is zero.

        In `dtype` if that represents all of them exactly, which avoids conversions; otherwise in float32.
        """
        known = self._by_members.get(members)
        if known is None:
            indexes = [index for index, rank, _ in members for _ in range(rank)]
            scales = torch.tensor([scale for _, rank, scale in members for _ in range(rank)])
            ranked = self._weights[:, indexes] * scales
            if torch.equal(ranked.to(dtype).float(), ranked):
                ranked = ranked.to(dtype)
            known = self._by_members[members] = (ranked, ranked == 0)
        return known


class Segments:
    """The rows of a step by mix, in ascending order and without rows that have no adapters.

    `all` has every segment. `runs` and `long` are the same rows, divided into batched runs and long segments.
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
                long.append(group[0])  # two products per adapter cost no more than a run
            else:
                shared.append(group)
        active = {slot for group in shared for segment in group for slot, _ in segment.mix}
        adapters = self.table.concatenated(active) if active else None
        return [Run(group, self.table, adapters) for group in shared if adapters is not None], long
