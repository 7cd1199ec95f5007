"""Load client for OpenAI-compatible servers: streams completions or chats and records when each token arrived."""

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
"""Returns the JSON body of request number i."""

CUT_OFF = "the answer was cut off: it has neither a finish_reason nor [DONE]"
FAILED_REASONS = ("abort", "cancelled", "canceled", "error")
"""finish_reason values that mean a failure."""
MAX_REASONS = 3
"""Number of different error messages in a summary."""
BURST_SECONDS = 0.002
"""Events that arrive closer together belong to one step of the server."""
LATE_SECONDS = 0.01
"""The first tokens of a step may arrive this much later than its other tokens, because their headers come first."""


class NoAnswer(ServerError):
    """The server does not answer."""


@dataclass(frozen=True)
class Outcome:
    """One request as seen by the client.

    Attributes:
        tokens: number of tokens according to the usage, or the number of events without one.
        ttft, e2e: seconds from the time at which the request was due to its first and last token.
        due: time on the client's clock at which the request was due.
        times: arrival times of the events on that clock.
        short: whether the usage has fewer tokens than requested, as for servers without `ignore_eos`.
    """

    adapter: int
    ok: bool
    tokens: int
    ttft: float
    e2e: float
    due: float
    times: tuple[float, ...] = ()
    error: str = ""
    short: bool = False

    @property
    def tpot(self) -> float:
        """Seconds per token after the first; NaN for a single token, or if all arrived at once."""
        return (self.e2e - self.ttft) / (self.tokens - 1) if self.tokens > 1 and self.e2e > self.ttft else math.nan


@dataclass(frozen=True)
class Summary:
    """Results of a run. Rates are over its whole time, times in seconds.

    A request that did not finish has an infinite time to first token and duration. `tpot` covers finished requests.
    """

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


async def send(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], due: float, adapter: int) -> Outcome:
    """Send one streaming request and read it to its end. Failures are outcomes, not exceptions.

    The stream is parsed only after its end, so that the client takes little time on a shared machine.
    """
    received, marks = bytearray(), []
    try:
        async with session.post(endpoint(url, chat="messages" in body), json=body) as response:
            if response.status != 200:
                reason = _refusal(response.status, await response.text(errors="replace"))
                if response.history:
                    reason += f" ({url} redirects to {response.url}; use that address)"
                return Outcome(adapter, False, 0, math.nan, time.perf_counter() - due, due, error=reason)
            async for chunk in response.content.iter_any():
                received += chunk
                marks.append((len(received), time.perf_counter()))
        tokens, times, error = read_events(bytes(received), marks)
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as e:  # ValueError: invalid host or key
        tokens, times, error = read_events(bytes(received), marks)
        if not error or error == CUT_OFF:
            error = f"{type(e).__name__}: {e}" if str(e) else "timeout"
    first, last = (times[0] - due, times[-1] - due) if times else (math.nan, math.nan)
    if not times and not error:
        start = received[:200].decode(errors="replace").strip()
        error = "the answer has no token" + (f"; it starts with: {start}" if start else "")
    short = 0 < tokens < body.get("max_tokens", 0)
    return Outcome(adapter, not error, tokens or len(times), first, last, due, tuple(times), error, short)


def _refusal(status: int, text: str) -> str:
    text = " ".join(text.split())
    if status == HTTPStatus.UNAUTHORIZED:
        return f"{status}: give a valid key with --api-key ({text[:200]})"
    return f"{status}: {text[:300]}"


