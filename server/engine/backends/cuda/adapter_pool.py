"""`AdapterPool`: the adapters on a GPU, in one piece of memory of a fixed number of bytes, each at its true size.

Owns where each adapter lies and the tables that tell the kernels, of each matrix by itself: an adapter that no free
piece has room for is parted between matrices. Copies go over a stream of their own, all of them from pinned memory, so
that nobody waits on the host; whoever computes waits, on the device, for those it uses (`ready`), and a copy for the
steps that have read what it overwrites (`used`), which others need not end for. Does not know who may hold a slot
(engine/slots.py): it is asked for room that there is, and moves adapters together where not even matrices fit.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.engine.adapter_slots import AdapterMemory
from server.errors import NoCapacity
from server.kernels.cuda.adapter_layout import LINE, AdapterLayout
from server.kernels.cuda.lora import Pool
from server.kernels.lora import TARGET_MODULES, module_finder
from server.model.config import ModelConfig

PIECE = 8 << 20
"""Elements that are moved at once."""
SPARE = 50
"""Of the pool, one part in so many stays free: else what is free is soon in pieces that no matrix fits into, and for
every few adapters of different ranks that come nearly all others are moved."""


class Part(NamedTuple):
    """`length` elements of an adapter's memory, from `begin` on, that lie at `start` of the pool."""

    start: int
    begin: int
    length: int


