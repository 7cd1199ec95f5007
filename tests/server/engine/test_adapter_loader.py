"""The loads that waiting requests ask for: one a mix, within places, and who is told what of them."""

from __future__ import annotations

from typing import Any

import pytest

from adapters.errors import NoRoom
from server.engine.adapter_loader import AdapterLoader
from server.engine.request import Request, Sampling, State
from server.errors import EngineFailed
from tests.server.engine.conftest import Panic


class Asked:
    """`AdapterLoader` on a fetch whose loads end when the test says so."""

    def __init__(self, tools: Any, limit: int) -> None:
        self.tools = tools
        self.woken = 0
        self.fetch = tools.Fetcher(ready=set())
        self.loads = AdapterLoader(self.fetch, limit, self.wake)

    def wake(self) -> None:
        self.woken += 1

    def request(self, name: str, priority: int = 0) -> Request:
        mix = self.tools.mix_of(name)
        return Request("r", (1,), Sampling(), lambda delivery: None, mix=mix, priority=priority)


@pytest.fixture
def asked(tools: Any) -> Asked:
    return Asked(tools, limit=2)


def test_one_load_serves_all_who_wait_for_it_and_stays_while_one_does(asked: Asked) -> None:
    first, second = asked.request("a1"), asked.request("a1")
    assert asked.loads.get(first, 1.0) is None and asked.loads.get(second, 3.0) is None
    assert len(asked.fetch.asked) == 1 and first.state is second.state is State.LOADING
    asked.fetch.finish()
    assert asked.woken == 1 and asked.loads.poll(4.0) == (True, [])
    assert (first.load_seconds, second.load_seconds) == (3.0, 1.0)
    assert first.state is second.state is State.QUEUED
    asked.loads.release(first)
    assert asked.loads.has_weights(second) and not asked.loads.has_weights(first)
    asked.loads.release(second)
    assert len(asked.loads) == 0


def test_what_is_read_again_after_a_request_has_run_is_no_part_of_its_queue(asked: Asked) -> None:
    request = asked.request("a1")
    request.admitted = 2.0
    assert asked.loads.get(request, 3.0) is None
    asked.fetch.finish()
    assert asked.loads.poll(9.0) == (True, []) and request.state is State.QUEUED and request.load_seconds == 0


def test_a_load_that_was_begun_for_a_new_request_is_that_of_all_who_wait_for_it(asked: Asked) -> None:
    first, second = asked.request("a1"), asked.request("a1")
    for request in (first, second):  # before the engine's thread has heard of either
        asked.loads.prefetch(request)
    assert len(asked.loads) == 0
    for request in (first, second):
        asked.loads.add(request, 1.0)
        assert asked.loads.get(request, 3.0) is None and request.prefetch is None
    assert len(asked.loads) == 1 and [future.cancelled() for _, future in asked.fetch.pending] == [False, True]
    assert first.state is second.state is State.LOADING
    asked.fetch.finish()
    assert asked.woken == 1 and asked.loads.poll(4.0) == (True, [])
    assert (first.load_seconds, second.load_seconds) == (3.0, 1.0)


def test_what_was_begun_and_has_come_is_there_at_once(asked: Asked) -> None:
    request = asked.request("a1")
    asked.loads.prefetch(request)
    asked.fetch.finish()
    asked.loads.add(request, 1.0)
    assert asked.loads.poll(2.0) == (True, []) and asked.loads.get(request, 2.0) is not None
    assert request.load_seconds == 0 and request.state is State.QUEUED


def test_what_was_begun_and_fails_ends_its_request(asked: Asked) -> None:
    request, error = asked.request("a1"), RuntimeError("damaged")
    asked.loads.prefetch(request)
    asked.fetch.finish(error=error)
    asked.loads.add(request, 1.0)
    assert asked.loads.poll(2.0) == (True, [(request, error)]) and len(asked.loads) == 0


def test_what_was_begun_for_nobody_is_given_up(asked: Asked) -> None:
    request = asked.request("a1")
    asked.loads.prefetch(request)
    asked.loads.cancel_prefetch(request)
    assert asked.fetch.pending[0][1].cancelled() and request.prefetch is None
    asked.loads.cancel_prefetch(request)  # nothing was begun, which is no error
    asked.loads.prefetch(request)
    assert len(asked.fetch.asked) == 2, "it can be begun again"


