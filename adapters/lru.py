"""`LRU`: bookkeeping of a bounded resource (bytes of RAM, device slots) with pins and least-recently-used eviction."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


@dataclass
class _Held:
    cost: int
    pins: int = 0


class LRU(Generic[K]):
    """Keys with an integer cost each, at most `capacity` in total. Not thread-safe.

    `reserve` adds and pins keys, `free` unpins them. An unpinned key stays until its room is needed; a pinned key is
    never evicted. The values are the owner's: `on_evict(key)` is called after a key was evicted, and must not call back
    into this object.
    """

    def __init__(self, capacity: int, on_evict: Callable[[K], None] | None = None) -> None:
        self.capacity = capacity
        self.used = 0
        self._on_evict = on_evict
        self._held: OrderedDict[K, _Held] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[K]:
        """Iterate over the keys, least recently used first."""
        return iter(self._held)

    def cost(self, key: K) -> int:
        """Return the cost of a held key."""
        return self._held[key].cost

    def pins(self, key: K) -> int:
        """Return the number of pins; 0 if the key is not held."""
        held = self._held.get(key)
        return held.pins if held else 0

    @property
    def pinned(self) -> int:
        """The total cost of the pinned keys."""
        return sum(held.cost for held in self._held.values() if held.pins)

    def reserve(
        self, costs: Mapping[K, int], evict_last: Callable[[K], bool] | None = None, keep: Container[K] = ()
    ) -> bool:
        """Add and pin all keys, or change nothing and return False.

        Args:
            costs: the cost of each key. A key that is held keeps its cost.
            evict_last: keys for which this is true are evicted after all others.
            keep: keys that are not evicted.
        """
        missing = {key: cost for key, cost in costs.items() if key not in self._held}
        if not self._make_room(sum(missing.values()), costs, evict_last, keep):
            return False
        for key, cost in costs.items():
            if key in missing:
                self._held[key] = _Held(cost)
                self.used += cost
            self._held[key].pins += 1
            self._held.move_to_end(key)
        return True

    def free(self, keys: Iterable[K]) -> None:
        """Remove one pin from each key and make it the most recently used."""
        for key in keys:
            held = self._held[key]
            assert held.pins > 0, f"{key!r} is freed more often than it was reserved"
            held.pins -= 1
            self._held.move_to_end(key)

    def make_room(self, cost: int, keep: Container[K]) -> bool:
        """Evict unpinned keys that are not in `keep` until `cost` more fits; if impossible, return False."""
        return self._make_room(cost, keep)

    def add(self, key: K, cost: int) -> bool:
        """Add a key without a pin if it fits without an eviction. Returns whether the key is held."""
        if key in self._held:
            return True
        if self.used + cost > self.capacity:
            return False
        self._held[key] = _Held(cost)
        self.used += cost
        return True

    def resize(self, key: K, cost: int, evict_last: Callable[[K], bool] | None = None, keep: Container[K] = ()) -> bool:
        """Change the cost of a held key, evicting others if needed; if impossible, return False."""
        grows = cost - self._held[key].cost
        if not self._make_room(grows, (key,), evict_last, keep):
            return False
        self.used += grows
        self._held[key].cost = cost
        return True

    def remove(self, key: K) -> None:
        """Remove an unpinned key without calling `on_evict`."""
        assert not self._held[key].pins, f"{key!r} is removed while it is pinned"
        self.used -= self._held.pop(key).cost

    def _make_room(
        self,
        cost: int,
        spared: Container[K],
        evict_last: Callable[[K], bool] | None = None,
        keep: Container[K] = (),
    ) -> bool:
        need = self.used + cost - self.capacity
        victims: list[K] = []
        if need > 0:
            candidates = [k for k, held in self._held.items() if not held.pins and k not in spared and k not in keep]
            if evict_last is not None:
                candidates.sort(key=evict_last)  # stable: the order of use stays within each group
            for key in candidates:
                if need <= 0:
                    break
                victims.append(key)
                need -= self._held[key].cost
            if need > 0:
                return False
        for key in victims:
            self.used -= self._held.pop(key).cost
            if self._on_evict is not None:
                self._on_evict(key)
        return True
