"""Folders below the user's adapter directory, which is a jail: no path, link or `..` leads out of it."""

from __future__ import annotations

from pathlib import Path

from server.errors import InvalidRequest


def inside(source: str, directory: Path) -> Path | None:
    """The folder that `source` names below `directory`, or None where there is none.

    `source` is relative to `directory`, or absolute and below it. Raises InvalidRequest for a place outside; the
    message does not tell what lies there.
    """
    root = directory.resolve()
    if "\0" in source:
        raise InvalidRequest("the source is no path", "source")
    try:
        place = (root / source).resolve()
        if not place.is_relative_to(root):
            raise InvalidRequest(
                "the source is a path outside the adapter directory; copy the folder into that (--adapter-dir), or "
                "upload its files",
                "source",
            )
        return place if place != root and place.is_dir() else None
    except (OSError, RuntimeError):  # too long, a link to itself, or not to be looked into
        raise InvalidRequest("the source is a path that cannot be followed", "source") from None


def meant(source: str, directory: Path) -> str | None:
    """The path from `directory` on of a folder in it that `source` names from the working directory on; None if it
    names none."""
    root = directory.resolve()
    try:
        place = Path(source).resolve()
        there = place != root and place.is_relative_to(root) and place.is_dir()
    except (OSError, RuntimeError, ValueError):  # it can be no path of this machine
        return None
    return place.relative_to(root).as_posix() if there else None
