"""Intervals that hold at every moment at once, so that one may look after each sample and stop when it is clear.

The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (2021), "Time-uniform central limit
theory and asymptotic confidence sequences": a normal mixture boundary over the sample variance. Needs counts, sums and
sums of squares alone. Knows nothing of tasks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

ALPHA = 0.05
"""Chance that an interval is ever wrong, over all time."""
TUNED_FOR = 1000
"""The number of samples at which the intervals are narrowest."""


@dataclass(frozen=True)
class Totals:
    """Scores from 0 to 1 of one subject."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """Of a sample, with one success and one failure put in, so that ten hits in a row are no certainty."""
        n = self.count + 2
        mean = (self.total + 1) / n
        return max((self.squares + 1) / n - mean * mean, 0.0)

    def plus(self, value: float, times: int = 1) -> Totals:
        """With a score added (or, `times` -1, taken out again)."""
        return Totals(self.count + times, self.total + times * value, self.squares + times * value * value)

    def joined(self, other: Totals) -> Totals:
        return Totals(self.count + other.count, self.total + other.total, self.squares + other.squares)


def radius(variance: float, count: int, alpha: float = ALPHA) -> float:
    """Half the width of the interval around a mean of `count` samples."""
    if count < 1:
        return math.inf
    least = -2 * math.log(alpha)
    rho2 = (least + math.log(least + 1)) / TUNED_FOR
    x = count * rho2 + 1
    return math.sqrt(variance * x / (count * count * rho2) * math.log(x / (alpha * alpha)))


def interval(totals: Totals, alpha: float = ALPHA) -> tuple[float, float]:
    """Where the true mean is, within 0 to 1."""
    if not totals.count:
        return 0.0, 1.0
    width = radius(totals.variance, totals.count, alpha)
    return max(0.0, totals.mean - width), min(1.0, totals.mean + width)


def lead(better: Totals, worse: Totals, alpha: float = ALPHA) -> float:
    """The least by which the first one's true mean is over the second's; negative while that is not certain."""
    count = min(better.count, worse.count)
    if not count:
        return -1.0
    return better.mean - worse.mean - radius(better.variance + worse.variance, count, alpha)