def test_nothing_is_begun_beside_what_is_read_or_of_what_is_in_ram(asked: Asked) -> None:
    """Who comes first is for the engine's thread to say, and for whom there is RAM."""
    first, other = asked.request("a1"), asked.request("a2")
    asked.loads.get(first, 1.0)
    asked.loads.prefetch(other)
    assert len(asked.fetch.asked) == 1 and other.prefetch is None
    asked.fetch.finish()
    asked.loads.poll(2.0)
    held = asked.loads.get(first, 2.0)
    asked.loads.release(first)
    again = asked.request("a1")
    asked.loads.prefetch(again)
    assert held is not None and again.prefetch is None and len(asked.fetch.asked) == 1


def test_what_was_begun_has_no_place_of_its_own(asked: Asked) -> None:
    begun, *others = (asked.request(f"a{i}") for i in range(3))
    asked.loads.prefetch(begun)
    for request in others:
        asked.loads.get(request, 1.0)
    asked.loads.add(begun, 2.0)
    assert len(asked.loads) == 2 and asked.fetch.pending[0][1].cancelled() and begun.state is State.QUEUED


def test_the_end_of_a_load_that_was_given_up_says_nothing_of_the_one_that_followed(asked: Asked) -> None:
    first, second = asked.request("a1"), asked.request("a1")
    asked.loads.get(first, 1.0)
    asked.loads.release(first)
    asked.loads.get(second, 2.0)
    assert asked.woken == 1 and len(asked.fetch.asked) == 2
    assert asked.loads.poll(3.0) == (False, []) and second.state is State.LOADING


def test_who_leaves_says_whether_there_was_no_place(asked: Asked) -> None:
    first, again, second = asked.request("a1"), asked.request("a1"), asked.request("a2")
    for request in (first, again, second):
        asked.loads.get(request, 1.0)
    assert not asked.loads.release(first), "another waits for that load"
    assert asked.loads.release(again) and not asked.loads.release(second) and not asked.loads.release(second)


def test_who_has_waited_longest_counts_among_those_of_one_priority(asked: Asked) -> None:
    assert asked.loads.longest_wait(0, 10.0) == 0.0
    for since, name, priority in ((1.0, "a1", 1), (2.0, "a2", 0), (5.0, "a2", 0)):
        asked.loads.get(asked.request(name, priority), since)
    assert asked.loads.longest_wait(0, 10.0) == 8.0 and asked.loads.longest_wait(1, 10.0) == 9.0


def test_a_place_is_taken_from_the_less_urgent_and_from_nobody_else(asked: Asked) -> None:
    low, other, urgent, late = (asked.request(f"a{i}", priority) for i, priority in enumerate((1, 0, 0, 0)))
    for one in (low, other, urgent, late):
        assert asked.loads.get(one, 1.0) is None
    assert [mix.digests for mix in asked.fetch.asked] == [one.mix.digests for one in (low, other, urgent)]
    assert len(asked.loads) == 2 and asked.fetch.pending[0][1].cancelled()
    assert [one.state for one in (low, other, urgent, late)] == [
        State.QUEUED,
        State.LOADING,
        State.LOADING,
        State.QUEUED,
    ]


def waiting(tools: Any, name: str, priority: int = 0) -> Request:
    return Request("r", (1,), Sampling(), lambda delivery: None, mix=tools.mix_of(name), priority=priority)


def test_a_load_that_one_as_urgent_waits_for_too_is_not_given_up(tools: Any) -> None:
    """Two that are as urgent would take the one place from each other for ever."""
    fetch = tools.Fetcher(ready=set())
    loads = AdapterLoader(fetch, 1, lambda: None)
    first, less, second = waiting(tools, "a1"), waiting(tools, "a1", 1), waiting(tools, "a2")
    for request in (first, less, second):
        assert loads.get(request, 1.0) is None
    assert (first.state, less.state, second.state) == (State.LOADING, State.LOADING, State.QUEUED)
    assert fetch.asked == [tools.mix_of("a1")]