def read_events(received: bytes, marks: Sequence[tuple[int, float]]) -> tuple[int, list[float], str]:
    """Parse a stream of server-sent events.

    Without a usage, events without text are not tokens: servers end a stream with one. With a usage all events count,
    because tokens may have no text of their own, except the event that opens the answer of a chat.

    Args:
        received: the bytes of the stream; the last line may be incomplete.
        marks: (number of bytes received, time) after each chunk.

    Returns:
        The number of tokens in the usage (0 without one), the arrival times of the events, and an error message.
    """
    every: list[float] = []
    shown: list[float] = []
    tokens = end = mark = 0
    error = ""
    finished = False
    for line in received.splitlines(keepends=True):
        end += len(line)
        data = line.removeprefix(b"data:").strip()
        if not line.startswith(b"data:") or not line.endswith((b"\n", b"\r")):
            continue
        finished = finished or data == b"[DONE]"
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
                delta, reason = choice.get("delta") or {}, choice.get("finish_reason")
                text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
                if text or reason is not None or "role" not in delta:
                    every.append(marks[mark][1])
                if text:
                    shown.append(every[-1])
                if reason in FAILED_REASONS:
                    error = f"the answer failed: its finish_reason is {reason!r}"
                finished = finished or reason is not None
        except (ValueError, KeyError, TypeError, AttributeError):
            error = f"an event cannot be parsed: {line[:200].decode(errors='replace').strip()}"
            break
    times = every if tokens else shown
    if times and not finished and not error:
        error = CUT_OFF
    return tokens, times, error


def endpoint(url: str, chat: bool = False) -> str:
    """The URL for completions or chats; `url` may end in a slash or /v1. Raises BadSetting if it is not a URL."""
    if not re.match(r"(?i)https?://[^/]", url):
        raise BadSetting(f"{url!r} is not the address of a server. Give it as http://localhost:8000.", "url")
    return f"{url.rstrip('/').removesuffix('/v1').rstrip('/')}/v1/{'chat/' if chat else ''}completions"


def is_local(url: str) -> bool:
    """Whether a URL is on this machine."""
    try:
        return is_loopback(urlsplit(url if "//" in url else f"//{url}").hostname or "")
    except ValueError:
        return False


async def open_loop(
    url: str, arrivals: Sequence[Arrival], body: Body, timeout: float = 600, key: str = ""
) -> list[Outcome]:
    """Send each request at its time, whatever is still running."""
    endpoint(url)

    async def one(session: aiohttp.ClientSession, i: int, start: float) -> Outcome:
        arrival = arrivals[i]
        due = start + arrival.time
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        return await send(session, url, body(arrival, i), due, arrival.adapter)

    async with _session(timeout, key) as session:
        start = time.perf_counter()
        return list(await asyncio.gather(*(one(session, i, start) for i in range(len(arrivals)))))


async def closed_loop(
    url: str, arrivals: Sequence[Arrival], body: Body, concurrency: int, timeout: float = 600, key: str = ""
) -> list[Outcome]:
    """Keep `concurrency` requests in flight until all are answered."""
    endpoint(url)
    queue = iter(range(len(arrivals)))
    outcomes: list[Outcome] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        for i in queue:
            due = time.perf_counter()
            outcomes.append(await send(session, url, body(arrivals[i], i), due, arrivals[i].adapter))

    async with _session(timeout, key) as session:
        await asyncio.gather(*(worker(session) for _ in range(concurrency)))
    return outcomes


async def server_stats(url: str, key: str = "", timeout: float = 10) -> dict[str, int] | None:
    """Adapters in RAM and prompt tokens found in the prefix cache of a loramux server; None for other servers."""
    root = endpoint(url).removesuffix("/v1/completions")
    try:
        async with _session(timeout, key) as session, session.get(f"{root}/stats") as response:
            stats = json.loads(await response.text()) if response.status == HTTPStatus.OK else {}
        return {
            "adapters_in_ram": int(stats["adapters"]["versions"]),
            "prefix_tokens_found": int(stats["engine"]["prefix_cache"]["found_tokens"]),
        }
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError, LookupError, TypeError):
        return None


def _session(timeout: float, key: str) -> aiohttp.ClientSession:
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=timeout))


