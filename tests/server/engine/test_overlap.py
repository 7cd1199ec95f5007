"""The overlapped engine on a device that is read a step later: each request hears what the plain engine tells it."""

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
from tests.waiting import SECONDS


class Even:
    """A constraint: ids of the same parity as the number of those before. The mask needs every token there was."""

    def __init__(self, vocab: int) -> None:
        self.vocab, self.taken = vocab, 0

    def mask(self) -> np.ndarray:
        return np.packbits(np.arange(self.vocab) % 2 == self.taken % 2, bitorder="little")

    def accept(self, token: int) -> None:
        assert token % 2 == self.taken % 2
        self.taken += 1


def submit_all(made: Any, tools: Any, seed: int, kinds: list[dict[str, Any]], count: int = 14) -> list[Any]:
    """Requests of the given kinds, some of which share how they begin, at the same steps of either engine."""
    rng = random.Random(seed)
    heard = []
    for i in range(count):
        options = dict(kinds[i % len(kinds)])
        if options.pop("constrained", False):
            options["constraint"] = Even(made.runner.vocab)
        prompt = [3 + rng.randrange(3)] * 6 + [rng.randrange(3, 250) for _ in range(rng.randrange(1, 20))]
        names = rng.choice([(), ("a1",), ("a1", "a2"), ("a3",)])
        options = {"max_tokens": rng.randrange(1, 12), "seed": i} | options
        heard.append(made.submit(prompt, mix=tools.mix_of(*names), **options))
        for _ in range(rng.randrange(3)):
            made.engine.step()
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
def test_answers_are_those_of_the_plain_engine(
    bench: Any, tools: Any, kinds: list[dict[str, Any]], options: dict[str, Any]
) -> None:
    preempted = 0
    for seed in range(4):
        told = []
        for overlapped in (True, False):
            made = bench(overlapped=overlapped, late=True, **options)
            heard = submit_all(made, tools, seed, kinds)
            made.settle()
            made.check_empty()
            preempted += made.engine.stats()["preemptions"]
            assert all(h.request.state is State.DONE for h in heard)
            told.append([(h.tokens, h.text, h.reason, h.logprobs, h.request.output) for h in heard])
        assert told[0] == told[1]
    assert (preempted > 0) == bool(options), "for blocks, or for a more urgent request"


def test_a_step_is_launched_before_the_one_before_is_read(bench: Any, tools: Any) -> None:
    made = bench(overlapped=True)
    heard = [made.submit([5, 6, 7 + i], max_tokens=6) for i in range(3)]
    made.settle()
    assert all(h.tokens == tools.solo(h, made.runner.vocab) for h in heard)
    assert made.runner.events == [
        ("run", 0),
        *(event for n in range(5) for event in (("run", n + 1), ("read", n))),
        ("read", 5),
    ], "the last tokens are known to be the last: no step too many"
    assert made.engine.stats()["steps"] == 6


def test_the_first_token_comes_once_and_a_token_of_id_0_is_one(bench: Any) -> None:
    made = bench(overlapped=True)
    made.runner.before = lambda batch: 100 * torch.eye(made.runner.vocab)[0]
    heard = made.submit([5, 6, 7], max_tokens=4)
    made.engine.step()
    made.engine.step()
    first = heard.request.first_token
    made.settle()
    assert heard.tokens == heard.request.output == [0] * 4 and heard.request.first_token == first


def test_a_device_is_waited_for_when_nothing_follows_and_at_the_end(bench: Any) -> None:
    made = bench(overlapped=True)
    waited: list[bool] = []
    made.runner.wait = lambda: waited.append(True)
    made.submit([5, 6, 7], max_tokens=2)
    made.settle()
    assert len(waited) == 1
    made.submit([5, 6, 7], max_tokens=9)
    made.engine.step()
    assert made.engine.stop() and len(waited) == 2


