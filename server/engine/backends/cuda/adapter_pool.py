"""`AdapterPool`: adapters on a GPU in one piece of memory, without padding.

An adapter may be split between matrices where no free range fits it. If even that fails, the pool is compacted. Copies
run on their own stream from pinned memory. Steps wait on the device for the copies that they need (`wait_for_copies`),
and copies wait for the steps that read what they overwrite (`record_use`).
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
from server.kernels.cuda.lora import DeviceAdapters
from server.kernels.lora import TARGET_MODULES, module_finder
from server.model.config import ModelConfig

PIECE = 8 << 20
"""Elements that compaction moves at a time."""
SPARE = 50
"""One part in so many of the pool stays free, so that fragmentation rarely forces compaction."""


class Part(NamedTuple):
    """`length` elements of an adapter's memory, from `begin` on, which lie at `start` of the pool."""

    start: int
    begin: int
    length: int


class AdapterPool:
    """Adapters of `nbytes` bytes in all, in up to `slots` slots.

    Args:
        config: The base model's configuration.
        nbytes: Size of the pool.
        slots: Number of slots.
        device: The GPU.
        dtype: Dtype of activations, and of adapters that are not int8.
        int8: Whether adapters are int8.
    """

    def __init__(
        self, config: ModelConfig, nbytes: int, slots: int, device: torch.device, dtype: torch.dtype, coded: bool
    ) -> None:
        kept = torch.int8 if coded else dtype
        modules = config.num_hidden_layers * len(TARGET_MODULES)
        self._find_modules = module_finder(config.linear_shapes())
        self._size = nbytes // LINE * LINE // kept.itemsize
        self._per_offset = np.array([1, 1, max(1, torch.float32.itemsize // kept.itemsize)])
        """Elements per unit of the offset columns: rank scales are float32."""
        self._parts: dict[int, list[Part]] = {}
        self._free = [(0, self._size)]
        """(start, length) of each free range, in order and not adjacent."""
        self._tables = (
            torch.zeros(slots, modules, 3, dtype=torch.int64),
            torch.zeros(slots, modules, dtype=torch.int32),
            torch.zeros(slots, modules),
        )
        offsets, ranks, scales = (table.to(device) for table in self._tables)
        self.pool = DeviceAdapters(torch.empty(self._size, dtype=kept, device=device), offsets, ranks, scales, dtype)
        self._buffer = torch.empty(min(PIECE, self._size), dtype=kept, device=device)
        """Buffer for compaction, whose source and target may overlap."""
        self.ranks = [0] * slots
        """The largest rank of each slot's adapter."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copies: dict[int, torch.cuda.Event] = {}
        """Slot -> event of its copy, until a step waits for it."""
        self._last_uses: dict[int, torch.cuda.Event] = {}
        """Slot -> event of the last step that reads it, kept after it is unloaded."""
        self._unloaded: list[tuple[int, int, torch.cuda.Event]] = []
        """(start, end, event) of unloaded adapters that steps may still read."""

    @property
    def room(self) -> AdapterMemory:
        """Capacity for adapters and the size of one."""
        return AdapterMemory(self.pool.values.nbytes - self.pool.values.nbytes // SPARE, self.cost)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool, its tables and the compaction buffer."""
        pool = self.pool
        return sum(t.nbytes for t in (pool.values, pool.offsets, pool.ranks, pool.scales, self._buffer))

    def cost(self, weights: LoraWeights) -> int:
        """Bytes of a prepared adapter in the pool."""
        held = next((update.A.untyped_storage().nbytes() for update in weights.modules.values()), 0)
        return -(-held // LINE) * LINE

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Copy a prepared adapter into a slot, after the steps that read what it overwrites.

        Raises:
            ValueError: The adapter does not fit this base or was not prepared for these kernels.
            NoCapacity: The pool is full.
        """
        self.unload_adapter(slot)
        layout = weights.layout
        if not isinstance(layout, AdapterLayout) or layout.flat.dtype != self.pool.values.dtype:
            raise ValueError(f"the adapter {weights.name!r} was not prepared for the CUDA kernels of this base")
        indexes = self._find_modules(layout.shapes)
        self._parts[slot] = parts = self._allocate(layout)
        # NumPy, because hundreds of small torch operations would take longer than the copy.
        offsets, ranks, scales = (table[slot].numpy() for table in self._tables)
        ranks[:] = 0
        offsets[indexes] = self._offsets(layout, parts)
        ranks[indexes], scales[indexes] = layout.ranks, layout.scales
        self.ranks[slot] = int(ranks.max())
        try:
            with self._copying(slot):
                self._wait_for_readers(slot)
                self._send_tables(slot)
                for start, begin, length in parts:
                    source = layout.flat[begin : begin + length]
                    self.pool.values[start : start + length].copy_(source, non_blocking=True)
        except BaseException:
            self.unload_adapter(slot)
            raise

    def unload_adapter(self, slot: int) -> None:
        """Empty a slot. Later steps must not use it."""
        for start, _, length in self._parts.pop(slot, ()):
            if slot in self._last_uses:
                self._unloaded.append((start, start + length, self._last_uses[slot]))
            self._release(start, length)
        self._copies.pop(slot, None)
        self.ranks[slot] = 0

    def wait_for_copies(self, slots: Iterable[int]) -> None:
        """Make later launches wait for the copies to `slots`."""
        if self._copies:
            for event in {self._copies.pop(slot) for slot in slots if slot in self._copies}:
                torch.cuda.current_stream().wait_event(event)

    def record_use(self, slots: Iterable[int]) -> None:
        """Record that a step which reads `slots` was launched."""
        if self._stream is not None and (read := dict.fromkeys(slots)):
            over = torch.cuda.Event()  # type: ignore[no-untyped-call]
            over.record()
            self._last_uses.update(dict.fromkeys(read, over))

    def _wait_for_readers(self, slot: int) -> None:
        """Make the copy to a slot wait for the steps that read the slot's tables or the memory it overwrites."""
        if self._stream is None:
            return
        self._unloaded = [each for each in self._unloaded if not each[2].query()]  # type: ignore[no-untyped-call]
        events = {
            event
            for begin, end, event in self._unloaded
            if any(begin < start + length and start < end for start, _, length in self._parts[slot])
        }
        if slot in self._last_uses:
            events.add(self._last_uses[slot])
        for event in events:
            self._stream.wait_event(event)

    def _send_tables(self, slot: int) -> None:
        """Copy a slot's rows of the tables to the device."""
        for table, held in zip(self._tables, (self.pool.offsets, self.pool.ranks, self.pool.scales), strict=True):
            held[slot].copy_(self._pinned(table[slot]), non_blocking=True)

    def _pinned(self, row: torch.Tensor) -> torch.Tensor:
        """A copy of a table row in pinned memory. Raises RuntimeError if there is none."""
        return row.clone() if self._stream is None else row.pin_memory()

    @contextmanager
    def _copying(self, *slots: int) -> Iterator[None]:
        """Run copies to `slots` on the copy stream."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:  # earlier copies continue if a later one fails
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record()
                self._copies.update(dict.fromkeys(slots, done))

    def _allocate(self, layout: AdapterLayout) -> list[Part]:
        """Allocate room for an adapter: the first range that fits, or parts of several ranges. Raises NoCapacity."""
        size, cuts = layout.flat.numel(), layout.cuts
        if not size:
            return []
        if sum(length for _, length in self._free) < size:
            each = self.pool.values.element_size()
            raise NoCapacity(
                f"an adapter of {size * each} bytes does not fit into the GPU's {self._size * each} bytes for them; "
                "raise --adapter-device-memory"
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
        else:  # the remaining ranges are too small for any matrix
            parts = [Part(self._compact(), 0, size)]
        for start, _, length in parts:
            self._reserve(start, length)
        return parts

    def _reserve(self, start: int, length: int) -> None:
        """Allocate the beginning of a free range."""
        at = bisect(self._free, (start, self._size)) - 1
        _, free = self._free[at]
        self._free[at : at + 1] = [(start + length, free - length)] if free > length else []

    def _release(self, start: int, length: int) -> None:
        at = bisect(self._free, (start, 0))
        end = start + length
        if at < len(self._free) and self._free[at][0] == end:
            end += self._free.pop(at)[1]
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, end - start))

    def _offsets(self, layout: AdapterLayout, parts: list[Part]) -> np.ndarray:
        """Table offsets of an adapter's matrices, int64 [modules, 3]."""
        begins = np.array([part.begin for part in parts])
        shifts = np.array([part.start - part.begin for part in parts])
        lie = layout.begins + shifts[np.searchsorted(begins, layout.begins, side="right") - 1]
        offsets: np.ndarray = lie // self._per_offset
        return offsets

    def _compact(self) -> int:
        """Compact the pool; returns where the free range begins.

        Tables are allocated before a part is moved, so that a failure leaves every adapter intact.
        """
        end, values = 0, self.pool.values
        moves: list[tuple[int, int, int]] = []  # slot, part index, target
        for slot, at in sorted(
            ((slot, at) for slot, parts in self._parts.items() for at in range(len(parts))),
            key=lambda one: self._parts[one[0]][one[1]].start,
        ):
            part = self._parts[slot][at]
            if part.start != end:
                moves.append((slot, at, end))
            end += part.length
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())  # any step may read any part
        with self._copying(*{slot for slot, *_ in moves}):
            for slot, at, to in moves:
                part = self._parts[slot][at]
                offsets = self._pinned(self._tables[0][slot] + self._shift(slot, part, to))
                for done in range(0, part.length, len(self._buffer)):
                    piece = self._buffer[: part.length - done]
                    piece.copy_(values[part.start + done : part.start + done + len(piece)])
                    values[to + done : to + done + len(piece)].copy_(piece)
                self.pool.offsets[slot].copy_(offsets, non_blocking=True)
                self._tables[0][slot] = offsets
                self._parts[slot][at] = part._replace(start=to)
                self._release(part.start, part.length)
                self._reserve(to, part.length)
        return end

    def _shift(self, slot: int, part: Part, to: int) -> torch.Tensor:
        """What to add to a slot's offsets when one of its parts moves; zero for matrices in other parts."""
        lie = self._tables[0][slot].numpy() * self._per_offset
        within = (part.start <= lie) & (lie < part.start + part.length)
        return torch.from_numpy(within * (to - part.start) // self._per_offset)
