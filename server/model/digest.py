"""Content digests of files, remembered by path, size and time, so that a warm start need not read gigabytes.

Owns the one JSON file that remembers them. Deleting it costs a start the time to read its model once.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

log = logging.getLogger(__name__)

REMEMBERED = "digests.json"
_STEP = 1 << 22
_SETTLED = 2.0  # seconds: a file of just now could still change within one tick of its clock


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
        self._known: dict[str, tuple[int, int, str]] = {}
        if self._path is not None:
            try:
                content = json.loads(self._path.read_text(encoding="utf-8"))
                self._known = {str(k): (int(s), int(t), str(d)) for k, (s, t, d) in content.items()}
            except FileNotFoundError:
                pass
            except (ValueError, TypeError, AttributeError, OSError) as error:
                log.warning("%s is not readable and is made anew: %s", self._path.name, error)

    def of(self, path: Path, start: int = 0, stop: int | None = None) -> str:
        """SHA-256 of the file's bytes, from memory if it still has the size and time that it had. Raises OSError."""
        key, stat = f"{path.resolve()}[{start}:{stop}]", path.stat()
        size, modified, digest = self._known.get(key, (0, 0, ""))
        if digest and (size, modified) == (stat.st_size, stat.st_mtime_ns):
            return digest
        digest = sha256(path, start, stop)
        if abs(time.time() - stat.st_mtime) > _SETTLED:
            self._remember(key, (stat.st_size, stat.st_mtime_ns, digest))
        return digest

    def of_all(self, root: Path, paths: Iterable[Path]) -> str:
        """SHA-256 over the names below `root` and the digests of several files, whatever their order."""
        total = hashlib.sha256()
        for path in sorted(paths):
            total.update(f"{path.relative_to(root).as_posix()} {self.of(path)}\n".encode())
        return total.hexdigest()

    def _remember(self, key: str, entry: tuple[int, int, str]) -> None:
        self._known[key] = entry
        if self._path is None:
            return
        self._known = {k: v for k, v in self._known.items() if Path(k.rsplit("[", 1)[0]).exists()}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._path.parent, prefix=REMEMBERED)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(self._known, file)
                os.replace(name, self._path)
            except OSError:
                os.unlink(name)
                raise
        except OSError as error:  # only a convenience is lost
            log.warning("digests cannot be remembered in %s: %s", self._path.parent, error)
