"""Files that are whole on the disk whenever the process or the machine stops, and what of a record is to be read.

Each function that goes to the disk raises OSError; `refused` makes of it what is told.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters.errors import StoreFailed, reason

log = logging.getLogger(__name__)

MOST_ASIDE = 100
"""Files of one name that are kept when they cannot be read; the first gives way to more."""

_NO_SYNC = (errno.EINVAL, errno.ENOTSUP)
"""What is answered where folders cannot be synced at all; a disk that fails answers otherwise."""


def write_file(path: Path, *content: bytes | memoryview) -> None:
    """Write a file, of one part or more, and sync it."""
    with open(path, "wb") as out:
        out.writelines(content)
        out.flush()
        os.fsync(out.fileno())


def replace_file(path: Path, *content: bytes | memoryview) -> None:
    """Give a file its content in one step: until then it is what it was, and stays so if the disk refuses."""
    part = path.with_name(f".{path.name}.part")
    try:
        write_file(part, *content)
        os.replace(part, path)
    except OSError:
        part.unlink(missing_ok=True)  # a disk that is full has use for the room
        raise
    try:
        sync_folder(path.parent)
    except OSError as error:  # it stands, and only a power cut now could undo it
        log.warning("%s is written but its name is not synced: %s", path.name, reason(error))


@contextmanager
def refused(what: str) -> Iterator[None]:
    """Raises StoreFailed where the disk refuses `what`."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"the disk refuses {what}: {reason(error)}") from None


def set_aside(path: Path, copy: bool = False) -> Path:
    """Move a file that cannot be read, or copy it, to a name beside it that no other was set aside under. A copy that
    there is already is no other."""
    names = [path.with_suffix(f".broken{number}{path.suffix}") for number in ("", *range(2, MOST_ASIDE + 1))]
    if copy:
        whole = path.read_bytes()
        same = (name for name in names if name.exists() and name.read_bytes() == whole)
        if (there := next(same, None)) is not None:
            return there
    aside = next((name for name in names if not name.exists()), names[0])
    if copy:
        shutil.copyfile(path, aside)
    else:
        os.replace(path, aside)
    return aside


def known_fields(kind: Any, record: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a record that are fields of the dataclass `kind`: what a later version has told besides is let be,
    so that going back to this one loses nothing."""
    return {name: value for name, value in record.items() if name in kind.__dataclass_fields__}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where its file system has a way to: folders that a virtual machine or the
    network shares may have none, and keep what is written all the same."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)
