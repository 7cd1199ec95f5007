"""LatencyHistogram in a few hundred counters: logarithmic buckets from 0.1 ms to over an hour, percentiles
within 5 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LOWEST = 1e-4
FACTOR = 1.1
BUCKETS = 184
SHARES = (0.5, 0.95, 0.99)
_PAIR = np.dtype([("bucket", "u1"), ("count", "<u4")])
"""A counter that is not zero, as it is dumped: most of an hour's are."""
_WHOLE = 4 * BUCKETS
"""Bytes of all counters: so they are dumped where they are fewer than pairs, and were before 2026-12-02. Pairs never
come to as many, which is no multiple of theirs."""


class LatencyHistogram:
    """One kind of latency of one subject. Adds up: two of them make a third."""

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = np.zeros(BUCKETS, np.uint32)

    def add(self, seconds: float) -> None:
        """Count one latency. nan is none."""
        if not math.isnan(seconds):
            bucket = math.ceil(math.log(max(seconds, LOWEST) / LOWEST, FACTOR) - 1e-9)
            self.counts[min(max(bucket, 0), BUCKETS - 1)] += 1

    def merge(self, other: LatencyHistogram) -> None:
        """Add another's counts."""
        self.counts += other.counts

    def join(self, dumped: Sequence[bytes]) -> None:
        """Add what others have dumped. Raises ValueError for what nobody has."""
        whole = np.frombuffer(b"".join(each for each in dumped if len(each) == _WHOLE), "<u4").reshape(-1, BUCKETS)
        pairs = np.frombuffer(b"".join(each for each in dumped if len(each) != _WHOLE), _PAIR)
        found = np.bincount(pairs["bucket"], pairs["count"], BUCKETS)
        if len(found) > BUCKETS:
            raise ValueError(f"there is no bucket {len(found) - 1}")
        self.counts += whole.sum(axis=0, dtype=np.uint32) + found.astype(np.uint32)

    def dump(self) -> bytes:
        """For `join`; nothing of nothing, and 736 bytes at most."""
        (buckets,) = self.counts.nonzero()
        if len(buckets) * _PAIR.itemsize >= _WHOLE:
            return self.counts.astype("<u4").tobytes()
        pairs = np.empty(len(buckets), _PAIR)
        pairs["bucket"], pairs["count"] = buckets, self.counts[buckets]
        return pairs.tobytes()

    def percentiles(self) -> list[float | None]:
        """Seconds under which SHARES lie; None of nothing."""
        running = np.cumsum(self.counts, dtype=np.int64)
        total = int(running[-1])
        if not total:
            return [None] * len(SHARES)
        ranks = [math.ceil(share * total) for share in SHARES]
        return [LOWEST * FACTOR ** (float(np.searchsorted(running, rank)) - 0.5) for rank in ranks]
