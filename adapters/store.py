"""`AdapterStore`: adapter files by content digest, and the catalog that names them.

    versions/<digest>/   adapter_config.json and adapter_model.safetensors of one version; never changed
    incoming/            unfinished copies and deletions; emptied when the store is opened
    lock                 held while the store is open

A new version is written to `incoming`, synced and renamed into `versions`; then one transaction of the catalog backend
names it. A version is deleted after the catalog has dropped it. So a crash at any point leaves every named version
intact. Writes are not thread-safe; the registry makes them on one thread.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from adapters.atomic_files import sync_folder
from adapters.catalog_state import CatalogState, VersionRecord
from adapters.errors import InvalidAdapter, NoRoom, StoreFailed, error_text
from adapters.peft_format import CARD_FILE, OPTIONAL, REQUIRED, TASK_FILE, open_inside
from adapters.protocols import CatalogBackend, MemoryCatalog
from adapters.weights import SHORT_DIGEST, LoraWeights

log = logging.getLogger(__name__)

METADATA_FILES = {TASK_FILE: "task", CARD_FILE: "card"}
"""Files that become metadata of a version, and their keys."""
CHUNK = 1 << 20

Modules = Mapping[str, tuple[int, int, int]]
"""Module path -> (rank, out, in)."""


class AdapterStore:
    """The versions and the catalog under one folder. Only one process can open it.

    Every method that writes raises StoreFailed on a disk error; nothing has changed then.

    Attributes:
        state: the saved catalog.
        records: the record of each version, by digest.
        missing: digest -> reason, for versions in the catalog whose files are missing.
        damaged: digests whose files were found changed; publishing the content again replaces them.

    Args:
        root: the folder.
        backend: where the catalog is saved; in memory by default.
        size: returns the bytes that modules take in memory on this backend, or None for the size when published.
    """

    def __init__(
        self,
        root: Path,
        backend: CatalogBackend | None = None,
        *,
        size: Callable[[Modules], int | None] = lambda modules: None,
    ) -> None:
        self.root = root
        self.missing: dict[str, str] = {}
        self.damaged: set[str] = set()
        self._backend = backend or MemoryCatalog()
        self._size = size
        self._sizes: dict[str, int] = {}
        self._versions = root / "versions"
        self._incoming = root / "incoming"
        self._lock: int | None = None
        with _disk_errors("open the store"):
            self._versions.mkdir(parents=True, exist_ok=True)
            self._incoming.mkdir(parents=True, exist_ok=True)
            self._lock = self._take_lock()
        try:
            state, records = self._backend.load()
            self.state, self.records = state, dict(records)
            with _disk_errors("open the store"):
                self._remove_leftovers()
            self._find_missing()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, digest: str) -> Path:
        """Return the folder of a version, for reading."""
        return self._versions / digest

    def nbytes(self, digest: str) -> int:
        """Return the bytes that a version takes in memory; 0 if unknown."""
        record = self.records.get(digest)
        if record is None:
            return 0
        if digest not in self._sizes:
            self._sizes[digest] = self._size(record.modules) or record.nbytes
        return self._sizes[digest]

    @contextmanager
    def stage(self, folder: Path, *, within: Path | None = None, limit: int = 1 << 40) -> Iterator[Path]:
        """Copy the adapter in `folder` to a private folder, which is removed at the end unless it was published.

        The copy is what is checked and kept, whatever happens to `folder` later.

        Args:
            folder: a PEFT folder. Missing files are missing in the copy.
            within: if given, links may not lead out of this folder.
            limit: bytes of all files.

        Raises:
            InvalidAdapter: a file is not a regular file, cannot be read, or changed during the copy.
            NoRoom: the files exceed `limit`.
        """
        with _disk_errors("make room for a new adapter"):
            staged = Path(tempfile.mkdtemp(dir=self._incoming))
        try:
            with ExitStack() as opened:
                sources: dict[str, tuple[int, tuple[int, ...]]] = {}
                for name in (*REQUIRED, *OPTIONAL):
                    source = open_inside(folder / name, within)
                    if source is not None:
                        opened.callback(os.close, source)
                        sources[name] = source, _file_state(source)
                for name, (source, _) in sources.items():
                    with _disk_errors(f"copy {name}"):
                        limit -= _copy(source, staged / name, limit)
                for name, (source, before) in sources.items():
                    if _file_state(source) != before:
                        raise InvalidAdapter(f"{name} changed while it was copied; try again once it is written", name)
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def publish(self, staged: Path, record: VersionRecord, state: CatalogState) -> bool:
        """Store a staged version and save `state`, which names it.

        If the version exists, only its metadata is updated; damaged files are replaced.

        Returns:
            Whether the metadata of an existing version has changed.
        """
        digest, known = record.digest, self.records.get(record.digest)
        if known is not None:
            others = (name for name, entry in self.state.names.items() if digest in entry.history)
            kept = {name: known.metadata_of(name) for name in others}
            record = replace(record, created_at=known.created_at, metadata_by_name={**kept, **record.metadata_by_name})
        exists = known is not None and digest not in self.damaged and self.path(digest).exists()
        if not exists:
            self._add_files(staged, digest)
        try:
            self.save(state, record)
        except StoreFailed:
            if digest not in self.state.digests and known is None:
                self._discard(self.path(digest))
            raise
        self.damaged.discard(digest)
        self.missing.pop(digest, None)
        return known is not None and any(
            known.metadata_of(name) != metadata for name, metadata in record.metadata_by_name.items()
        )

    def save(self, state: CatalogState, record: VersionRecord | None = None) -> None:
        """Save the catalog, with a new or changed record, in one transaction."""
        self._backend.save(state, [record] if record else [])
        self.state = state
        if record:
            self.records[record.digest] = record

    def remove(self, digest: str) -> None:
        """Delete the files of a version that the catalog does not name."""
        assert digest not in self.state.digests, "a version is deleted while it has a name"
        self.records.pop(digest, None)
        self._sizes.pop(digest, None)
        self.damaged.discard(digest)
        with _disk_errors("delete a version"):
            self._discard(self.path(digest))

    def _add_files(self, staged: Path, digest: str) -> None:
        with _disk_errors("store the new version"):
            for name in METADATA_FILES:
                (staged / name).unlink(missing_ok=True)
            sync_folder(staged)
            self._discard(self.path(digest))
            os.rename(staged, self.path(digest))
            sync_folder(self._versions)

    def _discard(self, folder: Path) -> None:
        """Move a folder to `incoming`, so that it disappears at once, and delete it there."""
        if folder.exists():
            trash = Path(tempfile.mkdtemp(dir=self._incoming))
            os.rename(folder, trash / folder.name)
            shutil.rmtree(trash)

    def _take_lock(self) -> int:
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreFailed("the state directory is in use by another process; stop it or use another") from None
        return fd

    def _remove_leftovers(self) -> None:
        """Remove unfinished copies and deletions, and versions that the catalog does not name.

        With an empty catalog, versions are kept: the database may have been lost or replaced.
        """
        for leftover in self._incoming.iterdir():
            shutil.rmtree(leftover)
        unnamed = [folder for folder in self._versions.iterdir() if folder.name not in self.state.digests]
        if unnamed and not self.state.digests:
            log.warning("the catalog is empty; %d stored versions are kept in %s", len(unnamed), self._versions)
            return
        for folder in unnamed:
            self._discard(folder)

    def _find_missing(self) -> None:
        for digest in sorted(self.state.digests):
            if digest in self.records and all((self.path(digest) / name).exists() for name in REQUIRED):
                continue
            short = digest[:SHORT_DIGEST]
            self.missing[digest] = (
                f"a file of version {short} is missing from the store; publish it again, or roll back to another"
            )
            self.records.pop(digest, None)
            log.error("%s", self.missing[digest])


def inherit_metadata(weights: LoraWeights, previous: VersionRecord, removed: Collection[str]) -> LoraWeights:
    """Return `weights` with the task and card of the name's previous version, unless they bring their own.

    Args:
        weights: the new version.
        previous: the previous version of the name.
        removed: files that the adapter's folder had and no longer has; their content is not inherited.

    An inherited task has the digest of the version that brought it as `task_of`.
    """
    inherited, metadata = previous.metadata_of(weights.name), dict(weights.metadata)
    for file, key in METADATA_FILES.items():
        if metadata.get(key) is not None or inherited.get(key) is None:
            continue
        if file in removed:
            log.warning("%s was removed from the folder of %s; its content is dropped", file, weights.name)
            continue
        metadata[key] = inherited[key]
        origin = inherited.get("task_of", previous.digest)
        if key == "task" and origin != weights.digest:
            metadata["task_of"] = origin
    return replace(weights, metadata=metadata)


def _copy(source: int, target: Path, limit: int) -> int:
    """Copy an open file to a new synced file and return its size. Raises NoRoom over `limit` bytes."""
    too_large = NoRoom(f"{target.name} is over {limit:,} bytes, more than can be served")
    if os.fstat(source).st_size > limit:
        raise too_large
    size = 0
    with open(target, "xb") as out:
        while chunk := os.read(source, CHUNK):
            size += len(chunk)
            if size > limit:
                raise too_large
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return size


def _file_state(descriptor: int) -> tuple[int, ...]:
    """Return size and times of an open file, to detect changes."""
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


@contextmanager
def _disk_errors(action: str) -> Iterator[None]:
    """Convert an OSError to StoreFailed: "could not `action`: ..."."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else error_text(error)
        raise StoreFailed(f"could not {action}: {why}; nothing was changed") from error
