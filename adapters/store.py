"""`AdapterStore`: our own copy of every version on disk, and the journal that says which names they have.

Owns the folder layout, the order of its writes, and what is freed. Does not know how an adapter is read or computed,
nor who uses a version: it moves files, and is told digests and what a record says. Not thread-safe for writes; the
registry makes them on one thread.

    versions/<digest>/   a PEFT folder that is never changed, but for its card, its task and our record.json
    names.json           the journal, replaced by a rename
    incoming/            what is not finished or not yet deleted; emptied when the store is opened
    unnamed/<digest>/    versions whose names were lost with names.json, until that is put back
    lock                 held for as long as the store is open; says how often the journal was written

A copy is written in `incoming`, synced, and renamed into place before the journal names it; a version is renamed out
of its place before it is deleted, after the journal has stopped naming it. So a crash anywhere leaves every named
version whole, and what it leaves behind is removed when the store is opened next; but for versions that a journal may
have named which somebody has taken away, or put an older one in its place.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from adapters.atomic_files import known_fields, sync_folder, write_file
from adapters.catalog import ANOTHER_BASE
from adapters.catalog_state import CatalogState
from adapters.errors import InvalidAdapter, NoRoom, StoreFailed, reason
from adapters.peft_format import CARD_FILE, REQUIRED, TASK_FILE, open_inside
from adapters.weights import SHORT_DIGEST, LoraWeights

log = logging.getLogger(__name__)

SIDE = {TASK_FILE: "task", CARD_FILE: "card"}
"""What may change while the content, and so the digest, stays: the task's definition and the card, as they are told."""
RECORD = "record.json"
CHUNK = 1 << 20
WRITTEN = "written"
"""The entry of names.json that says when that was, in seconds since the epoch."""
WRITES = "writes"
"""The entry that says how often it has been written until then: less than the lock tells in a copy that is put back."""
SAME_WRITE = 60.0
"""Seconds between that and the file's own time, beyond which somebody else has put it there."""


Modules = Mapping[str, tuple[int, int, int]]
"""Path -> rank, outputs and inputs of its update."""


def _unknown(modules: Modules) -> None:
    return None


@dataclass(frozen=True)
class VersionRecord:
    """What is told about a version without reading its tensors.

    `metadata` is what was told of it last; `told` is what was told under each name, its task and card among it.
    """

    digest: str
    nbytes: int
    modules: Modules
    metadata: Mapping[str, Any] = field(default_factory=dict)
    created_at: float = 0.0
    told: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @staticmethod
    def of(weights: LoraWeights, created_at: float) -> VersionRecord:
        """The record of `weights`, at the size that they have now."""
        modules = {path: (m.rank, *m.shape) for path, m in weights.modules.items()}
        metadata = dict(weights.metadata)
        return VersionRecord(weights.digest, weights.nbytes, modules, metadata, created_at, {weights.name: metadata})

    def metadata_of(self, name: str) -> Mapping[str, Any]:
        """What was told of the version under this name."""
        return self.told.get(name, self.metadata)

    @cached_property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({rank for rank, _, _ in self.modules.values()})

    @cached_property
    def targets(self) -> list[str]:
        """The distinct last parts of the module paths, sorted."""
        return sorted({path.rsplit(".", 1)[-1] for path in self.modules})

    def misfit(self, shapes: Mapping[str, tuple[int, int]], max_rank: int) -> str | None:
        """Why this version cannot be served on a base of these shapes; None if it can."""
        for path, (_, out, into) in self.modules.items():
            if path not in shapes:
                return f"{ANOTHER_BASE}: the one served has no {path}"
            if shapes[path] != (out, into):
                return f"{ANOTHER_BASE}: {path} is {list(shapes[path])} here and {[out, into]} there"
        most = max((rank for rank, _, _ in self.modules.values()), default=0)
        return f"its rank {most} is over the limit of {max_rank} (--max-rank)" if most > max_rank else None


