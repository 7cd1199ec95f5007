"""Quality records: what is kept, for whom, how fast it is read and how large it gets."""

from __future__ import annotations

import math
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from adapters.errors import StoreFailed
from adapters.weights import Version
from server.errors import UnknownName
from server.tasks import quality as module
from server.tasks.examples import digest
from server.tasks.intervals import Totals
from server.tasks.latency import BUCKETS, LatencyHistogram
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.quality import DAY, Quality
from server.tasks.quality_file import in_memory
from tests.waiting import until

A, B = Version("a", "a" * 64), Version("b", "b" * 64)


def answered(id: str, subject: MixKey, text: str = "yes", tenant: str = "", **more: float) -> AnswerRecord:
    return AnswerRecord(id, subject, tenant, text, ttft=0.1, e2e=0.5, prompt_tokens=3, generated_tokens=2, **more)  # type: ignore[arg-type]


def test_subjects_are_versions_weights_and_base() -> None:
    one = MixKey.of("t", [(A, 1.0)], "base")
    assert one.label == "a@" + "a" * 12 and one.adapter == "a"
    mixed = MixKey.of("t", [(B, 0.5), (A, -2.0)], "base")
    assert mixed == MixKey.of("t", [(A, -2.0), (B, 0.5)], "base") and mixed.adapter == "a+b"
    assert mixed.label == f"a@{'a' * 12}*-2+b@{'b' * 12}*0.5"
    assert MixKey.of("t", [(A, 0.0)], "base").label == "base"
    close = [MixKey.of("t", [(A, weight)], "base") for weight in (0.7, 0.7 + 1e-12, 0.7000001)]
    assert close[0] == close[1] and [s.label[-10:] for s in close[1:]] == ["aaaaaa*0.7", "*0.7000001"]
    assert len({one, mixed, MixKey.of("t", [(A, 1.0)], "other"), MixKey.of("u", [(A, 1.0)], "base")}) == 4


def test_records_outlive_the_process_and_hold_no_text(tmp_path: Path) -> None:
    file, subject = tmp_path / "quality.db", MixKey.of("t", [(A, 1.0)], "base")
    quality = Quality(file)
    quality.record_answer(answered("gen-1", subject, "a secret answer"))
    quality.record_feedback("t", "gen-1", "", score=None, expected=" a secret answer\n")
    quality.record_answer(answered("gen-2", subject))
    quality.close()
    assert b"secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    again = Quality(file)
    assert again.totals(subject, "accuracy", "feedback").mean == 1.0
    again.feedback("t", "gen-2", "", score=0.5, expected=None)
    again.feedback("t", "gen-1", "", score=0.0, expected=None)
    totals = again.totals(subject, "accuracy", "feedback")
    assert (totals.count, totals.total, totals.squares) == (2, 0.5, 0.25)
    (told,) = again.performance("t")
    assert told["requests"] == 2 and told["tokens"] == {"prompt": 6, "generated": 4}
    assert told["e2e"]["p50"] == pytest.approx(0.5, rel=0.06) and told["tpot"]["p50"] is None
    again.close()
    reopened = Quality(file)
    assert reopened.totals(subject, "accuracy", "feedback") == totals, "the hourly sums agree with what was in memory"
    reopened.close()


def test_means_are_shares_in_one_order_whatever_was_scored_before_and_after_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, subject, now = tmp_path / "quality.db", MixKey.of("t", [(A, 1.0)], "base"), time.time()
    quality, ids = Quality(file), [f"gen-{i}" for i in range(11)]
    quality.record_evaluation(subject, "loss", {"x": 0.5})
    for id in ids:
        quality.record_answer(answered(id, subject))
    for hours, scores in ((0, (0.1,)), (1, (1.0,)), (2, (0.1, 0.7, 0.3)), (1, (0.9,)), (3, (0.0,)), (3, (0.1, 1.0))):
        monkeypatch.setattr(module.time, "time", lambda hours=hours: now + hours * module.HOUR)
        for score in scores:
            for id in ids:
                quality.record_feedback("t", id, "", score=score, expected=None)
        (told,) = quality.performance("t")
        assert 0 <= told["quality"][0]["low"] <= told["quality"][0]["mean"] <= told["quality"][0]["high"] <= 1
    assert sum(totals.count > 0 for totals in quality.hours(subject, "accuracy", "feedback").values()) == 1
    quality.record_evaluation(subject, "accuracy", {"x": 0.5})
    (told,), means = quality.performance("t"), sorted(map(str, quality.means(["t"])))
    assert [(q["metric"], q["source"]) for q in told["quality"]] == [
        ("accuracy", "evaluation"), ("accuracy", "feedback"), ("loss", "evaluation")]  # fmt: skip
    quality.close()
    again = Quality(file)
    assert again.performance("t") == [told] and sorted(map(str, again.means(["t"]))) == means
    again.close()


@pytest.mark.parametrize("at", [0, 4096], ids=["no database", "a damaged page"])
def test_a_damaged_file_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture, at: int) -> None:
    file, subject = tmp_path / "quality.db", MixKey.of("t", [(A, 1.0)], "base")
    first = Quality(file)
    first.answered(answered("gen-1", subject))
    first.close()
    whole = file.read_bytes()
    file.write_bytes(whole[:at] + b"x" * (len(whole) - at))
    again = Quality(file)
    assert again.performance("t") == [] and "set aside as quality.broken.db" in caplog.text
    again.answered(answered("gen-2", subject))
    again.feedback("t", "gen-2", "", score=1.0, expected=None)
    assert again.totals(subject, "accuracy", "feedback").count == 1
    again.close()
    assert (tmp_path / "quality.broken.db").stat().st_size == len(whole)


def test_of_many_versions_the_last_that_answered_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOLD", 3)
    file, now = tmp_path / "quality.db", time.time()
    quality = Quality(file)
    subjects = [MixKey.of("t", [(Version("a", f"{i}" * 64), 1.0)], "base") for i in range(6)]
    for i, subject in enumerate(subjects):
        quality.record_answer(answered(f"gen-{i}", subject, at=now - (10 - i) * module.HOUR))
        quality.record_answer(answered(f"other-{i}", MixKey.of("u", [], "base"), at=now))
    labels = [subject.label for subject in subjects]

    def told(of: Quality) -> list[str]:
        return [row["version"] for row in of.performance("t")]

    assert told(quality) == labels[3:]
    quality.record_answer(answered("again", subjects[1], at=now))
    assert told(quality) == [labels[1], *labels[4:]]
    quality.record_evaluation(subjects[0], "accuracy", {"x": 1.0})
    assert told(quality) == [labels[0], labels[1], labels[5]]
    own = [MixKey.of("t", [(Version("a", "5" * 64), 0.5 + i / 8)], "base") for i in range(3)]
    for i, subject in enumerate(own):
        quality.record_answer(answered(f"own-{i}", subject, at=now + module.HOUR, routed=False))
    assert told(quality) == [labels[0], labels[1], labels[5]], "what clients make up is behind all others"
    assert [mean[0] for mean in quality.means(["t", "gone"])] == [subjects[0]] and not quality.means(["u"])
    quality.close()
    again = Quality(file)
    assert told(again) == [labels[0], labels[1], labels[5]] and len(again.performance("u")) == 1
    again.close()


