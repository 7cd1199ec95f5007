"""`Budget`: the disk space that all downloads together may take at one time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import NoCapacity, QueueFull

Spend = Callable[[int], None]
"""Called before so many bytes are written. Raises NoCapacity, QueueFull, or TimeoutError after the download ended."""


class Budget:
    """`limit` bytes, shared by all downloads in progress. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._spent = 0

    @property
    def spent(self) -> int:
        """Bytes of the downloads in progress."""
        return self._spent

    @contextmanager
    def account(self) -> Iterator[Spend]:
        """The account of one download. Its bytes are released at the end; spending afterwards fails."""
        own, closed = 0, False

        def spend(count: int) -> None:
            nonlocal own
            with self._lock:
                if closed:
                    raise TimeoutError
                if own + count > self.limit:
                    raise NoCapacity(f"the source is over the limit of {self.limit} bytes (--fetch-disk)", "source")
                if self._spent + count > self.limit:
                    raise QueueFull("other downloads use all of --fetch-disk; try again later", "source", 5.0)
                own += count
                self._spent += count

        try:
            yield spend
        finally:
            with self._lock:
                closed = True
                self._spent -= own