def run(client: Coroutine[Any, Any, T]) -> T:
    """Run a client on uvloop, which takes less processor time from a server on the same machine."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(client)


async def timed(requests: Coroutine[Any, Any, list[Outcome]], slo: float = 6.0) -> tuple[list[Outcome], Summary]:
    """Await a run and summarize it over its wall-clock time."""
    start = time.perf_counter()
    outcomes = await requests
    return outcomes, summarize(outcomes, time.perf_counter() - start, slo)


def decode_rate(done: Sequence[Outcome]) -> float:
    """Tokens per second while decoding: tokens after each first one, over the time in which any request decodes.

    Time in which all requests wait or are in prefill does not count, so servers that process requests together or one
    after another are treated alike. Prefill that overlaps with decoding counts.
    """
    busy, until = 0.0, -math.inf
    for o in sorted(done, key=lambda o: o.due + o.ttft):
        start, end = max(o.due + o.ttft, until), o.due + o.e2e
        if end > start:
            busy, until = busy + end - start, end
    return sum(o.tokens - 1 for o in done if o.e2e > o.ttft) / busy if busy else float("nan")


@dataclass
class _Step:
    """Events that arrived together: tokens, the requests they belong to, and whether one is a first token."""

    start: float
    tokens: float = 0.0
    requests: set[int] = field(default_factory=set)
    has_first: bool = False
    joined: bool = False
    """Whether first tokens that arrived later were added to this step."""


def steady_rate(done: Sequence[Outcome]) -> float:
    """Tokens per second of the steps that only decode.

    Events that arrive together are one step. A step with a first token includes a prefill, so it is left out, with the
    time before it. An event counts for its share of the tokens of its request, because a server may send several tokens
    at once. If first tokens arrive shortly after a step that none of their requests took part in, the end of that step
    is unknown, so the following step is left out too.
    """
    decode = [(b.start - a.start, b.tokens) for a, b in pairwise(_steps(done)) if not b.has_first and not a.joined]
    busy = sum(seconds for seconds, _ in decode)
    return sum(tokens for _, tokens in decode) / busy if busy else float("nan")


def _steps(done: Sequence[Outcome]) -> list[_Step]:
    """The steps of the server in order, reconstructed from the arrival times."""
    bursts: list[_Step] = []
    last = -math.inf
    events = ((t, i == 0, number) for number, outcome in enumerate(done) for i, t in enumerate(outcome.times))
    for t, is_first, number in sorted(events):
        if t - last >= BURST_SECONDS:
            bursts.append(_Step(t))
        burst, last = bursts[-1], t
        burst.tokens += done[number].tokens / len(done[number].times)
        burst.requests.add(number)
        burst.has_first = burst.has_first or is_first
    steps: list[_Step] = []
    for burst in bursts:
        before = steps[-1] if steps else _Step(-math.inf)
        soon = burst.start - before.start < LATE_SECONDS
        if burst.has_first and soon and before.requests.isdisjoint(burst.requests):  # one event per request and step
            before.tokens += burst.tokens
            before.requests |= burst.requests
            before.has_first = before.joined = True
        else:
            steps.append(burst)
    return steps


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile with linear interpolation; infinite if the upper neighbour is, NaN without values."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low, high = ordered[math.floor(at)], ordered[math.ceil(at)]
    return high if low == high or math.isinf(high) else low + (high - low) * (at - math.floor(at))


def format_number(value: float, form: str = ",.4g", unit: str = "") -> str:
    """A number of a summary for people."""
    if math.isnan(value):
        return "none"
    return "infinite" if math.isinf(value) else f"{value:{form}}{unit}"


def summarize(outcomes: Sequence[Outcome], seconds: float, slo: float = 6.0) -> Summary:
    """Throughput, percentiles and S-LoRA's two service levels.

    The service levels are the share of first tokens within `slo` seconds, and the mean of max(0, 1 - (ttft / slo)^2).
    Failed requests count as 0 in both.
    """
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
        reasons=tuple(dict.fromkeys(o.error for o in failed))[:MAX_REASONS],
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
        slo_attainment=sum(1 for o in done if o.ttft < slo) / total,
        satisfaction=sum(max(0.0, 1 - (o.ttft / slo) ** 2) for o in done) / total,
    )