def test_an_answer_that_is_noted_late_makes_no_version_older(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TOLD", 1)
    quality, now = Quality(tmp_path / "quality.db"), time.time()
    last, before = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    for n, (subject, hours) in enumerate([(last, 0), (before, 1), (last, 2)]):
        quality.record_answer(answered(f"{n}", subject, at=now - hours * module.HOUR))
        quality.flush()
    assert [told["version"] for told in quality.performance("t")] == [last.label]
    quality.close()


def test_feedback_is_for_a_day(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_answer(answered("old", subject, at=time.time() - module.DAY - 1))
    with pytest.raises(UnknownName):
        quality.record_feedback("t", "old", "", score=1.0, expected=None)
    quality.close()


def test_feedback_is_for_the_task_and_the_tenant_of_the_answer(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject, tenant="team"))
    quality.record_answer(answered("of another task", MixKey.of("u", [], "base"), tenant="team"))
    for task, id, tenant in (("u", "one", "team"), ("t", "one", "other"), ("t", "of another task", "team")):
        with pytest.raises(UnknownName):
            quality.record_feedback(task, id, tenant, score=1.0, expected=None)
    quality.record_feedback("t", "one", "team", score=1.0, expected=None)
    assert quality.totals(subject, "accuracy", "feedback").count == 1
    quality.close()


def test_an_answer_that_failed_is_an_error_and_no_latency(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject, failed=True))
    (told,) = quality.performance("t")
    assert (told["requests"], told["errors"], told["e2e"]["p50"]) == (1, 1, None)
    with pytest.raises(UnknownName):
        quality.record_feedback("t", "one", "", score=1.0, expected=None)
    quality.close()


def test_answers_are_written_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    quality = Quality(tmp_path / "quality.db")
    quality.record_answer(answered("one", MixKey.of("t", [], "base")))
    with closing(sqlite3.connect(tmp_path / "quality.db")) as beside:
        until(lambda: beside.execute("SELECT count(*) FROM answers").fetchone() == (1,))
    quality.close()


@pytest.mark.parametrize(("retention", "kept"), [(90 * module.DAY, 89 * module.DAY), (module.HOUR, 0.9 * module.DAY)])
def test_rows_stay_until_they_are_old_and_a_day_at_least(tmp_path: Path, retention: float, kept: float) -> None:
    quality, subject = Quality(tmp_path / "quality.db", retention=retention), MixKey.of("t", [], "base")
    quality.record_evaluation(subject, "accuracy", {"x": 1.0})

    def rows() -> int:
        (count,) = quality._db.execute("SELECT count(*) FROM scores").fetchone()
        return int(count)

    quality._sweep(time.time() + kept)
    assert quality.totals(subject, "accuracy", "evaluation").count == rows() == 1
    quality._sweep(time.time() + 2 * max(retention, module.DAY))
    assert quality.totals(subject, "accuracy", "evaluation").count == rows() == 0
    quality.close()


def test_an_example_that_is_scored_again_as_it_grows_old_counts_once(tmp_path: Path) -> None:
    """Sums go by whole hours, and what says that they have it with them."""
    quality, subject = Quality(tmp_path / "quality.db", retention=2 * module.DAY), MixKey.of("t", [], "base")
    quality.record_evaluation(subject, "accuracy", {"x": 1.0})
    hour = time.time() // module.HOUR * module.HOUR
    quality._sweep(hour + module.HOUR - 1 + 2 * module.DAY)
    quality.record_evaluation(subject, "accuracy", {"x": 0.0})
    totals = quality.totals(subject, "accuracy", "evaluation")
    assert (totals.count, totals.mean) == (1, 0.0)
    quality.close()


def count(quality: Quality, table: str) -> int:
    (rows,) = quality._db.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(rows)


def test_answers_stay_for_the_day_of_their_feedback_and_no_longer(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject))
    quality.flush()
    quality._sweep(time.time() + 0.9 * DAY)
    quality.record_feedback("t", "one", "", score=1.0, expected=None)
    quality._sweep(time.time() + DAY + 60)
    assert count(quality, "answers") == 0 and count(quality, "scores") == 1
    quality.close()


def test_examples_go_with_their_scores(tmp_path: Path) -> None:
    quality = Quality(tmp_path / "quality.db")
    a, b = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    quality.record_evaluation(a, "accuracy", {"x": 1.0})
    quality._sweep(time.time() + 200 * DAY)
    assert count(quality, "examples") == count(quality, "scores") == 0
    for subject in (b, a):  # it may have the number of the one that is gone
        quality.record_evaluation(subject, "accuracy", {"y": 1.0})
    assert quality.paired(a, b, "accuracy").count == 1
    quality.close()


def test_a_version_with_the_number_of_a_mix_that_is_forgotten_is_not_made_up(tmp_path: Path) -> None:
    quality, own = Quality(tmp_path / "quality.db"), MixKey.of("t", [(A, 0.5)], "base")
    quality.record_answer(answered("own", own, routed=False))
    quality.flush()
    assert quality._made_up == {own}
    quality._sweep(time.time() + 200 * DAY)
    quality.record_answer(answered("routed", MixKey.of("t", [(B, 1.0)], "base")))
    quality.close()
    again = Quality(tmp_path / "quality.db")
    assert len(again.performance("t")) == 1 and not again._made_up
    again.close()


def test_who_has_answers_alone_or_scores_alone_is_known_after_a_sweep(tmp_path: Path) -> None:
    quality, old = Quality(tmp_path / "quality.db", retention=DAY), MixKey.of("t", [], "base")
    quality.record_answer(answered("old", old, at=time.time() - 3 * DAY))
    quality.record_answer(answered("one", MixKey.of("t", [(A, 1.0)], "base")))
    quality.record_evaluation(MixKey.of("t", [(B, 1.0)], "base"), "accuracy", {"x": 1.0})
    quality.flush()
    quality._sweep(time.time())
    told = {version["version"][0]: (version["requests"], version["samples"]) for version in quality.performance("t")}
    assert told == {"a": (1, 0), "b": (0, 1)}
    quality.close()


