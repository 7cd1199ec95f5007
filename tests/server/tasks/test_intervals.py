"""Confidence sequences: error rates in simulations, and how two mixes are compared by hours and by pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from server.tasks import intervals
from server.tasks.intervals import (
    ALPHA,
    Totals,
    compare_by_hours,
    compare_paired,
    confidence_interval,
    half_width,
)

SAME, ALL, NONE = Totals(10, 5.0, 5.0), Totals(10, 10.0, 10.0), Totals(10, 0.0, 0.0)


def test_totals_do_not_depend_on_the_order_and_removed_scores_leave_nothing() -> None:
    parts = [Totals(1, value, value * value) for value in (0.1, 0.7, 0.3)]
    assert len({Totals.sum(some) for some in itertools.permutations(parts)}) == 1
    totals = Totals()
    for times in (1, -1):
        for value in (0.1, 0.7, 0.3):
            totals = totals.plus(value, times)
    assert totals == Totals()


def test_a_mean_is_from_0_to_1_after_rounding() -> None:
    assert Totals(3, 3.0000000000000004, 3.0).mean == 1.0 and Totals(2, -1e-17, 0.0).mean == 0.0


def test_an_interval_contains_the_mean_and_narrows() -> None:
    few, many = Totals(100, 80, 80), Totals(10_000, 8000, 8000)
    for totals in (few, many):
        low, high = confidence_interval(totals)
        assert 0 <= low < 0.8 < high <= 1
    assert np.diff(confidence_interval(many))[0] < np.diff(confidence_interval(few))[0] / 5
    assert confidence_interval(Totals()) == (0, 1)
    assert confidence_interval(Totals(5, 0.0, 0.0))[0] == 0.0 and confidence_interval(Totals(5, 5.0, 5.0))[1] == 1.0
    assert confidence_interval(Totals(2000, 0.0, 0.0))[1] < 0.1


@pytest.mark.parametrize("share", [0.9, 0.98, 0.995])
def test_an_interval_holds_at_all_times_for_rare_misses(share: float) -> None:
    """The exact probability that the true share is outside at one of 3,000 looks."""
    outside, fewest, most = 0.0, 0, 0
    chances = np.zeros(3001)  # of each number of misses, if the share was inside so far
    chances[0] = 1.0
    for n in range(1, 3001):
        missed = chances[:-1] * (1 - share)
        chances *= share
        chances[1:] += missed

        def holds(misses: int, n: int = n) -> bool:
            low, high = confidence_interval(Totals(n, n - misses, n - misses))
            return low <= share <= high

        while not holds(fewest):
            fewest += 1
        most = max(most, fewest)
        while most < n and holds(most + 1):
            most += 1
        outside += chances[:fewest].sum() + chances[most + 1 :].sum()
        chances[:fewest] = chances[most + 1 :] = 0.0
    assert outside <= ALPHA


def test_equal_mixes_are_rarely_distinguished_by_pairs() -> None:
    """300 runs, looked at after each 25 of 3,000 examples; the answers agree on 70 % of them."""
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(300):
        equal = rng.random(3000) < 0.7
        halves = (1 + np.where(equal, 0.0, rng.integers(0, 2, 3000) - rng.integers(0, 2, 3000))) / 2
        sums, squares = np.cumsum(halves), np.cumsum(halves * halves)
        for n in range(50, 3000, 25):
            comparison = compare_paired(Totals(n, float(sums[n - 1]), float(squares[n - 1])))
            if comparison.lower_bound() > 0 or comparison.reversed().lower_bound() > 0:
                wrong += 1
                break
    assert wrong <= 15


def test_pairs_are_compared_by_the_mean_and_variance_of_their_differences() -> None:
    paired = Totals()
    for first, second in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)):
        paired = paired.plus((1 + first - second) / 2)
    comparison = compare_paired(paired)
    assert (comparison.mean, comparison.count) == (0.25, 4)
    assert comparison.variance == pytest.approx(5 / 6 - (1 / 6) ** 2), "of the four, 1 and -1"
    assert comparison.reversed().mean == -0.25 and compare_paired(Totals()).lower_bound() < -1


def test_an_hour_is_weighted_by_its_information() -> None:
    one, other = {0: Totals(10, 8.0, 8.0), 1: Totals(40, 20.0, 20.0)}, {0: Totals(30, 9.0, 9.0), 1: Totals(5, 4.0, 4.0)}
    a, b = Totals(50, 28.0, 28.0), Totals(35, 13.0, 13.0)
    pooled = (50 * a.variance + 35 * b.variance) / 85
    first, second = max(a.variance, pooled), max(b.variance, pooled)
    weights = [1 / (first / 10 + second / 30), 1 / (first / 40 + second / 5)]
    comparison = compare_by_hours(one, other)
    assert comparison.mean == pytest.approx((weights[0] * (0.8 - 0.3) + weights[1] * (0.5 - 0.8)) / sum(weights))
    assert comparison.variance == pytest.approx(first + second)
    assert comparison.count == pytest.approx(sum(weights) * (first + second))
    assert compare_by_hours(dict(reversed(one.items())), other).mean == pytest.approx(comparison.mean)


def test_rare_scores_are_combined_until_both_have_one() -> None:
    rare: dict[str, dict[int, Totals]] = {"a": {}, "b": {}}
    for hour in range(2000):
        value = float(hour % 20 > 1) if hour % 2 else float(hour % 8 > 1)
        rare["ab"[hour % 2]][hour] = Totals(1, value, value)
    total = {name: {0: Totals.sum(hours.values())} for name, hours in rare.items()}
    bound = compare_by_hours(total["b"], total["a"]).lower_bound()
    assert compare_by_hours(rare["b"], rare["a"]).lower_bound() == pytest.approx(bound, abs=0.005) and bound > 0


@pytest.mark.parametrize(
    ("one", "other", "mean"),
    [
        pytest.param({0: SAME, 30: ALL}, {0: SAME, 10: ALL, 28: NONE}, 0.5, id="back after 30 hours: latest hour"),
        pytest.param({0: SAME, 10: NONE, 20: ALL}, {0: SAME, 24: SAME}, 0.0, id="24 hours are no absence"),
        pytest.param(
            {0: SAME, 20: SAME, 30: NONE, 40: ALL}, {0: SAME, 20: SAME, 41: SAME}, 0.0, id="absence since both had one"
        ),
        pytest.param(
            {400_000: SAME, 490_002: SAME}, {490_000: NONE, 490_001: ALL}, 0.0, id="no absence before the first pair"
        ),
        pytest.param({0: SAME, 10: NONE, 20: ALL}, {0: SAME, 25: SAME}, 1 / 4, id="25 hours are an absence"),
    ],
)
def test_an_absence_of_more_than_a_day_leaves_the_latest_hour(
    one: dict[int, Totals], other: dict[int, Totals], mean: float
) -> None:
    assert compare_by_hours(one, other).mean == pytest.approx(mean)
    assert compare_by_hours(other, one).mean == pytest.approx(-mean)


def test_intervals_are_narrowest_at_the_number_they_are_tuned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    widths = {}
    for tuned in (500, 1000, 2000):
        monkeypatch.setattr(intervals, "TUNED_FOR", tuned)
        widths[tuned] = half_width(0.25, 1000, 0.001)
    assert min(widths, key=widths.__getitem__) == 1000
