"""Quality records of tasks: scores by version, from feedback and from evaluations, and traffic.

Scores and hourly sums are kept in memory and in the database. A score is committed before the caller continues. Answers
are buffered: a background thread writes them twice a second. Feedback and evaluation scores are never added together.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DataError, IntegrityError

from adapters.errors import StoreFailed
from server.database import Database
from server.database.tables import best_candidates, mixes, score_hours
from server.errors import UnknownName
from server.tasks import quality_store as store
from server.tasks.definitions import FEEDBACK_METRIC
from server.tasks.intervals import Totals
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.mix_record import MixRecord
from server.tasks.quality_store import DAY, HOUR
from server.tasks.traffic import TrafficCounts

log = logging.getLogger(__name__)

FLUSH_SECONDS = 0.5
RETRY_SECONDS = 10.0
"""Pause of the background thread after the database refused a write."""
FIRST_CLEANUP = 300.0
"""Seconds after the start; then every hour."""
MAX_PENDING = 10_000
"""Answers that wait in memory for the database; the oldest are dropped."""
MAX_CLIENT_MIXES = 200
"""Mixes chosen by clients that are recorded for each task. Further ones are not."""
MAX_LISTED = 100
"""Versions in a task's performance."""
FEEDBACK, EVALUATION = "feedback", "evaluation"