class AdapterPool:
    """AdapterMemory for adapters of `nbytes` bytes in all, in up to `slots` slots: in codes if `coded`, else of
    `dtype`, which
    the rows of a step are of."""

    def __init__(
        self, config: ModelConfig, nbytes: int, slots: int, device: torch.device, dtype: torch.dtype, coded: bool
    ) -> None:
        kept = torch.int8 if coded else dtype
        sites = config.num_hidden_layers * len(TARGET_MODULES)
        self._find_modules = module_finder(config.linear_shapes())
        self._size = nbytes // LINE * LINE // kept.itemsize
        self._per_place = np.array([1, 1, max(1, torch.float32.itemsize // kept.itemsize)])
        """Elements that one more in a row of the tables means: units are counted in float32 beside codes."""
        self._placed: dict[int, list[Part]] = {}
        self._free = [(0, self._size)]
        """(start, length) of each free piece, in order and none beside another."""
        self._tables = (
            torch.zeros(slots, sites, 3, dtype=torch.int64),
            torch.zeros(slots, sites, dtype=torch.int32),
            torch.zeros(slots, sites),
        )
        offsets, ranks, scales = (table.to(device) for table in self._tables)
        self.pool = Pool(torch.empty(self._size, dtype=kept, device=device), offsets, ranks, scales, dtype)
        self._between = torch.empty(min(PIECE, self._size), dtype=kept, device=device)
        """What is moved lies here meanwhile: the two places may overlap."""
        self.ranks = [0] * slots
        """The largest rank of each slot's adapter: its lanes."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copies: dict[int, torch.cuda.Event] = {}
        """Slot -> what tells that its copy is done, until somebody has waited for it."""
        self._uses: dict[int, torch.cuda.Event] = {}
        """Slot -> what tells that the last step that has read it is over; kept when the slot is emptied."""
        self._left: list[tuple[int, int, torch.cuda.Event]] = []
        """(start, end, that event) of adapters that are no longer placed, in elements."""

    @property
    def room(self) -> AdapterMemory:
        """What adapters may take together, and what one takes."""
        return AdapterMemory(self.pool.values.nbytes - self.pool.values.nbytes // SPARE, self.cost)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, its tables, and what moves go through."""
        pool = self.pool
        return sum(t.nbytes for t in (pool.values, pool.offsets, pool.ranks, pool.scales, self._between))

    def cost(self, weights: LoraWeights) -> int:
        """Bytes that a prepared adapter takes of the pool. Asked for each of those that wait, so it is quick."""
        held = next((update.A.untyped_storage().nbytes() for update in weights.modules.values()), 0)
        return -(-held // LINE) * LINE

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Copy a prepared adapter into a slot, behind the steps that read what is overwritten.

        Raises ValueError if it is not this base's or was not prepared, NoCapacity if the pool lacks room.
        """
        self.unload_adapter(slot)
        places = weights.layout
        if not isinstance(places, AdapterLayout) or places.flat.dtype != self.pool.values.dtype:
            raise ValueError(f"the adapter {weights.name!r} was not prepared for the CUDA kernels of this base")
        found = self._find_modules(places.shapes)
        self._placed[slot] = parts = self._room(places)
        # Numpy: a call of torch for each of hundreds of numbers takes longer than the copy.
        offsets, ranks, scales = (table[slot].numpy() for table in self._tables)
        ranks[:] = 0
        offsets[found] = self._offsets(places, parts)
        ranks[found], scales[found] = places.ranks, places.scales
        self.ranks[slot] = int(ranks.max())
        try:
            with self._copying(slot):
                self._wait_for_readers(slot)
                self._tell(slot)
                for start, begin, length in parts:
                    source = places.flat[begin : begin + length]
                    self.pool.values[start : start + length].copy_(source, non_blocking=True)
        except BaseException:
            self.unload_adapter(slot)
            raise

    def unload_adapter(self, slot: int) -> None:
        """Empty a slot. No step that is still to be launched may use it."""
        for start, _, length in self._placed.pop(slot, ()):
            if slot in self._uses:
                self._left.append((start, start + length, self._uses[slot]))
            self._give_back(start, length)
        self._copies.pop(slot, None)
        self.ranks[slot] = 0

    def ready(self, slots: Iterable[int]) -> None:
        """Let what is launched from now on see the adapters in `slots`; copies of others go on beside it."""
        if self._copies:
            for event in {self._copies.pop(slot) for slot in slots if slot in self._copies}:
                torch.cuda.current_stream().wait_event(event)

    def used(self, slots: Iterable[int]) -> None:
        """A step that reads the adapters in `slots` has been launched."""
        if self._stream is not None and (read := dict.fromkeys(slots)):
            over = torch.cuda.Event()  # type: ignore[no-untyped-call]
            over.record()
            self._uses.update(dict.fromkeys(read, over))

    def _wait_for_readers(self, slot: int) -> None:
        """Let the copy to a slot's place wait for whoever reads the slot's numbers or what lay there before."""
        if self._stream is None:
            return
        self._left = [each for each in self._left if not each[2].query()]  # type: ignore[no-untyped-call]
        events = {
            event
            for begin, end, event in self._left
            if any(begin < start + length and start < end for start, _, length in self._placed[slot])
        }
        if slot in self._uses:
            events.add(self._uses[slot])
        for event in events:
            self._stream.wait_event(event)

    def _tell(self, slot: int) -> None:
        """Bring a slot's rows of the tables to the device, from memory that nobody changes until they are there."""
        for table, held in zip(self._tables, (self.pool.offsets, self.pool.ranks, self.pool.scales), strict=True):
            held[slot].copy_(self._sent(table[slot]), non_blocking=True)

    def _sent(self, row: torch.Tensor) -> torch.Tensor:
        """A row of a table in memory of its own that the device reads. Raises RuntimeError if there is none."""
        return row.clone() if self._stream is None else row.pin_memory()

    @contextmanager
    def _copying(self, *slots: int) -> Iterator[None]:
        """The stream of copies to `slots`."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:  # what was launched goes on, whatever fails behind it
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
                self._copies.update(dict.fromkeys(slots, done))

    def _room(self, places: AdapterLayout) -> list[Part]:
        """Free room for an adapter, taken: the first piece that has it all, or else parts of those from the pool's
        start on. Raises NoCapacity."""
        size, cuts = places.flat.numel(), places.cuts
        if not size:
            return []
        if sum(length for _, length in self._free) < size:
            each = self.pool.values.element_size()
            raise NoCapacity(
                f"an adapter of {size * each} bytes finds no room in the {self._size * each} of the GPU's pool "
                "(--adapter-device-memory)"
            )
        parts, begin = list[Part](), 0
        whole = next((piece for piece in self._free if piece[1] >= size), None)
        for start, length in self._free if whole is None else [whole]:
            end = int(cuts[np.searchsorted(cuts, begin + length, side="right") - 1])
            if end > begin:
                parts.append(Part(start, begin, end - begin))
                begin = end
            if begin == size:
                break
        else:  # what is left of the pieces is too small for any matrix
            parts = [Part(self._move_together(), 0, size)]
        for start, _, length in parts:
            self._take(start, length)
        return parts

    def _take(self, start: int, length: int) -> None:
        """A part at the beginning of a free piece is free no more."""
        at = bisect(self._free, (start, self._size)) - 1
        _, free = self._free[at]
        self._free[at : at + 1] = [(start + length, free - length)] if free > length else []

    def _give_back(self, start: int, length: int) -> None:
        at = bisect(self._free, (start, 0))
        end = start + length
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, end - start))

    def _offsets(self, places: AdapterLayout, parts: list[Part]) -> np.ndarray:
        """What the tables tell of where an adapter's matrices are, int64 [modules, 3]."""
        begins = np.array([part.begin for part in parts])
        shifts = np.array([part.start - part.begin for part in parts])
        lie = places.begins + shifts[np.searchsorted(begins, places.begins, side="right") - 1]
        offsets: np.ndarray = lie // self._per_place
        return offsets

    def _move_together(self) -> int:
        """Close all gaps; answers where the free room begins.

        Whatever memory a part's move takes is there before it begins: half of one would be no adapter any more.
        """
        end, values = 0, self.pool.values
        moves: list[tuple[int, int, int]] = []  # slot, which of its parts, to where
        for slot, at in sorted(
            ((slot, at) for slot, parts in self._placed.items() for at in range(len(parts))),
            key=lambda one: self._placed[one[0]][one[1]].start,
        ):
            part = self._placed[slot][at]
            if part.start != end:
                moves.append((slot, at, end))
            end += part.length
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # any step may read any of them
        with self._copying(*{slot for slot, *_ in moves}):
            for slot, at, to in moves:
                part = self._placed[slot][at]
                offsets = self._sent(self._tables[0][slot] + self._shift(slot, part, to))
                for done in range(0, part.length, len(self._between)):
                    piece = self._between[: part.length - done]
                    piece.copy_(values[part.start + done : part.start + done + len(piece)])
                    values[to + done : to + done + len(piece)].copy_(piece)
                self.pool.offsets[slot].copy_(offsets, non_blocking=True)
                self._tables[0][slot] = offsets
                self._placed[slot][at] = part._replace(start=to)
                self._give_back(part.start, part.length)
                self._take(to, part.length)
        return end

    def _shift(self, slot: int, part: Part, to: int) -> torch.Tensor:
        """What is added to a slot's offsets when one of its parts moves: nothing for what lies in others."""
        lie = self._tables[0][slot].numpy() * self._per_place
        within = (part.start <= lie) & (lie < part.start + part.length)
        return torch.from_numpy(within * (to - part.start) // self._per_place)
