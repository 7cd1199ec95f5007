"""Delivers results from the engine's thread to the event loop, with one wake-up per engine step."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class EventLoopDelivery:
    """Queue from any thread to the event loop's thread.

    `wake` is separate from `post`: a wake-up for each post would make both threads compete for the interpreter lock
    while the other results of a step are still being posted.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posts: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._scheduled = False

    def post(self, receiver: Callable[[Any], None], item: Any) -> None:
        """Call `receiver(item)` on the loop's thread after the next `wake`. Never blocks; callable from any thread."""
        self._posts.append((receiver, item))

    def wake(self) -> None:
        """Deliver everything that was posted. Never blocks; callable from any thread."""
        if self._posts and not self._scheduled and not self.loop.is_closed():
            self._scheduled = True
            self.loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._scheduled = False
        while self._posts:
            receiver, item = self._posts.popleft()
            try:
                receiver(item)
            except Exception:  # the other posts must still be delivered
                log.exception("a result could not be delivered")


class DeliveryInbox:
    """Results for one reader. Used on the loop's thread only."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Any]:
        """Wait for at least one item and return all."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items
