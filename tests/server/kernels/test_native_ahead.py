"""The native runner as a device: what it was given before and has not been read yet, in any order of reading."""

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


@pytest.fixture(params=[1, 2, 3])
def runner(base: Tiny, request: pytest.FixtureRequest) -> Iterator[NativeRunner]:
    made = NativeRunner(base, SLOTS, request.param)
    made.allocate(64, BLOCK)
    yield made


def draw(runner: NativeRunner, logits: Logits, temperature: float, noise: list[float]) -> Any:
    how = np.array([[temperature, 1.0, 0.0, each] for each in noise], np.float32)
    return runner.draw(logits, how, np.zeros(len(noise), np.int32))


def started(mixes: list[SlotWeights]) -> list[Sequence]:
    return [Sequence(tokens(i, 5 + i), list(range(8 * i, 8 * i + 8)), m) for i, m in enumerate(mixes)]


def answers(runner: NativeRunner, base: Tiny, temperature: float, read_at_once: bool) -> list[list[int]]:
    """Twelve tokens of each of three sequences, a slot being filled anew in the middle."""
    runner.load_adapter(0, base.prepare(adapter(base.config, 1, 8)))
    runner.load_adapter(1, base.prepare(adapter(base.config, 2, 5, ("q_proj", "down_proj"))))
    sequences = started([((0, 1.0),), (), ((1, -0.5), (0, 2.0))])
    drawn = []
    for number in range(12):
        if number == 6:
            runner.unload_adapter(1)
            runner.load_adapter(1, base.prepare(adapter(base.config, 3, 3)))
        order = list(range(PROMPTS)) if number % 2 else list(range(PROMPTS))[::-1]
        new = [(sequences[i], 1 if number else len(sequences[i].tokens)) for i in order]
        noise = [(number * PROMPTS + i) * 0.377 % 1.0 for i in order]
        drawn.append((order, draw(runner, runner.run(batch_of(new, False)), temperature, noise)))
        following = drawn[-1][1].read().tolist() if read_at_once else [-1 - row for row in range(PROMPTS)]
        for i, token in zip(order, following, strict=True):
            sequences[i].tokens.append(token)
    read = [(order, each.read().tolist()) for order, each in drawn]
    return [[each[order.index(i)] for order, each in read] for i in range(PROMPTS)]


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_steps_go_on_from_tokens_that_nobody_has_read(runner: NativeRunner, base: Tiny, temperature: float) -> None:
    at_once = answers(runner, base, temperature, True)
    assert answers(runner, base, temperature, False) == at_once
    assert len({tuple(each) for each in at_once}) == PROMPTS


def test_logits_may_be_read_in_any_order(runner: NativeRunner) -> None:
    rng = random.Random(3)
    ids = [tokens(seed, rng.randrange(1, 60)) for seed in range(40)]

    def run(number: int) -> Logits:
        return runner.run(batch_of([(Sequence(ids[number], list(range(4))), len(ids[number]))]))

    expected = [run(number).rows.clone() for number in range(len(ids))]
    for _ in range(5):
        given = {number: run(number) for number in rng.sample(range(len(ids)), len(ids))}
        for number in rng.sample(range(len(ids)), len(ids)):
            assert torch.equal(given[number].rows, expected[number])


def test_lingering_ends_in_the_last_of_the_steps_that_were_given(runner: NativeRunner) -> None:
    runner.wait_until_nearly_done()
    batch = batch_of([(Sequence(tokens(1, 300), list(range(20))), 300)])
    expected = runner.run(batch).rows.clone()
    for count in (1, 2, 8):
        given = [runner.run(batch) for _ in range(count)]
        runner.wait_until_nearly_done()
        runner._unfinished()
        assert len(runner._jobs) <= 1, "but for the last, all are done"
        assert all(torch.equal(logits.rows, expected) for logits in given)


def test_an_adapter_stays_until_no_step_reads_it_and_no_longer(runner: NativeRunner, base: Tiny) -> None:
    weights = base.prepare(adapter(base.config, 1, 64))
    gone = weakref.ref(weights)
    runner.load_adapter(0, weights)
    batch = batch_of([(Sequence(tokens(1, 300), list(range(20)), ((0, 1.0),)), 300)])
    expected = runner.run(batch).rows.clone()
    given = [runner.run(batch) for _ in range(12)]
    runner.unload_adapter(0)
    del weights
    dead = gone() is None
    assert not (dead and runner._unfinished()), "it went while steps still read it"
    assert all(torch.equal(logits.rows, expected) for logits in given)
    runner.wait()
    gc.collect()
    assert gone() is None
    with pytest.raises(AssertionError, match="slot is empty"):
        runner.run(batch).wait()


def test_an_adapter_that_nothing_reads_is_gone_at_once(runner: NativeRunner, base: Tiny) -> None:
    weights = base.prepare(adapter(base.config, 1, 4))
    gone = weakref.ref(weights)
    runner.load_adapter(0, weights)
    runner.unload_adapter(0)
    del weights
    assert gone() is None


def test_a_token_that_was_not_found_is_gone_on_from_without_harm(runner: NativeRunner, base: Tiny) -> None:
    """Its request ends when it is read, which is after the next step was given."""
    runner.load_adapter(0, base.prepare(adapter(base.config, 1, 4, ("q_proj", "k_proj"), size=1e37)))
    good, bad = started([(), ((0, 16.0),)])
    first = draw(runner, runner.run(batch_of([(good, 5), (bad, 6)], False)), 0.0, [0.5, 0.5])
    for row, sequence in enumerate((good, bad)):
        sequence.tokens.append(-1 - row)
    second = draw(runner, runner.run(batch_of([(good, 1), (bad, 1)], False)), 0.0, [0.5, 0.5])
    assert first.read()[1] == -1 and first.read()[0] >= 0 and second.read()[0] >= 0


def test_a_token_of_a_row_that_there_was_not_is_refused(runner: NativeRunner) -> None:
    with pytest.raises(AssertionError, match="not of the vocabulary"):
        runner.run(batch_of([(Sequence([-1], [0]), 1)])).wait()  # no step before
    runner.run(batch_of([(Sequence([5], [0]), 1)]))
    with pytest.raises(AssertionError, match="not of the vocabulary"):
        runner.run(batch_of([(Sequence([-2], [0]), 1)])).wait()
    for token in (97, -1):  # nor does a step that was not run leave any
        with pytest.raises(AssertionError, match="not of the vocabulary"):
            runner.run(batch_of([(Sequence([token], [0]), 1)])).wait()
    assert runner.run(batch_of([(Sequence([5], [0]), 1)])).rows.isfinite().all()


def test_an_engine_on_it_plans_ahead(runner: NativeRunner, base: Tiny) -> None:
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


@pytest.mark.parametrize("threads", [1, 2])
def test_lingering_ends_before_the_head_however_long_that_takes(threads: int) -> None:
    """Longer than the time before a step's end from which the next is planned."""
    config = replace(bases("llama-int4")[0].config, vocab_size=200_000)
    large, _ = tiny.bases(config, "int4", 32, False, "int8", choose("native"), choose("reference"))
    runner = NativeRunner(large, SLOTS, threads)
    runner.allocate(64, BLOCK)
    batch = batch_of([(Sequence(tokens(i, 5), [i]), 5) for i in range(32)])
    under_way = 0
    for _ in range(8):
        runner.run(batch)
        runner.wait_until_nearly_done()
        under_way += bool(runner._unfinished())
        runner.wait()
    assert under_way > 0
