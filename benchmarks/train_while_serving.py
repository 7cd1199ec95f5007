"""Serving at half load while a job trains: failed requests, decoding, the job's speed, and whether a bit changes.

Run it as `python -m benchmarks.train_while_serving`. It starts a server of its own on the embedded base, finds how many
requests a second it can serve, and then sends half as many, at random times, with the job running and paused in turn,
so that what else the machine does falls on both alike. The job's solo speed comes from stretches without a request.
`processors` says what the server, the job and this program's own requests take of the machine meanwhile, and `in_steps`
the share of the time in which the engine is within a step: the job can have no more than they leave. A stretch beside
which other processes took more than `--other` of a processor is measured again.
Before, and again and again while it trains under load, the same prompts are answered greedily with log-probabilities,
which have to be equal.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.server_process import MODELS, ServerProcess, loramux_server

WORDS = "the sea was calm and a boat went out to where the old light had been seen by all who came home late".split()
PROMPT_WORDS, TOKENS = 48, 48
PROBES = 12
OURS = ("server", "job", "load")
SEEDS = itertools.count(2)
"""Of prompts: no two stretches ask for the same, since the prefix cache would know them."""
AGAIN = 6
"""How often a stretch is measured at most."""
JOB = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "publish": "never"}


@dataclass
class Stretch:
    """What was seen in a stretch of load: seconds between tokens, seconds of whole requests, failures."""

    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    failed: int = 0
    sent: int = 0
    job_tokens: float = 0.0
    seconds: float = 0.0
    used: Counter[str] = field(default_factory=Counter)
    """Seconds of processors by who took them (`machine` is all), and `steps`: those that the engine spent in steps."""

    def join(self, other: Stretch) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def other(self) -> float:
        """Processors that other processes took."""
        return (self.used["machine"] - sum(self.used[who] for who in OURS)) / self.seconds

    def told(self) -> dict[str, Any]:
        """Of the time: processors used by each, and the share that the engine was within a step."""
        told = {who: round(self.used[who] / self.seconds, 3) for who in OURS} | {"other": round(self.other, 3)}
        return {"processors": told, "in_steps": round(self.used["steps"] / self.seconds, 3)}


Sending = Callable[[], Awaitable[Stretch]]


def prompt(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(PROMPT_WORDS))


async def answer(http: aiohttp.ClientSession, text: str, seen: Stretch) -> None:
    """One streamed answer; anything but a whole one is a failure."""
    body = {"prompt": text, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    start, times, whole = time.perf_counter(), [], False
    seen.sent += 1
    try:
        async with http.post("/generate", json=body) as got:
            async for line in got.content:
                if line.startswith(b'data: {"id"') and b'"finish_reason"' not in line:
                    times.append(time.perf_counter())
                whole |= b'"finish_reason": "length"' in line
    except (aiohttp.ClientError, TimeoutError):
        whole = False
    seen.failed += not whole
    seen.gaps += list(np.diff(times))
    seen.whole.append(time.perf_counter() - start)


async def capacity(http: aiohttp.ClientSession, clients: int, seconds: float) -> float:
    """Requests a second with so many clients who never pause."""
    seen, end = Stretch(), time.perf_counter() + seconds

    async def client() -> None:
        draw = random.Random(next(SEEDS))
        while time.perf_counter() < end:
            await answer(http, prompt(draw), seen)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    assert not seen.failed
    return len(seen.whole) / (time.perf_counter() - start)


async def load(http: aiohttp.ClientSession, rate: float, seconds: float) -> Stretch:
    """Requests at random times, `rate` a second on average, whatever becomes of those before."""
    seen, draw = Stretch(), random.Random(next(SEEDS))
    running = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        running.append(asyncio.create_task(answer(http, prompt(draw), seen)))
        await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*running)
    return seen


async def probe(http: aiohttp.ClientSession) -> list[Any]:
    """Tokens and log-probabilities of fixed prompts."""
    draw, found = random.Random(0), []
    for _ in range(PROBES):
        body = {"prompt": prompt(draw), "max_tokens": 16, "ignore_eos": True, "logprobs": 5}
        async with http.post("/generate", json=body) as got:
            told = await got.json()
            found.append((told["text"], told["logprobs"]))
    return found


async def start_job(http: aiohttp.ClientSession, model: str, batch: int) -> str:
    draw = random.Random(1)
    lines = "".join(json.dumps({"input": prompt(draw), "output": draw.choice(WORDS)}) + "\n" for _ in range(512))
    form = aiohttp.FormData()
    form.add_field("purpose", "fine-tune")
    form.add_field("file", lines.encode(), filename="words.jsonl")
    async with http.post("/v1/files", data=form) as got:
        file = (await got.json())["id"]
    hyper = {"n_epochs": 100, "batch_size": batch}
    body = {"model": model, "training_file": file, "hyperparameters": hyper, "lora": JOB}
    async with http.post("/v1/fine_tuning/jobs", json=body) as got:
        got.raise_for_status()
        return str((await got.json())["id"])


async def job(http: aiohttp.ClientSession, id: str) -> dict[str, Any]:
    async with http.get(f"/jobs/{id}") as got:
        return dict(await got.json())


async def asked(http: aiohttp.ClientSession, id: str, what: str) -> None:
    """Pause or resume the job, and wait until it has been."""
    async with http.post(f"/v1/fine_tuning/jobs/{id}/{what}") as got:
        got.raise_for_status()
    while what == "pause" and (await job(http, id))["status"] != "paused":
        await asyncio.sleep(0.05)


async def trains(http: aiohttp.ClientSession, id: str) -> None:
    """Wait until the job has made two more steps."""
    before = (await job(http, id))["step"]
    while (await job(http, id))["step"] < before + 2:
        await asyncio.sleep(0.1)


async def used(http: aiohttp.ClientSession, server: int) -> Counter[str]:
    """See `Stretch.used`, since each process began; the job's is the server's only child."""
    children = [c for file in Path(f"/proc/{server}/task").glob("*/children") for c in file.read_text().split()]
    async with http.get("/stats") as got:
        steps = (await got.json())["engine"]["seconds"]
    ours = {"server": taken(server), "job": sum(taken(int(c)) for c in children), "load": taken(os.getpid())}
    idle = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(value for name, value in psutil.cpu_times()._asdict().items() if name not in idle)
    return Counter(**ours, machine=busy, steps=steps)


def taken(process: int) -> float:
    """Seconds of processors that a process has used."""
    times = psutil.Process(process).cpu_times()
    return float(times.user + times.system)


async def during(http: aiohttp.ClientSession, server: ServerProcess, id: str, what: Sending, other: float) -> Stretch:
    """What `what` has seen, with the tokens that the job has trained on meanwhile, by whole steps.

    Of stretches that are measured again only the requests are counted, and those that failed.
    """
    sent = failed = 0
    for _ in range(AGAIN):
        start, before, uses = time.perf_counter(), await job(http, id), await used(http, server.process.pid)
        seen = await what()
        after, seen.used = await job(http, id), await used(http, server.process.pid)
        seen.used.subtract(uses)
        seen.job_tokens, seen.seconds = after["tokens"] - before["tokens"], time.perf_counter() - start
        sent, failed = sent + seen.sent, failed + seen.failed
        if seen.other <= other:
            break
    seen.sent, seen.failed = sent, failed
    return seen


async def nothing(seconds: float) -> Stretch:
    """No request."""
    await asyncio.sleep(seconds)
    return Stretch()


async def measure(server: ServerProcess, given: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        async with http.get("/stats") as got:
            base = (await got.json())["base"]
        await capacity(http, given.clients, 3.0)
        most = given.most or await capacity(http, given.clients, given.seconds)
        expected = await probe(http)
        id = await start_job(http, base["name"], given.batch)
        await trains(http, id)
        alone, beside, solo, equal = Stretch(), Stretch(), Stretch(), 0
        probes = 0
        for _ in range(given.rounds):
            solo.join(await during(http, server, id, lambda: nothing(given.seconds), given.other))
            for held in (False, True):
                if held:
                    await asked(http, id, "pause")
                sending = functools.partial(load, http, most / 2, given.seconds)
                seen = await during(http, server, id, sending, given.other)
                (alone if held else beside).join(seen)
            await asked(http, id, "resume")
            await trains(http, id)
            under, found = await asyncio.gather(load(http, most / 2, 3.0), probe(http))
            beside.failed, beside.sent = beside.failed + under.failed, beside.sent + under.sent
            probes, equal = probes + PROBES, equal + sum(a == b for a, b in zip(found, expected, strict=True))
        async with http.post(f"/v1/fine_tuning/jobs/{id}/cancel") as got:
            got.raise_for_status()
    return {
        "base": base["name"], "kernels": base["kernels"], "requests_per_second_at_most": round(most, 2),
        "requests": {"alone": alone.sent, "beside": beside.sent},
        "failed": {"alone": alone.failed, "beside": beside.failed},
        "gap_ms": {name: {p: round(1000 * float(np.percentile(s.gaps, p)), 2) for p in (50, 95, 99)}
                   for name, s in (("alone", alone), ("beside", beside))},
        "request_s_p50": {"alone": statistics.median(alone.whole), "beside": statistics.median(beside.whole)},
        "decode_p95_ratio": float(np.percentile(beside.gaps, 95) / np.percentile(alone.gaps, 95)),
        "job_tokens_per_second": {"solo": solo.job_tokens / solo.seconds, "beside": beside.job_tokens / beside.seconds},
        "job_share": (beside.job_tokens / beside.seconds) / (solo.job_tokens / solo.seconds),
        "use": {"solo": solo.told(), "alone": alone.told(), "beside": beside.told()},
        "probes_equal": f"{equal} of {probes}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=16, help="those that find out how much there can be")
    parser.add_argument("--most", type=float, help="requests a second at most, if that is known already")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each stretch")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--other", type=float, default=0.1, help="processors that others may take in a stretch")
    parser.add_argument("--batch", type=int, default=4, help="examples of an update of the job")
    parser.add_argument("--models", type=Path, default=MODELS, help="where the base has been fetched")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, loramux_server(Path(folder) / "state", given.models) as server:
        print(json.dumps(asyncio.run(measure(server, given)), indent=1))


if __name__ == "__main__":
    main()
