"""SQL statements of the quality records. Every function runs within the caller's transaction."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from server.database.tables import answers, best_candidates, example_scores, mixes, score_hours, traffic_hours
from server.tasks.intervals import Totals
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.traffic import TrafficCounts

HOUR = 3_600
DAY = 86_400.0
CHUNK = 500
"""Most values of one IN clause."""


def digest(text: str) -> bytes:
    """16 bytes that identify a text. Ids, examples and answers are not stored in clear."""
    return hashlib.sha256(text.encode()).digest()[:16]


def answer_digest(text: str) -> bytes:
    """Digest of an answer's text, equal for answers that `accuracy` regards as equal."""
    return digest(text.strip().lower())


def add_mix(connection: Connection, key: MixKey, *, client_defined: bool) -> int:
    """Insert a mix, unless another server has, and return its id."""
    identity = {"task": key.task, "mix": key.mix, "base": key.base}
    found = connection.scalar(sa.select(mixes.c.id).filter_by(**identity))
    if found is not None:
        return int(found)
    insert = sa.insert(mixes).values(**identity, client_defined=client_defined)
    return int(connection.execute(insert).inserted_primary_key[0])  # type: ignore[index]


def set_routed(connection: Connection, mix_id: int) -> None:
    """A mix that a client chose before is now on the task's route."""
    connection.execute(sa.update(mixes).where(mixes.c.id == mix_id).values(client_defined=False))


def add_answers(connection: Connection, records: Iterable[tuple[int, AnswerRecord]]) -> None:
    """Insert answers by the ids of their mixes, so that feedback finds them."""
    rows = [
        {"id": digest(r.id), "mix_id": mix_id, "tenant": r.tenant, "at": r.at, "text": answer_digest(r.text)}
        for mix_id, r in records
    ]
    if rows:
        connection.execute(sa.insert(answers), rows)


_FIND_ANSWER = (
    sa.select(answers, mixes.c.task, mixes.c.mix, mixes.c.base)
    .join(mixes)
    .where(
        answers.c.id == sa.bindparam("digest"),
        answers.c.tenant == sa.bindparam("tenant"),
        answers.c.at > sa.bindparam("since"),
        mixes.c.task == sa.bindparam("task"),
    )
)
_SET_SCORE = sa.update(answers).where(answers.c.id == sa.bindparam("digest")).values(score=sa.bindparam("score"))


def find_answer(connection: Connection, id: str, task: str, tenant: str, since: float) -> Any:
    """The row of an answer with the `task`, `mix` and `base` of its mix; None if there is none."""
    values = {"digest": digest(id), "tenant": tenant, "since": since, "task": task}
    return connection.execute(_FIND_ANSWER, values).first()


def set_score(connection: Connection, answer_id: bytes, score: float) -> None:
    connection.execute(_SET_SCORE, {"digest": answer_id, "score": score})


def replace_example_scores(
    connection: Connection, mix_id: int, metric: str, context: str, values: Mapping[str, float], now: float
) -> list[tuple[float, float]]:
    """Write scores of examples over earlier ones of the same mix and metric. Returns (value, time) of the latter."""
    rows = [
        {
            "mix_id": mix_id,
            "metric": metric,
            "example": digest(example),
            "context": digest(context),
            "value": value,
            "at": now,
        }
        for example, value in values.items()
    ]
    replaced: list[tuple[float, float]] = []
    for start in range(0, len(rows), CHUNK):
        some = rows[start : start + CHUNK]
        same = (
            example_scores.c.mix_id == mix_id,
            example_scores.c.metric == metric,
            example_scores.c.example.in_([row["example"] for row in some]),
        )
        found = connection.execute(sa.select(example_scores.c.value, example_scores.c.at).where(*same))
        replaced += [(row.value, row.at) for row in found]
        connection.execute(sa.delete(example_scores).where(*same))
        connection.execute(sa.insert(example_scores), some)
    return replaced


def paired_totals(connection: Connection, first: int, second: int, metric: str) -> Totals:
    """(1 + first - second) / 2 over the examples that both mixes answered in the same context."""
    a, b = example_scores.alias(), example_scores.alias()
    half = ((1 + a.c.value - b.c.value) / 2).label("half")
    same = sa.and_(a.c.metric == b.c.metric, a.c.example == b.c.example, a.c.context == b.c.context)
    pairs = (
        sa.select(half)
        .join_from(a, b, same)
        .where(a.c.mix_id == first, b.c.mix_id == second, a.c.metric == metric)
        .subquery()
    )
    zero = sa.literal(0.0)
    sums = (sa.func.coalesce(sa.func.sum(x), zero) for x in (pairs.c.half, pairs.c.half * pairs.c.half))
    row = connection.execute(sa.select(sa.func.count(), *sums).select_from(pairs)).one()
    return Totals(*row)


