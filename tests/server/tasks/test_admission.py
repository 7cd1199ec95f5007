"""Limits of a key and of a task."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.errors import RateLimited
from server.tasks.admission import Admission


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replaces the clock of the rate limiter."""
    clock = Clock()
    monkeypatch.setattr("time.time", lambda: clock.now)
    return clock


def test_concurrent_requests_of_a_key_and_of_a_task() -> None:
    admission = Admission(per_key=2, per_task=3)
    admission.enter("one", "t")
    admission.enter("one", None)
    with pytest.raises(RateLimited, match="this key has 2") as refused:
        admission.enter("one", "t")
    assert refused.value.retry_after == 1.0
    admission.enter("two", "t")
    admission.enter("three", "t")
    with pytest.raises(RateLimited, match="the task 't' has 3"):
        admission.enter("two", "t")
    admission.leave("one", "t")
    admission.enter("two", "t")


@pytest.mark.parametrize(("rate", "burst", "wait"), [(2.0, 4, 2.0), (1.3, 2, 2.0), (0.02, 1, 50.0)])
def test_a_rate_allows_bursts_of_two_seconds(clock: Clock, rate: float, burst: int, wait: float) -> None:
    admission = Admission(key_rate=rate)
    for _ in range(burst):
        admission.enter("one", None)
    clock.now += 0.25
    with pytest.raises(RateLimited, match="of this key is used up") as refused:
        admission.enter("one", None)
    assert refused.value.retry_after == pytest.approx(wait - 0.25)
    admission.enter("two", None)
    clock.now += wait
    admission.enter("one", None)


def test_all_keys_share_the_rate_of_a_task(clock: Clock) -> None:
    admission = Admission(key_rate=1.5, task_rate=1.0)
    admission.enter("one", "t")
    admission.enter("two", "t")
    for tenant in ("one", "three"):
        with pytest.raises(RateLimited, match="of the task 't' is used up"):
            admission.enter(tenant, "t")
    for task in ("u", None):  # the refused request did not count against the key
        admission.enter("one", task)
    with pytest.raises(RateLimited, match="of this key"):
        admission.check("one", None)
    clock.now += 2.1
    admission.enter("three", "t")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["t", "u", None]), st.booleans()), max_size=60))
def test_requests_that_leave_make_room(events: list[tuple[str, str | None, bool]]) -> None:
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
    for entered in inside:
        admission.leave(*entered)
    assert admission.idle()
