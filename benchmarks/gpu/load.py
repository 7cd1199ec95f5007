"""Engine throughput with many adapters in RAM compared to few."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from adapters.weights import LoraWeights, Mix
from benchmarks.gpu.base import Kind, vocabulary_of
from benchmarks.gpu.bench import Bench
from server.engine.adapter_slots import AdapterMemory
from server.engine.backends.cuda.runner import SLOTS
from server.engine.overlap import OverlappedEngine
from server.engine.request import Delivery, Request, Sampling
from server.model.tokenizer import ModelTokenizer

REQUESTS = 320
"""Requests of a run: ten batches."""
RUN_TIMEOUT, CHECK_TIMEOUT = 60.0, 600.0


class Run(NamedTuple):
    """Tokens per second, adapters copied to the device, and adapters evicted."""

    rate: float
    copies: int
    evictions: int


def load(bench: Bench) -> None:
    """Compare 1,000 adapters with S-LoRA's power law of 0.6 to 5, in both orders."""
    few, many = (3, 12) if bench.check else (5, 1000)
    requests = 4 if bench.check else REQUESTS
    memory, warm_up = bench.runner.room, range(min(bench.rows, requests))
    draws = np.random.default_rng(42).power(0.6, requests)
    for kind in bench.kinds:
        adapters = AdaptersInRam(bench, many, kind)
        runs: dict[int, list[Run]] = {few: [], many: []}
        chosen = {count: [int(draw * count) for draw in draws] for count in runs}
        for count in (few, many) if bench.check else (few, many, many, few):
            if not (runs[count] and bench.is_late):
                run = run_engine(bench, adapters, memory, [chosen[count][i] for i in warm_up], chosen[count])
                runs[count].append(run)
                print(f"  {_label(count, adapters)} of {kind}: {run.rate:.0f} tokens/s", flush=True)
        rates, read = {}, {}
        for count, found in runs.items():
            rates[count] = statistics.median(run.rate for run in found)
            read[count] = bench.step_bytes(bench.rows, _distinct(chosen[count], bench.rows), kind)
            bench.record(
                f"{_label(count, adapters)} of {kind}, power law 0.6: tokens/s", round(rates[count]),
                rates=[run.rate for run in found], distinct=len(set(chosen[count])), copies=found[0].copies,
                evictions=found[0].evictions,
            )  # fmt: skip
        ratio = rates[many] / rates[few]
        bench.record(f"{_label(many, adapters)} against {few}, {kind}", round(ratio, 3), 0.95, ratio >= 0.95,
                     by_bytes=read[few] / read[many])  # fmt: skip


def _label(count: int, adapters: AdaptersInRam) -> str:
    buffers = len(adapters.buffers)
    return f"{count} adapters in RAM" + ("" if count <= buffers else f" (copies of {buffers} buffers)")


def _distinct(chosen: list[int], rows: int) -> float:
    """Mean number of different adapters among `rows` consecutive requests."""
    batches = [chosen[i : i + rows] for i in range(max(1, len(chosen) - rows + 1))]
    return sum(len(set(batch)) for batch in batches) / len(batches)


class AdaptersInRam:
    """`count` adapters by digest. They share as many buffers as a batch has rows, but each is copied separately."""

    def __init__(self, bench: Bench, count: int, kind: Kind) -> None:
        self.buffers = bench.adapters(kind)[:count]
        self.digests = [f"{i:064x}" for i in range(count)]
        self.weights = {
            digest: replace(self.buffers[i % len(self.buffers)], name=digest[-8:], digest=digest)
            for i, digest in enumerate(self.digests)
        }

    def fetch(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        future: Future[tuple[LoraWeights, ...]] = Future()
        future.set_result(tuple(self.weights[digest] for digest in mix.digests))
        return future


class Answers:
    """Collects the deliveries of a run."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ends: list[tuple[float, Delivery]] = []

    def deliver(self, delivery: Delivery) -> None:
        self.tokens += len(delivery.tokens)
        if delivery.finish_reason:
            self.ends.append((time.perf_counter(), delivery))

    def wait(self, engine: OverlappedEngine, count: int, length: int, timeout: float) -> float:
        """The time of the last answer. Raises RuntimeError unless `count` complete answers arrive in time."""
        deadline = time.perf_counter() + timeout
        while len(self.ends) < count:
            if time.perf_counter() > deadline or engine.state == "stopped":
                raise RuntimeError(
                    f"{len(self.ends)} of {count} answers and {self.tokens} tokens within {timeout:.0f} s; the engine "
                    f"is {engine.state}"
                )
            time.sleep(0.002)
        for _, delivery in self.ends:
            if delivery.finish_reason != "length":
                raise RuntimeError(f"an answer ended with {delivery.finish_reason!r}") from delivery.error
        if self.tokens != count * length:
            raise RuntimeError(f"{self.tokens} of {count * length} tokens arrived")
        if failures := engine.stats()["failures"]:
            raise RuntimeError(f"{failures} steps failed")
        return max(at for at, _ in self.ends)


def run_engine(
    bench: Bench, adapters: AdaptersInRam, memory: AdapterMemory, warm_up: list[int], chosen: list[int]
) -> Run:
    """Answer requests for the adapters `warm_up` untimed, then for `chosen`, all submitted at once."""
    config = bench.config
    engine = OverlappedEngine(
        bench.runner,
        fetch=adapters.fetch,
        tokenizer=ModelTokenizer(vocabulary_of(config.vocab_size)),
        eos_ids=frozenset({0}),
        vocab_size=config.vocab_size,
        context_length=64 if bench.check else 2048,
        base_id="bench",
        blocks=bench.blocks,
        max_batch=bench.rows,
        max_slots=SLOTS,
        max_queue=max(len(warm_up), len(chosen)),
        max_queue_tokens=1 << 24,
        prefix_cache=False,
        adapter_memory=memory,
    )
    generator = np.random.default_rng(42)
    prompt_tokens, new_tokens = (8, 4) if bench.check else (128, 128)
    engine.start()
    try:
        seconds, before = 0.0, engine.stats()["slots"]
        for name, numbers in (("warm-up", warm_up), ("timed", chosen)):
            answers = Answers()
            before = engine.stats()["slots"]
            start = time.perf_counter()
            for i, number in enumerate(numbers):
                digest = adapters.digests[number]
                request = Request(
                    id=f"{name}-{i}",
                    prompt=tuple(generator.integers(1, config.vocab_size, prompt_tokens).tolist()),
                    sampling=Sampling(max_tokens=new_tokens, ignore_eos=True),
                    deliver=answers.deliver,
                    mix=Mix(((digest, 1.0),)),
                    fair_key=digest,
                )
                engine.submit(request)
            timeout = CHECK_TIMEOUT if bench.check else RUN_TIMEOUT
            seconds = answers.wait(engine, len(numbers), new_tokens, timeout) - start
        after = engine.stats()["slots"]
    finally:
        stopped = engine.stop()
        bench.ready &= stopped
    if not stopped:
        raise RuntimeError("the engine does not stop; its thread may still use the runner")
    evictions = after["evictions"] - before["evictions"]
    copies = len(after["resident"]) - len(before["resident"]) + evictions
    return Run(len(chosen) * new_tokens / seconds, copies, evictions)
