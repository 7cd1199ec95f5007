"""The scheduler's rules on the fake runner: admission, preemption, prefill chunks and accounting."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest

from server.engine.adapter_slots import AdapterMemory
from server.engine.policies import CpuSharing
from server.engine.queue import OUTPUT_COST
from server.engine.request import State
from server.errors import InvalidRequest, NotFinite
from tests.server.engine.conftest import prompt


def check_answers(b: Any, tools: Any, *heard: Any) -> None:
    """Run to the end: every answer is the one that the request gets alone, and nothing stays reserved."""
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    b.check_empty()


# -- service


def test_generated_tokens_count_as_service_and_scored_ones_do_not(bench: Any) -> None:
    b = bench()
    b.submit(prompt(1, 10), max_tokens=5, fair_key="generates")
    scored = b.submit(prompt(2, 10), scored=4, fair_key="scored")
    b.settle()
    service = b.engine._scheduler.waiting._service
    assert service[0, "generates"] - service[0, "scored"] == 5 * OUTPUT_COST
    assert math.isnan(scored.request.first_token)


def test_a_prompt_counts_once_and_without_cached_tokens(bench: Any) -> None:
    b = bench(max_batch=1)
    b.submit(prompt(1, 21), max_tokens=1, fair_key="first")
    b.settle()
    again = b.submit(prompt(1, 21), max_tokens=9, fair_key="again", priority=1)
    b.engine.step()
    admitted, cached = again.request.admitted, again.request.cached
    b.submit(prompt(2, 4), max_tokens=1)
    b.settle()
    assert b.engine.stats()["preemptions"] == 1
    assert again.request.admitted == admitted and again.request.cached == cached == 20
    service = b.engine._scheduler.waiting._service
    assert service[0, "first"] == 21 + OUTPUT_COST and service[1, "again"] == 1 + 9 * OUTPUT_COST


# -- prefill chunks


def test_short_prompts_do_not_wait_for_long_ones_and_the_oldest_long_one_proceeds(bench: Any, tools: Any) -> None:
    b = bench(max_step_tokens=16, blocks=200)
    long = b.submit(prompt(1, 180), max_tokens=2)
    b.engine.step()
    assert long.request.computed == 16, "alone it has the whole step"
    longer = b.submit(prompt(2, 200), max_tokens=2)
    b.engine.step()
    assert [long.request.computed, longer.request.computed] == [24, 8]
    for seed in range(16):
        short = b.submit(prompt(100 + seed, 8), max_tokens=1)
        before = long.request.computed
        b.engine.step()
        assert short.tokens == tools.solo(short, b.runner.vocab)
        assert long.request.computed == before + 8 and longer.request.computed == 8
        assert b.runner.steps[-1].rows == 16
    before = long.request.computed
    b.engine.step()
    assert long.request.computed == before + 16, "the oldest gets what nobody else needs"
    check_answers(b, tools, long, longer)


def test_of_two_prompts_of_nearly_the_same_length_the_older_one_ends_first(bench: Any) -> None:
    b = bench(max_step_tokens=64, blocks=600, context_length=2048)
    older = b.submit(prompt(1, 1000), max_tokens=1)
    b.submit(prompt(2, 900), max_tokens=1)
    steps = 0
    while older.reason is None:
        b.engine.step()
        steps += 1
    assert steps <= 17
    b.settle()


def test_a_long_prompt_reserves_tokens_and_logits_for_itself_only(bench: Any) -> None:
    b = bench(max_step_tokens=128, blocks=300)
    first = b.submit(prompt(1, 500), max_tokens=1)
    b.engine.step()
    second = b.submit(prompt(2, 400), scored=399)
    b.engine.step()
    assert [first.request.computed, second.request.computed] == [192, 64]
    short = b.submit(prompt(3, 40), scored=32)
    b.engine.step()
    assert short.reason is not None and len(short.logprobs) == 32


@pytest.mark.parametrize("others", [[(60, 59)], [(33, 32)], [(32, 30)] * 4])
def test_a_step_stays_within_its_logits(bench: Any, others: list[tuple[int, int]]) -> None:
    b = bench(max_step_tokens=96, blocks=200)
    heard = [b.submit(prompt(1, 300), scored=299)]
    b.engine.step()
    heard += [b.submit(prompt(2 + i, length), scored=scored) for i, (length, scored) in enumerate(others)]
    b.settle()
    assert max(len(batch.logit_rows) for batch in b.runner.steps) == 64
    assert all(len(h.logprobs) == h.request.scored for h in heard)


def test_no_request_is_admitted_to_a_full_step(bench: Any) -> None:
    b = bench(max_batch=4, max_step_tokens=8)
    for seed in range(2):
        b.submit(prompt(seed, 8))
    b.engine.step()
    assert b.engine.stats()["running"] == 1 and b.engine.stats()["waiting"] == 1


def slow_machine(monkeypatch: Any, b: Any, seconds: float) -> None:
    """The engine measures `seconds` for each prefill token of a step."""
    update = b.engine._scheduler.budget.update
    monkeypatch.setattr(
        b.engine._scheduler.budget, "update", lambda load, _: update(load, seconds * load.tokens.total())
    )


@pytest.mark.parametrize("overlapped", [False, True])
def test_prefill_is_reduced_where_steps_take_long(bench: Any, tools: Any, overlapped: bool) -> None:
    b = bench(max_step_tokens=128, blocks=200, step_limit=0.36, overlapped=overlapped)
    b.runner.before = lambda batch: time.sleep(0.002 * batch.rows)
    long = b.submit(prompt(1, 300), max_tokens=3)
    b.settle()
    scheduled = 2 + overlapped  # the estimate changes after two long steps
    assert [batch.rows for batch in b.runner.steps][: scheduled + 1] == [64] * scheduled + [16]
    assert long.tokens == tools.solo(long, b.runner.vocab)


def test_on_a_slow_machine_short_prompts_and_decodes_proceed_beside_a_long_prompt(
    bench: Any, tools: Any, monkeypatch: Any
) -> None:
    b = bench(max_step_tokens=512, blocks=600, step_limit=30.0)
    slow_machine(monkeypatch, b, 0.5)
    decoding = b.submit(prompt(1, 8), max_tokens=60)
    b.engine.step()
    long = b.submit(prompt(2, 480), max_tokens=1)
    b.engine.step()
    b.engine.step()
    short = b.submit(prompt(3, 30), max_tokens=1)
    steps = 0
    while short.reason is None:
        before, generated = long.request.computed, len(decoding.tokens)
        b.engine.step()
        steps += 1
        assert long.request.computed - before >= 8 and len(decoding.tokens) == generated + 1
        assert b.runner.steps[-1].rows <= 1 + 24
    assert steps <= 4 and not long.tokens
    check_answers(b, tools, decoding, long, short)


def test_admission_stops_when_the_prefill_budget_is_used(bench: Any, monkeypatch: Any) -> None:
    b = bench(max_step_tokens=512, blocks=600, step_limit=30.0)
    slow_machine(monkeypatch, b, 0.001)
    waiting = [b.submit(prompt(i, 40), max_tokens=1) for i in range(4)]
    b.engine.step()
    assert [h.request.computed for h in waiting] == [0, 24, 0, 0] and b.engine.stats()["running"] == 1
    b.engine.step()
    assert all(h.reason == "length" for h in waiting)


def test_admission_respects_the_budget_at_the_depth_of_a_cached_prefix(bench: Any) -> None:
    b = bench(max_step_tokens=512, blocks=900, context_length=2048, step_limit=30.0)
    shared = prompt(1, 1200)
    b.submit(shared, max_tokens=1)
    b.settle()
    b.submit(prompt(2, 62), max_tokens=1)
    deep = [b.submit([*shared, *prompt(10 + i, 20)], max_tokens=1) for i in range(4)]
    b.engine._scheduler.budget._budget = {0: 64, 1: 64, 2: 16}
    b.engine.step()
    assert [h.request.computed for h in deep] == [0] * 4 and b.engine.stats()["running"] == 0
    b.settle()
    assert all(h.reason == "length" for h in deep)
    b.check_empty()


# -- CPU sharing


def test_idle_time_falls_with_the_load_and_limits_prefill(bench: Any, tools: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=64, blocks=256)
    scheduler, few = b.engine._scheduler, CpuSharing.PREFILL_TOKENS
    heard = [b.submit(prompt(1, 50), max_tokens=40)]
    b.engine.step()
    assert scheduler.idle_time == 0.0 and b.runner.steps[-1].rows == 50
    b.engine.share_cpu(True)
    heard.append(b.submit(prompt(2, 3 * few), max_tokens=40))
    for rows in (1 + few, 2 + few, few):
        b.engine.step()
        assert b.runner.steps[-1].rows == rows
    idle = []
    for seed in range(3, 8):
        idle.append(scheduler.idle_time / CpuSharing.MAX_IDLE)
        heard.append(b.submit(prompt(seed), max_tokens=40))
        b.engine.step()
    assert idle == [1, 0.5, 0, 0, 0]
    heard.append(b.submit(prompt(8, 50), max_tokens=4))
    b.engine.step()
    assert scheduler.idle_time == 0.0 and b.runner.steps[-1].rows == 57
    check_answers(b, tools, *heard)


def test_idle_time_counts_requests_that_wait_for_room_but_not_for_a_load(bench: Any, tools: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=64, blocks=200, fetch=tools.Fetcher(ready=set()))
    b.engine.share_cpu(True)
    b.submit(prompt(0), max_tokens=50)
    heard = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}"), max_tokens=2) for i in range(1, 21)]
    for _ in range(2):
        b.engine.step()
    assert b.engine.stats()["loading"] == 16, "the limit of loads; four more wait for them"
    assert b.engine._scheduler.idle_time == CpuSharing.MAX_IDLE
    for _ in range(16):
        b.fetch.finish()
    b.engine.step()
    assert b.engine._scheduler.idle_time == 0.0
    b.fetch.ready = None
    check_answers(b, tools, *heard)


def test_short_prompts_do_not_wait_for_long_ones_while_the_cpu_is_shared(bench: Any) -> None:
    """All prompts are long then, as a step has few prefill tokens."""
    b = bench(max_batch=32, max_step_tokens=512, blocks=600)
    b.engine.share_cpu(True)
    long = [b.submit(prompt(i, 400), max_tokens=1) for i in range(4)]
    b.engine.step()
    short = b.submit(prompt(9, 20), max_tokens=1)
    steps = 0
    while short.reason is None:
        before = long[0].request.computed
        b.engine.step()
        steps += 1
        assert long[0].request.computed - before >= CpuSharing.PREFILL_TOKENS // 2
    assert steps <= 6 and not any(h.tokens for h in long)
    b.settle()


# -- preemption


def test_a_request_that_needs_a_block_preempts_the_last_admitted(bench: Any, tools: Any, monkeypatch: Any) -> None:
    b = bench(blocks=14, prefix_cache=False)
    preempt = b.engine._scheduler._preempt

    def checked(request: Any) -> None:
        assert request is b.engine._scheduler.running[-1]
        preempt(request)
        assert not request.blocks and request.state is State.QUEUED

    monkeypatch.setattr(b.engine._scheduler, "_preempt", checked)
    heard = [b.submit(prompt(i, 9), mix=tools.mix_of(f"a{i}"), max_tokens=24) for i in range(5)]
    check_answers(b, tools, *heard)
    assert b.engine.stats()["preemptions"] > 0


def test_the_last_admitted_preempts_itself(bench: Any, tools: Any) -> None:
    b = bench(blocks=26, max_step_tokens=16)
    first = b.submit(prompt(1, 96), max_tokens=2)
    b.engine.step()
    second = b.submit(prompt(2, 4), max_tokens=8)
    while not b.engine.stats()["preemptions"]:
        b.engine.step()
    assert second.request.state is State.QUEUED and not second.request.blocks
    check_answers(b, tools, first, second)


@pytest.mark.parametrize("options", [{"max_batch": 1}, {"blocks": 8}, {"max_slots": 1}], ids=str)
def test_a_higher_priority_preempts_for_a_place_blocks_or_slots(bench: Any, tools: Any, options: Any) -> None:
    b = bench(**options)
    low = b.submit(prompt(1, 20), mix=tools.mix_of("a1"), max_tokens=12, priority=1)
    b.engine.step()
    high = b.submit(prompt(2, 20), mix=tools.mix_of("a2"), max_tokens=2)
    for _ in range(3):
        b.engine.step()
    assert b.engine.stats()["preemptions"] == 1 and high.tokens
    check_answers(b, tools, low, high)


def test_a_lower_priority_keeps_running_while_the_higher_one_loads(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, fetch=tools.Fetcher(ready=set()))
    low = b.submit(prompt(1, 20), max_tokens=12, priority=1)
    b.submit(prompt(3, 20), max_tokens=2, priority=1)
    b.engine.step()
    high = b.submit(prompt(2, 4), mix=tools.mix_of("a1"), max_tokens=2)
    for _ in range(4):
        b.engine.step()
    assert b.engine.stats()["preemptions"] == 0 and low.request.state is State.RUNNING
    b.fetch.finish()
    check_answers(b, tools, low, high)


def test_scores_from_before_a_preemption_are_delivered_once(bench: Any) -> None:
    b = bench(max_batch=1, max_step_tokens=8)
    tokens = prompt(1, 30)
    scored = b.submit(tokens, scored=20, priority=1)
    for _ in range(2):
        b.engine.step()
    assert 0 < len(scored.request.scores) < 20
    b.submit(prompt(2, 4), max_tokens=2)
    b.settle()
    assert b.engine.stats()["preemptions"] == 1 and [p.id for p in scored.logprobs] == tokens[-20:]


def test_may_preempt_where_a_block_may_be_missing(bench: Any) -> None:
    b = bench()
    b.submit(prompt(1), max_tokens=20)
    b.engine.step()
    scheduler, kv = b.engine._scheduler, b.engine._scheduler.kv
    taken = kv.allocate(kv.available - 1)
    assert not scheduler.may_preempt
    taken += kv.allocate(1)
    assert scheduler.may_preempt
    kv.free(taken)
    b.settle()


# -- admission


def test_admission_leaves_each_running_request_a_block(bench: Any) -> None:
    b = bench(blocks=8)
    b.submit(prompt(1, 16), max_tokens=4)
    b.engine.step()
    b.engine.step()
    b.submit(prompt(2, 12), max_tokens=2)
    b.settle()
    assert b.engine.stats()["preemptions"] == 0


def test_cached_blocks_are_not_allocated_again(bench: Any) -> None:
    b = bench()
    for _ in range(2):
        heard = b.submit(prompt(1, 41), max_tokens=2)
        b.engine.step()
        assert len(heard.request.blocks) == 11
        b.settle()
    assert heard.request.cached == 40


def test_a_request_waits_for_the_prefix_that_another_one_computes(bench: Any, tools: Any) -> None:
    b = bench()
    first, second = b.submit(prompt(1, 24), max_tokens=40), b.submit(prompt(1, 24), max_tokens=2)
    b.engine.step()
    assert second.request.state is State.QUEUED
    b.engine.step()
    assert second.request.state is State.RUNNING and second.request.cached == 20
    check_answers(b, tools, first, second)


@pytest.mark.parametrize("priority", [0, 1])
def test_a_request_that_starves_for_room_is_not_passed_by_its_own_priority(
    bench: Any, tools: Any, priority: int
) -> None:
    b = bench(blocks=8, age_limit=1.0)
    scheduler = b.engine._scheduler
    first = b.submit(prompt(1, 16), max_tokens=12)
    b.engine.step()
    large = b.submit(prompt(2, 16), max_tokens=2, priority=priority)
    b.engine._drain_inbox()
    for later in (0.0, 0.6):  # a second attempt does not reset the age
        scheduler.admission.retry = True
        scheduler.schedule(large.request.submitted + later)
    small = b.submit(prompt(3, 2), max_tokens=1)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted + 1.2)
    assert small.request.state is (State.RUNNING if priority else State.QUEUED)
    check_answers(b, tools, first, large, small)


def test_a_starving_request_whose_adapter_was_unloaded_holds_up_nobody(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, age_limit=1.0)
    scheduler = b.engine._scheduler
    b.submit(prompt(4, 2), mix=tools.mix_of("a1"), max_tokens=1)
    b.settle()
    first = b.submit(prompt(1, 16), max_tokens=12)
    b.engine.step()
    large = b.submit(prompt(2, 16), mix=tools.mix_of("a1"), max_tokens=2)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted)
    b.fetch.ready = set()
    scheduler.unload(tools.digest_of("a1"))
    small = b.submit(prompt(3, 2), max_tokens=1)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted + 1.2)
    assert large.request.state is State.LOADING and small.request.state is State.RUNNING
    b.fetch.finish()
    check_answers(b, tools, first, large, small)


def test_a_load_starts_when_a_request_behind_it_is_admitted(bench: Any, tools: Any) -> None:
    b = bench(max_batch=2, fetch=tools.Fetcher(ready=set()))
    loading = [b.submit(prompt(i, 3), mix=tools.mix_of(f"a{i}"), max_tokens=20, fair_key="many") for i in range(1, 5)]
    b.engine.step()
    first = b.submit(prompt(5, 3), mix=tools.mix_of("a5"), max_tokens=2, fair_key="one")
    first.request.submitted -= 60
    b.engine.step()
    assert len(b.fetch.asked) == 4, "the limit of loads"
    b.fetch.finish()
    b.engine.step()
    b.engine.step()
    assert loading[0].request.state is State.RUNNING and first.request.state is State.LOADING
    b.fetch.ready = None
    while b.fetch.pending:
        b.fetch.finish()
    check_answers(b, tools, first, *loading)


def test_a_wrong_constraint_keeps_the_prefix_cache_and_infinite_logits_do_not(bench: Any) -> None:
    class Refuses:
        def mask(self) -> Any:
            raise InvalidRequest("the schema is too complex", "schema")

    b = bench()
    shared = prompt(1, 24)
    b.submit(shared, max_tokens=1)
    b.settle()
    wrong = b.submit([*shared, 7], constraint=Refuses())
    after = b.submit([*shared, 8], max_tokens=1)
    b.settle()
    assert isinstance(wrong.error, InvalidRequest) and after.request.cached == 24
    b.runner.before = lambda batch: float("nan")
    broken = b.submit([*shared, 9], max_tokens=1)
    b.settle()
    b.runner.before = lambda batch: None
    last = b.submit([*shared, 5], max_tokens=1)
    b.settle()
    assert isinstance(broken.error, NotFinite) and last.request.cached == 0
    b.check_empty()


def test_expired_requests_end_at_the_earliest_deadline(bench: Any) -> None:
    b = bench(max_batch=1)
    running = b.submit(prompt(1), max_tokens=200)
    b.engine.step()
    late = b.submit(prompt(2), deadline=time.monotonic() + 60)
    b.engine.step()
    output = b.engine._scheduler.schedule(late.request.deadline + 0.001)
    assert [request for request, _ in output.ended] == [late.request] and running.reason is None


# -- RAM


def lacks_ram(b: Any, tools: Any, name: str = "a3") -> Any:
    """A request whose load has lacked RAM for longer than the age limit."""
    heard = b.submit(prompt(9), mix=tools.mix_of(name))
    heard.request.submitted -= 60
    b.engine._drain_inbox()
    b.engine._scheduler.loader.get(heard.request, heard.request.submitted)
    b.engine.release_idle(1)
    return heard


def test_while_a_load_lacks_ram_only_requests_that_need_none_are_admitted(bench: Any, tools: Any) -> None:
    b = bench(fetch=tools.Fetcher(ready={"a1", "a2"}), age_limit=30.0, blocks=24, max_step_tokens=64)
    first = b.submit(prompt(1, 60), mix=tools.mix_of("a1"), max_tokens=20)
    b.engine.step()
    has_weights = b.submit(prompt(2, 40), mix=tools.mix_of("a2"), max_tokens=4)
    b.engine.step()
    b.engine.cancel(first.request.id)
    again, lacks, base = b.submit(prompt(3), mix=tools.mix_of("a1")), lacks_ram(b, tools), b.submit(prompt(4, 3))
    b.engine.step()
    assert has_weights.request.state is base.request.state is State.RUNNING
    assert again.request.state is State.QUEUED, "its adapter is resident, and would stay in RAM"
    b.engine._scheduler.schedule(time.monotonic() + 60)
    assert again.request.state is State.RUNNING, "RAM has been found since"
    b.fetch.finish()
    check_answers(b, tools, has_weights, again, lacks, base)


def test_a_load_that_takes_long_without_lacking_ram_delays_nobody(bench: Any, tools: Any) -> None:
    b = bench(fetch=tools.Fetcher(ready={"a2"}), age_limit=0.02)
    b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.engine.step()
    time.sleep(0.03)
    other = b.submit(prompt(2), mix=tools.mix_of("a2"))
    b.engine.step()
    b.engine.step()
    assert other.request.state is State.RUNNING
    b.fetch.finish()
    b.settle()
    b.check_empty()


def test_a_lower_priority_is_preempted_for_a_load_that_lacks_ram(bench: Any, tools: Any) -> None:
    b = bench(fetch=tools.Fetcher(ready={"a1"}), age_limit=30.0, context_length=256, blocks=128)
    mixes = tools.mix_of(), tools.mix_of("a1")
    base, low = (b.submit(prompt(i), mix=mix, priority=1, max_tokens=200) for i, mix in enumerate(mixes))
    b.engine.step()
    high = lacks_ram(b, tools, "a2")
    b.engine.step()
    assert low.request.state is State.QUEUED and base.request.state is State.RUNNING and not b.engine._slots.in_use
    b.fetch.finish()
    check_answers(b, tools, base, low, high)


def test_copies_on_a_gpu_need_no_ram(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1", "a2"})
    memory = AdapterMemory(100, lambda weights: 10)
    b = bench(fetch=fetch, adapter_memory=memory, age_limit=30.0, context_length=256, blocks=128)
    b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.settle()
    low = b.submit(prompt(2), mix=tools.mix_of("a2"), priority=1, max_tokens=200)
    b.engine.step()
    lacks = lacks_ram(b, tools)
    resident, other = (b.submit(prompt(i), mix=tools.mix_of(name)) for i, name in ((4, "a1"), (5, "a4")))
    b.engine.step()
    assert low.request.state is resident.request.state is State.RUNNING and b.engine.holds(tools.digest_of("a1"))
    assert other.request.state is State.QUEUED and tools.mix_of("a4") not in fetch.asked, "not copied ahead either"
    fetch.ready = None
    while fetch.pending:
        fetch.finish()
    check_answers(b, tools, low, lacks, resident, other)
