"""`Lease`: a request's hold on adapter versions. `Leases`: the count of leases per version."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from adapters.errors import UnknownAdapter
from adapters.weights import Mix, Version


class Lease:
    """Keeps versions on disk until `release`, even if their names change. Takes no memory.

    Attributes:
        mix: the canonical mix.
        versions: the versions with their weights, in the order of the request.
    """

    def __init__(self, mix: Mix, versions: list[tuple[Version, float]], release: Callable[[Lease], None]) -> None:
        self.mix = mix
        self.versions = versions
        self._release = release
        self._lock = threading.Lock()
        self._released = False
        self._holders = 1

    def clone(self) -> Lease:
        """Return another lease of the same versions. They are released with the last clone.

        Raises UnknownAdapter if they are released already.
        """
        with self._lock:
            if not self._holders:
                raise UnknownAdapter("this lease is released", "adapters")
            self._holders += 1
        return Lease(self.mix, self.versions, lambda clone: self._drop())

    def release(self) -> None:
        """Release the versions. Idempotent, from any thread."""
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._drop()

    def _drop(self) -> None:
        with self._lock:
            self._holders -= 1
            last = not self._holders
        if last:
            self._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Leases:
    """Counts leases per version. Not thread-safe; `len` and `in` may be used without the owner's lock."""

    def __init__(self) -> None:
        self._by_name: dict[str, Counter[str]] = {}
        self._by_digest: Counter[str] = Counter()
        self._total = 0

    def __len__(self) -> int:
        return self._total

    def __contains__(self, digest: object) -> bool:
        """Return whether any lease holds this content."""
        return digest in self._by_digest

    def add(self, versions: Iterable[Version]) -> None:
        """Count one lease of each version."""
        for version in versions:
            self._by_name.setdefault(version.name, Counter())[version.digest] += 1
            self._by_digest[version.digest] += 1
            self._total += 1

    def remove(self, versions: Iterable[Version]) -> set[str]:
        """Remove one lease of each version. Returns the digests that have no lease left."""
        free: set[str] = set()
        for version in versions:
            of_name = self._by_name.get(version.name, Counter())
            if _decrement(of_name, version.digest) and not of_name:
                del self._by_name[version.name]
            if _decrement(self._by_digest, version.digest):
                free.add(version.digest)
            self._total -= 1
        return free

    def of(self, name: str) -> Counter[str]:
        """Return the lease count of each version of `name`, by digest."""
        return Counter(self._by_name.get(name))


def _decrement(counts: Counter[str], key: str) -> bool:
    """Subtract one; return whether the count is zero now."""
    counts[key] -= 1
    assert counts[key] >= 0, f"{key!r} is released more often than it was leased"
    if counts[key]:
        return False
    del counts[key]
    return True
