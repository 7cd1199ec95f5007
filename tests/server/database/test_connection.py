"""Transactions, upserts, migrations and errors of the database, on SQLite and on PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import URL

from adapters.errors import StoreFailed
from server.database import Database, database_url
from server.database.connection import MIGRATIONS, REVISION
from server.database.tables import metadata, task_owners
from server.errors import BadSetting


def owners(database: Database) -> dict[str, str]:
    with database.read() as connection:
        return {row.task: row.adapter for row in connection.execute(sa.select(task_owners))}


def test_a_transaction_commits_at_its_end_and_rolls_back_on_an_exception(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute(sa.insert(task_owners).values(task="a", adapter="x"))
    with pytest.raises(RuntimeError), database.transaction() as connection:
        connection.execute(sa.insert(task_owners).values(task="b", adapter="x"))
        raise RuntimeError
    assert owners(database) == {"a": "x"}


def test_an_upsert_inserts_or_replaces(database: Database) -> None:
    for adapter in ("x", "y"):
        with database.transaction() as connection:
            connection.execute(database.upsert(task_owners, task="a", adapter=adapter))
    assert owners(database) == {"a": "y"}


def test_a_refused_statement_is_an_error_that_names_the_reason(database: Database) -> None:
    with (
        pytest.raises(StoreFailed, match="the database refuses: .*nothing was changed"),
        database.transaction() as connection,
    ):
        for _ in range(2):
            connection.execute(sa.insert(task_owners).values(task="a", adapter="x"))
    assert owners(database) == {}


def test_the_schema_that_migrations_make_is_that_of_the_tables(database: Database) -> None:
    with database.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_the_latest_migration_is_the_revision_that_this_version_expects() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == REVISION


def test_data_is_there_when_the_database_is_opened_again(url: URL) -> None:
    first = Database(url)
    with first.transaction() as connection:
        connection.execute(sa.insert(task_owners).values(task="a", adapter="x"))
    first.close()
    second = Database(url)
    assert owners(second) == {"a": "x"}
    second.close()


def test_a_database_of_a_newer_version_is_refused(url: URL) -> None:
    first = Database(url)
    with first.transaction() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    first.close()
    with pytest.raises(StoreFailed, match="9999 of a newer loramux"):
        Database(url)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "sqlite:////state/loramux.db"),
        ("sqlite:////elsewhere/x.db", "sqlite:////elsewhere/x.db"),
        ("postgresql://me@db/loramux", "postgresql+psycopg://me@db/loramux"),
    ],
)
def test_the_url_of_the_database(text: str | None, expected: str) -> None:
    assert str(database_url(text, Path("/state"))) == expected


@pytest.mark.parametrize(("text", "reason"), [("nothing", "is no URL"), ("mysql://host/x", "use sqlite or postgresql")])
def test_a_url_that_cannot_be_used_is_refused(text: str, reason: str) -> None:
    with pytest.raises(BadSetting, match=reason):
        database_url(text, Path("/state"))
