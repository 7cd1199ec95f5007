"""A load client for any OpenAI-compatible server: streams /v1/completions and notes when each token came.

Owns the clock of a measurement and its summary. Knows nothing of what is behind the address.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp
import numpy as np

from server.bench.workloads import Arrival
from server.errors import ServerError

Body = Callable[[Arrival, int], Mapping[str, Any]]
"""Makes the JSON body of request number i; how a server names its adapters is its own affair."""


class NoAnswer(ServerError):
    """The server that is measured does not answer."""


@dataclass(frozen=True)
class Outcome:
    """One request as the client saw it. Times in seconds; `ttft` and `e2e` count from when it was due to be sent, at
    `due` on the client's clock; `times` are those of its events that carried text, on that clock."""

    adapter: int
    ok: bool
    tokens: int
    ttft: float
    e2e: float
    due: float
    times: tuple[float, ...] = ()
    error: str = ""

    @property
    def tpot(self) -> float:
        """Seconds a token after the first, nan with fewer than two."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 else float("nan")


@dataclass(frozen=True)
class Summary:
    """A run: rates over its whole time, of decoding as `decode_rate` and `steady_rate` have it, medians and tails over
    its finished requests (seconds)."""

    requests: int
    finished: int
    seconds: float
    requests_per_second: float
    tokens_per_second: float
    decode_tokens_per_second: float
    steady_tokens_per_second: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    e2e_p50: float
    slo_attainment: float
    satisfaction: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], due: float, adapter: int) -> Outcome:
    """Send one streaming completion and read it to its end. A failure is an Outcome, never an exception.

    What arrives is only noted, and read once all is there: a client on the server's own machine takes its time.
    """
    received, marks = bytearray(), []
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                why = (await response.text())[:300]
                return Outcome(adapter, False, 0, math.nan, time.perf_counter() - due, due, error=why)
            async for chunk in response.content.iter_any():
                received += chunk
                marks.append((len(received), time.perf_counter()))
        tokens, times, error = read_events(bytes(received), marks)
    except (TimeoutError, aiohttp.ClientError, ConnectionError) as e:
        tokens, times, error = read_events(bytes(received), marks)
        error = f"{type(e).__name__}: {e}"
    first, last = (times[0] - due, times[-1] - due) if times else (math.nan, math.nan)
    return Outcome(adapter, not error and bool(times), tokens or len(times), first, last, due, tuple(times), error)


def read_events(received: bytes, marks: Sequence[tuple[int, float]]) -> tuple[int, list[float], str]:
    """The number of tokens as the usage has it (0 without one), when each event with text was there, and the error.

    `marks` say how many bytes had arrived when; the last line may be incomplete.
    """
    times: list[float] = []
    tokens = end = mark = 0
    for line in received.splitlines(keepends=True):
        end += len(line)
        if not line.startswith(b"data: {") or not line.endswith(b"\n"):
            continue
        while marks[mark][0] < end:
            mark += 1
        event = json.loads(line[6:])
        if "error" in event:
            return tokens, times, str(event["error"])[:300]
        if event.get("usage"):
            tokens = event["usage"]["completion_tokens"]
        if event.get("choices"):
            times.append(marks[mark][1])
    return tokens, times, ""


async def open_loop(base_url: str, arrivals: Sequence[Arrival], body: Body, timeout: float = 600) -> list[Outcome]:
    """Send each request at its time, whatever is still running."""

    async def one(session: aiohttp.ClientSession, i: int, start: float) -> Outcome:
        arrival = arrivals[i]
        due = start + arrival.time
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await ask(session, f"{base_url}/v1/completions", body(arrival, i), due, arrival.adapter)

    async with _session(timeout) as session:
        start = time.perf_counter()
        return list(await asyncio.gather(*(one(session, i, start) for i in range(len(arrivals)))))


async def closed_loop(
    base_url: str, arrivals: Sequence[Arrival], body: Body, concurrency: int, timeout: float = 600
) -> list[Outcome]:
    """Keep `concurrency` requests in flight until all are answered."""
    queue = iter(range(len(arrivals)))
    outcomes: list[Outcome] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        for i in queue:
            due = time.perf_counter()
            done = await ask(session, f"{base_url}/v1/completions", body(arrivals[i], i), due, arrivals[i].adapter)
            outcomes.append(done)

    async with _session(timeout) as session:
        await asyncio.gather(*(worker(session) for _ in range(concurrency)))
    return outcomes


def _session(timeout: float) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=timeout))


async def timed(run: Awaitable[list[Outcome]], slo_seconds: float = 6.0) -> tuple[list[Outcome], Summary]:
    """Await a run and summarize it over its wall-clock time."""
    start = time.perf_counter()
    outcomes = await run
    return outcomes, summarize(outcomes, time.perf_counter() - start, slo_seconds)


def decode_rate(done: Sequence[Outcome]) -> float:
    """Tokens a second of decoding alone: those after each request's first one, over the time in which at least one
    request was between its first and its last token.

    A server that answers all at once and one that answers them one after another are both given the time in which
    they decode, and not that in which they only read prompts or wait. Reading of prompts that goes on while others
    decode counts, for whoever does that.
    """
    busy, until = 0.0, -math.inf
    for o in sorted(done, key=lambda o: o.due + o.ttft):
        start, end = max(o.due + o.ttft, until), o.due + o.e2e
        if end > start:
            busy, until = busy + end - start, end
    return sum(o.tokens - 1 for o in done) / busy if busy else float("nan")


BURST_SECONDS = 0.002
"""Events that come closer than this belong to one step of the server."""

LATE_SECONDS = 0.01
"""How long after a step's other tokens its first ones may come: their answers' headers go out before them, and a client
on the server's own processors reads them when it gets one."""