def test_traffic_that_was_asked_for_is_forgotten_as_it_grows_old(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db", retention=DAY), MixKey.of("t", [], "base")
    for days in (3, 0, 0):
        quality.record_answer(answered(f"{days}", subject, at=time.time() - days * DAY))
    assert [told["requests"] for told in quality.performance("t")] == [3]
    quality._sweep(time.time())
    assert [told["requests"] for told in quality.performance("t")] == [2]
    quality.close()


@pytest.mark.parametrize("drift", [-61.0, -59.0, 59.0, 61.0])
def test_a_clock_that_is_a_minute_off_in_an_hour_is_trusted_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, drift: float
) -> None:
    quality = Quality(tmp_path / "quality.db")
    wall, steady = quality._clocks
    with quality._lock:
        quality._sweep_hourly(wall + module.HOUR + drift, steady + module.HOUR)
    assert ("the clock was set by" in caplog.text) is (abs(drift) > 60)
    quality.close()


def test_answers_wait_for_a_disk_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 3)
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")

    def full(pending: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken, quality._lock:
        broken.setattr(quality, "_write", full)
        for n in range(6):
            quality.record_answer(answered(f"{n}", subject))
            with pytest.raises(sqlite3.OperationalError):
                quality._flush()
        assert [waiting.id for waiting in quality._pending] == ["3", "4", "5"]
    quality.close()


@pytest.mark.parametrize("scored", [True, False])
def test_old_rows_go(tmp_path: Path, scored: bool) -> None:
    quality, subject = Quality(tmp_path / "quality.db", retention=module.DAY), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject))
    if scored:
        quality.record_feedback("t", "one", "", score=1.0, expected=None)
    quality.flush()
    quality._sweep(time.time() + 3 * module.DAY)
    assert quality.totals(subject, "accuracy", "feedback").count == 0
    assert quality.performance("t") == []
    quality.record_answer(answered("two", subject))
    assert [told["requests"] for told in quality.performance("t")] == [1]
    quality.close()


def test_mixes_that_clients_make_up_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MADE_UP", 3)
    quality = Quality(tmp_path / "quality.db")
    for version in range(5):  # what is published again and again is no mix of a client's
        quality.record_answer(answered(f"v{version}", MixKey.of("v", [(Version("a", f"{version}" * 64), 1.0)], "base")))
    quality.record_answer(answered("mine", MixKey.of("v", [(A, 0.5)], "base"), routed=False))
    assert len(quality.performance("v")) == 6
    quality.record_feedback("v", "mine", "", score=1.0, expected=None)
    custom_mix = [MixKey.of("t", [(A, n / 8)], "base") for n in range(1, 6)]
    for n, subject in enumerate([*custom_mix, custom_mix[0]]):
        quality.record_answer(answered(f"{n}", subject, routed=False))
    quality.record_answer(answered("own", MixKey.of("t", [(B, 1.0)], "base")))
    quality.record_answer(answered("other", MixKey.of("u", [(A, 0.5)], "base"), routed=False))
    told = {version["version"]: version["requests"] for version in quality.performance("t")}
    assert list(told.values()) == [2, 1, 1, 1] and f"b@{'b' * 12}" in told
    assert len(quality.performance("u")) == 1
    with pytest.raises(UnknownName, match="hours; of mixes that clients choose, the first 3 are kept"):
        quality.record_feedback("t", "4", "", score=1.0, expected=None)
    with pytest.raises(UnknownName, match="24 hours$"):
        quality.record_feedback("v", "none", "", score=1.0, expected=None)
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    quality.record_answer(answered("again", MixKey.of("t", [(A, 2.0)], "base"), routed=False))
    assert len(quality.performance("t")) == 4, "after a restart too"
    quality.close()


def test_a_mix_that_waits_for_a_disk_takes_no_place_from_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_MADE_UP", 1)
    quality, write = Quality(tmp_path / "quality.db"), Quality._write

    def full(pending: Any) -> Any:
        write(quality, pending)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken, quality._lock:
        broken.setattr(quality, "_write", full)
        quality.record_answer(answered("mine", MixKey.of("t", [(A, 0.5)], "base"), routed=False))
        with pytest.raises(sqlite3.OperationalError):
            quality._flush()
    quality.record_feedback("t", "mine", "", score=1.0, expected=None)
    quality.close()


def test_what_a_client_tried_before_it_was_routed_is_made_up_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_MADE_UP", 1)
    quality, tried = Quality(tmp_path / "quality.db"), MixKey.of("t", [(B, 1.0)], "base")
    quality.record_answer(answered("tried", tried, routed=False))
    quality.flush()
    with quality._lock:
        (pages,) = quality._db.execute("PRAGMA page_count").fetchone()
        quality._db.execute(f"PRAGMA max_page_count = {pages}")
    quality.record_answer(answered("routed", tried))
    for n in range(500):
        quality.record_answer(answered(f"more-{n}", MixKey.of("u", [], "base")))
    with pytest.raises(StoreFailed, match="full"):
        quality.record_feedback("t", "tried", "", score=1.0, expected=None)
    with quality._lock:
        quality._db.execute("PRAGMA max_page_count = 1000000")
    quality.record_answer(answered("mine", MixKey.of("t", [(A, 0.5)], "base"), routed=False))
    assert len(quality.performance("t")) == 2, "its place is free"
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    assert {s.label for s in quality._made_up} == {MixKey.of("t", [(A, 0.5)], "base").label}
    quality.close()


def test_traffic_of_many_versions_is_read_when_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TRAFFIC", 2)
    subjects = [MixKey.of("t", [(A, n / 8)], "base") for n in range(1, 6)]
    quality = Quality(tmp_path / "quality.db")
    for round in range(2):
        for n, subject in enumerate(subjects):
            for i in range(n + 1):
                quality.record_answer(answered(f"{round} {n} {i}", subject))
        told = quality.performance("t")
        assert [version["requests"] for version in told] == [(n + 1) * (round + 1) for n in range(5)]
        assert len(quality._traffic) == 2
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    assert not quality._traffic and quality.performance("t") == told
    quality.close()


def test_what_is_between_two_that_were_never_evaluated_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_PAIRED", 4)
    quality = Quality(tmp_path / "quality.db")
    subjects = [MixKey.of("t", [(A, n / 8)], "base") for n in range(1, 6)]
    assert quality.paired(subjects[0], subjects[1], "accuracy").count == 0 and not quality._paired
    for subject in subjects:
        quality.record_evaluation(subject, "accuracy", {"x": 1.0})
    for one in subjects:
        assert [quality.paired(one, other, "accuracy").count for other in subjects] == [1] * 5
    assert len(quality._paired) == 4
    quality.close()


def test_a_clock_that_jumps_deletes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject))
    quality.record_feedback("t", "one", "", score=1.0, expected=None)
    wall, steady = quality._clocks
    for hours, offset in ((1.1, 365 * module.DAY), (2.2, -365 * module.DAY), (3.3, 0.0)):
        quality._sweep_hourly(wall + hours * module.HOUR + offset, steady + hours * module.HOUR)
        assert quality.totals(subject, "accuracy", "feedback").count == 1
    assert caplog.text.count("the clock was set by") == 3
    quality._sweep_hourly(wall + 100 * module.DAY, steady + 100 * module.DAY)
    assert quality.totals(subject, "accuracy", "feedback").count == 0, "a hundred days that were really there"
    quality.close()


