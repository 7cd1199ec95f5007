"""The engine as a whole, stepped by hand on the fake runner: every answer is the one that the request has alone."""

from __future__ import annotations

import gc
import math
import random
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import server.engine.engine
from adapters.errors import NoRoom
from adapters.weights import Mix
from server.engine.adapter_slots import AdapterMemory
from server.engine.engine import MAX_IDLE_SECONDS
from server.engine.policies import CpuSharing
from server.engine.request import State
from server.engine.step_stats import StepStats
from server.errors import DeadlineExceeded, EngineFailed, InvalidRequest, NoCapacity, NotReady, QueueFull
from server.model.gguf_vocabulary import from_gguf
from server.model.tokenizer import ModelTokenizer
from tests.server.engine.conftest import Panic
from tests.waiting import SECONDS, until


def prompt(seed: int, length: int = 10) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(length)]


def test_one_request(bench: Any, tools: Any) -> None:
    b = bench()
    heard = b.submit(prompt(1))
    request = heard.request
    b.engine.step()
    first = request.first_token
    b.settle()
    assert heard.tokens == tools.solo(heard, b.runner.vocab)
    assert heard.reason == "length" and request.state is State.DONE
    assert heard.text == b.text.decode(heard.tokens)
    assert request.first_token == first, "it comes once"
    assert request.submitted <= request.admitted <= request.first_token <= request.finished
    b.check_empty()


def test_an_answer_keeps_its_first_space_where_it_goes_on_from_words(tools: Any, spm_metadata: dict[str, Any]) -> None:
    text = ModelTokenizer(from_gguf(spm_metadata))
    b = tools.Bench(text)
    [other] = text.encode("other", add_bos=False)
    b.runner.before = lambda batch: 100 * torch.eye(text.size)[other]
    heard = [b.submit(prompt, max_tokens=2) for prompt in (text.encode("the"), text.encode(""))]
    b.settle()
    assert [h.tokens for h in heard] == [[other, other]] * 2
    assert [h.text for h in heard] == [" other other", "other other"]


def test_mixed_batch_is_every_solo_answer(bench: Any, tools: Any) -> None:
    b = bench(max_step_tokens=16, blocks=80)
    mixes = [(), ("a1",), ("a2",), ("a1", "a2"), ("a3", "a4", "a5")]
    all_heard = [
        b.submit(prompt(i, 3 + 5 * (i % 7)), mix=tools.mix_of(*mixes[i % len(mixes)]), max_tokens=3 + i % 9)
        for i in range(24)
    ]
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in all_heard)
    assert max(len(batch.mixes) for batch in b.runner.steps) > 5
    b.check_empty()


def test_weights_of_a_mix_matter(bench: Any, tools: Any) -> None:
    from adapters.weights import Mix

    b = bench()
    digest = tools.digest_of("a1")
    all_heard = [b.submit(prompt(1), mix=Mix(((digest, w),))) for w in (0.5, 1.0, -1.0)]
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in all_heard)
    assert len({tuple(h.tokens) for h in all_heard}) == 3
    assert b.engine.stats()["slots"]["resident"] == [digest]


def test_decode_goes_on_beside_a_long_prefill(bench: Any) -> None:
    b = bench(max_step_tokens=16)
    first = b.submit(prompt(1, 4), max_tokens=20)
    b.engine.step()
    b.submit(prompt(2, 100), max_tokens=2)
    for _ in range(5):
        before = len(first.tokens)
        b.engine.step()
        assert len(first.tokens) == before + 1
        assert b.runner.steps[-1].rows == 16
    b.settle()


def test_short_prompts_do_not_wait_for_a_long_one_nor_that_for_ever(bench: Any, tools: Any) -> None:
    b = bench(max_step_tokens=16, blocks=200)
    long = b.submit(prompt(1, 180), max_tokens=2)
    b.engine.step()
    assert long.request.computed == 16, "alone it has the whole step"
    longer = b.submit(prompt(2, 200), max_tokens=2)
    b.engine.step()
    assert [long.request.computed, longer.request.computed] == [24, 8]
    shorts = []
    for seed in range(16):  # eight rows each, as many as a step has left for them
        shorts.append(b.submit(prompt(100 + seed, 8), max_tokens=1))
        before = long.request.computed
        b.engine.step()
        assert shorts[-1].tokens == tools.solo(shorts[-1], b.runner.vocab)
        assert long.request.computed == before + 8 and longer.request.computed == 8
        assert b.runner.steps[-1].rows == 16
    before = long.request.computed
    b.engine.step()
    assert long.request.computed == before + 16, "what nobody else needs"
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (long, longer))
    b.check_empty()


def test_a_long_prompt_leaves_logits_to_others_and_has_its_own(bench: Any) -> None:
    b = bench(max_step_tokens=64, blocks=200)
    long = b.submit(prompt(1, 300), scored=299)
    b.engine.step()
    assert long.request.computed == 64
    short = b.submit(prompt(2, 33), scored=32)
    b.engine.step()
    assert long.request.computed == 96 and len(short.logprobs) == 32
    assert len(b.runner.steps[-1].logit_rows) == 64
    b.settle()
    assert len(long.logprobs) == 299


def test_what_is_lent_falls_with_the_load_and_changes_no_answer(bench: Any, tools: Any) -> None:
    b = bench(max_batch=8, max_step_tokens=64, blocks=256)
    scheduler = b.engine._scheduler
    heard = [b.submit(prompt(1, 50), max_tokens=40)]
    b.engine.step()
    assert scheduler.idle_time == 0.0 and b.runner.steps[-1].rows == 50, "nothing is lent unless somebody wants it"
    b.engine.share_cpu(True)
    heard.append(b.submit(prompt(2, 3 * CpuSharing.PREFILL_TOKENS), max_tokens=40))
    for rows in (1 + CpuSharing.PREFILL_TOKENS, 2 + CpuSharing.PREFILL_TOKENS, CpuSharing.PREFILL_TOKENS):
        b.engine.step()
        assert b.runner.steps[-1].rows == rows
    rests = []
    for seed in range(3, 8):
        rests.append(scheduler.idle_time)
        heard.append(b.submit(prompt(seed), max_tokens=40))
        b.engine.step()
    assert rests == [CpuSharing.MAX_IDLE, CpuSharing.MAX_IDLE / 2, 0.0, 0.0, 0.0], (
        "of two to six that run, where eight could"
    )
    heard.append(b.submit(prompt(8, 50), max_tokens=4))
    b.engine.step()
    assert scheduler.idle_time == 0.0 and b.runner.steps[-1].rows == 57, "a full server lends nothing"
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    b.engine.share_cpu(False)
    assert scheduler.idle_time == 0.0
    b.check_empty()


