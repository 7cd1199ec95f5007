"""Requests through the whole engine on a GPU: many adapters in RAM against few, and the end of the resident set."""

from __future__ import annotations

import statistics
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from adapters.weights import LoraWeights, Mix
from benchmarks.gpu_base import Kind, vocabulary_of
from server.engine.adapter_slots import AdapterMemory
from server.engine.backends.cuda.runner import SLOTS
from server.engine.overlap import OverlappedEngine
from server.engine.request import Delivery, Request, Sampling
from server.model.tokenizer import ModelTokenizer

RESIDENT = 64
"""Adapters that the cliff has room for: twice a batch, and few enough that asking for several times as many takes less
than a minute or two of the run. What an adapter's eviction and its copy cost does not depend on how many are resident.
"""

ROUNDS = 3
"""Requests of a point of the cliff for each of its adapters, after one that brings each in."""

SHARES = (0.5, 0.9, 1.1, 1.5, 2.0)
"""Of what is resident, so many adapters are asked for."""
REQUESTS = 320
"""Of a run of `load`: ten batches."""


def load(bench: Any) -> None:
    """Throughput with 1,000 adapters in RAM by a power law of 0.6 (S-LoRA's), against 5; there and back, so that a card
    that grows slower or faster meanwhile says nothing of the ratio."""
    few, many = (3, 12) if bench.check else (5, 1000)
    requests = 4 if bench.check else REQUESTS
    room, warm = bench.runner.room, range(min(bench.rows, requests))
    draws = np.random.default_rng(42).power(0.6, requests)
    for kind in bench.kinds:
        kept = _Kept(bench, many, kind)
        runs: dict[int, list[Run]] = {few: [], many: []}
        asked = {count: [int(draw * count) for draw in draws] for count in runs}
        for count in (few, many) if bench.check else (few, many, many, few):
            if not (runs[count] and bench.is_late):
                runs[count].append(_run(bench, kept, room, [asked[count][i] for i in warm], asked[count]))
                print(f"  {_in_ram(count, kept)} of {kind}: {runs[count][-1].rate:.0f} tokens/s", flush=True)
        rates, read = {}, {}
        for count, found in runs.items():
            rates[count] = statistics.median(run.rate for run in found)
            read[count] = bench.step_bytes(bench.rows, _distinct(asked[count], bench.rows), kind)
            bench.tell(
                f"{_in_ram(count, kept)} of {kind}, power law 0.6: tokens/s", round(rates[count]),
                rates=[run.rate for run in found], distinct=len(set(asked[count])), copies=found[0].copies,
                evictions=found[0].evictions,
            )  # fmt: skip
            print(
                f"  {requests} requests on {len(set(asked[count]))} of them, {found[0].copies} copies to the device, "
                f"{found[0].evictions} evictions in the first of {len(found)} runs",
                flush=True,
            )
        ratio = rates[many] / rates[few]
        bench.tell(f"{_in_ram(many, kept)} against {few}, {kind}", round(ratio, 3), 0.95, ratio >= 0.95,
                   by_bytes=read[few] / read[many])  # fmt: skip


def _in_ram(count: int, kept: _Kept) -> str:
    """How many adapters, and how many distinct contents stand for them where there are fewer."""
    shared = len(kept.buffers)
    return f"{count} adapters in RAM" + ("" if count <= shared else f" (copies of {shared} buffers)")


def _distinct(asked: list[int], rows: int) -> float:
    """Different adapters among so many neighbouring requests, in the mean."""
    batches = [asked[i : i + rows] for i in range(max(1, len(asked) - rows + 1))]
    return sum(len(set(batch)) for batch in batches) / len(batches)