def test_a_machine_that_sleeps_within_every_hour_forgets_too(tmp_path: Path) -> None:
    """The monotonic clock stands still meanwhile, so the other one seems to jump each time."""
    quality, subject = Quality(tmp_path / "quality.db", retention=DAY), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject))
    quality.flush()
    (wall, steady), kept = quality._clocks, list[bool]()
    with quality._lock:
        for slept in range(1, 9):
            quality._sweep_hourly(wall + slept * 8 * module.HOUR, steady + slept * 1.1 * module.HOUR)
            kept.append(subject in quality._ids)
    assert kept == [True] * 3 + [False] * 5, "for a day and its hour, and for no more than a sleep beyond"
    quality.close()


def test_a_start_with_a_clock_that_is_ahead_deletes_nothing_within_an_hour(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject, now = MixKey.of("t", [], "base"), time.time()
    first = Quality(tmp_path / "quality.db")
    first.evaluated(subject, "accuracy", {"x": 1.0})
    first.close()
    ahead = now + 400 * DAY
    for mended in (True, False):
        monkeypatch.setattr(module.time, "time", lambda: ahead)
        quality = Quality(tmp_path / "quality.db")
        monkeypatch.undo()
        quality.record_answer(answered("ahead", subject, at=ahead))
        quality.flush()
        _, steady = quality._clocks
        for at, wall in ((module.FIRST_SWEEP, ahead), (2.0 * module.HOUR, now if mended else ahead)):
            assert quality.totals(subject, "accuracy", "evaluation").count == 1
            with quality._lock:
                quality._sweep_hourly(wall + at, steady + at)
        assert quality.totals(subject, "accuracy", "evaluation").count == mended, "one that stays so is believed"
        quality.close()


def test_servers_that_run_for_less_than_an_hour_each_forget_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, kept = time.time(), list[int]()
    for day in range(10):
        started = now + day * DAY
        monkeypatch.setattr(module.time, "time", lambda started=started: started)
        quality = Quality(tmp_path / "quality.db", retention=2 * DAY)
        quality.record_answer(answered(f"of {day}", MixKey.of(f"t{day}", [], "base"), at=started))
        quality.flush()
        _, steady = quality._clocks
        with quality._lock:
            quality._sweep_hourly(started + module.FIRST_SWEEP, steady + module.FIRST_SWEEP)
            quality._clocks = started, steady  # this test's own stand still
        kept.append(len(quality._ids))
        quality.close()
    assert kept[:3] == [1, 2, 3] and max(kept) <= 4, kept


def test_a_clock_that_jumps_ahead_and_back_takes_no_feedback_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + 400 * module.DAY)
    quality.record_answer(answered("ahead", subject, at=now + 400 * module.DAY))
    quality.record_feedback("t", "ahead", "", score=1.0, expected=None)
    monkeypatch.setattr(module.time, "time", lambda: now)
    quality.record_answer(answered("now", subject))
    for id in ("ahead", "now"):
        quality.record_feedback("t", id, "", score=0.0, expected=None)
    totals = quality.totals(subject, "accuracy", "feedback")
    assert (totals.count, totals.total) == (2, 0.0)
    quality.close()


def test_of_answers_that_wait_for_a_disk_the_oldest_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_PENDING", 3)
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_evaluation(subject, "loss", {"x": 0.5})

    def full(pending: Any) -> Any:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as broken:
        broken.setattr(quality, "_write", full)
        for n in range(5):
            quality.record_answer(answered(f"gen-{n}", subject))
        until(lambda: len(quality._pending) == 3)
    for n in range(5):
        if n < 2:
            with pytest.raises(UnknownName):
                quality.record_feedback("t", f"gen-{n}", "", score=1.0, expected=None)
        else:
            quality.record_feedback("t", f"gen-{n}", "", score=1.0, expected=None)
    quality.close()


def test_a_disk_that_stays_full_is_told_once_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.001)
    quality, flush, tried = Quality(tmp_path / "quality.db"), Quality.flush, []

    def full() -> None:
        tried.append(1)
        raise sqlite3.OperationalError("database or disk is full")

    for times in (1, 2):
        tried.clear()
        monkeypatch.setattr(quality, "flush", full)
        until(lambda: len(tried) > 3)
        assert caplog.text.count("quality records cannot be written") == times
        monkeypatch.setattr(quality, "flush", lambda: flush(quality))
        until(lambda: not quality._refused)
    quality.close()


