"""A load client for any OpenAI-compatible server: streams completions or chats and notes when each token came.

Owns the clock of a measurement and its summary. Knows nothing of what is behind the address.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from itertools import pairwise
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp
import uvloop

from benchmarks.workloads import Arrival
from server.errors import BadSetting, ServerError
from server.settings import is_loopback

T = TypeVar("T")

Body = Callable[[Arrival, int], Mapping[str, Any]]
"""Makes the JSON body of request number i; how a server names its adapters is its own affair."""


class NoAnswer(ServerError):
    """The server that is measured does not answer."""


@dataclass(frozen=True)
class Outcome:
    """One request as the client saw it. Times in seconds; `ttft` and `e2e` count from when it was due to be sent, at
    `due` on the client's clock; `times` are those of its events, on that clock. `tokens` are those
    that its usage tells, or as many as these events where it tells none."""

    adapter: int
    ok: bool
    tokens: int
    ttft: float
    e2e: float
    due: float
    times: tuple[float, ...] = ()
    error: str = ""
    short: bool = False
    """Whether its usage tells fewer tokens than were asked for, as of a server that takes no `ignore_eos`."""

    @property
    def tpot(self) -> float:
        """Seconds a token after the first, nan with fewer than two, or where all came at once."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 and self.e2e > self.ttft else math.nan


@dataclass(frozen=True)
class Summary:
    """A run: rates over its whole time, of decoding as `decode_rate` and `steady_rate` have it; medians and tails in
    seconds. A request that did not finish waits for its first token, and for its end, for ever (`math.inf`); `tpot` is
    of those that finished. `reasons` are the first different ones for which requests failed, and `short` those that
    finished with fewer tokens than were asked for: a run with such is of another workload."""

    requests: int
    finished: int
    failed: int
    short: int
    tokens: int
    reasons: tuple[str, ...]
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

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], due: float, adapter: int) -> Outcome:
    """Send one streaming request, a chat if it has messages, and read it to its end. A failure is an Outcome, never an
    exception.

    What arrives is only noted, and read once all is there: a client on the server's own machine takes its time.
    """
    received, marks = bytearray(), []
    try:
        async with session.post(address(url, chat="messages" in body), json=body) as response:
            if response.status != 200:
                why = _refusal(response.status, await response.text(errors="replace"))
                if response.history:
                    why += f" ({url} leads to {response.url}: give that address)"
                return Outcome(adapter, False, 0, math.nan, time.perf_counter() - due, due, error=why)
            async for chunk in response.content.iter_any():
                received += chunk
                marks.append((len(received), time.perf_counter()))
        tokens, times, error = read_events(bytes(received), marks)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as e:  # the last of a name or key that is none
        tokens, times, error = read_events(bytes(received), marks)
        if not error or error == CUT_OFF:
            error = f"{type(e).__name__}: {e}" if str(e) else "it did not end in time"
    first, last = (times[0] - due, times[-1] - due) if times else (math.nan, math.nan)
    if not times and not error:
        begins = received[:200].decode(errors="replace").strip()
        error = "the answer ended without a token" + (f"; it begins: {begins}" if begins else "")
    short = 0 < tokens < body.get("max_tokens", 0)
    return Outcome(adapter, not error, tokens or len(times), first, last, due, tuple(times), error, short)


def _refusal(status: int, text: str) -> str:
    """Why a request was refused, in one line."""
    text = " ".join(text.split())
    if status == HTTPStatus.UNAUTHORIZED:
        return f"{status}: give a key that the server knows with --api-key ({text[:200]})"
    return f"{status}: {text[:300]}"


CUT_OFF = "the answer was cut off: it has neither a finish_reason nor [DONE]"

UNFINISHED = ("abort", "cancelled", "canceled", "error")
"""Reasons that servers give for an answer's end where it is none."""


