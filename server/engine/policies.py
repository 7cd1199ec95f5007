"""Scheduling policies: one class per special rule of the scheduler, with the reason for the rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from server.engine.kv_cache import BlockHash
from server.engine.queue import FairQueue
from server.engine.request import Request


class PrefillOrder:
    """Order of running prompts within a step.

    Short prompts, which fit into one step, run first, so that they do not wait for long ones. The oldest long prompt is
    guaranteed half of the prefill tokens, so that it does not starve. Prompts with at most half of its remaining tokens
    run before its second half, because they finish soon.

    Args:
        prompts: Running requests whose prompts are not computed yet, in order of admission.
        room: Tokens that a prompt at a given depth may have in this step.
    """

    def __init__(self, prompts: Sequence[Request], room: Callable[[int], int]) -> None:
        self.short: list[Request] = []
        self.long: list[Request] = []
        for request in prompts:
            is_long = request.required - request.computed > room(request.computed)
            (self.long if is_long else self.short).append(request)

    @property
    def oldest(self) -> Request | None:
        """The long prompt that was admitted first."""
        return self.long[0] if self.long else None

    def split_long(self) -> tuple[list[Request], list[Request]]:
        """Return the long prompts that run before the oldest's second half, shortest first, and all others."""
        limit = self.long[0].required - self.long[0].computed if self.long else 0
        before = [r for r in self.long if 2 * (r.required - r.computed) <= limit]
        after = [r for r in self.long if 2 * (r.required - r.computed) > limit]
        return sorted(before, key=lambda r: r.required - r.computed), after


class Aging:
    """Admits requests that have waited too long for KV blocks or adapter slots before all others.

    Small requests could otherwise pass a large one for ever. While one such request waits, no other of its priority is
    admitted.

    Args:
        limit: Seconds of waiting for room.
    """

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._blocked: dict[Request, float] = {}
        """Requests whose weights were loaded but that found no room, and since when. In order of age."""

    def __len__(self) -> int:
        return len(self._blocked)

    def block(self, request: Request, now: float) -> None:
        """Record that a request found no room."""
        self._blocked.setdefault(request, now)

    def remove(self, request: Request) -> None:
        self._blocked.pop(request, None)

    def is_blocked(self, priority: int) -> bool:
        """Whether a request of this priority waits for room."""
        return any(request.priority == priority for request in self._blocked)

    def starving(self, waiting: FairQueue, is_loaded: Callable[[Request], bool], now: float) -> Request | None:
        """Return the first request in queue order that has waited too long and whose adapters are loaded."""
        if now - next(iter(self._blocked.values()), now) <= self.limit:
            return None
        for request in waiting.in_order():
            if request.priority != waiting.best_priority:
                return None
            if now - self._blocked.get(request, now) > self.limit and is_loaded(request):
                return request
        return None


class Preemption:
    """Chooses the request to preempt: the last admitted of the lowest priority.

    It has the least computed work to lose, and the requests before it keep making progress.
    """

    @staticmethod
    def victim(running: Sequence[Request]) -> Request:
        return max(reversed(running), key=lambda r: r.priority)

    @classmethod
    def for_priority(
        cls, running: Sequence[Request], priority: int, *, lacks_room: bool, lacks_ram: bool
    ) -> Request | None:
        """Return the request that makes room for a waiting one of a higher priority, or None.

        If only RAM is lacking, preempting a request without adapters would free none.
        """
        lower = [r for r in running if r.priority > priority]
        if not lacks_room:
            lower = [r for r in lower if lacks_ram and r.mix]
        return cls.victim(lower) if lower else None


class RamPressure:
    """Keeps adapters in RAM from being used again while a load of the highest priority has lacked RAM for too long.

    Requests on resident adapters would otherwise hold the RAM for ever. Requests that need no RAM, or whose own load is
    complete, are still admitted.

    Args:
        limit: Seconds that a load may lack RAM.
    """

    REPORT_SECONDS = 0.2
    """A report expires after this time. The adapter registry repeats it more often while RAM is lacking."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._reported = float("-inf")

    def report(self, now: float) -> None:
        """An adapter load lacks RAM."""
        self._reported = now

    def clear(self) -> None:
        """A load has completed."""
        self._reported = float("-inf")

    def is_urgent(self, now: float, longest_wait: Callable[[], float]) -> bool:
        """Whether a load has waited longer than the limit. `longest_wait` is called only if RAM is lacking."""
        return now - self._reported < self.REPORT_SECONDS and longest_wait() > self._limit


class PendingPrefixes:
    """Full blocks that running requests will compute soon.

    A request with the same prefix waits for these blocks instead of computing them a second time.
    """

    def __init__(self) -> None:
        self._owner: dict[BlockHash, Request] = {}

    def __contains__(self, key: BlockHash) -> bool:
        return key in self._owner

    def __len__(self) -> int:
        return len(self._owner)

    def add(self, request: Request, hashes: Iterable[BlockHash]) -> None:
        """A request was admitted and will compute these blocks."""
        for key in hashes:
            self._owner.setdefault(key, request)

    def remove(self, request: Request, hashes: Iterable[BlockHash]) -> bool:
        """The blocks are computed, or will never be. Returns whether another request may have waited for one."""
        removed = False
        for key in hashes if self._owner else ():
            if self._owner.get(key) is request:
                del self._owner[key]
                removed = True
        return removed


class CpuSharing:
    """Leaves the CPU idle after each step while a training job runs on it.

    A server with few requests loses little: a step of few sequences takes nearly as long as one of some more, and
    requests gather in fewer, larger steps. So the idle time is longest up to a quarter of a full batch and zero from a
    half. Steps with an idle time have few prefill tokens, which keeps both short.
    """

    MAX_IDLE = 1.25
    """Longest idle time in multiples of the step's time. With less, a job beside half a load runs below 0.3 of its
    speed. With more, answers become slower still."""

    PREFILL_TOKENS = 12
    """Prefill tokens of a step that is followed by idle time."""

    def __init__(self, max_batch: int) -> None:
        self.enabled = False
        """Set from any thread."""
        self._max_batch = max_batch
        self._planned = 0.0

    def idle(self, num_active: int) -> float:
        """Return the idle time for a number of running and ready requests, in multiples of the step's time."""
        return self.MAX_IDLE * min(1.0, max(0.0, 2.0 - 4.0 * num_active / self._max_batch))

    def begin_step(self, num_active: Callable[[], int]) -> bool:
        """Plan the idle time after a step. Returns whether there is any."""
        self._planned = self.idle(num_active()) if self.enabled else 0.0
        return self._planned > 0.0

    def end_step(self, num_active: Callable[[], int]) -> float:
        """Return the idle time after a step: at most what was planned, because the step may have been a long one."""
        return min(self._planned, self.idle(num_active())) if self.enabled and self._planned else 0.0
