"""Bounds of differences: of pairs, and hour by hour, of whom is there and whom was away."""

from __future__ import annotations

import itertools

import pytest

from server.tasks import intervals
from server.tasks.intervals import Totals, by_hours, by_pairs


def test_pairs_vary_as_what_is_between_them_does() -> None:
    """With one of each kind of difference put in: 1, -1, 0, 1 and 1, -1."""
    paired = Totals()
    for first, second in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)):
        paired = paired.plus((1 + first - second) / 2)
    assert by_pairs(paired).variance == pytest.approx(5 / 6 - (1 / 6) ** 2)


def test_a_sum_is_the_same_in_whatever_order() -> None:
    """As hours are read in another one after a restart."""
    parts = [Totals(1, value, value * value) for value in (0.1, 0.7, 0.3)]
    assert len({Totals.joined(some) for some in itertools.permutations(parts)}) == 1


def test_who_is_back_is_compared_at_once_with_the_latest_hour_of_the_other() -> None:
    same, good, bad = Totals(10, 5.0, 5.0), Totals(10, 10.0, 10.0), Totals(10, 0.0, 0.0)
    back, other = {0: same, 30: good}, {0: same, 10: good, 28: bad}
    assert by_hours(back, other).mean == pytest.approx(0.5) == -by_hours(other, back).mean


def test_a_day_is_not_yet_an_absence() -> None:
    """A job that is run at the same hour of each day has all of the other's day compared."""
    same, none, all_ = Totals(10, 5.0, 5.0), Totals(10, 0.0, 0.0), Totals(10, 10.0, 10.0)
    one = {0: same, 10: none, 20: all_}
    assert by_hours(one, {0: same, 24: same}).mean == pytest.approx(0.0)
    assert by_hours(one, {0: same, 25: same}).mean > 0.1, "its latest hour alone"


def test_an_absence_begins_where_both_were_there_last() -> None:
    same, none, all_ = Totals(10, 5.0, 5.0), Totals(10, 0.0, 0.0), Totals(10, 10.0, 10.0)
    one, other = {0: same, 20: same, 30: none, 40: all_}, {0: same, 20: same, 41: same}
    assert by_hours(one, other).mean == pytest.approx(0.0), "nobody was away, and all of its hours count"


def test_until_both_have_a_score_for_the_first_time_nobody_was_away() -> None:
    """Hours are counted from 1970."""
    same, none, all_ = Totals(10, 5.0, 5.0), Totals(10, 0.0, 0.0), Totals(10, 10.0, 10.0)
    one, other = {400_000: same, 490_002: same}, {490_000: none, 490_001: all_}
    assert by_hours(one, other).mean == pytest.approx(0.0)


def test_intervals_of_any_chance_are_narrowest_where_they_are_tuned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among many candidates each pair has a small share of it."""
    widths = {}
    for tuned in (500, 1000, 2000):
        monkeypatch.setattr(intervals, "TUNED_FOR", tuned)
        widths[tuned] = intervals.radius(0.25, 1000, 0.001)
    assert min(widths, key=widths.__getitem__) == 1000