def cliff(bench: Any) -> None:
    """Throughput over the number of adapters, each as likely, up to and over what is resident."""
    whole = bench.runner.room
    cost = whole.cost(bench.adapters(bench.kinds[0])[0])
    resident = max(1, min(2 if bench.check else RESIDENT, whole.nbytes // cost))
    room = AdapterMemory(resident * cost, whole.cost)
    shares = (1.0, 1.5) if bench.check else SHARES
    counts = sorted({max(1, int(resident * share)) for share in shares})
    kept = _Kept(bench, max(counts), bench.kinds[0])
    points = []
    for count in counts:
        if bench.is_late:
            bench.tell(f"cliff: from {count} adapters on", "left out, the time is over", met=False)
            break
        requests = ROUNDS * count if bench.check else max(3 * bench.rows, ROUNDS * count)
        draws = np.random.default_rng(42).integers(0, count, requests).tolist()
        everyone = [i % count for i in range(max(count, bench.rows))]
        run = _run(bench, kept, room, everyone, draws)
        points.append((count, requests, run))
        bench.tell(
            f"cliff: {count} adapters, room for {resident}, tokens/s", round(run.rate), requests=requests,
            evictions=run.evictions,
        )  # fmt: skip
    most = max((run.rate for *_, run in points), default=0.0)
    for count, requests, run in points:
        bar = "#" * max(1, round(50 * run.rate / most))
        print(f"  {count:5d} {bar} {run.rate:.0f}, {run.evictions} evictions in {requests} requests", flush=True)
    if bench.pictures is not None and points:
        (bench.pictures / "cliff.svg").write_text(picture([(count, run.rate) for count, _, run in points], resident))


def picture(points: list[tuple[int, float]], resident: int) -> str:
    """The cliff as SVG: tokens/s over the number of adapters, and where those end that have room. Whoever lends a card
    need not have a library that draws."""
    wide, high, left, top = 640, 360, 70, 30
    most = max(rate for _, rate in points) or 1.0
    last = max(resident, *(count for count, _ in points))

    def at(count: float, rate: float) -> tuple[float, float]:
        return left + (wide - left - 20) * count / last, top + (high - top - 50) * (1 - rate / most)

    places = [at(*point) for point in points]
    end, floor = at(resident, 0)
    told = [
        f'<line x1="{end:.0f}" y1="{top}" x2="{end:.0f}" y2="{floor:.0f}" stroke="gray" stroke-dasharray="4"/>',
        f'<line x1="{left}" y1="{floor:.0f}" x2="{wide - 20}" y2="{floor:.0f}" stroke="gray"/>',
        f'<polyline fill="none" stroke="steelblue" points="{" ".join(f"{x:.0f},{y:.0f}" for x, y in places)}"/>',
        f'<text x="{left}" y="20">tokens/s, {most:.0f} at most; room for {resident} adapters</text>',
        f'<text x="{wide - 20}" y="{high - 10}" text-anchor="end">adapters asked for</text>',
    ]
    for (count, rate), (x, y) in zip(points, places, strict=True):
        told.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="steelblue"><title>{rate:.0f}</title></circle>')
        told.append(f'<text x="{x:.0f}" y="{floor + 18:.0f}" text-anchor="middle">{count}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">'
    )
    return "\n".join([head, f'<rect width="{wide}" height="{high}" fill="white"/>', *told, "</svg>\n"])


class _Kept:
    """Adapters in RAM, by digest. There are as many contents as a batch has rows; more adapters than these are versions
    of their own over the same bytes, copied as often."""

    def __init__(self, bench: Any, count: int, kind: Kind) -> None:
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


class _Answers:
    """What the requests of a run have been told, on the engine's thread."""

    def __init__(self) -> None:
        self.tokens = 0
        self.ends: list[tuple[float, Delivery]] = []
        """When each has ended, and how."""

    def note(self, delivery: Delivery) -> None:
        self.tokens += len(delivery.tokens)
        if delivery.finish_reason:
            self.ends.append((time.perf_counter(), delivery))

    def wait(self, engine: OverlappedEngine, count: int, length: int, seconds: float) -> float:
        """When the last of `count` answers of `length` tokens has come.

        Raises RuntimeError if one is not whole, a step has failed, or they take longer than `seconds`: a request that
        failed was not served, however fast it went.
        """
        end = time.perf_counter() + seconds
        while len(self.ends) < count:
            if time.perf_counter() > end or engine.state == "stopped":
                raise RuntimeError(
                    f"{len(self.ends)} of {count} answers have come in {seconds:.0f} s, and {self.tokens} tokens; "
                    f"the engine is {engine.state}"
                )
            time.sleep(0.002)
        for _, delivery in self.ends:
            if delivery.finish_reason != "length":
                raise RuntimeError(f"an answer has ended by {delivery.finish_reason!r}") from delivery.error
        if self.tokens != count * length:
            raise RuntimeError(f"{self.tokens} tokens came of the {count * length} that were asked for")
        if failures := engine.stats()["failures"]:
            raise RuntimeError(f"{failures} steps have failed")
        return max(when for when, _ in self.ends)


RUN_SECONDS = 60.0
"""For a run's answers, a few times what they take: the rest of the table is still to be measured."""
CHECK_SECONDS = 600.0
"""The same in Triton's interpreter."""


class Run(NamedTuple):
    """Tokens a second; how many adapters came to the device meanwhile, and how many left their slots for others."""

    rate: float
    copies: int
    evictions: int


def _run(bench: Any, kept: _Kept, room: AdapterMemory, warming: list[int], asked: list[int]) -> Run:
    """Answers to requests on the adapters `asked` for, by number, that all wait from the start.

    Those on `warming` are answered before, untimed: the graphs of their adapters' widths are made then, and as many of
    them as there is room for are resident. Raises RuntimeError unless all are answered whole.
    """
    config = bench.config
    engine = OverlappedEngine(
        bench.runner,
        fetch=kept.fetch,
        tokenizer=ModelTokenizer(vocabulary_of(config.vocab_size)),
        eos_ids=frozenset({0}),
        vocab_size=config.vocab_size,
        context_length=64 if bench.check else 2048,
        base_id="bench",
        blocks=bench.blocks,
        max_batch=bench.rows,
        max_slots=SLOTS,
        max_queue=max(len(warming), len(asked)),
        max_queue_tokens=1 << 24,
        prefix_cache=False,
        adapter_memory=room,
    )
    generator = np.random.default_rng(42)
    lengths = (8, 4) if bench.check else (128, 128)  # as S-LoRA's are equal in the mean: most of the time is decoding
    limit = CHECK_SECONDS if bench.check else RUN_SECONDS
    engine.start()
    try:
        seconds, before = 0.0, engine.stats()["slots"]
        for name, adapters in (("warming", warming), ("timed", asked)):
            answers = _Answers()
            before = engine.stats()["slots"]
            began = time.perf_counter()
            for number, adapter in enumerate(adapters):
                digest = kept.digests[adapter]
                prompt = tuple(generator.integers(1, config.vocab_size, lengths[0]).tolist())
                request = Request(
                    id=f"{name}-{number}",
                    prompt=prompt,
                    sampling=Sampling(max_tokens=lengths[1], ignore_eos=True),
                    deliver=answers.note,
                    mix=Mix(((digest, 1.0),)),
                    fair_key=digest,
                )
                engine.submit(request)
            seconds = answers.wait(engine, len(adapters), lengths[1], limit) - began
        after = engine.stats()["slots"]
    finally:
        stopped = engine.stop()
        bench.made &= stopped
    if not stopped:
        raise RuntimeError(
            "the engine does not stop: its thread may still be in the runner, which is one thread's at a time"
        )
    evictions = after["evictions"] - before["evictions"]
    copies = len(after["resident"]) - len(before["resident"]) + evictions
    return Run(len(asked) * lengths[1] / seconds, copies, evictions)
