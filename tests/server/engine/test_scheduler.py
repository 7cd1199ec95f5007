"""The scheduler's rules one by one, on the fake runner: who enters, who gives way, what counts for whom."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import pytest

from server.engine.adapter_slots import AdapterMemory
from server.engine.policies import CpuSharing
from server.engine.queue import OUTPUT_COST
from server.errors import InvalidRequest, NotFinite


def prompt(seed: int, length: int = 10) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(length)]


def test_what_is_generated_counts_for_its_key_and_what_is_scored_does_not(bench: Any) -> None:
    b = bench()
    b.submit(prompt(1, 10), max_tokens=5, fair_key="writes")
    b.submit(prompt(2, 10), scored=4, fair_key="scored")
    b.settle()
    service = b.engine._scheduler.waiting._service
    assert service[0, "writes"] - service[0, "scored"] == 5 * OUTPUT_COST


def test_scored_prompts_have_no_first_token(bench: Any) -> None:
    b = bench()
    heard = b.submit(prompt(2, 10), scored=4)
    b.settle()
    assert math.isnan(heard.request.first_token)


def test_a_step_is_within_its_tokens_while_processors_are_lent(bench: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=9)
    b.engine.share_cpu(True)
    for i in range(3):
        b.submit(prompt(i, 20), max_tokens=2)
    b.settle()
    assert max(batch.rows for batch in b.runner.steps) == 9


def test_a_server_full_of_prompts_lends_nothing(bench: Any, tools: Any) -> None:
    """Few of them run at any time, as each answer ends with its prompt."""
    b = bench(max_batch=32, max_step_tokens=64)
    b.engine.share_cpu(True)
    heard = [b.submit(prompt(i, 20), max_tokens=1) for i in range(100)]
    scheduler = b.engine._scheduler
    while len(scheduler.waiting) + len(b.engine._inbox._arrivals.requests) > 16:
        assert b.engine.step()
        assert b.runner.steps[-1].rows == 64 and scheduler.idle_time == 0.0
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    assert b.runner.steps[-1].rows < 64 and scheduler.idle_time > 0.0, "it has come to less than half of a batch"
    b.check_empty()


def test_a_short_prompt_waits_for_no_longer_ones_while_processors_are_lent(bench: Any) -> None:
    """Each of them is less than a whole step of a server that does not lend, and more than one of this."""
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
        assert long[0].request.computed - before >= CpuSharing.PREFILL_TOKENS // 2, "the oldest waits for nobody"
    assert steps <= 6 and not any(h.tokens for h in long)
    b.settle()
    assert all(h.reason == "length" for h in long)


def test_those_that_wait_for_room_fill_a_server_that_lends(bench: Any) -> None:
    b = bench(blocks=12, max_step_tokens=64)
    b.engine.share_cpu(True)
    heard = [b.submit(prompt(i, 30), max_tokens=12) for i in range(6)]
    b.engine.step()
    b.engine.step()
    assert b.engine.stats()["running"] == 1 and b.engine._scheduler.idle_time == 0.0
    b.settle()
    assert all(h.reason == "length" for h in heard)


def test_those_that_wait_for_a_load_leave_processors_to_others(bench: Any, tools: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=64, blocks=200, fetch=tools.Fetcher(ready=set()))
    b.engine.share_cpu(True)
    b.submit(prompt(0), max_tokens=50)
    heard = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}"), max_tokens=2) for i in range(1, 21)]
    for _ in range(2):
        b.engine.step()
    assert b.engine.stats()["loading"] == 16, "for whom there are places, and four that have none"
    assert b.engine._scheduler.idle_time == CpuSharing.MAX_IDLE
    for _ in range(16):
        b.fetch.finish()
    b.engine.step()
    assert b.engine._scheduler.idle_time == 0.0
    b.fetch.ready = None
    b.settle()
    assert all(h.reason == "length" for h in heard)
    b.check_empty()


def test_after_a_failed_step_adapters_are_placed_anew(bench: Any, tools: Any) -> None:
    b = bench()
    b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.settle()

    def explode(batch: Any) -> None:
        b.runner.before = lambda batch: None
        raise RuntimeError("kernel")

    b.runner.before = explode
    lost = b.submit(prompt(2), mix=tools.mix_of("a1"))
    try:
        b.engine.step()
    except RuntimeError as error:
        b.engine._recover(error)
    assert lost.reason == "error" and not b.engine.stats()["slots"]["resident"] and not b.runner.adapters


def test_the_next_deadline_of_all_is_kept_to_the_moment(bench: Any) -> None:
    b = bench(max_batch=1)
    running = b.submit(prompt(1), max_tokens=200)
    b.engine.step()
    late = b.submit(prompt(2), deadline=time.monotonic() + 60)
    b.engine.step()
    plan = b.engine._scheduler.schedule(late.request.deadline + 0.001)
    assert [request for request, _ in plan.ended] == [late.request]
    assert running.reason is None


def test_the_less_urgent_give_back_blocks_that_the_urgent_lack(bench: Any, tools: Any) -> None:
    b = bench(blocks=8)
    slow = b.submit(prompt(1, 20), max_tokens=12, priority=1)
    b.engine.step()
    urgent = b.submit(prompt(2, 20), max_tokens=2)
    b.engine.step()
    b.engine.step()
    assert b.engine.stats()["preemptions"] == 1 and urgent.tokens
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (slow, urgent))
    b.check_empty()


def test_the_less_urgent_run_on_while_the_urgent_lack_no_room(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, fetch=tools.Fetcher(ready=set()))
    slow = b.submit(prompt(1, 20), max_tokens=12, priority=1)
    b.submit(prompt(3, 20), max_tokens=2, priority=1)
    b.engine.step()
    urgent = b.submit(prompt(2, 4), mix=tools.mix_of("a1"), max_tokens=2)
    for _ in range(4):
        b.engine.step()
    assert b.engine.stats()["preemptions"] == 0 and slow.request.state is tools.State.RUNNING
    b.fetch.finish()
    b.settle()
    assert urgent.reason == "length"


def test_a_step_has_its_logits_at_most_beside_a_long_prompt(bench: Any) -> None:
    b = bench(max_step_tokens=96, blocks=200)
    long = b.submit(prompt(1, 300), scored=299)
    b.engine.step()
    short = b.submit(prompt(2, 60), scored=59)
    b.settle()
    assert max(len(batch.logit_rows) for batch in b.runner.steps) == 64
    assert len(long.logprobs) == 299 and len(short.logprobs) == 59


def test_who_is_preempted_as_another_grows_takes_no_block(bench: Any, tools: Any) -> None:
    b = bench(blocks=12)
    heard = [b.submit(prompt(i, 8), max_tokens=12) for i in range(4)]
    while not b.engine.stats()["preemptions"]:
        b.engine.step()
    waiting = list(b.engine._scheduler.waiting)
    assert len(waiting) == 1 and not waiting[0].blocks
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    b.check_empty()


def test_what_was_scored_before_a_preemption_is_told_once(bench: Any, tools: Any) -> None:
    b = bench(max_batch=1, max_step_tokens=8)
    tokens = prompt(1, 30)
    scored = b.submit(tokens, scored=20, priority=1)
    for _ in range(2):
        b.engine.step()
    assert 0 < len(scored.request.scores) < 20
    b.submit(prompt(2, 4), max_tokens=2)
    b.settle()
    assert b.engine.stats()["preemptions"] == 1
    assert [p.id for p in scored.logprobs] == tokens[-20:]


def test_who_waits_for_a_prefix_enters_as_soon_as_it_is_there(bench: Any, tools: Any) -> None:
    b = bench()
    first = b.submit(prompt(1, 24), max_tokens=40)
    second = b.submit(prompt(1, 24), max_tokens=2)
    b.engine.step()
    assert second.request.state is tools.State.QUEUED
    b.engine.step()
    assert second.request.state is tools.State.RUNNING and second.request.cached == 20
    b.settle()
    assert first.reason == "length"


def test_who_holds_room_in_ram_enters_while_another_lacks_it(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1", "a2"})
    b = bench(fetch=fetch, blocks=16, age_limit=0.02)
    first = b.submit(prompt(1, 40), mix=tools.mix_of("a1"), max_tokens=20)
    b.engine.step()
    holds = b.submit(prompt(2, 40), mix=tools.mix_of("a2"), max_tokens=4)
    b.engine.step()
    b.engine.cancel(first.request.id)
    hot = b.submit(prompt(3, 4), mix=tools.mix_of("a1"), max_tokens=4)
    lacks = b.submit(prompt(9), mix=tools.mix_of("a3"))
    b.engine._drain_inbox()
    b.engine._scheduler.loader.get(lacks.request, time.monotonic() - 1)
    b.engine.release_idle(1)
    b.engine.step()
    assert holds.request.state is tools.State.RUNNING and hot.request.state is tools.State.QUEUED
    while fetch.pending:
        fetch.finish()
    b.settle()
    assert holds.reason == lacks.reason == hot.reason == "length"
    b.check_empty()


def test_a_load_that_takes_long_without_lacking_room_delays_nobody(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a2"})
    b = bench(fetch=fetch, age_limit=0.02)
    b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.engine.step()
    time.sleep(0.03)
    other = b.submit(prompt(2), mix=tools.mix_of("a2"))
    b.engine.step()
    b.engine.step()
    assert other.request.state is tools.State.RUNNING
    fetch.finish()
    b.settle()
    b.check_empty()


def test_who_enters_leaves_each_of_the_others_a_block(bench: Any) -> None:
    b = bench(blocks=8)
    b.submit(prompt(1, 16), max_tokens=4)
    b.engine.step()
    b.engine.step()
    b.submit(prompt(2, 12), max_tokens=2)
    b.settle()
    assert b.engine.stats()["preemptions"] == 0


def test_a_prompt_counts_once_and_without_what_was_found(bench: Any) -> None:
    b = bench(max_batch=1)
    b.submit(prompt(1, 21), max_tokens=1, fair_key="first")
    b.settle()
    again = b.submit(prompt(1, 21), max_tokens=9, fair_key="again", priority=1)
    b.engine.step()
    admitted, cached = again.request.admitted, again.request.cached
    assert cached == 20
    b.submit(prompt(2, 4), max_tokens=1)
    b.settle()
    assert b.engine.stats()["preemptions"] == 1
    assert again.request.admitted == admitted and again.request.cached == cached
    service = b.engine._scheduler.waiting._service
    assert service[0, "first"] == 21 + OUTPUT_COST and service[1, "again"] == 1 + 9 * OUTPUT_COST


def test_the_age_of_who_waits_for_room_goes_on_while_it_is_tried_again(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, age_limit=1.0)
    scheduler = b.engine._scheduler
    b.submit(prompt(1, 16), max_tokens=12)
    b.engine.step()
    large = b.submit(prompt(2, 16), max_tokens=2)
    b.engine._drain_inbox()
    for later in (0.0, 0.6):
        scheduler._can_admit = True
        scheduler.schedule(large.request.submitted + later)
    small = b.submit(prompt(3, 2), max_tokens=1)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted + 1.2)
    assert small.request.state is tools.State.QUEUED, "nobody passes by who has waited that long"
    b.settle()
    b.check_empty()


def test_nothing_is_sure_to_stay_where_a_block_may_lack(bench: Any) -> None:
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
    b.check_empty()


def test_who_lacks_a_block_and_is_the_youngest_gives_way_itself(bench: Any, tools: Any) -> None:
    b = bench(blocks=26, max_step_tokens=16)
    first = b.submit(prompt(1, 96), max_tokens=2)
    b.engine.step()
    second = b.submit(prompt(2, 4), max_tokens=8)
    while not b.engine.stats()["preemptions"]:
        b.engine.step()
    assert second.request.state is tools.State.QUEUED and not second.request.blocks
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (first, second))
    b.check_empty()


def test_of_long_prompts_the_oldest_s_rows_and_logits_alone_are_kept(bench: Any) -> None:
    b = bench(max_step_tokens=128, blocks=300)
    first = b.submit(prompt(1, 500), max_tokens=1)
    b.engine.step()
    second = b.submit(prompt(2, 400), scored=399)
    b.engine.step()
    assert [first.request.computed, second.request.computed] == [192, 64]
    short = b.submit(prompt(3, 40), scored=32)
    b.engine.step()
    assert short.reason is not None and len(short.logprobs) == 32


def test_the_less_urgent_that_have_waited_long_for_room_hold_no_urgent_one_up(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, age_limit=1.0)
    scheduler = b.engine._scheduler
    b.submit(prompt(1, 16), max_tokens=12)
    b.engine.step()
    large = b.submit(prompt(2, 16), max_tokens=2, priority=1)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted)
    assert large.request in scheduler.aging._blocked
    small = b.submit(prompt(3, 2), max_tokens=1)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted + 1.2)
    assert small.request.state is tools.State.RUNNING
    b.settle()
    b.check_empty()


def test_who_has_waited_long_for_room_and_has_lost_its_adapter_holds_nobody_up(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, age_limit=1.0)
    scheduler = b.engine._scheduler
    b.submit(prompt(4, 2), mix=tools.mix_of("a1"), max_tokens=1)
    b.settle()
    b.submit(prompt(1, 16), max_tokens=12)
    b.engine.step()
    large = b.submit(prompt(2, 16), mix=tools.mix_of("a1"), max_tokens=2)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted)
    assert large.request in scheduler.aging._blocked
    b.fetch.ready = set()
    scheduler.unload(tools.digest_of("a1"))
    small = b.submit(prompt(3, 2), max_tokens=1)
    b.engine._drain_inbox()
    scheduler.schedule(large.request.submitted + 1.2)
    assert large.request.state is tools.State.LOADING and small.request.state is tools.State.RUNNING
    b.fetch.finish()
    b.settle()
    b.check_empty()


def test_while_room_is_owed_nobody_keeps_a_slot_from_falling_idle_and_then_all_are_tried(
    bench: Any, tools: Any
) -> None:
    b = bench(fetch=tools.Fetcher(ready={"a1"}), age_limit=30.0)
    b.submit(prompt(1), mix=tools.mix_of("a1"), max_tokens=20)
    b.engine.step()
    lacks = b.submit(prompt(9), mix=tools.mix_of("a3"))
    lacks.request.submitted -= 60
    hot = b.submit(prompt(3), mix=tools.mix_of("a1"))
    b.engine.release_idle(1)
    b.engine.step()
    assert hot.request.state is tools.State.QUEUED
    b.engine._scheduler.schedule(time.monotonic() + 60)
    assert hot.request.state is tools.State.RUNNING, "the room has been found, though the load takes long"
    b.fetch.finish()
    b.settle()
    b.check_empty()


def test_who_lacks_blocks_is_passed_by_none_that_need_no_slot(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, age_limit=0.0)
    b.submit(prompt(1, 16), max_tokens=12)
    b.engine.step()
    lacks = b.submit(prompt(2, 16), mix=tools.mix_of("a2"), max_tokens=2)
    for _ in range(2):
        b.engine.step()
    base = b.submit(prompt(3, 2), max_tokens=1)
    b.engine.step()
    assert lacks.request.state is base.request.state is tools.State.QUEUED
    b.settle()
    b.check_empty()


def test_one_of_the_urgent_that_lacks_blocks_gets_them_beside_one_that_lacks_a_slot(bench: Any, tools: Any) -> None:
    b = bench(max_slots=1, blocks=24)
    b.submit(prompt(1), mix=tools.mix_of("a1"), max_tokens=20)
    slow = b.submit(prompt(2, 56), max_tokens=8, priority=1)
    b.engine.step()
    without_slot = b.submit(prompt(3, 4), mix=tools.mix_of("a2"), max_tokens=2)
    without_blocks = b.submit(prompt(4, 40), max_tokens=2)
    for _ in range(3):
        b.engine.step()
    assert b.engine.stats()["preemptions"] == 1 and slow.request.state is tools.State.QUEUED
    assert without_blocks.tokens and without_slot.request.state is tools.State.QUEUED
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (slow, without_slot, without_blocks))
    b.check_empty()


def test_a_wrong_constraint_casts_no_doubt_on_what_was_computed(bench: Any, tools: Any) -> None:
    """What many share is found again after it; numbers that are not finite do cast doubt."""

    class Refuses:
        def mask(self) -> Any:
            raise InvalidRequest("the schema is too complex", "schema")

    b = bench()
    shared = prompt(1, 24)
    b.submit(shared, max_tokens=1)
    b.settle()
    wrong = b.submit([*shared, 7], constraint=Refuses())
    b.settle()
    assert isinstance(wrong.error, InvalidRequest)
    after = b.submit([*shared, 8], max_tokens=1)
    b.settle()
    assert after.request.cached == 24
    b.runner.before = lambda batch: float("nan")
    broken = b.submit([*shared, 9], max_tokens=1)
    b.settle()
    assert isinstance(broken.error, NotFinite)
    b.runner.before = lambda batch: None
    last = b.submit([*shared, 5], max_tokens=1)
    b.settle()
    assert last.request.cached == 0
    b.check_empty()


def test_nothing_is_copied_ahead_for_whom_room_would_have_to_be_found_while_it_is_owed(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1"})
    b = bench(fetch=fetch, adapter_memory=AdapterMemory(100, lambda weights: 10), age_limit=30.0, max_batch=2)
    b.submit(prompt(1), mix=tools.mix_of("a1"), max_tokens=20)
    b.engine.step()
    lacks = b.submit(prompt(9), mix=tools.mix_of("a3"))
    lacks.request.submitted -= 60
    base, other = b.submit(prompt(4)), b.submit(prompt(5), mix=tools.mix_of("a4"))
    b.engine.release_idle(1)
    b.engine.step()
    assert base.request.state is tools.State.RUNNING and fetch.asked == [tools.mix_of("a1"), tools.mix_of("a3")]
    fetch.ready = None
    fetch.finish()
    b.settle()
    assert other.reason == "length"
    b.check_empty()


def test_what_is_found_of_a_prompt_takes_no_second_block(bench: Any) -> None:
    b = bench()
    for _ in range(2):
        heard = b.submit(prompt(1, 41), max_tokens=2)
        b.engine.step()
        assert len(heard.request.blocks) == 11
        b.settle()
    assert heard.request.cached == 40


def test_who_found_no_place_for_its_load_asks_again_as_one_behind_it_enters(bench: Any, tools: Any) -> None:
    b = bench(max_batch=2, fetch=tools.Fetcher(ready=set()))
    held = [b.submit(prompt(i, 3), mix=tools.mix_of(f"a{i}"), max_tokens=20, fair_key="many") for i in range(1, 5)]
    b.engine.step()
    first = b.submit(prompt(5, 3), mix=tools.mix_of("a5"), max_tokens=2, fair_key="one")
    first.request.submitted -= 60
    b.engine.step()
    assert len(b.fetch.asked) == 4, "there are no more places"
    b.fetch.finish()
    b.engine.step()
    b.engine.step()
    assert held[0].request.state is tools.State.RUNNING and first.request.state is tools.State.LOADING
    b.fetch.ready = None
    while b.fetch.pending:
        b.fetch.finish()
    b.settle()
    assert all(h.reason == "length" for h in (first, *held))
    b.check_empty()


def takes(monkeypatch: Any, b: Any, row: float) -> None:
    """Its steps are said to take so many seconds for each row of a prompt, whatever they take."""
    learn = b.engine._scheduler.budget.update
    monkeypatch.setattr(b.engine._scheduler.budget, "update", lambda share, _: learn(share, row * share.tokens.total()))


@pytest.mark.parametrize("overlapped", [False, True])
def test_prompts_have_fewer_rows_where_steps_take_long(bench: Any, tools: Any, overlapped: bool) -> None:
    b = bench(max_step_tokens=128, blocks=200, step_limit=0.36, overlapped=overlapped)
    b.runner.before = lambda batch: time.sleep(0.002 * batch.rows)
    long = b.submit(prompt(1, 300), max_tokens=3)
    b.settle()
    rows = [batch.rows for batch in b.runner.steps]
    planned = 2 + overlapped
    assert rows[: planned + 1] == [64] * planned + [16], "two long steps tell it, while another may be planned"
    assert long.tokens == tools.solo(long, b.runner.vocab)


def test_on_a_slow_machine_a_short_prompt_and_answers_go_on_beside_a_long_one(
    bench: Any, tools: Any, monkeypatch: Any
) -> None:
    b = bench(max_batch=8, max_step_tokens=512, blocks=600, step_limit=30.0)
    takes(monkeypatch, b, 0.5)
    answering = b.submit(prompt(1, 8), max_tokens=60)
    b.engine.step()
    long = b.submit(prompt(2, 480), max_tokens=1)
    b.engine.step()
    b.engine.step()
    short = b.submit(prompt(3, 30), max_tokens=1)
    steps = 0
    while short.reason is None:
        before, answered = long.request.computed, len(answering.tokens)
        b.engine.step()
        steps += 1
        assert long.request.computed - before >= 8, "the oldest long prompt has half of the rows"
        assert len(answering.tokens) == answered + 1
        assert b.runner.steps[-1].rows <= 1 + 24
    assert steps <= 4 and not long.tokens
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (answering, long, short))
    b.check_empty()


def test_nobody_enters_a_step_that_has_no_time_left(bench: Any, monkeypatch: Any) -> None:
    """They would hold blocks and compute nothing."""
    b = bench(max_batch=8, max_step_tokens=512, blocks=600, step_limit=30.0)
    takes(monkeypatch, b, 0.001)
    waiting = [b.submit(prompt(i, 40), max_tokens=1) for i in range(4)]
    b.engine.step()
    assert [h.request.computed for h in waiting] == [0, 24, 0, 0], "the first has ended, the third has no place yet"
    assert b.engine.stats()["running"] == 1
    b.engine.step()
    assert all(h.reason == "length" for h in waiting), "and by then all of them are known to fit"


def test_nobody_enters_a_step_without_room_at_the_depth_that_it_finds_cached(bench: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=512, blocks=900, context_length=2048, step_limit=30.0)
    shared = prompt(1, 1200)
    b.submit(shared, max_tokens=1)
    b.settle()
    b.submit(prompt(2, 62), max_tokens=1)
    deep = [b.submit([*shared, *prompt(10 + i, 20)], max_tokens=1) for i in range(4)]
    b.engine._scheduler.budget._budget = {0: 64, 1: 64, 2: 16}
    b.engine.step()
    assert [h.request.computed for h in deep] == [0] * 4
    assert b.engine.stats()["running"] == 0, "the first has ended, and those behind it would hold blocks for nothing"
    b.settle()
    assert all(h.reason == "length" for h in deep)
    b.check_empty()


def test_of_two_prompts_of_nearly_the_same_length_the_older_one_ends_first(bench: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=64, blocks=600, context_length=2048)
    older = b.submit(prompt(1, 1000), max_tokens=1)
    b.submit(prompt(2, 900), max_tokens=1)
    steps = 0
    while older.reason is None:
        b.engine.step()
        steps += 1
    assert steps <= 17
    b.settle()
