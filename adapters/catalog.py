"""`Catalog`: an immutable snapshot of the served names and versions. `Rejections`: what is not served."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from adapters.catalog_state import OTHER_BASE, CatalogState
from adapters.errors import AdapterConflict, InvalidAdapter, InvalidChoice, UnknownAdapter, VersionMismatch
from adapters.weights import MIN_DIGEST, NAME, NAME_RULE, Version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rejection:
    """A folder or a stored name that is not served.

    Attributes:
        path: the folder or name.
        reason: why it is not served.
        since: seconds since the epoch.
        fault: false if the adapter is intact but fits another base or other limits.
    """

    path: str
    reason: str
    since: float
    fault: bool = True


class Rejections:
    """Rejected folders by path; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_path: dict[str, Rejection] = {}

    def add(self, path: str, reason: str) -> None:
        """Record a rejection and log it, unless it is recorded with the same reason."""
        with self._lock:
            known = self._by_path.get(path)
            if known is not None and known.reason == reason:
                return
            self._by_path[path] = Rejection(path, reason, time.time())
        log.warning("%r is not served: %s", path, reason)

    def remove(self, path: str) -> None:
        """Remove the rejection of `path`, if there is one."""
        with self._lock:
            self._by_path.pop(path, None)

    def entries(self) -> list[Rejection]:
        """Return all rejections."""
        with self._lock:
            return list(self._by_path.values())


