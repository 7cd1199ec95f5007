"""Limits of a key and of a task: what they refuse, and that everything that was let in leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import RateLimited
from server.tasks.admission import REMEMBERED, Admission


def test_numbers_in_flight() -> None:
    admission = Admission(per_key=2, per_task=3)
    admission.enter("one", "t")
    admission.enter("one", None)
    with pytest.raises(RateLimited, match="this key has 2"):
        admission.enter("one", "t")
    admission.enter("two", "t")
    admission.enter("three", "t")
    with pytest.raises(RateLimited, match="the task 't' has 3"):
        admission.enter("two", "t")
    admission.leave("one", "t")
    admission.enter("two", "t")


def test_a_rate_with_its_burst_and_when_to_come_back() -> None:
    now = [0.0]
    admission = Admission(key_rate=2.0, clock=lambda: now[0])
    for _ in range(4):
        admission.enter("one", None)
    with pytest.raises(RateLimited) as caught:
        admission.enter("one", None)
    assert caught.value.retry_after == pytest.approx(0.5)
    admission.enter("two", None)
    now[0] = 0.5
    admission.enter("one", None)
    with pytest.raises(RateLimited):
        admission.enter("one", None)


def test_a_task_has_a_rate_that_all_keys_share() -> None:
    now = [0.0]
    admission = Admission(key_rate=3.0, task_rate=1.0, clock=lambda: now[0])
    admission.enter("one", "t")
    admission.enter("two", "t")
    for tenant in ("one", "three"):
        with pytest.raises(RateLimited, match="of the task 't' is used up") as caught:
            admission.enter(tenant, "t")
        assert caught.value.retry_after == pytest.approx(1.0)
    for i in range(5):
        admission.enter("one", "u" if i < 2 else None)  # what was refused has spent none of the key's
    with pytest.raises(RateLimited, match="of this key"):
        admission.check("one", None)
    now[0] = 1.0
    admission.enter("three", "t")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["t", "u", None]), st.booleans()), max_size=60))
def test_what_leaves_makes_room_again(events: list[tuple[str, str | None, bool]]) -> None:
    admission, inside = Admission(per_key=3, per_task=4), []
    for tenant, task, leaves in events:
        if leaves and inside:
            admission.leave(*inside.pop())
            continue
        full = sum(t == tenant for t, _ in inside) >= 3 or (task and sum(k == task for _, k in inside) >= 4)
        if full:
            with pytest.raises(RateLimited):
                admission.enter(tenant, task)
        else:
            admission.enter(tenant, task)
            inside.append((tenant, task))
    for one in inside:
        admission.leave(*one)
    assert not admission._keys and not admission._tasks


def test_who_sends_all_the_time_is_never_forgotten_for_those_who_came_later() -> None:
    admission = Admission(key_rate=1.0, clock=lambda: 0.0)
    admission.enter("busy", None)
    for other in range(REMEMBERED - 1):
        admission.enter(f"other-{other}", None)
    admission.enter("busy", None)
    admission.enter("one more", None)
    with pytest.raises(RateLimited):
        admission.enter("busy", None)  # a fresh burst would let it in
    admission.enter("other-0", None)
    admission.enter("other-0", None)


def test_a_burst_does_not_grow_while_nobody_sends() -> None:
    now = [0.0]
    admission = Admission(key_rate=2.0, clock=lambda: now[0])
    admission.enter("one", None)
    now[0] = 3600.0
    for _ in range(4):
        admission.enter("one", None)
    with pytest.raises(RateLimited):
        admission.enter("one", None)


def test_a_rate_of_less_than_one_in_two_seconds_lets_one_in_and_tells_how_long_the_next_waits() -> None:
    now = [0.0]
    admission = Admission(key_rate=0.25, clock=lambda: now[0])
    admission.enter("one", None)
    for at, wait in ((0.0, 4.0), (1.0, 3.0), (3.5, 0.5)):
        now[0] = at
        with pytest.raises(RateLimited) as caught:
            admission.enter("one", None)
        assert caught.value.retry_after == pytest.approx(wait)
    now[0] = 4.0
    admission.enter("one", None)


def test_who_has_too_many_in_flight_is_told_to_come_back_in_a_second() -> None:
    admission = Admission(per_key=2, per_task=1)
    admission.enter("one", "t")
    admission.enter("one", None)
    for tenant, task, whose in (("one", "u", "this key"), ("two", "t", "the task 't'")):
        with pytest.raises(RateLimited, match=whose) as caught:
            admission.enter(tenant, task)
        assert caught.value.retry_after == 1.0
