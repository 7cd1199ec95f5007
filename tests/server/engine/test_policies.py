"""Each scheduling policy alone."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.policies import Aging, CpuSharing, PendingPrefixes, Preemption, PrefillOrder, RamPressure
from server.engine.queue import FairQueue
from server.engine.request import Request, Sampling


def request(tools: Any, length: int = 4, computed: int = 0, **options: Any) -> Request:
    made = Request("r", (1,) * length, Sampling(), lambda delivery: None, **options)
    made.computed = computed
    return made


def test_prefill_order_puts_short_prompts_first_and_nearly_finished_ones_before_the_oldest(tools: Any) -> None:
    short, oldest, almost_half, half, shorter = (
        request(tools, length, computed)
        for length, computed in ((10, 4), (200, 0), (101, 0), (120, 20), (90, 20))
    )  # fmt: skip
    order = PrefillOrder([oldest, short, almost_half, half, shorter], lambda depth: 16)
    assert order.short == [short] and order.oldest is oldest
    assert order.split_long() == ([shorter, half], [oldest, almost_half])


def test_prefill_order_depends_on_the_room_at_the_depth_of_a_prompt(tools: Any) -> None:
    shallow, deep = request(tools, 20), request(tools, 120, 100)
    order = PrefillOrder([deep, shallow], lambda depth: 20 if depth == 0 else 19)
    assert (order.short, order.long) == ([shallow], [deep])
    assert PrefillOrder([], lambda depth: 20).oldest is None
    assert PrefillOrder([], lambda depth: 20).split_long() == ([], [])


def test_aging_returns_the_first_in_queue_order_that_has_waited_too_long(tools: Any) -> None:
    aging, waiting = Aging(1.0), FairQueue()
    first, second, fresh, low = (request(tools, priority=priority) for priority in (0, 0, 0, 1))
    for each in (fresh, first, second, low):
        waiting.add(each)
    for each, since in ((low, 0.0), (second, 1.0), (first, 2.0), (fresh, 9.0)):
        aging.block(each, since)
        aging.block(each, 9.5)  # a later attempt does not reset the age
    assert aging.starving(waiting, lambda r: True, 10.0) is first
    assert aging.starving(waiting, lambda r: r is not first, 10.0) is second
    assert aging.starving(waiting, lambda r: False, 10.0) is None
    assert aging.starving(waiting, lambda r: True, 1.0) is None, "none is too old, not even the oldest"
    assert aging.starving(waiting, lambda r: True, 2.0) is None, "only one of a lower priority is"
    assert aging.is_blocked(0) and aging.is_blocked(1) and not aging.is_blocked(2)
    for each in (first, second, low, fresh, fresh):
        aging.remove(each)
    assert not aging and not aging.is_blocked(0) and aging.starving(waiting, lambda r: True, 99.0) is None


def test_preemption_takes_the_last_admitted_of_the_lowest_priority(tools: Any) -> None:
    running = [request(tools, priority=priority) for priority in (1, 0, 1, 0)]
    assert Preemption.victim(running) is running[2]


@pytest.mark.parametrize(
    ("lacks_room", "lacks_ram", "victim"),
    [(False, False, None), (True, False, 3), (True, True, 3), (False, True, 2)],
)
def test_preemption_for_a_higher_priority(tools: Any, lacks_room: bool, lacks_ram: bool, victim: int | None) -> None:
    mixes = [tools.mix_of(*names) for names in (("a1",), ("a2",), ("a3",), ())]
    running = [request(tools, mix=mix, priority=priority) for mix, priority in zip(mixes, (0, 1, 1, 1), strict=True)]
    found = Preemption.for_priority(running, 0, lacks_room=lacks_room, lacks_ram=lacks_ram)
    assert found is (None if victim is None else running[victim])
    assert Preemption.for_priority(running, 1, lacks_room=True, lacks_ram=True) is None


def test_ram_pressure_is_urgent_while_reported_and_waited_for_too_long() -> None:
    pressure = RamPressure(2.0)
    assert not pressure.is_urgent(10.0, lambda: 99.0)
    pressure.report(10.0)
    assert pressure.is_urgent(10.1, lambda: 2.1) and not pressure.is_urgent(10.1, lambda: 2.0)
    assert not pressure.is_urgent(10.3, lambda: 99.0), "the report has expired"
    pressure.report(20.0)
    pressure.clear()
    assert not pressure.is_urgent(20.0, lambda: 99.0)


def test_pending_prefixes_belong_to_the_first_request(tools: Any) -> None:
    pending = PendingPrefixes()
    first, second = request(tools), request(tools)
    assert not pending.remove(first, [b"a"])
    pending.add(first, [b"a", b"b"])
    pending.add(second, [b"b", b"c"])
    assert all(key in pending for key in (b"a", b"b", b"c")) and b"d" not in pending
    assert pending.remove(second, [b"b", b"c"]) and b"b" in pending and b"c" not in pending
    assert pending.remove(first, [b"a"]) and not pending.remove(first, [b"a"]) and len(pending) == 1


@pytest.mark.parametrize(("active", "idle"), [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.5), (4, 0.0), (8, 0.0)])
def test_cpu_sharing_falls_with_the_load(active: int, idle: float) -> None:
    sharing = CpuSharing(max_batch=8)
    assert sharing.idle(active) == CpuSharing.MAX_IDLE * idle
    assert not sharing.begin_step(lambda: active), "disabled"
    sharing.enabled = True
    assert sharing.begin_step(lambda: active) == (idle > 0)
    assert sharing.end_step(lambda: 0) == CpuSharing.MAX_IDLE * idle, "at most what was planned"


def test_cpu_sharing_idles_no_longer_than_the_load_after_the_step_allows() -> None:
    sharing = CpuSharing(max_batch=8)
    sharing.enabled = True
    sharing.begin_step(lambda: 1)
    assert sharing.end_step(lambda: 3) == CpuSharing.MAX_IDLE / 2
    sharing.enabled = False
    assert sharing.end_step(lambda: 1) == 0.0
