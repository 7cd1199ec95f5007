"""S-LoRA's question to a running server: does it serve a thousand adapters as well as five?

Owns the runs and what they are compared by. The server, its adapters and its settings are given; how a request names
its adapter is given too, so any OpenAI-compatible server can be asked.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.client import Body, NoAnswer, Summary, closed_loop, figure, open_loop, residency, run, timed
from benchmarks.workloads import Arrival, Poisson, closed, generate
from server.errors import BadSetting

BURST = 400.0
"""Requests a second that no server here keeps up with: what it finishes under this is its capacity."""

BURST_REQUESTS = 400
"""As many are enough to measure it; a shorter comparison measures it by as many as one of its runs has."""

WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many then"
).split()
"""Each is one token to nearly every vocabulary, with a space before it and without."""


LEAST, MOST = 1e-4, 1e6
"""Of any number of an option: beyond these, draws are no numbers any more, or more than memory holds."""


def check_positive(numbers: Mapping[str, Sequence[float]]) -> None:
    """Raises BadSetting for an option that has a number which is not above 0, too near to it, too large, or none."""
    for name, values in numbers.items():
        if not all(LEAST <= value <= MOST for value in values):
            given = ", ".join(map(str, values))
            raise BadSetting(f"--{name} must be above 0, from {LEAST:g} to {MOST:.0f}, not {given}", name)


@dataclass(frozen=True)
class Plan:
    """What is compared: `few` and `many` adapters under the same arrivals, for each of `alphas`, at each of `shares`
    of the measured capacity or at each of `rates` (requests a second) if those are given.

    A run has `requests` requests, or lasts `duration` seconds if that is given. Lengths are in tokens, [low, high);
    `slo` in seconds.
    """

    few: int = 5
    many: int = 1000
    requests: int = 1000
    duration: float | None = None
    alphas: tuple[float, ...] = (1.0, 0.3)
    shares: tuple[float, ...] = (0.7, 1.2)
    rates: tuple[float, ...] = ()
    cv: float = 1.0
    prompt: tuple[int, int] = (8, 128)
    output: tuple[int, int] = (8, 128)
    seed: int = 42
    slo: float = 6.0
    repeats: int = 2

    def check(self) -> None:
        """Raises BadSetting for a plan that cannot be run."""
        if not 1 <= self.few < self.many:
            raise BadSetting(f"--many ({self.many}) must be more adapters than --few ({self.few}), at least 1", "many")
        numbers = {"cv": (self.cv,), "slo": (self.slo,), "alpha": self.alphas, "share": self.shares, "rate": self.rates}
        numbers |= {"requests": (self.requests,), "many": (self.many,)}
        numbers["duration"] = () if self.duration is None else (self.duration,)
        check_positive(numbers)
        for rate in self.rates:
            self.arrivals(rate, self.few, 1.0)

    def arrivals(self, rate: float, adapters: int, alpha: float) -> Poisson:
        """One run. Raises BadSetting where no request is due within its duration, or more than can be held."""
        duration = (self.requests + 0.5) / rate if self.duration is None else self.duration
        if not 1 <= int(rate * duration) <= MOST:
            count = "no request is" if rate * duration < 1 else f"more than {MOST:.0f} requests are"
            raise BadSetting(f"{count} due within a --duration of {duration:g} s at {rate:.3g} a second", "duration")
        return Poisson(rate, duration, adapters, alpha, self.cv, self.prompt, self.output, self.seed)


@dataclass(frozen=True)
class Load:
    """One run: how many adapters, how popular (`alpha`), at what rate and share of the capacity (None where that is
    not measured), and what came of it."""

    adapters: int
    alpha: float
    share: float | None
    rate: float
    summary: Summary
    repeat: int = 0

    @property
    def case(self) -> tuple[float, float]:
        """What runs of few and of many adapters have in common."""
        return self.alpha, self.rate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


APART = 65_537
"""From where one prompt begins among the tokens that are drawn to where the next one does: a prime above their number,
so that no two of a run are the same."""


def body_of(
    names: Sequence[str],
    vocab: int,
    text: bool = False,
    seed: int = 1,
    *,
    chat: bool = False,
    ignore_eos: bool = True,
) -> Body:
    """Greedy completions of random token ids, or of random words as `text` or as a `chat`'s message, each as long as
    its arrival says; without `ignore_eos`, which some servers do not know, at most so long."""
    text = text or chat
    random = np.random.RandomState(seed)
    drawn = (random.choice(WORDS, 1 << 16) if text else random.randint(100, vocab, 1 << 16)).tolist()

    def body(arrival: Arrival, i: int) -> Mapping[str, Any]:
        at = (i * APART) % (len(drawn) - arrival.prompt_tokens)
        prompt = drawn[at : at + arrival.prompt_tokens]
        told = " ".join(prompt) if text else prompt
        asked = {"messages": [{"role": "user", "content": told}]} if chat else {"prompt": told}
        return {
            "model": names[arrival.adapter],
            **asked,
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            **({"ignore_eos": True} if ignore_eos else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    return body


def llama_body(count: int, vocab: int, text: bool = False, seed: int = 1, **form: bool) -> Body:
    """The same requests in llama-server's own words: adapter i at scale 1, the others at 0; none with a `count` of 0.
    A prompt that it has read before is read again. `form` is as for `body_of`."""
    plain = body_of([""] * max(count, 1), vocab, text, seed, **form)

    def body(arrival: Arrival, i: int) -> Mapping[str, Any]:
        lora = [{"id": n, "scale": float(n == arrival.adapter)} for n in range(count)]
        return {**plain(arrival, i), "lora": lora, "cache_prompt": False}

    return body


@dataclass(frozen=True)
class Client:
    """How a server is asked: where, with what bodies, by a run's number, and with which key if it has any. No two runs
    have the same prompts: a server that keeps what it has read would have read those of the second."""

    url: str
    bodies: Callable[[int], Body]
    key: str = field(default="", repr=False)

    def run(self, spec: Poisson, slo_seconds: float, number: int) -> Summary:
        """One open-loop run."""
        asking = open_loop(self.url, generate(spec), self.bodies(number), key=self.key)
        return run(timed(asking, slo_seconds))[1]

    def warm(self, adapters: int) -> None:
        """Ask for every adapter once, so that those that fit are in RAM. Raises NoAnswer if one does not answer."""
        asked = closed(adapters, range(adapters), 8, 1)
        outcomes = run(closed_loop(self.url, asked, self.bodies(0), concurrency=16, key=self.key))
        failed = [o for o in outcomes if not o.ok]
        if failed:
            raise NoAnswer(f"{len(failed)} of {adapters} adapters did not answer, the first: {failed[0].error}")

    def residency(self) -> dict[str, int] | None:
        """See `client.residency`."""
        return run(residency(self.url, self.key))

    def capacity(self, plan: Plan) -> float:
        """Requests a second that the server finishes when it is never idle. Raises NoAnswer if one fails: what is
        refused takes no time, so the others would look like more than the server can do."""
        asked = replace(plan, requests=min(plan.requests, BURST_REQUESTS), duration=None)
        summary = self.run(asked.arrivals(BURST, plan.few, 1.0), plan.slo, 1)
        if summary.failed:
            raise NoAnswer(
                f"{summary.failed} of {summary.requests} requests failed while the capacity was measured, the first: "
                f"{summary.reasons[0]}. They are sent at once, and must find room in the server's queue (loramux serve "
                "--max-queue) and end within ten minutes (fewer --requests); or give --rate, then it is not measured"
            )
        return summary.requests_per_second


def compare(
    client: Client, plan: Plan, heard: Callable[[str], None] = lambda line: None
) -> tuple[float | None, list[Load]]:
    """The measured capacity (None where the plan has rates), and the runs of the plan: few and many adapters in turn,
    every second time the other way round. All adapters have been asked for before. Raises BadSetting, NoAnswer."""
    plan.check()
    client.warm(plan.many)
    most = None if plan.rates else client.capacity(plan)
    if most is not None:
        heard(f"capacity with {plan.few} adapters: {most:.1f} requests/s")
    levels = [(None, rate) for rate in plan.rates] if most is None else [(s, s * most) for s in plan.shares]
    for _, rate in levels:
        plan.arrivals(rate, plan.few, 1.0)  # what cannot be run is told before the first run
    loads: list[Load] = []
    for alpha in plan.alphas:
        for share, rate in levels:
            for repeat in range(plan.repeats):
                for count in (plan.few, plan.many) if repeat % 2 == 0 else (plan.many, plan.few):
                    summary = client.run(plan.arrivals(rate, count, alpha), plan.slo, len(loads) + 2)
                    loads.append(Load(count, alpha, share, rate, summary, repeat))
                    heard(_line(loads[-1]))
    return most, loads


def _line(load: Load) -> str:
    s = load.summary
    at = f"{load.rate:.2f} requests/s" if load.share is None else f"{load.share:g} of capacity"
    first = [figure(seconds, ".3f", " s") for seconds in (s.ttft_p50, s.ttft_p99)]
    failed = f", {s.failed} failed: {s.reasons[0]}" if s.failed else ""
    failed += f", {s.short} shorter than asked" if s.short else ""
    return (
        f"alpha {load.alpha}, {at}, {load.adapters} adapters: {s.finished} of {s.requests}, "
        f"{s.requests_per_second:.2f} requests/s, first token {first[0]}, p99 {first[1]}, "
        f"{s.slo_attainment:.0%} in time{failed}"
    )


def ratios(loads: Sequence[Load]) -> list[dict[str, Any]]:
    """Many adapters against few, for each alpha and rate, by the medians of the repeats: throughput, and the tail of
    the time to first token. Both are nan where a request of either failed, as `failed` (few, many) counts, or was
    shorter than asked: a server that refuses requests has more time for the others."""
    table = []
    few, many = min(load.adapters for load in loads), max(load.adapters for load in loads)
    for case in dict.fromkeys(load.case for load in loads):
        of = {n: [load for load in loads if load.case == case and load.adapters == n] for n in (few, many)}
        failed = {name: sum(load.summary.failed for load in of[n]) for name, n in (("few", few), ("many", many))}
        told = {"throughput": math.nan, "ttft_p99": math.nan}
        if not any(failed.values()) and not any(load.summary.short for n in of for load in of[n]):
            rate = {n: statistics.median(load.summary.requests_per_second for load in of[n]) for n in of}
            tail = {n: statistics.median(load.summary.ttft_p99 for load in of[n]) for n in of}
            told = {"throughput": rate[many] / rate[few], "ttft_p99": tail[many] / tail[few]}
        table.append({"alpha": case[0], "share": of[few][0].share, "rate": case[1], **told, "failed": failed})
    return table
