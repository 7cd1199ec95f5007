"""Latency histograms and traffic counts."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.traffic import BUCKETS, COUNTS, KINDS, LatencyHistogram, TrafficCounts

KEY = MixKey("t", "[]", "base")


class Row:
    """A row of `traffic_hours`."""

    def __init__(self, columns: dict[str, Any]) -> None:
        self.__dict__.update(columns)


def test_quantiles_are_within_five_percent() -> None:
    histogram = LatencyHistogram()
    seconds = np.random.default_rng(1).lognormal(-2, 1, 20_000)
    for value in seconds:
        histogram.add(float(value))
    assert histogram.quantiles() == pytest.approx(np.quantile(seconds, [0.5, 0.95, 0.99]), rel=0.05)
    assert LatencyHistogram().quantiles() == [None] * 3


@pytest.mark.parametrize(("seconds", "bucket"), [(0.0, 0), (1e-4, 0), (1e6, BUCKETS - 1), (math.nan, None)])
def test_latencies_outside_the_range_go_to_the_first_and_last_bucket(seconds: float, bucket: int | None) -> None:
    histogram = LatencyHistogram()
    histogram.add(seconds)
    assert histogram.counts.nonzero()[0].tolist() == ([] if bucket is None else [bucket])


@given(st.lists(st.lists(st.floats(0, 1e5), max_size=20), max_size=4))
def test_a_histogram_is_restored_from_its_dumps(several: list[list[float]]) -> None:
    total, dumps = LatencyHistogram(), []
    for values in several:
        histogram = LatencyHistogram()
        for value in values:
            histogram.add(value)
        dumps.append(histogram.dump())
        total.merge(histogram)
        assert len(dumps[-1]) <= 5 * len(values)
    restored = LatencyHistogram()
    restored.load(dumps)
    assert (restored.counts == total.counts).all()


@pytest.mark.parametrize("damaged", [b"1234", bytes([BUCKETS, 1, 0, 0, 0])])
def test_other_bytes_are_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError):
        LatencyHistogram().load([damaged])


def test_failed_answers_count_as_errors_without_latencies() -> None:
    traffic = TrafficCounts()
    for failed in (False, True):
        traffic.add(AnswerRecord("id", KEY, "", "x", failed, 3, 2, ttft=0.1, tpot=0.2, e2e=0.4))
    assert traffic.counts == dict(zip(COUNTS, (2, 1, 6, 4), strict=True))
    assert [traffic.latencies[kind].counts.sum() for kind in KINDS] == [1, 1, 1]
    assert [traffic.latencies[kind].quantiles()[0] for kind in KINDS] == pytest.approx([0.1, 0.2, 0.4], rel=0.05)


def test_traffic_is_restored_from_its_rows() -> None:
    traffic, restored = TrafficCounts(), TrafficCounts()
    traffic.add(AnswerRecord("id", KEY, "", "x", False, 3, 2, ttft=0.1, tpot=0.2, e2e=0.4))
    restored.load([Row(traffic.columns())])
    restored.merge(traffic)
    traffic.merge(traffic)
    assert restored.columns() == traffic.columns()
