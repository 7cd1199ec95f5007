"""SHA-256 digests of files, cached by path and stamp, so that a warm start does not read gigabytes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

log = logging.getLogger(__name__)

CACHE = "digests.json"
_CHUNK = 1 << 22

Stamp = tuple[int, int, int, int]
"""Inode, size, and times of the last modification and of the last status change, which nobody can set back."""


def stamp(path: Path) -> Stamp:
    """Raises OSError."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def stamps(source: Path) -> dict[Path, Stamp]:
    """The stamps of a file, or of all files in a folder; unreadable ones are left out."""
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
        while left > 0 and (block := file.read(min(_CHUNK, left))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


class Digests:
    """Digests of files, cached in `directory` (None: not cached)."""

    def __init__(self, directory: Path | None) -> None:
        self._path = None if directory is None else directory / CACHE

    def of(self, path: Path, start: int = 0, stop: int | None = None) -> str:
        """SHA-256 of the file's bytes; from the cache while the file has the same stamp. Raises OSError."""
        key, now = f"{path.resolve()}[{start}:{stop}]", list(stamp(path))
        entry = self._read().get(key)
        if isinstance(entry, list) and entry[:-1] == now:
            return str(entry[-1])
        digest = sha256(path, start, stop)
        self._write(key, [*now, digest])
        return digest

    def of_all(self, root: Path, paths: Iterable[Path]) -> str:
        """SHA-256 over the names below `root` and the digests of several files, in any order."""
        total = hashlib.sha256()
        for path in sorted(paths):
            total.update(f"{path.relative_to(root).as_posix()} {self.of(path)}\n".encode())
        return total.hexdigest()

    def _read(self) -> dict[str, object]:
        try:
            content = {} if self._path is None else json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, key: str, entry: list[object]) -> None:
        if self._path is None:
            return
        entries = {k: v for k, v in self._read().items() if Path(k.rsplit("[", 1)[0]).exists()} | {key: entry}
        partial = self._path.with_name(f"{CACHE}.{os.getpid()}.tmp")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(entries), encoding="utf-8")
            os.replace(partial, self._path)
        except OSError as error:
            log.warning("digests cannot be cached in %s: %s", self._path.parent, error)
