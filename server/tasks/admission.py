"""How much one key, or one task, may have at a time: a rate of requests and a number in flight.

Owns the counts. The engine's queue bounds what all of them have together.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from server.errors import QueueFull

REMEMBERED = 4096


class Admission:
    """Limits that are None are none. Used on the event loop's thread alone.

    `rate` is in requests a second for each key, with a burst of two seconds' worth (at least one request).
    """

    def __init__(
        self,
        rate: float | None = None,
        per_key: int | None = None,
        per_task: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self._per_key, self._per_task = rate, per_key, per_task
        self._clock = clock
        self._burst = max(1.0, 2 * rate) if rate is not None else 0.0
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._keys: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()

    def enter(self, tenant: str, task: str | None) -> None:
        """Let a request in. Raises QueueFull, which says which limit it was."""
        if self._per_key is not None and self._keys[tenant] >= self._per_key:
            raise QueueFull(f"this key has {self._per_key} requests in flight, which is its limit", retry_after=1.0)
        if task is not None and self._per_task is not None and self._tasks[task] >= self._per_task:
            raise QueueFull(f"the task {task!r} has {self._per_task} requests in flight, its limit", retry_after=1.0)
        if self._rate is not None:
            self._spend(tenant, self._rate)
        self._keys[tenant] += 1
        if task is not None:
            self._tasks[task] += 1

    def leave(self, tenant: str, task: str | None) -> None:
        """A request that was let in has ended."""
        for counts, name in ((self._keys, tenant), (self._tasks, task)):
            if name is None:
                continue
            counts[name] -= 1
            if not counts[name]:
                del counts[name]

    def _spend(self, tenant: str, rate: float) -> None:
        now = self._clock()
        tokens, since = self._buckets.pop(tenant, (self._burst, now))
        tokens = min(self._burst, tokens + (now - since) * rate)
        spent = tokens >= 1.0
        self._buckets[tenant] = (tokens - 1.0 if spent else tokens, now)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        if not spent:
            raise QueueFull(
                f"this key's rate of {rate:g} requests a second is used up", retry_after=(1 - tokens) / rate
            )