def test_loads_give_way_where_a_more_urgent_request_lacks_its_own_alone(tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    loads = AdapterLoader(fetch, 2, lambda: None)
    less, urgent = waiting(tools, "a1", 1), waiting(tools, "a2")
    assert loads.get(less, 1.0) is None
    loads.cancel_lower_priority(0)
    assert less.state is State.LOADING and len(loads) == 1
    assert loads.get(urgent, 2.0) is None
    loads.cancel_lower_priority(0)
    assert (less.state, urgent.state, len(loads)) == (State.QUEUED, State.LOADING, 1)


def test_the_place_of_what_is_in_ram_is_none_for_what_has_to_be_read(tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1"})
    loads = AdapterLoader(fetch, 1, lambda: None)
    known = waiting(tools, "a1")
    assert loads.get(known, 1.0) is not None and loads.poll(1.0) == (True, [])
    loads.release(known)
    fetch.ready = set()
    warm, cold, more = waiting(tools, "a1", 1), waiting(tools, "a2"), waiting(tools, "a3")
    for request in (warm, cold, more):
        assert loads.get(request, 2.0) is None
    assert (warm.state, cold.state, more.state) == (State.LOADING, State.LOADING, State.QUEUED)


def test_what_was_begun_takes_the_place_of_one_that_is_read(asked: Asked) -> None:
    begun, *others = (asked.request(f"a{i}") for i in range(3))
    asked.loads.prefetch(begun)
    asked.loads.add(begun, 1.0)
    for request in others:
        asked.loads.get(request, 1.0)
    assert [request.state for request in (begun, *others)] == [State.LOADING, State.LOADING, State.QUEUED]


def test_a_place_for_what_is_in_ram_is_taken_from_the_less_urgent_too(tools: Any) -> None:
    fetch = tools.Fetcher()
    loads = AdapterLoader(fetch, 1, lambda: None)
    for name in ("a1", "a2"):
        known = waiting(tools, name)
        assert loads.get(known, 1.0) is not None and loads.poll(1.0) == (True, [])
        loads.release(known)
    fetch.ready = set()
    read, less, urgent = waiting(tools, "a3", 1), waiting(tools, "a1", 1), waiting(tools, "a2")
    for request in (read, less, urgent):
        assert loads.get(request, 2.0) is None
    assert (read.state, less.state, urgent.state) == (State.LOADING, State.QUEUED, State.LOADING)


def test_the_seconds_of_each_load_that_a_request_waits_for_add_up(asked: Asked) -> None:
    request = asked.request("a1")
    for since, came in ((1.0, 3.0), (5.0, 6.0)):
        assert asked.loads.get(request, since) is None and not asked.loads.has_weights(request)
        asked.fetch.finish()
        assert asked.loads.poll(came) == (True, [])
        asked.loads.release(request)
    assert request.load_seconds == 3.0


def test_what_the_more_urgent_lack_is_no_wait_of_the_less_urgent(asked: Asked) -> None:
    for since, name, priority in ((1.0, "a1", 0), (5.0, "a2", 1)):
        asked.loads.get(asked.request(name, priority), since)
    assert asked.loads.longest_wait(1, 10.0) == 5.0


def test_what_has_come_has_found_its_room(asked: Asked) -> None:
    def check_fits() -> None:
        raise NoRoom("others are pinned", "adapters")

    request = asked.request("a1")
    request.check_fits = check_fits
    asked.loads.get(request, 1.0)
    assert [who for who, _ in asked.loads.never_fitting()] == [request]
    asked.fetch.finish()
    asked.loads.poll(2.0)
    assert asked.loads.never_fitting() == []


@pytest.mark.parametrize("left_at_once", [False, True])
def test_a_mix_is_in_ram_if_all_of_it_is_however_soon_it_was_used(tools: Any, left_at_once: bool) -> None:
    fetch = tools.Fetcher()
    loads = AdapterLoader(fetch, 1, lambda: None)
    known = waiting(tools, "a1")
    assert loads.get(known, 1.0) is not None
    if left_at_once:
        loads.release(known)
    loads.poll(1.0)
    loads.release(known)
    fetch.ready = set()
    cold, warm, half = (waiting(tools, name) for name in ("a2", "a1", "a1"))
    half.mix = tools.mix_of("a1", "a3")
    for request in (cold, half, warm):
        assert loads.get(request, 2.0) is None
    assert (cold.state, half.state, warm.state) == (State.LOADING, State.QUEUED, State.LOADING)


@pytest.mark.parametrize("how", ["cancelled", "panic"])
def test_whatever_ends_a_load_ends_its_requests_alone(asked: Asked, how: str) -> None:
    request = asked.request("a1")
    asked.loads.get(request, 1.0)
    if how == "cancelled":
        asked.fetch.pending[0][1].cancel()
    else:
        asked.fetch.finish(error=Panic("index out of bounds"))
    came, failed = asked.loads.poll(2.0)
    assert came and [(who, type(error)) for who, error in failed] == [(request, EngineFailed)] and not len(asked.loads)
