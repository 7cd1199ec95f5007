"""`Budget`: how much disk all fetches together may fill at one time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from server.errors import NoCapacity, QueueFull

Spend = Callable[[int], None]
"""Told before so many bytes are written. Raises NoCapacity, QueueFull, and TimeoutError once nobody wants them."""


class Budget:
    """`limit` bytes, shared by all accounts that are open. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._spent = 0

    @property
    def spent(self) -> int:
        """Bytes of the accounts that are open."""
        return self._spent

    @contextmanager
    def account(self) -> Iterator[Spend]:
        """One fetch's account. All that it spent is given back at the end; who goes on spending then is stopped."""
        own, closed = 0, False

        def spend(count: int) -> None:
            nonlocal own
            with self._lock:
                if closed:
                    raise TimeoutError
                if own + count > self.limit:
                    raise NoCapacity(f"the source is over the limit of {self.limit} bytes (--fetch-disk)", "source")
                if self._spent + count > self.limit:
                    raise QueueFull("other adapters are being fetched, and fill --fetch-disk", "source", 5.0)
                own += count
                self._spent += count

        try:
            yield spend
        finally:
            with self._lock:
                closed = True
                self._spent -= own
