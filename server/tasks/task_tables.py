"""Loads and saves what the database holds about tasks: definitions, deletions of folder tasks, and owners."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa

from adapters.errors import AdapterError
from server.database import Database
from server.database.tables import deleted_tasks, task_owners, tasks
from server.errors import ServerError
from server.tasks.definitions import FixedRoute, Task, parse

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredTasks:
    """Contents of the database. Replaced, never changed.

    Attributes:
        tasks: tasks of the API by name.
        deleted: name of a deleted folder task -> marks of the contents that brought it.
        owners: name of a folder task -> adapter that owns it.
    """

    tasks: Mapping[str, Task] = field(default_factory=dict)
    deleted: Mapping[str, list[str]] = field(default_factory=dict)
    owners: Mapping[str, str] = field(default_factory=dict)


def load(database: Database, reserved: Collection[str]) -> StoredTasks:
    """Read the database. Tasks with a reserved name or a bad definition are not loaded; their rows stay.

    Raises:
        StoreFailed: the database cannot be read.
    """
    with database.read() as connection:
        rows = connection.execute(sa.select(tasks)).all()
        deleted = {row.name: row.marks for row in connection.execute(sa.select(deleted_tasks))}
        owners = {row.task: row.adapter for row in connection.execute(sa.select(task_owners))}
    found: dict[str, Task] = {}
    for row in rows:
        if row.name in reserved:
            log.error("the task %r is not served: the base model has its name", row.name)
            continue
        try:
            task = parse(row.name, row.body, default_route=FixedRoute(), source="api")
        except (ServerError, AdapterError) as error:
            log.error("the stored task %r is not served: %s", row.name, error)
            continue
        found[row.name] = replace(task, by_name=row.by_name)
    return StoredTasks(found, deleted, owners)


def save(database: Database, before: StoredTasks, after: StoredTasks) -> None:
    """Write the rows that differ, in one transaction. Raises StoreFailed."""
    if after == before:
        return
    with database.transaction() as connection:
        for table, key_column, old, new in (
            (tasks, "name", _task_rows(before.tasks), _task_rows(after.tasks)),
            (deleted_tasks, "name", _rows("marks", before.deleted), _rows("marks", after.deleted)),
            (task_owners, "task", _rows("adapter", before.owners), _rows("adapter", after.owners)),
        ):
            changed = [{key_column: key, **row} for key, row in new.items() if row != old.get(key)]
            stale = [key for key, row in old.items() if row != new.get(key)]
            if stale:
                delete = sa.delete(table).where(table.c[key_column] == sa.bindparam("key"))
                connection.execute(delete, [{"key": key} for key in stale])
            if changed:
                connection.execute(sa.insert(table), changed)


def _task_rows(found: Mapping[str, Task]) -> dict[str, dict[str, Any]]:
    """Rows of the table `tasks`. The route of a `by_name` task is written once there is an adapter."""
    rows = {}
    for name, task in found.items():
        route = task.route.describe() if task.route.candidates or not task.by_name else None
        rows[name] = {"body": {**task.body(), "route": route}, "by_name": task.by_name}
    return rows


def _rows(column: str, values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {key: {column: value} for key, value in values.items()}
