"""Traffic of one mix: requests, errors, tokens and latency histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from server.tasks.mix_key import AnswerRecord

KINDS = ("ttft", "tpot", "e2e")
COUNTS = ("requests", "errors", "prompt_tokens", "generated_tokens")
LOWEST = 1e-4
"""Upper bound of the first bucket in seconds."""
FACTOR = 1.1
BUCKETS = 184
"""The last bucket begins above one hour."""
QUANTILES = (0.5, 0.95, 0.99)
_PAIR = np.dtype([("bucket", "u1"), ("count", "<u4")])


class LatencyHistogram:
    """Latencies in logarithmic buckets; quantiles are within 5 %."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = np.zeros(BUCKETS, np.uint32)

    def add(self, seconds: float) -> None:
        """Count one latency; nan is ignored."""
        if not math.isnan(seconds):
            bucket = math.ceil(math.log(max(seconds, LOWEST) / LOWEST, FACTOR) - 1e-9)
            self.counts[min(max(bucket, 0), BUCKETS - 1)] += 1

    def merge(self, other: LatencyHistogram) -> None:
        self.counts += other.counts

    def load(self, dumps: Sequence[bytes]) -> None:
        """Add histograms that `dump` wrote. Raises ValueError for other bytes."""
        pairs = np.frombuffer(b"".join(dumps), _PAIR)
        counts = np.bincount(pairs["bucket"], pairs["count"], BUCKETS)
        if len(counts) > BUCKETS:
            raise ValueError(f"a latency histogram has no bucket {len(counts) - 1}")
        self.counts += counts.astype(np.uint32)

    def dump(self) -> bytes:
        """The buckets that are not empty, 5 bytes each."""
        (buckets,) = self.counts.nonzero()
        pairs = np.empty(len(buckets), _PAIR)
        pairs["bucket"], pairs["count"] = buckets, self.counts[buckets]
        return pairs.tobytes()

    def quantiles(self) -> list[float | None]:
        """Seconds at each of QUANTILES; None if the histogram is empty."""
        running = np.cumsum(self.counts, dtype=np.int64)
        total = int(running[-1])
        if not total:
            return [None] * len(QUANTILES)
        ranks = [math.ceil(quantile * total) for quantile in QUANTILES]
        return [LOWEST * FACTOR ** (float(np.searchsorted(running, rank)) - 0.5) for rank in ranks]


class TrafficCounts:
    """Traffic of one mix, in one hour or in total."""

    def __init__(self) -> None:
        self.counts = dict.fromkeys(COUNTS, 0)
        self.latencies = {kind: LatencyHistogram() for kind in KINDS}

    def add(self, answer: AnswerRecord) -> None:
        """Count an answer. Latencies of failed ones are not counted."""
        self.counts["requests"] += 1
        self.counts["errors"] += answer.failed
        self.counts["prompt_tokens"] += answer.prompt_tokens
        self.counts["generated_tokens"] += answer.generated_tokens
        if not answer.failed:
            for kind, histogram in self.latencies.items():
                histogram.add(getattr(answer, kind))

    def merge(self, other: TrafficCounts) -> None:
        for name in COUNTS:
            self.counts[name] += other.counts[name]
        for kind, histogram in self.latencies.items():
            histogram.merge(other.latencies[kind])

    def load(self, rows: Sequence[Any]) -> None:
        """Add rows of the table `traffic_hours`."""
        for name in COUNTS:
            self.counts[name] += sum(getattr(row, name) for row in rows)
        for kind, histogram in self.latencies.items():
            histogram.load([getattr(row, kind) for row in rows])

    def columns(self) -> dict[str, Any]:
        """Values of a row of `traffic_hours` without its key."""
        return {**self.counts, **{kind: histogram.dump() for kind, histogram in self.latencies.items()}}
