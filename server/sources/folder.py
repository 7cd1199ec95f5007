"""Folders below the adapter directory. No path, link or `..` leads out of it."""

from __future__ import annotations

from pathlib import Path

from server.errors import InvalidRequest


def resolve_inside(source: str, directory: Path) -> Path | None:
    """The folder `source` below `directory`, or None if there is none.

    Args:
        source: A path relative to `directory`, or an absolute path below it.

    Raises:
        InvalidRequest: the path leads outside. The message does not reveal what is there.
    """
    root = directory.resolve()
    try:
        path = (root / source).resolve()
        if not path.is_relative_to(root):
            raise InvalidRequest(
                "the source is outside the adapter directory (--adapter-dir); copy the folder into it or upload its "
                "files",
                "source",
            )
        return path if path != root and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, not permitted, a NUL
        raise InvalidRequest("the source is not a valid path", "source") from None


def suggestion(source: str, directory: Path) -> str | None:
    """The path to give instead, if `source` is a folder of `directory` relative to the working directory."""
    root = directory.resolve()
    try:
        path = Path(source).resolve()
        found = path != root and path.is_relative_to(root) and path.is_dir()
    except (OSError, RuntimeError, ValueError):
        return None
    return path.relative_to(root).as_posix() if found else None
