"""`TrafficCounts`: how many answers a subject gave, of how many tokens, and how fast. Does not know where it
is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.tasks.latency import LatencyHistogram
from server.tasks.mix_key import AnswerRecord

KINDS = ("ttft", "tpot", "e2e")
COLUMNS = "requests, errors, prompt_tokens, generated_tokens, ttft, tpot, e2e"
"""Of a row as `TrafficCounts.join` takes it: four sums, then the latencies of each kind."""


class TrafficCounts:
    """What has come of one subject, in one hour or in all."""

    def __init__(self) -> None:
        self.sums = [0, 0, 0, 0]  # requests, errors, prompt tokens, generated tokens
        self.latencies = {kind: LatencyHistogram() for kind in KINDS}

    def add(self, answered: AnswerRecord) -> None:
        """Count one; the latencies of what has failed say nothing."""
        told = (1, int(answered.failed), answered.prompt_tokens, answered.generated_tokens)
        self.sums = [a + b for a, b in zip(self.sums, told, strict=True)]
        if not answered.failed:
            for kind, latencies in self.latencies.items():
                latencies.add(getattr(answered, kind))

    def merge(self, other: TrafficCounts) -> None:
        """Add what another has seen."""
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        for kind, latencies in self.latencies.items():
            latencies.merge(other.latencies[kind])

    def join(self, rows: Sequence[Sequence[Any]]) -> None:
        """Add rows of `traffic`, without their keys."""
        columns = list(zip(*rows, strict=True))
        if not columns:
            return
        self.sums = [have + sum(more) for have, more in zip(self.sums, columns[:4], strict=True)]
        for i, latencies in enumerate(self.latencies.values(), start=4):
            latencies.join(columns[i])
