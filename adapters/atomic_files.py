"""Durable file writes: files are synced before they are renamed into place."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapters.errors import StoreFailed, error_text

log = logging.getLogger(__name__)

_SYNC_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP)
"""Raised by file systems that cannot sync folders."""


def write_file(path: Path, *content: bytes | memoryview) -> None:
    """Write a file and sync it. Raises OSError."""
    with open(path, "wb") as out:
        out.writelines(content)
        out.flush()
        os.fsync(out.fileno())


def replace_file(path: Path, *content: bytes | memoryview) -> None:
    """Replace a file atomically; on failure the old content stays. Raises OSError."""
    part = path.with_name(f".{path.name}.part")
    try:
        write_file(part, *content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    try:
        sync_folder(path.parent)
    except OSError as error:  # only a power cut could undo the rename now
        log.warning("%s is written, but its folder could not be synced: %s", path.name, error_text(error))


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, if its file system supports it. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _SYNC_UNSUPPORTED:
            raise
    finally:
        os.close(fd)


@contextmanager
def store_errors(what: str) -> Iterator[None]:
    """Convert an OSError to StoreFailed: "could not write `what`: ..."."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"could not write {what}: {error_text(error)}") from None