def carry_over(weights: LoraWeights, before: VersionRecord, dropped: Collection[str]) -> LoraWeights:
    """`weights` with the task and the card that they do not bring as `before`, the version that their name has, told
    them; files that were `dropped` take theirs along.

    A task that another version brought has its digest as `task_of`: it does not come anew.
    """
    told, metadata = before.metadata_of(weights.name), dict(weights.metadata)
    for file, key in SIDE.items():
        if metadata.get(key) is not None or told.get(key) is None:
            continue
        if file in dropped:
            log.warning("the folder of %s has no %s any more, so what it said is dropped", weights.name, file)
            continue
        metadata[key] = told[key]
        origin = told.get("task_of", before.digest)
        if key == "task" and origin != weights.digest:
            metadata["task_of"] = origin
    return replace(weights, metadata=metadata)


class Disk:
    """The few operations by which a store changes the disk. Each is a point where a crash or a full disk can strike."""

    def copy(self, source: int, target: Path, limit: int) -> int:
        """Copy what can be read from the descriptor `source` into a new file and sync it. Answers its size.

        Raises NoRoom over `limit` bytes.
        """
        over = NoRoom(f"{target.name} is over {limit:,} bytes, more than could ever be served")
        size = 0
        if os.fstat(source).st_size > limit:  # none of it is written, as whoever watches a folder tries again
            raise over
        with open(target, "xb") as out:
            while chunk := os.read(source, CHUNK):
                size += len(chunk)
                if size > limit:
                    raise over
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
        return size

    def write(self, path: Path, content: bytes) -> None:
        """Write a file and sync it."""
        write_file(path, content)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def note(self, descriptor: int, content: bytes) -> None:
        """Write over the beginning of an open file."""
        os.pwrite(descriptor, content, 0)

    def sync(self, folder: Path) -> None:
        """Make the names in `folder` durable."""
        sync_folder(folder)

    def make(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)

    def remove(self, path: Path) -> None:
        """Remove a file or a folder; nothing if it is not there."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


class AdapterStore:
    """The versions and names under one folder, which this process alone may hold open.

    `lost` says of each version that the journal names and the disk does not give back why that is. Every method that
    writes raises StoreFailed if the disk refuses, and then nothing that can be seen has changed. `size` says what
    modules take in memory here, or None: a version's record has what it took where it was published.
    """

    def __init__(
        self, root: Path, *, disk: Disk | None = None, size: Callable[[Modules], int | None] = _unknown
    ) -> None:
        self.root = root
        self._disk = disk or Disk()
        self._size = size
        self._sizes: dict[str, int] = {}
        self._versions = root / "versions"
        self._incoming = root / "incoming"
        self._unnamed = root / "unnamed"
        self._names = root / "names.json"
        self._lock: int | None = None
        self.records: dict[str, VersionRecord] = {}
        self.lost: dict[str, str] = {}
        self.damaged: set[str] = set()
        """Versions whose files were found changed; `adopt` replaces them."""
        with _told("open the store"):
            self._disk.make(self._versions)
            self._disk.make(self._incoming)
            self._lock = self._take_lock()
        try:
            with _told("open the store"):
                self.journal, lost_since = self._read_journal()
                self._sweep(lost_since)
                self._read_records()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let another process open it. Idempotent."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def path(self, digest: str) -> Path:
        """The folder of one version, for reading."""
        return self._versions / digest

    def nbytes(self, digest: str) -> int:
        """What one version takes in memory; 0 if it is not known."""
        record = self.records.get(digest)
        if record is None:
            return 0
        if digest not in self._sizes:
            self._sizes[digest] = self._size(record.modules) or record.nbytes
        return self._sizes[digest]

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder of the store's own, for an upload or a file that is made; removed at the end."""
        with _told("make room for a new adapter"):
            folder = Path(tempfile.mkdtemp(dir=self._incoming))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # what stays is swept when the store is opened

    @contextmanager
    def stage(self, folder: Path, *, within: Path | None = None, limit: int = 1 << 40) -> Iterator[Path]:
        """A private copy of the adapter in `folder`, to be read, checked and adopted; removed at the end if not.

        What is checked is then what is kept, whatever happens to `folder` later. Files that are missing there are
        missing here. Raises InvalidAdapter for what is not a regular file or cannot be read, changes while it is copied
        or, with `within`, leads out of that folder; NoRoom over `limit` bytes in all.
        """
        with self.staging() as staged, ExitStack() as opened:
            before: dict[str, tuple[int, tuple[int, ...]]] = {}
            for name in (*REQUIRED, *SIDE):
                source = open_inside(folder / name, within)
                if source is not None:
                    opened.callback(os.close, source)
                    before[name] = source, _state(source)
            for name, (source, _) in before.items():
                with _told(f"copy {name}"):
                    limit -= self._disk.copy(source, staged / name, limit)
            for name, (source, state) in before.items():
                if _state(source) != state:  # half of it may be of one content, and half of another
                    raise InvalidAdapter(f"{name} has changed while it was copied; try again once it is written", name)
            yield staged

    def adopt(self, staged: Path, record: VersionRecord) -> bool:
        """Take a staged copy, found to be `record.digest`, as that version.

        If the version is here already, only what is told of it is renewed, since equal digests mean equal content; if
        its files were found damaged they are replaced too. What was told under other names stays. Answers whether
        something is told that was not.
        """
        digest, target = record.digest, self.path(record.digest)
        known = self.records.get(digest)
        if known is not None:
            others = (name for name, entry in self.journal.names.items() if digest in entry.history)
            kept = {name: known.metadata_of(name) for name in others}
            record = replace(record, created_at=known.created_at, told={**kept, **record.told})
        with _told("keep the new version"):
            self._disk.write(staged / RECORD, json.dumps(asdict(record)).encode())
            if known is None or not target.exists():
                self._disk.sync(staged)
                if target.exists():  # an earlier attempt got this far and the journal never named it
                    self._discard(target)
                self._disk.rename(staged, target)
                self._disk.sync(self._versions)
            else:
                self._renew(staged, target, replaced=REQUIRED if digest in self.damaged else ())
        self.damaged.discard(digest)
        self.lost.pop(digest, None)
        self.records[digest] = record
        if known is None:
            return False
        before, after = ({n: r.metadata_of(n) for n in record.told} for r in (known, record))
        return json.dumps(before) != json.dumps(after)

    def write(self, journal: CatalogState) -> None:
        """Make `journal` the one that is found after a crash."""
        fresh = self._names.with_suffix(".new")
        with _told("write the names"):
            try:
                content = {**journal.to_json(), WRITTEN: time.time(), WRITES: self._writes + 1}
                self._disk.write(fresh, json.dumps(content).encode())
                self._disk.rename(fresh, self._names)
            except OSError:
                fresh.unlink(missing_ok=True)
                raise
        self.journal = journal
        self._writes += 1
        try:
            self._disk.sync(self.root)
        except OSError as error:  # it stands, and only a power cut now could undo it
            log.warning("the names in the store are written but not synced: %s", reason(error))
        assert self._lock is not None, "a store that is written to is open"
        with suppress(OSError):  # of an older copy that is put back times alone tell then
            self._disk.note(self._lock, b"%d" % self._writes)

    def remove(self, digest: str) -> None:
        """Delete one version, which the journal must not name."""
        assert digest not in self.journal.referenced(), "a version is deleted while it has a name"
        self.records.pop(digest, None)
        self._sizes.pop(digest, None)
        self.damaged.discard(digest)
        with _told("delete a version"):
            self._discard(self.path(digest))

    def _discard(self, folder: Path) -> None:
        """Take a folder out of sight in one step, then delete it."""
        if not folder.exists():
            return
        trash = Path(tempfile.mkdtemp(dir=self._incoming))
        self._disk.rename(folder, trash / folder.name)
        self._disk.remove(trash)

    def _renew(self, staged: Path, target: Path, replaced: tuple[str, ...]) -> None:
        for name in (*replaced, *SIDE, RECORD):
            if (staged / name).exists():
                self._disk.rename(staged / name, target / name)
            else:
                self._disk.remove(target / name)
        self._disk.sync(target)

    def _take_lock(self) -> int:
        fd = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise StoreFailed("the state directory is in use by another process; stop it or use another") from None
        return fd

    def _noted(self) -> int:
        """How often the journal was written, by the lock; 0 where that does not tell."""
        assert self._lock is not None, "it is taken first"
        text = os.pread(self._lock, 32, 0)
        return int(text) if text.isdigit() else 0

    def _read_journal(self) -> tuple[CatalogState, float]:
        """The names, and since when others may have been given that are lost: never, if this is the file that was
        written last."""
        self._writes = noted = self._noted()
        try:
            text = self._names.read_text(encoding="utf-8")
            changed = self._names.stat().st_ctime
        except FileNotFoundError:
            if not any(self._versions.iterdir()):
                with suppress(StoreFailed):  # a disk that refuses is told of with the first version
                    self.write(CatalogState())  # from that on, a file that is not there has been taken away
            return CatalogState(), -math.inf
        try:
            content = json.loads(text)
            written = float(content.get(WRITTEN, changed))
            writes = int(content.get(WRITES, 0))
            journal = CatalogState.from_json(content)
            self._writes = max(writes, noted)
            if writes < noted:  # a copy, whatever the clock was when it was made and when versions were
                return journal, -math.inf
            if abs(changed - written) <= SAME_WRITE:
                return journal, math.inf
            # Where the clock was set back since, times do not tell what came before the copy and what after.
            return journal, written if written < changed else -math.inf
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreFailed(
                f"names.json in the store cannot be read ({error}); put a good copy back, or move it away to start "
                "without names: versions that have none then are kept in the store's folder 'unnamed'"
            ) from error

    def _sweep(self, lost_since: float) -> None:
        """Remove what a crash left: unfinished copies, unfinished deletions, versions that never got a name. Those that
        may have had one since then are set aside, until they have one again."""
        for left in self._incoming.iterdir():
            self._disk.remove(left)
        self._disk.remove(self._names.with_suffix(".new"))
        named = self.journal.referenced()
        for digest in named:
            aside = self._unnamed / digest
            if aside.exists() and not self.path(digest).exists():  # the names were put back
                self._disk.rename(aside, self.path(digest))
                log.warning(
                    "version %s has a name again, and is put back from %s", digest[:SHORT_DIGEST], self._unnamed
                )
        for folder in self._versions.iterdir():
            if folder.name in named:
                continue
            aside = self._unnamed / folder.name
            if aside.exists() or self._made(folder) <= lost_since:
                self._discard(folder)
                continue
            self._disk.make(self._unnamed)
            self._disk.rename(folder, aside)
            log.warning("version %s has no name any more: it is kept in %s", folder.name[:SHORT_DIGEST], self._unnamed)

    def _made(self, folder: Path) -> float:
        """When a version was made; later than anything where its record does not tell."""
        try:
            return float(json.loads((folder / RECORD).read_text(encoding="utf-8"))["created_at"])
        except (OSError, ValueError, KeyError, TypeError):
            return math.inf

    def _read_records(self) -> None:
        for digest in self.journal.referenced():
            try:
                self.records[digest] = self._read_record(digest)
            except FileNotFoundError:
                what = "a file of version" if self.path(digest).exists() else "version"
                self.lost[digest] = f"{what} {digest[:SHORT_DIGEST]} is missing from the store"
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                self.lost[digest] = f"the record of version {digest[:SHORT_DIGEST]} cannot be read ({reason(error)})"
            if digest in self.lost:
                self.lost[digest] += "; publish it again, or roll back to another"
                log.error("%s", self.lost[digest])

    def _read_record(self, digest: str) -> VersionRecord:
        folder = self.path(digest)
        for name in REQUIRED:
            (folder / name).stat()
        fields = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        modules = {path: (int(r), int(o), int(i)) for path, (r, o, i) in fields.pop("modules").items()}
        record = VersionRecord(modules=modules, **known_fields(VersionRecord, fields))
        if record.digest != digest:
            raise ValueError("it is another version's")
        told = (record.metadata, *record.told.values())
        if not isinstance(record.nbytes, int) or not all(isinstance(each, dict) for each in told):
            raise ValueError("it is none that was written here")
        return record


def _state(descriptor: int) -> tuple[int, ...]:
    """What tells whether a file was written to, or another put in its place, since it was opened."""
    state = os.fstat(descriptor)
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns


@contextmanager
def _told(action: str) -> Iterator[None]:
    """An OSError becomes StoreFailed, which says what was tried and why it failed, without a path."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        why = "the disk is full" if full else reason(error)
        raise StoreFailed(f"could not {action}: {why}; nothing was changed") from error
