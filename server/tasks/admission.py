"""Limits for each key and each task: a request rate and a number of concurrent requests."""

from __future__ import annotations

import math
import time
from collections import Counter

from server.errors import RateLimited

BURST_SECONDS = 2


class RateLimit:
    """Requests per second of each name, in a moving window of two seconds (longer for rates below 1 in 2 s)."""

    def __init__(self, rate: float, what: str) -> None:
        # Imported here: it takes 0.1 s and most servers have no rate limit.
        from limits import RateLimitItemPerSecond
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        self._rate, self._what = rate, what
        self._limiter = MovingWindowRateLimiter(MemoryStorage())
        requests = math.floor(rate * BURST_SECONDS)
        seconds = BURST_SECONDS if requests else math.ceil(1 / rate)
        self._window = RateLimitItemPerSecond(max(1, requests), seconds)

    def check(self, name: str) -> None:
        """Raises RateLimited if the next request would be over the rate."""
        if not self._limiter.test(self._window, name):
            wait = self._limiter.get_window_stats(self._window, name).reset_time - time.time()
            message = f"the rate of {self._rate:g} requests a second of {self._what.format(name)} is used up"
            raise RateLimited(message, retry_after=max(0.0, wait))

    def count(self, name: str) -> None:
        self._limiter.hit(self._window, name)


class Concurrency:
    """Most requests of each name at a time; None is no limit."""

    def __init__(self, limit: int | None, what: str) -> None:
        self._limit, self._what = limit, what
        self._running: Counter[str] = Counter()

    def check(self, name: str) -> None:
        """Raises RateLimited if the next request would be over the limit."""
        if self._limit is not None and self._running[name] >= self._limit:
            message = f"{self._what.format(name)} has {self._limit} of {self._limit} requests in flight"
            raise RateLimited(message, retry_after=1.0)

    def enter(self, name: str) -> None:
        self._running[name] += 1

    def leave(self, name: str) -> None:
        self._running[name] -= 1
        if not self._running[name]:
            del self._running[name]


class Admission:
    """All limits of a server. Use it on the event loop's thread only.

    Args:
        key_rate, task_rate: requests per second; None is no limit.
        per_key, per_task: concurrent requests; None is no limit.
    """

    def __init__(
        self,
        key_rate: float | None = None,
        per_key: int | None = None,
        task_rate: float | None = None,
        per_task: int | None = None,
    ) -> None:
        self._key_rate = None if key_rate is None else RateLimit(key_rate, "this key")
        self._task_rate = None if task_rate is None else RateLimit(task_rate, "the task {!r}")
        self._keys = Concurrency(per_key, "this key")
        self._tasks = Concurrency(per_task, "the task {!r}")

    def check(self, tenant: str, task: str | None) -> None:
        """Raises RateLimited, naming the limit, if the next request would be refused. Counts nothing."""
        self._keys.check(tenant)
        if task is not None:
            self._tasks.check(task)
        if self._key_rate is not None:
            self._key_rate.check(tenant)
        if task is not None and self._task_rate is not None:
            self._task_rate.check(task)

    def enter(self, tenant: str, task: str | None) -> None:
        """Count a request that starts. Raises RateLimited as `check` does; nothing is counted then."""
        self.check(tenant, task)
        self._keys.enter(tenant)
        if self._key_rate is not None:
            self._key_rate.count(tenant)
        if task is not None:
            self._tasks.enter(task)
            if self._task_rate is not None:
                self._task_rate.count(task)

    def leave(self, tenant: str, task: str | None) -> None:
        """Count the end of a request that `enter` admitted."""
        self._keys.leave(tenant)
        if task is not None:
            self._tasks.leave(task)

    def idle(self) -> bool:
        """Whether no request is in flight."""
        return not self._keys._running and not self._tasks._running
