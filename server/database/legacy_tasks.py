"""Imports `tasks.json` and `quality.db` of versions before 2026-12-08 into the database, on the first start.

Each file is renamed to `*.imported` afterwards. A file is not imported if its tables already have rows, so that a crash
before the renaming does no harm.
"""

from __future__ import annotations

import json
import logging
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.errors import StoreFailed
from server.database.connection import Database
from server.database.tables import (
    answers,
    best_candidates,
    deleted_tasks,
    example_scores,
    mixes,
    score_hours,
    task_owners,
    tasks,
    traffic_hours,
)

log = logging.getLogger(__name__)

CHUNK = 10_000
BUCKETS = 184
"""Buckets of a latency histogram."""


def import_legacy_tasks(state_dir: Path, database: Database) -> None:
    """Import both files if they exist. Raises StoreFailed if one cannot be read; nothing is imported from it then."""
    for name, load in (("tasks.json", _import_tasks), ("quality.db", _import_quality)):
        file = state_dir / name
        if not file.exists():
            continue
        try:
            with database.transaction() as connection:
                load(file, connection)
            file.rename(file.with_name(f"{name}.imported"))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError, sqlite3.Error) as error:
            raise StoreFailed(f"{file} cannot be imported ({error}); restore it from a backup or remove it") from error
        log.info("%s was imported into the database", name)


def _is_empty(connection: Connection, *tables: sa.Table) -> bool:
    return all(connection.execute(sa.select(table).limit(1)).first() is None for table in tables)


def _insert(connection: Connection, table: sa.Table, rows: Iterator[dict[str, Any]]) -> None:
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == CHUNK:
            connection.execute(sa.insert(table), batch)
            batch = []
    if batch:
        connection.execute(sa.insert(table), batch)


def _import_tasks(file: Path, connection: Connection) -> None:
    if not _is_empty(connection, tasks, deleted_tasks, task_owners):
        return
    stored = json.loads(file.read_text(encoding="utf-8"))
    by_name = set(stored.get("own", ()))
    bodies: dict[str, Any] = stored["tasks"]
    _insert(
        connection,
        tasks,
        (
            {"name": name, "body": body, "by_name": name in by_name or body.get("route") is None}
            for name, body in bodies.items()
        ),
    )
    deleted: dict[str, Any] = stored["deleted"]  # a single mark in the oldest versions
    marks = ({"name": n, "marks": [m] if isinstance(m, str) else m} for n, m in deleted.items())
    _insert(connection, deleted_tasks, marks)
    owners: dict[str, str] = stored.get("owners", {})
    _insert(connection, task_owners, ({"task": task, "adapter": adapter} for task, adapter in owners.items()))


def _import_quality(file: Path, connection: Connection) -> None:
    if not _is_empty(connection, mixes, best_candidates):
        return
    with closing(sqlite3.connect(file)) as old:
        old.row_factory = sqlite3.Row

        def rows(sql: str) -> Iterator[dict[str, Any]]:
            return (dict(row) for row in old.execute(sql))

        ids: dict[int, int] = {}
        for row in rows("SELECT *, id IN (SELECT subject FROM made_up) AS client_defined FROM subjects ORDER BY id"):
            old_id, client_defined = row.pop("id"), bool(row.pop("client_defined"))
            inserted = connection.execute(sa.insert(mixes).values(**row, client_defined=client_defined))
            ids[old_id] = inserted.inserted_primary_key[0]  # type: ignore[index]

        def of_mixes(sql: str) -> Iterator[dict[str, Any]]:
            return (row | {"mix_id": ids[row.pop("subject")]} for row in rows(sql) if row["subject"] in ids)

        scored = "SELECT answers.*, value AS score FROM answers LEFT JOIN scores ON scores.id = answers.id"
        _insert(connection, answers, of_mixes(scored))
        _insert(connection, score_hours, of_mixes("SELECT * FROM hours"))
        # The key of an example was followed by the digest of its context, in the first versions by nothing.
        examples = (
            {**row, "example": row["example"][:16], "context": row["example"][16:]}
            for row in of_mixes("SELECT * FROM examples")
        )
        _insert(connection, example_scores, examples)
        traffic = (
            {**row, **{kind: _histogram(row[kind]) for kind in ("ttft", "tpot", "e2e")}}
            for row in of_mixes("SELECT * FROM traffic")
        )
        _insert(connection, traffic_hours, traffic)
        _insert(connection, best_candidates, rows("SELECT * FROM decisions"))


def _histogram(dump: bytes) -> bytes:
    """A histogram as pairs of bucket (1 byte) and count (4 bytes); it may have been the counts of all buckets."""
    if len(dump) != 4 * BUCKETS:
        return dump
    counts = (dump[i : i + 4] for i in range(0, len(dump), 4))
    return b"".join(bytes([bucket]) + count for bucket, count in enumerate(counts) if any(count))