def read_events(received: bytes, marks: Sequence[tuple[int, float]]) -> tuple[int, list[float], str]:
    """The number of tokens as the usage has it (0 without one), when each event was there, and the error.

    `marks` say how many bytes had arrived when; the last line may be incomplete. Without a usage an event whose text is
    empty is no token, and left out: servers end a stream with one. With it all events count, since tokens that are not
    shown come with empty ones, and an answer lasts until its last; but for the one that only opens a chat's answer. One
    that has neither a finish_reason nor the word that ends a stream was cut off.
    """
    every: list[float] = []
    shown: list[float] = []
    tokens = end = mark = 0
    error = ""
    whole = False
    for line in received.splitlines(keepends=True):
        end += len(line)
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not line.endswith((b"\n", b"\r")):
            continue
        whole = whole or data == b"[DONE]"
        if data in (b"", b"[DONE]"):
            continue
        while marks[mark][0] < end:
            mark += 1
        try:
            event = json.loads(data)
            if event.get("error") or event.get("object") == "error":
                error = str(event.get("error") or event)[:300]
                break
            if event.get("usage"):
                tokens = int(event["usage"]["completion_tokens"] or 0)
            if event.get("choices"):
                choice = event["choices"][0]
                delta, finish = choice.get("delta") or {}, choice.get("finish_reason")
                text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
                if text or finish is not None or "role" not in delta:
                    every.append(marks[mark][1])
                if text:
                    shown.append(every[-1])
                if finish in UNFINISHED:
                    error = f"the answer ended early: its finish_reason is {finish!r}"
                whole = whole or finish is not None
        except (ValueError, KeyError, TypeError, AttributeError):
            error = f"an event cannot be read: {line[:200].decode(errors='replace').strip()}"
            break
    times = every if tokens else shown
    if times and not whole and not error:
        error = CUT_OFF
    return tokens, times, error


def address(url: str, chat: bool = False) -> str:
    """Where completions are asked for, or chats: `url` may end in a slash, or in the /v1 that other clients want.

    Raises BadSetting for what is no address.
    """
    if not re.match(r"(?i)https?://[^/]", url):
        raise BadSetting(f"{url!r} is no address of a server: give it as http://localhost:8000", "url")
    return f"{url.rstrip('/').removesuffix('/v1').rstrip('/')}/v1/{'chat/' if chat else ''}completions"


def is_here(url: str) -> bool:
    """Whether a URL is of this machine."""
    try:
        return is_loopback(urlsplit(url if "//" in url else f"//{url}").hostname or "")
    except ValueError:
        return False


async def open_loop(
    url: str, arrivals: Sequence[Arrival], body: Body, timeout: float = 600, key: str = ""
) -> list[Outcome]:
    """Send each request at its time, whatever is still running. `key` is sent as the server wants it, if not empty."""
    address(url)  # what is none is told before anything is sent

    async def one(session: aiohttp.ClientSession, i: int, start: float) -> Outcome:
        arrival = arrivals[i]
        due = start + arrival.time
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await ask(session, url, body(arrival, i), due, arrival.adapter)

    async with _session(timeout, key) as session:
        start = time.perf_counter()
        return list(await asyncio.gather(*(one(session, i, start) for i in range(len(arrivals)))))


async def closed_loop(
    url: str, arrivals: Sequence[Arrival], body: Body, concurrency: int, timeout: float = 600, key: str = ""
) -> list[Outcome]:
    """Keep `concurrency` requests in flight until all are answered. `key` is as for `open_loop`."""
    address(url)
    queue = iter(range(len(arrivals)))
    outcomes: list[Outcome] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        for i in queue:
            due = time.perf_counter()
            outcomes.append(await ask(session, url, body(arrivals[i], i), due, arrivals[i].adapter))

    async with _session(timeout, key) as session:
        await asyncio.gather(*(worker(session) for _ in range(concurrency)))
    return outcomes


async def residency(url: str, key: str = "", timeout: float = 10) -> dict[str, int] | None:
    """What a loramux tells of the adapters in its RAM and of tokens that its prefix cache has found; None of a server
    that tells neither."""
    root = address(url).removesuffix("/v1/completions")
    try:
        async with _session(timeout, key) as session, session.get(f"{root}/stats") as response:
            told = json.loads(await response.text()) if response.status == HTTPStatus.OK else {}
        return {
            "adapters_in_ram": int(told["adapters"]["versions"]),
            "prefix_tokens_found": int(told["engine"]["prefix_cache"]["found_tokens"]),
        }
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        return None


def _session(timeout: float, key: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=timeout))


def run(client: Coroutine[Any, Any, T]) -> T:
    """What a client finds, on the loop that costs least: what it measures runs on the same processors."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(client)


async def timed(asking: Coroutine[Any, Any, list[Outcome]], slo_seconds: float = 6.0) -> tuple[list[Outcome], Summary]:
    """Await a run of requests and summarize it over its wall-clock time."""
    start = time.perf_counter()
    outcomes = await asking
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
    return sum(o.tokens - 1 for o in done if o.e2e > o.ttft) / busy if busy else float("nan")


BURST_SECONDS = 0.002
"""Events that come closer than this belong to one step of the server."""

LATE_SECONDS = 0.01
"""How long after a step's other tokens its first ones may come: their answers' headers go out before them, and a client
on the server's own processors reads them when it gets one."""