def test_the_thread_rests_after_steps_while_it_lends(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[float] = []
    monkeypatch.setattr(server.engine.engine.time, "sleep", rests.append)
    b = bench()
    b.engine.share_cpu(True)
    heard = b.submit(prompt(1), max_tokens=5)
    b.engine.start()
    assert b.engine.stop(5.0)
    record = b.engine.stats()
    assert heard.reason == "length" and len(rests) == record["steps"]
    assert sum(rests) == pytest.approx(CpuSharing.MAX_IDLE * record["seconds"])


def test_a_step_in_which_the_process_was_stopped_has_no_such_rest_after_it(
    bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rests: list[float] = []
    monkeypatch.setattr(server.engine.engine.time, "sleep", rests.append)
    hours = property(lambda record: 3600.0, lambda record, seconds: None)
    monkeypatch.setattr(StepStats, "last_seconds", hours, raising=False)
    b = bench()
    b.engine.share_cpu(True)
    b.submit(prompt(1), max_tokens=2)
    b.engine.start()
    assert b.engine.stop(5.0)
    assert rests and set(rests) == {MAX_IDLE_SECONDS}


def test_no_rest_follows_a_step_that_was_planned_without_one(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a batch ends in a step that a long prompt came into: that took long, and so would the rest."""
    rests: list[int] = []
    b = bench(max_batch=8, blocks=256)

    def rest(seconds: float) -> None:
        rests.append(b.runner.steps[-1].rows)

    # The engine's own alone: `until` sleeps too, and may do so while the long step runs.
    monkeypatch.setattr(server.engine.engine, "time", SimpleNamespace(monotonic=time.monotonic, sleep=rest))
    b.engine.share_cpu(True)
    heard = [b.submit(prompt(seed), max_tokens=1 + 3 * (seed > 1)) for seed in range(1, 5)]
    run, late = b.runner.run, []

    def come_meanwhile(batch: Any) -> Any:
        if not late and len(b.runner.steps) == 2:
            late.append(b.submit(prompt(9, 400), max_tokens=2))
        return run(batch)

    monkeypatch.setattr(b.runner, "run", come_meanwhile)
    b.engine.start()
    until(lambda: late and all(h.reason for h in (*heard, *late)))
    assert b.engine.stop(30.0) and [h.reason for h in (*heard, *late)] == ["length"] * 5
    assert (
        max(step.rows for step in b.runner.steps) > CpuSharing.PREFILL_TOKENS + 8
        and max(rests) <= CpuSharing.PREFILL_TOKENS + 8
    )


@pytest.mark.parametrize("overlapped", [False, True])
def test_tokens_are_counted_as_they_are_told_and_computed(bench: Any, overlapped: bool) -> None:
    """A step that was launched before an answer's last word was read draws one more, which nobody gets."""
    b = bench(overlapped=overlapped)
    first = b.submit(prompt(1, 20), max_tokens=8)
    b.settle()
    ends = b.submit(prompt(1, 20), max_tokens=8, stop_token_ids=(first.tokens[2],))
    b.settle()
    assert ends.reason == "stop"
    told = b.engine.stats()
    assert told["generated"] == 8 + 3 and told["prompt"] == 20 + 20 - b.engine._scheduler.kv.hits


def test_preemption_changes_no_answer(bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    b = bench(blocks=14, prefix_cache=False)
    preempted: list[Any] = []
    take_back = b.engine._scheduler._preempt

    def noted(request: Any) -> None:
        assert request is b.engine._scheduler.running[-1], "the last that entered"
        preempted.append(request)
        take_back(request)

    monkeypatch.setattr(b.engine._scheduler, "_preempt", noted)
    all_heard = [b.submit(prompt(i, 9), mix=tools.mix_of(f"a{i}"), max_tokens=24) for i in range(5)]
    b.settle()
    assert b.engine.stats()["preemptions"] == len(preempted) > 0
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in all_heard)
    b.check_empty()


def test_prefix_hit_changes_no_answer_and_spares_work(bench: Any, tools: Any) -> None:
    b = bench()
    shared = prompt(1, 40)
    first = b.submit([*shared, 5])
    b.settle()
    rows = sum(batch.rows for batch in b.runner.steps)
    second = b.submit([*shared, 6])
    b.settle()
    assert second.request.cached == 40
    assert sum(batch.rows for batch in b.runner.steps) - rows == 1 + 7
    assert [h.tokens for h in (first, second)] == [tools.solo(h, b.runner.vocab) for h in (first, second)]
    stats = b.engine.stats()["prefix_cache"]
    assert stats == {"queried_tokens": 82, "found_tokens": 40}


def test_answers_to_one_prompt_share_its_computation(bench: Any, tools: Any) -> None:
    """Even if they come at once: those that share a prefix wait for the one that computes it."""
    b = bench(max_step_tokens=16)
    shared = prompt(1, 40)
    all_heard = [b.submit(shared, temperature=0.5, seed=i) for i in range(4)]
    labels = [b.submit([*shared, *label], scored=len(label)) for label in ([7], [8, 9], [7, 9, 11])]
    other = b.submit([*shared[:20], *prompt(2, 20)])
    b.settle()
    assert all_heard[0].request.cached == 0 and other.request.cached == 20
    assert all(h.request.cached >= 36 for h in (*all_heard[1:], *labels))
    assert sum(batch.rows for batch in b.runner.steps) <= 40 + 20 + 6 * 4 + 6 + 5 * 7
    assert other.tokens == tools.solo(other, b.runner.vocab)
    assert not b.engine._scheduler.pending_prefixes
    b.check_empty()


def test_whoever_waits_for_a_prefix_goes_on_when_it_does_not_come(bench: Any, tools: Any) -> None:
    b = bench(max_step_tokens=16)
    first, second = b.submit(prompt(1, 100)), b.submit(prompt(1, 100))
    b.engine.step()
    assert second.request.state is State.QUEUED
    b.engine.cancel(first.request.id)
    b.settle()
    assert second.tokens == tools.solo(second, b.runner.vocab) and second.request.cached == 16
    b = bench(max_step_tokens=16, prefix_cache=False)
    first, second = b.submit(prompt(1, 10)), b.submit(prompt(1, 10))
    b.engine.step()
    assert second.request.state is State.RUNNING
    b.settle()
    b.check_empty()


@pytest.mark.parametrize("length", [8, 9, 12])
def test_the_last_prompt_token_is_always_computed(bench: Any, tools: Any, length: int) -> None:
    b = bench()
    twice = [prompt(1, length)] * 2
    for tokens in twice:
        heard = b.submit(tokens)
        b.settle()
        assert heard.tokens == tools.solo(heard, b.runner.vocab)
    assert heard.request.cached == (length - 1) // 4 * 4


def test_who_finds_the_step_full_stays_in_the_queue(bench: Any) -> None:
    b = bench(max_batch=4, max_step_tokens=8)
    for seed in range(2):
        b.submit(prompt(seed, 8))
    b.engine.step()
    assert b.engine.stats()["running"] == 1 and b.engine.stats()["waiting"] == 1


def test_a_step_has_so_many_logits_at_most(bench: Any) -> None:
    b = bench(max_step_tokens=512)
    heard = [b.submit(prompt(seed, 32), scored=30) for seed in range(4)]
    b.settle()
    assert [len(h.logprobs) for h in heard] == [30] * 4
    assert max(len(batch.logit_rows) for batch in b.runner.steps) == 64


def test_long_prompts_count_for_their_task(bench: Any) -> None:
    b = bench(max_batch=1, max_step_tokens=64)
    ended: list[str] = []
    for seed in range(12):
        key = "long" if seed % 2 else "short"
        heard = b.submit(prompt(seed, 30 if seed % 2 else 3), max_tokens=1, fair_key=key)
        heard.request.deliver = lambda delivery, key=key: ended.append(key)
    b.settle()
    assert len(ended) == 12 and ended[:6].count("short") >= 4


def test_one_request_may_take_every_block(bench: Any) -> None:
    b = bench(blocks=3)
    heard = b.submit(prompt(1, 12), max_tokens=1)
    b.settle()
    assert heard.reason == "length" and b.engine.stats()["kv_blocks"]["cached"] == 3 // 2


def test_tenant_and_mix_do_not_share_a_prefix(bench: Any, tools: Any) -> None:
    b = bench()
    for options in ({"tenant": "x"}, {"tenant": "y"}, {"mix": tools.mix_of("a1")}, {"tenant": "x"}):
        heard = b.submit(prompt(1, 20), **options)
        b.settle()
        assert heard.tokens == tools.solo(heard, b.runner.vocab)
        cached = heard.request.cached
    assert cached == 16 and b.engine.stats()["prefix_cache"]["found_tokens"] == 16


def test_a_cold_load_begins_with_its_request_and_ends_with_it(bench: Any, tools: Any) -> None:
    """Before the next step is planned, if it is the next to enter."""
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch, max_queue=1, max_batch=1)
    cold = b.submit(prompt(1), mix=tools.mix_of("a1"))
    assert len(fetch.pending) == 1
    with pytest.raises(QueueFull):
        b.submit(prompt(2), mix=tools.mix_of("a2"))
    assert len(fetch.pending) == 1, "nothing is read for who is refused"
    b.engine.cancel(cold.request.id)
    b.engine.step()
    assert cold.reason == "cancelled" and fetch.pending[0][1].cancelled()
    again = b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.engine.step()
    assert again.request.state is State.LOADING and len(fetch.asked) == 2, "the step has asked for no other"
    fetch.finish(1)
    b.engine.step()
    assert again.request.state is State.RUNNING
    later = b.submit(prompt(2), mix=tools.mix_of("a2"))
    b.engine.step()
    assert len(fetch.asked) == 2, "there is no place for it"
    b.settle()
    assert again.tokens == tools.solo(again, b.runner.vocab) and len(fetch.asked) == 3
    fetch.finish(1)
    b.settle()
    here = b.submit(prompt(2), mix=tools.mix_of("a2"))
    assert len(fetch.asked) == 3, "it is in a slot"
    b.settle()
    assert later.reason == here.reason == "length"
    b.check_empty()


def test_what_was_begun_for_an_engine_that_is_stopping_is_given_up(bench: Any, tools: Any) -> None:
    b = bench(fetch=(fetch := tools.Fetcher(ready=set())))
    b.engine._inbox.close("the server is stopping")
    with pytest.raises(NotReady):
        b.submit(prompt(1), mix=tools.mix_of("a1"))
    assert fetch.pending[0][1].cancelled()


def test_a_cold_adapter_delays_nobody(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1"})
    b = bench(fetch=fetch)
    cold = [b.submit(prompt(i), mix=tools.mix_of("a2"), fair_key="cold") for i in range(3)]
    warm = b.submit(prompt(9), mix=tools.mix_of("a1"), fair_key="cold")
    b.settle()
    assert warm.reason == "length" and all(h.deliveries == [] for h in cold)
    assert len(fetch.asked) == 2, "one load for three requests"
    assert all(h.request.state is State.LOADING for h in cold) and b.engine.stats()["loading"] == 3
    fetch.finish()
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in cold)
    assert all(h.request.load_seconds > 0 for h in cold) and warm.request.load_seconds == 0
    b.check_empty()


def test_a_failed_load_fails_its_requests_alone(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1"})
    b = bench(fetch=fetch)
    bad, good = b.submit(prompt(1), mix=tools.mix_of("a2")), b.submit(prompt(2), mix=tools.mix_of("a1"))
    b.engine.step()
    error = RuntimeError("half of it is missing")
    fetch.finish(error=error)
    b.settle()
    assert bad.reason == "error" and bad.error is error
    assert good.tokens == tools.solo(good, b.runner.vocab)
    b.check_empty()


def test_a_fetch_that_raises_and_a_place_that_raises(bench: Any, tools: Any) -> None:
    b = bench()
    unknown = b.submit(prompt(1), mix=tools.mix_of("nobody"))
    b.runner.on_place = lambda weights: (_ for _ in ()).throw(MemoryError("no room")) if weights.name == "a3" else None
    unplaced = b.submit(prompt(2), mix=tools.mix_of("a2", "a3"))
    fine = b.submit(prompt(3), mix=tools.mix_of("a2"))
    b.settle()
    assert isinstance(unknown.error, KeyError) and isinstance(unplaced.error, EngineFailed)
    assert "no room" not in unplaced.error.message, "what a library says is for the log"
    assert fine.tokens == tools.solo(fine, b.runner.vocab)
    b.check_empty()


def test_cancel_in_every_state(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch, max_batch=1)
    running = b.submit(prompt(1), max_tokens=100)
    b.engine.step()
    loading = b.submit(prompt(2), mix=tools.mix_of("a1"), fair_key="x")
    running2 = b.submit(prompt(3), fair_key="y")
    b.engine.step()
    inbox = b.submit(prompt(4))
    b.engine._scheduler._can_admit = True
    for heard in (running, running2, inbox, loading):
        b.engine.cancel(heard.request.id)
        b.engine.step()
        assert heard.reason == "cancelled"
    b.settle()
    b.check_empty()
    b.engine.cancel(running.request.id)
    b.engine.cancel("never heard of")
    b.settle()


def test_cancel_while_loading_gives_the_load_up(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch)
    heard = b.submit(prompt(2), mix=tools.mix_of("a1"))
    b.engine.step()
    assert heard.request.state is State.LOADING
    b.engine.cancel(heard.request.id)
    b.engine.step()
    assert heard.reason == "cancelled" and fetch.pending[0][1].cancelled()
    b.check_empty()


def test_each_deadline_is_kept_whatever_became_of_the_earlier_ones(bench: Any, tools: Any) -> None:
    b = bench(fetch=tools.Fetcher(ready=set()))
    now = time.monotonic()
    first = b.submit(prompt(1), max_tokens=2, deadline=now + 0.5)
    later = [b.submit(prompt(i), mix=tools.mix_of("a1"), deadline=now + wait) for i, wait in ((2, 0.7), (3, 0.6))]
    b.run_until(lambda: first.reason == "length")
    b.run_until(lambda: all(heard.error for heard in later))
    assert all(isinstance(heard.error, DeadlineExceeded) for heard in later)
    assert all(heard.request.finished >= heard.request.deadline for heard in later)
    assert later[1].request.finished <= later[0].request.finished


def test_deadlines(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch, max_batch=1)
    later = time.monotonic() + 600
    running = b.submit(prompt(1), max_tokens=240, deadline=later)
    queued = b.submit(prompt(2), deadline=later)
    loading = b.submit(prompt(3), mix=tools.mix_of("a1"), deadline=later)
    b.engine.step()
    for heard in (running, queued, loading):  # each where it is by now, however long that took
        heard.request.deadline = time.monotonic() + 0.02
    b.engine._scheduler._next_deadline = 0.0
    b.runner.before = lambda batch: time.sleep(0.005)
    b.run_until(lambda: all(h.reason for h in (running, queued, loading)))
    assert all(isinstance(h.error, DeadlineExceeded) for h in (running, queued, loading))
    assert [str(h.error).split()[-1] for h in (running, queued, loading)] == ["running", "waiting", "waiting"]
    assert 0 < len(running.tokens) < 240
    b.check_empty()


@pytest.mark.parametrize(
    ("kind", "told"), [(RuntimeError, EngineFailed), (Panic, EngineFailed), (NoCapacity, NoCapacity)]
)
def test_a_failed_step_spares_those_that_wait(
    bench: Any, tools: Any, kind: type[BaseException], told: type[Exception]
) -> None:
    b = bench(max_batch=2)
    before = b.submit(prompt(9, 12))
    b.settle()
    all_heard = [b.submit(prompt(i), mix=tools.mix_of("a1")) for i in range(4)]

    def explode(batch: Any) -> None:
        b.runner.before = lambda batch: None
        raise kind("kernel")

    b.runner.before = explode
    b.engine.start()
    until(lambda: all(h.reason for h in all_heard))
    assert [h.reason for h in all_heard] == ["error", "error", "length", "length"]
    assert all(type(h.error) is told for h in all_heard[:2])
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in all_heard[2:])
    assert b.engine.stats()["failures"] == 1 and b.engine.state == "running"
    again = b.submit(before.request.prompt)
    until(lambda: again.reason)
    assert again.tokens == before.tokens
    assert (again.request.cached > 0) == (kind is NoCapacity), "otherwise what was cached is trusted no more"
    assert b.engine.stop(1.0)
    b.check_empty()


def test_when_planning_itself_fails_no_request_is_lost(bench: Any) -> None:
    b = bench()
    heard = b.submit(prompt(1))
    b.engine._scheduler._admit = lambda now, plan: 1 / 0
    b.engine.start()
    until(lambda: heard.reason)
    assert isinstance(heard.error, EngineFailed)
    b.engine.stop()


def test_an_engine_that_cannot_go_on_after_a_step_that_failed_is_lost(bench: Any) -> None:
    """As with a device that is lost: whoever watches it ends the process. One that was stopped is not."""
    b = bench()
    b.engine.start()
    assert b.engine.stop(1.0) and b.engine.fatal_error() is None
    b = bench(max_batch=1)
    heard = [b.submit(prompt(i)) for i in range(2)]
    b.runner.before = lambda batch: 1 / 0
    b.engine._scheduler.reset = lambda: {}["gone"]
    b.engine.start()
    until(lambda: b.engine.state == "stopped")
    assert "KeyError('gone')" in b.engine.fatal_error()
    assert [type(h.error) for h in heard] == [EngineFailed, NotReady]
    with pytest.raises(NotReady):
        b.submit(prompt(3))
    assert b.engine.stop()


def test_a_row_that_is_not_finite_fails_alone_and_leaves_no_prefix(bench: Any, tools: Any) -> None:
    b = bench()
    good, bad = b.submit(prompt(1, 12)), b.submit(prompt(2, 12), temperature=1.0)
    b.runner.before = lambda batch: _nan_row(batch, b.runner.vocab)
    b.engine.step()
    b.runner.before = lambda batch: None
    b.settle()
    assert isinstance(bad.error, EngineFailed) and good.tokens == tools.solo(good, b.runner.vocab)
    again = b.submit(prompt(2, 12))
    b.settle()
    assert again.request.cached == 0
    b.check_empty()


def _nan_row(batch: Any, vocab: int) -> Any:
    import torch

    added = torch.zeros(len(batch.logit_rows), vocab)
    added[1, 7] = math.nan
    return added


def test_refused_at_once(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, context_length=1000, max_slots=2)
    assert b.engine.context_length == 32
    with pytest.raises(NoCapacity, match="kv-cache"):
        b.submit(prompt(1, 30), max_tokens=10)
    with pytest.raises(NoCapacity, match="max-slots"):
        b.submit(prompt(1), mix=tools.mix_of("a1", "a2", "a3"))
    with pytest.raises(InvalidRequest, match="context"):
        b.submit(prompt(1, 990), max_tokens=20)
    with pytest.raises(InvalidRequest):
        b.submit([])
    exact = b.submit(prompt(1, 25), max_tokens=8)
    b.settle()
    assert exact.tokens == tools.solo(exact, b.runner.vocab)


def test_queue_is_bounded_by_requests_and_tokens(bench: Any) -> None:
    b = bench(max_queue=3)
    for i in range(3):
        b.submit(prompt(i))
    with pytest.raises(QueueFull) as refused:
        b.submit(prompt(4))
    assert refused.value.retry_after >= 1
    b.settle()
    b.submit(prompt(5))
    b.settle()
    b = bench(max_queue_tokens=25)
    b.submit(prompt(1, 20))
    with pytest.raises(QueueFull):
        b.submit(prompt(2, 10))
    b.settle()
    b.submit(prompt(3, 40), max_tokens=2)  # more than the bound, but alone
    b.settle()
    b.check_empty()


def test_a_full_queue_makes_room_for_a_key_that_has_little(bench: Any) -> None:
    b = bench(max_queue=6, max_batch=1)
    many = [b.submit(prompt(i), fair_key="many") for i in range(6)]
    few = b.submit(prompt(9), fair_key="few")
    with pytest.raises(QueueFull):
        b.submit(prompt(7), fair_key="many")
    b.settle()
    assert [h.reason for h in many] == ["length"] * 5 + ["error"] and few.reason == "length"
    assert isinstance(many[-1].error, QueueFull) and many[-1].error.retry_after >= 1
    b.check_empty()


def test_mixes_that_compete_for_the_last_slots_all_end(bench: Any, tools: Any) -> None:
    b = bench(max_slots=3)
    mixes = [("a1", "a2"), ("a2", "a1"), ("a3", "a4", "a5")] * 8
    all_heard = [b.submit(prompt(i), mix=tools.mix_of(*names), fair_key=str(i % 3)) for i, names in enumerate(mixes)]
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in all_heard)
    b.check_empty()


def test_a_starving_request_that_is_refused_holds_nobody_up(bench: Any, tools: Any) -> None:
    b = bench(blocks=16, age_limit=0.02, context_length=64, prefix_cache=False)
    b.runner.on_place = lambda weights: (_ for _ in ()).throw(ValueError("cannot be placed"))
    running = b.submit(range(10, 30), max_tokens=30)  # has nearly all blocks
    b.engine.step()
    starving = b.submit(range(10, 60), mix=tools.mix_of("a7"), max_tokens=4)
    b.engine.step()
    time.sleep(0.05)
    behind = b.submit(range(10, 60), max_tokens=4)
    b.run_until(lambda: starving.reason == "error")
    assert running.reason == "length", "there was no room before"
    b.run_until(lambda: behind.reason == "length")
    b.check_empty()


def test_a_large_mix_does_not_starve(bench: Any, tools: Any) -> None:
    """While requests for single adapters keep coming, a mix that needs all slots still gets its turn."""
    b = bench(max_slots=4, age_limit=0.02)
    singles: list[Any] = []

    def feed() -> None:
        while sum(not h.reason for h in singles) < 6:
            names = f"a{len(singles) % 4}"
            singles.append(b.submit(prompt(len(singles)), mix=tools.mix_of(names), fair_key=names, max_tokens=4))

    feed()
    b.engine.step()
    large = b.submit(prompt(1), mix=tools.mix_of("a4", "a5", "a6", "a7"), fair_key="large")
    b.engine._scheduler.waiting.charge(large.request, 1e6)  # fairness alone would let it wait for long
    end = time.monotonic() + SECONDS
    while not large.reason:
        feed()
        b.engine.step()
        assert time.monotonic() < end
    assert large.tokens == tools.solo(large, b.runner.vocab)
    b.settle()
    b.check_empty()


def test_evaluation_waits_for_all_others_and_gives_way(bench: Any, tools: Any) -> None:
    b = bench(max_batch=2)
    low = [b.submit(prompt(i), priority=1, max_tokens=30) for i in range(3)]
    b.engine.step()
    assert [h.request.state for h in low] == [State.RUNNING, State.RUNNING, State.QUEUED]
    high = [b.submit(prompt(10 + i), priority=0, max_tokens=4) for i in range(4)]
    b.run_until(lambda: all(h.reason for h in high))
    assert not any(h.reason for h in low)
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (*low, *high))
    b.check_empty()


