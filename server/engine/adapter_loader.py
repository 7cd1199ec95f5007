"""`AdapterLoader`: the adapter loads that waiting requests need, one per mix."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

import torch

from adapters.errors import NoRoom
from adapters.weights import LoraWeights, Mix
from server.engine.request import Request, State
from server.errors import EngineFailed

Fetch = Callable[[Mix], "Future[tuple[LoraWeights, ...]]"]


@dataclass(eq=False)
class _Load:
    future: Future[tuple[LoraWeights, ...]]
    warm: bool
    """Whether all adapters were in RAM when the load started."""
    waiters: dict[Request, float] = field(default_factory=dict)
    """Requests that wait for the load, and since when."""
    done: bool = False
    """Whether `poll` has processed the result."""


class AdapterLoader:
    """Loads the mixes of waiting requests. The weights are held until the last waiter is released.

    Loads of adapters that are in RAM (warm) and loads from disk (cold) are limited separately, so that warm ones never
    wait for cold ones. Only the engine's thread uses it, except for `prefetch` and `cancel_prefetch`.

    Args:
        fetch: Returns a future of a mix's weights, in the mix's order. Must not block.
        limit: Most warm, and most cold, loads at a time.
        wake: Called on any thread when a load is done.
    """

    def __init__(self, fetch: Fetch, limit: int, wake: Callable[[], None]) -> None:
        self._fetch = fetch
        self._limit = limit
        self._wake = wake
        self._loads: dict[Mix, _Load] = {}
        self._active: Counter[bool] = Counter()
        """Number of warm (True) and cold (False) loads."""
        self._finished: deque[Mix] = deque()
        """Mixes whose loads are done, appended on any thread."""
        self._in_ram: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        """One tensor per adapter loaded before. It shares its storage with the copy in RAM and lives as long."""

    def __len__(self) -> int:
        return len(self._loads)

    def prefetch(self, request: Request) -> None:
        """Start a cold load for a new request before the engine's thread sees it. From any thread.

        Does nothing if another cold load is active, because then the engine's thread decides the order.
        """
        if request.mix and not self._active[False] and not self._is_warm(request.mix):
            request.prefetch = self._start(request.mix)

    def cancel_prefetch(self, request: Request) -> None:
        """Cancel the load started by `prefetch`, if any. From any thread."""
        future, request.prefetch = request.prefetch, None
        if future is not None:
            future.cancel()

    def add(self, request: Request, now: float) -> None:
        """Take over the load started by `prefetch`, unless the mix has one already or the limit is reached."""
        future = request.prefetch
        if future is None or request.mix in self._loads or self._active[False] >= self._limit:
            return self.cancel_prefetch(request)
        request.prefetch = None
        self._add_load(request.mix, future, warm=False).waiters[request] = now
        if not future.done():
            request.state = State.LOADING

    def get(self, request: Request, now: float) -> Sequence[LoraWeights] | None:
        """Return the weights of the request's mix, in its order, or None while they load. May start the load."""
        load = self._loads.get(request.mix)
        if load is None:
            warm = self._is_warm(request.mix)
            if self._active[warm] >= self._limit and not self._cancel_one(request.priority, warm):
                return None
            load = self._add_load(request.mix, self._start(request.mix), warm)
        load.waiters.setdefault(request, now)
        if not load.future.done():
            request.state = State.LOADING
            return None
        if _error(load.future) is not None:  # the next `poll` reports it
            return None
        weights = load.future.result()
        if not load.done:
            self._remember(weights)
        return weights

    def poll(self, now: float) -> tuple[bool, list[tuple[Request, Exception]]]:
        """Process finished loads. Returns whether there were any, and the requests whose load failed."""
        any_done = False
        failed: list[tuple[Request, Exception]] = []
        while self._finished:
            mix = self._finished.popleft()
            load = self._loads.get(mix)
            if load is None or load.done or not load.future.done():  # cancelled, and perhaps started again
                continue
            any_done = load.done = True
            error = _error(load.future)
            for request, since in load.waiters.items():
                if request.state is State.LOADING:
                    if math.isnan(request.admitted):
                        request.load_seconds += now - since
                    request.state = State.QUEUED
                if error is not None:
                    failed.append((request, error))
            if error is not None:
                self._remove(mix)
            else:
                self._remember(load.future.result())
        return any_done, failed

    def has_weights(self, request: Request) -> bool:
        """Whether the load that the request waits for is done."""
        load = self._loads.get(request.mix)
        return load is not None and load.done and request in load.waiters

    def is_pending(self, request: Request) -> bool:
        """Whether the load of the request's mix is not done, or cannot start because of the limit."""
        load = self._loads.get(request.mix)
        if load is not None:
            return not load.future.done()
        return self._active[self._is_warm(request.mix)] >= self._limit

    def longest_wait(self, priority: int, now: float) -> float:
        """Return the longest time that a request of this priority has waited for an unfinished load, or 0."""
        return now - min(self._waiting_since(priority), default=now)

    def release(self, request: Request) -> bool:
        """The request no longer waits for its load. Returns whether a new load can start because of that."""
        load = self._loads.get(request.mix)
        if load is None or load.waiters.pop(request, None) is None or load.waiters:
            return False
        was_full = self._active[load.warm] >= self._limit
        self._remove(request.mix)
        return was_full

    def cancel_lower_priority(self, priority: int) -> None:
        """If a load of this priority is unfinished, cancel all loads with only lower-priority waiters.

        Finished ones hold RAM that the load needs, and unfinished ones are before it in the line for RAM. Their waiters
        request them again.
        """
        if next(self._waiting_since(priority), None) is not None:
            for mix in [mix for mix, load in self._loads.items() if _is_lower(load, priority)]:
                self._cancel(mix)

    def never_fitting(self) -> list[tuple[Request, Exception]]:
        """Return the waiters of loads that can never complete for lack of RAM, each with the error."""
        found: list[tuple[Request, Exception]] = []
        for load in self._loads.values():
            if not load.done:
                try:
                    next(iter(load.waiters)).check_fits()
                except NoRoom as error:
                    found += [(request, error) for request in load.waiters]
        return found

    def _waiting_since(self, priority: int) -> Iterator[float]:
        for load in self._loads.values():
            if not load.done:
                for request, since in load.waiters.items():
                    if request.priority == priority:
                        yield since

    def _cancel_one(self, priority: int, warm: bool) -> bool:
        """Cancel a load with only lower-priority waiters to make room for another. Returns False if there is none."""
        mix = next((m for m, load in self._loads.items() if load.warm == warm and _is_lower(load, priority)), None)
        if mix is not None:
            self._cancel(mix)
        return mix is not None

    def _cancel(self, mix: Mix) -> None:
        for request in self._loads[mix].waiters:
            request.state = State.QUEUED
        self._remove(mix)

    def _remove(self, mix: Mix) -> None:
        load = self._loads.pop(mix)
        self._active[load.warm] -= 1
        load.future.cancel()

    def _is_warm(self, mix: Mix) -> bool:
        return all(digest in self._in_ram for digest in mix.digests)

    def _start(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        try:
            return self._fetch(mix)
        except Exception as e:  # fails the requests of this mix, not the step
            future: Future[tuple[LoraWeights, ...]] = Future()
            future.set_exception(e)
            return future

    def _add_load(self, mix: Mix, future: Future[tuple[LoraWeights, ...]], warm: bool) -> _Load:
        self._active[warm] += 1
        load = self._loads[mix] = _Load(future, warm)
        future.add_done_callback(lambda _: self._done(mix))
        return load

    def _done(self, mix: Mix) -> None:
        self._finished.append(mix)
        self._wake()

    def _remember(self, weights: Sequence[LoraWeights]) -> None:
        for each in weights:
            module = next(iter(each.modules.values()), None)
            if module is not None:
                self._in_ram[each.digest] = module.A


def _is_lower(load: _Load, priority: int) -> bool:
    return all(request.priority > priority for request in load.waiters)


def _error(future: Future[tuple[LoraWeights, ...]]) -> Exception | None:
    if future.cancelled():
        return EngineFailed("the load of the adapters was cancelled")
    error = future.exception()
    if error is None or isinstance(error, Exception):
        return error
    return EngineFailed(f"the load of the adapters failed: {error}")
