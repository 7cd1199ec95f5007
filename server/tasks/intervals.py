"""Intervals that hold at every moment at once, so that one may look after each sample and stop when it is clear.

The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy, Ramdas (2021), "Time-uniform central limit
theory and asymptotic confidence sequences": a normal mixture boundary over the sample variance. Needs counts, sums and
sums of squares alone. Knows nothing of tasks.

Two subjects are compared within stretches of time in which both had scores, each stretch weighted by its information
(as a stratified trial is; Scharfstein, Tsiatis, Robins 1997 for why that may be looked at after each sample): one that
serves more when questions are harder is not blamed for it. Or by pairs, where both were asked the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

ALPHA = 0.05
"""Chance that an interval is ever wrong, over all time."""
TUNED_FOR = 1000
"""The number of samples at which the intervals are narrowest."""
AWAY = 24
"""Hours without an hour to compare, after which one of two subjects is taken to have been away."""


@dataclass(frozen=True)
class Totals:
    """Scores from 0 to 1 of one subject."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @property
    def mean(self) -> float:
        """Within 0 to 1: a sum that scores were taken out of has rounding of its own in its last digits."""
        return min(1.0, max(0.0, self.total / self.count)) if self.count else math.nan

    @property
    def variance(self) -> float:
        """Of a sample, with one success and one failure put in, so that ten hits in a row are no certainty."""
        n = self.count + 2
        mean = (self.total + 1) / n
        return max((self.squares + 1) / n - mean * mean, 0.0)

    def plus(self, value: float, times: int = 1) -> Totals:
        """With a score added (or, `times` -1, taken out again). Of no score at all, no rounding is left either."""
        count = self.count + times
        return Totals(count, self.total + times * value, self.squares + times * value * value) if count else Totals()

    def turned(self) -> Totals:
        """Of 1 - score, for scores of which less is better."""
        return Totals(self.count, self.count - self.total, self.count - 2 * self.total + self.squares)

    @staticmethod
    def joined(parts: Iterable[Totals]) -> Totals:
        """The sum, to the last digit the same in whatever order."""
        several = list(parts)
        total, squares = math.fsum(p.total for p in several), math.fsum(p.squares for p in several)
        return Totals(sum(p.count for p in several), total, squares)


Hours = Mapping[int, Totals]
"""Hour -> the scores of one subject in it."""


def radius(variance: float, count: float, alpha: float = ALPHA) -> float:
    """Half the width of the interval around a mean of `count` samples."""
    if count <= 0:
        return math.inf
    least = -2 * math.log(alpha)
    rho2 = (least + math.log(least + 1)) / TUNED_FOR
    x = count * rho2 + 1
    return math.sqrt(variance * x / (count * count * rho2) * math.log(x / (alpha * alpha)))


def interval(totals: Totals) -> tuple[float, float]:
    """Where the true mean is, within 0 to 1.

    With two more successes and failures in its variance: with one, that of one subject alone is too small for too long
    where misses are rare, and a true share of 0.99 was outside at some time in a tenth of all runs.
    """
    if not totals.count:
        return 0.0, 1.0
    width = radius(totals.plus(1.0, 2).plus(0.0, 2).variance, totals.count, ALPHA)
    return max(0.0, totals.mean - width), min(1.0, totals.mean + width)


@dataclass(frozen=True)
class Apart:
    """How far the first of two subjects is over the second, with what the interval around that goes by."""

    mean: float
    variance: float
    count: float

    def least(self, alpha: float = ALPHA) -> float:
        """The least by which the first one's true mean is over the second's; negative while that is not certain."""
        return self.mean - radius(self.variance, self.count, alpha)

    def turned(self) -> Apart:
        """The second over the first."""
        return Apart(-self.mean, self.variance, self.count)


NOTHING = Apart(0.0, 1.0, 0.0)
"""Of subjects that nothing can be compared of."""


def by_pairs(paired: Totals) -> Apart:
    """By what is between two subjects on the same examples: (1 + first's - second's) / 2 of each."""
    return Apart(2 * paired.mean - 1, 4 * paired.variance, paired.count) if paired.count else NOTHING


def by_hours(one: Hours, other: Hours) -> Apart:
    """Within stretches of time: as many hours as it takes until both have a score, so that nothing is lost where scores
    are rare. What one of them has from before the other's first hour says nothing, and from while that was away for
    more than a day its latest hour alone: all questions may have been others then, and it would all be held against one
    hour.

    A subject of few scores is taken to vary at least as much as both together: one that was lucky so far would look
    certain.
    """
    if not one or not other:
        return NOTHING
    begin = since = max(min(one), min(other))
    one, other = ({hour: of for hour, of in hours.items() if hour >= begin} for hours in (one, other))
    mine, theirs = Totals.joined(one.values()), Totals.joined(other.values())
    together = mine.count * mine.variance + theirs.count * theirs.variance
    together /= max(1, mine.count + theirs.count)
    first, second = max(mine.variance, together), max(theirs.variance, together)
    information = weighted = total_a = total_b = 0.0
    count_a = count_b = 0
    last_a = last_b = Totals()
    for hour in sorted(one.keys() | other.keys()):
        a, b = one.get(hour), other.get(hour)
        if hour - since > AWAY and (count_a and b or count_b and a):  # who was away is back
            count_a, total_a = (0, 0.0) if a else (last_a.count, last_a.total)
            count_b, total_b = (0, 0.0) if b else (last_b.count, last_b.total)
        if a is not None:
            count_a, total_a, last_a = count_a + a.count, total_a + a.total, a
        if b is not None:
            count_b, total_b, last_b = count_b + b.count, total_b + b.total, b
        if count_a and count_b:
            weight = 1.0 / (first / count_a + second / count_b)
            information += weight
            weighted += weight * (total_a / count_a - total_b / count_b)
            since = hour
            count_a = count_b = 0
            total_a = total_b = 0.0
    if not information:
        return NOTHING
    variance = first + second
    return Apart(weighted / information, variance, information * variance)