def test_scored_prompts(bench: Any, tools: Any) -> None:
    import numpy as np

    b = bench(max_step_tokens=8)
    tokens = prompt(1, 30)
    heard = [b.submit(tokens, scored=n, logprobs=2) for n in (1, 4, 29)]
    b.settle()
    for h in heard:
        assert h.reason == "stop" and len(h.deliveries) == 1 and h.tokens == []
        n = h.request.scored
        assert [p.id for p in h.logprobs] == tokens[-n:]
        for i, p in enumerate(h.logprobs):
            row = tools.logits_for(tokens[: 30 - n + i], (), b.runner.vocab).astype(np.float64)
            expected = row - np.log(np.exp(row).sum())
            assert p.logprob == pytest.approx(expected[p.id], abs=1e-5)
            assert [t for t, _ in p.top] == np.argsort(-row)[:2].tolist()
    b.check_empty()


def test_scored_prompts_share_a_prefix_up_to_what_is_scored(bench: Any) -> None:
    b = bench()
    tokens = prompt(1, 30)
    first = b.submit(tokens, scored=4)
    b.settle()
    second = b.submit(tokens, scored=6)
    b.settle()
    assert second.request.cached == (30 - 1 - 6) // 4 * 4
    assert [p.logprob for p in second.logprobs][2:] == [p.logprob for p in first.logprobs]


