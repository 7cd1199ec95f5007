"""The engine on the fake runner: every answer is the one that the request gets alone, and every request ends once."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import server.engine.engine
from adapters.errors import NoRoom
from adapters.weights import Mix
from server.engine.engine import MAX_IDLE_SECONDS
from server.engine.policies import CpuSharing
from server.engine.request import State
from server.engine.step_stats import StepStats
from server.errors import DeadlineExceeded, EngineFailed, InvalidRequest, NoCapacity, NotReady, QueueFull
from server.model.gguf_vocabulary import from_gguf
from server.model.tokenizer import ModelTokenizer
from tests.server.engine.conftest import Panic, prompt
from tests.waiting import SECONDS, until

# -- answers


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
    assert request.first_token == first
    assert request.submitted <= request.admitted <= request.first_token <= request.finished
    b.check_empty()


def test_an_answer_keeps_its_first_space_after_words(tools: Any, spm_metadata: dict[str, Any]) -> None:
    text = ModelTokenizer(from_gguf(spm_metadata))
    b = tools.Bench(text)
    [other] = text.encode("other", add_bos=False)
    b.runner.before = lambda batch: 100 * torch.eye(text.size)[other]
    heard = [b.submit(prompt, max_tokens=2) for prompt in (text.encode("the"), text.encode(""))]
    b.settle()
    assert [h.tokens for h in heard] == [[other, other]] * 2
    assert [h.text for h in heard] == [" other other", "other other"]


def test_a_mixed_batch_gives_every_solo_answer(bench: Any, tools: Any) -> None:
    b = bench(max_step_tokens=16, blocks=80)
    mixes = [(), ("a1",), ("a2",), ("a1", "a2"), ("a3", "a4", "a5")]
    heard = [
        b.submit(prompt(i, 3 + 5 * (i % 7)), mix=tools.mix_of(*mixes[i % len(mixes)]), max_tokens=3 + i % 9)
        for i in range(24)
    ]
    digest = tools.digest_of("a1")
    heard += [b.submit(prompt(1), mix=Mix(((digest, weight),))) for weight in (0.5, 1.0, -1.0)]
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    assert len({tuple(h.tokens) for h in heard[-3:]}) == 3, "the weights of a mix matter"
    assert max(len(batch.mixes) for batch in b.runner.steps) > 5
    b.check_empty()


def test_sampled_answers_do_not_depend_on_the_batch(bench: Any) -> None:
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


def test_without_a_seed_answers_differ(bench: Any) -> None:
    b = bench()
    heard = [b.submit(prompt(1), temperature=2.0) for _ in range(4)]
    b.settle()
    assert len({tuple(h.tokens) for h in heard}) > 1


def test_decodes_run_in_every_step_beside_a_long_prefill(bench: Any) -> None:
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


@pytest.mark.parametrize("overlapped", [False, True])
def test_only_delivered_tokens_are_counted(bench: Any, overlapped: bool) -> None:
    b = bench(overlapped=overlapped)
    first = b.submit(prompt(1, 20), max_tokens=8)
    b.settle()
    second = b.submit(prompt(1, 20), max_tokens=8, stop_token_ids=(first.tokens[2],))
    b.settle()
    stats = b.engine.stats()
    assert second.reason == "stop"
    assert stats["generated"] == 8 + 3 and stats["prompt"] == 20 + 20 - b.engine._scheduler.kv.hits


def test_scored_prompts(bench: Any, tools: Any) -> None:
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


def test_end_tokens_and_stop_strings(bench: Any) -> None:
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


def test_the_eos_token_ends_unless_ignored_or_before_min_tokens(bench: Any, tools: Any) -> None:
    b = bench()
    b.runner.before = lambda batch: 100 * torch.eye(b.runner.vocab)[tools.EOS]
    ended = b.submit(prompt(1), ignore_eos=False)
    ignored = b.submit(prompt(2), ignore_eos=True, max_tokens=3)
    least = b.submit(prompt(3), ignore_eos=False, min_tokens=4)
    b.settle()
    assert ended.tokens == [tools.EOS] and ended.reason == "stop" and ended.text == ""
    assert ignored.tokens == [tools.EOS] * 3 and ignored.reason == "length" and ignored.text == ""
    assert len(least.tokens) == 5 and least.tokens[-1] == tools.EOS and tools.EOS not in least.tokens[:-1]


# -- prefix cache


def test_a_cached_prefix_saves_work_and_changes_no_answer(bench: Any, tools: Any) -> None:
    b = bench()
    shared = prompt(1, 40)
    first = b.submit([*shared, 5])
    b.settle()
    rows = sum(batch.rows for batch in b.runner.steps)
    second = b.submit([*shared, 6])
    b.settle()
    assert second.request.cached == 40
    assert sum(batch.rows for batch in b.runner.steps) - rows == 1 + 7
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (first, second))
    assert b.engine.stats()["prefix_cache"] == {"queried_tokens": 82, "found_tokens": 40}


def test_simultaneous_requests_compute_a_shared_prefix_once(bench: Any, tools: Any) -> None:
    b = bench(max_step_tokens=16)
    shared = prompt(1, 40)
    samples = [b.submit(shared, temperature=0.5, seed=i) for i in range(4)]
    labels = [b.submit([*shared, *label], scored=len(label)) for label in ([7], [8, 9], [7, 9, 11])]
    other = b.submit([*shared[:20], *prompt(2, 20)])
    b.settle()
    assert samples[0].request.cached == 0 and other.request.cached == 20
    assert all(h.request.cached >= 36 for h in (*samples[1:], *labels))
    assert sum(batch.rows for batch in b.runner.steps) <= 40 + 20 + 6 * 4 + 6 + 5 * 7
    assert other.tokens == tools.solo(other, b.runner.vocab)
    b.check_empty()


def test_a_request_that_waits_for_a_prefix_goes_on_when_its_owner_is_cancelled(bench: Any, tools: Any) -> None:
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
    assert second.request.state is State.RUNNING, "without a prefix cache nobody waits"
    b.settle()


@pytest.mark.parametrize("length", [8, 9, 12])
def test_the_last_prompt_token_is_always_computed(bench: Any, tools: Any, length: int) -> None:
    b = bench()
    for _ in range(2):
        heard = b.submit(prompt(1, length))
        b.settle()
        assert heard.tokens == tools.solo(heard, b.runner.vocab)
    assert heard.request.cached == (length - 1) // 4 * 4


def test_scored_prompts_share_the_prefix_before_the_scored_tokens(bench: Any) -> None:
    b = bench()
    tokens = prompt(1, 30)
    first = b.submit(tokens, scored=4)
    b.settle()
    second = b.submit(tokens, scored=6)
    b.settle()
    assert second.request.cached == (30 - 1 - 6) // 4 * 4
    assert [p.logprob for p in second.logprobs][2:] == [p.logprob for p in first.logprobs]


def test_tenants_and_mixes_do_not_share_prefixes(bench: Any, tools: Any) -> None:
    b = bench()
    for options in ({"tenant": "x"}, {"tenant": "y"}, {"mix": tools.mix_of("a1")}, {"tenant": "x"}):
        heard = b.submit(prompt(1, 20), **options)
        b.settle()
        assert heard.tokens == tools.solo(heard, b.runner.vocab)
        cached = heard.request.cached
    assert cached == 16 and b.engine.stats()["prefix_cache"]["found_tokens"] == 16


def test_one_request_may_take_every_block(bench: Any) -> None:
    b = bench(blocks=3)
    heard = b.submit(prompt(1, 12), max_tokens=1)
    b.settle()
    assert heard.reason == "length" and b.engine.stats()["kv_blocks"]["cached"] == 3


# -- adapter loads


def test_a_cold_load_starts_at_submission_and_is_cancelled_with_its_request(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch, max_queue=1, max_batch=1)
    cold = b.submit(prompt(1), mix=tools.mix_of("a1"))
    assert len(fetch.pending) == 1
    with pytest.raises(QueueFull):
        b.submit(prompt(2), mix=tools.mix_of("a2"))
    assert len(fetch.pending) == 1
    b.engine.cancel(cold.request.id)
    b.engine.step()
    assert cold.reason == "cancelled" and fetch.pending[0][1].cancelled()
    again = b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.engine.step()
    assert again.request.state is State.LOADING and len(fetch.asked) == 2
    fetch.finish(1)
    b.engine.step()
    later = b.submit(prompt(2), mix=tools.mix_of("a2"))
    b.engine.step()
    assert len(fetch.asked) == 2, "the batch is full"
    b.settle()
    fetch.finish(1)
    b.settle()
    resident = b.submit(prompt(2), mix=tools.mix_of("a2"))
    b.settle()
    assert len(fetch.asked) == 3 and all(h.reason == "length" for h in (again, later, resident))
    b.check_empty()


def test_a_load_for_a_rejected_request_is_cancelled(bench: Any, tools: Any) -> None:
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


def test_failures_of_adapters_fail_only_their_requests(bench: Any, tools: Any) -> None:
    """A load that fails, a fetch that raises, and a runner that refuses the weights."""
    fetch = tools.Fetcher(ready={"a1", "a3"})
    b = bench(fetch=fetch)
    b.runner.on_place = lambda weights: (_ for _ in ()).throw(MemoryError("no room")) if weights.name == "a3" else None
    bad, unknown, unplaced, good = (
        b.submit(prompt(i), mix=tools.mix_of(*names))
        for i, names in enumerate((("a2",), ("nobody",), ("a1", "a3"), ("a1",)))
    )
    b.engine.step()
    error = RuntimeError("half of it is missing")
    fetch.finish(error=error)
    b.settle()
    assert bad.error is error and isinstance(unknown.error, KeyError)
    assert isinstance(unplaced.error, EngineFailed) and "no room" not in unplaced.error.message
    assert good.tokens == tools.solo(good, b.runner.vocab)
    b.check_empty()


def test_loads_of_lower_priorities_do_not_lock_out_higher_ones(bench: Any, tools: Any) -> None:
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


def test_finished_loads_of_lower_priorities_release_ram_that_higher_ones_lack(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch)
    low, shared = (b.submit(prompt(i), mix=tools.mix_of(f"a{i}"), priority=1) for i in (1, 3))
    b.run_until(lambda: len(fetch.pending) == 2)
    loader = b.engine._scheduler.loader
    high = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}")) for i in (2, 3)]
    fetch.finish(0)
    b.engine.step()
    assert loader.has_weights(low.request) and high[0].request.state is State.LOADING
    future = weakref.ref(loader._loads[low.request.mix].future)
    b.engine.release_idle(1)
    b.engine.step()
    gc.collect()
    assert not loader.has_weights(low.request) and future() is None
    assert loader._loads.keys() == {h.request.mix for h in high}
    fetch.ready = None
    while fetch.pending:
        fetch.finish()
    b.settle()
    assert all(h.reason == "length" for h in (low, shared, *high))
    assert low.request.admitted >= max(h.request.admitted for h in high)
    b.check_empty()


def test_warm_loads_do_not_wait_for_cold_ones(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready={"a60", "a61"})
    b = bench(fetch=fetch, max_batch=1, max_slots=2)
    for name in ("a60", "a61"):
        b.submit(prompt(1), mix=tools.mix_of(name))
    b.settle()
    b.engine.release_idle(1 << 30)
    cold = [b.submit(prompt(i), mix=tools.mix_of(f"a{i}"), fair_key=f"a{i}") for i in range(8)]
    b.engine.step()
    assert len(fetch.pending) == 2
    del fetch.known[tools.digest_of("a61")]
    gc.collect()
    warm = b.submit(prompt(9), mix=tools.mix_of("a60"), fair_key="a60")
    gone = b.submit(prompt(9), mix=tools.mix_of("a61"), fair_key="a61")
    b.settle()
    assert warm.reason == "length" and tools.mix_of("a61") not in fetch.asked[4:], "it has left RAM"
    b.engine.cancel(gone.request.id)
    fetch.ready = None
    while fetch.pending:
        fetch.finish()
        b.settle()
    assert all(h.reason == "length" for h in cold)
    b.check_empty()


def test_a_mix_that_can_never_be_in_ram_ends_with_an_error(bench: Any, tools: Any) -> None:
    def check_fits() -> None:
        raise NoRoom("others are pinned", "adapters")

    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch)
    lost = [b.submit(prompt(i), mix=tools.mix_of("a1", "a2")) for i in range(2)]
    other = b.submit(prompt(3), mix=tools.mix_of("a3"))
    for heard in lost:
        heard.request.check_fits = check_fits
    b.engine.step()
    assert not any(h.reason for h in (*lost, other))
    b.engine.release_idle(1)
    b.engine.step()
    assert [(h.reason, type(h.error)) for h in lost] == [("error", NoRoom)] * 2 and not other.reason
    assert fetch.pending[0][1].cancelled()
    fetch.finish(1)
    b.settle()
    assert other.reason == "length"
    b.check_empty()


def test_unload_and_release_idle_empty_slots(bench: Any, tools: Any) -> None:
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


# -- queue


def test_impossible_requests_are_rejected_at_once(bench: Any, tools: Any) -> None:
    b = bench(blocks=8, context_length=1000, max_slots=2)
    assert b.engine.context_length == 32
    with pytest.raises(NoCapacity, match="kv-cache"):
        b.submit(prompt(1, 30), max_tokens=10)
    with pytest.raises(NoCapacity, match="max-slots"):
        b.submit(prompt(1), mix=tools.mix_of("a1", "a2", "a3"))
    with pytest.raises(InvalidRequest, match="990 prompt tokens and 20 .* context of 1000"):
        b.submit(prompt(1, 990), max_tokens=20)
    with pytest.raises(InvalidRequest, match="empty"):
        b.submit([])
    exact = b.submit(prompt(1, 25), max_tokens=8)
    b.settle()
    assert exact.tokens == tools.solo(exact, b.runner.vocab)


def test_a_full_queue_rejects_by_requests_and_by_tokens(bench: Any) -> None:
    for options, lengths in (({"max_queue": 3}, [10] * 3), ({"max_queue_tokens": 25}, [20])):
        b = bench(**options)
        for i, length in enumerate(lengths):
            b.submit(prompt(i, length))
        with pytest.raises(QueueFull) as refused:
            b.submit(prompt(4))
        assert refused.value.retry_after >= 1
        b.settle()
        b.submit(prompt(5, 40), max_tokens=2)  # alone it may exceed the tokens
        b.settle()
        b.check_empty()


def test_a_full_queue_makes_room_for_a_key_with_few_requests(bench: Any) -> None:
    b = bench(max_queue=6, max_batch=1)
    many = [b.submit(prompt(i), fair_key="many") for i in range(6)]
    few = b.submit(prompt(9), fair_key="few")
    with pytest.raises(QueueFull):
        b.submit(prompt(7), fair_key="many")
    b.settle()
    assert [h.reason for h in many] == ["length"] * 5 + ["error"] and few.reason == "length"
    assert isinstance(many[-1].error, QueueFull) and many[-1].error.retry_after >= 1
    b.check_empty()


def test_a_full_queue_makes_room_for_a_higher_priority(bench: Any) -> None:
    b = bench(max_queue=4, max_batch=1)
    low = [b.submit(prompt(i), fair_key="t", priority=1) for i in range(4)]
    b.engine.step()
    low.append(b.submit(prompt(4), fair_key="t", priority=1))
    with pytest.raises(QueueFull):
        b.submit(prompt(5), fair_key="t", priority=1)
    high = [b.submit(prompt(10 + i), fair_key="t") for i in range(4)]
    b.engine.step()
    rejected = [h for h in low if h.reason]
    assert rejected == low[1:] and all(isinstance(h.error, QueueFull) for h in rejected)
    b.settle()
    assert all(h.reason == "length" for h in (*high, low[0]))
    b.check_empty()


def test_evaluation_traffic_waits_for_all_others(bench: Any, tools: Any) -> None:
    b = bench(max_batch=2)
    low = [b.submit(prompt(i), priority=1, max_tokens=30) for i in range(3)]
    b.engine.step()
    high = [b.submit(prompt(10 + i), max_tokens=4) for i in range(4)]
    b.run_until(lambda: all(h.reason for h in high))
    assert not any(h.reason for h in low)
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (*low, *high))
    b.check_empty()


def test_a_large_mix_does_not_starve(bench: Any, tools: Any) -> None:
    """A mix needs all slots while requests for single adapters keep coming."""
    b = bench(max_slots=4, age_limit=0.02)
    singles: list[Any] = []

    def feed() -> None:
        while sum(not h.reason for h in singles) < 6:
            name = f"a{len(singles) % 4}"
            singles.append(b.submit(prompt(len(singles)), mix=tools.mix_of(name), fair_key=name, max_tokens=4))

    feed()
    b.engine.step()
    large = b.submit(prompt(1), mix=tools.mix_of("a4", "a5", "a6", "a7"), fair_key="large")
    b.engine._scheduler.waiting.charge(large.request, 1e6)  # fairness alone would let it wait
    end = time.monotonic() + SECONDS
    while not large.reason:
        feed()
        b.engine.step()
        assert time.monotonic() < end
    assert large.tokens == tools.solo(large, b.runner.vocab)
    b.settle()
    b.check_empty()


def test_starving_requests_are_admitted_in_queue_order(bench: Any) -> None:
    """Two fit at a time. One key has thirty requests, another one."""
    b = bench(blocks=8, max_batch=8, age_limit=0.02, context_length=64)
    many = [b.submit(prompt(i, 24), max_tokens=8, fair_key="many") for i in range(30)]
    b.engine.step()
    one = b.submit(prompt(99, 24), max_tokens=8, fair_key="one")
    while not one.reason:
        time.sleep(0.03)
        b.engine.step()
    assert sum(bool(heard.reason) for heard in many) < 15
    b.settle()
    b.check_empty()


def test_a_starving_request_that_fails_holds_up_nobody(bench: Any, tools: Any) -> None:
    b = bench(blocks=16, age_limit=0.02, context_length=64, prefix_cache=False)
    b.runner.on_place = lambda weights: (_ for _ in ()).throw(ValueError("cannot be placed"))
    running = b.submit(range(10, 30), max_tokens=30)
    b.engine.step()
    starving = b.submit(range(10, 60), mix=tools.mix_of("a7"), max_tokens=4)
    b.engine.step()
    time.sleep(0.05)
    behind = b.submit(range(10, 60), max_tokens=4)
    b.run_until(lambda: starving.reason == "error")
    assert running.reason == "length"
    b.run_until(lambda: behind.reason == "length")
    b.check_empty()


# -- ends


def test_cancel_in_every_state(bench: Any, tools: Any) -> None:
    fetch = tools.Fetcher(ready=set())
    b = bench(fetch=fetch, max_batch=1)
    running = b.submit(prompt(1), max_tokens=100)
    b.engine.step()
    loading, queued = b.submit(prompt(2), mix=tools.mix_of("a1"), fair_key="x"), b.submit(prompt(3), fair_key="y")
    b.engine.step()
    arriving = b.submit(prompt(4))
    for heard in (running, queued, arriving, loading):
        b.engine.cancel(heard.request.id)
        b.engine.step()
        assert heard.reason == "cancelled"
    assert fetch.pending[0][1].cancelled()
    b.engine.cancel(running.request.id)
    b.engine.cancel("unknown")
    b.settle()
    b.check_empty()


def test_deadlines_in_every_state(bench: Any, tools: Any) -> None:
    b = bench(fetch=tools.Fetcher(ready=set()), max_batch=1)
    running = b.submit(prompt(1), max_tokens=240)
    b.engine.step()
    now = time.monotonic()
    waits = {"running": 0.06, "queued": 0.02, "loading": 0.04}
    queued = b.submit(prompt(2), deadline=now + waits["queued"])
    loading = b.submit(prompt(3), mix=tools.mix_of("a1"), deadline=now + waits["loading"])
    running.request.deadline = now + waits["running"]
    b.runner.before = lambda batch: time.sleep(0.005)
    b.run_until(lambda: all(h.reason for h in (running, queued, loading)))
    assert all(isinstance(h.error, DeadlineExceeded) for h in (running, queued, loading))
    assert [str(h.error).split()[-1] for h in (running, queued, loading)] == ["running", "waiting", "waiting"]
    assert queued.request.finished <= loading.request.finished <= running.request.finished
    assert all(h.request.finished >= h.request.deadline for h in (running, queued, loading))
    assert 0 < len(running.tokens) < 240
    b.check_empty()


@pytest.mark.parametrize(
    ("kind", "error"), [(RuntimeError, EngineFailed), (Panic, EngineFailed), (NoCapacity, NoCapacity)]
)
def test_a_failed_step_spares_waiting_requests(
    bench: Any, tools: Any, kind: type[BaseException], error: type[Exception]
) -> None:
    b = bench(max_batch=2)
    before = b.submit(prompt(9, 12))
    b.settle()
    heard = [b.submit(prompt(i), mix=tools.mix_of("a1")) for i in range(4)]

    def explode(batch: Any) -> None:
        b.runner.before = lambda batch: None
        raise kind("kernel")

    b.runner.before = explode
    b.engine.start()
    until(lambda: all(h.reason for h in heard))
    assert [h.reason for h in heard] == ["error", "error", "length", "length"]
    assert all(type(h.error) is error for h in heard[:2])
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard[2:])
    assert b.engine.stats()["failures"] == 1 and b.engine.state == "running"
    again = b.submit(before.request.prompt)
    until(lambda: again.reason)
    assert again.tokens == before.tokens
    assert (again.request.cached > 0) == (kind is NoCapacity), "the prefix cache is cleared after other errors"
    assert b.engine.stop(1.0)
    b.check_empty()


def test_adapters_are_loaded_again_after_a_failed_step(bench: Any, tools: Any) -> None:
    b = bench()
    b.submit(prompt(1), mix=tools.mix_of("a1"))
    b.engine.step()
    b.engine._recover(RuntimeError("kernel"))
    assert not b.engine.stats()["slots"]["resident"] and not b.runner.adapters


def test_if_scheduling_fails_all_requests_end(bench: Any) -> None:
    b = bench()
    heard = b.submit(prompt(1))
    b.engine._scheduler._admit = lambda now, output: 1 / 0
    b.engine.start()
    until(lambda: heard.reason)
    assert isinstance(heard.error, EngineFailed)
    b.engine.stop()


def test_a_failed_recovery_is_a_fatal_error(bench: Any) -> None:
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


def test_a_row_that_is_not_finite_fails_alone_and_is_not_cached(bench: Any, tools: Any) -> None:
    b = bench()
    good, bad = b.submit(prompt(1, 12)), b.submit(prompt(2, 12), temperature=1.0)
    added = torch.zeros(2, b.runner.vocab)
    added[1, 7] = math.nan
    b.runner.before = lambda batch: added
    b.engine.step()
    b.runner.before = lambda batch: None
    b.settle()
    assert isinstance(bad.error, EngineFailed) and good.tokens == tools.solo(good, b.runner.vocab)
    again = b.submit(prompt(2, 12))
    b.settle()
    assert again.request.cached == 0
    b.check_empty()


def test_a_duplicate_id_is_rejected(bench: Any, tools: Any) -> None:
    b = bench(fetch=(fetch := tools.Fetcher(ready=set())))
    first = b.submit(prompt(1))
    b.engine.step()
    b._ids = iter([0])
    second = b.submit(prompt(2), mix=tools.mix_of("a1"))
    b.settle()
    assert fetch.pending[0][1].cancelled()
    assert first.reason == "length" and second.reason == "error" and "already running" in str(second.error)
    b.check_empty()


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


# -- the thread


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


def test_listeners_are_notified_once_per_step(bench: Any) -> None:
    heard: list[Any] = []
    known: list[int] = []
    b = bench(on_delivered=lambda: known.append(sum(len(h.tokens) for h in heard)))
    heard += [b.submit(prompt(i), max_tokens=5) for i in range(3)]
    b.engine.start()
    assert b.engine.stop(5.0)
    assert sorted(set(known)) == [0, 3, 6, 9, 12, 15]


@pytest.mark.parametrize("overlapped", [False, True])
def test_listeners_are_notified_of_every_kind_of_end(bench: Any, overlapped: bool) -> None:
    heard: list[Any] = []
    ended: list[int] = []
    b = bench(on_delivered=lambda: ended.append(sum(h.reason is not None for h in heard)), overlapped=overlapped)
    b.runner.before = lambda batch: time.sleep(0.01)
    heard.append(b.submit(prompt(1), max_tokens=240))
    b.engine.start()
    until(lambda: heard[0].tokens)
    b.engine.cancel(heard[0].request.id)
    until(lambda: 1 in ended)
    heard.append(b.submit(prompt(2), deadline=time.monotonic()))
    until(lambda: 2 in ended)
    b.runner.before = lambda batch: 1 / 0
    heard.append(b.submit(prompt(3)))
    until(lambda: 3 in ended)
    b.runner.before = lambda batch: time.sleep(0.01)
    heard.append(b.submit(prompt(4), max_tokens=240))
    until(lambda: heard[3].tokens)
    b.engine.stop(0.0)
    assert ended[-1] == 4


def test_a_failed_notification_harms_no_step(bench: Any, caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> None:
        raise RuntimeError("the loop is closed")

    b = bench(on_delivered=gone)
    heard = b.submit(prompt(1), max_tokens=3)
    b.engine.start()
    assert b.engine.stop(5.0)
    assert heard.reason == "length" and b.engine.stats()["failures"] == 0 and "the loop is closed" in caplog.text


def test_a_stuck_step_is_visible_from_outside(bench: Any) -> None:
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


@pytest.mark.parametrize("suspended", [False, True])
def test_the_thread_idles_after_steps_while_it_shares_the_cpu(
    bench: Any, monkeypatch: pytest.MonkeyPatch, suspended: bool
) -> None:
    idle: list[float] = []
    monkeypatch.setattr(server.engine.engine, "time", SimpleNamespace(monotonic=time.monotonic, sleep=idle.append))
    if suspended:  # the process was suspended for an hour during each step
        hour = property(lambda stats: 3600.0, lambda stats, seconds: None)
        monkeypatch.setattr(StepStats, "last_seconds", hour, raising=False)
    b = bench()
    b.engine.share_cpu(True)
    heard = b.submit(prompt(1), max_tokens=5)
    b.engine.start()
    assert b.engine.stop(5.0)
    stats = b.engine.stats()
    assert heard.reason == "length" and len(idle) == stats["steps"]
    if suspended:
        assert set(idle) == {MAX_IDLE_SECONDS}
    else:
        assert sum(idle) == pytest.approx(CpuSharing.MAX_IDLE * stats["seconds"])
