"""The overlapped engine, on a device that is read a step later, answers as the plain engine."""

from __future__ import annotations

import math
import random
import time
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.request import State
from server.errors import DeadlineExceeded, EngineFailed, NoCapacity
from tests.server.engine.conftest import Panic
from tests.waiting import until


class Even:
    """A constraint that depends on every token before: tokens alternate between even and odd."""

    def __init__(self, vocab: int) -> None:
        self.vocab, self.taken = vocab, 0

    def mask(self) -> np.ndarray:
        return np.packbits(np.arange(self.vocab) % 2 == self.taken % 2, bitorder="little")

    def accept(self, token: int) -> None:
        assert token % 2 == self.taken % 2
        self.taken += 1


def submit_all(b: Any, tools: Any, seed: int, kinds: list[dict[str, Any]], count: int = 14) -> list[Any]:
    """Submit requests of the given kinds, some with a common prefix, between steps."""
    rng = random.Random(seed)
    heard = []
    for i in range(count):
        options = dict(kinds[i % len(kinds)])
        if options.pop("constrained", False):
            options["constraint"] = Even(b.runner.vocab)
        prompt = [3 + rng.randrange(3)] * 6 + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 20))]
        names = rng.choice([(), ("a1",), ("a1", "a2"), ("a3",)])
        options = {"max_tokens": rng.randrange(1, 12), "seed": i} | options
        heard.append(b.submit(prompt, mix=tools.mix_of(*names), **options))
        for _ in range(rng.randrange(3)):
            b.engine.step()
    return heard


SIMPLE: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0, "ignore_eos": False},
    {"temperature": 3.0, "stop_token_ids": tuple(range(3, 90))},
    {"temperature": 1.5, "stop": ("a", "e", "t")},
    {"temperature": 1.0, "min_tokens": 4, "stop_token_ids": tuple(range(3, 200)), "max_tokens": 9},
]
OTHERS: list[dict[str, Any]] = [
    *SIMPLE[:3],
    {"logprobs": 2, "max_tokens": 3},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
    {"constrained": True},
    {"scored": 2},
]


@pytest.mark.parametrize(
    ("kinds", "options"),
    [
        (SIMPLE, {}),
        (SIMPLE, {"blocks": 14, "max_batch": 5, "max_step_tokens": 9}),
        ([{"priority": 1, "max_tokens": 11}, *SIMPLE], {"max_batch": 2}),
        (OTHERS, {}),
        (OTHERS, {"blocks": 14, "max_batch": 4, "max_slots": 3, "max_step_tokens": 8}),
    ],
    ids=["simple", "few-blocks", "priorities", "others", "others-few-blocks"],
)
def test_answers_equal_those_of_the_plain_engine(
    bench: Any, tools: Any, kinds: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    preempted = 0
    for seed in range(4):
        answers = []
        for overlapped in (True, False):
            b = bench(overlapped=overlapped, late=True, **options)
            heard = submit_all(b, tools, seed, kinds)
            b.settle()
            b.check_empty()
            preempted += b.engine.stats()["preemptions"]
            assert all(h.request.state is State.DONE for h in heard)
            answers.append([(h.tokens, h.text, h.reason, h.logprobs, h.request.output) for h in heard])
        assert answers[0] == answers[1]
    assert (preempted > 0) == bool(options)


def test_a_step_is_launched_before_the_previous_one_is_read(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True)
    heard = [b.submit([5, 6, 7 + i], max_tokens=6) for i in range(3)]
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    assert b.runner.events == [
        ("run", 0),
        *(event for n in range(5) for event in (("run", n + 1), ("read", n))),
        ("read", 5),
    ], "there is no step after the last tokens"
    assert b.engine.stats()["steps"] == 6


def test_a_request_that_needs_more_than_tokens_makes_its_step_synchronous(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True)
    long = b.submit([5, 6, 7], max_tokens=6)
    b.engine.step()
    short = b.submit([5, 6, 8], max_tokens=2, logprobs=0)
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (long, short)) and len(short.logprobs) == 2
    assert b.runner.events[:6] == [("run", 0), ("run", 1), ("read", 0), ("read", 1), ("run", 2), ("read", 2)]
    assert b.runner.events[6:] == [("run", 3), ("run", 4), ("read", 3), ("run", 5), ("read", 4), ("read", 5)]