def test_end_tokens_and_stop_strings(bench: Any, tools: Any) -> None:
    b = bench()
    probe = b.submit(prompt(5), max_tokens=12)
    b.settle()
    answer = probe.tokens
    third = answer[2]
    stopped = b.submit(prompt(5), max_tokens=12, stop_token_ids=(third,))
    word = b.text.decode(answer[4:6])[:3] or "x"
    by_text = b.submit(prompt(5), max_tokens=12, stop=(word,), logprobs=0)
    late = b.submit(prompt(5), max_tokens=12, stop_token_ids=(answer[1],), min_tokens=6)
    b.settle()
    assert stopped.reason == "stop" and stopped.tokens == answer[: answer.index(third) + 1]
    assert stopped.text == b.text.decode(stopped.tokens[:-1])
    assert word not in by_text.text and len(by_text.logprobs) == len(by_text.tokens)
    assert len(late.tokens) >= 6


def test_end_of_text_ends_unless_ignored(bench: Any, tools: Any) -> None:
    import torch

    b = bench()

    def push_eos(batch: Any) -> Any:
        added = torch.zeros(len(batch.logit_rows), b.runner.vocab)
        added[:, tools.EOS] = 100.0
        return added

    b.runner.before = push_eos
    ended = b.submit(prompt(1), ignore_eos=False)
    ignored = b.submit(prompt(2), ignore_eos=True, max_tokens=3)
    least = b.submit(prompt(3), ignore_eos=False, min_tokens=4)
    b.settle()
    assert ended.tokens == [tools.EOS] and ended.reason == "stop" and ended.text == ""
    assert ignored.tokens == [tools.EOS] * 3 and ignored.reason == "length" and ignored.text == ""
    assert len(least.tokens) == 5 and least.tokens[-1] == tools.EOS and tools.EOS not in least.tokens[:-1]


