"""`LRU`: who holds a bounded resource, and who goes first when room is needed.

Owns costs, pins and the order of use. Does not know what the resource is (bytes of RAM, slots on a device) and holds
no values: `on_evict` tells the owner to let go. Not thread-safe; the owner has a lock or one thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass
class _Held:
    cost: int
    pins: int


class LRU(Generic[K]):
    """Keys with a cost each, at most `capacity` in all. A pinned key is never evicted.

    `reserve` takes and pins all keys of a set or none, `free` unpins them; what is unpinned stays until its room is
    needed. `on_evict(key)` is called for each key that is evicted to make room, after it has left; it must not call
    back into this object. Costs are integers >= 0 in the owner's unit.
    """

    def __init__(self, capacity: int, on_evict: Callable[[K], None] | None = None) -> None:
        self.capacity = capacity
        self.used = 0
        self._on_evict = on_evict
        self._held: OrderedDict[K, _Held] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[K]:
        """Least recently used first."""
        return iter(self._held)

    def cost(self, key: K) -> int:
        return self._held[key].cost

    def pins(self, key: K) -> int:
        """How many pins `key` has; 0 too if it is not held."""
        held = self._held.get(key)
        return held.pins if held else 0

    @property
    def pinned(self) -> int:
        """The summed cost of the keys that are pinned."""
        return sum(held.cost for held in self._held.values() if held.pins)

    def reserve(self, costs: Mapping[K, int], evict_last: Callable[[K], bool] | None = None) -> bool:
        """Hold and pin every key of `costs`, or change nothing and answer False.

        A key that is held already keeps its cost and needs no room. Room is made by evicting unpinned keys, least
        recently used first, those for which `evict_last` is true after all the others.
        """
        missing = {key: cost for key, cost in costs.items() if key not in self._held}
        need = self.used + sum(missing.values()) - self.capacity
        victims = self._victims(need, spared=costs, evict_last=evict_last)
        if victims is None:
            return False
        self._evict(victims)
        for key, cost in costs.items():
            if key in missing:
                self._held[key] = _Held(cost, 0)
                self.used += cost
            self._held[key].pins += 1
            self._held.move_to_end(key)
        return True

    def free(self, keys: Iterable[K]) -> None:
        """Take one pin from each key and make it the most recently used. It stays held."""
        for key in keys:
            held = self._held[key]
            assert held.pins > 0, f"{key!r} is freed more often than it was reserved"
            held.pins -= 1
            self._held.move_to_end(key)

    def make_room(self, cost: int, spared: Collection[K]) -> bool:
        """Evict unpinned keys that are not `spared`, least recently used first, until `cost` more has room.

        False and no change if that cannot be.
        """
        victims = self._victims(self.used + cost - self.capacity, spared)
        if victims is None:
            return False
        self._evict(victims)
        return True

    def add(self, key: K, cost: int) -> bool:
        """Hold `key` without a pin if there is room without evicting anything; False if there is none."""
        if key in self._held:
            return True
        if self.used + cost > self.capacity:
            return False
        self._held[key] = _Held(cost, 0)
        self.used += cost
        return True

    def resize(self, key: K, cost: int, evict_last: Callable[[K], bool] | None = None) -> bool:
        """Correct the cost of a held key, evicting others for it if it grew; False and unchanged if that cannot be."""
        need = self.used + cost - self._held[key].cost - self.capacity
        victims = self._victims(need, spared={key: 0}, evict_last=evict_last)
        if victims is None:
            return False
        self._evict(victims)
        self.used += cost - self._held[key].cost
        self._held[key].cost = cost
        return True

    def remove(self, key: K) -> None:
        """Let go of an unpinned key without calling `on_evict`."""
        assert not self._held[key].pins, f"{key!r} is removed while it is pinned"
        self.used -= self._held.pop(key).cost

    def _victims(
        self, need: int, spared: Collection[K], evict_last: Callable[[K], bool] | None = None
    ) -> list[K] | None:
        """The keys to evict so that `need` is given back, in order; None if that cannot be."""
        if need <= 0:
            return []
        candidates = [k for k, held in self._held.items() if not held.pins and k not in spared]
        if evict_last is not None:
            candidates.sort(key=evict_last)  # stable: the order of use remains within each half
        victims: list[K] = []
        for key in candidates:
            victims.append(key)
            need -= self._held[key].cost
            if need <= 0:
                return victims
        return None

    def _evict(self, keys: Iterable[K]) -> None:
        for key in keys:
            self.used -= self._held.pop(key).cost
            if self._on_evict is not None:
                self._on_evict(key)
