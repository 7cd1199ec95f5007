"""What is known of a task's answers: scores by version, from feedback or evaluation, and latencies. Kept in SQLite.

Owns `quality.db`: raw rows, and beside them hourly sums, from which everything is read. Feedback and evaluation are
never added up.

Answers are buffered and written twice a second; a score is on disk before the caller hears that it was taken. Rows are
keyed by digests of their ids, and no second index is kept: they are found by id, and swept once an hour.
"""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from adapters.errors import StoreFailed
from server.errors import UnknownName
from server.tasks import examples
from server.tasks.definitions import FEEDBACK_METRIC
from server.tasks.examples import digest
from server.tasks.intervals import Totals, interval
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.quality_file import HOUR, SUMS, opened, still_there, swept
from server.tasks.traffic import COLUMNS, TrafficCounts

log = logging.getLogger(__name__)

DAY = 86_400.0
FLUSH_SECONDS = 0.5
FIRST_SWEEP = 300.0
"""Seconds after the start."""
MOST_PENDING = 10_000
"""Answers that wait in memory at most while the disk refuses them; the oldest are let go."""
MOST_MADE_UP = 200
"""Of a task. Mixes that clients choose themselves have no end: of one that would be a further subject nothing is
kept."""
MOST_TRAFFIC = 1000
"""Subjects whose traffic is kept in memory, in some kilobytes each; that of others is read when it is asked for."""
MOST_TOLD = 100
"""Of a task's subjects, in its performance: a name that is published every hour has thousands in all that is kept."""
MOST_PAIRED = 10_000
JUMP = 60.0
"""Seconds that the wall clock may gain or lose in an hour and still be a clock."""
FEEDBACK, EVALUATION = "feedback", "evaluation"

_Change = tuple[float, int, int]
"""A score, its hour, and whether it came (1) or went (-1)."""
_Key = tuple[MixKey, str, str]
"""Whose scores, by which metric and from where."""


