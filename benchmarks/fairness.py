"""Fairness: two tasks, one of which sends 50 times the other's requests. What does the small one's user wait?

A server on the embedded base, over HTTP. First its capacity is measured in a closed loop. Then, at the same total load
(a share of that capacity, Poisson arrivals), both tasks send equally in one stretch and 50 to 1 in the next, in turns,
so that what else the machine does falls on both. The small task's 95th percentile of the time to the first token, from
when a request was due, may be at most twice that of the equal stretches. A stretch during which the server was not
given a processor (`/health/live`, asked all the while, took over a second) is measured again.

Run it as `python -m benchmarks.fairness`. Exit status 1 means that a load was over the bound.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.client import Outcome, closed_loop, open_loop, timed
from benchmarks.embedded_server import MODELS, serving
from benchmarks.soak import SHAPES
from benchmarks.synthetic import write_adapter
from benchmarks.workloads import Arrival

SMALL, LARGE = 0, 1
TASKS = ("small", "large")
RATIO = 50
NEW_TOKENS = 16
SILENCE = 1.0
"""Seconds without an answer of `/health/live` that make a stretch a measurement of something else."""
WORDS = ("harbour", "letter", "winter", "copper", "garden", "signal", "orchard", "violin", "paper", "river")


def arrivals(rate: float, seconds: float, share: float, dice: np.random.Generator) -> list[Arrival]:
    """Poisson arrivals of both tasks; each request is the small one's with probability `share`."""
    times = np.cumsum(dice.exponential(1 / rate, int(rate * seconds * 1.5) + 10))
    who = np.where(dice.random(len(times)) < share, SMALL, LARGE)
    return [Arrival(float(t), int(w), 0, NEW_TOKENS) for t, w in zip(times, who, strict=True) if t < seconds]


def prompts(seed: int) -> list[str]:
    """Prompts of about 60 tokens that share no beginning."""
    dice = np.random.default_rng(seed)
    return [" ".join([str(i), *dice.choice(WORDS, 50)]) for i in range(20_000)]


def body(texts: Sequence[str], offset: int) -> Any:
    def make(arrival: Arrival, i: int) -> Mapping[str, Any]:
        prompt = texts[(offset + i) % len(texts)]
        asked = {"model": TASKS[arrival.adapter], "prompt": prompt, "max_tokens": arrival.output_tokens}
        return {**asked, "temperature": 0, "ignore_eos": True, "stream": True}

    return make


def first_tokens(outcomes: Sequence[Outcome]) -> list[float]:
    """Of the small task's requests; one that was refused or failed counts as the longest wait there is."""
    return [o.ttft if o.ok else float("inf") for o in outcomes if o.adapter == SMALL]


async def longest_silence(url: str, until: asyncio.Event) -> float:
    """The longest that `/health/live` took until then, in seconds."""
    longest = 0.0
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:
        while not until.is_set():
            start = time.perf_counter()
            await http.get("/health/live")
            longest = max(longest, time.perf_counter() - start)
            await asyncio.sleep(0.1)
    return longest


async def stretch(url: str, planned: Sequence[Arrival], make: Any) -> tuple[list[Outcome], float]:
    """One stretch, and the longest silence during it."""
    over = asyncio.Event()
    listening = asyncio.create_task(longest_silence(url, over))
    outcomes = await open_loop(url, planned, make, timeout=120)
    over.set()
    return outcomes, await listening


def p95(waits: Sequence[float]) -> float:
    return float(np.percentile(np.asarray(waits), 95, method="higher")) if len(waits) else float("nan")


def _ms(seconds: float) -> float | str:
    return round(1000 * seconds, 1) if np.isfinite(seconds) else "refused"


async def measure(url: str, loads: Sequence[float], seconds: float, rounds: int) -> list[dict[str, Any]]:
    texts, dice, sent = prompts(1), np.random.default_rng(2), 0
    warm = [Arrival(0.0, i % 2, 0, NEW_TOKENS) for i in range(300)]
    await closed_loop(url, warm[:60], body(texts, sent), 32)
    _, summary = await timed(closed_loop(url, warm, body(texts, sent + 60), 32))
    sent += 360
    capacity = summary.requests_per_second
    found = []
    for load in loads:
        waits: dict[str, list[float]] = {"equal": [], "uneven": []}
        refused, again = {"equal": 0, "uneven": 0}, 0
        turns = [("equal", 0.5), ("uneven", 1 / (RATIO + 1))] * rounds
        while turns:
            kind, share = turns[0]
            planned = arrivals(load * capacity, seconds, share, dice)
            outcomes, silence = await stretch(url, planned, body(texts, sent))
            sent += len(planned)
            if silence > SILENCE and again < rounds:
                again += 1
                continue
            turns.pop(0)
            waits[kind] += first_tokens(outcomes)
            refused[kind] += sum(not o.ok for o in outcomes)
        tails = {kind: p95(w) for kind, w in waits.items()}
        found.append(
            {
                "load": load,
                "requests a second": round(load * capacity, 1),
                "samples": {kind: len(w) for kind, w in waits.items()},
                "refused": refused,
                "stretches measured again": again,
                "ttft p50 ms": {kind: round(1000 * float(np.median(w)), 1) for kind, w in waits.items()},
                "ttft p95 ms": {kind: _ms(tail) for kind, tail in tails.items()},
                "ratio": round(tails["uneven"] / tails["equal"], 2),
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--loads", type=float, nargs="+", default=[0.6, 0.9, 1.3], help="shares of the capacity")
    parser.add_argument("--seconds", type=float, default=20.0, help="of one stretch")
    parser.add_argument("--rounds", type=int, default=3, help="stretches of each kind")
    parser.add_argument("--models", type=Path, default=MODELS, help="where the base has been fetched")
    given, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, task in enumerate(TASKS):
            write_adapter(folder / "adapters" / task, SHAPES, rank=16, seed=seed)
        with serving(folder / "state", given.models, "--adapter-dir", str(folder / "adapters"), *flags) as server:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                for task in TASKS:
                    http.post("/adapters", json={"name": task, "source": task}).raise_for_status()
                    route = {"choice": [{"name": task}]}
                    body = {"prompt": "{input}", "format": "raw", "route": route}
                    http.put(f"/tasks/{task}", json=body).raise_for_status()
            found = asyncio.run(measure(server.url, given.loads, given.seconds, given.rounds))
    print(json.dumps(found, indent=1))
    return 1 if any(not one["ratio"] <= 2 for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
