"""From the engine's thread to the event loop: one wake for a whole step, however many requests it served.

Owns the crossing of threads. Knows nothing of what is delivered.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class EventLoopDelivery:
    """Takes what any thread posts and hands it over on the loop's thread, in order, once it is woken.

    Waking is apart from posting: the loop would come for the first post of a step while the others are being written,
    and then again for nearly each of them, as both threads want the interpreter.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._posts: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._awake = False

    def post(self, receiver: Callable[[Any], None], item: Any) -> None:
        """Call `receiver(item)` on the loop's thread, after the next `wake`. Never blocks; from any thread."""
        self._posts.append((receiver, item))

    def wake(self) -> None:
        """Let the loop come for all that has been posted. Never blocks; from any thread."""
        if self._posts and not self._awake and not self.loop.is_closed():
            self._awake = True
            self.loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._awake = False
        while self._posts:
            receiver, item = self._posts.popleft()
            try:
                receiver(item)
            except Exception:  # the others' posts would lie here until the next wake, which may never come
                log.exception("what was posted could not be handed over")


class DeliveryInbox:
    """What has arrived for one reader. Used on the loop's thread alone."""

    __slots__ = ("_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[Any] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, item: Any) -> None:
        """Add an item and wake the reader."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[Any]:
        """All that has arrived, at least one item."""
        while not self._items:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items
