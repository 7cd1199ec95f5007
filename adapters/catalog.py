"""`Catalog`: what every adapter's name means at one moment; the rules for names; what has none and why.

`Catalog` is a value that is replaced as a whole when the journal changes. Does not know the store, leases or memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from adapters.catalog_state import CatalogState
from adapters.errors import AdapterConflict, InvalidAdapter, InvalidChoice, UnknownAdapter, VersionMismatch
from adapters.weights import MIN_DIGEST, NAME, NAME_IN_WORDS, Version

log = logging.getLogger(__name__)

ANOTHER_BASE = "it was made for another base"
"""How the reason begins for what fits no linear of the base that is served."""


@dataclass(frozen=True)
class Rejection:
    """A folder, or a name in the store, that is not served. `since` is in seconds since the epoch. `fault` is false for
    what is whole, and fits another base or other settings: one store can serve several."""

    path: str
    reason: str
    since: float
    fault: bool = True


class Rejections:
    """The folders that are not served, by path; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_path: dict[str, Rejection] = {}

    def add(self, path: str, reason: str) -> None:
        """`path` is not served, since now unless it is listed with this reason already."""
        with self._lock:
            known = self._by_path.get(path)
            if known is not None and known.reason == reason:
                return
            self._by_path[path] = Rejection(path, reason, time.time())
        log.warning("%r is not served: %s", path, reason)

    def drop(self, path: str) -> None:
        """`path` is no longer rejected, or no longer there."""
        with self._lock:
            self._by_path.pop(path, None)

    def entries(self) -> list[Rejection]:
        with self._lock:
            return list(self._by_path.values())


