"""`AdapterSlots`: assigns adapters to the slots of the runner, all adapters of a mix or none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from adapters.lru import LRU
from adapters.weights import LoraWeights, Mix
from server.errors import NoCapacity


@dataclass(frozen=True)
class AdapterMemory:
    """Device memory for copies of adapters: its size in bytes, and a function for the bytes of one adapter."""

    nbytes: int
    cost: Callable[[LoraWeights], int]


class AdapterSlots:
    """`count` slots for adapters, by digest. An adapter that no request uses stays until its slot is needed.

    Only the engine's thread changes it. Other threads may read `has`, `holds`, `resident` and `in_use`.

    Args:
        count: Number of slots.
        load: Loads weights into a slot.
        clear: Empties a slot.
        memory: Memory that limits all adapters together. None if slots use the copy in RAM.
    """

    def __init__(
        self,
        count: int,
        load: Callable[[int, LoraWeights], None],
        clear: Callable[[int], None],
        memory: AdapterMemory | None = None,
    ) -> None:
        self.count = count
        self.memory = memory
        self.evictions = 0
        """Adapters evicted because their slot or memory was needed, since the start."""
        self._load = load
        self._clear = clear
        self._free = list(range(count - 1, -1, -1))
        self._slot_of: dict[str, int] = {}
        self._lru: LRU[str] = LRU(count if memory is None else memory.nbytes, on_evict=self._evict)
        self._unloading: set[str] = set()
        """Adapters to unload when their last request ends."""
        self._bytes: dict[str, int] = {}

    @property
    def use_ram(self) -> bool:
        """Whether an adapter with a slot stays in RAM. A device with memory of its own has copies."""
        return self.memory is None

    @property
    def resident(self) -> list[str]:
        """The digests of adapters with a slot, least recently used first."""
        return list(self._lru)

    @property
    def in_use(self) -> int:
        """Number of slots that requests use."""
        return sum(self._lru.pins(digest) > 0 for digest in self._lru)

    def has(self, mix: Mix) -> bool:
        """Whether every adapter of the mix has a slot, so that `reserve` needs no weights."""
        return all(digest in self._slot_of for digest, _ in mix)

    def holds(self, digest: str) -> bool:
        """Whether the adapter has a slot."""
        return digest in self._slot_of

    def reserve(self, mix: Mix, weights: Sequence[LoraWeights] | None) -> tuple[tuple[int, float], ...] | None:
        """Reserve slots for all adapters of a mix until `release`.

        Args:
            weights: The weights in the mix's order. May be None if `has(mix)`.

        Returns:
            The (slot, weight) pairs of the mix, or None, without any change, if there is no room now.

        Raises:
            NoCapacity: If the mix alone exceeds the memory.
            Exception: What the runner raises. Nothing is reserved then.
        """
        missing = [i for i, digest in enumerate(mix.digests) if digest not in self._slot_of]
        if not self._lru.reserve(self._costs(mix, weights)):
            return None
        try:
            for i in missing:
                assert weights is not None and weights[i].digest == mix.digests[i], "weights are in the mix's order"
                self._fill(weights[i])
        except BaseException:
            self._lru.free(mix.digests)
            for digest in [mix.digests[i] for i in missing]:
                self._lru.remove(digest)
                self._vacate(digest)
            raise
        return tuple((self._slot_of[digest], weight) for digest, weight in mix)

    def prefetch(self, mix: Mix, weights: Sequence[LoraWeights], keep: Collection[str]) -> None:
        """Fill slots with a mix that is needed soon, as far as unused slots and memory allow.

        Adapters in `keep` are not evicted for it. Raises as `reserve` does; then the faulty adapter has no slot.
        """
        for each, cost in zip(weights, self._costs(mix, weights).values(), strict=True):
            if each.digest in self._slot_of or not self._lru.make_room(cost, keep):
                continue
            self._lru.add(each.digest, cost)
            try:
                self._fill(each)
            except BaseException:
                self._lru.remove(each.digest)
                self._vacate(each.digest)
                raise

    def release(self, mix: Mix) -> None:
        """End one use of a mix."""
        self._lru.free(mix.digests)
        for digest in self._unloading.intersection(mix.digests):
            self.unload(digest)

    def unload(self, digest: str) -> None:
        """Empty an adapter's slot as soon as no request uses it. Does nothing if it has none."""
        if self._lru.pins(digest):
            self._unloading.add(digest)
        elif digest in self._lru:
            self._lru.remove(digest)
            self._vacate(digest)

    def release_idle(self, nbytes: int) -> None:
        """Empty unused slots, least recently used first, until `nbytes` of adapters in RAM are released."""
        for digest in self.resident if self.use_ram else ():
            if nbytes <= 0:
                return
            if not self._lru.pins(digest):
                nbytes -= self._bytes[digest]
                self.evictions += 1
                self.unload(digest)

    def reset(self) -> None:
        """Empty every slot, used or not."""
        for digest in self.resident:
            while self._lru.pins(digest):
                self._lru.free([digest])
            self.unload(digest)

    def _costs(self, mix: Mix, weights: Sequence[LoraWeights] | None) -> dict[str, int]:
        """Cost per adapter. Small adapters are rounded up so that no more fit than there are slots."""
        if self.memory is None:
            return dict.fromkeys(mix.digests, 1)
        if weights is None:
            return {digest: self._lru.cost(digest) for digest in mix.digests}
        least = self.memory.nbytes // (self.count + 1) + 1
        costs = {each.digest: max(least, self.memory.cost(each)) for each in weights}
        total = sum(costs.values())
        if total > self.memory.nbytes:
            raise NoCapacity(
                f"the mix's adapters need {total} bytes of GPU memory, and the limit is {self.memory.nbytes} "
                "(--adapter-device-memory)",
                "adapters",
            )
        return costs

    def _fill(self, weights: LoraWeights) -> None:
        slot = self._slot_of[weights.digest] = self._free.pop()
        self._load(slot, weights)
        self._bytes[weights.digest] = weights.nbytes

    def _evict(self, digest: str) -> None:
        self.evictions += 1
        self._vacate(digest)

    def _vacate(self, digest: str) -> None:
        slot = self._slot_of.pop(digest, None)
        if slot is None:  # its weights were never loaded
            return
        self._bytes.pop(digest, None)
        self._free.append(slot)
        self._unloading.discard(digest)
        self._clear(slot)
