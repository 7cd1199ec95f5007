"""The native runner as an asynchronous device: steps that are submitted before earlier results are read."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.backends.cpu.runner import NativeRunner
from server.engine.batch import Logits
from server.engine.overlap import DeviceRunner, OverlappedEngine, engine_on
from server.kernels import choose, cpu
from server.kernels.lora import SlotWeights
from tests.server.kernels import tiny
from tests.server.kernels.test_native_runner import bases, tokens
from tests.server.kernels.tiny import BLOCK, Sequence, Tiny, adapter, batch_of

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native kernels: {cpu.unavailable()}")

SLOTS = 4
PROMPTS = 3


@pytest.fixture(scope="module")
def base() -> Tiny:
    return bases("llama-int4")[0]


@pytest.fixture(params=[1, 3])
def runner(base: Tiny, request: pytest.FixtureRequest) -> Iterator[NativeRunner]:
    made = NativeRunner(base, SLOTS, request.param)
    made.allocate(64, BLOCK)
    yield made


def sample(runner: NativeRunner, logits: Logits, temperature: float, noise: list[float]) -> Any:
    params = np.array([[temperature, 1.0, 0.0, each] for each in noise], np.float32)
    return runner.draw(logits, params, np.zeros(len(noise), np.int32))


def sequences_of(mixes: list[SlotWeights]) -> list[Sequence]:
    return [Sequence(tokens(i, 5 + i), list(range(8 * i, 8 * i + 8)), m) for i, m in enumerate(mixes)]


def generate(runner: NativeRunner, base: Tiny, temperature: float, read_at_once: bool) -> list[list[int]]:
    """Twelve tokens of each of three sequences. A slot gets another adapter in the middle."""
    runner.load_adapter(0, base.prepare(adapter(base.config, 1, 8)))
    runner.load_adapter(1, base.prepare(adapter(base.config, 2, 5, ("q_proj", "down_proj"))))
    sequences = sequences_of([((0, 1.0),), (), ((1, -0.5), (0, 2.0))])
    samples = []
    for number in range(12):
        if number == 6:
            runner.unload_adapter(1)
            runner.load_adapter(1, base.prepare(adapter(base.config, 3, 3)))
        order = list(range(PROMPTS)) if number % 2 else list(range(PROMPTS))[::-1]
        new = [(sequences[i], 1 if number else len(sequences[i].tokens)) for i in order]
        noise = [(number * PROMPTS + i) * 0.377 % 1.0 for i in order]
        samples.append((order, sample(runner, runner.run(batch_of(new, False)), temperature, noise)))
        following = samples[-1][1].read().tolist() if read_at_once else [-1 - row for row in range(PROMPTS)]
        for i, token in zip(order, following, strict=True):
            sequences[i].tokens.append(token)
    read = [(order, each.read().tolist()) for order, each in samples]
    return [[each[order.index(i)] for order, each in read] for i in range(PROMPTS)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_steps_continue_from_tokens_that_were_not_read(runner: NativeRunner, base: Tiny, temperature: float) -> None:
    expected = generate(runner, base, temperature, True)
    assert generate(runner, base, temperature, False) == expected
    assert len({tuple(each) for each in expected}) == PROMPTS


def test_logits_can_be_read_in_any_order(runner: NativeRunner) -> None:
    rng = random.Random(3)
    ids = [tokens(seed, rng.randrange(1, 60)) for seed in range(40)]

    def run(number: int) -> Logits:
        return runner.run(batch_of([(Sequence(ids[number], list(range(4))), len(ids[number]))]))

    expected = [run(number).rows.clone() for number in range(len(ids))]
    submitted = {number: run(number) for number in rng.sample(range(len(ids)), len(ids))}
    for number in rng.sample(range(len(ids)), len(ids)):
        assert torch.equal(submitted[number].rows, expected[number])


def test_waiting_until_nearly_done_leaves_the_last_step_at_most(runner: NativeRunner) -> None:
    runner.wait_until_nearly_done()
    batch = batch_of([(Sequence(tokens(1, 300), list(range(20))), 300)])
    expected = runner.run(batch).rows.clone()
    for count in (1, 2, 8):
        submitted = [runner.run(batch) for _ in range(count)]
        runner.wait_until_nearly_done()
        runner._has_unfinished()
        assert len(runner._jobs) <= 1
        assert all(torch.equal(logits.rows, expected) for logits in submitted)


@pytest.mark.parametrize("threads", [1, 2])
def test_waiting_until_nearly_done_does_not_wait_for_the_head(threads: int) -> None:
    """Even if the head takes longer than the planning time."""
    config = replace(bases("llama-int4")[0].config, vocab_size=200_000)
    large, _ = tiny.bases(config, "int4", 32, False, "int8", choose("native"), choose("reference"))
    runner = NativeRunner(large, SLOTS, threads)
    runner.allocate(64, BLOCK)
    batch = batch_of([(Sequence(tokens(i, 5), [i]), 5) for i in range(32)])
    unfinished = 0
    for _ in range(8):
        runner.run(batch)
        runner.wait_until_nearly_done()
        unfinished += bool(runner._has_unfinished())
        runner.wait()
    assert unfinished > 0


def test_an_unloaded_adapter_lives_until_no_step_reads_it(runner: NativeRunner, base: Tiny) -> None:
    weights = base.prepare(adapter(base.config, 1, 64))
    reference = weakref.ref(weights)
    runner.load_adapter(0, weights)
    batch = batch_of([(Sequence(tokens(1, 300), list(range(20)), ((0, 1.0),)), 300)])
    expected = runner.run(batch).rows.clone()
    submitted = [runner.run(batch) for _ in range(12)]
    runner.unload_adapter(0)
    del weights
    freed = reference() is None
    assert not (freed and runner._has_unfinished())
    assert all(torch.equal(logits.rows, expected) for logits in submitted)
    runner.wait()
    gc.collect()
    assert reference() is None
    with pytest.raises(AssertionError, match="slot is empty"):
        runner.run(batch).wait()


def test_an_unused_adapter_is_freed_when_it_is_unloaded(runner: NativeRunner, base: Tiny) -> None:
    weights = base.prepare(adapter(base.config, 1, 4))
    reference = weakref.ref(weights)
    runner.load_adapter(0, weights)
    runner.unload_adapter(0)
    del weights
    assert reference() is None


def test_a_row_that_is_not_finite_does_not_disturb_the_next_step(runner: NativeRunner, base: Tiny) -> None:
    runner.load_adapter(0, base.prepare(adapter(base.config, 1, 4, ("q_proj", "k_proj"), size=1e37)))
    good, bad = sequences_of([(), ((0, 16.0),)])
    first = sample(runner, runner.run(batch_of([(good, 5), (bad, 6)], False)), 0.0, [0.5, 0.5])
    for row, sequence in enumerate((good, bad)):
        sequence.tokens.append(-1 - row)
    second = sample(runner, runner.run(batch_of([(good, 1), (bad, 1)], False)), 0.0, [0.5, 0.5])
    assert first.read()[1] == -1 and first.read()[0] >= 0 and second.read()[0] >= 0


def test_placeholders_of_missing_rows_are_refused(runner: NativeRunner) -> None:
    def assert_refused(token: int) -> None:
        with pytest.raises(AssertionError, match="not in the vocabulary"):
            runner.run(batch_of([(Sequence([token], [0]), 1)])).wait()

    assert_refused(-1)  # no step before
    runner.run(batch_of([(Sequence([5], [0]), 1)]))
    assert_refused(-2)
    assert_refused(97)
    assert_refused(-1)  # the refused step left no tokens
    assert runner.run(batch_of([(Sequence([5], [0]), 1)])).rows.isfinite().all()


def test_the_engine_overlaps_planning_with_this_runner(runner: NativeRunner) -> None:
    assert isinstance(runner, DeviceRunner)
    engine = engine_on(
        runner,
        fetch=lambda mix: None,
        tokenizer=None,
        eos_ids=frozenset(),
        vocab_size=97,
        context_length=64,
        base_id="base",
        blocks=8,
    )
    assert isinstance(engine, OverlappedEngine)
