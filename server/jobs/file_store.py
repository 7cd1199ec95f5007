"""`FileStore`: uploaded data and what jobs leave behind, on disk by an id of our own making.

Owns `files/` in the state directory: one folder a file, which appears under its name when it is whole.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.atomic_files import known_fields, refused, sync_folder, write_file
from adapters.errors import StoreFailed
from server.errors import Conflict, UnknownName

log = logging.getLogger(__name__)

CONTENT, ABOUT = "content", "file.json"
MAX_NAME = 255


@dataclass(frozen=True)
class File:
    """`bytes` is its size, `created_at` in seconds since the epoch."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int


class FileStore:
    """All files. Thread-safe. `used_by` tells which job that is not over needs a file, if there is one."""

    def __init__(self, folder: Path) -> None:
        self.used_by: Callable[[str], str | None] = lambda id: None
        self._folder = folder
        self._lock = threading.Lock()
        self._files: dict[str, File] = {}
        self._held = Counter[str]()
        """Those that jobs are being asked for with, which `used_by` has yet to know."""
        for part in folder.glob(".new-*"):  # of an upload that the server's end cut short
            shutil.rmtree(part, ignore_errors=True)
        found: list[tuple[int, File]] = []
        for about in folder.glob(f"file-*/{ABOUT}"):  # dangling links too, since Python 3.13
            try:
                file = File(**known_fields(File, json.loads(about.read_text(encoding="utf-8"))))
                if file.id != about.parent.name:  # whose content may be gone since
                    raise ValueError(f"it is a copy of {file.id}")
                written = about.stat().st_mtime_ns
            except (OSError, ValueError, TypeError, AttributeError) as error:
                log.error("what %s is cannot be read, and it is left out: %s", about.parent.name, error)
                continue
            found.append((written, file))
        self._files.update((file.id, file) for _, file in sorted(found, key=lambda each: each[0]))

    def add(self, write: Callable[[Path], object], filename: str, purpose: str) -> File:
        """A new file, whose content `write` puts at the path that it is given. Raises StoreFailed."""
        id = f"file-{uuid.uuid4().hex}"
        with refused("the file"):
            self._folder.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=self._folder, prefix=".new-"))
        try:
            write(part / CONTENT)
            with (part / CONTENT).open("rb") as stream:
                os.fsync(stream.fileno())
            size = (part / CONTENT).stat().st_size
            text = filename.encode("utf-8", "replace").decode()  # half of a pair is no text that can be told again
            name = Path(text.replace("\\", "/")).name[:MAX_NAME] or "file"
            file = File(id, name, purpose, size, int(time.time()))
            write_file(part / ABOUT, json.dumps(asdict(file)).encode())
            part.rename(self._folder / id)
            sync_folder(self._folder)
        except OSError as error:
            shutil.rmtree(self._folder / id, ignore_errors=True)  # whose name may not outlive a power cut
            raise StoreFailed(f"the disk refuses the file: {error.strerror}") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
        with self._lock:
            self._files[id] = file
        return file

    def get(self, id: str) -> File:
        """Raises UnknownName."""
        with self._lock:
            found = self._files.get(id)
        if found is None:
            raise UnknownName(f"there is no file {id[:64]!r}; GET /v1/files lists them", "file_id")
        return found

    def path(self, id: str) -> Path:
        """Where a file's content lies. Raises UnknownName."""
        self.get(id)
        return self._folder / id / CONTENT

    def all(self) -> list[File]:
        """Newest first, those of one second too: sorting leaves equals as they came."""
        with self._lock:
            return sorted(self._files.values(), key=lambda file: file.created_at)[::-1]

    @contextmanager
    def held(self, *ids: str | None) -> Iterator[None]:
        """None of these is deleted inside: from before it is looked up for a job until that job is entered."""
        these = Counter(id for id in ids if id is not None)
        with self._lock:
            self._held += these
        try:
            yield
        finally:
            with self._lock:
                self._held -= these

    def delete(self, id: str) -> None:
        """Raises UnknownName, and Conflict while a job needs it."""
        self.get(id)
        with self._lock:
            user = self.used_by(id)
            if user is not None:
                raise Conflict(
                    f"{id} is what the job {user} works on; end that first, by POST /jobs/{user}/cancel", "file_id"
                )
            if self._held[id]:
                raise Conflict(f"{id} is what a job will work on that is being asked for", "file_id")
            self._files.pop(id, None)
        shutil.rmtree(self._folder / id, ignore_errors=True)