def test_sampled_answers_do_not_depend_on_the_batch(bench: Any, tools: Any) -> None:
    options = [
        {"temperature": 0.8, "seed": 1},
        {"temperature": 1.5, "seed": 2, "top_p": 0.9},
        {"temperature": 1, "seed": 3, "top_k": 9, "repetition_penalty": 1.3},
    ]
    alone = []
    for i, option in enumerate(options):
        b = bench()
        alone.append(b.submit(prompt(i), **option))
        b.settle()
    b = bench(blocks=12, max_step_tokens=8, prefix_cache=False)
    together = [b.submit(prompt(i), **option) for i, option in enumerate(options)]
    for i in range(5):
        b.submit(prompt(20 + i))
    b.settle()
    assert b.engine.stats()["preemptions"] > 0
    assert [h.tokens for h in together] == [h.tokens for h in alone]


def test_a_seed_is_drawn_if_none_is_given(bench: Any) -> None:
    b = bench()
    all_heard = [b.submit(prompt(1), temperature=2.0) for _ in range(4)]
    b.settle()
    assert len({tuple(h.tokens) for h in all_heard}) > 1


def test_a_listener_that_fails_ends_its_request_alone(bench: Any, tools: Any) -> None:
    b = bench()
    good, bad = b.submit(prompt(1)), b.submit(prompt(2))
    heard: list[Any] = []

    def deliver(delivery: Any) -> None:
        heard.append(delivery)
        raise RuntimeError("the loop is closed")

    bad.request.deliver = deliver
    b.settle()
    assert good.tokens == tools.solo(good, b.runner.vocab)
    assert [d.finish_reason for d in heard] == [None, "cancelled"]
    b.check_empty()


