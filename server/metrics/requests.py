"""Series of finished requests by (task, adapter) pair: status counts, token counts and latency histograms.

They are rendered from prepared line prefixes: 200 pairs are 21,000 lines, which take `prometheus_client` over 200 ms.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass

MAX_PAIRS = 200
"""Live pairs with series of their own. Requests of other pairs are counted as `other`."""
OTHER = "other"
NO_TASK = "none"
NO_ADAPTER = "base"

TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 640.0, 2560.0),
)
TPOT_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
    *(10.0, 20.0, 40.0, 80.0),
)
DURATION_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0),
    *(120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

_HISTOGRAMS = (
    ("loramux_request_duration_seconds", "Seconds from arrival to the last token.", DURATION_BUCKETS),
    ("loramux_time_to_first_token_seconds", "Seconds from arrival to the first token.", TTFT_BUCKETS),
    ("loramux_time_per_output_token_seconds", "Seconds per token after the first one.", TPOT_BUCKETS),
    ("loramux_queue_seconds", "Seconds from arrival to the first step.", DURATION_BUCKETS),
)
_COUNTERS = (
    ("loramux_prompt_tokens_total", "Prompt tokens of finished requests."),
    ("loramux_generation_tokens_total", "Generated tokens of finished requests."),
)
_REQUESTS = ("loramux_requests_total", "Finished requests by HTTP status, or `cancelled`.")
_INITIAL_STATUSES = ("200", "429", "500", "504", "507")
"""Start at 0: a series that starts with the first failure has no rate, so an alert would miss it."""


@dataclass(frozen=True)
class RequestRecord:
    """One finished request. Times are `time.monotonic()` seconds, nan if the request did not get that far.

    Attributes:
        task: None if no task was requested.
        adapters: names of the mix, empty for the base.
        status: HTTP status or "cancelled".
        longest: most tokens of one answer, if the request has several.
        tpot: mean seconds between two tokens of one answer.
        known: False if task and adapters were not resolved; the request is counted as `other`.
        latency: False keeps the request out of the histograms (evaluation traffic).
        custom_mix: the request chose the mix, not the task.
    """

    task: str | None
    adapters: tuple[str, ...]
    status: str
    submitted: float = math.nan
    admitted: float = math.nan
    first_token: float = math.nan
    finished: float = math.nan
    prompt_tokens: int = 0
    generated_tokens: int = 0
    longest: int = 0
    tpot: float = math.nan
    known: bool = True
    latency: bool = True
    custom_mix: bool = False


class Histogram:
    """Counts by bucket, the last one for values over all bounds, and the sum of all values."""

    __slots__ = ("buckets", "counts", "total")

    def __init__(self, buckets: tuple[float, ...]) -> None:
        self.buckets = buckets
        self.counts = [0] * (len(buckets) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.buckets, value)] += 1
        self.total += value

    def add(self, other: Histogram) -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total


class PairSeries:
    """All series of one (task, adapter) pair."""

    def __init__(self, task: str, adapter: str) -> None:
        self.labels = f'task="{task}",adapter="{adapter}"'
        self.statuses = dict.fromkeys(_INITIAL_STATUSES, 0)
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.histograms = [Histogram(buckets) for _, _, buckets in _HISTOGRAMS]
        self._prefixes = [
            [f'{name}_bucket{{{self.labels},le="{le}"}} ' for le in (*map(float, buckets), "+Inf")]
            + [f"{name}_count{{{self.labels}}} ", f"{name}_sum{{{self.labels}}} "]
            for name, _, buckets in _HISTOGRAMS
        ]

    def record(self, request: RequestRecord) -> None:
        self.statuses[request.status] = self.statuses.get(request.status, 0) + 1
        self.prompt_tokens += request.prompt_tokens
        self.generated_tokens += request.generated_tokens
        if request.status != "200" or not request.latency:
            return
        duration, ttft, tpot, queue = self.histograms
        if request.finished >= request.submitted:  # false for nan
            duration.observe(request.finished - request.submitted)
        if request.first_token >= request.submitted:
            ttft.observe(request.first_token - request.submitted)
            if request.tpot >= 0:
                tpot.observe(request.tpot)
        if request.admitted >= request.submitted:
            queue.observe(request.admitted - request.submitted)

    def add(self, other: PairSeries) -> None:
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count
        self.prompt_tokens += other.prompt_tokens
        self.generated_tokens += other.generated_tokens
        for ours, theirs in zip(self.histograms, other.histograms, strict=True):
            ours.add(theirs)

    def histogram_lines(self, index: int) -> Iterable[str]:
        histogram, prefixes = self.histograms[index], self._prefixes[index]
        cumulative = 0
        for prefix, count in zip(prefixes, histogram.counts, strict=False):
            cumulative += count
            yield f"{prefix}{cumulative}\n"
        yield f"{prefixes[-2]}{cumulative}\n"
        yield f"{prefixes[-1]}{histogram.total!r}\n"


class RequestMetrics:
    """The series of all pairs. Thread-safe."""

    def __init__(self) -> None:
        self.served: Callable[[str | None, tuple[str, ...]], bool] = lambda task, adapters: True
        """Whether a task and adapters still exist. Requests that outlive them are counted as `other`."""
        self._lock = threading.Lock()
        self._pairs: dict[tuple[str, str], PairSeries] = {}
        self._removed: dict[str, PairSeries] = {}
        """By task, the sums of removed adapters: they have no series, but count in the totals of the task."""

    def record(self, request: RequestRecord) -> None:
        """Count one finished request."""
        with self._lock:
            key = (request.task or NO_TASK, "+".join(sorted(request.adapters)) or NO_ADAPTER)
            if not request.known or (key not in self._pairs and not self._has_room(request)):
                key = (OTHER, OTHER)
            if key not in self._pairs:
                self._pairs[key] = PairSeries(*key)
            self._pairs[key].record(request)

    def _has_room(self, request: RequestRecord) -> bool:
        """Whether a new pair may have series. Clients can choose any mix, so custom mixes get at most half of them."""
        custom = request.custom_mix and (request.task is not None or len(request.adapters) > 1)
        live = len(self._pairs) - ((OTHER, OTHER) in self._pairs)
        return live < (MAX_PAIRS // 2 if custom else MAX_PAIRS) and self.served(request.task, request.adapters)

    def forget_adapter(self, name: str) -> None:
        """Remove the series of an adapter and of mixes with it."""
        with self._lock:
            for task, adapters in [key for key in self._pairs if name in key[1].split("+")]:
                removed = self._pairs.pop((task, adapters))
                self._removed.setdefault(task, PairSeries(task, OTHER)).add(removed)

    def forget_task(self, name: str) -> None:
        """Remove the series of a task."""
        with self._lock:
            self._pairs = {key: pair for key, pair in self._pairs.items() if key[0] != name}
            self._removed.pop(name, None)

    def totals(self) -> dict[str, dict[str, float | None]]:
        """By task: requests, errors, cancelled requests, tokens, and mean seconds (None without samples)."""
        sums: dict[str, PairSeries] = {}
        with self._lock:
            for task, pair in [*((key[0], pair) for key, pair in self._pairs.items()), *self._removed.items()]:
                sums.setdefault(task, PairSeries(task, OTHER)).add(pair)
        return {task: _totals(pair) for task, pair in sums.items()}

    def render_requests(self) -> str:
        """All series in Prometheus' text format."""
        out: list[str] = []
        with self._lock:
            pairs = list(self._pairs.values())
            out.append(_header(*_REQUESTS, "counter"))
            for pair in pairs:
                out += [f'{_REQUESTS[0]}{{{pair.labels},status="{s}"}} {n}\n' for s, n in pair.statuses.items()]
            out.append(_header(*_COUNTERS[0], "counter"))
            out += [f"{_COUNTERS[0][0]}{{{pair.labels}}} {pair.prompt_tokens}\n" for pair in pairs]
            out.append(_header(*_COUNTERS[1], "counter"))
            out += [f"{_COUNTERS[1][0]}{{{pair.labels}}} {pair.generated_tokens}\n" for pair in pairs]
            for i, (name, text, _) in enumerate(_HISTOGRAMS):
                out.append(_header(name, text, "histogram"))
                for pair in pairs:
                    out.extend(pair.histogram_lines(i))
        return "".join(out)


def _totals(pair: PairSeries) -> dict[str, float | None]:
    def mean(histogram: Histogram) -> float | None:
        count = sum(histogram.counts)
        return histogram.total / count if count else None

    requests, cancelled = sum(pair.statuses.values()), pair.statuses.get("cancelled", 0)
    return {
        "requests": float(requests),
        "errors": float(requests - cancelled - pair.statuses["200"]),
        "cancelled": float(cancelled),
        "prompt_tokens": float(pair.prompt_tokens),
        "generated_tokens": float(pair.generated_tokens),
        "ttft_seconds": mean(pair.histograms[1]),
        "duration_seconds": mean(pair.histograms[0]),
    }


def _header(name: str, text: str, kind: str) -> str:
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