def test_requests_that_arrive_while_the_device_computes_are_in_the_next_step(
    bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(overlapped=True)
    first = b.submit([5, 6, 7], max_tokens=3)
    b.engine.step()
    late: list[Any] = []
    monkeypatch.setattr(
        b.runner, "wait_until_nearly_done", lambda: late or late.append(b.submit([5, 6, 8], max_tokens=2))
    )
    b.engine.step()
    assert [batch.sequences for batch in b.runner.steps] == [1, 2]
    b.settle()
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in (first, *late))


def test_the_first_token_has_one_time_and_may_have_id_0(bench: Any) -> None:
    b = bench(overlapped=True)
    b.runner.before = lambda batch: 100 * torch.eye(b.runner.vocab)[0]
    heard = b.submit([5, 6, 7], max_tokens=4)
    b.engine.step()
    b.engine.step()
    first = heard.request.first_token
    b.settle()
    assert heard.tokens == heard.request.output == [0] * 4 and heard.request.first_token == first


def test_the_device_is_waited_for_when_no_step_follows(bench: Any) -> None:
    b = bench(overlapped=True)
    waits: list[bool] = []
    b.runner.wait = lambda: waits.append(True)
    b.submit([5, 6, 7], max_tokens=2)
    b.settle()
    assert len(waits) == 1
    b.submit([5, 6, 7], max_tokens=9)
    b.engine.step()
    assert b.engine.stop() and len(waits) == 2


@pytest.mark.parametrize("end", ["cancel", "deadline", "failure", "stop"])
def test_a_request_that_ends_while_its_token_is_unknown_keeps_no_placeholder(bench: Any, tools: Any, end: str) -> None:
    b = bench(overlapped=True)
    ended, other = b.submit([5, 6, 7]), b.submit([5, 6, 8])
    for _ in range(3):
        b.engine.step()
    assert len(ended.tokens) == 2 and len(ended.request.output) == 3 and ended.request.output[-1] < 0
    if end == "cancel":
        b.engine.cancel(ended.request.id)
    elif end == "deadline":
        ended.request.deadline = time.monotonic()
        b.engine._scheduler._next_deadline = 0.0
    elif end == "failure":
        b.engine._recover(RuntimeError("kernel"))
    else:
        b.engine._end_all()
    if end != "stop":
        b.settle()
    delivered = 3 if end in ("failure", "stop") else 2  # the pending step is still read then
    assert ended.request.output == ended.tokens == tools.solo(ended, b.runner.vocab, delivered)
    assert ended.reason == ("cancelled" if end == "cancel" else "error")
    assert end != "deadline" or isinstance(ended.error, DeadlineExceeded)
    if end in ("cancel", "deadline"):
        assert other.tokens == tools.solo(other, b.runner.vocab)
    again = b.submit([5, 6, 7])
    b.settle()
    assert again.tokens == tools.solo(again, b.runner.vocab)
    b.check_empty()


def fail_step(b: Any, error: BaseException, part: str = "run") -> None:
    """Let the next step fail before anything is computed (run) or after it (sample)."""

    def fails(*_: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)) as raised:
        if part == "run":
            patch.setattr(b.runner, "before", fails)
        else:
            patch.setattr(b.engine._sampler, "sample_async" if hasattr(b.engine, "_pending") else "sample", fails)
        b.engine.step()
    b.engine._recover(raised.value)