@dataclass(frozen=True)
class Catalog:
    """`histories`: of each name that is served, the digests that it can have, the one it has first.

    `aside` are names whose last version is of no use here, `behind` what is left of versions of theirs that are of use;
    `others` are each name's versions for other bases, `newest` its last one for this base, served or not; `referenced`
    are all digests that the journal names, `sources` who has put its names there.
    """

    histories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aside: Mapping[str, Rejection] = field(default_factory=dict)
    referenced: frozenset[str] = frozenset()
    sources: Mapping[str, str] = field(default_factory=dict)
    behind: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    others: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    newest: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def of(
        journal: CatalogState,
        lost: Mapping[str, str],
        misfit: Callable[[str], str | None],
        reserved: Collection[str] = (),
    ) -> Catalog:
        """What `journal` means on this base: `misfit(digest)` says why a version cannot be served.

        Versions of other bases are passed over, so that one store can serve several. A name whose last version is
        lost, or over a limit of this server, is set aside: it must not fall back to an older one unasked. So is one
        that is `reserved` here: another base may have had it free.
        """
        histories: dict[str, tuple[str, ...]] = {}
        aside: dict[str, Rejection] = {}
        behind: dict[str, tuple[str, ...]] = {}
        others: dict[str, tuple[str, ...]] = {}
        newest: dict[str, str] = {}
        for name, entry in journal.names.items():
            last = entry.history[0]
            usable = [digest for digest in entry.history if digest not in lost]
            others[name] = tuple(d for d in usable if (misfit(d) or "").startswith(ANOTHER_BASE))
            here = [digest for digest in usable if digest not in others[name]]
            if here:
                newest[name] = here[0]
            fitting = tuple(digest for digest in here if misfit(digest) is None)
            if name not in reserved and last not in lost and fitting[:1] == tuple(here[:1]) != ():
                histories[name] = fitting
                continue
            taken = f"the name {name!r} is reserved: the base that is served has it" if name in reserved else None
            reason = taken or lost.get(last) or misfit((here or [last])[0]) or "no version of it is left"
            aside[name] = Rejection(name, reason, entry.since, fault=last in lost)
            behind[name] = fitting
        sources = {name: entry.source for name, entry in journal.names.items()}
        return Catalog(histories, aside, journal.referenced(), sources, behind, others, newest)

    def served(self, by: str | None) -> list[str]:
        """The names that are served, sorted; with `by` those alone that this source has put there."""
        return sorted(name for name in self.histories if by is None or self.sources[name] == by)

    @cached_property
    def current(self) -> Mapping[str, str]:
        """The digest that each name has."""
        return {name: history[0] for name, history in self.histories.items()}

    @cached_property
    def labels(self) -> frozenset[str]:
        """Of all versions that `find` finds."""
        found = {**self.behind, **self.histories}
        return frozenset(Version(name, digest).label for name, history in found.items() for digest in history)

    def named(self, name: str) -> Version:
        """The version that a name has, which is no exact version of it. Raises UnknownAdapter."""
        history = self.histories.get(name)
        if history is None:
            raise self.unknown(name)
        return Version(name, history[0])

    def of_content(self, digest: str) -> str:
        """A name that has this content, or else one that had it, for people and metrics."""
        has = (name for name, history in self.histories.items() if history[0] == digest)
        had = (name for name, history in self.histories.items() if digest in history)
        return next(has, None) or next(had, "other")

    def find(self, text: str) -> Version:
        """The version that "name" or "name@digest" means. Raises UnknownAdapter, InvalidChoice."""
        name, at, prefix = text.partition("@")
        history = self.histories.get(name) or (self.behind.get(name) if at else None)
        if not history or not at:
            return self.named(name)
        prefix = prefix.lower()
        if len(prefix) < MIN_DIGEST:
            raise InvalidChoice(f"{text[:80]!r} needs at least {MIN_DIGEST} digits of the digest", "adapters")
        found = [digest for digest in history if digest.startswith(prefix)]
        if not found and self.newest.get(name, "").startswith(prefix) and name in self.aside:
            raise self.unknown(name)
        if not found:
            raise UnknownAdapter(f"the adapter {name!r} has no version {prefix[:64]!r}", "adapters")
        if len(found) > 1:
            raise InvalidChoice(f"{text[:80]!r} names {len(found)} versions; give more digits", "adapters")
        return Version(name, found[0])

    def kept(self, name: str, asked_for: Collection[str]) -> tuple[str, ...]:
        """The versions of a name that stay beside its last ones: those `asked_for`, and those of other bases."""
        return (*asked_for, *self.others.get(name, ()))

    def expect(self, name: str, if_match: str | None) -> None:
        """Compare, for compare-and-set: `if_match` is a label, a digest of 6 digits or more, "*" for any, or None.

        Raises VersionMismatch.
        """
        if if_match is None:
            return
        history = self.histories.get(name)
        if history is None:
            raise VersionMismatch(f"there is no adapter named {name!r} now", "if-match")
        owner, at, prefix = if_match.rpartition("@")
        named = not at or owner == name
        if if_match != "*" and not (named and len(prefix) >= MIN_DIGEST and history[0].startswith(prefix.lower())):
            has = Version(name, history[0]).label
            raise VersionMismatch(f"the adapter is at {has}, not at {if_match[:96]!r}", "if-match")

    def expect_unused(self, name: str, tasks: Sequence[str]) -> None:
        """Raises AdapterConflict for a name that is served, if there are `tasks` that route to it."""
        if tasks and (name in self.histories or self.behind.get(name)):
            told = f"{name!r} is what these tasks route to: {', '.join(tasks)}; change them first"
            raise AdapterConflict(told, "name")

    def unknown(self, name: str) -> UnknownAdapter:
        """The error for a name that is not served, with the reason if there is one."""
        known = self.aside.get(name)
        reason = f": {known.reason}" if known else ""
        return UnknownAdapter(f"no adapter named {name[:80]!r} is served{reason}", "adapters")


def check_name(name: str, reserved: Collection[str]) -> str:
    """`name`, if an adapter may have it. Raises InvalidAdapter."""
    if not NAME.fullmatch(name):
        raise InvalidAdapter(f"{name[:80]!r} cannot be an adapter's name: that is of {NAME_IN_WORDS}", "name")
    if name in reserved:
        raise InvalidAdapter(f"the name {name!r} is reserved", "name")
    return name
