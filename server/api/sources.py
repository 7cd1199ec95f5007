"""The folder that a client's `source` means: a path inside the adapter directory, and nothing outside it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from adapters.errors import UnknownAdapter
from server.errors import InvalidRequest
from server.settings import Settings


class AdapterSources:
    """Opens what the settings allow."""

    def __init__(self, settings: Settings) -> None:
        self._root = settings.watched_dir

    @asynccontextmanager
    async def open(self, source: str) -> AsyncIterator[tuple[Path, Path]]:
        """The folder, and the one that links may not lead out of. Raises InvalidRequest, UnknownAdapter."""
        root = self._root.resolve()
        try:
            folder = (root / source).resolve()
            inside, there = folder.is_relative_to(root) and folder != root, folder.is_dir()
        except (OSError, ValueError):
            raise InvalidRequest("source is no path", "source") from None
        if not inside:
            raise InvalidRequest("source must be a folder inside the adapter directory (--adapter-dir)", "source")
        if not there:
            raise UnknownAdapter("there is no such folder in the adapter directory (--adapter-dir)", "source")
        yield folder, root
