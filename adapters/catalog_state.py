"""The catalog as it is saved: names with their version history, imported folders, and a record of each version.

All types are immutable. A change returns a new `CatalogState`, so that it can be saved before it takes effect.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from adapters.weights import LoraWeights

LIBRARY, WATCH, API = "library", "watch", "api"
"""Sources of a name: the bundled adapters, a folder of the watched directory, the API."""
KEPT_VERSIONS = 3
"""Versions kept per name, the current one included."""
OTHER_BASE = "it was made for another base"
"""Prefix of the reason why a version does not fit the served base."""

FolderSignature = tuple[tuple[str, int, int, int, int], ...]
"""For each file of a folder: name, size, modification time and change time in nanoseconds, inode."""


@dataclass(frozen=True)
class VersionRecord:
    """The metadata of a stored version.

    Attributes:
        digest: content digest, 64 hex digits.
        nbytes: bytes in memory when it was published.
        modules: module path -> (rank, out, in).
        metadata: metadata of the last publish of this content.
        created_at: seconds since the epoch.
        metadata_by_name: metadata per adapter name. Names with equal content have their own card and task.
    """

    digest: str
    nbytes: int
    modules: Mapping[str, tuple[int, int, int]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    metadata_by_name: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @staticmethod
    def of(weights: LoraWeights, created_at: float) -> VersionRecord:
        """Build the record of `weights`."""
        modules = {path: (m.rank, *m.shape) for path, m in weights.modules.items()}
        metadata = dict(weights.metadata)
        return VersionRecord(weights.digest, weights.nbytes, modules, metadata, created_at, {weights.name: metadata})

    def metadata_of(self, name: str) -> Mapping[str, Any]:
        """Return the metadata of the version under this adapter name."""
        return self.metadata_by_name.get(name, self.metadata)

    @cached_property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({rank for rank, _, _ in self.modules.values()})

    @cached_property
    def targets(self) -> list[str]:
        """The distinct last parts of the module paths, sorted."""
        return sorted({path.rsplit(".", 1)[-1] for path in self.modules})

    def incompatibility(self, shapes: Mapping[str, tuple[int, int]], max_rank: int) -> str | None:
        """Return why this version cannot be served on a base with these shapes, or None if it can."""
        for path, (_, out, into) in self.modules.items():
            if path not in shapes:
                return f"{OTHER_BASE}: the served base has no {path}"
            if shapes[path] != (out, into):
                return f"{OTHER_BASE}: {path} is {list(shapes[path])} in the base and {[out, into]} in the adapter"
        highest = max((rank for rank, _, _ in self.modules.values()), default=0)
        return f"its rank {highest} is over the limit of {max_rank} (--max-rank)" if highest > max_rank else None


@dataclass(frozen=True)
class NameEntry:
    """The versions of one name.

    Attributes:
        history: digests, the current one first. A rollback moves an old digest to the front.
        source: who set the current version (LIBRARY, WATCH, API, ...).
        since: when the current version was set, in seconds since the epoch.
        pinned: whether the current version is kept in RAM.
        replaced: the digest that a watched folder replaced; it is served again when the folder is removed.
    """

    history: tuple[str, ...]
    source: str
    since: float
    pinned: bool = False
    replaced: str | None = None


@dataclass(frozen=True)
class ImportedFolder:
    """The content of a folder when it was last imported. Kept after the adapter is deleted, so that the folder is
    imported again only when its content changes.
    """

    digest: str
    signature: FolderSignature

    def removed_files(self, signature: FolderSignature) -> set[str]:
        """Return the files of the folder that are not in the new `signature`."""
        return {file for file, *_ in self.signature} - {file for file, *_ in signature}


@dataclass(frozen=True)
class CatalogState:
    """All names, and all imported folders by key such as "watch/sentiment"."""

    names: Mapping[str, NameEntry] = field(default_factory=dict)
    folders: Mapping[str, ImportedFolder] = field(default_factory=dict)

    @cached_property
    def digests(self) -> frozenset[str]:
        """The digests in the history of any name."""
        return frozenset(digest for entry in self.names.values() for digest in entry.history)

    def set_version(self, name: str, digest: str, source: str, now: float, keep: Collection[str] = ()) -> CatalogState:
        """Make `digest` the current version of `name`.

        The history keeps the last three versions. In addition, it keeps versions whose digest starts with one of
        `keep`, the library's version, and the version that a watched folder replaced. Publishing the current content
        again changes nothing, except that content from a watched folder becomes the publisher's.
        """
        old, replaced = self.names.get(name), None
        if old and old.history[0] == digest and (old.source != WATCH or source in (WATCH, LIBRARY)):
            return self
        history = (digest, *(d for d in old.history if d != digest)) if old else (digest,)
        if old and source == WATCH:
            replaced = old.replaced if old.source == WATCH else old.history[0]
            if (
                replaced
                and digest in old.history[old.history.index(replaced) :]
                and not self._is_folder_content(name, digest)
            ):
                replaced = digest  # a rollback to a version older than the folder's
        shipped = self.folders.get(f"{LIBRARY}/{name}")
        keep = (*keep, *((shipped.digest,) if shipped else ()), *((replaced,) if replaced else ()))
        recent = [d for d in history if d not in keep][:KEPT_VERSIONS]
        kept = tuple(d for d in history if d in (digest, *recent) or d.startswith(keep))
        entry = NameEntry(kept, source, now, old.pinned if old else False, replaced)
        return self._with(name, entry)

    def remove_name(self, name: str) -> CatalogState:
        """Remove a name with its history."""
        return replace(self, names={n: entry for n, entry in self.names.items() if n != name})

    def undo_folder(self, name: str, now: float) -> CatalogState:
        """Undo what a watched folder published: restore the version that it replaced, or remove the name.

        If the restored version is the library's, the library folder is imported again to restore its task and card.
        """
        entry, key = self.names[name], f"{LIBRARY}/{name}"
        shipped = self.folders.get(key)
        replaced = entry.replaced or (shipped.digest if shipped else None)
        if replaced not in entry.history:
            return self.remove_name(name)
        if shipped is None or replaced != shipped.digest:
            history = entry.history[entry.history.index(replaced) :]
            return self._with(name, NameEntry(history, API, now, entry.pinned))
        restored = self._with(name, NameEntry((shipped.digest,), LIBRARY, now, entry.pinned))
        return restored.set_folder(key, ImportedFolder(shipped.digest, ()))

    def set_pinned(self, name: str, pinned: bool) -> CatalogState:
        """Pin or unpin a name."""
        return self._with(name, replace(self.names[name], pinned=pinned))

    def set_folder(self, key: str, folder: ImportedFolder | None) -> CatalogState:
        """Record the content of an imported folder, or forget it with None."""
        others = {k: f for k, f in self.folders.items() if k != key}
        return replace(self, folders=others if folder is None else {**others, key: folder})

    def _with(self, name: str, entry: NameEntry) -> CatalogState:
        return replace(self, names={**self.names, name: entry})

    def _is_folder_content(self, name: str, digest: str) -> bool:
        folder = self.folders.get(f"{WATCH}/{name}")
        return folder is not None and folder.digest == digest
