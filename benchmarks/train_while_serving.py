"""Training beside serving at half load: failed requests, decode latency, training speed, and equality of answers.

    python -m benchmarks.train_while_serving

The script starts a server on the embedded base, measures its capacity, and sends half as many requests at random
times, with a training job that runs and pauses in turn. The job's solo speed is measured without requests. A period is
measured again if other processes used more than --other of a processor. The same prompts are answered greedily before
and during the training, and the answers and log-probabilities must be equal.

In the result, `processors` are those used by the server, the job and this client, and `in_steps` is the share of the
time in which the engine runs a step.
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
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil

from benchmarks.server_process import MODELS, ServerProcess, loramux_server

WORDS = "the sea was calm and a boat went out to where the old light had been seen by all who came home late".split()
PROMPT_WORDS, NEW_TOKENS = 48, 48
PROBES = 12
OWN_PROCESSES = ("server", "job", "load")
SEEDS = itertools.count(2)
"""Seeds of prompts. They differ, because of the prefix cache."""
MAX_ATTEMPTS = 6
"""Measurements of a period that other processes disturb."""
LORA = {"r": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "publish": "never"}


@dataclass
class Period:
    """A period of load: gaps between tokens and durations in seconds, failures, and processor time by process."""

    gaps: list[float] = field(default_factory=list)
    durations: list[float] = field(default_factory=list)
    failed: int = 0
    sent: int = 0
    job_tokens: float = 0.0
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)
    """Processor seconds of each own process and of the `machine`, and the seconds that the engine spent in `steps`."""

    def add(self, other: Period) -> None:
        self.cpu = {name: self.cpu.get(name, 0.0) + value for name, value in other.cpu.items()}
        for name in ("gaps", "durations", "failed", "sent", "job_tokens", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def other(self) -> float:
        """Processors used by other processes."""
        return (self.cpu["machine"] - sum(self.cpu[name] for name in OWN_PROCESSES)) / self.seconds

    def usage(self) -> dict[str, Any]:
        used = {name: round(self.cpu[name] / self.seconds, 3) for name in OWN_PROCESSES}
        return {"processors": used | {"other": round(self.other, 3)},
                "in_steps": round(self.cpu["steps"] / self.seconds, 3)}  # fmt: skip


def random_prompt(draw: random.Random) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(PROMPT_WORDS))


async def request(http: aiohttp.ClientSession, text: str, period: Period) -> None:
    """Stream one answer. An incomplete answer counts as failed."""
    body = {"prompt": text, "max_tokens": NEW_TOKENS, "ignore_eos": True, "stream": True}
    start, times, complete = time.perf_counter(), [], False
    period.sent += 1
    try:
        async with http.post("/generate", json=body) as answer:
            async for line in answer.content:
                if line.startswith(b'data: {"id"') and b'"finish_reason"' not in line:
                    times.append(time.perf_counter())
                complete |= b'"finish_reason": "length"' in line
    except (aiohttp.ClientError, TimeoutError):
        complete = False
    period.failed += not complete
    period.gaps += list(np.diff(times))
    period.durations.append(time.perf_counter() - start)


async def measure_capacity(http: aiohttp.ClientSession, clients: int, seconds: float) -> float:
    """Requests per second with clients that never pause."""
    period, end = Period(), time.perf_counter() + seconds

    async def client() -> None:
        draw = random.Random(next(SEEDS))
        while time.perf_counter() < end:
            await request(http, random_prompt(draw), period)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    if period.failed:
        raise RuntimeError(f"{period.failed} of {period.sent} requests failed")
    return len(period.durations) / (time.perf_counter() - start)


async def send_load(http: aiohttp.ClientSession, rate: float, seconds: float) -> Period:
    """Send requests at random times, `rate` per second on average."""
    period, draw = Period(), random.Random(next(SEEDS))
    running = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        running.append(asyncio.create_task(request(http, random_prompt(draw), period)))
        await asyncio.sleep(draw.expovariate(rate))
    await asyncio.gather(*running)
    return period


async def idle(seconds: float) -> Period:
    await asyncio.sleep(seconds)
    return Period()


async def probe(http: aiohttp.ClientSession) -> list[Any]:
    """Answers and log-probabilities of fixed prompts."""
    draw, found = random.Random(0), []
    for _ in range(PROBES):
        body = {"prompt": random_prompt(draw), "max_tokens": 16, "ignore_eos": True, "logprobs": 5}
        async with http.post("/generate", json=body) as answer:
            result = await answer.json()
            found.append((result["text"], result["logprobs"]))
    return found


async def start_job(http: aiohttp.ClientSession, model: str, batch: int) -> str:
    """Upload random examples and start a training job. Returns its id."""
    draw = random.Random(1)
    lines = "".join(json.dumps({"input": random_prompt(draw), "output": draw.choice(WORDS)}) + "\n" for _ in range(512))
    form = aiohttp.FormData()
    form.add_field("purpose", "fine-tune")
    form.add_field("file", lines.encode(), filename="words.jsonl")
    async with http.post("/v1/files", data=form) as answer:
        file = (await answer.json())["id"]
    hyper = {"n_epochs": 100, "batch_size": batch}
    body = {"model": model, "training_file": file, "hyperparameters": hyper, "lora": LORA}
    async with http.post("/v1/fine_tuning/jobs", json=body) as answer:
        answer.raise_for_status()
        return str((await answer.json())["id"])


async def get_job(http: aiohttp.ClientSession, job: str) -> dict[str, Any]:
    async with http.get(f"/jobs/{job}") as answer:
        return dict(await answer.json())


async def control_job(http: aiohttp.ClientSession, job: str, action: str) -> None:
    """Pause, resume or cancel the job. Waits until it is paused."""
    async with http.post(f"/v1/fine_tuning/jobs/{job}/{action}") as answer:
        answer.raise_for_status()
    while action == "pause" and (await get_job(http, job))["status"] != "paused":
        await asyncio.sleep(0.05)


async def wait_for_steps(http: aiohttp.ClientSession, job: str) -> None:
    """Wait until the job has made two more steps."""
    before = (await get_job(http, job))["step"]
    while (await get_job(http, job))["step"] < before + 2:
        await asyncio.sleep(0.1)


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


async def cpu_usage(http: aiohttp.ClientSession, server: int) -> dict[str, float]:
    """Processor seconds so far, as in `Period.cpu`. The job is the only child of the server."""
    children = [c for file in Path(f"/proc/{server}/task").glob("*/children") for c in file.read_text().split()]
    async with http.get("/stats") as answer:
        steps = float((await answer.json())["engine"]["seconds"])
    not_busy = ("idle", "iowait", "guest", "guest_nice")
    machine = sum(value for name, value in psutil.cpu_times()._asdict().items() if name not in not_busy)
    job = sum(cpu_seconds(int(c)) for c in children)
    return {"server": cpu_seconds(server), "job": job, "load": cpu_seconds(os.getpid()), "machine": machine,
            "steps": steps}  # fmt: skip


async def measure_period(
    http: aiohttp.ClientSession, server: ServerProcess, job: str, load: Callable[[], Awaitable[Period]], limit: float
) -> Period:
    """A period of `load` with the tokens that the job trained meanwhile.

    Repeated while other processes use more than `limit` processors; then only requests and failures of the earlier
    attempts are counted.
    """
    sent = failed = 0
    for _ in range(MAX_ATTEMPTS):
        pid = server.process.pid
        start, before, cpu = time.perf_counter(), await get_job(http, job), await cpu_usage(http, pid)
        period = await load()
        after, used = await get_job(http, job), await cpu_usage(http, pid)
        period.cpu = {name: used[name] - cpu[name] for name in used}
        period.job_tokens, period.seconds = after["tokens"] - before["tokens"], time.perf_counter() - start
        sent, failed = sent + period.sent, failed + period.failed
        if period.other <= limit:
            break
    period.sent, period.failed = sent, failed
    return period


async def measure(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    timeout = aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(server.url, timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as http:
        async with http.get("/stats") as answer:
            base = (await answer.json())["base"]
        await measure_capacity(http, options.clients, 3.0)
        most = options.most or await measure_capacity(http, options.clients, options.seconds)
        expected = await probe(http)
        job = await start_job(http, base["name"], options.batch)
        await wait_for_steps(http, job)
        alone, beside, solo = Period(), Period(), Period()
        probes = equal = 0
        half_load = functools.partial(send_load, http, most / 2, options.seconds)
        for _ in range(options.rounds):
            solo.add(await measure_period(http, server, job, lambda: idle(options.seconds), options.other))
            beside.add(await measure_period(http, server, job, half_load, options.other))
            await control_job(http, job, "pause")
            alone.add(await measure_period(http, server, job, half_load, options.other))
            await control_job(http, job, "resume")
            await wait_for_steps(http, job)
            under_load, found = await asyncio.gather(send_load(http, most / 2, 3.0), probe(http))
            beside.failed, beside.sent = beside.failed + under_load.failed, beside.sent + under_load.sent
            probes, equal = probes + PROBES, equal + sum(a == b for a, b in zip(found, expected, strict=True))
        await control_job(http, job, "cancel")
    solo_speed, speed = solo.job_tokens / solo.seconds, beside.job_tokens / beside.seconds
    return {
        "base": base["name"], "kernels": base["kernels"], "requests_per_second_at_most": round(most, 2),
        "requests": {"alone": alone.sent, "beside": beside.sent},
        "failed": {"alone": alone.failed, "beside": beside.failed},
        "gap_ms": {name: {p: round(1000 * float(np.percentile(s.gaps, p)), 2) for p in (50, 95, 99)}
                   for name, s in (("alone", alone), ("beside", beside))},
        "request_s_p50": {"alone": statistics.median(alone.durations), "beside": statistics.median(beside.durations)},
        "decode_p95_ratio": float(np.percentile(beside.gaps, 95) / np.percentile(alone.gaps, 95)),
        "job_tokens_per_second": {"solo": solo_speed, "beside": speed},
        "job_share": speed / solo_speed,
        "use": {"solo": solo.usage(), "alone": alone.usage(), "beside": beside.usage()},
        "probes_equal": f"{equal} of {probes}",
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, help="clients that measure the capacity")
    parser.add_argument("--most", type=float, help="capacity in requests per second, if known")
    parser.add_argument("--seconds", type=float, default=15.0, help="length of a period")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--other", type=float, default=0.1, help="processors that other processes may use")
    parser.add_argument("--batch", type=int, default=4, help="batch size of the job")
    parser.add_argument("--models", type=Path, default=MODELS, help="folder with the downloaded base")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, loramux_server(Path(folder) / "state", options.models) as server:
        print(json.dumps(asyncio.run(measure(server, options)), indent=1))


if __name__ == "__main__":
    main()
