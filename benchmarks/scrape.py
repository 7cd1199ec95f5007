"""What records and /metrics cost: a scrape at 200 live pairs, and serving with records replaced by nothing, with them,
and scraped every second.

Run it as `python -m benchmarks.scrape`. It starts a server of its own on the embedded base, in which 200 pairs of task
and adapter have been made by real requests, and goes through the three ways in turn, in many short stretches, so that
what else the machine does falls on all alike. Answers are short, so that requests end as often as they can.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.embedded_server import MODELS, ServerProcess, serving

PAIRS = 200
PROMPT = "Once upon a time, in a town by the sea, there was a"


async def make_pairs(http: aiohttp.ClientSession, count: int) -> None:
    """Define `count` tasks over the base, and send each one request."""
    for i in range(count):
        async with http.put(f"/tasks/pair-{i}", json={"prompt": "{input}", "format": "raw"}) as answer:
            answer.raise_for_status()
        async with http.post(f"/generate?task=pair-{i}", json={"prompt": "a", "max_tokens": 2}) as answer:
            answer.raise_for_status()


async def scrape(http: aiohttp.ClientSession) -> tuple[float, bytes]:
    start = time.perf_counter()
    async with http.get("/metrics") as answer:
        body = await answer.read()
    return time.perf_counter() - start, body


async def stream(http: aiohttp.ClientSession, tokens: int) -> list[float]:
    """One answer, as the seconds between its tokens."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True, "stream": True}
    times = []
    async with http.post("/generate?task=pair-0", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b'data: {"id"') and b'"finish_reason"' not in line:
                times.append(time.perf_counter())
    return list(np.diff(times))


@dataclass
class Stretches:
    """What came of all stretches of one way: seconds between tokens, as they came and as the mean of each answer, and
    tokens a second of each stretch.
    """

    gaps: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


async def stretch(http: aiohttp.ClientSession, given: Given, scraped: bool, into: Stretches) -> None:
    """Load by clients that ask one short answer after the other."""
    done = asyncio.Event()

    async def every_second() -> None:
        while not done.is_set():
            await scrape(http)
            await asyncio.sleep(1.0)

    async def client(end: float) -> int:
        tokens = 0
        while time.perf_counter() < end:
            gaps = await stream(http, given.tokens)
            into.gaps += gaps
            into.answers.append(statistics.fmean(gaps))
            tokens += given.tokens
        return tokens

    watcher = asyncio.create_task(every_second()) if scraped else None
    start = time.perf_counter()
    found = await asyncio.gather(*(client(start + given.seconds) for _ in range(given.clients)))
    seconds = time.perf_counter() - start
    done.set()
    if watcher is not None:
        await watcher
    into.rates.append(sum(found) / seconds)


async def measure(server: ServerProcess, given: Given) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        await make_pairs(http, PAIRS)
        idle = [await scrape(http) for _ in range(30)]
        ways = {OFF: Stretches(), ON: Stretches(), SCRAPED: Stretches()}
        await stretch(http, given, False, Stretches())
        for number in range(given.rounds):
            names = list(ways)[number % 3 :] + list(ways)[: number % 3]
            for name in names if number % 2 else reversed(names):
                server.process.send_signal(signal.SIGUSR1 if name == OFF else signal.SIGUSR2)
                await stretch(http, given, name == SCRAPED, ways[name])
        body = idle[-1][1]
        return {
            "pairs": PAIRS,
            "lines": body.count(b"\n"),
            "bytes": len(body),
            "scrape_ms_p50": 1000 * statistics.median(seconds for seconds, _ in idle),
            "scrape_ms_max": 1000 * max(seconds for seconds, _ in idle),
            "token_ms_p50": {name: 1000 * float(np.percentile(way.answers, 50)) for name, way in ways.items()},
            "token_ms_p99": {name: 1000 * float(np.percentile(way.answers, 99)) for name, way in ways.items()},
            "gap_ms_p99": {name: 1000 * float(np.percentile(way.gaps, 99)) for name, way in ways.items()},
            "tokens_per_second": {name: statistics.median(way.rates) for name, way in ways.items()},
            "throughput_to": {
                f"{one} / {other}": ratio(ways[one].rates, ways[other].rates)
                for one, other in ((ON, OFF), (SCRAPED, OFF), (SCRAPED, ON))
            },
        }


def ratio(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """The median ratio of the stretches of a round, with its 95 % interval (bootstrap over rounds)."""
    ratios = np.array(ours) / np.array(theirs)
    drawn = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    low, high = np.percentile(drawn, (2.5, 97.5))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


OFF, ON, SCRAPED = "records replaced by nothing", "recorded", "recorded and scraped every second"


@dataclass(frozen=True)
class Given:
    """What is asked of the server."""

    clients: int
    tokens: int
    seconds: float
    rounds: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--models", type=Path, default=MODELS, help="where the base has been fetched")
    asked = parser.parse_args()
    given = Given(asked.clients, asked.tokens, asked.seconds, asked.rounds)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder) / "state"
        with serving(state, asked.models, module="benchmarks.switched") as server:
            found = asyncio.run(measure(server, given))
        print(json.dumps(found, indent=1))
        print((state / "server.log").read_text().splitlines()[-1])


if __name__ == "__main__":
    main()