@dataclass
class _Step:
    """Events that came together: when the first did, the tokens they are worth, of which requests, and whether one is a
    request's first."""

    start: float
    tokens: float = 0.0
    of: set[int] = field(default_factory=set)
    fresh: bool = False
    joined: bool = False
    """Whether first tokens that came after the others are taken for tokens of this step."""


def steady_rate(done: Sequence[Outcome]) -> float:
    """Tokens a second of the steps in which a server only decodes.

    Events are taken together as steps; a step that brings a first token has read a prompt, or has had nothing to do
    before it, and is left out with the time before it and the tokens that came along. What is left are the tokens of
    all other steps over the time since the step before each. An event is worth its request's tokens over its events:
    a server may send several tokens at once.

    First tokens that come soon after a step, with none of a request that was in it, are late ones of that step or a
    step of their own that only read a prompt: nobody can tell when the next step began, and it is left out too.
    """
    alone = [(b.start - a.start, b.tokens) for a, b in pairwise(_steps(done)) if not b.fresh and not a.joined]
    busy = sum(seconds for seconds, _ in alone)
    return sum(tokens for _, tokens in alone) / busy if busy else float("nan")


def _steps(done: Sequence[Outcome]) -> list[_Step]:
    """The server's steps in their order, as its events' times tell them."""
    bursts: list[_Step] = []
    last = -math.inf
    events = ((t, i == 0, number) for number, outcome in enumerate(done) for i, t in enumerate(outcome.times))
    for t, first, number in sorted(events):
        if t - last >= BURST_SECONDS:
            bursts.append(_Step(t))
        burst, last = bursts[-1], t
        burst.tokens += done[number].tokens / len(done[number].times)
        burst.of.add(number)
        burst.fresh = burst.fresh or first
    steps: list[_Step] = []
    for burst in bursts:
        before = steps[-1] if steps else _Step(-math.inf)
        soon = burst.start - before.start < LATE_SECONDS
        if burst.fresh and soon and before.of.isdisjoint(burst.of):  # a step brings each request one event
            before.tokens += burst.tokens
            before.of |= burst.of
            before.fresh = before.joined = True
        else:
            steps.append(burst)
    return steps


REASONS = 3
"""How many different reasons of failures a summary keeps."""


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`th percentile between its neighbours, infinite where the upper one is; nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return high if low == high or math.isinf(high) else low + (high - low) * (at - math.floor(at))


def figure(value: float, form: str = ",.4g", unit: str = "") -> str:
    """A number of a summary, for people. The rate of nothing is none, and who waits for ever waits without end."""
    if math.isnan(value):
        return "none"
    return "without end" if math.isinf(value) else f"{value:{form}}{unit}"


def summarize(outcomes: Sequence[Outcome], seconds: float, slo_seconds: float = 6.0) -> Summary:
    """Throughput, percentiles, and S-LoRA's two service levels: the share of first tokens within `slo_seconds`
    (a failed request counts as missed) and the mean of max(0, 1 - (ttft / slo)^2)."""
    done = [o for o in outcomes if o.ok]
    failed = [o for o in outcomes if not o.ok]
    ttft = [o.ttft if o.ok else math.inf for o in outcomes]
    tpot = [o.tpot for o in done if not math.isnan(o.tpot)]
    total = max(len(outcomes), 1)
    return Summary(
        requests=len(outcomes),
        finished=len(done),
        failed=len(failed),
        short=sum(o.short for o in done),
        tokens=sum(o.tokens for o in done),
        reasons=tuple(dict.fromkeys(o.error for o in failed))[:REASONS],
        seconds=seconds,
        requests_per_second=len(done) / seconds,
        tokens_per_second=sum(o.tokens for o in done) / seconds,
        decode_tokens_per_second=decode_rate(done),
        steady_tokens_per_second=steady_rate(done),
        ttft_p50=percentile(ttft, 50),
        ttft_p90=percentile(ttft, 90),
        ttft_p99=percentile(ttft, 99),
        tpot_p50=percentile(tpot, 50),
        tpot_p99=percentile(tpot, 99),
        e2e_p50=percentile([o.e2e if o.ok else math.inf for o in outcomes], 50),
        slo_attainment=sum(1 for o in done if o.ttft < slo_seconds) / total,
        satisfaction=sum(max(0.0, 1 - (o.ttft / slo_seconds) ** 2) for o in done) / total,
    )
