"""`AdapterPool`: the adapters on a GPU, in one piece of memory of a fixed number of bytes, each at its true size.

Owns where each adapter lies and the tables that tell the kernels. Copies go over a stream of their own, all of them
from pinned memory, so that nobody waits on the host; whoever computes waits, on the device, for those it uses
(`ready`), and a copy for the steps that have read what it overwrites (`used`), which others need not end for.
Does not know who may hold a slot (engine/slots.py): it is asked for room that there is, and moves adapters
together where it is in too many pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.engine.slots import Room
from server.errors import NoCapacity
from server.kernels.cuda.lora import Pool
from server.kernels.cuda.places import Places, Shapes
from server.kernels.lora import SITES
from server.model.config import ModelConfig

PIECE = 8 << 20
"""Elements that are moved at once."""
KINDS = 64
"""Of adapters by their modules, of which it is remembered where those are in the tables."""
ALIGNMENT = 64
"""Elements that every adapter's place is a multiple of."""


class AdapterPool:
    """Room for adapters of `nbytes` bytes in all, in up to `slots` slots: in codes if `coded`, else of `dtype`, which
    the rows of a step are of."""

    def __init__(
        self, config: ModelConfig, nbytes: int, slots: int, device: torch.device, dtype: torch.dtype, coded: bool
    ) -> None:
        kept = torch.int8 if coded else dtype
        sites = config.num_hidden_layers * len(SITES)
        self._shapes = config.linear_shapes()
        self._site = {path: i for i, path in enumerate(self._shapes)}
        self._found: dict[Shapes, np.ndarray] = {}
        """Most adapters have the same modules as others."""
        self._size = nbytes // kept.itemsize // ALIGNMENT * ALIGNMENT
        self._in_units = kept.itemsize / torch.float32.itemsize
        """What an element is of one of the units of codes."""
        self._placed: dict[int, tuple[int, int]] = {}
        """Slot -> (start, size) in elements."""
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
    def room(self) -> Room:
        """What adapters may take together, and what one takes."""
        return Room(self.pool.values.nbytes, self.cost)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, its tables, and what moves go through."""
        pool = self.pool
        return sum(t.nbytes for t in (pool.values, pool.offsets, pool.ranks, pool.scales, self._between))

    def cost(self, weights: LoraWeights) -> int:
        """Bytes that a prepared adapter takes of the pool. Asked for each of those that wait, so it is quick."""
        size = self.pool.values.element_size()
        held = next((update.A.untyped_storage().nbytes() for update in weights.modules.values()), 0)
        return _aligned(-(-held // size)) * size

    def place(self, slot: int, weights: LoraWeights) -> None:
        """Copy a prepared adapter into a slot, behind the steps that read what is overwritten.

        Raises ValueError if it is not this base's or was not prepared, NoCapacity if the pool lacks room.
        """
        self.clear(slot)
        places = weights.places
        if not isinstance(places, Places) or places.flat.dtype != self.pool.values.dtype:
            raise ValueError(f"the adapter {weights.name!r} was not prepared for the CUDA kernels of this base")
        found, flat = self._sites(places.shapes), places.flat
        start = self._room(flat.numel())
        # Numpy: a call of torch for each of hundreds of numbers takes longer than the copy.
        offsets, ranks, scales = (table[slot].numpy() for table in self._tables)
        ranks[:] = 0
        offsets[found] = places.offsets + self._moved(start).numpy()
        ranks[found], scales[found] = places.ranks, places.scales
        self._placed[slot] = (start, _aligned(flat.numel()))
        self.ranks[slot] = int(ranks.max())
        try:
            with self._copying(slot):
                self._wait_for_readers(slot)
                self._tell(slot)
                self.pool.values[start : start + flat.numel()].copy_(flat, non_blocking=True)
        except BaseException:
            self.clear(slot)
            raise

    def clear(self, slot: int) -> None:
        """Empty a slot. No step that is still to be launched may use it."""
        start, length = self._placed.pop(slot, (0, 0))
        if length and slot in self._uses:
            self._left.append((start, start + length, self._uses[slot]))
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

    def _sites(self, shapes: Shapes) -> np.ndarray:
        """The rows of the tables of modules with these shapes. Raises ValueError for one that the base lacks."""
        found = self._found.get(shapes)
        if found is None:
            for path, shape in shapes:
                if shape != self._shapes.get(path):
                    raise ValueError(f"the base has no linear {path} that this adapter could change")
            if len(self._found) >= KINDS:
                self._found.clear()
            found = self._found[shapes] = np.array([self._site[path] for path, _ in shapes], np.int64)
        return found

    def _wait_for_readers(self, slot: int) -> None:
        """Let the copy to a slot's place wait for whoever reads the slot's numbers or what lay there before."""
        if self._stream is None:
            return
        start, length = self._placed[slot]
        self._left = [each for each in self._left if not each[2].query()]  # type: ignore[no-untyped-call]
        events = {event for begin, end, event in self._left if begin < start + length and start < end}
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

    def _room(self, size: int) -> int:
        """The start of a free piece of so many elements; adapters are moved together if there is none but room."""
        size = _aligned(size)
        held = sum(length for _, length in self._placed.values())
        if held + size > self._size:
            raise NoCapacity(
                f"an adapter of {size * self.pool.values.element_size()} bytes finds no room in the "
                f"{self._size * self.pool.values.element_size()} of the GPU's pool (--adapter-device-memory)"
            )
        end = 0
        for start, length in sorted(self._placed.values()):
            if start - end >= size:
                return end
            end = start + length
        if self._size - end >= size:
            return end
        return self._move_together()

    def _moved(self, by: int) -> torch.Tensor:
        """What is added to a site's offsets where an adapter lies so many elements further on."""
        return torch.tensor([by, by, int(by * self._in_units)])

    def _move_together(self) -> int:
        """Close all gaps; answers where the free room begins.

        Whatever memory an adapter's move takes is there before it begins: half of one would be no adapter any more.
        """
        end = 0
        values = self.pool.values
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # any step may read any of them
        with self._copying(*self._placed):
            for slot, (start, length) in sorted(self._placed.items(), key=lambda item: item[1]):
                if start != end:
                    offsets = self._sent(self._tables[0][slot] + self._moved(end - start))
                    for at in range(0, length, len(self._between)):
                        piece = self._between[: length - at]
                        piece.copy_(values[start + at : start + at + len(piece)])
                        values[end + at : end + at + len(piece)].copy_(piece)
                    self.pool.offsets[slot].copy_(offsets, non_blocking=True)
                    self._tables[0][slot] = offsets
                    self._placed[slot] = (end, length)
                end += length
        return end


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