@dataclass(frozen=True)
class Catalog:
    """The names as they are served on the current base.

    Attributes:
        histories: for each served name, its usable digests, the current one first.
        rejected: names whose newest version cannot be served.
        rejected_histories: usable older versions of rejected names; they can be requested exactly.
        newest: the newest version of each name for this base, served or not.
        other_bases: versions of each name for other bases.
        sources: who set each name, served or not.
        digests: all digests that any name refers to.
    """

    histories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rejected: Mapping[str, Rejection] = field(default_factory=dict)
    rejected_histories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    newest: Mapping[str, str] = field(default_factory=dict)
    other_bases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    digests: frozenset[str] = frozenset()

    @staticmethod
    def build(
        state: CatalogState,
        missing: Mapping[str, str],
        incompatibility: Callable[[str], str | None],
        reserved: Collection[str] = (),
    ) -> Catalog:
        """Build the snapshot of `state` for one base.

        Versions for other bases are skipped, so that one store can serve several bases. A name is rejected if it is
        reserved, or if its newest version is missing on disk or exceeds a limit: it must not silently fall back to an
        older version.

        Args:
            state: the saved catalog.
            missing: digest -> reason, for versions that are missing on disk.
            incompatibility: returns why a version cannot be served, or None.
            reserved: names that cannot be served.
        """
        histories: dict[str, tuple[str, ...]] = {}
        rejected: dict[str, Rejection] = {}
        rejected_histories: dict[str, tuple[str, ...]] = {}
        newest: dict[str, str] = {}
        other_bases: dict[str, tuple[str, ...]] = {}
        for name, entry in state.names.items():
            latest = entry.history[0]
            present = [digest for digest in entry.history if digest not in missing]
            other_bases[name] = tuple(d for d in present if (incompatibility(d) or "").startswith(OTHER_BASE))
            here = [digest for digest in present if digest not in other_bases[name]]
            usable = tuple(digest for digest in here if incompatibility(digest) is None)
            if here:
                newest[name] = here[0]
            if name not in reserved and latest not in missing and usable[:1] == tuple(here[:1]) != ():
                histories[name] = usable
                continue
            reason = f"the name {name!r} is reserved for the served base" if name in reserved else None
            reason = reason or missing.get(latest) or incompatibility((here or [latest])[0]) or "no version is left"
            rejected[name] = Rejection(name, reason, entry.since, fault=latest in missing)
            rejected_histories[name] = usable
        sources = {name: entry.source for name, entry in state.names.items()}
        return Catalog(histories, rejected, rejected_histories, newest, other_bases, sources, state.digests)

    def names(self, source: str | None = None) -> list[str]:
        """Return the served names, sorted; with `source`, only those that this source set."""
        return sorted(name for name in self.histories if source is None or self.sources[name] == source)

    @cached_property
    def current(self) -> Mapping[str, str]:
        """The current digest of each served name."""
        return {name: history[0] for name, history in self.histories.items()}

    @cached_property
    def labels(self) -> frozenset[str]:
        """The labels of all versions that `find` can return."""
        found = {**self.rejected_histories, **self.histories}
        return frozenset(Version(name, digest).label for name, history in found.items() for digest in history)

    def current_version(self, name: str) -> Version:
        """Return the current version of a name. Raises UnknownAdapter."""
        history = self.histories.get(name)
        if history is None:
            raise self.unknown(name)
        return Version(name, history[0])

    def name_of(self, digest: str) -> str:
        """Return a name whose current or older version has this digest, or "other"."""
        current = (name for name, history in self.histories.items() if history[0] == digest)
        older = (name for name, history in self.histories.items() if digest in history)
        return next(current, None) or next(older, "other")

    def find(self, text: str) -> Version:
        """Return the version of "name" or "name@digest". Raises UnknownAdapter, InvalidChoice."""
        name, at, prefix = text.partition("@")
        history = self.histories.get(name) or (self.rejected_histories.get(name) if at else None)
        if not history or not at:
            return self.current_version(name)
        prefix = prefix.lower()
        if len(prefix) < MIN_DIGEST:
            raise InvalidChoice(f"{text[:80]!r} needs at least {MIN_DIGEST} digits of the digest", "adapters")
        found = [digest for digest in history if digest.startswith(prefix)]
        if not found and self.newest.get(name, "").startswith(prefix) and name in self.rejected:
            raise self.unknown(name)
        if not found:
            raise UnknownAdapter(f"the adapter {name!r} has no version {prefix[:64]!r}", "adapters")
        if len(found) > 1:
            raise InvalidChoice(f"{text[:80]!r} matches {len(found)} versions; give more digits", "adapters")
        return Version(name, found[0])

    def check_match(self, name: str, if_match: str | None) -> None:
        """Compare for compare-and-set.

        Args:
            name: the adapter.
            if_match: a label, a digest of at least 6 digits, "*" for any version, or None for no condition.

        Raises:
            VersionMismatch: the name has another version.
        """
        if if_match is None:
            return
        history = self.histories.get(name)
        if history is None:
            raise VersionMismatch(f"there is no adapter named {name!r}", "if-match")
        owner, at, prefix = if_match.rpartition("@")
        same_name = not at or owner == name
        if if_match != "*" and not (same_name and len(prefix) >= MIN_DIGEST and history[0].startswith(prefix.lower())):
            label = Version(name, history[0]).label
            raise VersionMismatch(f"the adapter is at {label}, not at {if_match[:96]!r}", "if-match")

    def check_unused(self, name: str, tasks: Sequence[str]) -> None:
        """Raise AdapterConflict if `tasks` route to the name."""
        if tasks and (name in self.histories or self.rejected_histories.get(name)):
            raise AdapterConflict(f"these tasks route to {name!r}: {', '.join(tasks)}; change them first", "name")

    def unknown(self, name: str) -> UnknownAdapter:
        """Return the error for a name that is not served, with the reason if there is one."""
        rejection = self.rejected.get(name)
        reason = f": {rejection.reason}" if rejection else ""
        return UnknownAdapter(f"no adapter named {name[:80]!r} is served{reason}", "adapters")


def check_name(name: str, reserved: Collection[str]) -> str:
    """Return `name` if an adapter may have it. Raises InvalidAdapter."""
    if not NAME.fullmatch(name):
        raise InvalidAdapter(f"{name[:80]!r} is not a valid adapter name; use {NAME_RULE}", "name")
    if name in reserved:
        raise InvalidAdapter(f"the name {name!r} is reserved", "name")
    return name
