"""Where requests wait: the `RequestInbox` that any thread may put into, and the `FairQueue` that the scheduler
takes from.

Owns order and bounds. Does not know blocks, slots or loads.

The fair queue follows the virtual token counter of Sheng et al. (2024), "Fairness in Serving Large Language Models":
each key has a counter of the service that it got, and the key with the least goes first. Theirs lets a key that has
been away start at the least of those that wait. Where ever new keys come, all of them start there and hold it down, and
whoever has been served once waits for ever; so here it starts at a clock as in fair queueing (Demers et al., 1989),
which goes on by the share that each key that waits or runs has of the service. Who wants less than its share leaves
the rest to others, whose counters get ahead of the clock; so it follows the least of those that wait, and the last one.
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
"""What a generated token counts for a key, a computed prompt token counting 1."""

REMEMBERED_KEYS = 1024

Key = tuple[int, str]
"""(priority, fair key); the lower priority number goes first."""


@dataclass
class Arrivals:
    """What came since the last step."""

    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)
    wanted_bytes: int = 0
    """How many bytes of adapters in idle slots should be let go."""


_NOTHING = Arrivals()


class RequestInbox:
    """The engine's door, for any thread. Bounds what waits, from here until it runs for the first time.

    A request finds a place taken only by those that are not less urgent than it. Where all are, one whose key has fewer
    waiting than another of its priority still gets in. `overfull` then names the key whose newest request has to go:
    of the least urgent, the one with most.
    """

    def __init__(self, max_requests: int, max_tokens: int, wake: Callable[[], None]) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._wake = wake
        self._lock = threading.Lock()
        self._arrivals = Arrivals()
        self._waiting: Counter[Key] = Counter()
        self._inside: set[Request] = set()
        self._tokens = 0
        self._tokens_of: Counter[int] = Counter()
        """By priority."""
        self._closed: str | None = "the engine has not been started"
        self._left_at: deque[float] = deque(maxlen=32)

    def open(self) -> None:
        with self._lock:
            self._closed = None

    def close(self, reason: str) -> None:
        """From now on `put` raises NotReady with this reason."""
        with self._lock:
            self._closed = reason

    def check(self, requests: int, tokens: int) -> None:
        """Raises NoCapacity for so many requests, with so many prompt tokens, that never have place at one time."""
        if requests > self._max_requests:
            raise NoCapacity(
                f"the call makes {requests} requests, and the queue holds {self._max_requests} (--max-queue); "
                "send fewer at a time"
            )
        if requests > 1 and tokens > self._max_tokens:
            raise NoCapacity(
                f"the call makes {requests} requests with {tokens} prompt tokens, and the queue holds "
                f"{self._max_tokens} of these (--max-queue-tokens); send fewer at a time"
            )

    def put(self, request: Request) -> None:
        """Raises NotReady if closed, QueueFull if too much is waiting."""
        with self._lock:
            if self._closed is not None:
                raise NotReady(self._closed, retry_after=1.0)
            self._check_room(request)
            self._inside.add(request)
            self._tokens += len(request.prompt)
            self._tokens_of[request.priority] += len(request.prompt)
            self._waiting[_key(request)] += 1
            self._arrivals.requests.append(request)
        self._wake()

    def cancel(self, request_id: str) -> None:
        """The request with that id shall end; one that is unknown or has ended is no error."""
        with self._lock:
            self._arrivals.cancelled.append(request_id)
        self._wake()

    def unload(self, digest: str) -> None:
        """The adapter shall leave its slot as soon as no request holds it."""
        with self._lock:
            self._arrivals.forgotten.append(digest)
        self._wake()

    def release_idle(self, nbytes: int) -> None:
        """Slots that no request holds shall be emptied until adapters of `nbytes` are let go."""
        with self._lock:
            self._arrivals.wanted_bytes = max(self._arrivals.wanted_bytes, nbytes)
        self._wake()

    def take(self) -> Arrivals | None:
        """What came since the last call, None if nothing."""
        if self._arrivals == _NOTHING:
            return None
        with self._lock:
            arrivals, self._arrivals = self._arrivals, Arrivals()
        return arrivals

    def left(self, request: Request) -> None:
        """A request waits no more; no error if that has been said before."""
        with self._lock:
            if request not in self._inside:
                return
            self._inside.remove(request)
            self._tokens -= len(request.prompt)
            self._tokens_of[request.priority] -= len(request.prompt)
            key = _key(request)
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]
            self._left_at.append(time.monotonic())
            if not self._inside:  # how long nobody waits says nothing of how long anybody will
                self._left_at.clear()

    def overfull(self) -> Key | None:
        """The key that has to give up a place while there are more requests than fit; None while all fit."""
        if len(self._inside) <= self._max_requests and (self._tokens <= self._max_tokens or len(self._inside) <= 1):
            return None
        with self._lock:
            return max(self._waiting, key=lambda key: (key[0], self._waiting[key]))

    @property
    def waiting(self) -> int:
        """Requests that have been put and never ran."""
        return len(self._inside)

    def _check_room(self, request: Request) -> None:
        priority, count, tokens = request.priority, len(self._inside), self._tokens
        if self._fits(request, count, tokens):
            return
        if count < 2 * self._max_requests:  # who has to go does so with the next step
            if any(other > priority for other, _ in self._waiting):
                count = sum(n for (other, _), n in self._waiting.items() if other <= priority)
                tokens = sum(n for other, n in self._tokens_of.items() if other <= priority)
                if self._fits(request, count, tokens):
                    return
            most = max((n for (other, _), n in self._waiting.items() if other == priority), default=0)
            if self._waiting[_key(request)] + 1 < most:
                return
        raise self.full()

    def _fits(self, request: Request, count: int, tokens: int) -> bool:
        """Whether there is room for the request beside `count` others with so many prompt tokens."""
        return count < self._max_requests and (tokens + len(request.prompt) <= self._max_tokens or not count)

    def full(self) -> QueueFull:
        """The error for a request that finds no place."""
        return QueueFull(
            f"{len(self._inside)} requests with {self._tokens} prompt tokens are waiting, and no more may than "
            f"{self._max_requests} with {self._max_tokens} (--max-queue, --max-queue-tokens); come back later",
            retry_after=self._retry_after(),
        )

    def _retry_after(self) -> float:
        """Seconds until a quarter of what waits is likely to have left, at the rate of the last ones; from 1 to 30."""
        if len(self._left_at) < 2:
            return 1.0
        each = (time.monotonic() - self._left_at[0]) / len(self._left_at)
        return float(min(30, max(1, math.ceil(each * len(self._inside) / 4))))


@dataclass(eq=False)
class _Lane:
    """The waiting requests of one key and priority: those that were preempted go before the new ones."""

    resumed: OrderedDict[Request, None] = field(default_factory=OrderedDict)
    fresh: OrderedDict[Request, None] = field(default_factory=OrderedDict)

    def __len__(self) -> int:
        return len(self.resumed) + len(self.fresh)

    def __iter__(self) -> Iterator[Request]:
        yield from list(self.resumed)
        yield from list(self.fresh)


class FairQueue:
    """Waiting requests in the order in which they should be tried. For the engine's thread alone."""

    def __init__(self) -> None:
        self._lanes: dict[Key, _Lane] = {}
        self._lanes_of: Counter[int] = Counter()
        """By priority."""
        self._running: Counter[Key] = Counter()
        self._present: defaultdict[int, set[Key]] = defaultdict(set)
        """By priority: the keys that wait or run."""
        self._service: dict[Key, float] = {}
        self._clock: defaultdict[int, float] = defaultdict(float)
        """By priority: what a key that comes is taken to have had, at least."""

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def __bool__(self) -> bool:
        return bool(self._lanes)

    def __iter__(self) -> Iterator[Request]:
        for lane in list(self._lanes.values()):
            yield from lane

    def __contains__(self, request: object) -> bool:
        if not isinstance(request, Request):
            return False
        lane = self._lanes.get(_key(request))
        return lane is not None and (request in lane.fresh or request in lane.resumed)

    @property
    def priority(self) -> int:
        """The best priority that waits. The queue must not be empty."""
        return min(self._lanes_of)

    def add(self, request: Request) -> None:
        """A new request, behind those of its key."""
        self._lane(_key(request)).fresh[request] = None

    def put_back(self, request: Request) -> None:
        """One that ran and was preempted: before all of its key."""
        lane = self._lane(_key(request))
        lane.resumed[request] = None
        lane.resumed.move_to_end(request, last=False)
        self.leave(request)

    def remove(self, request: Request) -> None:
        """Take a request out, wherever it is. Raises KeyError if it does not wait."""
        key = _key(request)
        lane = self._lanes[key]
        if request in lane.resumed:
            del lane.resumed[request]
        else:
            del lane.fresh[request]
        if not lane:
            priority = key[0]
            del self._lanes[key]
            self._lanes_of[priority] -= 1
            if not self._lanes_of[priority]:
                del self._lanes_of[priority]
                self._clock[priority] = max(self._clock[priority], self._service[key])
            self._note(key)

    def enter(self, request: Request) -> None:
        """Take a request out that runs now, until `put_back` or `leave`. Raises KeyError if it waits nowhere."""
        self.remove(request)
        key = _key(request)
        self._running[key] += 1
        self._note(key)

    def leave(self, request: Request) -> None:
        """One that ran does so no more."""
        key = _key(request)
        self._running[key] -= 1
        if not self._running[key]:
            del self._running[key]
            self._note(key)

    def newest(self, key: Key) -> Request | None:
        """The last one of a key that has not run yet."""
        lane = self._lanes.get(key)
        return next(reversed(lane.fresh), None) if lane is not None else None

    def charge(self, request: Request, tokens: float) -> None:
        """Count service that the request's key got."""
        key = _key(request)
        priority = key[0]
        self._service[key] = self._service.get(key, self._clock[priority]) + tokens
        self._clock[priority] += tokens / max(1, len(self._present[priority]))

    def in_order(self) -> Iterator[Request]:
        """Every waiting request, fairest first. The caller may take out and charge what it is given as it goes."""
        service, lanes = self._service, dict(self._lanes)
        # Mostly one or two are taken of hundreds of keys: what is worked out for all of them is how they rank.
        heads = [
            (key[0], service[key], next(iter(lane.resumed or lane.fresh)).submitted, key) for key, lane in lanes.items()
        ]
        heapq.heapify(heads)
        begun: dict[Key, Iterator[Request]] = {}
        following: dict[Key, Request] = {}
        while heads:
            key = heads[0][-1]
            if key not in begun:
                begun[key] = iter(lanes[key])
                following[key] = next(begun[key])
            yield following[key]
            request = next(begun[key], None)
            if request is None:
                heapq.heappop(heads)
            else:
                following[key] = request
                heapq.heapreplace(heads, (key[0], service[key], request.submitted, key))

    def _lane(self, key: Key) -> _Lane:
        lane = self._lanes.get(key)
        if lane is None:
            priority = key[0]
            waiting = (self._service[other] for other in self._lanes if other[0] == priority)
            self._clock[priority] = max(self._clock[priority], min(waiting, default=0.0))
            self._service[key] = max(self._service.get(key, 0.0), self._clock[priority])
            lane = self._lanes[key] = _Lane()
            self._lanes_of[priority] += 1
            self._note(key)
            self._forget_idle()
        return lane

    def _note(self, key: Key) -> None:
        """A key may have come or gone."""
        present = self._present[key[0]]
        if key in self._lanes or key in self._running:
            present.add(key)
        else:
            present.discard(key)

    def _forget_idle(self) -> None:
        """Bound what is remembered of keys that neither wait nor run: those behind the clock earn nothing by it."""
        if len(self._service) <= 2 * REMEMBERED_KEYS:
            return
        idle = [key for key in self._service if key not in self._present[key[0]]]
        idle.sort(key=lambda key: self._service[key] - self._clock[key[0]])
        for key in idle[: max(0, len(self._service) - REMEMBERED_KEYS)]:
            del self._service[key]


def _key(request: Request) -> Key:
    return request.priority, request.fair_key
