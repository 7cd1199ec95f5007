"""The loads that waiting requests have asked for: one a mix, however many wait for it.

Owns futures of weights and who waits for them. Does not know where weights come from or where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from adapters.weights import LoraWeights, Mix
from server.engine.request import Request, State
from server.errors import EngineFailed

Fetch = Callable[[Mix], "Future[tuple[LoraWeights, ...]]"]


@dataclass(eq=False)
class _Load:
    future: Future[tuple[LoraWeights, ...]]
    waiters: dict[Request, float] = field(default_factory=dict)
    """Since when each request waits for it."""
    settled: bool = False


class Loads:
    """At most `limit` mixes are asked for at a time. `wake` is called, on any thread, when one of them is done.

    The weights of a load that is done are held until the last of its waiters has left.
    """

    def __init__(self, fetch: Fetch, limit: int, wake: Callable[[], None]) -> None:
        self._fetch = fetch
        self._limit = limit
        self._wake = wake
        self._loads: dict[Mix, _Load] = {}

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def pending(self) -> int:
        """How many have not come yet."""
        return sum(not load.settled for load in self._loads.values())

    def ask(self, request: Request, now: float) -> Sequence[LoraWeights] | None:
        """The weights of the request's mix, in its order; None while they are on their way or no load may start."""
        load = self._loads.get(request.mix)
        if load is None:
            if len(self._loads) >= self._limit and not self._drop_less_urgent(request.priority):
                return None
            load = self._loads[request.mix] = _Load(self._start(request.mix))
        if request not in load.waiters:
            load.waiters[request] = now
        if load.settled or load.future.done():
            return self._result(load)
        request.state = State.LOADING
        return None

    def settle(self, now: float) -> tuple[bool, list[tuple[Request, Exception]]]:
        """Take note of what has come: whether anything has, and the requests whose load failed, with the reason."""
        done = [(mix, load) for mix, load in self._loads.items() if not load.settled and load.future.done()]
        failed: list[tuple[Request, Exception]] = []
        for mix, load in done:
            load.settled = True
            error = _error(load.future)
            for request, since in list(load.waiters.items()):
                request.load_seconds += now - since
                request.state = State.QUEUED
                if error is not None:
                    failed.append((request, error))
            if error is not None:
                del self._loads[mix]
        return bool(done), failed

    def came_for(self, request: Request) -> bool:
        """Whether the request holds weights that have come for it."""
        load = self._loads.get(request.mix)
        return load is not None and load.settled and request in load.waiters

    def waited(self, priority: int, now: float) -> float:
        """For how long a request of that priority has waited for a load that has not come, at most; 0 if none does."""
        since = [
            since
            for load in self._loads.values()
            if not load.settled
            for request, since in load.waiters.items()
            if request.priority == priority
        ]
        return now - min(since, default=now)

    def leave(self, request: Request) -> None:
        """The request waits for its mix no more: it runs, or it has ended."""
        load = self._loads.get(request.mix)
        if load is not None and load.waiters.pop(request, None) is not None and not load.waiters:
            del self._loads[request.mix]
            load.future.cancel()

    def _drop_less_urgent(self, priority: int) -> bool:
        """Give up a load that only less urgent requests wait for; they will ask again. False if there is none.

        Without this they would hold every place while they wait for the more urgent one to run first.
        """
        for mix, load in self._loads.items():
            if all(request.priority > priority for request in load.waiters):
                for request in load.waiters:
                    request.state = State.QUEUED
                del self._loads[mix]
                load.future.cancel()
                return True
        return False

    def _start(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        try:
            future = self._fetch(mix)
        except Exception as e:  # whatever is wrong with one mix ends the requests for it, not the step
            future = Future()
            future.set_exception(e)
        future.add_done_callback(lambda _: self._wake())
        return future

    def _result(self, load: _Load) -> Sequence[LoraWeights] | None:
        # a failed one is dealt with by the next `settle`
        return load.future.result() if _error(load.future) is None else None


def _error(future: Future[tuple[LoraWeights, ...]]) -> Exception | None:
    if future.cancelled():
        return EngineFailed("the load of the adapters was given up")
    error = future.exception()
    if error is None or isinstance(error, Exception):
        return error
    return EngineFailed(f"the load of the adapters failed: {error}")
