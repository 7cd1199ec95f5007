"""S-LoRA's benchmark on a running server: throughput and latency with many adapters compared to few."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from benchmarks.client import (
    Body,
    NoAnswer,
    Summary,
    closed_loop,
    format_number,
    open_loop,
    run,
    server_stats,
    timed,
)
from benchmarks.workloads import Arrival, Poisson, closed, generate
from server.errors import BadSetting

BURST_RATE = 400.0
"""Requests per second that exceed the capacity of any server here."""
BURST_REQUESTS = 400
"""Maximum number of requests to measure the capacity."""
WORDS = (
    "the of and to in is you that it he was for on are as with his they at be this have from or one had by but not "
    "what all were we when your can said there use an each which she do how their if will up other about out many then"
).split()
"""Words that are a single token in nearly every vocabulary."""
MIN_VALUE, MAX_VALUE = 1e-4, 1e6
"""Limits of numeric options."""
PROMPT_STRIDE = 65_537
"""Distance between the start positions of prompts in the random tokens. It is prime and exceeds their number, so that
no two prompts of a run are equal."""


def check_positive(options: Mapping[str, Sequence[float]]) -> None:
    """Raise BadSetting for an option with a value outside of the limits."""
    for name, values in options.items():
        if not all(MIN_VALUE <= value <= MAX_VALUE for value in values):
            given = ", ".join(map(str, values))
            raise BadSetting(f"--{name} must be above 0, from {MIN_VALUE:g} to {MAX_VALUE:.0f}, not {given}.", name)


@dataclass(frozen=True)
class Plan:
    """A comparison of `few` and `many` adapters under the same arrivals.

    Attributes:
        requests: requests per run, unless `duration` (seconds) is given.
        alphas: exponents of adapter popularity.
        shares: rates as shares of the measured capacity, unless `rates` (requests per second) are given.
        prompt, output: lengths in tokens, [low, high).
        slo: seconds to the first token.
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
        """Raise BadSetting if the plan cannot be run."""
        if not 1 <= self.few < self.many:
            raise BadSetting(f"--many ({self.many}) must exceed --few ({self.few}), which must be at least 1.", "many")
        options = {"cv": (self.cv,), "slo": (self.slo,), "alpha": self.alphas, "share": self.shares, "rate": self.rates}
        options |= {"requests": (self.requests,), "many": (self.many,)}
        options["duration"] = () if self.duration is None else (self.duration,)
        check_positive(options)
        for rate in self.rates:
            self.arrivals(rate, self.few, 1.0)

    def arrivals(self, rate: float, adapters: int, alpha: float) -> Poisson:
        """The arrivals of one run. Raises BadSetting if there are none, or too many."""
        duration = (self.requests + 0.5) / rate if self.duration is None else self.duration
        if not 1 <= int(rate * duration) <= MAX_VALUE:
            count = "no request is" if rate * duration < 1 else f"more than {MAX_VALUE:.0f} requests are"
            raise BadSetting(f"{count} due within a --duration of {duration:g} s at {rate:.3g} per second.", "duration")
        return Poisson(rate, duration, adapters, alpha, self.cv, self.prompt, self.output, self.seed)


