"""Uploaded files and result files of jobs: metadata in the database, content on disk."""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sqlalchemy as sa

from adapters.atomic_files import store_errors, sync_folder
from server.database import Database
from server.database.tables import files
from server.errors import Conflict, UnknownName

CONTENT = "content"
MAX_NAME = 255


@dataclass(frozen=True)
class File:
    """Metadata of a file. `bytes` is its size. `created_at` is in seconds since the epoch."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int


class FileStore:
    """All files. Thread-safe.

    Attributes:
        used_by: Returns the id of an unfinished job that needs a file, or None.
        lock: Held while a file is deleted. Hold it from the lookup of a file to the creation of a job that uses it.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        self.used_by: Callable[[str], str | None] = lambda id: None
        self.lock = threading.RLock()
        self._database, self._folder = database, folder
        with database.read() as connection:
            rows = connection.execute(sa.select(files).order_by(files.c.sequence)).mappings().all()
        self._files = {row["id"]: File(**{k: v for k, v in row.items() if k != "sequence"}) for row in rows}
        for partial in folder.glob(".new-*"):  # uploads that the end of the server interrupted
            shutil.rmtree(partial, ignore_errors=True)

    def add(self, write: Callable[[Path], object], filename: str, purpose: str) -> File:
        """Add a file. It is on disk and in the database when this returns.

        Args:
            write: Writes the content to the path that it is given.
            filename: As the client sent it. Folders in it are removed.

        Raises StoreFailed if the disk or the database refuses; nothing is left of the file then.
        """
        id = f"file-{uuid.uuid4().hex}"
        partial, folder = self._folder / f".new-{id}", self._folder / id
        try:
            with store_errors("the file"):
                partial.mkdir(parents=True)
                write(partial / CONTENT)
                with (partial / CONTENT).open("rb") as stream:
                    os.fsync(stream.fileno())
                size = (partial / CONTENT).stat().st_size
                partial.rename(folder)
                sync_folder(self._folder)
            file = File(id, _base_name(filename), purpose, size, int(time.time()))
            with self.lock, self._database.transaction() as connection:
                last = connection.scalar(sa.select(sa.func.max(files.c.sequence)))
                connection.execute(sa.insert(files).values(sequence=(last or 0) + 1, **asdict(file)))
        except BaseException:
            for part in (partial, folder):
                shutil.rmtree(part, ignore_errors=True)
            raise
        self._files[id] = file
        return file

    def get(self, id: str) -> File:
        """A file's metadata. Raises UnknownName."""
        found = self._files.get(id)
        if found is None:
            raise UnknownName(f"there is no file {id[:64]!r}; GET /v1/files lists all files", "file_id")
        return found

    def path(self, id: str) -> Path:
        """The path of a file's content. Raises UnknownName."""
        self.get(id)
        return self._folder / id / CONTENT

    def all(self) -> list[File]:
        """All files, newest first."""
        return list(self._files.values())[::-1]

    def delete(self, id: str) -> None:
        """Delete a file. Raises UnknownName, Conflict if an unfinished job needs it, and StoreFailed."""
        with self.lock:
            self.get(id)
            if (user := self.used_by(id)) is not None:
                raise Conflict(f"the job {user} needs {id}; cancel it first with POST /jobs/{user}/cancel", "file_id")
            with self._database.transaction() as connection:
                connection.execute(sa.delete(files).where(files.c.id == id))
            del self._files[id]
        shutil.rmtree(self._folder / id, ignore_errors=True)


def _base_name(filename: str) -> str:
    text = filename.encode("utf-8", "replace").decode().replace("\\", "/").replace("\0", "")
    return Path(text).name[:MAX_NAME] or "file"
