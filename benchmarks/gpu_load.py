"""Requests through the whole engine on a GPU: many adapters in RAM against few, and the end of the resident set."""

from __future__ import annotations

import time
from concurrent.futures import Future
from functools import partial
from typing import Any

import numpy as np

from adapters.weights import LoraWeights, Mix
from benchmarks.gpu_base import random_adapters, vocabulary_of
from server.engine.cuda_runner import SLOTS
from server.engine.overlap import OverlappedEngine
from server.engine.request import Delivery, Request, Sampling
from server.engine.text import Text

BUFFERS = 16
"""Distinct contents in RAM; more adapters than these are versions of their own over the same bytes, copied as often."""


def load(bench: Any) -> None:
    """Throughput with 1,000 adapters in RAM by a power law of 0.6 (S-LoRA's), against 5."""
    few, many = (3, 12) if bench.check else (5, 1000)
    requests = 6 if bench.check else 400
    kept = _Kept(bench, many)
    rates = {count: _throughput(bench, kept, count, requests, "power") for count in (few, many)}
    for count, rate in rates.items():
        bench.tell(f"{count} adapters in RAM, power law 0.6: tokens/s", round(rate))
    ratio = rates[many] / rates[few]
    bench.tell(f"{many} adapters against {few}", round(ratio, 3), 0.95, ratio >= 0.95)


def cliff(bench: Any) -> None:
    """Throughput over the number of adapters, each as likely, up to and over what is resident."""
    kept = _Kept(bench, 4)
    resident = max(1, bench.runner.room.nbytes // bench.runner.room.cost(kept.buffers[0]))
    resident = min(resident, 4) if bench.check else resident
    shares = (1.0, 1.5) if bench.check else (0.25, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0)
    counts = sorted({max(1, int(resident * share)) for share in shares})
    kept = _Kept(bench, max(counts))
    points = [(count, _throughput(bench, kept, count, 4 if bench.check else 150, "uniform")) for count in counts]
    for count, rate in points:
        bench.tell(f"cliff: {count} adapters of {resident} resident, tokens/s", round(rate))
    most = max(rate for _, rate in points)
    for count, rate in points:
        print(f"  {count:5d} {'#' * max(1, round(50 * rate / most))} {rate:.0f}", flush=True)


class _Kept:
    """Adapters in RAM, by digest."""

    def __init__(self, bench: Any, count: int) -> None:
        self.buffers = random_adapters(
            bench.config, bench.backend, min(count, 3 if bench.check else BUFFERS), bench.rank
        )
        self.digests = [f"{i:064x}" for i in range(count)]
        self.weights = {
            digest: LoraWeights(digest[-8:], digest, self.buffers[i % len(self.buffers)].modules)
            for i, digest in enumerate(self.digests)
        }

    def fetch(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        future: Future[tuple[LoraWeights, ...]] = Future()
        future.set_result(tuple(self.weights[digest] for digest in mix.digests))
        return future


def _note_end(done: list[float], delivery: Delivery) -> None:
    if delivery.finish_reason:
        done.append(time.perf_counter())


def _throughput(bench: Any, kept: _Kept, count: int, requests: int, popularity: str) -> float:
    """Tokens a second of answers to `requests` requests that all wait from the start.

    A batch's worth of them is answered before, untimed: the graphs of their adapters' widths are made then.
    """
    config = bench.config
    engine = OverlappedEngine(
        bench.runner,
        fetch=kept.fetch,
        text=Text(vocabulary_of(config.vocab_size)),
        eos_ids=frozenset({0}),
        vocab_size=config.vocab_size,
        context_length=64 if bench.check else 2048,
        base_id="bench",
        blocks=bench.blocks,
        max_batch=bench.rows,
        max_slots=SLOTS,
        max_queue=requests,
        max_queue_tokens=1 << 24,
        prefix_cache=False,
        room=bench.runner.room,
        draw=bench.runner.draw,
    )
    generator = np.random.default_rng(42)
    draws = generator.power(0.6, requests) if popularity == "power" else generator.random(requests)
    lengths = (8, 4) if bench.check else (128, 64)
    engine.start()
    seconds = 0.0
    for some in (min(bench.rows, requests), requests):
        done: list[float] = []
        began = time.perf_counter()
        for number in range(some):
            digest = kept.digests[int(draws[number] * count)]
            prompt = tuple(generator.integers(1, config.vocab_size, lengths[0]).tolist())
            request = Request(
                id=f"{some}-{number}",
                prompt=prompt,
                sampling=Sampling(max_tokens=lengths[1], ignore_eos=True),
                deliver=partial(_note_end, done),
                mix=Mix(((digest, 1.0),)),
                fair_key=digest,
            )
            engine.submit(request)
        while len(done) < some:
            time.sleep(0.002)
            if engine.state == "stopped":
                raise RuntimeError("the engine has stopped")
        seconds = max(done) - began
    engine.stop()
    return requests * lengths[1] / seconds