def test_a_step_that_must_be_read_at_once_is(bench: Any, tools: Any) -> None:
    """And the ones after it are planned ahead again."""
    made = bench(overlapped=True)
    long = made.submit([5, 6, 7], max_tokens=6)
    made.engine.step()
    short = made.submit([5, 6, 8], max_tokens=2, logprobs=0)
    made.settle()
    assert long.tokens == tools.solo(long, made.runner.vocab) and short.tokens == tools.solo(short, made.runner.vocab)
    assert len(short.logprobs) == 2
    assert made.runner.events[:6] == [("run", 0), ("run", 1), ("read", 0), ("read", 1), ("run", 2), ("read", 2)]
    assert made.runner.events[6:] == [("run", 3), ("run", 4), ("read", 3), ("run", 5), ("read", 4), ("read", 5)]


def test_what_arrives_before_the_next_step_has_to_be_planned_is_in_it(
    bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(overlapped=True)
    first = made.submit([5, 6, 7], max_tokens=3)
    made.engine.step()
    late: list[Any] = []

    def wait_until_nearly_done() -> None:
        if not late:
            late.append(made.submit([5, 6, 8], max_tokens=2))

    monkeypatch.setattr(made.runner, "wait_until_nearly_done", wait_until_nearly_done)
    made.engine.step()
    assert [batch.sequences for batch in made.runner.steps] == [1, 2]
    made.settle()
    for heard in (first, *late):
        assert heard.tokens == tools.solo(heard, made.runner.vocab)
    assert made.runner.events == [("run", 0), ("run", 1), ("read", 0), ("run", 2), ("read", 1), ("read", 2)]


@pytest.mark.parametrize("how", ["cancel", "deadline", "failure", "stop"])
def test_what_ends_while_its_token_is_on_its_way_has_no_trace_of_it(bench: Any, tools: Any, how: str) -> None:
    made = bench(overlapped=True)
    ended, other = made.submit([5, 6, 7]), made.submit([5, 6, 8])
    for _ in range(3):
        made.engine.step()
    assert len(ended.tokens) == 2 and len(ended.request.output) == 3 and ended.request.output[-1] < 0
    if how == "cancel":
        made.engine.cancel(ended.request.id)
    elif how == "deadline":
        ended.request.deadline = time.monotonic()
        made.engine._scheduler._next_deadline = 0.0
    elif how == "failure":
        made.engine._recover(RuntimeError("kernel"))
    else:
        made.engine._end_all()
    if how != "stop":
        made.settle()
    # What was drawn before a step failed, or the engine stopped, is told still.
    told = 3 if how in ("failure", "stop") else 2
    assert ended.request.output == ended.tokens == tools.solo(ended, made.runner.vocab, told)
    assert ended.reason == ("cancelled" if how == "cancel" else "error")
    assert how != "deadline" or isinstance(ended.error, DeadlineExceeded)
    if how in ("cancel", "deadline"):
        assert other.tokens == tools.solo(other, made.runner.vocab)
    again = made.submit([5, 6, 7])
    made.settle()
    assert again.tokens == tools.solo(again, made.runner.vocab)
    made.check_empty()


def failing(made: Any, error: Exception, part: str = "run") -> None:
    """The next step fails by `error`, as in the engine's thread: before anything is computed, or when all is."""

    def fails(*_: Any) -> None:
        raise error

    with pytest.MonkeyPatch.context() as patch, pytest.raises(type(error)) as raised:
        if part == "run":
            patch.setattr(made.runner, "before", fails)
        else:
            patch.setattr(made.engine._sampler, "sample_async" if hasattr(made.engine, "_pending") else "sample", fails)
        made.engine.step()
    made.engine._recover(raised.value)


def test_an_answer_whose_last_token_is_on_its_way_is_whole_though_the_next_step_fails(bench: Any, tools: Any) -> None:
    made = bench(overlapped=True)
    whole, other = made.submit([5, 6, 7], max_tokens=2), made.submit([5, 6, 8])
    for _ in range(2):
        made.engine.step()
    failing(made, NoCapacity("no memory for a step"))
    assert (whole.reason, whole.tokens) == ("length", tools.solo(whole, made.runner.vocab))
    assert (other.reason, other.tokens) == ("error", tools.solo(other, made.runner.vocab, 2))
    assert isinstance(other.error, NoCapacity)
    made.check_empty()


@pytest.mark.parametrize("part", ["run", "draw"])
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_prompt_that_memory_lacks_for_ends_alone(bench: Any, tools: Any, overlapped: bool, part: str) -> None:
    """Those that answer go on, on their keys, values and adapters, and what waits is served."""
    made = bench(overlapped=overlapped, max_batch=2)
    answering = made.submit([5, 6, 7], mix=tools.mix_of("a1"), max_tokens=9)
    for _ in range(3):
        made.engine.step()
    prompt, waiting = made.submit([5, 6, 8, 9]), made.submit([5, 6, 9])
    failing(made, NoCapacity("no memory for a step"), part)
    assert isinstance(prompt.error, NoCapacity) and not prompt.tokens and answering.reason is None
    assert made.engine.holds(tools.digest_of("a1"))
    made.settle()
    for heard in (answering, waiting):
        assert (heard.reason, heard.tokens) == ("length", tools.solo(heard, made.runner.vocab))
    made.check_empty()


@pytest.mark.parametrize("kind", [RuntimeError, Panic])
def test_where_the_tokens_of_the_step_before_are_lost_too_nobody_goes_on_without_them(
    bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    made = bench(overlapped=True)
    answering = made.submit([5, 6, 7], max_tokens=9)
    for _ in range(2):
        made.engine.step()
    prompt = made.submit([5, 6, 8, 9])

    def lost(drawn: Any) -> Any:
        raise kind("they cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(tools.LateTokens, "read", lost)
        failing(made, NoCapacity("no memory for a step"))
    for heard in (answering, prompt):
        assert isinstance(heard.error, EngineFailed) and heard.request.output == heard.tokens
    made.check_empty()

    again = made.submit([5, 6, 7])
    made.engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(tools.LateTokens, "read", lost)
        made.engine._end_all()
    assert again.reason == "error" and again.request.output == again.tokens


def test_a_request_whose_last_token_is_on_its_way_holds_no_place(bench: Any, tools: Any) -> None:
    """Short answers take as many steps as they do where each is read at once."""
    for overlapped in (True, False):
        made = bench(overlapped=overlapped, max_batch=2)
        heard = [made.submit([5, 6, 7 + i], max_tokens=12 if i == 0 else 2) for i in range(6)]
        made.settle()
        assert all(h.tokens == tools.solo(h, made.runner.vocab) for h in heard)
        assert [batch.sequences for batch in made.runner.steps] == [2] * 10 + [1] * 2
        made.check_empty()


def test_it_needs_no_block_either(bench: Any) -> None:
    made = bench(overlapped=True, prefix_cache=False, block_size=4, blocks=8)
    made.submit([5, 6, 7], max_tokens=2)
    for _ in range(2):
        made.engine.step()
    made.submit([5, 6], max_tokens=2)
    used: list[int] = []
    made.runner.before = lambda batch: used.append(made.engine.stats()["kv_blocks"]["used"])
    made.engine.step()
    assert used == [2], "the one of the first is full"


def test_a_step_that_is_read_late_is_the_one_that_is_told_of(
    bench: Any, tools: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While it is waited for, and when it fails: nobody ends who had no part in it."""
    made = bench(overlapped=True, fetch=(fetch := tools.Fetcher(ready=set())))
    first = made.submit([5, 6, 7], max_tokens=2)
    seen: list[str] = []
    read = tools.LateTokens.read

    def reading(drawn: Any) -> Any:
        seen.append(made.engine.current_step())
        return read(drawn)

    monkeypatch.setattr(tools.LateTokens, "read", reading)
    monkeypatch.setattr(made.runner, "wait_until_nearly_done", lambda: seen.append(made.engine.current_step()))
    made.settle()
    assert all(first.request.id in told for told in seen) and len(seen) == 4
    assert made.engine.current_step() == "no step"

    gone, waiting = made.submit([5, 6, 7]), made.submit([5, 6, 8], mix=tools.mix_of("a1"))
    made.engine.step()
    made.engine.cancel(gone.request.id)

    def broken(drawn: Any) -> Any:
        raise MemoryError("no memory to read")

    monkeypatch.setattr(tools.LateTokens, "read", broken)
    with pytest.raises(MemoryError) as raised:
        made.engine.step()
    made.engine._recover(raised.value)
    assert f"a step failed: a step of 3 rows: {gone.request.id}" in caplog.text
    assert gone.reason == "cancelled" and waiting.reason is None
    monkeypatch.setattr(tools.LateTokens, "read", read)
    fetch.finish()
    made.settle()
    assert waiting.reason == "length"
    made.check_empty()


def test_a_row_that_is_not_finite_ends_its_request_alone(bench: Any, tools: Any) -> None:
    made = bench(overlapped=True, prefix_cache=False)
    bad, good = made.submit([5, 6, 7]), made.submit([5, 6, 8])
    made.engine.step()
    made.runner.before = lambda batch: torch.tensor([[math.nan], [0.0]])
    made.engine.step()
    made.runner.before = lambda batch: None
    made.settle()
    assert isinstance(bad.error, EngineFailed) and bad.request.output == bad.tokens and len(bad.tokens) == 1
    assert good.tokens == tools.solo(good, made.runner.vocab)
    made.check_empty()


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
def test_a_step_that_fails_leaves_a_device_that_answers_as_it_was(bench: Any, tools: Any, kind: Any) -> None:
    made = bench(overlapped=True)
    bad = made.submit([5, 6, 7])
    made.engine.step()
    made.engine._recover(kind("one step"))
    assert isinstance(bad.error, EngineFailed) and made.engine.fatal_error() is None
    good = made.submit([5, 6, 8])
    made.settle()
    assert good.tokens == tools.solo(good, made.runner.vocab)


def test_a_device_with_a_fault_is_lost_for_good(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long ago the step was that failed."""
    monkeypatch.setattr("server.engine.step_stats.FAILING_SECONDS", 0.0)
    made = bench(overlapped=True)
    bad = made.submit([5, 6, 7])
    made.runner.fault = RuntimeError("CUDA error: an illegal memory access was encountered")

    def fails(batch: Any) -> None:
        raise made.runner.fault

    made.runner.before = fails
    made.engine.start()
    try:
        made.engine._wake.set()
        end = time.monotonic() + SECONDS
        while made.engine.fatal_error() is None and time.monotonic() < end:
            time.sleep(0.005)
        assert isinstance(bad.error, EngineFailed)
        assert "an illegal memory access" in (made.engine.fatal_error() or "") and made.engine.state == "failing"
    finally:
        made.engine.stop()


def test_nothing_is_on_its_way_while_processors_are_lent(bench: Any, tools: Any) -> None:
    made = bench(overlapped=True)
    made.engine.share_cpu(True)
    heard = made.submit([5, 6, 7], max_tokens=3)
    for count in (1, 2, 3):
        made.engine.step()
        assert len(heard.tokens) == count
    assert heard.tokens == tools.solo(heard, made.runner.vocab)
    request = heard.request
    assert request.submitted <= request.admitted <= request.first_token <= request.finished


def test_the_flight_lands_before_a_plan_that_lacks_one_block(bench: Any, tools: Any) -> None:
    b = bench(overlapped=True, blocks=7)
    heard = [b.submit([3 + i, 40 + i, 9, 100 + i], max_tokens=6) for i in range(4)]
    b.settle()
    assert b.engine.stats()["preemptions"] > 0
    assert all(h.tokens == tools.solo(h, b.runner.vocab) for h in heard)
    b.check_empty()


@pytest.mark.parametrize("others", [{}, {"logprobs": 1}], ids=["launched ahead", "read at once"])
def test_an_answer_that_has_ended_has_no_part_in_the_step_after_it(
    bench: Any, tools: Any, others: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    made = bench(overlapped=True)
    first = made.submit([5, 6], max_tokens=3)
    made.settle()
    assert len(set(first.tokens)) == 3
    early = made.submit([5, 6], stop_token_ids=(first.tokens[1],))
    for _ in range(2):
        made.engine.step()
    late = made.submit([9, 8], max_tokens=3, **others)  # beside a row of the first, whose end is on its way
    made.settle()
    assert (early.reason, early.tokens, early.request.output) == ("stop", first.tokens[:2], first.tokens[:2])
    assert (late.reason, late.tokens) == ("length", tools.solo(late, made.runner.vocab))
    assert not caplog.messages
    made.check_empty()