def test_forget_and_release_idle_empty_slots(bench: Any, tools: Any) -> None:
    b = bench()
    used = b.submit(prompt(1), mix=tools.mix_of("a1"), max_tokens=20)
    b.submit(prompt(2), mix=tools.mix_of("a2"), max_tokens=2)
    b.submit(prompt(3), mix=tools.mix_of("a3"), max_tokens=2)
    for _ in range(4):
        b.engine.step()
    assert b.engine.holds(tools.digest_of("a2"))
    b.engine.unload(tools.digest_of("a2"))
    b.engine.unload(tools.digest_of("a1"))
    b.engine.step()
    assert not b.engine.holds(tools.digest_of("a2")) and b.engine.holds(tools.digest_of("a1"))
    b.engine.release_idle(1)
    b.engine.step()
    assert b.engine.stats()["slots"]["resident"] == [tools.digest_of("a1")]
    b.settle()
    assert used.reason == "length" and b.engine.stats()["slots"]["resident"] == [] and b.runner.adapters == {}


def test_stop_drains_and_then_ends_the_rest(bench: Any) -> None:
    b = bench()
    quick = b.submit(prompt(1), max_tokens=3)
    b.engine.start()
    assert b.engine.stop(5.0)
    assert quick.reason == "length" and b.engine.state == "stopped"
    with pytest.raises(NotReady):
        b.submit(prompt(2))
    b = bench()
    states: set[str] = set()

    def run_slowly(batch: Any) -> None:
        states.add(b.engine.state)
        time.sleep(0.01)

    b.runner.before = run_slowly
    slow = b.submit(prompt(1), max_tokens=240)
    b.engine.start()
    until(lambda: slow.tokens)
    began = time.monotonic()
    assert b.engine.stop(0.5)
    assert time.monotonic() - began < 2.0
    assert isinstance(slow.error, NotReady) and "draining" in states
    b.check_empty()