@dataclass(frozen=True)
class Load:
    """One run: number of adapters, popularity, share of the capacity (None if unknown), rate, and the results."""

    adapters: int
    alpha: float
    share: float | None
    rate: float
    summary: Summary
    repeat: int = 0

    @property
    def case(self) -> tuple[float, float]:
        """What runs with few and with many adapters have in common."""
        return self.alpha, self.rate

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def completion_body(
    names: Sequence[str],
    vocab: int,
    text: bool = False,
    seed: int = 1,
    *,
    chat: bool = False,
    ignore_eos: bool = True,
) -> Body:
    """Bodies of greedy streaming requests with random prompts.

    Args:
        names: model name of each adapter.
        vocab: token ids of prompts are below this.
        text: send words instead of token ids.
        chat: send words as a chat message.
        ignore_eos: ask for answers of full length. Some servers reject this field.
    """
    text = text or chat
    random = np.random.RandomState(seed)
    drawn = (random.choice(WORDS, 1 << 16) if text else random.randint(100, vocab, 1 << 16)).tolist()

    def body(arrival: Arrival, i: int) -> Mapping[str, Any]:
        start = (i * PROMPT_STRIDE) % (len(drawn) - arrival.prompt_tokens)
        tokens = drawn[start : start + arrival.prompt_tokens]
        content = " ".join(tokens) if text else tokens
        prompt = {"messages": [{"role": "user", "content": content}]} if chat else {"prompt": content}
        return {
            "model": names[arrival.adapter],
            **prompt,
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            **({"ignore_eos": True} if ignore_eos else {}),
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    return body


def llama_body(count: int, vocab: int, text: bool = False, seed: int = 1, **options: bool) -> Body:
    """The same requests for llama-server: scale 1 for the request's adapter, 0 for the others, and no prompt cache."""
    plain = completion_body([""] * max(count, 1), vocab, text, seed, **options)

    def body(arrival: Arrival, i: int) -> Mapping[str, Any]:
        lora = [{"id": n, "scale": float(n == arrival.adapter)} for n in range(count)]
        return {**plain(arrival, i), "lora": lora, "cache_prompt": False}

    return body


@dataclass(frozen=True)
class Client:
    """A server under test. `bodies` gives the bodies of a run by its number: runs must not share prompts, which a
    server may cache."""

    url: str
    bodies: Callable[[int], Body]
    key: str = field(default="", repr=False)

    def run(self, spec: Poisson, slo: float, number: int) -> Summary:
        """One open-loop run."""
        requests = open_loop(self.url, generate(spec), self.bodies(number), key=self.key)
        return run(timed(requests, slo))[1]

    def warm_up(self, adapters: int) -> None:
        """Request every adapter once. Raises NoAnswer if one fails."""
        arrivals = closed(adapters, range(adapters), 8, 1)
        outcomes = run(closed_loop(self.url, arrivals, self.bodies(0), concurrency=16, key=self.key))
        failed = [o for o in outcomes if not o.ok]
        if failed:
            raise NoAnswer(f"{len(failed)} of {adapters} adapters did not answer; the first: {failed[0].error}")

    def stats(self) -> dict[str, int] | None:
        return run(server_stats(self.url, self.key))

    def capacity(self, plan: Plan) -> float:
        """Requests per second when the server is never idle. Raises NoAnswer if a request fails."""
        burst = replace(plan, requests=min(plan.requests, BURST_REQUESTS), duration=None)
        summary = self.run(burst.arrivals(BURST_RATE, plan.few, 1.0), plan.slo, 1)
        if summary.failed:
            raise NoAnswer(
                f"{summary.failed} of {summary.requests} requests failed during the measurement of the capacity; the "
                f"first: {summary.reasons[0]}. All are sent at once and must fit the queue (loramux serve --max-queue) "
                "and finish within ten minutes (use fewer --requests). With --rate the capacity is not measured."
            )
        return summary.requests_per_second


def compare(
    client: Client, plan: Plan, log: Callable[[str], None] = lambda line: None
) -> tuple[float | None, list[Load]]:
    """Run the plan: few and many adapters alternately, every second repeat in reverse order.

    Returns:
        The measured capacity in requests per second (None if the plan has rates), and the runs.
    """
    plan.check()
    client.warm_up(plan.many)
    capacity = None if plan.rates else client.capacity(plan)
    if capacity is not None:
        log(f"capacity with {plan.few} adapters: {capacity:.1f} requests/s")
    levels = [(None, rate) for rate in plan.rates] if capacity is None else [(s, s * capacity) for s in plan.shares]
    for _, rate in levels:
        plan.arrivals(rate, plan.few, 1.0)  # raises before the first run
    loads: list[Load] = []
    for alpha in plan.alphas:
        for share, rate in levels:
            for repeat in range(plan.repeats):
                for count in (plan.few, plan.many) if repeat % 2 == 0 else (plan.many, plan.few):
                    summary = client.run(plan.arrivals(rate, count, alpha), plan.slo, len(loads) + 2)
                    loads.append(Load(count, alpha, share, rate, summary, repeat))
                    log(_describe(loads[-1]))
    return capacity, loads


def _describe(load: Load) -> str:
    s = load.summary
    rate = f"{load.rate:.2f} requests/s" if load.share is None else f"{load.share:g} of capacity"
    first, p99 = (format_number(seconds, ".3f", " s") for seconds in (s.ttft_p50, s.ttft_p99))
    failed = f", {s.failed} failed: {s.reasons[0]}" if s.failed else ""
    short = f", {s.short} shorter than requested" if s.short else ""
    return (
        f"alpha {load.alpha}, {rate}, {load.adapters} adapters: {s.finished} of {s.requests} finished, "
        f"{s.requests_per_second:.2f} requests/s, time to first token {first}, p99 {p99}, "
        f"{s.slo_attainment:.0%} within the SLO{failed}{short}"
    )


def ratios(loads: Sequence[Load]) -> list[dict[str, Any]]:
    """Many adapters over few, for each alpha and rate, by medians: throughput and p99 of the time to first token.

    Both are NaN if a request failed or was shorter than requested: a server that rejects requests looks faster.
    """
    table = []
    few, many = min(load.adapters for load in loads), max(load.adapters for load in loads)
    for case in dict.fromkeys(load.case for load in loads):
        runs = {n: [load for load in loads if load.case == case and load.adapters == n] for n in (few, many)}
        failed = {name: sum(load.summary.failed for load in runs[n]) for name, n in (("few", few), ("many", many))}
        row = {"throughput": math.nan, "ttft_p99": math.nan}
        if not any(failed.values()) and not any(load.summary.short for n in runs for load in runs[n]):
            rate = {n: statistics.median(load.summary.requests_per_second for load in runs[n]) for n in runs}
            tail = {n: statistics.median(load.summary.ttft_p99 for load in runs[n]) for n in runs}
            row = {"throughput": rate[many] / rate[few], "ttft_p99": tail[many] / tail[few]}
        table.append({"alpha": case[0], "share": runs[few][0].share, "rate": case[1], **row, "failed": failed})
    return table
