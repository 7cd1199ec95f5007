"""Times decode steps of several shapes on a runner, without an engine, interleaved."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from adapters.weights import LoraWeights
from benchmarks.roofline import Cost, Meter, decode_cost
from server.engine.backends.protocol import Runner
from server.engine.batch import Batch
from server.kernels.lora import SlotWeights
from server.model.loader import Base

BLOCK_SIZE = 16
SEED = 0
WARM_UP = 3


@dataclass(frozen=True)
class Shape:
    """A step: one sequence per mix, each with `context` tokens in the KV cache after the step."""

    name: str
    mixes: tuple[SlotWeights, ...]
    context: int = 160


@dataclass(frozen=True)
class StepTime:
    """Median seconds of a step, its share of the roofline, and its cost."""

    name: str
    seconds: float
    roofline: float
    cost: Cost


def decode_batch(shape: Shape, vocab: int) -> Batch:
    """A batch with one new token per sequence."""
    count, per = len(shape.mixes), -(-shape.context // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(SEED)
    return Batch(
        tokens=torch.randint(0, vocab, (count,), generator=generator).numpy(),
        positions=np.full(count, shape.context - 1),
        row_start=np.arange(count + 1, dtype=np.int32),
        context=np.full(count, shape.context, np.int32),
        blocks=np.arange(count * per, dtype=np.int32).reshape(count, per),
        logit_rows=np.arange(count),
        mixes=shape.mixes,
    )


def prompt_batches(shape: Shape, vocab: int) -> list[Batch]:
    """Prefill batches, one per sequence, that fill the KV cache for `decode_batch`."""
    count, per = len(shape.mixes), -(-shape.context // BLOCK_SIZE)
    generator = torch.Generator().manual_seed(SEED)
    return [
        Batch(
            tokens=torch.randint(0, vocab, (shape.context,), generator=generator).numpy(),
            positions=np.arange(shape.context),
            row_start=np.array([0, shape.context], np.int32),
            context=np.array([shape.context], np.int32),
            blocks=np.arange(i * per, (i + 1) * per, dtype=np.int32)[None],
            logit_rows=np.array([shape.context - 1]),
            mixes=((),),
        )
        for i in range(count)
    ]


def measure(
    base: Base,
    runner: Runner,
    slots: Sequence[LoraWeights],
    shapes: Sequence[Shape],
    meter: Meter,
    repeats: int = 60,
) -> list[StepTime]:
    """Time every shape `repeats` times, in alternating order, and measure the machine's limits in each round.

    `slots[i]` is loaded into slot i.
    """
    widest = max(shapes, key=lambda s: len(s.mixes) * -(-s.context // BLOCK_SIZE))
    runner.allocate(len(widest.mixes) * -(-widest.context // BLOCK_SIZE), BLOCK_SIZE)
    for batch in prompt_batches(widest, base.config.vocab_size):
        runner.run(batch).wait()  # unwritten pages are shared zero pages, which are faster to read
    for slot, weights in enumerate(slots):
        runner.load_adapter(slot, weights)
    batches = [decode_batch(shape, base.config.vocab_size) for shape in shapes]
    times: list[list[float]] = [[] for _ in shapes]
    for turn in range(repeats + WARM_UP):
        if turn >= WARM_UP:
            meter.take()
            for batch in batches:  # the meter has replaced the contents of the caches
                runner.run(batch).wait()
        order = range(len(shapes)) if turn % 2 else reversed(range(len(shapes)))
        for i in order:
            start = time.perf_counter()
            runner.run(batches[i]).wait()
            if turn >= WARM_UP:
                times[i].append(time.perf_counter() - start)
    result, ceilings = [], meter.median()
    for shape, taken in zip(shapes, times, strict=True):
        mixes = [[slots[slot] for slot, _ in mix] for mix in shape.mixes]
        cost = decode_cost(base, [shape.context] * len(shape.mixes), mixes)
        seconds = statistics.median(taken)
        result.append(StepTime(shape.name, seconds, cost.seconds(ceilings) / seconds, cost))
    return result


def standard_shapes(ranks: Sequence[int], four: Sequence[int], whole: int) -> list[Shape]:
    """The shapes of the table in docs/benchmarks.md.

    Slots 0 to 15 have adapters of `ranks`. The ranks of the slots `four` add up to that of slot `whole`.
    """
    one = next(slot for slot, rank in enumerate(ranks) if rank == 16)
    return [
        Shape("1 sequence, base", ((),)),
        Shape("1 sequence, one adapter of rank 16", (((one, 1.0),),)),
        Shape("16 sequences, base", ((),) * 16),
        Shape("16 sequences, one adapter of rank 16", (((one, 1.0),),) * 16),
        Shape("16 sequences, sixteen adapters", tuple(((slot, 1.0),) for slot in range(16))),
        Shape("16 sequences, one adapter of the mix's rank", (((whole, 1.0),),) * 16),
        Shape("16 sequences, a mix of four", (tuple((slot, 0.25) for slot in four),) * 16),
    ]


def overheads(times: Sequence[StepTime]) -> dict[str, float]:
    """Step times relative to the base, and of a mix relative to one adapter of the same total rank."""
    seconds = [t.seconds for t in times]
    return {
        "one adapter, 1 sequence": seconds[1] / seconds[0],
        "one adapter, 16 sequences": seconds[3] / seconds[2],
        "sixteen adapters, 16 sequences": seconds[4] / seconds[2],
        "a mix of four over one of its rank": seconds[6] / seconds[5],
    }
