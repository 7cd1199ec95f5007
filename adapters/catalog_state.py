"""`CatalogState`: which names there are, which version each has, and what was already taken from a folder.

A value: every change answers a new journal, so that it can be written first and become true after. Does not know the
disk or the clock.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

FORMAT = 1
LIBRARY = "library"
"""The origin of the adapters that ship."""
DIGEST = re.compile(r"[0-9a-f]{64}")
WATCH, API = "watch", "api"
"""The other origins: a folder of the user's directory, and whoever publishes."""
KEPT = 3
"""How many versions of a name are kept at least, the one it has among them."""

FolderSignature = tuple[tuple[str, int, int, int, int], ...]
"""Of each file of a folder: name, size, modification and change time in nanoseconds, inode."""


@dataclass(frozen=True)
class NameEntry:
    """`history` are the digests that the name had, the last first; a name that is rolled back has its old one again.

    `since` is when it got the first of them, in seconds since the epoch; `source` is who put it there, and `below`,
    where that is a watched folder, what it was put over.
    """

    history: tuple[str, ...]
    source: str
    since: float
    pinned: bool = False
    below: str | None = None


@dataclass(frozen=True)
class ImportedFolder:
    """What a folder held when it was last taken in: its content's digest, and the state of its files.

    It stays when the adapter is deleted, so that a folder brings an adapter back only after its content has changed.
    """

    digest: str
    signature: FolderSignature

    def without(self, signature: FolderSignature) -> set[str]:
        """The files that the folder had then and, by its `signature`, has no more."""
        return {file for file, *_ in self.signature} - {file for file, *_ in signature}


@dataclass(frozen=True)
class CatalogState:
    """`taken` is by origin and folder, such as "watch/sentiment"."""

    names: Mapping[str, NameEntry] = field(default_factory=dict)
    taken: Mapping[str, ImportedFolder] = field(default_factory=dict)

    def referenced(self) -> frozenset[str]:
        """The digests that some name has or could be rolled back to."""
        return frozenset(digest for name in self.names.values() for digest in name.history)

    def point(self, name: str, digest: str, source: str, now: float, wanted: Collection[str] = ()) -> CatalogState:
        """Give `name` the version `digest`, new or old. Versions beyond the last three lose the name, but for those
        whose first digits are among the `wanted` (those that are whole count for none of the three), the library's, and
        what a folder was put over.

        What it has already changes hands at most: from a folder to who publishes it too.
        """
        old, below = self.names.get(name), None
        if old and old.history[0] == digest and (old.source != WATCH or source in (WATCH, LIBRARY)):
            return self
        history = (digest, *(d for d in old.history if d != digest)) if old else (digest,)
        if old and source == WATCH:
            below = old.below if old.source == WATCH else old.history[0]
            if below and digest in old.history[old.history.index(below) :] and not self.is_of_folder(name, digest):
                below = digest  # rolled back from what the folder brought to what lies under it
        shipped = self.taken.get(f"{LIBRARY}/{name}")
        wanted = (*wanted, *((shipped.digest,) if shipped else ()), *((below,) if below else ()))
        last = [d for d in history if d not in wanted][:KEPT]
        stay = tuple(d for d in history if d in (digest, *last) or d.startswith(wanted))
        fresh = NameEntry(stay, source, now, old.pinned if old else False, below)
        return replace(self, names={**self.names, name: fresh})

    def is_of_folder(self, name: str, digest: str) -> bool:
        """Whether the watched folder of that name held this content when it was last taken in."""
        taken = self.taken.get(f"{WATCH}/{name}")
        return taken is not None and taken.digest == digest

    def retire(self, name: str) -> CatalogState:
        return replace(self, names={n: entry for n, entry in self.names.items() if n != name})

    def withdraw(self, name: str, now: float) -> CatalogState:
        """Take from `name` what a folder brought: it has what that was put over again, or goes if that was nothing.

        If it is the library's, its folder is then to be looked at anew, as its task and card may be others' by now.
        """
        entry, folder = self.names[name], f"{LIBRARY}/{name}"
        shipped = self.taken.get(folder)
        below = entry.below or (shipped.digest if shipped else None)
        if below not in entry.history:
            return self.retire(name)
        if shipped is None or below != shipped.digest:
            history = entry.history[entry.history.index(below) :]
            return replace(self, names={**self.names, name: NameEntry(history, API, now, entry.pinned)})
        names = {**self.names, name: NameEntry((shipped.digest,), LIBRARY, now, entry.pinned)}
        return replace(self, names=names).take(folder, ImportedFolder(shipped.digest, ()))

    def pin(self, name: str, pinned: bool) -> CatalogState:
        return replace(self, names={**self.names, name: replace(self.names[name], pinned=pinned)})

    def take(self, folder: str, taken: ImportedFolder | None) -> CatalogState:
        """Remember what `folder` held, or forget it with None."""
        others = {f: t for f, t in self.taken.items() if f != folder}
        return replace(self, taken=others if taken is None else {**others, folder: taken})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "names": {
                name: {
                    "history": n.history,
                    "source": n.source,
                    "since": n.since,
                    "pinned": n.pinned,
                    "below": n.below,
                }
                for name, n in sorted(self.names.items())
            },
            "taken": {
                folder: {"digest": t.digest, "signature": t.signature} for folder, t in sorted(self.taken.items())
            },
        }

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> CatalogState:
        """The inverse of `to_json`. Raises ValueError, KeyError, TypeError or AttributeError for anything else."""
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']!r} is not known to this version")
        names = {name: _name(_digests(n["history"]), n, below=n.get("below")) for name, n in fields["names"].items()}
        taken = {
            folder: ImportedFolder(
                str(t["digest"]), tuple((str(f), int(s), int(m), int(c), int(i)) for f, s, m, c, i in t["signature"])
            )
            for folder, t in fields["taken"].items()
        }
        return CatalogState(names, taken)


def _name(history: tuple[str, ...], fields: Mapping[str, Any], below: Any) -> NameEntry:
    """`below` is None in journals of before, too."""
    if below is not None and below not in history:
        raise ValueError("what a name was put over is none of its versions")
    return NameEntry(history, str(fields["source"]), float(fields["since"]), bool(fields["pinned"]), below)


def _digests(values: Any) -> tuple[str, ...]:
    digests = tuple(values)
    if not digests or not all(isinstance(digest, str) and DIGEST.fullmatch(digest) for digest in digests):
        raise ValueError("a digest is 64 hex digits")
    return digests
