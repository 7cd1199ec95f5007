"""What comes of a subject, added up one by one, from another, and from rows."""

from __future__ import annotations

from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.traffic import COLUMNS, KINDS, TrafficCounts


def answered(seconds: float, *, failed: bool = False) -> AnswerRecord:
    return AnswerRecord(
        "id", MixKey("t", "a", "a@1"), "", "text", failed, 3, 2, ttft=seconds, tpot=seconds / 2, e2e=seconds * 2
    )


def test_what_is_added_merged_and_read_back_is_the_same():
    first, second, whole = TrafficCounts(), TrafficCounts(), TrafficCounts()
    for traffic, seconds, failed in ((first, 0.1, False), (second, 0.4, False), (second, 9.0, True)):
        traffic.add(answered(seconds, failed=failed))
        whole.add(answered(seconds, failed=failed))
    assert whole.sums == [3, 1, 9, 6]
    rows = [(*t.sums, *(t.latencies[kind].dump() for kind in KINDS)) for t in (first, second)]
    assert {len(row) for row in rows} == {len(COLUMNS.split(", "))}
    read = TrafficCounts()
    read.join([])
    read.join(rows)
    first.merge(second)
    for kind in KINDS:  # of what failed nothing is in them
        told = whole.latencies[kind].percentiles()
        assert told == first.latencies[kind].percentiles() == read.latencies[kind].percentiles()
        assert max(told) < 1.0
    assert first.sums == read.sums == whole.sums
