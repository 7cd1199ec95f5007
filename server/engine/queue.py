"""`RequestInbox`, which accepts requests from any thread, and `FairQueue`, the scheduler's waiting queue.

The fair queue follows the Virtual Token Counter of Sheng et al. (2024), "Fairness in Serving Large Language Models":
each key has a counter of the service it received, and the key with the lowest counter goes first. In the paper a
returning key starts at the minimum of the waiting counters. With a steady stream of new keys that minimum never rises,
and keys served once would starve. So a key starts at a virtual clock, as in fair queueing (Demers et al., 1989), which
advances by each present key's share of the service. If the minimum of the waiting counters is ahead of the clock, the
clock moves there.
"""

from __future__ import annotations

import heapq
import math
import threading
import time
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from server.engine.request import Request
from server.errors import NoCapacity, NotReady, QueueFull

OUTPUT_COST = 2.0
"""Service counted for a generated token. A computed prompt token counts 1."""

REMEMBERED_KEYS = 1024
"""Number of absent keys whose counters are kept."""

Key = tuple[int, str]
"""(priority, fair key). Lower priority numbers go first."""


@dataclass
class Arrivals:
    """What has arrived since the last step."""

    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    unloaded: list[str] = field(default_factory=list)
    """Digests of adapters to unload."""
    wanted_bytes: int = 0
    """RAM that idle adapter slots should release."""


_NOTHING = Arrivals()


