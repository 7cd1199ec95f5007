"""The loads that waiting requests have asked for: one a mix, however many wait for it.

Owns futures of weights and who waits for them. Does not know where weights come from or where they go.
"""

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
    """Whether it was known to need no reading."""
    waiters: dict[Request, float] = field(default_factory=dict)
    """Since when each request waits for it."""
    settled: bool = False


class AdapterLoader:
    """At most `limit` mixes that have to be read are asked for at a time, and as many that are in RAM; beside what is
    begun for a request that the engine's thread has not heard of yet.

    So one that is in RAM never waits for a place behind those that are read. `wake` is called, on any thread, when a
    load is done. The weights of a load that is done are held until the last of its waiters has left.

    The engine's thread alone calls it, but for `begin` and `drop`.
    """

    def __init__(self, fetch: Fetch, limit: int, wake: Callable[[], None]) -> None:
        self._fetch = fetch
        self._limit = limit
        self._wake = wake
        self._loads: dict[Mix, _Load] = {}
        self._places: Counter[bool] = Counter()
        """Those taken, by whether the load is warm."""
        self._came: deque[Mix] = deque()
        """Whose load is done, as it is told on any thread."""
        self._in_ram: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()
        """A tensor of each adapter that came once. Views share it with the copy in RAM, so it lives as long as that."""

    def __len__(self) -> int:
        return len(self._loads)

    def begin(self, request: Request) -> None:
        """From any thread: what a new request has to wait for is on its way before the step that runs now is over.

        Only where nothing else is read: what comes first, and for whom there is RAM, is otherwise for the engine's
        thread to say. Either `add` or `drop` has to follow, once.
        """
        if request.mix and not self._places[False] and not self._is_warm(request.mix):
            request.begun = self._fetched(request.mix)

    def drop(self, request: Request) -> None:
        """From any thread: the request has not come to be, or waits for nothing."""
        future, request.begun = request.begun, None
        if future is not None:
            future.cancel()

    def add(self, request: Request, now: float) -> None:
        """What was begun for a new request is the load of its mix, unless there is one or no place for it."""
        future = request.begun
        if future is None or request.mix in self._loads or self._places[False] >= self._limit:
            return self.drop(request)
        request.begun = None
        self._take(request.mix, future, warm=False).waiters[request] = now
        if not future.done():
            request.state = State.LOADING

    def ask(self, request: Request, now: float) -> Sequence[LoraWeights] | None:
        """The weights of the request's mix, in its order; None while they are on their way or no load may start."""
        load = self._loads.get(request.mix)
        if load is None:
            warm = self._is_warm(request.mix)
            if self._places[warm] >= self._limit and not self._drop_less_urgent(request.priority, warm):
                return None
            load = self._take(request.mix, self._fetched(request.mix), warm)
        if request not in load.waiters:
            load.waiters[request] = now
        if load.future.done():
            return self._result(load)
        request.state = State.LOADING
        return None

    def settle(self, now: float) -> tuple[bool, list[tuple[Request, Exception]]]:
        """Take note of what has come: whether anything has, and the requests whose load failed, with the reason."""
        came = False
        failed: list[tuple[Request, Exception]] = []
        while self._came:
            mix = self._came.popleft()
            load = self._loads.get(mix)
            if load is None or load.settled or not load.future.done():  # it was given up, and perhaps asked for again
                continue
            came = load.settled = True
            error = _error(load.future)
            for request, since in list(load.waiters.items()):
                if request.state is State.LOADING:
                    if math.isnan(request.admitted):  # what it waits for after that is no part of its queue
                        request.load_seconds += now - since
                    request.state = State.QUEUED
                if error is not None:
                    failed.append((request, error))
            if error is not None:
                self._remove(mix)
            else:
                self._remember(load.future.result())
        return came, failed

    def came_for(self, request: Request) -> bool:
        """Whether the request holds weights that have come for it."""
        load = self._loads.get(request.mix)
        return load is not None and load.settled and request in load.waiters

    def holds_up(self, request: Request) -> bool:
        """Whether the load of the request's mix has not come yet, or could not begin for want of a place."""
        load = self._loads.get(request.mix)
        if load is not None:
            return not load.future.done()
        return self._places[self._is_warm(request.mix)] >= self._limit

    def waited(self, priority: int, now: float) -> float:
        """For how long a request of that priority has waited for a load that has not come, at most; 0 if none does."""
        return now - min(self._lacking(priority), default=now)

    def leave(self, request: Request) -> bool:
        """The request waits for its mix no more: it runs, or it has ended. Answers whether that leaves a place where
        there was none."""
        load = self._loads.get(request.mix)
        if load is None or load.waiters.pop(request, None) is None or load.waiters:
            return False
        full = self._places[load.warm] >= self._limit
        self._remove(request.mix)
        return full

    def give_way(self, priority: int) -> None:
        """Give up the loads that only less urgent requests wait for, if one of that priority lacks its own.

        They will ask again. What has come for them holds RAM, and what has not stands before the other in the line for
        it, while they wait for the more urgent one to run first.
        """
        if next(self._lacking(priority), None) is not None:
            for mix in [mix for mix, load in self._loads.items() if _is_less_urgent(load, priority)]:
                self._give_up(mix)

    def misfits(self) -> list[tuple[Request, Exception]]:
        """Who waits for loads that have not come, each with the reason, and never can any more."""
        found: list[tuple[Request, Exception]] = []
        for load in self._loads.values():
            if not load.settled:
                try:
                    next(iter(load.waiters)).check_fits()
                except NoRoom as error:
                    found += [(request, error) for request in load.waiters]
        return found

    def _lacking(self, priority: int) -> Iterator[float]:
        """Since when each request of a priority waits for a load that has not come."""
        for load in self._loads.values():
            if not load.settled:
                for request, since in load.waiters.items():
                    if request.priority == priority:
                        yield since

    def _drop_less_urgent(self, priority: int, warm: bool) -> bool:
        """Give up a load that only less urgent requests wait for, for its place. False if there is none.

        Without this they would hold every place while they wait for the more urgent one to run first.
        """
        for mix, load in self._loads.items():
            if load.warm == warm and _is_less_urgent(load, priority):
                self._give_up(mix)
                return True
        return False

    def _give_up(self, mix: Mix) -> None:
        """Its waiters will ask again."""
        for request in self._loads[mix].waiters:
            request.state = State.QUEUED
        self._remove(mix)

    def _remove(self, mix: Mix) -> None:
        load = self._loads.pop(mix)
        self._places[load.warm] -= 1
        load.future.cancel()

    def _is_warm(self, mix: Mix) -> bool:
        return all(digest in self._in_ram for digest in mix.digests)

    def _fetched(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        try:
            return self._fetch(mix)
        except Exception as e:  # whatever is wrong with one mix ends the requests for it, not the step
            future: Future[tuple[LoraWeights, ...]] = Future()
            future.set_exception(e)
            return future

    def _take(self, mix: Mix, future: Future[tuple[LoraWeights, ...]], warm: bool) -> _Load:
        """A load of its own for a mix that has none."""
        self._places[warm] += 1
        load = self._loads[mix] = _Load(future, warm)
        future.add_done_callback(lambda _: self._done(mix))
        return load

    def _done(self, mix: Mix) -> None:
        self._came.append(mix)
        self._wake()

    def _remember(self, weights: Sequence[LoraWeights]) -> None:
        for each in weights:
            module = next(iter(each.modules.values()), None)
            if module is not None:
                self._in_ram[each.digest] = module.A

    def _result(self, load: _Load) -> Sequence[LoraWeights] | None:
        if _error(load.future) is not None:  # it is dealt with by the next `settle`
            return None
        weights = load.future.result()
        if not load.settled:
            self._remember(weights)
        return weights


def _is_less_urgent(load: _Load, priority: int) -> bool:
    return all(request.priority > priority for request in load.waiters)


def _error(future: Future[tuple[LoraWeights, ...]]) -> Exception | None:
    if future.cancelled():
        return EngineFailed("the load of the adapters was given up")
    error = future.exception()
    if error is None or isinstance(error, Exception):
        return error
    return EngineFailed(f"the load of the adapters failed: {error}")