def test_records_are_not_written_into_a_file_that_was_taken_away(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They would be gone with the process, after the caller has heard that they were taken."""
    file, away = tmp_path / "quality.db", tmp_path / "away.db"
    quality, subject = Quality(file), MixKey.of("t", [(A, 1.0)], "base")
    quality.record_answer(answered("one", subject))
    quality.flush()
    file.rename(away)
    for there in (False, True):  # gone, and another in its place, as a backup is put back too early
        if there:
            file.write_bytes(away.read_bytes())
        told = "quality.db was taken away or replaced while the server runs; start it again"
        with pytest.raises(StoreFailed, match=told):
            quality.record_feedback("t", "one", "", score=1.0, expected=None)
        with pytest.raises(StoreFailed, match=told):
            quality.set_leader("t", "accuracy by feedback", subject, "")
        with pytest.raises(StoreFailed, match=told):
            quality.record_evaluation(subject, "accuracy", {"1": 1.0})
    quality.record_answer(answered("two", subject))
    until(lambda: caplog.text.count("quality records cannot be written: quality.db was taken away") == 1)
    away.replace(file)  # it is the one that was opened
    quality.record_feedback("t", "two", "", score=1.0, expected=None)
    quality.close()
    again = Quality(file)
    assert again.totals(subject, "accuracy", "feedback").count == 1 and again.performance("t")[0]["requests"] == 2
    again.close()


def test_a_full_disk_is_told_and_loses_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quality = Quality(tmp_path / "quality.db")
    first, second = MixKey.of("t", [], "base"), MixKey.of("t", [(A, 1.0)], "base")
    quality.record_answer(answered("one", first))
    quality.flush()
    with quality._lock:
        (pages,) = quality._db.execute("PRAGMA page_count").fetchone()
        quality._db.execute(f"PRAGMA max_page_count = {pages}")
    for n in range(500):
        quality.record_answer(answered(f"more-{n}", second))
    with pytest.raises(StoreFailed, match="cannot be written: .* full"):
        quality.record_feedback("t", "one", "", score=1.0, expected=None)
    assert [(told["version"], told["requests"]) for told in quality.performance("t")] == [("base", 1)]
    with pytest.raises(StoreFailed, match="full"):
        quality.set_leader("t", "accuracy by feedback", second, "x" * 100_000)
    third = MixKey.of("t", [(B, 1.0)], "base")
    with pytest.raises(StoreFailed, match="full"):
        quality.record_evaluation(third, "accuracy", {f"{i}": 1.0 for i in range(2000)})
    assert quality.totals(third, "accuracy", "evaluation").count == 0
    until(lambda: "cannot be written" in caplog.text)
    with quality._lock:
        quality._db.execute("PRAGMA max_page_count = 1000000")
    for id in ("one", "more-0", "more-499"):
        quality.record_feedback("t", id, "", score=1.0, expected=None)
    assert {told["version"]: told["requests"] for told in quality.performance("t")} == {"base": 1, second.label: 500}
    quality.close()
    again = Quality(tmp_path / "quality.db")
    assert again.totals(second, "accuracy", "feedback").count == 2
    assert again.totals(third, "accuracy", "evaluation").count == 0
    again.evaluated(third, "accuracy", {"x": 1.0})
    assert again.totals(third, "accuracy", "evaluation").count == 1
    again._db.execute("PRAGMA query_only = 1")
    again.answered(answered("late", second))
    again.close()  # the server has others to close after this
    assert "the quality records of the last 1 answers are lost" in caplog.text


def test_expected_is_compared_as_accuracy_does(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject, " Positive"))
    quality.record_feedback("t", "one", "", score=None, expected="positive\n")
    assert quality.totals(subject, "accuracy", "feedback").mean == 1.0
    quality.close()


def test_an_answer_of_no_words_may_be_what_was_expected(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    for id, text in (("none", " "), ("some", "yes")):
        quality.record_answer(answered(id, subject, text))
        quality.record_feedback("t", id, "", score=None, expected="")
    assert quality.totals(subject, "accuracy", "feedback") == Totals(2, 1.0, 1.0)
    quality.close()


KILLED = """
import sys
from pathlib import Path
from server.tasks.examples import digest
from server.tasks.quality import DAY, Quality
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.quality_file import in_memory

quality, subject = Quality(Path(sys.argv[1])), MixKey.of("t", [], "base")
for n in range(10**6):
    quality.record_answer(AnswerRecord(f"gen-{n}", subject, "", "yes"))
    quality.record_feedback("t", f"gen-{n}", "", score=1.0, expected=None)
    print(n, flush=True)
"""


def test_kill_minus_nine_while_scores_are_written(tmp_path: Path) -> None:
    """Every score that was confirmed is there, once, and the sums agree with the rows."""
    file, confirmed = tmp_path / "quality.db", -1
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[3], text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            confirmed = int(line)
            if confirmed >= 100:
                break
        process.kill()
        confirmed = max([confirmed, *map(int, process.stdout.read().split())])
    assert process.returncode == -signal.SIGKILL and confirmed >= 100
    quality, subject = Quality(file), MixKey.of("t", [], "base")
    totals = quality.totals(subject, "accuracy", "feedback")
    with sqlite3.connect(file) as db:
        rows = {id for (id,) in db.execute("SELECT id FROM scores")}
    db.close()
    assert rows >= {module.digest(f"gen-{n}") for n in range(confirmed + 1)} and totals.count == len(rows)
    quality.record_feedback("t", f"gen-{confirmed}", "", score=0.0, expected=None)
    assert quality.totals(subject, "accuracy", "feedback").total == len(rows) - 1
    quality.close()


def test_performance_of_600_000_records_reads_their_sums_alone_and_they_are_small(tmp_path: Path) -> None:
    """600,000 answers of one day, each with its score, of six versions, beside ninety days of hourly sums; written by
    the tables' own shape, then read through the class. It takes less than twice what SQLite takes to read the sums; the
    answers would take five times that. Processor time, the least of three each, in turn: a neighbour's load is not
    ours, nor is what a host takes away meanwhile."""
    file = tmp_path / "quality.db"
    quality = Quality(file)
    subjects = [MixKey.of("t", [(Version("a", f"{i:x}" * 64), 1.0)], "base") for i in range(6)]
    for subject in subjects:
        quality.record_evaluation(subject, "accuracy", {"x": 1.0})
    quality.close()
    db, now, count = sqlite3.connect(file), time.time(), 600_000
    keys = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT ?) SELECT randomblob(16), i % 6 + 1"
    db.execute(f"INSERT INTO scores {keys}, 'accuracy', 1.0, ? FROM n", (count, now))
    db.execute("INSERT INTO answers SELECT id, subject, 'team', at, id FROM scores")
    latencies = LatencyHistogram()
    for _ in range(100):
        latencies.add(0.3)
    blob = latencies.dump()
    hours = [(s, int(now) // 3600 - h) for s in range(1, 7) for h in range(2160)]
    db.executemany("INSERT INTO hours VALUES (?, 'accuracy', 'feedback', ?, 46, 40, 40)", hours)
    db.executemany("INSERT INTO traffic VALUES (?, ?, 46, 1, 9, 9, ?, ?, ?)", ((*h, blob, blob, blob) for h in hours))
    db.commit()
    db.close()
    took, reading = [], []
    for _ in range(3):  # each from the file
        db = sqlite3.connect(file)
        start = time.thread_time()
        assert len(db.execute("SELECT * FROM traffic").fetchall()) == len(hours)
        reading.append(time.thread_time() - start)
        db.close()
        quality = Quality(file)
        start = time.thread_time()
        told = quality.performance("t")
        took.append(time.thread_time() - start)
        quality.close()
    assert len(told) == 6 and sum(v["requests"] for v in told) == 6 * 2160 * 46
    assert told[0]["e2e"]["p99"] == pytest.approx(0.3, rel=0.06)
    assert {q["source"]: q["samples"] for q in told[0]["quality"]} == {"evaluation": 1, "feedback": 2160 * 46}
    assert min(took) < 2 * min(reading), (took, reading)
    assert file.stat().st_size < 150e6, file.stat().st_size


def test_percentiles_are_within_five_percent() -> None:
    latencies = LatencyHistogram()
    rng = np.random.default_rng(1)
    seconds = rng.lognormal(-2, 1, 20_000)
    for value in seconds:
        latencies.add(float(value))
    for told, share in zip(latencies.percentiles(), (50, 95, 99), strict=True):
        assert told == pytest.approx(np.percentile(seconds, share), rel=0.06)
    latencies.add(math.nan)
    latencies.add(1e9)
    latencies.add(0.0)
    assert int(latencies.counts.sum()) == 20_002
    assert LatencyHistogram().percentiles() == [None, None, None]
    single = LatencyHistogram()
    single.add(0.3)
    assert single.percentiles() == pytest.approx([0.3] * 3, rel=0.06)


def test_metrics_and_sources_are_no_more_samples(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    for metric, count in (("accuracy", 3), ("chrf", 5)):
        quality.record_evaluation(subject, metric, {str(i): 1.0 for i in range(count)})
    assert [told["samples"] for told in quality.performance("t")] == [5]
    quality.close()


def test_damage_anywhere_is_set_aside_and_is_no_fault_of_ours_meanwhile(tmp_path: Path, caplog: Any) -> None:
    file, subject = tmp_path / "quality.db", MixKey.of("t", [], "base")
    quality = Quality(file)
    for i in range(3000):
        quality.record_answer(answered(f"answer {i}", subject))
    quality.close()
    content = bytearray(file.read_bytes())
    (where,) = [at for at in range(0, len(content), 4096) if content[at : at + 4096].find(digest("answer 1500")) >= 0]
    content[where : where + 4096] = b"x" * 4096
    file.write_bytes(content)
    with caplog.at_level("ERROR"):
        quality = Quality(file)
    assert "set aside as quality.broken.db" in caplog.text and quality.performance("t") == []
    quality.close()


def test_damage_while_it_is_used_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")

    def damaged() -> None:
        raise sqlite3.DatabaseError("database disk image is malformed")

    monkeypatch.setattr(quality, "_flush", damaged)
    quality.record_answer(answered("one", subject))
    with pytest.raises(StoreFailed, match="malformed.*next start"):
        quality.record_feedback("t", "one", "", score=1.0, expected=None)
    assert quality.performance("t") == []
    monkeypatch.undo()
    quality.close()


class Refusing:
    """A connection that a disk without room gives to nothing."""

    def execute(self, *_: Any) -> Any:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR
        raise error

    def close(self) -> None: ...


@pytest.mark.parametrize(("left", "full"), [(4096, True), (1 << 30, False)])
def test_a_disk_with_a_few_bytes_left_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int, full: bool
) -> None:
    """That of the file, whatever another one has."""
    file, connect = tmp_path / "quality.db", sqlite3.connect
    Quality(file).close()

    monkeypatch.setattr(sqlite3, "connect", lambda at, **how: Refusing() if at == file else connect(at, **how))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda at: SimpleNamespace(free=left if Path(at) == tmp_path else (1 << 30) + 4096 - left)
    )
    if full:
        Quality(file).close()
    else:
        with pytest.raises(StoreFailed, match="disk I/O error"):
            Quality(file)


def test_a_full_disk_at_the_start_is_read_and_served_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    file, subject = tmp_path / "quality.db", MixKey.of("t", [], "base")
    quality = Quality(file)
    quality.record_evaluation(subject, "accuracy", {"a": 1.0, "b": 0.0})
    quality.set_leader("t", "accuracy by evaluation", subject, "better")
    quality.close()
    before, connect = file.read_bytes(), sqlite3.connect

    def full(where: Any, **how: Any) -> Any:
        return Refusing() if where == file else connect(where, **how)

    monkeypatch.setattr(sqlite3, "connect", full)
    with pytest.raises(StoreFailed, match="disk I/O error"):
        Quality(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    quality = Quality(file)
    assert "the disk is full" in caplog.text and quality.leader("t", "accuracy by evaluation") is not None
    quality.record_evaluation(subject, "accuracy", {"c": 1.0})
    assert quality.totals(subject, "accuracy", "evaluation").count == 3 and file.read_bytes() == before
    quality.close()


@pytest.mark.parametrize("whole", [True, False])
def test_what_a_kill_left_unwritten_is_known_on_a_full_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, whole: bool
) -> None:
    """The last records are in a file beside the other; and where that is damaged, the server starts all the same."""
    live, subject = Quality(tmp_path / "live.db"), MixKey.of("t", [], "base")
    live.evaluated(subject, "accuracy", {"a": 1.0, "b": 0.0})
    for end in ("", "-wal"):
        shutil.copy(tmp_path / f"live.db{end}", tmp_path / f"killed.db{end}")
    live.close()
    file = tmp_path / "killed.db"
    if not whole:
        file.write_bytes(b"x" * 8192)
        (tmp_path / "killed.db-wal").unlink()
    opened = object.__new__(Quality)
    db = in_memory(file, opened._load)
    assert opened.totals(subject, "accuracy", "evaluation").count == (2 if whole else 0)
    assert ("nothing is known" in caplog.text) is not whole and not (tmp_path / "killed.db-shm").exists()
    db.close()


def test_the_first_sweep_is_soon_after_the_start(tmp_path: Path) -> None:
    """A server that is never up for an hour forgets too."""
    quality, subject = Quality(tmp_path / "quality.db", retention=DAY), MixKey.of("t", [], "base")
    quality.record_answer(answered("one", subject))
    quality.flush()
    with quality._lock:
        quality._clocks, quality._patience = (0.0, 0.0), module.FIRST_SWEEP
        quality._sweep_hourly(module.FIRST_SWEEP - 1, module.FIRST_SWEEP - 1)
        assert quality._clocks == (0.0, 0.0)
        quality._sweep_hourly(module.FIRST_SWEEP, module.FIRST_SWEEP)
        assert quality._clocks == (module.FIRST_SWEEP, module.FIRST_SWEEP)
        quality._sweep_hourly(2 * module.FIRST_SWEEP, 2 * module.FIRST_SWEEP)
        assert quality._clocks[0] == module.FIRST_SWEEP, "then once an hour"
    quality.close()


def test_old_records_go_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Quality(tmp_path / "quality.db")
    first.answered(answered("one", MixKey.of("t", [], "base"), at=time.time() - 3 * DAY))
    first.answered(answered("two", MixKey.of("t", [(A, 1.0)], "base")))
    first.close()
    monkeypatch.setattr(module, "FIRST_SWEEP", 0.0)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.001)
    quality = Quality(tmp_path / "quality.db", retention=DAY)
    until(lambda: len(quality.performance("t")) == 1)
    quality.close()


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        (b"generated_tokens INTEGER", b"gendrated_tokens INTEGER"),
        (b'[["a@aa', b'[["\xff@aa'),
        (b'[["a@aa', b'{["a@aa'),
        (b'", 1.0]]', b'", "1"]]'),
        (b"quick", b""),
    ],
)
def test_tables_that_are_not_as_they_were_made_are_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, was: bytes, becomes: bytes
) -> None:
    file = tmp_path / "quality.db"
    first = Quality(file)
    first.evaluated(MixKey.of("t", [(A, 1.0)], "base"), "accuracy", {"x": 1.0})
    first.close()
    if was in (whole := file.read_bytes()):
        file.write_bytes(whole.replace(was, becomes))
    else:
        connect = sqlite3.connect

        class Odd(sqlite3.Connection):
            def execute(self, *asked: Any) -> Any:
                if "quick_check" in asked[0] and not (tmp_path / "quality.broken.db").exists():
                    raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
                return super().execute(*asked)

        monkeypatch.setattr(sqlite3, "connect", lambda where, **how: connect(where, factory=Odd, **how))
    Quality(file).close()
    assert "set aside as quality.broken.db" in caplog.text and (tmp_path / "quality.broken.db").exists()


def test_latencies_are_in_the_columns_of_their_names(tmp_path: Path) -> None:
    quality = Quality(tmp_path / "quality.db")
    quality.record_answer(answered("one", MixKey.of("t", [], "base")))
    quality.flush()
    found = []
    for blob in quality._db.execute("SELECT ttft, tpot, e2e FROM traffic").fetchone():
        latencies = LatencyHistogram()
        latencies.join([blob])
        found.append(latencies.percentiles()[0])
    assert found == [pytest.approx(0.1, rel=0.06), None, pytest.approx(0.5, rel=0.06)]
    quality.close()


def test_of_scores_that_moved_to_another_hour_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality, now = Quality(tmp_path / "quality.db"), time.time()
    subject, values = MixKey.of("t", [(A, 1.0)], "base"), {"1": 0.1, "2": 0.7, "3": 0.3}
    for hours in range(3):
        monkeypatch.setattr(module.time, "time", lambda hours=hours: now + hours * module.HOUR)
        quality.record_evaluation(subject, "accuracy", values)
        assert count(quality, "hours") == 1
    quality.close()


def test_an_evaluation_of_nothing_has_no_mean(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    quality.record_evaluation(subject, "accuracy", {})
    assert quality.means(["t"]) == [] and [told["quality"] for told in quality.performance("t")] == [[]]
    quality.close()


def test_pairs_follow_either_side(tmp_path: Path) -> None:
    quality = Quality(tmp_path / "quality.db")
    a, b = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    for subject in (a, b):
        quality.record_evaluation(subject, "accuracy", {"1": 1.0, "2": 1.0})
    assert quality.paired(a, b, "accuracy") == Totals(2, 1.0, 0.5)
    quality.record_evaluation(b, "accuracy", {"2": 0.0})
    assert quality.paired(a, b, "accuracy") == Totals(2, 1.5, 1.25)
    quality.close()


def test_pairs_have_two_sides(tmp_path: Path) -> None:
    quality = Quality(tmp_path / "quality.db")
    a, b = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    quality.record_evaluation(a, "accuracy", {"1": 1.0, "2": 1.0})
    quality.record_evaluation(b, "accuracy", {"1": 1.0, "2": 0.0})
    for _ in range(2):
        assert quality.paired(a, b, "accuracy") == Totals(2, 1.5, 1.25)
        assert quality.paired(b, a, "accuracy") == Totals(2, 0.5, 0.25)
    sums = [quality.totals(subject, "accuracy", "evaluation") for subject in (a, b)]
    assert sums == [Totals(2, 2.0, 2.0), Totals(2, 1.0, 1.0)], "each has scores of its own"
    quality.close()


def test_pairs_are_of_what_was_asked_with_the_same(tmp_path: Path) -> None:
    """Another prompt is another question, and the last answer to an example is the one that counts."""
    quality = Quality(tmp_path / "quality.db")
    a, b = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    for subject in (a, b):
        quality.record_evaluation(subject, "accuracy", {"1": 1.0, "2": 1.0}, "old prompt")
    assert quality.paired(a, b, "accuracy").count == 2
    quality.record_evaluation(b, "accuracy", {"1": 0.0, "3": 0.0}, "new prompt")
    assert quality.paired(a, b, "accuracy") == Totals(1, 0.5, 0.25), "the second, of which nothing is known anew"
    quality.record_evaluation(a, "accuracy", {"1": 1.0, "2": 1.0, "3": 1.0}, "new prompt")
    assert quality.paired(a, b, "accuracy") == Totals(2, 2.0, 2.0)
    assert quality.totals(a, "accuracy", "evaluation") == Totals(3, 3.0, 3.0), "each example counts once"
    quality.close()


def test_pairs_of_before_prompts_were_kept_apart_say_nothing_of_new_ones(tmp_path: Path) -> None:
    file = tmp_path / "quality.db"
    quality = Quality(file)
    a, b = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    for subject in (a, b):
        quality.record_evaluation(subject, "accuracy", {"1": 1.0, "2": 1.0})
    quality.close()
    with closing(sqlite3.connect(file)) as db, db:
        db.execute("UPDATE examples SET example = substr(example, 1, 16)")
    quality = Quality(file)
    assert quality.paired(a, b, "accuracy").count == 2
    quality.record_evaluation(b, "accuracy", {"1": 0.0}, "prompt")
    assert quality.paired(a, b, "accuracy").count == 1
    quality.record_evaluation(a, "accuracy", {"1": 1.0}, "prompt")
    assert quality.paired(a, b, "accuracy") == Totals(2, 1.5, 1.25)
    quality.close()


def test_an_answer_that_is_scored_again_stays_in_its_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = Quality(tmp_path / "quality.db")
    subject, now = MixKey.of("t", [(A, 1.0)], "base"), time.time()
    quality.record_answer(AnswerRecord("one", subject, "", "yes"))
    quality.record_feedback("t", "one", "", score=1.0, expected=None)
    (hour,) = quality.hours(subject, "accuracy", "feedback")
    monkeypatch.setattr("server.tasks.quality.time.time", lambda: now + 2 * 3600)
    quality.record_feedback("t", "one", "", score=0.0, expected=None)
    found = {at: totals for at, totals in quality.hours(subject, "accuracy", "feedback").items() if totals.count}
    assert found == {hour: Totals(1, 0.0, 0.0)}
    quality.close()


def test_pairs_are_of_one_metric(tmp_path: Path) -> None:
    quality = Quality(tmp_path / "quality.db")
    a, b = (MixKey.of("t", [(version, 1.0)], "base") for version in (A, B))
    quality.record_evaluation(a, "accuracy", {"1": 1.0})
    quality.record_evaluation(b, "exact_match", {"1": 0.0})
    assert quality.paired(a, b, "accuracy").count == 0
    quality.record_evaluation(b, "accuracy", {"1": 1.0})
    assert quality.paired(a, b, "accuracy") == Totals(1, 0.5, 0.25)
    quality.close()


def test_an_example_that_is_evaluated_again_moves_to_that_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quality = Quality(tmp_path / "quality.db")
    subject, now = MixKey.of("t", [(A, 1.0)], "base"), time.time()
    quality.record_evaluation(subject, "accuracy", {"1": 1.0})
    monkeypatch.setattr("server.tasks.quality.time.time", lambda: now + 2 * 3600)
    quality.record_evaluation(subject, "accuracy", {"1": 0.0})
    found = {at: totals for at, totals in quality.hours(subject, "accuracy", "evaluation").items() if totals.count}
    assert found == {int(now + 7200) // 3600: Totals(1, 0.0, 0.0)}
    quality.close()


def test_traffic_goes_on_to_count_after_it_was_asked_for(tmp_path: Path) -> None:
    quality = Quality(tmp_path / "quality.db")
    subject = MixKey.of("t", [(A, 1.0)], "base")
    for count in (1, 2, 3):
        quality.record_answer(AnswerRecord(f"{count}", subject, "", "yes", prompt_tokens=5))
        (told,) = quality.performance("t")
        assert told["requests"] == count and told["tokens"]["prompt"] == 5 * count
    quality.close()


def whole(latencies: LatencyHistogram) -> bytes:
    """As they were dumped before 2026-12-02."""
    return latencies.counts.astype("<u4").tobytes()


def test_latencies_are_dumped_as_those_that_there_are() -> None:
    rng, dumps, sums = np.random.default_rng(2), list[bytes](), np.zeros(BUCKETS, np.uint32)
    for filled in (0, 1, 3, 146, 147, 148, BUCKETS):
        latencies = LatencyHistogram()
        latencies.counts[rng.permutation(BUCKETS)[:filled]] = rng.integers(1, 1 << 20, filled)
        assert len(latencies.dump()) == min(5 * filled, 4 * BUCKETS)
        dumps += [latencies.dump(), whole(latencies)]
        sums += 2 * latencies.counts
    for order in (dumps, dumps[::-1], rng.permutation(np.array(dumps, object)).tolist()):
        again = LatencyHistogram()
        again.join(order)
        again.join([])
        assert again.counts.tolist() == sums.tolist()


@pytest.mark.parametrize("damaged", [b"xxxx", b"\xff\1\0\0\0", b"x" * 735 + b"x" * 2])
def test_what_is_no_dump_is_refused(damaged: bytes) -> None:
    with pytest.raises(ValueError):
        LatencyHistogram().join([damaged])


def test_records_of_before_are_read_and_go_on(tmp_path: Path) -> None:
    """Their rows of traffic have all counters, those that are nothing too."""
    file, subject, now = tmp_path / "quality.db", MixKey.of("t", [(A, 1.0)], "base"), time.time()
    first = Quality(file)
    for hours in (0, 1):
        first.answered(answered(f"{hours}", subject, at=now - hours * module.HOUR))
    [told] = first.performance("t")
    first.close()
    with sqlite3.connect(file) as db:
        for number, hour, *dumped in db.execute("SELECT subject, hour, ttft, tpot, e2e FROM traffic").fetchall():
            blobs = []
            for each in dumped:
                latencies = LatencyHistogram()
                latencies.join([each])
                blobs.append(whole(latencies))
            db.execute("UPDATE traffic SET ttft = ?, tpot = ?, e2e = ? WHERE subject = ? AND hour = ?",
                       (*blobs, number, hour))  # fmt: skip
    db.close()
    again = Quality(file)
    assert again.performance("t") == [told]
    again.answered(answered("more", subject, at=now))
    again.close()
    reopened = Quality(file)
    (more,) = reopened.performance("t")
    assert more["requests"] == told["requests"] + 1 and more["e2e"] == told["e2e"]
    reopened.close()


def test_an_hour_of_a_version_takes_few_bytes(tmp_path: Path) -> None:
    """A thousand versions with a request an hour have two million such rows in ninety days."""
    file, now = tmp_path / "quality.db", time.time()
    subjects = [MixKey.of("t", [(A, n / 8)], "base") for n in range(1, 5)]
    quality = Quality(file)
    empty = file.stat().st_size
    for subject in subjects:
        for hours in range(500):
            quality.record_answer(answered(f"{subject.mix} {hours}", subject, at=now - hours * module.HOUR))
    quality.flush()
    quality._db.execute("DELETE FROM answers")
    quality.close()
    with sqlite3.connect(file) as db:
        db.execute("VACUUM")
        assert db.execute("SELECT count(*) FROM traffic").fetchone() == (2000,)
    db.close()
    assert (file.stat().st_size - empty) / 2000 < 60


def test_a_sweep_goes_through_no_traffic(tmp_path: Path) -> None:
    """Old rows are found by their keys, and what is left is not read again: feedback waits meanwhile."""
    quality, now = Quality(tmp_path / "quality.db", retention=2 * DAY), time.time()
    subjects = [MixKey.of("t", [(A, n / 8)], "base") for n in range(1, 6)]
    for n, subject in enumerate(subjects):
        for hours in range(24 * n, 24 * n + 48):
            quality.record_answer(answered(f"{n} {hours}", subject, at=now - hours * module.HOUR))
    assert [told["requests"] for told in quality.performance("t")] == [48] * 5
    statements = list[str]()
    quality._db.set_trace_callback(statements.append)
    with quality._lock:
        quality._sweep(now)
    quality._db.set_trace_callback(None)
    asked = [statement for statement in statements if "traffic" in statement]
    assert asked and not [each for each in asked if each.startswith("SELECT") and "EXISTS" not in each]
    plans = {step for each in asked for *_, step in quality._db.execute(f"EXPLAIN QUERY PLAN {each}")}
    assert any("SEARCH traffic" in step for step in plans) and not [step for step in plans if "SCAN traffic" in step]
    left = {told["version"]: told["requests"] for told in quality.performance("t")}
    assert left == {subjects[0].label: 48, subjects[1].label: 25, subjects[2].label: 1}
    quality.close()


def test_what_a_sweep_leaves_is_what_the_next_start_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, now, dice = tmp_path / "quality.db", time.time(), np.random.default_rng(3)
    quality = Quality(file, retention=2 * DAY)
    subjects = [MixKey.of(task, [(A, n / 8)], "base") for task in ("t", "u") for n in range(1, 6)]
    for hours in range(0, 120, 7):
        monkeypatch.setattr(module.time, "time", lambda hours=hours: now + hours * module.HOUR)
        for n, subject in enumerate(subjects):
            if dice.random() < 0.3 and hours < 20 * n:
                quality.record_answer(answered(f"{n} {hours}", subject, routed=bool(n % 3)))
            if dice.random() < 0.3 and hours < 20 * n:
                quality.record_evaluation(subject, "accuracy", {f"{dice.integers(4)}": dice.random()})
        quality.flush()
        for task in ("t", "u"):
            quality.performance(task)
        with quality._lock:
            quality._sweep(now + hours * module.HOUR)
        again = Quality(file, retention=2 * DAY)
        for task in ("t", "u"):
            assert again.performance(task) == quality.performance(task)
            assert sorted(map(str, again.means([task]))) == sorted(map(str, quality.means([task])))
        assert (again._ids, again._of_task, again._made_up) == (quality._ids, quality._of_task, quality._made_up)
        for subject in subjects:
            for one in (quality, again):
                assert all(one.paired(subject, other, "accuracy").count >= 0 for other in subjects)
            hours_of = [
                {hour: totals for hour, totals in one.hours(subject, "accuracy", "evaluation").items() if totals.count}
                for one in (quality, again)
            ]
            assert hours_of[0] == hours_of[1]
        assert again._paired == quality._paired and again._latest.keys() == quality._latest.keys()
        again.close()
    assert len(quality._ids) < len(subjects)
    quality.close()