class Quality:
    """Scores and traffic by subject. Thread-safe. `retention` is in seconds, for raw rows and hourly sums alike."""

    def __init__(self, file: Path, retention: float = 90 * DAY) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._retention = retention
        self._lock = threading.Lock()
        self._pending: deque[AnswerRecord] = deque()
        self._ids: dict[MixKey, int] = {}
        self._of_task: dict[str, dict[int, MixKey]] = {}
        """The same from the other side: one task's questions do not go over all others' subjects."""
        self._latest: dict[int, int] = {}
        """The last hour of each that has a row."""
        self._totals: dict[MixKey, dict[tuple[str, str], Totals]] = {}
        self._hours: dict[_Key, dict[int, Totals]] = {}
        self._paired: dict[tuple[MixKey, MixKey, str], Totals] = {}
        """What has been asked of `examples`, a join of thousands."""
        self._traffic: dict[int, TrafficCounts] = {}
        """All hours of the subjects that were asked for last, by their numbers."""
        self._made_up: set[MixKey] = set()
        """Mixes that clients chose themselves."""
        self._clocks = time.time(), time.monotonic()
        """Both clocks when they were last compared."""
        self._patience = FIRST_SWEEP
        """For how long they are not compared then."""
        with _told_of_the_disk():
            self._db = opened(file, self._load)
            hour = self._db.execute("PRAGMA user_version").fetchone()[0] or max(self._latest.values(), default=math.inf)
        self._sure = min(self._clocks[0], (hour + 1) * HOUR)
        """What the wall clock told then; at the start no more than the end of the last hour that was sure, or that has
        a record, since a clock that has not been set yet may be far ahead."""
        self._check_place = still_there(file, self._db)
        self._refused = False
        """Whether the last attempt to write failed."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loramux-quality", daemon=True)
        self._thread.start()

    # ---- writing

    def record_answer(self, answered: AnswerRecord) -> None:
        """Take note of an answer. Costs an append."""
        self._pending.append(answered)

    def record_feedback(self, task: str, id: str, tenant: str, *, score: float | None, expected: str | None) -> None:
        """Score an answer of the last 24 hours, once: the last one counts. Raises UnknownName.

        With `expected`, the score is whether the answer said the same. Raises StoreFailed if the disk refuses it.
        """
        key = digest(id)
        with self._lock, _told_of_the_disk():
            self._flush()
            row = self._db.execute(
                "SELECT subject, text, task, at FROM answers JOIN subjects ON subjects.id = subject"
                " WHERE answers.id = ? AND tenant = ? AND at > ?",
                (key, tenant, time.time() - DAY),
            ).fetchone()
            if row is None or row[2] != task:
                why = "" if self._room(task) else f"; of mixes that clients choose, the first {MOST_MADE_UP} are kept"
                raise UnknownName(f"there is no answer {id[:64]!r} of this task in the last 24 hours{why}", "id")
            value = float(row[1] == _told(expected)) if expected is not None else float(score or 0.0)
            with self._transaction():
                self._db.execute("BEGIN")
                # In the answer's hour: where labels come at night, all of a day would be compared as if it were one.
                changes = self._score(key, row[0], FEEDBACK_METRIC, FEEDBACK, value, row[3], stays=True)
            self._add(self._of_task[task][row[0]], FEEDBACK_METRIC, FEEDBACK, changes)

    def record_evaluation(self, subject: MixKey, metric: str, values: Mapping[str, float], asked: str = "") -> None:
        """Take the scores of an evaluation: example -> 0 to 1. An example that was scored before is not counted twice:
        the last one counts, as for feedback. Other subjects' scores of it are `paired` with it where they were `asked`
        with the same, which is what a task puts around an example. Raises StoreFailed if the disk refuses them.
        """
        with self._lock, _told_of_the_disk():
            now, changes = time.time(), list[_Change]()
            with self._all_or_nothing():
                number = self._number(subject)
                for example, value in values.items():
                    key = digest(f"{number} {metric} {example}")
                    changes += self._score(key, number, metric, EVALUATION, value, now)
                    examples.keep(self._db, number, metric, example, asked, value, now)
            self._add(subject, metric, EVALUATION, changes)
            self._paired = {key: known for key, known in self._paired.items() if subject not in key}

    def set_leader(self, task: str, rule: str, leader: MixKey, reason: str) -> None:
        """Remember who leads a task, and by which rule that was found. Raises StoreFailed if the disk refuses it."""
        with self._lock, _told_of_the_disk(), self._transaction():
            self._db.execute(
                "INSERT OR REPLACE INTO decisions VALUES (?, ?, ?, ?, ?, ?)",
                (task, rule, leader.mix, leader.base, time.time(), reason),
            )

    def clear_leader(self, task: str) -> None:
        """Forget who leads a task that is gone or has another route. Raises StoreFailed if the disk refuses it."""
        with self._lock, _told_of_the_disk(), self._transaction():
            self._db.execute("DELETE FROM decisions WHERE task = ?", (task,))

    def flush(self) -> None:
        """Write what is buffered."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Write the rest and let go of the file. What the disk refuses now is lost, and the log says how much it is."""
        self._stop.set()
        self._thread.join()
        with self._lock:
            try:
                self._flush()
            except sqlite3.Error as error:
                log.error("the quality records of the last %d answers are lost: %s", len(self._pending), error)
            # Where servers run for less than an hour each, no other sweep comes that would tell of it.
            wall = time.time()
            if self._patience == HOUR and abs(self._drift(wall, time.monotonic())) < JUMP:
                with suppress(sqlite3.Error):  # then the next start goes by an earlier hour
                    self._note_hour(wall)
            self._db.close()

    # ---- reading

    def totals(self, subject: MixKey, metric: str, source: str) -> Totals:
        """All scores of a subject by one metric from one source."""
        return self._totals.get(subject, {}).get((metric, source), Totals())

    def hours(self, subject: MixKey, metric: str, source: str) -> dict[int, Totals]:
        """The same by hour."""
        with self._lock:
            return dict(self._hours.get((subject, metric, source), {}))

    def paired(self, first: MixKey, second: MixKey, metric: str) -> Totals:
        """What is between two subjects on the examples that both were evaluated on: (1 + first's - second's) / 2."""
        key = (first, second, metric)
        with self._lock:
            known = self._paired.get(key)
            if known is None:
                if first not in self._ids or second not in self._ids:
                    return Totals()
                known = examples.between(self._db, self._ids[first], self._ids[second], metric)
                self._paired[key] = known
                if len(self._paired) > MOST_PAIRED:
                    del self._paired[next(iter(self._paired))]
            return known

    def leader(self, task: str, rule: str) -> tuple[MixKey, str] | None:
        """Who leads a task by a rule, and why; None if nobody does yet."""
        query = "SELECT mix, base, reason FROM decisions WHERE task = ? AND rule = ?"
        with self._lock:
            row = self._db.execute(query, (task, rule)).fetchone()
        return None if row is None else (MixKey(task, row[0], row[1]), row[2])

    def means(
        self, tasks: Iterable[str], wanted: Callable[[MixKey], bool] = lambda subject: True
    ) -> list[tuple[MixKey, str, str, float]]:
        """MixKey, metric, source and mean of everything of these tasks that is `wanted` and has a score; of each task
        those first that answered or were scored last."""
        told = []
        for task in tasks:
            known = list(self._of_task.get(task, {}).items())
            own = [(self._latest.get(number, 0), number, subject) for number, subject in known if wanted(subject)]
            for _, _, subject in sorted(own, reverse=True):
                for (metric, source), totals in list(self._totals.get(subject, {}).items()):
                    if totals.count:
                        told.append((subject, metric, source, totals.mean))
        return told

    def performance(self, task: str) -> list[dict[str, Any]]:
        """Per version: samples, quality by source with its interval, latencies, tokens, errors. Of the last `MOST_TOLD`
        that answered or were scored, mixes that clients chose themselves behind all others.

        Without the answers that wait for the disk to have room again.
        """
        with self._lock:
            with suppress(sqlite3.DatabaseError):  # the thread that tries again has it in the log
                self._flush()
            subjects = self._of_task.get(task, {})

            def rank(number: int) -> tuple[bool, int]:
                return subjects[number] not in self._made_up, self._latest.get(number, 0)

            told = sorted(sorted(subjects, key=rank)[-MOST_TOLD:])
            return [self._described(subjects[number], self._seen(number)) for number in told]

    def _described(self, subject: MixKey, seen: TrafficCounts) -> dict[str, Any]:
        requests, errors, prompt, generated = seen.sums
        quality: list[dict[str, Any]] = []
        for (metric, source), totals in sorted(self._totals.get(subject, {}).items()):
            if totals.count:
                low, high = interval(totals)
                quality.append({"metric": metric, "source": source, "samples": totals.count,
                                "mean": totals.mean, "low": low, "high": high})  # fmt: skip
        return {
            "version": subject.label,
            "adapters": [{"version": v, "weight": w} for v, w in json.loads(subject.mix)],
            "base": subject.base,
            "samples": max((q["samples"] for q in quality), default=0),  # of the metric and source that have most
            "quality": quality,
            **{
                kind: dict(zip(("p50", "p95", "p99"), latencies.percentiles(), strict=True))
                for kind, latencies in seen.latencies.items()
            },
            "requests": requests,
            "errors": errors,
            "tokens": {"prompt": prompt, "generated": generated},
        }

    # ---- with the lock

    def _seen(self, number: int) -> TrafficCounts:
        """All traffic of a subject."""
        seen = self._traffic.pop(number, None)
        if seen is None:
            seen = TrafficCounts()
            seen.join(self._rows(self._db, number))
        self._traffic[number] = seen  # behind the others
        if len(self._traffic) > MOST_TRAFFIC:
            del self._traffic[next(iter(self._traffic))]
        return seen

    def _load(self, db: sqlite3.Connection) -> None:
        self._hours, self._traffic, self._paired = {}, {}, {}
        self._know({MixKey(*row[1:]): row[0] for row in db.execute("SELECT id, task, mix, base FROM subjects")})
        for subject in self._ids:
            subject.check()
        by_number = {number: subject for subject, number in self._ids.items()}
        every = " UNION ALL ".join(f"SELECT subject, hour FROM {sums}" for sums in SUMS)
        self._latest = dict(db.execute(f"SELECT subject, max(hour) FROM ({every}) GROUP BY subject"))
        for number, metric, source, hour, *sums in db.execute("SELECT * FROM hours"):
            self._hours.setdefault((by_number[number], metric, source), {})[hour] = Totals(*sums)
        totals: dict[MixKey, dict[tuple[str, str], Totals]] = {}
        for (subject, metric, source), hours in self._hours.items():
            totals.setdefault(subject, {})[metric, source] = Totals.joined(hours.values())
        self._totals = totals  # in one step: who reads it waits for no lock
        for number in by_number:  # what cannot be read is found now; it is kept when it is asked for
            TrafficCounts().join(self._rows(db, number))
        self._made_up = self._marked(db)

    def _marked(self, db: sqlite3.Connection) -> set[MixKey]:
        custom_mix = {number for (number,) in db.execute("SELECT subject FROM custom_mix")}
        return {subject for subject, number in self._ids.items() if number in custom_mix}

    def _know(self, ids: dict[MixKey, int]) -> None:
        of_task: dict[str, dict[int, MixKey]] = {}
        for subject, number in ids.items():
            of_task.setdefault(subject.task, {})[number] = subject
        self._ids, self._of_task = ids, of_task

    @staticmethod
    def _rows(db: sqlite3.Connection, number: int) -> list[Sequence[Any]]:
        return db.execute(f"SELECT {COLUMNS} FROM traffic WHERE subject = ?", (number,)).fetchall()

    def _add(self, subject: MixKey, metric: str, source: str, changes: Sequence[_Change]) -> None:
        """Do in memory what `_score` has done in the file."""
        key = (subject, metric, source)
        hours = self._hours.setdefault(key, {})
        for value, hour, times in changes:
            hours[hour] = hours.get(hour, Totals()).plus(value, times)
            self._saw(self._ids[subject], hour)
        self._totals.setdefault(subject, {})[metric, source] = Totals.joined(hours.values())  # as `_load` has it

    def _saw(self, number: int, hour: int) -> None:
        self._latest[number] = max(hour, self._latest.get(number, 0))

    def _score(
        self, key: bytes, number: int, metric: str, source: str, value: float, at: float, *, stays: bool = False
    ) -> list[_Change]:
        """Write a score over the one that its key may have had, within a transaction; in that one's hour, if it
        `stays`: subjects are compared by hours, and one whose answers are scored again is not moved beside others.
        """
        old = self._db.execute("SELECT value, at FROM scores WHERE id = ?", (key,)).fetchone()
        if old is not None and stays:
            at = old[1]
        changes = [(old[0], int(old[1]) // HOUR, -1)] if old is not None else []
        changes.append((value, int(at) // HOUR, 1))
        self._db.execute("INSERT OR REPLACE INTO scores VALUES (?, ?, ?, ?, ?)", (key, number, metric, value, at))
        for change in changes:
            self._count(number, metric, source, *change)
        return changes

    def _count(self, number: int, metric: str, source: str, value: float, hour: int, times: int) -> None:
        self._db.execute(
            "INSERT INTO hours VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET count = count + excluded.count,"
            " total = total + excluded.total, squares = squares + excluded.squares",
            (number, metric, source, hour, times, times * value, times * value * value),
        )
        if times < 0:
            self._db.execute(
                "DELETE FROM hours WHERE subject = ? AND metric = ? AND source = ? AND hour = ? AND count = 0",
                (number, metric, source, hour),
            )

    def _number(self, subject: MixKey) -> int:
        if subject not in self._ids:
            self._db.execute(
                "INSERT OR IGNORE INTO subjects (task, mix, base) VALUES (?, ?, ?)",
                (subject.task, subject.mix, subject.base),
            )
            row = self._db.execute(
                "SELECT id FROM subjects WHERE task = ? AND mix = ? AND base = ?",
                (subject.task, subject.mix, subject.base),
            ).fetchone()
            self._ids[subject] = row[0]
            self._of_task.setdefault(subject.task, {})[row[0]] = subject
        return self._ids[subject]

    def _flush(self) -> None:
        if not self._pending:
            return
        pending = [self._pending.popleft() for _ in range(len(self._pending))]  # others may append meanwhile
        try:
            with self._all_or_nothing():
                traffic = self._write(pending)
        except sqlite3.Error:
            self._pending.extendleft(reversed(pending[-MOST_PENDING:]))  # a disk that has room again gets them
            raise
        for (number, hour), seen in traffic.items():
            self._saw(number, hour)
            if number in self._traffic:
                self._traffic[number].merge(seen)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """A transaction; if it fails, subjects that it had added are forgotten too."""
        try:
            with self._transaction():
                self._db.execute("BEGIN")
                yield
        except sqlite3.Error:
            written = {number for (number,) in self._db.execute("SELECT id FROM subjects")}
            self._know({subject: number for subject, number in self._ids.items() if number in written})
            self._made_up = self._marked(self._db)
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Raises sqlite3.OperationalError where the file is no longer there: what is written into it then would be gone
        with this process, and nobody told."""
        self._check_place()
        with self._db:
            yield

    def _room(self, task: str) -> bool:
        """Whether there is room for one more mix that a client chooses."""
        return sum(subject.task == task for subject in self._made_up) < MOST_MADE_UP

    def _write(self, pending: Sequence[AnswerRecord]) -> dict[tuple[int, int], TrafficCounts]:
        """Add answers to the file, within a transaction. Answers what they come to, by subject and hour."""
        traffic: dict[tuple[int, int], TrafficCounts] = {}
        rows = []
        for answered in pending:
            custom_mix = not answered.routed and answered.subject not in self._ids
            if custom_mix and not self._room(answered.subject.task):
                continue
            number = self._number(answered.subject)
            if custom_mix:
                self._db.execute("INSERT OR IGNORE INTO custom_mix VALUES (?)", (number,))
                self._made_up.add(answered.subject)
            elif answered.routed and answered.subject in self._made_up:  # tried by a client before
                self._db.execute("DELETE FROM custom_mix WHERE subject = ?", (number,))
                self._made_up.remove(answered.subject)
            traffic.setdefault((number, int(answered.at) // HOUR), TrafficCounts()).add(answered)
            if not answered.failed:
                rows.append((digest(answered.id), number, answered.tenant, answered.at, _told(answered.text)))
        self._db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", rows)
        for (number, hour), seen in traffic.items():
            whole = TrafficCounts()
            whole.join(self._db.execute(f"SELECT {COLUMNS} FROM traffic WHERE subject = ? AND hour = ?",
                                        (number, hour)).fetchall())  # fmt: skip
            whole.merge(seen)
            blobs = [latencies.dump() for latencies in whole.latencies.values()]
            self._db.execute("INSERT OR REPLACE INTO traffic VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                             (number, hour, *whole.sums, *blobs))  # fmt: skip
        return traffic

    def _sweep_hourly(self, wall: float, steady: float) -> None:
        """Sweep soon after the start and once in an hour of running, as if the wall clock had gone on as the other did
        at most: one that jumped is not to be trusted for that long with what it would delete. It does so on a machine
        that sleeps, too."""
        ran = steady - self._clocks[1]
        if ran < self._patience:
            return
        now, drift = min(wall, self._sure + ran), self._drift(wall, steady)
        self._clocks, self._sure, self._patience = (wall, steady), wall, HOUR
        if abs(drift) >= JUMP:
            log.warning("the clock was set by %+.0f s; old quality records are kept for an hour more", drift)
        else:
            self._note_hour(now)
        self._sweep(now)

    def _drift(self, wall: float, steady: float) -> float:
        """Seconds by which the wall clock has gone ahead of the other since they were last compared."""
        before, since = self._clocks
        return wall - before - (steady - since)

    def _note_hour(self, sure: float) -> None:
        """What the next start may go by, whose clock may be ahead: the file's version is an hour since the epoch."""
        self._db.execute(f"PRAGMA user_version = {int(sure) // HOUR}")

    def _sweep(self, now: float) -> None:
        """Forget what is older than it may be, and the subjects of which nothing is left.

        Sums are kept for a day at least, as the answers are that feedback may still be given to.
        """
        before = int(now - max(self._retention, DAY)) // HOUR
        aged = [key for key, hours in self._hours.items() if min(hours, default=before) < before]
        with self._all_or_nothing():
            self._db.execute("DELETE FROM answers WHERE at < ?", (now - DAY,))
            keys = [(self._ids[subject], metric, source) for subject, metric, source in aged]
            less, gone = swept(self._db, before, keys, list(self._ids.values()))
        for number in (*less, *gone):
            self._traffic.pop(number, None)
        if aged or gone:
            self._let_go(before, aged, gone)

    def _let_go(self, before: int, aged: Iterable[_Key], gone: Collection[int]) -> None:
        """Do in memory what a sweep has done in the file: of the scores that are `aged` the hours `before` that go, and
        with all that they have the subjects of these numbers."""
        for key in aged:
            self._hours[key] = {hour: totals for hour, totals in self._hours[key].items() if hour >= before}
        self._know({subject: number for subject, number in self._ids.items() if number not in gone})
        self._latest = {number: hour for number, hour in self._latest.items() if number not in gone}
        self._made_up &= self._ids.keys()
        self._hours = {key: hours for key, hours in self._hours.items() if key[0] in self._ids}
        totals = {subject: dict(own) for subject, own in self._totals.items() if subject in self._ids}
        for subject, metric, source in aged:
            if subject in totals:
                totals[subject][metric, source] = Totals.joined(self._hours[subject, metric, source].values())
        self._totals = totals  # in one step, as `_load` has it
        self._paired = {}

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_SECONDS):
            try:
                self.flush()
                with self._lock:
                    self._sweep_hourly(time.time(), time.monotonic())
            except sqlite3.Error as error:  # a full disk: answers are served on, and the last records wait for room
                if not self._refused:
                    log.error("quality records cannot be written: %s; they are kept in memory until they can", error)
                self._refused = True
            else:
                self._refused = False


@contextmanager
def _told_of_the_disk() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:
        raise StoreFailed(f"the quality records cannot be written: {error}") from None
    except sqlite3.DatabaseError as error:
        raise StoreFailed(f"the quality records are damaged ({error}): the next start sets them aside") from None


def _told(text: str) -> bytes:
    """An answer's words as accuracy compares them, but for case and space: what people write is not kept."""
    return digest(text.strip().lower())
