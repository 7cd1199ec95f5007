"""How much one key, or one task, may have at a time: a rate of requests and a number in flight.

Owns the counts. The engine's queue bounds what all of them have together.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable

from server.errors import RateLimited

REMEMBERED = 4096


class _Rate:
    """Requests a second of each name, with a burst of two seconds' worth (at least one request)."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self.rate = rate
        self._clock = clock
        self._burst = max(1.0, 2 * rate)
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def left(self, name: str) -> float:
        """How many requests it may send now."""
        now = self._clock()
        tokens, since = self._buckets.get(name, (self._burst, now))
        return min(self._burst, tokens + (now - since) * self.rate)

    def check(self, name: str, whose: str) -> None:
        """Raises RateLimited, with the time of its next request, if it may send none now."""
        left = self.left(name)
        if left < 1.0:
            wait = (1.0 - left) / self.rate
            raise RateLimited(f"the rate of {self.rate:g} requests a second of {whose} is used up", retry_after=wait)

    def spend(self, name: str) -> None:
        """It sends one."""
        self._buckets[name] = (self.left(name) - 1.0, self._clock())
        self._buckets.move_to_end(name)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)


class Admission:
    """Limits that are None are none. Used on the event loop's thread alone.

    Rates are in requests a second for each key and for each task, with a burst of two seconds' worth.
    """

    def __init__(
        self,
        key_rate: float | None = None,
        per_key: int | None = None,
        task_rate: float | None = None,
        per_task: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._key_rate = None if key_rate is None else _Rate(key_rate, clock)
        self._task_rate = None if task_rate is None else _Rate(task_rate, clock)
        self._per_key, self._per_task = per_key, per_task
        self._keys: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()

    def check(self, tenant: str, task: str | None) -> None:
        """Raises RateLimited, which says which limit it was, for a request that would not be let in now."""
        if self._per_key is not None and self._keys[tenant] >= self._per_key:
            raise RateLimited(f"this key has {self._per_key} of {self._per_key} requests in flight", retry_after=1.0)
        if task is not None and self._per_task is not None and self._tasks[task] >= self._per_task:
            raise RateLimited(
                f"the task {task!r} has {self._per_task} of {self._per_task} requests in flight", retry_after=1.0
            )
        if self._key_rate is not None:
            self._key_rate.check(tenant, "this key")
        if task is not None and self._task_rate is not None:
            self._task_rate.check(task, f"the task {task!r}")

    def enter(self, tenant: str, task: str | None) -> None:
        """Let a request in. Raises RateLimited, as `check` does; nothing is spent then."""
        self.check(tenant, task)
        self._keys[tenant] += 1
        if self._key_rate is not None:
            self._key_rate.spend(tenant)
        if task is not None:
            self._tasks[task] += 1
            if self._task_rate is not None:
                self._task_rate.spend(task)

    def leave(self, tenant: str, task: str | None) -> None:
        """A request that was let in has ended."""
        for counts, name in ((self._keys, tenant), (self._tasks, task)):
            if name is None:
                continue
            counts[name] -= 1
            if not counts[name]:
                del counts[name]
