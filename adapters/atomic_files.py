"""Durable file writes: files are synced before they are renamed into place."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


def set_aside(path: Path, copy: bool = False) -> Path:
    """Rename an unreadable file to the first free of `name.broken.ext`, `name.broken2.ext`, ..., or copy it there.

    Returns the new path. An identical copy that exists is returned instead of a new one.
    """
    names = [path.with_suffix(f".broken{number}{path.suffix}") for number in ("", *range(2, 101))]
    if copy:
        content = path.read_bytes()
        same = (name for name in names if name.exists() and name.read_bytes() == content)
        if (existing := next(same, None)) is not None:
            return existing
    aside = next((name for name in names if not name.exists()), names[0])
    if copy:
        shutil.copyfile(path, aside)
    else:
        os.replace(path, aside)
    return aside


def known_fields(kind: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of `record` that are fields of the dataclass `kind`; newer versions may write more."""
    return {name: value for name, value in record.items() if name in kind.__dataclass_fields__}


refused = store_errors  # old name