def steady_rate(done: Sequence[Outcome]) -> float:
    """Tokens a second of the steps in which a server only decodes.

    Events are taken together as steps; a step that brings a first token has read a prompt, or has had nothing to do
    before it, and is left out with the time before it and the tokens that came along. What is left are the tokens of
    all other steps over the time since the step before each.
    """
    bursts: list[tuple[float, int, bool]] = []  # its first event's time, how many it has, whether one is a first token
    last = -math.inf
    for t, first in sorted((t, i == 0) for o in done for i, t in enumerate(o.times)):
        if t - last >= BURST_SECONDS:
            bursts.append((t, 0, False))
        start, count, fresh = bursts[-1]
        bursts[-1], last = (start, count + 1, fresh or first), t
    steps: list[tuple[float, int, bool]] = []
    for t, count, fresh in bursts:
        if fresh and steps and t - steps[-1][0] < LATE_SECONDS:
            steps[-1] = (steps[-1][0], steps[-1][1] + count, True)
        else:
            steps.append((t, count, fresh))
    alone = [(b[0] - a[0], b[1]) for a, b in zip(steps, steps[1:], strict=False) if not b[2]]
    busy = sum(seconds for seconds, _ in alone)
    return sum(count for _, count in alone) / busy if busy else float("nan")


def summarize(outcomes: Sequence[Outcome], seconds: float, slo_seconds: float = 6.0) -> Summary:
    """Throughput, percentiles, and S-LoRA's two service levels: the share of first tokens within `slo_seconds`
    (a failed request counts as missed) and the mean of max(0, 1 - (ttft / slo)^2)."""
    done = [o for o in outcomes if o.ok]
    ttft = np.array([o.ttft for o in done]) if done else np.array([np.nan])
    tpot = np.array([o.tpot for o in done if o.tokens > 1] or [np.nan])
    total = max(len(outcomes), 1)
    return Summary(
        requests=len(outcomes),
        finished=len(done),
        seconds=seconds,
        requests_per_second=len(done) / seconds,
        tokens_per_second=sum(o.tokens for o in done) / seconds,
        decode_tokens_per_second=decode_rate(done),
        steady_tokens_per_second=steady_rate(done),
        ttft_p50=float(np.percentile(ttft, 50)),
        ttft_p90=float(np.percentile(ttft, 90)),
        ttft_p99=float(np.percentile(ttft, 99)),
        tpot_p50=float(np.percentile(tpot, 50)),
        tpot_p99=float(np.percentile(tpot, 99)),
        e2e_p50=float(np.median([o.e2e for o in done])) if done else float("nan"),
        slo_attainment=sum(1 for o in done if o.ttft < slo_seconds) / total,
        satisfaction=sum(max(0.0, 1 - (o.ttft / slo_seconds) ** 2) for o in done) / total,
    )