def test_listeners_are_woken_once_for_all_that_a_step_tells(bench: Any) -> None:
    heard: list[Any] = []
    known: list[int] = []
    b = bench(on_delivered=lambda: known.append(sum(len(h.tokens) for h in heard)))
    heard += [b.submit(prompt(i), max_tokens=5) for i in range(3)]
    b.engine.start()
    assert b.engine.stop(5.0)
    assert sorted(set(known)) == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("overlapped", [False, True])
def test_listeners_are_woken_for_ends_of_every_kind(bench: Any, overlapped: bool) -> None:
    heard: list[Any] = []
    ended: list[int] = []
    b = bench(on_delivered=lambda: ended.append(sum(h.reason is not None for h in heard)), overlapped=overlapped)

    def fail(batch: Any) -> None:
        raise RuntimeError("no step")

    b.runner.before = lambda batch: time.sleep(0.01)
    heard.append(b.submit(prompt(1), max_tokens=240))
    b.engine.start()
    until(lambda: heard[0].tokens)
    b.engine.cancel(heard[0].request.id)
    until(lambda: 1 in ended)
    heard.append(b.submit(prompt(2), deadline=time.monotonic()))
    until(lambda: 2 in ended)
    b.runner.before = fail
    heard.append(b.submit(prompt(3)))
    until(lambda: 3 in ended)
    b.runner.before = lambda batch: time.sleep(0.01)
    heard.append(b.submit(prompt(4), max_tokens=240))
    until(lambda: heard[3].tokens)
    b.engine.stop(0.0)
    assert ended[-1] == 4


def test_listeners_that_cannot_be_woken_harm_no_step(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> None:
        raise RuntimeError("the loop is closed")

    b = bench(on_delivered=gone)
    heard = b.submit(prompt(1), max_tokens=3)
    b.engine.start()
    assert b.engine.stop(5.0)
    assert heard.reason == "length" and b.engine.stats()["failures"] == 0 and "the loop is closed" in caplog.text


def test_a_stuck_step_can_be_seen_from_outside(bench: Any) -> None:
    b = bench()
    gate = threading.Event()
    b.runner.before = lambda batch: gate.wait(60)
    heard = b.submit(prompt(1), max_tokens=1)
    assert b.engine.stuck_for() == 0.0
    b.engine.start()
    assert until(lambda: (stuck := b.engine.stuck_for()) > 0.02 and stuck) < 5
    assert heard.request.id in b.engine.current_step()
    gate.set()
    b.engine.stop(2.0)
    assert b.engine.stuck_for() == 0.0 and heard.reason == "length"


def test_loads_of_the_less_urgent_do_not_lock_the_urgent_out(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch, max_batch=1)
    low = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}"), priority=1) for i in range(3)]
    b.engine.step()
    assert len(fetch.pending) == 2
    high = b.submit(prompt(9), mix=tools.mix_of("a9"))
    b.engine.step()
    assert len(fetch.pending) == 3
    fetch.finish(2)
    b.settle()
    assert high.reason == "length"
    while fetch.pending:
        fetch.finish()
        b.settle()
    assert all(h.reason == "length" for h in low)
    b.check_empty()


def test_what_has_come_for_the_less_urgent_is_given_up_when_the_urgent_lack_room_in_ram(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch)
    running = b.submit(prompt(5), max_tokens=40)
    low = b.submit(prompt(1), mix=tools.mix_of("a1"), priority=1)
    shared = b.submit(prompt(3), mix=tools.mix_of("a3"), priority=1)
    b.run_until(lambda: len(fetch.pending) == 2)
    loads = b.engine._scheduler.loader
    high = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}")) for i in (2, 3)]
    fetch.finish(0)
    b.engine.step()
    assert loads.has_weights(low.request) and high[0].request.state is State.LOADING
    views = [weakref.ref(loads._loads[low.request.mix].future)]
    b.engine.release_idle(1)
    b.engine.step()
    gc.collect()
    assert not loads.has_weights(low.request) and views[0]() is None, "its pins on RAM are gone"
    assert loads._loads.keys() == {h.request.mix for h in high}, "what an urgent one waits for too stays"
    fetch.ready = None
    while fetch.pending:
        fetch.finish()
    b.settle()
    assert all(h.reason == "length" for h in (running, low, shared, *high))
    assert low.request.admitted >= max(h.request.admitted for h in high)
    b.check_empty()


def lacks_ram_for_too_long(b: Any, mix: Mix) -> Any:
    """An urgent request whose load has lacked room for longer than the bench's age limit of 0.02 s."""
    heard = b.submit(prompt(9), mix=mix)
    b.engine.step()
    time.sleep(0.03)
    b.engine.release_idle(1)
    return heard


