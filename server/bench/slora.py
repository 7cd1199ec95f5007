"""S-LoRA's question to a running server: does it serve a thousand adapters as well as five?

Owns the runs and what they are compared by. The server, its adapters and its settings are given; how a request names
its adapter is given too, so any OpenAI-compatible server can be asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from server.bench.client import Body, NoAnswer, Summary, closed_loop, open_loop, timed
from server.bench.workloads import Arrival, Poisson, closed, generate

BURST = 400.0
"""Requests a second that no server here keeps up with: what it finishes under this is its capacity."""


@dataclass(frozen=True)
class Load:
    """One run: how many adapters, how popular (`alpha`), at what share of the capacity, and what came of it."""

    adapters: int
    alpha: float
    share: float
    rate: float
    summary: Summary

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def body_of(names: Sequence[str], vocab: int, seed: int = 1) -> Body:
    """Greedy completions of random token ids, each exactly as long as its arrival says."""
    random = np.random.RandomState(seed)
    ids = random.randint(100, vocab, 1 << 16).tolist()

    def body(arrival: Arrival, i: int) -> Mapping[str, Any]:
        at = (i * 131) % (len(ids) - arrival.prompt_tokens)
        return {
            "model": names[arrival.adapter],
            "prompt": ids[at : at + arrival.prompt_tokens],
            "max_tokens": arrival.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    return body


def llama_body(count: int, vocab: int) -> Body:
    """The same requests in llama-server's own words: adapter i at scale 1, the others at 0."""
    plain = body_of([""] * count, vocab)

    def body(arrival: Arrival, i: int) -> Mapping[str, Any]:
        lora = [{"id": n, "scale": float(n == arrival.adapter)} for n in range(count)]
        return {**plain(arrival, i), "lora": lora, "cache_prompt": False}

    return body


def run(url: str, spec: Poisson, body: Body, slo_seconds: float = 6.0) -> Summary:
    """One open-loop run."""
    return asyncio.run(timed(open_loop(url, generate(spec), body), slo_seconds))[1]


def warm(url: str, body: Body, adapters: int) -> None:
    """Ask for every adapter once, so that those that fit are in RAM. Raises NoAnswer if one does not answer."""
    outcomes = asyncio.run(closed_loop(url, closed(adapters, range(adapters), 8, 1), body, concurrency=16))
    failed = [o for o in outcomes if not o.ok]
    if failed:
        raise NoAnswer(f"{len(failed)} of {adapters} adapters did not answer, the first: {failed[0].error}")


def capacity(url: str, body: Body, adapters: int, requests: int = 400) -> float:
    """Requests a second that the server finishes when it is never idle."""
    spec = Poisson(rate=BURST, duration=requests / BURST, adapters=adapters)
    return run(url, spec, body).requests_per_second


def compare(
    url: str,
    body: Body,
    *,
    few: int = 5,
    many: int = 1000,
    alphas: Sequence[float] = (1.0, 0.3),
    shares: Sequence[float] = (0.7, 1.2),
    requests: int = 1000,
    heard: Callable[[str], None] = lambda line: None,
) -> tuple[float, list[Load]]:
    """The measured capacity, and a run of at least `requests` for each alpha, share and number of adapters, all of
    which have been asked for before."""
    warm(url, body, many)
    most = capacity(url, body, few)
    heard(f"capacity with {few} adapters: {most:.1f} requests/s")
    loads = []
    for alpha in alphas:
        for share in shares:
            for count in (few, many):
                rate = share * most
                spec = Poisson(rate=rate, duration=(requests + 1) / rate, adapters=count, alpha=alpha)
                load = Load(count, alpha, share, rate, run(url, spec, body))
                loads.append(load)
                s = load.summary
                heard(
                    f"alpha {alpha}, {share:.1f} of capacity, {count} adapters: {s.finished} of {s.requests}, "
                    f"{s.requests_per_second:.2f} requests/s, first token {s.ttft_p50:.3f} s, p99 {s.ttft_p99:.3f} s"
                )
    return most, loads


def ratios(loads: Sequence[Load]) -> list[dict[str, float]]:
    """Many adapters against few, for each alpha and share: throughput, and the tail of the time to first token."""
    table = []
    for a, b in zip(loads[::2], loads[1::2], strict=True):
        table.append(
            {
                "alpha": a.alpha,
                "share": a.share,
                "throughput": b.summary.requests_per_second / a.summary.requests_per_second,
                "ttft_p99": b.summary.ttft_p99 / a.summary.ttft_p99,
            }
        )
    return table
