"""Latencies in a few hundred counters: logarithmic buckets from 0.1 ms to over an hour, percentiles within 5 %."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

LOWEST = 1e-4
FACTOR = 1.1
BUCKETS = 184
SHARES = (0.5, 0.95, 0.99)


class Latencies:
    """One kind of latency of one subject. Adds up: two of them make a third."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = np.zeros(BUCKETS, np.uint32)

    def add(self, seconds: float) -> None:
        """Count one latency. nan is none."""
        if not math.isnan(seconds):
            bucket = math.ceil(math.log(max(seconds, LOWEST) / LOWEST, FACTOR) - 1e-9)
            self.counts[min(max(bucket, 0), BUCKETS - 1)] += 1

    def merge(self, other: Latencies) -> None:
        """Add another's counts."""
        self.counts += other.counts

    def join(self, dumped: Iterable[bytes]) -> None:
        """Add what others have dumped."""
        rows = np.frombuffer(b"".join(dumped), np.uint32).reshape(-1, BUCKETS)
        self.counts += rows.sum(axis=0, dtype=np.uint32)

    def dump(self) -> bytes:
        return self.counts.tobytes()

    def percentiles(self) -> list[float | None]:
        """Seconds under which SHARES lie; None of nothing."""
        running = np.cumsum(self.counts, dtype=np.int64)
        total = int(running[-1])
        if not total:
            return [None] * len(SHARES)
        ranks = [math.ceil(share * total) for share in SHARES]
        return [LOWEST * FACTOR ** (float(np.searchsorted(running, rank)) - 0.5) for rank in ranks]
