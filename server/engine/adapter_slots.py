"""The slots of the adapters that a step can use: who holds them, all or nothing for a mix.

Owns slot numbers. Places weights through the runner's two calls and knows nothing else of it. Changed by the engine's
thread alone; whoever else looks (`has`, `holds`, what is resident or in use) is told of a moment.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from adapters.lru import LRU
from adapters.weights import LoraWeights, Mix
from server.errors import NoCapacity


@dataclass(frozen=True)
class AdapterMemory:
    """Memory that adapters in slots take for themselves: its bytes, and what one adapter takes of them."""

    nbytes: int
    cost: Callable[[LoraWeights], int]


class AdapterSlots:
    """`count` places for adapters, by digest. What no request holds stays resident until its place is needed.

    `room` bounds what all of them take together; None where they take nothing of their own.
    """

    def __init__(
        self,
        count: int,
        place: Callable[[int, LoraWeights], None],
        clear: Callable[[int], None],
        room: AdapterMemory | None = None,
    ) -> None:
        self.count = count
        self.room = room
        self.evictions = 0
        """Adapters that left because their place was needed, of all time."""
        self._place = place
        self._clear = clear
        self._open = list(range(count - 1, -1, -1))
        self._slot_of: dict[str, int] = {}
        self._held: LRU[str] = LRU(count if room is None else room.nbytes, on_evict=self._evict)
        self._leaving: set[str] = set()
        self._bytes: dict[str, int] = {}

    @property
    def hold_ram(self) -> bool:
        """Whether an adapter with a slot is in RAM for it. What takes memory of its own there is a copy."""
        return self.room is None

    @property
    def resident(self) -> list[str]:
        """The digests that have a slot, least recently used first."""
        return list(self._held)

    @property
    def in_use(self) -> int:
        """How many slots requests hold now."""
        return sum(self._held.pins(digest) > 0 for digest in self._held)

    def has(self, mix: Mix) -> bool:
        """Whether every adapter of `mix` is resident, so that `reserve` needs no weights."""
        return all(digest in self._slot_of for digest, _ in mix)

    def reserve(self, mix: Mix, weights: Sequence[LoraWeights] | None) -> tuple[tuple[int, float], ...] | None:
        """The (slot, weight) pairs of a mix, held until `free`; None and no change if there is no room now.

        `weights` are those of the mix, in its order; None if `has(mix)`. What the runner raises while it places an
        adapter is raised, and nothing is held; NoCapacity, if the mix alone is over the room.
        """
        missing = [i for i, digest in enumerate(mix.digests) if digest not in self._slot_of]
        if not self._held.reserve(self._costs(mix, weights)):
            return None
        try:
            for i in missing:
                assert weights is not None and weights[i].digest == mix.digests[i], "the weights are those of the mix"
                slot = self._slot_of[weights[i].digest] = self._open.pop()
                self._place(slot, weights[i])
                self._bytes[weights[i].digest] = weights[i].nbytes
        except BaseException:
            self._held.free(mix.digests)
            for digest in [mix.digests[i] for i in missing]:
                self._held.remove(digest)
                if digest in self._slot_of:
                    self._vacate(digest)
            raise
        return tuple((self._slot_of[digest], weight) for digest, weight in mix)

    def offer(self, mix: Mix, weights: Sequence[LoraWeights], spared: Collection[str]) -> None:
        """Let a mix that will be needed be copied meanwhile, into room that no request holds; what finds none is left.

        Those in `spared` do not go for it. Raises as `reserve` does; then the adapter that is at fault has no slot.
        """
        for digest, cost in self._costs(mix, weights).items():
            if digest in self._slot_of or not self._held.make_room(cost, spared):
                continue
            self._held.add(digest, cost)
            slot = self._slot_of[digest] = self._open.pop()
            one = next(each for each in weights if each.digest == digest)
            try:
                self._place(slot, one)
            except BaseException:
                self._held.remove(digest)
                self._vacate(digest)
                raise
            self._bytes[digest] = one.nbytes

    def free(self, mix: Mix) -> None:
        """The holder of `mix` needs it no more."""
        self._held.free(mix.digests)
        for digest in self._leaving.intersection(mix.digests):
            self.unload(digest)

    def unload(self, digest: str) -> None:
        """Empty the slot of an adapter as soon as no request holds it. One that is not resident is no error."""
        if self._held.pins(digest):
            self._leaving.add(digest)
        elif digest in self._held:
            self._held.remove(digest)
            self._vacate(digest)

    def release_idle(self, nbytes: int) -> None:
        """Empty slots that no request holds until adapters of `nbytes` in RAM are let go, least recently used first."""
        for digest in self.resident if self.hold_ram else ():
            if nbytes <= 0:
                return
            if not self._held.pins(digest):
                nbytes -= self._bytes[digest]
                self.evictions += 1
                self.unload(digest)

    def reset(self) -> None:
        """Empty every slot, whoever held it."""
        for digest in self.resident:
            while self._held.pins(digest):
                self._held.free([digest])
            self.unload(digest)

    def holds(self, digest: str) -> bool:
        """Whether the adapter has a slot now. From any thread."""
        return digest in self._slot_of

    def _costs(self, mix: Mix, weights: Sequence[LoraWeights] | None) -> dict[str, int]:
        """What each adapter of a mix takes; never so little that more could be resident than there are slots."""
        if self.room is None:
            return dict.fromkeys(mix.digests, 1)
        if weights is None:
            return {digest: self._held.cost(digest) for digest in mix.digests}
        least = self.room.nbytes // (self.count + 1) + 1  # so many fit, and one more does not
        costs = {each.digest: max(least, self.room.cost(each)) for each in weights}
        total = sum(costs.values())
        if total > self.room.nbytes:
            raise NoCapacity(
                f"the mix's adapters take {total} bytes of GPU memory, and there is room for {self.room.nbytes} "
                "(--adapter-device-memory)",
                "adapters",
            )
        return costs

    def _evict(self, digest: str) -> None:
        self.evictions += 1
        self._vacate(digest)

    def _vacate(self, digest: str) -> None:
        slot = self._slot_of.pop(digest)
        self._bytes.pop(digest, None)
        self._open.append(slot)
        self._leaving.discard(digest)
        self._clear(slot)