@cache
def _delete_by_key(table: sa.Table) -> sa.Delete:
    return sa.delete(table).where(*(column == sa.bindparam(f"key_{column.name}") for column in table.primary_key))


def _replace(connection: Connection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows over those with the same primary key. Rows with a `count` of 0 are only deleted."""
    keys = [column.name for column in table.primary_key]
    connection.execute(_delete_by_key(table), [{f"key_{key}": row[key] for key in keys} for row in rows])
    if kept := [row for row in rows if row.get("count") != 0]:
        connection.execute(sa.insert(table), kept)


def write_hours(connection: Connection, mix_id: int, metric: str, source: str, hours: Mapping[int, Totals]) -> None:
    """Write the totals of some hours."""
    if hours:
        key = {"mix_id": mix_id, "metric": metric, "source": source}
        _replace(connection, score_hours, [{**key, "hour": hour, **vars(totals)} for hour, totals in hours.items()])


def add_traffic(connection: Connection, traffic: Mapping[tuple[int, int], TrafficCounts]) -> None:
    """Add traffic, by mix and hour, to the rows of the database."""
    totals = {key: TrafficCounts() for key in traffic}
    ids, hours = sorted({mix_id for mix_id, _ in traffic}), {hour for _, hour in traffic}
    for start in range(0, len(ids), CHUNK):
        some = traffic_hours.c.mix_id.in_(ids[start : start + CHUNK]), traffic_hours.c.hour.in_(hours)
        for row in connection.execute(sa.select(traffic_hours).where(*some)):
            if (row.mix_id, row.hour) in totals:
                totals[row.mix_id, row.hour].load([row])
    for key, counts in traffic.items():
        totals[key].merge(counts)
    rows = [{"mix_id": mix_id, "hour": hour, **total.columns()} for (mix_id, hour), total in totals.items()]
    if rows:
        _replace(connection, traffic_hours, rows)


def read_traffic(connection: Connection, mix_ids: Sequence[int]) -> dict[int, TrafficCounts]:
    """All traffic of some mixes."""
    rows: dict[int, list[Any]] = {mix_id: [] for mix_id in mix_ids}
    for row in connection.execute(sa.select(traffic_hours).where(traffic_hours.c.mix_id.in_(mix_ids))):
        rows[row.mix_id].append(row)
    traffic = {mix_id: TrafficCounts() for mix_id in mix_ids}
    for mix_id, several in rows.items():
        traffic[mix_id].load(several)
    return traffic


def last_hours(connection: Connection) -> dict[int, int]:
    """Mix id -> the last hour in which it has traffic or scores."""
    found: dict[int, int] = {}
    for table in (traffic_hours, score_hours):
        for mix_id, hour in connection.execute(sa.select(table.c.mix_id, sa.func.max(table.c.hour)).group_by("mix_id")):
            found[mix_id] = max(hour, found.get(mix_id, 0))
    return found


def delete_before(connection: Connection, now: float, hour: int, mix_ids: Iterable[int], empty: Sequence[int]) -> None:
    """Delete answers of more than a day ago, hourly rows before `hour`, and the mixes `empty`, which have no rows."""
    connection.execute(sa.delete(answers).where(answers.c.at < now - DAY))
    connection.execute(sa.delete(example_scores).where(example_scores.c.at < hour * HOUR))
    each = [{"mix": mix_id, "before": hour} for mix_id in mix_ids]
    for table in (score_hours, traffic_hours):  # by mix, because the primary key begins with it
        if each:
            old = (table.c.mix_id == sa.bindparam("mix"), table.c.hour < sa.bindparam("before"))
            connection.execute(sa.delete(table).where(*old), each)
    for start in range(0, len(empty), CHUNK):
        connection.execute(sa.delete(mixes).where(mixes.c.id.in_(empty[start : start + CHUNK])))


def read_leaders(connection: Connection) -> dict[str, tuple[str, MixKey, str]]:
    """Task -> the rule that chose its leader, the leader, and the reason."""
    rows = connection.execute(sa.select(best_candidates))
    return {row.task: (row.rule, MixKey(row.task, row.mix, row.base), row.reason) for row in rows}