class Quality:
    """Scores and traffic by mix. Thread-safe.

    Args:
        database: where they are stored.
        retention: seconds for which scores and traffic are kept; at least a day.

    Raises:
        StoreFailed: the database cannot be read.
    """

    def __init__(self, database: Database, retention: float = 90 * DAY) -> None:
        self._database = database
        self._retention = max(retention, DAY)
        self._lock = threading.Lock()
        self._pending: deque[AnswerRecord] = deque(maxlen=MAX_PENDING)
        self._mixes: dict[MixKey, MixRecord] = {}
        self._by_task: dict[str, dict[MixKey, MixRecord]] = {}
        self._paired: dict[tuple[MixKey, MixKey, str], Totals] = {}
        self._leaders: dict[str, tuple[str, MixKey, str]] = {}
        self._load()
        self._next_cleanup = time.monotonic() + FIRST_CLEANUP
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loramux-quality", daemon=True)
        self._thread.start()

    # -- writing

    def record_answer(self, record: AnswerRecord) -> None:
        """Buffer an answer. Costs one append."""
        self._pending.append(record)

    def record_feedback(self, task: str, id: str, tenant: str, *, score: float | None, expected: str | None) -> None:
        """Score an answer of the last 24 hours. A second score replaces the first.

        Args:
            score: 0 to 1.
            expected: the right answer, instead of a score.

        Raises:
            UnknownName: the tenant has no such answer of this task.
            StoreFailed: the database refuses the score.
        """
        with self._lock:
            self._flush()
            with self._database.transaction() as connection:
                row = store.find_answer(connection, id, task, tenant, time.time() - DAY)
                if row is None:
                    full = self._count_client_mixes(task) >= MAX_CLIENT_MIXES
                    why = f"; of mixes chosen by clients only the first {MAX_CLIENT_MIXES} are recorded" if full else ""
                    raise UnknownName(f"there is no answer {id[:64]!r} of this task in the last 24 hours{why}", "id")
                mix = self._mixes[MixKey(row.task, row.mix, row.base)]
                value = float(row.text == store.answer_digest(expected)) if expected is not None else float(score or 0)
                # The hour of the answer, so that mixes are compared on answers of the same time.
                changes = [] if row.score is None else [(row.score, row.at, -1)]
                hours = mix.changed_hours(FEEDBACK_METRIC, FEEDBACK, [*changes, (value, row.at, 1)])
                store.set_score(connection, row.id, value)
                store.write_hours(connection, mix.id, FEEDBACK_METRIC, FEEDBACK, hours)
            mix.update_hours(FEEDBACK_METRIC, FEEDBACK, hours)

    def record_evaluation(self, key: MixKey, metric: str, values: Mapping[str, float], context: str = "") -> None:
        """Store the scores of an evaluation. The score of an example replaces an earlier one.

        Args:
            values: example id -> score from 0 to 1.
            context: what the task adds to an example. Scores are compared only within one context.

        Raises:
            StoreFailed: the database refuses the scores.
        """
        with self._lock:
            now = time.time()
            with self._database.transaction() as connection:
                mix = self._mixes.get(key) or MixRecord(store.add_mix(connection, key, client_defined=False), False)
                replaced = store.replace_example_scores(connection, mix.id, metric, context, values, now)
                changes = [(value, at, -1) for value, at in replaced] + [(value, now, 1) for value in values.values()]
                hours = mix.changed_hours(metric, EVALUATION, changes)
                store.write_hours(connection, mix.id, metric, EVALUATION, hours)
            self._add(key, mix)
            mix.update_hours(metric, EVALUATION, hours)
            self._paired.clear()

    def set_leader(self, task: str, rule: str, leader: MixKey, reason: str) -> None:
        """Store the leader of a task's `best` route. Raises StoreFailed."""
        row = {"task": task, "rule": rule, "mix": leader.mix, "base": leader.base, "reason": reason}
        with self._lock:
            with self._database.transaction() as connection:
                connection.execute(self._database.upsert(best_candidates, **row, since=time.time()))
            self._leaders[task] = rule, leader, reason

    def clear_leader(self, task: str) -> None:
        """Delete the leader of a task. Raises StoreFailed."""
        with self._lock:
            if task in self._leaders:
                with self._database.transaction() as connection:
                    connection.execute(sa.delete(best_candidates).where(best_candidates.c.task == task))
                del self._leaders[task]

    def flush(self) -> None:
        """Write buffered answers. Raises StoreFailed; they stay buffered then."""
        with self._lock:
            self._flush()

    def close(self) -> None:
        """Stop the background thread and write buffered answers."""
        self._stop.set()
        self._thread.join()
        try:
            self.flush()
        except StoreFailed as error:
            log.error("the records of the last %d answers are lost: %s", len(self._pending), error.message)

    # -- reading

    def totals(self, key: MixKey, metric: str, source: str) -> Totals:
        """All scores of a mix by one metric from one source."""
        mix = self._mixes.get(key)
        return Totals() if mix is None else mix.totals.get((metric, source), Totals())

    def hours(self, key: MixKey, metric: str, source: str) -> dict[int, Totals]:
        """The same by hour."""
        mix = self._mixes.get(key)
        return {} if mix is None else dict(mix.hours.get((metric, source), {}))

    def paired(self, first: MixKey, second: MixKey, metric: str) -> Totals:
        """(1 + first - second) / 2 over the examples on which both mixes were evaluated. Raises StoreFailed."""
        with self._lock:
            a, b = self._mixes.get(first), self._mixes.get(second)
            if a is None or b is None:
                return Totals()
            if (first, second, metric) not in self._paired:
                with self._database.read() as connection:
                    self._paired[first, second, metric] = store.paired_totals(connection, a.id, b.id, metric)
            return self._paired[first, second, metric]

    def leader(self, task: str, rule: str) -> tuple[MixKey, str] | None:
        """The leader that this rule chose, and why; None if there is none."""
        found = self._leaders.get(task)
        return found[1:] if found is not None and found[0] == rule else None

    def means(
        self, tasks: Iterable[str], wanted: Callable[[MixKey], bool] = lambda key: True
    ) -> list[tuple[MixKey, str, str, float]]:
        """(mix, metric, source, mean) of all `wanted` mixes with scores; most recently used first within a task."""
        found = []
        for task in tasks:
            known = [(key, mix) for key, mix in list(self._by_task.get(task, {}).items()) if wanted(key)]
            for key, mix in sorted(known, key=lambda item: (item[1].last_hour, item[1].id), reverse=True):
                for (metric, source), totals in sorted(mix.totals.items()):
                    if totals.count:
                        found.append((key, metric, source, totals.mean))
        return found

    def performance(self, task: str) -> list[dict[str, Any]]:
        """Quality, latencies, tokens and errors of each version of a task, for `GET /tasks/{task}/performance`.

        The `MAX_LISTED` most recently used, mixes chosen by clients last. Raises StoreFailed.
        """
        with self._lock:
            with suppress(StoreFailed):  # the background thread tries again
                self._flush()
            known = self._by_task.get(task, {})
            ranked = sorted(known, key=lambda key: (not known[key].client_defined, known[key].last_hour))
            shown = sorted(ranked[-MAX_LISTED:], key=lambda key: known[key].id)
            unread = [known[key] for key in shown if known[key].traffic is None]
            if unread:
                with self._database.read() as connection:
                    traffic = store.read_traffic(connection, [mix.id for mix in unread])
                for mix in unread:
                    mix.traffic = traffic[mix.id]
            return [known[key].describe(key) for key in shown]

    # -- with the lock held

    def _load(self) -> None:
        with self._database.read() as connection:
            last = store.last_hours(connection)
            by_id: dict[int, MixRecord] = {}
            for row in connection.execute(sa.select(mixes)):
                mix = by_id[row.id] = MixRecord(row.id, row.client_defined, last.get(row.id, 0))
                self._add(MixKey(row.task, row.mix, row.base), mix)
            for row in connection.execute(sa.select(score_hours)):
                hours = by_id[row.mix_id].hours.setdefault((row.metric, row.source), {})
                hours[row.hour] = Totals(*row[-3:])  # count, total, squares
            self._leaders = store.read_leaders(connection)
        for mix in by_id.values():
            mix.drop_hours(0)

    def _add(self, key: MixKey, mix: MixRecord) -> None:
        self._mixes[key] = mix
        self._by_task.setdefault(key.task, {})[key] = mix

    def _count_client_mixes(self, task: str) -> int:
        return sum(mix.client_defined for mix in self._by_task.get(task, {}).values())

    def _flush(self) -> None:
        batch = [self._pending.popleft() for _ in range(len(self._pending))]
        if not batch:
            return
        by_key: dict[MixKey, list[AnswerRecord]] = {}
        for record in batch:
            by_key.setdefault(record.key, []).append(record)
        try:
            with self._database.transaction() as connection:
                written = self._write(connection, by_key)
        except StoreFailed as error:
            if isinstance(error.__cause__, IntegrityError | DataError):  # trying again would not help
                log.error("%d answers cannot be recorded", len(batch))
                raise
            newer = [self._pending.popleft() for _ in range(len(self._pending))]
            self._pending.extend(batch + newer)
            raise
        for key, mix in written.items():
            self._add(key, mix)
            mix.client_defined = mix.client_defined and not any(record.routed for record in by_key[key])
            mix.last_hour = max(mix.last_hour, *(int(record.at) // HOUR for record in by_key[key]))
            if mix.traffic is not None:
                for record in by_key[key]:
                    mix.traffic.add(record)

    def _write(self, connection: Connection, by_key: Mapping[MixKey, list[AnswerRecord]]) -> dict[MixKey, MixRecord]:
        """Write answers and their traffic. Returns the mixes that are recorded."""
        written: dict[MixKey, MixRecord] = {}
        traffic: dict[tuple[int, int], TrafficCounts] = {}
        for key, records in by_key.items():
            routed = any(record.routed for record in records)
            mix = self._mixes.get(key)
            if mix is None:
                known = {**self._by_task.get(key.task, {}), **{k: m for k, m in written.items() if k.task == key.task}}
                if not routed and sum(m.client_defined for m in known.values()) >= MAX_CLIENT_MIXES:
                    continue
                mix = MixRecord(store.add_mix(connection, key, client_defined=not routed), not routed)
            elif routed and mix.client_defined:
                store.set_routed(connection, mix.id)
            written[key] = mix
            for record in records:
                traffic.setdefault((mix.id, int(record.at) // HOUR), TrafficCounts()).add(record)
        store.add_traffic(connection, traffic)
        answered = [(written[r.key].id, r) for records in by_key.values() for r in records if r.key in written]
        store.add_answers(connection, [(mix_id, record) for mix_id, record in answered if not record.failed])
        return written

    def cleanup(self, now: float) -> None:
        """Delete answers older than a day, and scores and traffic older than the retention. Raises StoreFailed."""
        with self._lock:
            before = int(now - self._retention) // HOUR
            empty = {key: mix for key, mix in self._mixes.items() if mix.last_hour < before}
            with self._database.transaction() as connection:
                ids = [mix.id for mix in self._mixes.values()]
                store.delete_before(connection, now, before, ids, [mix.id for mix in empty.values()])
            for key in empty:
                del self._mixes[key], self._by_task[key.task][key]
            for mix in self._mixes.values():
                mix.traffic = None
                mix.drop_hours(before)
            self._paired.clear()

    def _run(self) -> None:
        pause = FLUSH_SECONDS
        while not self._stop.wait(pause):
            try:
                self.flush()
                if time.monotonic() >= self._next_cleanup:
                    self._next_cleanup = time.monotonic() + HOUR
                    self.cleanup(time.time())
                pause = FLUSH_SECONDS
            except StoreFailed:  # logged by the database
                pause = RETRY_SECONDS
