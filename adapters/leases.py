"""`Lease`, a request's hold on versions, and `Leases`, the count of them.

A lease fixes identity and takes no memory. Does not know names' current versions, nor what happens to a version when
nobody holds it any more.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable

from adapters.errors import UnknownAdapter
from adapters.weights import Mix, Version


class Lease:
    """Versions stay readable until `release`, whatever happens to their names.

    `versions` are in the order that was asked, with the weights that were asked; `mix` is the canonical form.
    """

    def __init__(self, mix: Mix, versions: list[tuple[Version, float]], release: Callable[[Lease], None]) -> None:
        self.mix = mix
        self.versions = versions
        self._release = release
        self._lock = threading.Lock()
        self._released = False
        self._holds = 1

    def clone(self) -> Lease:
        """Another lease of the same versions, though they may have no name any more; they go back with the last one.

        Raises UnknownAdapter if they have.
        """
        with self._lock:
            if not self._holds:
                raise UnknownAdapter("the versions of this lease have been given back", "adapters")
            self._holds += 1
        return Lease(self.mix, self.versions, lambda again: self._give_back())

    def release(self) -> None:
        """Give the versions back. Idempotent, from any thread."""
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._give_back()

    def _give_back(self) -> None:
        with self._lock:
            self._holds -= 1
            last = not self._holds
        if last:
            self._release(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Leases:
    """How often each version is leased. Not thread-safe; `digest in leases`, and how many there are, may be asked
    without the owner's lock."""

    def __init__(self) -> None:
        self._by_name: dict[str, Counter[str]] = {}
        """How often each version of a name is, by digest."""
        self._by_digest: Counter[str] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, digest: object) -> bool:
        """Whether any name's lease holds this content."""
        return digest in self._by_digest

    def hold(self, versions: Iterable[Version]) -> None:
        for version in versions:
            self._by_name.setdefault(version.name, Counter())[version.digest] += 1
            self._by_digest[version.digest] += 1
            self._count += 1

    def give_back(self, versions: Iterable[Version]) -> set[str]:
        """Answers the digests that nobody holds now."""
        left: set[str] = set()
        for version in versions:
            own = self._by_name.get(version.name, Counter())
            if _subtract(own, version.digest) and not own:
                del self._by_name[version.name]
            if _subtract(self._by_digest, version.digest):
                left.add(version.digest)
            self._count -= 1
        return left

    def of(self, name: str) -> Counter[str]:
        """The leases of each version of `name`, by digest."""
        return Counter(self._by_name.get(name))


def _subtract(counts: Counter[str], key: str) -> bool:
    """Count one less; true if that was the last."""
    counts[key] -= 1
    assert counts[key] >= 0, f"{key!r} is given back more often than it was held"
    if counts[key]:
        return False
    del counts[key]
    return True