def test_an_answer_is_complete_although_the_step_after_its_last_token_fails(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True)
    complete, other = b.submit([5, 6, 7], max_tokens=2), b.submit([5, 6, 8])
    for _ in range(2):
        b.engine.step()
    fail_step(b, NoCapacity("no memory for a step"))
    assert (complete.reason, complete.tokens) == ("length", tools.solo(complete, b.runner.vocab))
    assert (other.reason, other.tokens) == ("error", tools.solo(other, b.runner.vocab, 2))
    assert isinstance(other.error, NoCapacity)
    b.check_empty()


@pytest.mark.parametrize("part", ["run", "sample"])
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_prompt_that_exceeds_the_memory_ends_alone(bench: Any, tools: Any, overlapped: bool, part: str) -> None:
    b = bench(overlapped=overlapped, max_batch=2)
    decoding = b.submit([5, 6, 7], mix=tools.mix_of("a1"), max_tokens=9)
    for _ in range(3):
        b.engine.step()
    prompt, waiting = b.submit([5, 6, 8, 9]), b.submit([5, 6, 9])
    fail_step(b, NoCapacity("no memory for a step"), part)
    assert isinstance(prompt.error, NoCapacity) and not prompt.tokens and decoding.reason is None
    assert b.engine.holds(tools.digest_of("a1"))
    b.settle()
    for heard in (decoding, waiting):
        assert (heard.reason, heard.tokens) == ("length", tools.solo(heard, b.runner.vocab))
    b.check_empty()


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_if_the_pending_tokens_are_lost_too_all_running_requests_end(
    bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    b = bench(overlapped=True)
    decoding = b.submit([5, 6, 7], max_tokens=9)
    for _ in range(2):
        b.engine.step()
    prompt = b.submit([5, 6, 8, 9])

    def lost(samples: Any) -> Any:
        raise kind("they cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(tools.LateTokens, "read", lost)
        fail_step(b, NoCapacity("no memory for a step"))
    for heard in (decoding, prompt):
        assert isinstance(heard.error, EngineFailed) and heard.request.output == heard.tokens
    b.check_empty()

    again = b.submit([5, 6, 7])
    b.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(tools.LateTokens, "read", lost)
        b.engine._end_all()
    assert again.reason == "error" and again.request.output == again.tokens


def test_a_failure_while_reading_is_attributed_to_the_earlier_step(
    bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(overlapped=True, fetch=(fetch := tools.Fetcher(ready=set())))
    first = b.submit([5, 6, 7], max_tokens=2)
    seen: list[str] = []
    read = tools.LateTokens.read

    def reading(samples: Any) -> Any:
        seen.append(b.engine.current_step())
        return read(samples)

    monkeypatch.setattr(tools.LateTokens, "read", reading)
    monkeypatch.setattr(b.runner, "wait_until_nearly_done", lambda: seen.append(b.engine.current_step()))
    b.settle()
    assert all(first.request.id in step for step in seen) and len(seen) == 4
    assert b.engine.current_step() == "no step"

    gone, waiting = b.submit([5, 6, 7]), b.submit([5, 6, 8], mix=tools.mix_of("a1"))
    b.engine.step()
    b.engine.cancel(gone.request.id)
    monkeypatch.setattr(tools.LateTokens, "read", lambda samples: 1 / 0)
    with pytest.raises(ZeroDivisionError) as raised:
        b.engine.step()
    b.engine._recover(raised.value)
    assert f"a step failed: a step of 3 rows: {gone.request.id}" in caplog.text
    assert gone.reason == "cancelled" and waiting.reason is None
    monkeypatch.setattr(tools.LateTokens, "read", read)
    fetch.finish()
    b.settle()
    assert waiting.reason == "length"
    b.check_empty()


def test_a_request_whose_last_token_is_pending_holds_no_place(bench: Any, tools: Any) -> None:
    for overlapped in (True, False):
        b = bench(overlapped=overlapped, max_batch=2)
        heard = [b.submit([5, 6, 7 + i], max_tokens=12 if i == 0 else 2) for i in range(6)]
        b.settle()
        assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
        assert [batch.sequences for batch in b.runner.steps] == [2] * 10 + [1] * 2
        b.check_empty()


def test_a_request_whose_last_token_is_pending_allocates_no_block(bench: Any) -> None:
    b = bench(overlapped=True, prefix_cache=False, block_size=4, blocks=8)
    b.submit([5, 6, 7], max_tokens=2)
    for _ in range(2):
        b.engine.step()
    b.submit([5, 6], max_tokens=2)
    used: list[int] = []
    b.runner.before = lambda batch: used.append(b.engine.stats()["kv_blocks"]["used"])
    b.engine.step()
    assert used == [2]


def test_the_pending_step_is_read_before_a_preemption(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True, blocks=7)
    heard = [b.submit([3 + i, 40 + i, 9, 100 + i], max_tokens=6) for i in range(4)]
    b.settle()
    assert b.engine.stats()["preemptions"] > 0
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    b.check_empty()


@pytest.mark.parametrize("others", [{}, {"logprobs": 1}], ids=["asynchronous", "synchronous"])
def test_the_surplus_row_of_an_ended_answer_is_ignored(
    bench: Any, tools: Any, others: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    b = bench(overlapped=True)
    first = b.submit([5, 6], max_tokens=3)
    b.settle()
    assert len(set(first.tokens)) == 3
    early = b.submit([5, 6], stop_token_ids=(first.tokens[1],))
    for _ in range(2):
        b.engine.step()
    late = b.submit([9, 8], max_tokens=3, **others)
    b.settle()
    assert (early.reason, early.tokens, early.request.output) == ("stop", first.tokens[:2], first.tokens[:2])
    assert (late.reason, late.tokens) == ("length", tools.solo(late, b.runner.vocab))
    assert not caplog.messages
    b.check_empty()


def test_a_row_that_is_not_finite_ends_its_request_alone(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True, prefix_cache=False)
    bad, good = b.submit([5, 6, 7]), b.submit([5, 6, 8])
    b.engine.step()
    b.runner.before = lambda batch: torch.tensor([[math.nan], [0.0]])
    b.engine.step()
    b.runner.before = lambda batch: None
    b.settle()
    assert isinstance(bad.error, EngineFailed) and bad.request.output == bad.tokens and len(bad.tokens) == 1
    assert good.tokens == tools.solo(good, b.runner.vocab)
    b.check_empty()


def test_after_a_failed_step_a_working_device_is_used_again(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True)
    bad = b.submit([5, 6, 7])
    b.engine.step()
    b.engine._recover(torch.OutOfMemoryError("one step"))
    assert isinstance(bad.error, EngineFailed) and b.engine.fatal_error() is None
    good = b.submit([5, 6, 8])
    b.settle()
    assert good.tokens == tools.solo(good, b.runner.vocab)


def test_a_device_that_stays_broken_is_a_fatal_error(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.step_stats.FAILING_SECONDS", 0.0)
    b = bench(overlapped=True)
    bad = b.submit([5, 6, 7])
    b.runner.fault = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails(batch: Any) -> None:
        raise b.runner.fault

    b.runner.before = fails
    b.engine.start()
    try:
        assert "an illegal memory access" in until(b.engine.fatal_error)
        assert isinstance(bad.error, EngineFailed) and b.engine.state == "failing"
    finally:
        b.engine.stop()


def test_tokens_are_delivered_before_idle_time(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True)
    b.engine.share_cpu(True)
    heard = b.submit([5, 6, 7], max_tokens=3)
    for count in (1, 2, 3):
        b.engine.step()
        assert len(heard.tokens) == count
    request = heard.request
    assert heard.tokens == tools.solo(heard, b.runner.vocab)
    assert request.submitted <= request.admitted <= request.first_token <= request.finished
