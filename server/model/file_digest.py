"""Content digests of files, remembered by path and stamp, so that a warm start need not read gigabytes.

Owns what tells that a file is no longer the same, and the one JSON file that remembers digests. Deleting it costs a
start the time to read its model once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

REMEMBERED = "digests.json"
_STEP = 1 << 22
_SETTLED = 2.0  # seconds: a file of just now could still change within one tick of its clock

Stamp = tuple[int, int, int, int]
"""Inode, size, and the times of the last write and the last change of a file: nobody can set the last one back."""


def stamp(path: Path) -> Stamp:
    """Raises OSError."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def stamps(source: Path) -> dict[Path, Stamp]:
    """Those of a file, or of all files in a folder. What cannot be looked at has none."""
    found = {}
    with suppress(OSError):
        for path in source.iterdir() if source.is_dir() else [source]:
            with suppress(OSError):
                found[path] = stamp(path)
    return found


def sha256(path: Path, start: int = 0, stop: int | None = None) -> str:
    """SHA-256 of a file, or of its bytes start..stop, in hexadecimal. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        while left > 0 and (block := file.read(min(_STEP, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class Digests:
    """Digests of files, remembered in `directory` (None: not remembered)."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / REMEMBERED
        self._known: dict[str, tuple[Stamp, str]] = self._read()

    def _read(self) -> dict[str, tuple[Any, str]]:
        if self._path is None:
            return {}
        try:
            content = json.loads(self._path.read_text(encoding="utf-8"))
            # An earlier version remembered less than a stamp: none equals that.
            return {str(k): (tuple(told), str(digest)) for k, (*told, digest) in content.items()}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, AttributeError, OSError) as error:
            log.warning("%s is not readable and is made anew: %s", self._path.name, error)
            return {}

    def of(self, path: Path, start: int = 0, stop: int | None = None) -> str:
        """SHA-256 of the file's bytes, from memory if it still has the stamp that it had. Raises OSError."""
        key, now = f"{path.resolve()}[{start}:{stop}]", stamp(path)
        known, digest = self._known.get(key, (None, ""))
        if known == now:
            return digest
        digest = sha256(path, start, stop)
        if abs(time.time() - now[2] / 1e9) > _SETTLED:
            self._remember({key: (now, digest)})
        return digest

    def note_use(self, path: Path) -> None:
        """Note in a file's time of access that it is used: many disks do not. That changes its stamp, and what is known
        of it stays known; one of which nothing is, or could be kept, is left as it is. Raises OSError."""
        before, start = stamp(path), f"{path.resolve()}["
        known = {k: d for k, (s, d) in self._known.items() if k.startswith(start) and s == before}
        if known and self._path is not None and os.access(self._path.parent, os.W_OK):
            os.utime(path, ns=(time.time_ns(), before[2]))
            after = stamp(path)
            self._remember({k: (after, d) for k, d in known.items()})

    def of_all(self, root: Path, paths: Iterable[Path]) -> str:
        """SHA-256 over the names below `root` and the digests of several files, whatever their order."""
        total = hashlib.sha256()
        for path in sorted(paths):
            total.update(f"{path.relative_to(root).as_posix()} {self.of(path)}\n".encode())
        return total.hexdigest()

    def _remember(self, entries: Mapping[str, tuple[Stamp, str]]) -> None:
        self._known = {**self._known, **self._read(), **entries}  # other processes have theirs there
        if self._path is None:
            return
        self._known = {k: v for k, v in self._known.items() if Path(k.rsplit("[", 1)[0]).exists()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=REMEMBERED)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump({key: [*told, digest] for key, (told, digest) in self._known.items()}, file)
                os.replace(name, self._path)
            except OSError:
                os.unlink(name)
                raise
        except OSError as error:  # only a convenience is lost
            log.warning("digests cannot be remembered in %s: %s", self._path.parent, error)
