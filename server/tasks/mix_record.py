"""What the server keeps in memory about one mix: scores by hour, their totals, and traffic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.tasks.intervals import Totals, confidence_interval
from server.tasks.mix_key import MixKey
from server.tasks.quality_store import HOUR
from server.tasks.traffic import QUANTILES, TrafficCounts


@dataclass
class MixRecord:
    """Scores and traffic of one mix. Dictionaries are replaced, not changed, so reading needs no lock.

    Attributes:
        id: primary key in the database.
        client_defined: a client chose this mix; no route leads to it.
        last_hour: last hour with traffic or scores, in hours since the epoch.
        hours: (metric, source) -> hour -> scores.
        totals: (metric, source) -> scores of all hours.
        traffic: traffic of all hours, or None if it has not been read yet.
    """

    id: int
    client_defined: bool
    last_hour: int = 0
    hours: dict[tuple[str, str], dict[int, Totals]] = field(default_factory=dict)
    totals: dict[tuple[str, str], Totals] = field(default_factory=dict)
    traffic: TrafficCounts | None = None

    def changed_hours(self, metric: str, source: str, changes: Iterable[tuple[float, float, int]]) -> dict[int, Totals]:
        """Totals of the hours that `changes` affect. A change is (score, time, +1 or -1). Nothing is stored."""
        hours = self.hours.get((metric, source), {})
        changed: dict[int, Totals] = {}
        for value, at, times in changes:
            hour = int(at) // HOUR
            changed[hour] = changed.get(hour, hours.get(hour, Totals())).plus(value, times)
        return changed

    def update_hours(self, metric: str, source: str, changed: Mapping[int, Totals]) -> None:
        """Store what `changed_hours` computed."""
        hours = {**self.hours.get((metric, source), {}), **changed}
        self._set_hours(metric, source, {hour: totals for hour, totals in hours.items() if totals.count})

    def drop_hours(self, before: int) -> None:
        """Drop scores of hours before `before`."""
        for (metric, source), hours in self.hours.items():
            self._set_hours(metric, source, {hour: totals for hour, totals in hours.items() if hour >= before})

    def _set_hours(self, metric: str, source: str, hours: dict[int, Totals]) -> None:
        self.hours[metric, source] = hours
        self.totals[metric, source] = Totals.sum(hours.values())
        self.last_hour = max(self.last_hour, *hours, 0)

    def describe(self, key: MixKey) -> dict[str, Any]:
        """One of `versions` in a task's performance."""
        traffic = self.traffic or TrafficCounts()
        quality: list[dict[str, Any]] = []
        for (metric, source), totals in sorted(self.totals.items()):
            if totals.count:
                low, high = confidence_interval(totals)
                scores = {"samples": totals.count, "mean": totals.mean, "low": low, "high": high}
                quality.append({"metric": metric, "source": source, **scores})
        names = [f"p{quantile * 100:.0f}" for quantile in QUANTILES]
        counts = traffic.counts
        return {
            "version": key.label,
            "adapters": [{"version": version, "weight": weight} for version, weight in key.choice],
            "base": key.base,
            "samples": max((each["samples"] for each in quality), default=0),
            "quality": quality,
            **{kind: dict(zip(names, hist.quantiles(), strict=True)) for kind, hist in traffic.latencies.items()},
            "requests": counts["requests"],
            "errors": counts["errors"],
            "tokens": {"prompt": counts["prompt_tokens"], "generated": counts["generated_tokens"]},
        }
