"""The inbox's bounds and the fair queue's order."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine import queue
from server.engine.queue import FairQueue, RequestInbox
from server.engine.request import Request, Sampling
from server.errors import NoCapacity, NotReady, QueueFull


def request(key: str = "k", priority: int = 0, length: int = 4) -> Request:
    return Request("r", (1,) * length, Sampling(), lambda d: None, fair_key=key, priority=priority)


def served(q: FairQueue, cost: float, count: int) -> list[str]:
    """The keys of the next `count` requests, each of which costs `cost`."""
    keys = []
    for one in q.in_order():
        q.remove(one)
        q.charge(one, cost)
        keys.append(one.fair_key)
        if len(keys) == count:
            break
    return keys


def test_keys_take_turns_however_many_each_has() -> None:
    q = FairQueue()
    for _ in range(50):
        q.add(request("many"))
    for _ in range(3):
        q.add(request("few"))
    assert sorted(served(q, 10, 4)) == ["few", "few", "many", "many"]
    assert len(q) == 49 and q


def test_service_counts_not_turns() -> None:
    q = FairQueue()
    for _ in range(20):
        q.add(request("long"))
        q.add(request("short"))
    keys = []
    for one in q.in_order():
        q.remove(one)
        q.charge(one, 30 if one.fair_key == "long" else 10)
        keys.append(one.fair_key)
        if len(keys) == 16:
            break
    assert keys.count("short") == 12


def test_absence_earns_no_credit() -> None:
    q = FairQueue()
    for _ in range(30):
        q.add(request("busy"))
    served(q, 100, 20)
    for _ in range(10):
        q.add(request("new"))
    assert served(q, 100, 10).count("new") <= 6


def test_new_keys_do_not_keep_those_waiting_that_were_served_before() -> None:
    """More keys come than can be served, each of them for the first time, and each with one request."""
    q = FairQueue()
    known = [request(f"known{i}") for i in range(5)]
    for one in known:
        q.add(one)
    served(q, 200, 5)
    q.add(request("new"))
    for one in known:
        q.add(request(one.fair_key))
    first = []
    for turn in range(100):
        q.add(request(f"new{turn}"))
        if turn % 4 != 0:
            first += served(q, 200, 1)
    assert {one.fair_key for one in known} <= set(first)


def test_a_key_that_waits_or_runs_has_its_share_of_the_clock() -> None:
    q = FairQueue()
    first, second = request("a"), request("b")
    for one in (first, second):
        q.add(one)
        q.admit(one)
        q.charge(one, 100)
    q.leave(second)
    q.charge(first, 100)
    new = request("new")
    q.add(new)
    assert q._service[0, "new"] == 100 / 1 + 100 / 2 + 100 / 1


def test_a_key_is_there_while_any_of_its_requests_waits_or_runs() -> None:
    q = FairQueue()
    pair = [request("a"), request("a")]
    for one in (*pair, request("b")):
        q.add(one)
    q.charge(pair[0], 100)
    assert q._clock[0] == 100 / 2
    for one in pair:
        q.admit(one)
    q.leave(pair[0])
    q.charge(pair[1], 100)
    assert q._clock[0] == 100 / 2 + 100 / 2
    q.leave(pair[1])
    assert q._present[0] == {(0, "b")}


def test_who_comes_starts_at_the_least_of_those_that_wait_if_that_is_ahead_of_the_clock() -> None:
    q = FairQueue()
    for i in range(9):  # they run and want little, so that the clock is slow
        q.add(one := request(f"modest{i}"))
        q.admit(one)
    for key, cost in (("a", 1000), ("b", 1100), ("a", 2000)):
        one = next((one for one in q if one.fair_key == key), None) or request(key)
        if one not in q:
            q.add(one)
        q.admit(one)
        q.charge(one, cost)
        q.leave(one)
        q.add(request(key))
    q.add(request("new"))
    assert {key: q._service[0, key] for key in ("a", "b", "new")} == {"a": 3000, "b": 2100, "new": 2100}


def test_who_takes_what_others_leave_owes_nothing_for_it() -> None:
    """A key has most of the service, as another that runs wants little. Then a third brings more than there is."""
    q = FairQueue()
    modest = request("modest")
    q.add(modest)
    q.admit(modest)
    for _ in range(100):
        one = request("busy")
        q.add(one)
        q.admit(one)
        q.charge(one, 100)
        q.charge(modest, 2)
        q.leave(one)
    for _ in range(200):
        q.add(request("third"))
    q.add(request("busy"))
    assert "busy" in served(q, 100, 3)


def test_one_key_is_first_come_first_served_and_resumed_go_before() -> None:
    q = FairQueue()
    first, second, third = request(), request(), request()
    q.add(third)
    q.admit(third)
    q.add(first)
    q.add(second)
    q.requeue(third)
    assert list(q.in_order()) == [third, first, second]
    assert third in q and q.newest((0, "k")) is second
    q.admit(third)
    q.admit(first)
    q.requeue(first)
    q.requeue(third)
    assert list(q.in_order()) == [third, first, second], "who was preempted last entered first"
    q.remove(third)
    assert third not in q and "x" not in q
    with pytest.raises(KeyError):
        q.remove(third)


def test_urgency_before_fairness() -> None:
    q = FairQueue()
    low, high = request("a", priority=1), request("b")
    q.add(low)
    q.add(high)
    q.charge(high, 1e9)
    assert q.best_priority == 0 and list(q.in_order()) == [high, low]
    assert q.newest((1, "a")) is low and q.newest((0, "a")) is None and q.newest((0, "c")) is None


def test_a_less_urgent_request_that_waits_earns_nobody_credit() -> None:
    q = FairQueue()
    q.add(request("late", priority=1))
    for _ in range(30):
        q.add(request("busy"))
    served(q, 100, 20)
    for _ in range(10):
        q.add(request("new"))
    assert served(q, 100, 10).count("new") <= 6


def test_what_is_remembered_of_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "REMEMBERED_KEYS", 10)
    q = FairQueue()
    for i in range(200):
        one = request(f"key{i}")
        q.add(one)
        q.remove(one)
        q.charge(one, i)
    assert len(q._service) <= 21
    assert not any(q._present.values()) and not q._running
    assert q._service[0, "key199"] > 0
    for key in ("one waits", "another waits"):
        q.add(request(key))
    q.charge(one, 1e6)
    for i in range(200, 400):
        q.add(other := request(f"key{i}"))
        q.remove(other)
    assert q._service[0, "key199"] > 1e6, "who has had most is remembered longest"


def opened(**bounds: int) -> RequestInbox:
    inbox = RequestInbox(bounds.get("requests", 4), bounds.get("tokens", 100), lambda: None)
    inbox.open()
    return inbox


def test_a_closed_inbox_says_why() -> None:
    inbox = RequestInbox(1, 1, lambda: None)
    with pytest.raises(NotReady, match="not been started"):
        inbox.put(request())
    inbox.open()
    inbox.close("the server is stopping")
    with pytest.raises(NotReady, match="stopping") as refused:
        inbox.put(request())
    assert refused.value.retry_after


def test_what_has_left_makes_room_once() -> None:
    inbox = opened()
    inside = [request() for _ in range(4)]
    for one in inside:
        inbox.put(one)
    with pytest.raises(QueueFull, match=r"4 requests .* limits are 4 and 100 \(--max-queue"):
        inbox.put(request())
    inbox.remove(inside[0])
    inbox.remove(inside[0])
    inbox.put(request())
    with pytest.raises(QueueFull):
        inbox.put(request())
    assert inbox.waiting == 4


def test_whatever_comes_wakes_the_engine() -> None:
    woken: list[bool] = []
    inbox = RequestInbox(4, 100, lambda: woken.append(True))
    inbox.open()
    for come in (
        lambda: inbox.put(request()),
        lambda: inbox.cancel("r"),
        lambda: inbox.unload("d"),
        lambda: inbox.release_idle(1),
    ):
        come()
        assert woken.pop() and not woken
    arrivals = inbox.take()
    assert arrivals is not None and arrivals.wanted_bytes == 1 and inbox.take() is None


def test_one_request_may_have_more_tokens_than_the_queue() -> None:
    inbox = opened(requests=4, tokens=100)
    inbox.put(request(length=101))
    assert inbox.overfull_key() is None
    with pytest.raises(QueueFull, match="101 prompt tokens wait, and the limits are 4 and 100 "):
        inbox.put(request())
    inbox.check(1, 101)
    inbox.check(4, 100)
    for requests, tokens, said in (
        (2, 101, "2 requests with 101 prompt tokens, and the queue holds 100 tokens"),
        (5, 5, r"5 requests, and the queue holds 4 \(--max-queue\)"),
    ):
        with pytest.raises(NoCapacity, match=said):
            inbox.check(requests, tokens)


def test_who_finds_no_place_is_told_when_a_quarter_will_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(queue.time, "monotonic", lambda: now)
    inbox = opened(requests=12)
    inside = [request(length=1) for _ in range(12)]
    for one in inside:
        inbox.put(one)
    assert inbox.full().retry_after == 1.0
    for one in inside[:4]:
        inbox.remove(one)
        now += 3.0
    assert inbox.full().retry_after == 3.0 * 8 / 4
    now += 1000.0
    assert inbox.full().retry_after == 30.0
    for one in inside[4:]:
        inbox.remove(one)
    now += 1000.0
    for one in inside[:8]:
        inbox.put(one)
    assert inbox.full().retry_after == 1.0, "nobody has waited in that time"


def test_the_less_urgent_take_no_place_of_the_more_urgent() -> None:
    inbox = opened(requests=3, tokens=30)
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
    with pytest.raises(QueueFull):
        inbox.put(request("t", length=10))
    with pytest.raises(QueueFull):
        inbox.put(request("other", priority=1))
    for one in high:
        inbox.remove(one)
    assert not inbox.waiting and not inbox._count_of and not any(inbox._tokens_of.values())


def test_tokens_of_the_more_urgent_are_not_displaced() -> None:
    inbox = opened(requests=10, tokens=30)
    inbox.put(request("a", length=20))
    inbox.put(request("e", priority=1, length=10))
    with pytest.raises(QueueFull):
        inbox.put(request("b", length=11))
    inbox.put(request("b", length=10))
    assert inbox.overfull_key() == (1, "e")


def test_arrivals_are_taken_once() -> None:
    inbox = opened()
    assert inbox.take() is None
    one = request()
    inbox.put(one)
    inbox.cancel("x")
    inbox.unload("d")
    inbox.release_idle(5)
    inbox.release_idle(3)
    taken: Any = inbox.take()
    assert (taken.requests, taken.cancelled, taken.unloaded, taken.wanted_bytes) == ([one], ["x"], ["d"], 5)
    assert inbox.take() is None


def test_keys_with_equal_service_go_by_their_oldest_request() -> None:
    q = FairQueue()
    made = {(key, since): request(key) for key, since in (("a", 1.0), ("a", 4.0), ("b", 2.0), ("b", 3.0))}
    for (_, since), one in made.items():
        one.submitted = since
        q.add(one)
    order = [made[at] for at in (("a", 1.0), ("b", 2.0), ("b", 3.0), ("a", 4.0))]
    assert list(q.in_order()) == order
    q.admit(order[0])
    q.requeue(order[0])
    assert list(q.in_order()) == order


def test_even_those_that_get_in_beside_a_full_queue_are_no_more_than_it_holds() -> None:
    inbox = opened(requests=4)
    for key in ("many", "many", "many", "many", "b", "c", "d", "e"):
        inbox.put(request(key))
    with pytest.raises(QueueFull):
        inbox.put(request("f"))
    assert inbox.overfull_key() == (0, "many")


def test_of_two_that_have_too_many_tokens_together_the_less_urgent_goes() -> None:
    inbox = opened(tokens=30)
    inbox.put(request("e", priority=1, length=30))
    inbox.put(request("t", length=30))
    assert inbox.overfull_key() == (1, "e")
