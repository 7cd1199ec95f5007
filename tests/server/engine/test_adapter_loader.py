"""The adapter loader: one load per mix, limits, priorities, and prefetching."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import NoRoom
from server.engine.adapter_loader import AdapterLoader
from server.engine.request import Request, Sampling, State
from server.errors import EngineFailed
from tests.server.engine.conftest import Panic


class Fixture:
    """An `AdapterLoader` whose loads end when the test says so."""

    def __init__(self, tools: Any, limit: int) -> None:
        self.tools = tools
        self.wakes = 0
        self.fetch = tools.Fetcher(ready=set())
        self.loader = AdapterLoader(self.fetch, limit, self.wake)

    def wake(self) -> None:
        self.wakes += 1

    def request(self, *names: str, priority: int = 0) -> Request:
        mix = self.tools.mix_of(*names)
        return Request("r", (1,), Sampling(), lambda delivery: None, mix=mix, priority=priority)

    def get(self, *requests: Request, now: float = 1.0) -> list[State]:
        """Ask for the weights of each request, which are not loaded yet. Returns the states."""
        for request in requests:
            assert self.loader.get(request, now) is None
        return [request.state for request in requests]

    def make_warm(self, *names: str) -> None:
        """Load an adapter once, so that it is known to be in RAM."""
        for name in names:
            request = self.request(name)
            self.get(request)
            self.fetch.finish()
            assert self.loader.poll(1.0) == (True, []) and self.loader.get(request, 1.0) is not None
            self.loader.release(request)


@pytest.fixture
def make(tools: Any) -> Any:
    return lambda limit=2: Fixture(tools, limit)


QUEUED, LOADING = State.QUEUED, State.LOADING


def test_one_load_serves_all_requests_of_a_mix_until_the_last_is_released(make: Any) -> None:
    f = make()
    first, second = f.request("a1"), f.request("a1")
    f.get(first, now=1.0)
    f.get(second, now=3.0)
    assert len(f.fetch.asked) == 1 and first.state is second.state is LOADING
    f.fetch.finish()
    assert f.wakes == 1 and f.loader.poll(4.0) == (True, [])
    assert (first.load_seconds, second.load_seconds) == (3.0, 1.0)
    assert first.state is second.state is QUEUED
    f.loader.release(first)
    assert f.loader.has_weights(second) and not f.loader.has_weights(first)
    f.loader.release(second)
    assert len(f.loader) == 0


def test_load_seconds_add_up_until_the_first_admission(make: Any) -> None:
    f = make()
    request = f.request("a1")
    for since, done in ((1.0, 3.0), (5.0, 6.0), (7.0, 9.0)):
        if since == 7.0:
            request.admitted = 6.5
        f.get(request, now=since)
        assert not f.loader.has_weights(request)
        f.fetch.finish()
        assert f.loader.poll(done) == (True, []) and request.state is QUEUED
        f.loader.release(request)
    assert request.load_seconds == 3.0


def test_a_prefetched_load_is_shared_by_all_requests_of_its_mix(make: Any) -> None:
    f = make()
    first, second = f.request("a1"), f.request("a1")
    for request in (first, second):
        f.loader.prefetch(request)
    assert len(f.loader) == 0
    for request in (first, second):
        f.loader.add(request, 1.0)
        f.get(request, now=3.0)
        assert request.prefetch is None
    assert len(f.loader) == 1 and [future.cancelled() for _, future in f.fetch.pending] == [False, True]
    f.fetch.finish()
    assert f.wakes == 1 and f.loader.poll(4.0) == (True, [])
    assert (first.load_seconds, second.load_seconds) == (3.0, 1.0)


@pytest.mark.parametrize("error", [None, RuntimeError("damaged")])
def test_a_prefetched_load_that_has_ended_is_reported(make: Any, error: Exception | None) -> None:
    f = make()
    request = f.request("a1")
    f.loader.prefetch(request)
    f.fetch.finish(error=error)
    f.loader.add(request, 1.0)
    assert request.state is QUEUED and request.load_seconds == 0
    if error is None:
        assert f.loader.poll(2.0) == (True, []) and f.loader.get(request, 2.0) is not None
    else:
        assert f.loader.poll(2.0) == (True, [(request, error)]) and len(f.loader) == 0


def test_a_prefetch_can_be_cancelled(make: Any) -> None:
    f = make()
    request = f.request("a1")
    f.loader.prefetch(request)
    f.loader.cancel_prefetch(request)
    f.loader.cancel_prefetch(request)
    assert f.fetch.pending[0][1].cancelled() and request.prefetch is None


def test_nothing_is_prefetched_beside_another_cold_load_or_of_adapters_in_ram(make: Any) -> None:
    f = make()
    first, other = f.request("a1"), f.request("a2")
    f.get(first)
    f.loader.prefetch(other)
    assert len(f.fetch.asked) == 1 and other.prefetch is None
    f.fetch.finish()
    f.loader.poll(2.0)
    f.loader.release(first)
    again = f.request("a1")
    f.loader.prefetch(again)
    assert again.prefetch is None and len(f.fetch.asked) == 1


def test_a_prefetched_load_counts_towards_the_limit(make: Any) -> None:
    f = make()
    prefetched, *others = (f.request(f"a{i}") for i in range(3))
    f.loader.prefetch(prefetched)
    f.get(*others)
    f.loader.add(prefetched, 2.0)
    assert len(f.loader) == 2 and f.fetch.pending[0][1].cancelled() and prefetched.state is QUEUED
    f = make()
    prefetched, *others = (f.request(f"a{i}") for i in range(3))
    f.loader.prefetch(prefetched)
    f.loader.add(prefetched, 1.0)
    assert f.get(*others) == [LOADING, QUEUED]


def test_the_end_of_a_cancelled_load_does_not_affect_its_successor(make: Any) -> None:
    f = make()
    first, second = f.request("a1"), f.request("a1")
    f.get(first)
    f.loader.release(first)
    f.get(second)
    assert f.wakes == 1 and len(f.fetch.asked) == 2
    assert f.loader.poll(3.0) == (False, []) and second.state is LOADING


def test_release_returns_whether_a_new_load_can_start(make: Any) -> None:
    f = make()
    first, again, second = f.request("a1"), f.request("a1"), f.request("a2")
    f.get(first, again, second)
    assert not f.loader.release(first), "another request waits for the load"
    assert f.loader.release(again) and not f.loader.release(second) and not f.loader.release(second)


def test_longest_wait_is_that_of_one_priority(make: Any) -> None:
    f = make()
    assert f.loader.longest_wait(0, 10.0) == 0.0
    for since, name, priority in ((1.0, "a1", 1), (2.0, "a2", 0), (5.0, "a2", 0), (0.5, "a1", 2)):
        f.get(f.request(name, priority=priority), now=since)
    assert [f.loader.longest_wait(priority, 10.0) for priority in (0, 1, 2, 3)] == [8.0, 9.0, 9.5, 0.0]


def test_at_the_limit_a_load_replaces_one_of_a_lower_priority_only(make: Any) -> None:
    f = make()
    requests = [f.request(f"a{i}", priority=priority) for i, priority in enumerate((1, 0, 0, 0))]
    f.get(*requests)
    assert [request.state for request in requests] == [QUEUED, LOADING, LOADING, QUEUED]
    assert len(f.fetch.asked) == 3 and f.fetch.pending[0][1].cancelled()
    f = make(1)
    assert f.get(f.request("a1"), f.request("a1", priority=1), f.request("a2")) == [LOADING, LOADING, QUEUED]


def test_lower_priorities_are_cancelled_only_for_an_unfinished_load_of_the_higher(make: Any) -> None:
    f = make()
    low, high = f.request("a1", priority=1), f.request("a2")
    f.get(low)
    f.loader.cancel_lower_priority(0)
    assert low.state is LOADING
    f.get(high)
    f.loader.cancel_lower_priority(0)
    assert (low.state, high.state, len(f.loader)) == (QUEUED, LOADING, 1)


def test_warm_and_cold_loads_have_separate_limits(make: Any) -> None:
    f = make(1)
    f.make_warm("a1", "a2")
    cold, more, partly = f.request("a3", priority=1), f.request("a4", priority=1), f.request("a1", "a5", priority=1)
    low, high = f.request("a1", priority=1), f.request("a2")
    assert f.get(cold, more, partly, low) == [LOADING, QUEUED, QUEUED, LOADING]
    assert f.get(high) == [LOADING] and low.state is QUEUED and cold.state is LOADING
    assert [f.loader.is_pending(request) for request in (cold, more, low, high)] == [True] * 4
    f.loader.release(high)
    assert not f.loader.is_pending(low), "it can start"


def test_a_load_that_is_done_at_once_makes_its_adapters_warm(tools: Any, make: Any) -> None:
    f = make(1)
    f.fetch.ready = None
    known = f.request("a1")
    assert f.loader.get(known, 1.0) is not None
    f.loader.release(known)  # before `poll`
    f.fetch.ready = set()
    assert f.get(f.request("a2"), f.request("a1")) == [LOADING, LOADING]


def test_never_fitting_checks_unfinished_loads(make: Any) -> None:
    def check_fits() -> None:
        raise NoRoom("others are pinned", "adapters")

    f = make()
    request, fits = f.request("a1"), f.request("a2")
    request.check_fits = check_fits
    f.get(request, fits)
    assert [r for r, _ in f.loader.never_fitting()] == [request]
    f.fetch.finish()
    f.loader.poll(2.0)
    assert f.loader.never_fitting() == []


@pytest.mark.parametrize("how", ["cancelled", "panic", "raises"])
def test_any_failure_of_a_load_fails_its_requests(make: Any, how: str) -> None:
    f = make()
    request = f.request("unknown" if how == "raises" else "a1")
    f.get(request)
    if how == "cancelled":
        f.fetch.pending[0][1].cancel()
    elif how == "panic":
        f.fetch.finish(error=Panic("index out of bounds"))
    any_done, failed = f.loader.poll(2.0)
    expected = KeyError if how == "raises" else EngineFailed
    assert any_done and [(r, type(error)) for r, error in failed] == [(request, expected)] and not len(f.loader)
