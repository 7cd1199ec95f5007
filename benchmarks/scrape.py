"""What /metrics costs: the time of a scrape at 200 live pairs, and decoding while scraped every second and while not.

Run it as `python -m benchmarks.scrape`. It starts servers of its own on the embedded base, in which 200 (task, adapter)
pairs have been made by real requests, and alternates stretches of load with and without scrapes, so that what else the
machine does falls on both alike.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.serving import MODELS, serving

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
    async with http.post("/generate", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b'data: {"id"') and b'"finish_reason"' not in line:
                times.append(time.perf_counter())
    return list(np.diff(times))


async def stretch(http: aiohttp.ClientSession, clients: int, tokens: int, scraped: bool) -> tuple[list[float], float]:
    """Load by `clients` streams at once: the gaps between their tokens, and tokens a second."""
    done = asyncio.Event()

    async def every_second() -> None:
        while not done.is_set():
            await scrape(http)
            await asyncio.sleep(1.0)

    watcher = asyncio.create_task(every_second()) if scraped else None
    start = time.perf_counter()
    gaps = [gap for gaps in await asyncio.gather(*(stream(http, tokens) for _ in range(clients))) for gap in gaps]
    seconds = time.perf_counter() - start
    done.set()
    if watcher is not None:
        await watcher
    return gaps, clients * tokens / seconds


async def measure(url: str, clients: int, tokens: int, rounds: int) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        await make_pairs(http, PAIRS)
        idle = [await scrape(http) for _ in range(30)]
        gaps: dict[bool, list[float]] = {False: [], True: []}
        rates: dict[bool, list[float]] = {False: [], True: []}
        await stretch(http, clients, tokens // 4, False)
        for number in range(rounds):
            for scraped in (False, True) if number % 2 else (True, False):
                found, rate = await stretch(http, clients, tokens, scraped)
                gaps[scraped] += found
                rates[scraped].append(rate)
        body = idle[-1][1]
        return {
            "pairs": PAIRS,
            "lines": body.count(b"\n"),
            "bytes": len(body),
            "scrape_ms_p50": 1000 * statistics.median(seconds for seconds, _ in idle),
            "scrape_ms_max": 1000 * max(seconds for seconds, _ in idle),
            "clients": clients,
            "gap_ms_p50": {name: 1000 * float(np.percentile(gaps[key], 50)) for key, name in WHEN},
            "gap_ms_p99": {name: 1000 * float(np.percentile(gaps[key], 99)) for key, name in WHEN},
            "tokens_per_second": {name: statistics.median(rates[key]) for key, name in WHEN},
        }


WHEN = ((False, "unscraped"), (True, "scraped every second"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--models", type=Path, default=MODELS, help="where the base has been fetched")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder) / "state", given.models) as server:
        print(json.dumps(asyncio.run(measure(server.url, given.clients, given.tokens, given.rounds)), indent=1))


if __name__ == "__main__":
    main()