class RequestInbox:
    """Passes requests to the engine's thread, and limits how many wait until they run for the first time. Thread-safe.

    Requests of lower priorities take no room from higher ones. If the queue is full, a request is still accepted if its
    key has fewer waiting requests than another key of its priority. `overfull_key` then names the key whose newest
    request must be rejected: of the lowest priority, the one with most requests.

    Args:
        max_requests: Most waiting requests (--max-queue).
        max_tokens: Most prompt tokens of waiting requests (--max-queue-tokens).
        wake: Wakes the engine's thread.
    """

    def __init__(self, max_requests: int, max_tokens: int, wake: Callable[[], None]) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._wake = wake
        self._lock = threading.Lock()
        self._arrivals = Arrivals()
        self._requests: set[Request] = set()
        self._count_of: Counter[Key] = Counter()
        self._tokens = 0
        self._tokens_of: Counter[int] = Counter()
        """Prompt tokens by priority."""
        self._closed: str | None = "the engine has not been started"
        self._left_at: deque[float] = deque(maxlen=32)

    def open(self) -> None:
        with self._lock:
            self._closed = None

    def close(self, reason: str) -> None:
        """Make `put` raise NotReady with this reason."""
        with self._lock:
            self._closed = reason

    def check(self, requests: int, tokens: int) -> None:
        """Raise NoCapacity if the requests of one call, with `tokens` prompt tokens, can never wait together."""
        if requests > self._max_requests:
            raise NoCapacity(
                f"the call makes {requests} requests, and the queue holds {self._max_requests} (--max-queue); "
                "send fewer at a time"
            )
        if requests > 1 and tokens > self._max_tokens:
            raise NoCapacity(
                f"the call makes {requests} requests with {tokens} prompt tokens, and the queue holds "
                f"{self._max_tokens} tokens (--max-queue-tokens); send fewer at a time"
            )

    def put(self, request: Request) -> None:
        """Add a request. Raises NotReady if closed, QueueFull if too many are waiting."""
        with self._lock:
            if self._closed is not None:
                raise NotReady(self._closed, retry_after=1.0)
            if not self._accepts(request):
                raise self.full()
            self._requests.add(request)
            self._count_of[_key(request)] += 1
            self._tokens += len(request.prompt)
            self._tokens_of[request.priority] += len(request.prompt)
            self._arrivals.requests.append(request)
        self._wake()

    def cancel(self, request_id: str) -> None:
        """Cancel a request. Does nothing if it is unknown or has ended."""
        with self._lock:
            self._arrivals.cancelled.append(request_id)
        self._wake()

    def unload(self, digest: str) -> None:
        """Unload an adapter as soon as no request uses it."""
        with self._lock:
            self._arrivals.unloaded.append(digest)
        self._wake()

    def release_idle(self, nbytes: int) -> None:
        """Empty unused adapter slots until `nbytes` are released."""
        with self._lock:
            self._arrivals.wanted_bytes = max(self._arrivals.wanted_bytes, nbytes)
        self._wake()

    def take(self) -> Arrivals | None:
        """Return what has arrived since the last call, or None."""
        if self._arrivals == _NOTHING:
            return None
        with self._lock:
            arrivals, self._arrivals = self._arrivals, Arrivals()
        return arrivals

    def remove(self, request: Request) -> None:
        """A request no longer waits. Does nothing if it was removed before."""
        with self._lock:
            if request not in self._requests:
                return
            self._requests.remove(request)
            self._tokens -= len(request.prompt)
            self._tokens_of[request.priority] -= len(request.prompt)
            key = _key(request)
            self._count_of[key] -= 1
            if not self._count_of[key]:
                del self._count_of[key]
            self._left_at.append(time.monotonic())
            if not self._requests:  # an idle time does not predict a waiting time
                self._left_at.clear()

    def overfull_key(self) -> Key | None:
        """Return the key that must lose a request because too many wait, or None."""
        count = len(self._requests)
        if count <= self._max_requests and (self._tokens <= self._max_tokens or count <= 1):
            return None
        with self._lock:
            return max(self._count_of, key=lambda key: (key[0], self._count_of[key]))

    @property
    def waiting(self) -> int:
        """Number of requests that have not run yet."""
        return len(self._requests)

    def _accepts(self, request: Request) -> bool:
        priority, count, tokens = request.priority, len(self._requests), self._tokens
        if self._fits(request, count, tokens):
            return True
        if count >= 2 * self._max_requests:  # the engine rejects the surplus in its next step
            return False
        if any(other > priority for other, _ in self._count_of):
            count = sum(n for (other, _), n in self._count_of.items() if other <= priority)
            tokens = sum(n for other, n in self._tokens_of.items() if other <= priority)
            if self._fits(request, count, tokens):
                return True
        most = max((n for (other, _), n in self._count_of.items() if other == priority), default=0)
        return self._count_of[_key(request)] + 1 < most

    def _fits(self, request: Request, count: int, tokens: int) -> bool:
        """Whether a request fits beside `count` others with `tokens` prompt tokens. Alone it always fits."""
        return count < self._max_requests and (tokens + len(request.prompt) <= self._max_tokens or not count)

    def full(self) -> QueueFull:
        """Return the error for a rejected request."""
        return QueueFull(
            f"the queue is full: {len(self._requests)} requests with {self._tokens} prompt tokens wait, and the limits "
            f"are {self._max_requests} and {self._max_tokens} (--max-queue, --max-queue-tokens); try again later",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> float:
        """Seconds (1 to 30) until a quarter of the queue has left, at the rate of the last departures."""
        if len(self._left_at) < 2:
            return 1.0
        each = (time.monotonic() - self._left_at[0]) / len(self._left_at)
        return float(min(30, max(1, math.ceil(each * len(self._requests) / 4))))


class FairQueue:
    """Waiting requests, ordered by priority, then by the service of their keys. Not thread-safe."""

    def __init__(self) -> None:
        self._lanes: dict[Key, OrderedDict[Request, None]] = {}
        """Waiting requests by key: preempted ones, then new ones in order of arrival."""
        self._num_lanes: Counter[int] = Counter()
        """Number of lanes by priority."""
        self._running: Counter[Key] = Counter()
        self._present: defaultdict[int, set[Key]] = defaultdict(set)
        """Keys that wait or run, by priority."""
        self._service: dict[Key, float] = {}
        self._clock: defaultdict[int, float] = defaultdict(float)
        """Virtual clock by priority: the lowest counter that a new key starts with."""

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[Request]:
        for lane in list(self._lanes.values()):
            yield from list(lane)

    def __contains__(self, request: object) -> bool:
        if not isinstance(request, Request):
            return False
        return request in self._lanes.get(_key(request), ())

    @property
    def best_priority(self) -> int:
        """The lowest priority number in the queue, which must not be empty."""
        return min(self._num_lanes)

    def add(self, request: Request) -> None:
        """Add a new request behind those of its key."""
        self._lane(_key(request))[request] = None

    def requeue(self, request: Request) -> None:
        """Add a preempted request before those of its key."""
        lane = self._lane(_key(request))
        lane[request] = None
        lane.move_to_end(request, last=False)
        self.leave(request)

    def remove(self, request: Request) -> None:
        """Remove a request. Raises KeyError if it does not wait."""
        key = _key(request)
        lane = self._lanes[key]
        del lane[request]
        if not lane:
            priority = key[0]
            del self._lanes[key]
            self._num_lanes[priority] -= 1
            if not self._num_lanes[priority]:
                del self._num_lanes[priority]
                self._clock[priority] = max(self._clock[priority], self._service[key])
            self._update_present(key)

    def admit(self, request: Request) -> None:
        """Remove a request that runs from now on, until `requeue` or `leave`. Raises KeyError if it does not wait."""
        self.remove(request)
        key = _key(request)
        self._running[key] += 1
        self._update_present(key)

    def leave(self, request: Request) -> None:
        """A running request no longer runs."""
        key = _key(request)
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
            self._update_present(key)

    def newest(self, key: Key) -> Request | None:
        """Return the newest request of a key that has not run yet."""
        return next((request for request in reversed(self._lanes.get(key, {})) if math.isnan(request.admitted)), None)

    def charge(self, request: Request, tokens: float) -> None:
        """Count service for the request's key."""
        key = _key(request)
        priority = key[0]
        self._service[key] = self._service.get(key, self._clock[priority]) + tokens
        self._clock[priority] += tokens / max(1, len(self._present[priority]))

    def in_order(self) -> Iterator[Request]:
        """Yield the waiting requests, fairest first. The caller may admit and charge each as it is yielded."""
        service, lanes = self._service, dict(self._lanes)
        # Usually one or two of hundreds of keys are used, so only the order of the keys is computed in advance.
        heads = [(key[0], service[key], next(iter(lane)).submitted, key) for key, lane in lanes.items()]
        heapq.heapify(heads)
        iterators: dict[Key, Iterator[Request]] = {}
        following: dict[Key, Request] = {}
        while heads:
            key = heads[0][-1]
            if key not in iterators:
                iterators[key] = iter(list(lanes[key]))
                following[key] = next(iterators[key])
            yield following[key]
            request = next(iterators[key], None)
            if request is None:
                heapq.heappop(heads)
            else:
                following[key] = request
                heapq.heapreplace(heads, (key[0], service[key], request.submitted, key))

    def _lane(self, key: Key) -> OrderedDict[Request, None]:
        lane = self._lanes.get(key)
        if lane is None:
            priority = key[0]
            waiting = (self._service[other] for other in self._lanes if other[0] == priority)
            self._clock[priority] = max(self._clock[priority], min(waiting, default=0.0))
            self._service[key] = max(self._service.get(key, 0.0), self._clock[priority])
            lane = self._lanes[key] = OrderedDict()
            self._num_lanes[priority] += 1
            self._update_present(key)
            self._forget_absent()
        return lane

    def _update_present(self, key: Key) -> None:
        present = self._present[key[0]]
        if key in self._lanes or key in self._running:
            present.add(key)
        else:
            present.discard(key)

    def _forget_absent(self) -> None:
        """Limit the number of counters. Absent keys that are behind the clock lose nothing."""
        if len(self._service) <= 2 * REMEMBERED_KEYS:
            return
        absent = [key for key in self._service if key not in self._present[key[0]]]
        absent.sort(key=lambda key: self._service[key] - self._clock[key[0]])
        for key in absent[: max(0, len(self._service) - REMEMBERED_KEYS)]:
            del self._service[key]


def _key(request: Request) -> Key:
    return request.priority, request.fair_key