def test_the_less_urgent_stop_for_an_urgent_load_that_lacks_room_for_too_long(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a1"})
    b = bench(fetch=fetch, age_limit=0.02, context_length=256, blocks=128)
    low = b.submit(prompt(1), mix=tools.mix_of("a1"), priority=1, max_tokens=200)
    b.engine.step()
    high = lacks_ram_for_too_long(b, tools.mix_of("a2"))
    b.engine.step()
    assert low.request.state is State.QUEUED and not b.engine._slots.in_use
    fetch.finish()
    b.settle()
    assert high.reason == low.reason == "length" and low.tokens == tools.solo(low, b.runner.vocab)
    b.check_empty()


def test_copies_on_a_device_stay_and_are_run_on_when_ram_is_short(bench: Any, tools: Any) -> None:
    """They take none of it: neither do their slots fall idle for it, nor does anyone wait who runs on them."""
    fetch = tools.Fetcher(ready={"a1", "a2"})
    b = bench(
        fetch=fetch, adapter_memory=AdapterMemory(100, lambda w: 10), age_limit=0.02, context_length=256, blocks=128
    )
    b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.settle()
    low = b.submit(prompt(2), mix=tools.mix_of("a2"), priority=1, max_tokens=200)
    b.engine.step()
    read = lacks_ram_for_too_long(b, tools.mix_of("a3"))
    there, other = (b.submit(prompt(i), mix=tools.mix_of(name)) for i, name in ((4, "a1"), (5, "a4")))
    b.engine.step()
    assert low.request.state is there.request.state is State.RUNNING and b.engine.holds(tools.digest_of("a1"))
    assert not read.request.slots and not other.request.slots and tools.mix_of("a4") not in fetch.asked
    fetch.ready = None
    while fetch.pending:
        fetch.finish()
    b.settle()
    for heard in (low, read, there, other):
        assert heard.tokens == tools.solo(heard, b.runner.vocab)
    b.check_empty()


def test_a_mix_that_can_never_be_in_ram_any_more_is_told_so(bench: Any, tools: Any) -> None:
    def check_fits() -> None:
        raise NoRoom("others are pinned", "adapters")

    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch)
    lost = [b.submit(prompt(i), mix=tools.mix_of("a1", "a2")) for i in range(2)]
    other = b.submit(prompt(3), mix=tools.mix_of("a3"))
    for heard in lost:
        heard.request.check_fits = check_fits
    later = b.submit(prompt(4), mix=tools.mix_of("a4"))
    later.request.check_fits = check_fits
    b.engine.step()
    assert not any(h.reason for h in (*lost, other))
    b.engine.release_idle(1)
    b.engine.step()
    ended = [*lost, later]
    assert [(h.reason, type(h.error)) for h in ended] == [("error", NoRoom)] * 3 and not other.reason
    assert fetch.pending[0][1].cancelled(), "it stands in nobody's way"
    b.engine.release_idle(1)
    b.engine.step()
    assert not other.reason
    fetch.finish(1)
    b.settle()
    assert other.reason == "length"
    b.check_empty()


def test_what_is_in_ram_waits_for_no_place_among_those_that_are_read(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a60", "a61"})
    b = bench(fetch=fetch, max_batch=1, max_slots=2)
    for name in ("a60", "a61"):
        b.submit(prompt(1), mix=tools.mix_of(name))
    b.settle()
    b.engine.release_idle(1 << 30)
    cold = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}"), fair_key=f"a{i}") for i in range(8)]
    b.engine.step()
    assert len(fetch.pending) == 2, "two are read for each place of a batch"
    del fetch.known[tools.digest_of("a61")]
    gc.collect()
    warm = b.submit(prompt(9), mix=tools.mix_of("a60"), fair_key="a60")
    gone = b.submit(prompt(9), mix=tools.mix_of("a61"), fair_key="a61")
    b.settle()
    assert warm.reason == "length" and tools.mix_of("a61") not in fetch.asked[4:], "it has left RAM since"
    b.engine.cancel(gone.request.id)
    fetch.ready = None
    while fetch.pending:
        fetch.finish()
        b.settle()
    assert all(h.reason == "length" for h in cold)
    b.check_empty()


def test_an_evaluation_takes_no_place_of_a_client_of_its_own_task(bench: Any) -> None:
    b = bench(max_queue=4, max_batch=1)
    low = [b.submit(prompt(i), fair_key="t", priority=1) for i in range(4)]
    b.engine.step()
    low.append(b.submit(prompt(4), fair_key="t", priority=1))
    with pytest.raises(QueueFull):
        b.submit(prompt(5), fair_key="t", priority=1)
    high = [b.submit(prompt(10 + i), fair_key="t") for i in range(4)]
    b.engine.step()
    evicted = [h for h in low if h.reason]
    assert evicted == low[1:] and all(isinstance(h.error, QueueFull) for h in evicted)
    b.settle()
    assert all(h.reason == "length" for h in (*high, low[0]))
    b.check_empty()


def test_one_id_is_one_request(bench: Any, tools: Any) -> None:
    b = bench(fetch=(fetch := tools.Fetcher(ready=set())))
    first = b.submit(prompt(1))
    b.engine.step()
    b._ids = iter([0])
    second = b.submit(prompt(2), mix=tools.mix_of("a1"))
    b.settle()
    assert fetch.pending[0][1].cancelled()
    assert first.reason == "length" and second.reason == "error" and "already running" in str(second.error)
    b.check_empty()


def test_those_that_wait_long_for_room_do_so_in_the_queues_order(bench: Any) -> None:
    """Two fit at a time; of thirty that one key has put before, another's one waits for few."""
    b = bench(blocks=8, max_batch=8, age_limit=0.02, context_length=64)
    many = [b.submit(prompt(i, 24), max_tokens=8, fair_key="many") for i in range(30)]
    b.engine.step()
    one = b.submit(prompt(99, 24), max_tokens=8, fair_key="one")
    while not one.reason:
        time.sleep(0.03)  # all that wait are too old
        b.engine.step()
    assert sum(bool(heard.reason) for heard in many) < 15
    b.settle()
    b.check_empty()
