"""Quality records on SQLite and PostgreSQL: what is stored, for how long, and what survives errors and restarts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import StoreFailed
from adapters.weights import Version
from server.database import Database
from server.database.tables import answers, example_scores, metadata, mixes, score_hours, traffic_hours
from server.errors import UnknownName
from server.tasks import quality as module
from server.tasks.intervals import Totals
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.quality import EVALUATION, FEEDBACK, Quality
from server.tasks.quality_store import DAY, HOUR
from tests.waiting import until

A = MixKey.of("t", [(Version("a", "a" * 64), 1.0)], "base")
B = MixKey.of("t", [(Version("b", "b" * 64), 1.0)], "base")
START = 500_000 * HOUR


class Clock:
    """Replaces `time.time` in the module under test."""

    now: float = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("server.tasks.quality.time.time", clock)
    return clock


@pytest.fixture
def reopen(database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Quality]]:
    """Opens the records, and closes those that were open before. Their background thread writes nothing."""
    monkeypatch.setattr(module, "FLUSH_SECONDS", 1e6)
    opened: list[Quality] = []

    def open_(**options: Any) -> Quality:
        while opened:
            opened.pop().close()
        opened.append(Quality(database, **options))
        return opened[0]

    yield open_
    while opened:
        opened.pop().close()


@pytest.fixture
def quality(reopen: Callable[..., Quality]) -> Quality:
    return reopen()


def answer(id: str, key: MixKey = A, text: str = "yes", tenant: str = "", **more: Any) -> AnswerRecord:
    return AnswerRecord(
        id,
        key,
        tenant,
        text,
        **{"ttft": 0.1, "e2e": 0.5, "prompt_tokens": 3, "generated_tokens": 2, "at": START} | more,
    )


def score(quality: Quality, id: str, value: float, task: str = "t", tenant: str = "") -> None:
    quality.record_feedback(task, id, tenant, score=value, expected=None)


def count(database: Database, table: sa.Table) -> int:
    with database.read() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def test_records_survive_a_restart_and_contain_no_text(database: Database, reopen: Callable[..., Quality]) -> None:
    quality = reopen()
    quality.record_answer(answer("gen-1", text="a secret answer"))
    quality.record_feedback("t", "gen-1", "", score=None, expected=" A secret answer\n")
    quality.record_answer(answer("gen-2"))
    again = reopen()
    assert again.totals(A, "accuracy", FEEDBACK) == Totals(1, 1.0, 1.0)
    [version] = again.performance("t")
    assert version["version"] == A.label and version["base"] == "base" and version["requests"] == 2
    assert version["tokens"] == {"prompt": 6, "generated": 4} and version["errors"] == 0
    assert version["ttft"]["p50"] == pytest.approx(0.1, rel=0.05) and version["tpot"]["p50"] is None
    with database.read() as connection:
        for table in metadata.sorted_tables:
            assert "secret" not in str(connection.execute(sa.select(table)).all())


def test_memory_and_database_agree_after_random_changes(clock: Clock, reopen: Callable[..., Quality]) -> None:
    dice, quality = random.Random(1), reopen(retention=3 * DAY)
    written: list[str] = []
    for step in range(150):
        clock.now += dice.choice((60, HOUR, 3 * HOUR))
        key = dice.choice((A, B))
        if (kind := dice.random()) < 0.5:
            written.append(f"gen-{step}")
            quality.record_answer(answer(written[-1], key, at=clock.now, failed=False))
        elif kind < 0.8 and written:
            try:
                score(quality, dice.choice(written[-5:]), dice.random())
            except UnknownName:
                continue
        elif kind < 0.95:
            values = {str(dice.randrange(8)): dice.random() for _ in range(4)}
            quality.record_evaluation(key, dice.choice(("chrf", "bleu")), values, dice.choice("xy"))
        else:
            quality.cleanup(clock.now)
    quality.flush()

    def state(of: Quality) -> Any:
        scores = [
            (key, metric, source, of.hours(key, metric, source), of.totals(key, metric, source))
            for key in (A, B)
            for metric, source in (("accuracy", FEEDBACK), ("chrf", EVALUATION), ("bleu", EVALUATION))
        ]
        return of.performance("t"), of.means("t"), scores, of.paired(A, B, "chrf")

    before = state(quality)
    after = state(reopen(retention=3 * DAY))
    assert after == before and any(hours for *_, hours, _ in before[2])


@pytest.mark.parametrize(
    ("id", "task", "tenant", "later", "found"),
    [
        ("gen-1", "t", "team", DAY - 1, True),
        ("gen-1", "t", "team", DAY, False),
        ("gen-1", "t", "other team", 0, False),
        ("gen-1", "u", "team", 0, False),
        ("gen-2", "t", "team", 0, False),
        ("failed", "t", "team", 0, False),
    ],
)
def test_feedback_is_for_answers_of_one_day_task_and_tenant(
    quality: Quality, clock: Clock, id: str, task: str, tenant: str, later: float, found: bool
) -> None:
    quality.record_answer(answer("gen-1", tenant="team"))
    quality.record_answer(answer("failed", tenant="team", failed=True))
    clock.now += later
    if found:
        score(quality, id, 1.0, task, tenant)
    else:
        with pytest.raises(UnknownName, match=f"no answer '{id}' of this task in the last 24 hours") as error:
            score(quality, id, 1.0, task, tenant)
        assert error.value.param == "id"
    assert quality.totals(A, "accuracy", FEEDBACK).count == found


@pytest.mark.parametrize(
    ("text", "expected", "value"), [(" Yes\n", "yes", 1.0), ("yes", "no", 0.0), ("", "", 1.0), ("é", "É ", 1.0)]
)
def test_expected_answers_are_compared_as_accuracy_does(
    quality: Quality, text: str, expected: str, value: float
) -> None:
    quality.record_answer(answer("gen-1", text=text))
    quality.record_feedback("t", "gen-1", "", score=None, expected=expected)
    assert quality.totals(A, "accuracy", FEEDBACK).total == value


def test_a_second_score_replaces_the_first_in_the_hour_of_the_answer(quality: Quality, clock: Clock) -> None:
    quality.record_answer(answer("gen-1"))
    for value in (1.0, 0.25):
        clock.now += 2 * HOUR
        score(quality, "gen-1", value)
    assert quality.hours(A, "accuracy", FEEDBACK) == {500_000: Totals(1, 0.25, 0.0625)}


def test_an_example_evaluated_again_counts_once_in_the_later_hour(
    database: Database, quality: Quality, clock: Clock
) -> None:
    quality.record_evaluation(A, "chrf", {"x": 1.0, "y": 0.5})
    clock.now += HOUR
    quality.record_evaluation(A, "chrf", {"x": 0.25})
    assert quality.hours(A, "chrf", EVALUATION) == {500_000: Totals(1, 0.5, 0.25), 500_001: Totals(1, 0.25, 0.0625)}
    quality.record_evaluation(A, "chrf", {"y": 0.25})
    assert list(quality.hours(A, "chrf", EVALUATION)) == [500_001] and count(database, score_hours) == 1


def test_metrics_and_sources_are_kept_apart(quality: Quality) -> None:
    quality.record_answer(answer("gen-1"))
    score(quality, "gen-1", 1.0)
    quality.record_evaluation(A, "accuracy", {"x": 0.0, "y": 0.0, "z": 0.0})
    quality.record_evaluation(A, "chrf", {"x": 0.5})
    [version] = quality.performance("t")
    found = [(q["metric"], q["source"], q["samples"], q["mean"]) for q in version["quality"]]
    assert found == [("accuracy", EVALUATION, 3, 0.0), ("accuracy", FEEDBACK, 1, 1.0), ("chrf", EVALUATION, 1, 0.5)]
    assert version["samples"] == 3 and all(0 <= q["low"] <= q["mean"] <= q["high"] <= 1 for q in version["quality"])
    assert quality.means(["t", "unknown"], lambda key: key == B) == []


def test_pairs_are_of_the_same_examples_metric_and_context(quality: Quality) -> None:
    assert quality.paired(A, B, "chrf") == Totals()
    quality.record_evaluation(A, "chrf", {"x": 1.0, "y": 0.5, "mine": 1.0}, "one")
    assert quality.paired(A, B, "chrf") == Totals()
    quality.record_evaluation(B, "chrf", {"x": 0.0, "y": 0.5, "theirs": 1.0}, "one")
    quality.record_evaluation(B, "bleu", {"mine": 0.0}, "one")
    assert quality.paired(A, B, "chrf") == Totals(2, 1.5, 1.25)
    assert quality.paired(B, A, "chrf") == Totals(2, 0.5, 0.25)
    assert quality.paired(A, B, "bleu") == Totals()
    quality.record_evaluation(B, "chrf", {"x": 0.0}, "two")
    assert quality.paired(A, B, "chrf") == Totals(1, 0.5, 0.25), "another context"
    quality.record_evaluation(A, "chrf", {"x": 0.5}, "two")
    assert quality.paired(A, B, "chrf") == Totals(2, 1.25, 0.8125)


def test_leaders_are_stored_by_task_and_rule(reopen: Callable[..., Quality]) -> None:
    quality = reopen()
    quality.set_leader("t", "rule", A, "because")
    quality.set_leader("t", "rule", B, "better")
    quality.set_leader("u", "rule", A, "because")
    quality.clear_leader("u")
    quality.clear_leader("unknown")
    for each in (quality, reopen()):
        assert each.leader("t", "rule") == (B, "better")
        assert each.leader("t", "other rule") is None is each.leader("u", "rule")


@pytest.mark.parametrize(("retention", "days"), [(10 * DAY, 10), (1.0, 1)])
def test_cleanup_deletes_what_is_older_than_the_retention_and_at_least_a_day(
    database: Database, reopen: Callable[..., Quality], clock: Clock, retention: float, days: int
) -> None:
    quality = reopen(retention=retention)
    quality.record_answer(answer("old", A))
    score(quality, "old", 1.0)
    quality.record_evaluation(A, "chrf", {"x": 1.0})
    clock.now += HOUR
    quality.record_answer(answer("new", B, at=clock.now))
    quality.cleanup(clock.now)
    quality.cleanup(START + days * DAY - 1)
    assert {v["version"] for v in quality.performance("t")} == {A.label, B.label}
    quality.cleanup(START + days * DAY + HOUR)
    assert count(database, answers) == (days == 1)
    for each in (quality, reopen(retention=retention)):
        assert [v["version"] for v in each.performance("t")] == [B.label]
        assert each.totals(A, "accuracy", FEEDBACK) == Totals() and each.paired(A, B, "chrf") == Totals()
    assert count(database, score_hours) == count(database, example_scores) == 0
    assert count(database, mixes) == count(database, traffic_hours) == 1


def test_the_hours_of_a_mix_in_use_are_deleted_one_by_one(quality: Quality, clock: Clock, database: Database) -> None:
    for hour in range(3):
        quality.record_answer(answer(f"gen-{hour}", at=START + hour * HOUR))
        clock.now = START + hour * HOUR
        quality.record_evaluation(A, "chrf", {str(hour): 1.0})
    assert quality.performance("t")[0]["requests"] == 3
    quality.cleanup(START + 90 * DAY + 2 * HOUR)
    assert quality.performance("t")[0]["requests"] == 1 == count(database, traffic_hours)
    assert quality.hours(A, "chrf", EVALUATION) == {500_002: Totals(1, 1.0, 1.0)}


def test_performance_lists_the_versions_used_last_and_mixes_of_clients_last_of_all(
    reopen: Callable[..., Quality], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LISTED", 3)
    keys = [MixKey.of("t", [(Version("a", f"{i}" * 64), 1.0)], "base") for i in range(5)]
    quality = reopen()
    for hour, key in enumerate(keys):
        quality.record_answer(answer(f"gen-{hour}", key, at=START + hour * HOUR, routed=hour < 4))
    quality.record_answer(answer("late", keys[0], at=START + 9 * HOUR))
    quality.record_answer(answer("noted late", keys[0], at=START - HOUR))
    for each in (quality, reopen()):
        assert [v["version"] for v in each.performance("t")] == [keys[i].label for i in (0, 2, 3)]
    for hour, key in enumerate(keys):
        each.record_evaluation(key, "chrf", {"x": hour / 4})
    order = [key for key, *_ in each.means(["t"])]
    assert order == [keys[i] for i in (0, 4, 3, 2, 1)]


def test_mixes_chosen_by_clients_are_limited_per_task(
    database: Database, reopen: Callable[..., Quality], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_CLIENT_MIXES", 2)
    keys = [MixKey.of(task, [(Version("a", "a" * 64), w)], "base") for task in "tu" for w in (0.1, 0.2, 0.3)]
    quality = reopen()
    for i, key in enumerate(keys):
        quality.record_answer(answer(f"gen-{i}", key, routed=False))
    quality.flush()
    assert [len(quality.performance(task)) for task in "tu"] == [2, 2] and count(database, mixes) == 4
    quality.record_answer(answer("again", keys[0], routed=False))
    quality.record_answer(answer("more", keys[2], routed=False))
    score(quality, "again", 1.0)
    with pytest.raises(UnknownName, match="only the first 2 are recorded"):
        score(quality, "more", 1.0)
    quality.record_answer(answer("routed", keys[0]))  # the task's route leads to it now
    quality.record_answer(answer("unlimited", keys[2]))
    assert len(quality.performance("t")) == 3
    again = reopen()
    again.record_answer(answer("one more", MixKey.of("t", [], "base"), routed=False))
    again.record_answer(answer("too many", MixKey.of("t", [], "other base"), routed=False))
    assert len(again.performance("t")) == 4


def test_a_mix_that_another_server_has_added_is_shared(database: Database, reopen: Callable[..., Quality]) -> None:
    quality, other = reopen(), Quality(database)
    for i, each in enumerate((quality, other)):
        each.record_answer(answer(f"gen-{i}"))
        score(each, f"gen-{i}", 1.0)
    other.close()
    assert count(database, mixes) == 1 and reopen().performance("t")[0]["requests"] == 2


def test_answers_are_written_by_the_background_thread(
    database: Database, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.01)
    monkeypatch.setattr(module, "FIRST_CLEANUP", 0.0)
    cleaned: list[float] = []
    monkeypatch.setattr(Quality, "cleanup", lambda self, now: cleaned.append(now))
    quality = Quality(database)
    quality.record_answer(answer("gen-1"))
    until(lambda: count(database, answers) == 1)
    until(lambda: cleaned == [START])
    quality.close()


class TestRefusals:
    """The database refuses writes."""

    @pytest.fixture(autouse=True)
    def refuse(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
        transaction = database.transaction

        def full() -> Any:
            raise StoreFailed("the database refuses: disk is full; nothing was changed")

        return lambda refused: monkeypatch.setattr(database, "transaction", full if refused else transaction)

    def test_a_refused_score_changes_nothing(self, quality: Quality, refuse: Callable[[bool], None]) -> None:
        quality.record_answer(answer("gen-1"))
        score(quality, "gen-1", 1.0)
        quality.record_evaluation(A, "chrf", {"x": 1.0})
        quality.set_leader("t", "rule", A, "because")
        refuse(True)
        for write in (
            lambda: score(quality, "gen-1", 0.0),
            lambda: quality.record_evaluation(A, "chrf", {"x": 0.0}),
            lambda: quality.record_evaluation(B, "chrf", {"x": 0.0}),
            lambda: quality.set_leader("t", "rule", B, "better"),
            lambda: quality.clear_leader("t"),
        ):
            with pytest.raises(StoreFailed, match="disk is full"):
                write()
        assert quality.totals(A, "accuracy", FEEDBACK).total == quality.totals(A, "chrf", EVALUATION).total == 1.0
        assert quality.leader("t", "rule") == (A, "because") and len(quality.performance("t")) == 1
        refuse(False)
        quality.record_evaluation(B, "chrf", {"x": 0.0})
        assert quality.paired(A, B, "chrf").count == 1

    def test_answers_wait_in_order_and_the_oldest_are_dropped(
        self, quality: Quality, refuse: Callable[[bool], None], database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        quality._pending = type(quality._pending)(maxlen=3)
        refuse(True)
        for i in range(5):
            quality.record_answer(answer(f"gen-{i}"))
            with pytest.raises(StoreFailed):
                quality.flush()
        assert quality.performance("t") == [] and [record.id for record in quality._pending] == [
            "gen-2",
            "gen-3",
            "gen-4",
        ]
        refuse(False)
        assert quality.performance("t")[0]["requests"] == 3 == count(database, answers)

    def test_closing_logs_how_many_answers_are_lost(
        self, quality: Quality, refuse: Callable[[bool], None], caplog: pytest.LogCaptureFixture
    ) -> None:
        quality.record_answer(answer("gen-1"))
        refuse(True)
        quality.close()
        assert "the last 1 answers are lost" in caplog.text


def test_an_error_in_the_middle_of_a_transaction_leaves_no_mix_behind(
    database: Database, quality: Quality, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise StoreFailed("no")

    quality.record_answer(answer("gen-1"))
    with monkeypatch.context() as patch, pytest.raises(StoreFailed):
        patch.setattr("server.tasks.quality_store.add_answers", failing)
        quality.flush()
    assert count(database, mixes) == 0
    quality.flush()
    assert count(database, mixes) == count(database, answers) == 1
    score(quality, "gen-1", 1.0)


def test_answers_that_the_database_can_never_store_are_dropped(
    database: Database, quality: Quality, caplog: pytest.LogCaptureFixture
) -> None:
    for id in ("gen-1", "gen-2", "gen-1"):
        quality.record_answer(answer(id))
    with pytest.raises(StoreFailed):
        quality.flush()
    assert "3 answers cannot be recorded" in caplog.text
    quality.record_answer(answer("gen-3"))
    assert quality.performance("t")[0]["requests"] == 1 == count(database, answers)
