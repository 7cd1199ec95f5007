"""The inbox's limits and the fair queue's order."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import queue
from server.engine.queue import FairQueue, RequestInbox
from server.engine.request import Request, Sampling
from server.errors import NoCapacity, NotReady, QueueFull


def request(key: str = "k", priority: int = 0, length: int = 4) -> Request:
    return Request("r", (1,) * length, Sampling(), lambda d: None, fair_key=key, priority=priority)


def add(q: FairQueue, key: str, count: int = 1, priority: int = 0) -> list[Request]:
    made = [request(key, priority) for _ in range(count)]
    for one in made:
        q.add(one)
    return made


def run(q: FairQueue, key: str, cost: float) -> Request:
    """A new request that runs from now on and has received `cost` service."""
    [one] = add(q, key)
    q.admit(one)
    q.charge(one, cost)
    return one


def serve(q: FairQueue, count: int, cost: Any) -> list[str]:
    """Serve requests in order. Returns their keys."""
    keys = []
    for one in q.in_order():
        q.remove(one)
        q.charge(one, cost(one.fair_key) if callable(cost) else cost)
        keys.append(one.fair_key)
        if len(keys) == count:
            break
    return keys


# -- fair queue


def test_keys_take_turns_however_many_requests_they_have() -> None:
    q = FairQueue()
    add(q, "many", 50)
    add(q, "few", 3)
    assert sorted(serve(q, 4, 10)) == ["few", "few", "many", "many"]
    assert len(q) == 49 and q


def test_service_counts_and_not_turns() -> None:
    q = FairQueue()
    for _ in range(20):
        add(q, "long")
        add(q, "short")
    assert serve(q, 16, lambda key: 30 if key == "long" else 10).count("short") == 12


@pytest.mark.parametrize("other_priority", [False, True])
def test_absence_earns_no_credit(other_priority: bool) -> None:
    q = FairQueue()
    if other_priority:
        add(q, "low", priority=1)
    add(q, "busy", 30)
    serve(q, 20, 100)
    add(q, "new", 10)
    assert serve(q, 10, 100).count("new") <= 6


def test_a_stream_of_new_keys_does_not_starve_known_ones() -> None:
    q = FairQueue()
    known = [f"known{i}" for i in range(5)]
    for key in known:
        add(q, key)
    serve(q, 5, 200)
    add(q, "new")
    for key in known:
        add(q, key)
    served: list[str] = []
    for turn in range(100):
        add(q, f"new{turn}")
        if turn % 4:
            served += serve(q, 1, 200)
    assert set(known) <= set(served)


def test_service_beyond_a_share_that_nobody_else_wanted_is_not_owed() -> None:
    q = FairQueue()
    modest = run(q, "modest", 0)
    for _ in range(100):
        busy = run(q, "busy", 100)
        q.charge(modest, 2)
        q.leave(busy)
    add(q, "third", 200)
    add(q, "busy")
    assert "busy" in serve(q, 3, 100)


def test_the_clock_advances_by_the_share_of_each_key_that_waits_or_runs() -> None:
    q = FairQueue()
    first, second = add(q, "a") + add(q, "b")
    for one in (first, second):
        q.admit(one)
        q.charge(one, 100)
    assert q._clock[0] == 100 / 2 + 100 / 2
    q.leave(second)
    q.charge(first, 100)
    add(q, "new")
    assert q._service[0, "new"] == 100 + 100 / 1
    add(q, "a")
    q.leave(first)
    assert q._present[0] == {(0, "a"), (0, "new")}, "a key is present while any of its requests is"


def test_a_new_key_starts_at_the_least_of_the_waiting_ones_if_that_is_ahead_of_the_clock() -> None:
    q = FairQueue()
    for i in range(9):
        run(q, f"modest{i}", 0)  # they make the clock slow
    for key, cost in (("a", 3000), ("b", 2100)):
        run(q, key, cost)
    for key in ("b", "a", "new"):
        add(q, key)
    assert q._service[0, "a"] == 3000 and q._clock[0] == q._service[0, "new"] == q._service[0, "b"] < 2500


def test_within_a_key_preempted_requests_go_first_then_the_oldest() -> None:
    q = FairQueue()
    [third] = add(q, "k")
    q.admit(third)
    first, second = add(q, "k", 2)
    q.requeue(third)
    assert list(q.in_order()) == [third, first, second]
    assert third in q and "x" not in q and q.newest((0, "k")) is second
    q.admit(third)
    q.admit(first)
    q.requeue(first)
    q.requeue(third)
    assert list(q.in_order()) == [third, first, second]
    q.remove(third)
    assert third not in q
    with pytest.raises(KeyError):
        q.remove(third)


def test_priorities_go_before_fairness() -> None:
    q = FairQueue()
    [low], [high] = add(q, "a", priority=1), add(q, "b")
    q.charge(high, 1e9)
    assert q.best_priority == 0 and list(q.in_order()) == [high, low]
    assert q.newest((1, "a")) is low and q.newest((0, "a")) is None


def test_keys_with_equal_service_go_by_their_oldest_request() -> None:
    q = FairQueue()
    order = []
    for key, submitted in (("a", 1.0), ("a", 4.0), ("b", 2.0), ("b", 3.0)):
        [one] = add(q, key)
        one.submitted = submitted
        order.append(one)
    order.sort(key=lambda r: r.submitted)
    assert list(q.in_order()) == order
    q.admit(order[0])
    q.requeue(order[0])
    assert list(q.in_order()) == order


def test_counters_of_absent_keys_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "REMEMBERED_KEYS", 10)
    q = FairQueue()
    for i in range(200):
        [one] = add(q, f"key{i}")
        q.remove(one)
        q.charge(one, i)
    assert len(q._service) <= 21
    add(q, "waits")
    add(q, "waits too")
    q.charge(one, 1e6)
    for i in range(200, 400):
        [other] = add(q, f"key{i}")
        q.remove(other)
    assert q._service[0, "key199"] > 1e6, "the key with the most service is kept longest"


@given(st.lists(st.tuples(st.sampled_from(["add", "admit", "requeue", "leave", "remove"]), st.integers(0, 5))))
def test_every_waiting_request_is_yielded_once_by_priority(actions: list[tuple[str, int]]) -> None:
    q, waiting, running = FairQueue(), list[Request](), list[Request]()
    for action, n in actions:
        if action == "add":
            waiting += add(q, "xyz"[n % 3], priority=n // 3)
        elif action in ("admit", "remove") and waiting:
            one = waiting.pop(n % len(waiting))
            getattr(q, action)(one)
            if action == "admit":
                running.append(one)
                q.charge(one, n)
        elif action in ("requeue", "leave") and running:
            one = running.pop(n % len(running))
            getattr(q, action)(one)
            if action == "requeue":
                waiting.append(one)
        order = list(q.in_order())
        assert len(order) == len(q) == len(waiting) and set(order) == set(waiting) == set(q)
        assert [r.priority for r in order] == sorted(r.priority for r in waiting)
        assert bool(q) == bool(waiting)
        for priority in (0, 1):
            keys = {(r.priority, r.fair_key) for r in (*waiting, *running) if r.priority == priority}
            assert q._present[priority] == keys


# -- inbox


def make_inbox(requests: int = 4, tokens: int = 100) -> RequestInbox:
    inbox = RequestInbox(requests, tokens, lambda: None)
    inbox.open()
    return inbox


def test_a_closed_inbox_gives_the_reason() -> None:
    inbox = RequestInbox(1, 1, lambda: None)
    with pytest.raises(NotReady, match="not been started"):
        inbox.put(request())
    inbox.open()
    inbox.close("the server is stopping")
    with pytest.raises(NotReady, match="stopping") as refused:
        inbox.put(request())
    assert refused.value.retry_after


def test_a_removed_request_makes_room_once() -> None:
    inbox = make_inbox()
    requests = [request() for _ in range(4)]
    for one in requests:
        inbox.put(one)
    with pytest.raises(QueueFull, match=r"4 requests .* limits are 4 and 100 \(--max-queue"):
        inbox.put(request())
    inbox.remove(requests[0])
    inbox.remove(requests[0])
    inbox.put(request())
    with pytest.raises(QueueFull):
        inbox.put(request())
    assert inbox.waiting == 4


def test_arrivals_wake_the_engine_and_are_taken_once() -> None:
    wakes: list[bool] = []
    inbox = RequestInbox(4, 100, lambda: wakes.append(True))
    inbox.open()
    assert inbox.take() is None
    one = request()
    inbox.put(one)
    inbox.cancel("x")
    inbox.unload("d")
    inbox.release_idle(5)
    inbox.release_idle(3)
    assert len(wakes) == 5
    taken: Any = inbox.take()
    assert (taken.requests, taken.cancelled, taken.unloaded, taken.wanted_bytes) == ([one], ["x"], ["d"], 5)
    assert inbox.take() is None


def test_one_request_may_exceed_the_tokens_alone() -> None:
    inbox = make_inbox(requests=4, tokens=100)
    inbox.put(request(length=101))
    assert inbox.overfull_key() is None
    with pytest.raises(QueueFull, match="101 prompt tokens wait, and the limits are 4 and 100 "):
        inbox.put(request())


def test_calls_that_never_fit_are_refused() -> None:
    inbox = make_inbox(requests=4, tokens=100)
    inbox.check(1, 101)
    inbox.check(4, 100)
    for requests, tokens, error in (
        (2, 101, "2 requests with 101 prompt tokens, and the queue holds 100 tokens"),
        (5, 5, r"5 requests, and the queue holds 4 \(--max-queue\)"),
    ):
        with pytest.raises(NoCapacity, match=error):
            inbox.check(requests, tokens)


def test_retry_after_is_the_time_until_a_quarter_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(queue.time, "monotonic", lambda: now)
    inbox = make_inbox(requests=12)
    requests = [request(length=1) for _ in range(12)]
    for one in requests:
        inbox.put(one)
    assert inbox.full().retry_after == 1.0
    for one in requests[:4]:
        inbox.remove(one)
        now += 3.0
    assert inbox.full().retry_after == 3.0 * 8 / 4
    now += 1000.0
    assert inbox.full().retry_after == 30.0
    for one in requests[4:]:
        inbox.remove(one)
    now += 1000.0
    for one in requests[:8]:
        inbox.put(one)
    assert inbox.full().retry_after == 1.0, "idle time does not count"


def test_lower_priorities_take_no_room_from_higher_ones() -> None:
    inbox = make_inbox(requests=3, tokens=30)
    low = [request("t", priority=1, length=10) for _ in range(3)]
    for one in low:
        inbox.put(one)
    assert inbox.overfull_key() is None
    with pytest.raises(QueueFull):
        inbox.put(request("t", priority=1, length=10))
    high = [request("t", length=10) for _ in range(3)]
    for one in high:
        inbox.put(one)
        assert inbox.overfull_key() == (1, "t")
        inbox.remove(low.pop())
    assert inbox.overfull_key() is None
    for refused in (request("t", length=10), request("other", priority=1)):
        with pytest.raises(QueueFull):
            inbox.put(refused)
    for one in high:
        inbox.remove(one)
    assert not inbox.waiting and not inbox._count_of and not any(inbox._tokens_of.values())


@pytest.mark.parametrize("lengths", [(20, 10, 11, 10), (0, 30, 31, 30)])
def test_tokens_of_higher_priorities_stay(lengths: tuple[int, ...]) -> None:
    """Of 30 tokens, a higher priority has some, and a lower one the rest, which another request may take."""
    inbox = make_inbox(requests=10, tokens=30)
    high, low, too_long, fits = lengths
    if high:
        inbox.put(request("a", length=high))
        inbox.put(request("e", priority=1, length=low))
        with pytest.raises(QueueFull):
            inbox.put(request("b", length=too_long))
    else:
        inbox.put(request("e", priority=1, length=low))
    inbox.put(request("b", length=fits))
    assert inbox.overfull_key() == (1, "e")


def test_keys_with_few_requests_get_in_up_to_twice_the_limit() -> None:
    inbox = make_inbox(requests=4)
    for key in ("many", "many", "many", "many", "b", "c", "d", "e"):
        inbox.put(request(key))
    with pytest.raises(QueueFull):
        inbox.put(request("f"))
    assert inbox.overfull_key() == (0, "many")
