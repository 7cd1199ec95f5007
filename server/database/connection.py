"""`Database`: connections and transactions, on SQLite (WAL) or PostgreSQL, at the schema of this version."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL, Connection, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

from adapters.errors import StoreFailed
from server.errors import BadSetting

log = logging.getLogger(__name__)

REVISION = "0001"
"""The Alembic revision that this version reads and writes."""
MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30
"""How long a SQLite connection waits for another one's write."""


def database_url(url: str | None, state_dir: Path) -> URL:
    """The database of a server.

    Args:
        url: `--database-url`; None is SQLite in the state directory.
        state_dir: `--state-dir`.

    Raises:
        BadSetting: the URL cannot be parsed, or names a database that is neither SQLite nor PostgreSQL.
    """
    if url is None:
        return URL.create("sqlite", database=str(state_dir / "loramux.db"))
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise BadSetting("database_url is no URL; write postgresql://user@host/name", "database_url") from None
    backend = parsed.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise BadSetting(f"database_url names {backend}; use sqlite or postgresql", "database_url")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


class Database:
    """One SQL database. Thread-safe.

    Args:
        url: where it is; see `database_url`.

    Raises:
        StoreFailed: it cannot be opened, or a newer version of loramux has migrated it.
        BadSetting: the driver for PostgreSQL is not installed.
    """

    def __init__(self, url: URL) -> None:
        self.url = url
        try:
            self._engine = sa.create_engine(url, **_options(url))
        except (ImportError, NoSuchModuleError):
            raise BadSetting("PostgreSQL needs its driver: pip install 'loramux[postgres]'", "database_url") from None
        sa.event.listen(self._engine, "begin", _begin)
        if url.get_backend_name() == "sqlite":
            if url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            sa.event.listen(self._engine, "connect", _configure_sqlite)
        try:
            self._migrate()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """A transaction that commits at the end of the block and rolls back on any exception.

        Raises:
            StoreFailed: the database refuses; nothing of the block is written.
        """
        with _store_failed(), self._engine.connect().execution_options(write=True) as connection, connection.begin():
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view for reading.

        Raises:
            StoreFailed: the database cannot be read.
        """
        with _store_failed(), self._engine.connect() as connection, connection.begin():
            yield connection

    def upsert(self, table: sa.Table, **values: Any) -> sa.Executable:
        """A statement that inserts a row, or updates the row that has the same primary key."""
        insert = (sqlite if self.url.get_backend_name() == "sqlite" else postgresql).insert(table)
        keys = [column.name for column in table.primary_key]
        rest = {name: value for name, value in values.items() if name not in keys}
        statement: sa.Executable = insert.values(**values).on_conflict_do_update(index_elements=keys, set_=rest)
        return statement

    def close(self) -> None:
        self._engine.dispose()

    def _migrate(self) -> None:
        """Bring the schema to `REVISION`. Alembic is imported only if it is not there yet."""
        with self.read() as connection:
            found = None
            if sa.inspect(connection).has_table("alembic_version"):
                found = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
        if found == REVISION:
            return
        if found is not None and found > REVISION:
            raise StoreFailed(
                f"the database has the schema {found} of a newer loramux, and this one knows {REVISION}; "
                "start the newer version, or use another --database-url or --state-dir"
            )
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.transaction() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, REVISION)
        log.info("the database is at schema %s", REVISION)


def _options(url: URL) -> dict[str, Any]:
    if url.get_backend_name() == "sqlite":
        return {"connect_args": {"timeout": BUSY_SECONDS}}
    return {"pool_pre_ping": True}


def _configure_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    if connection.dialect.name == "sqlite":
        # A write transaction takes the lock at once: one that upgrades later could fail without waiting.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


@contextmanager
def _store_failed() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        log.error("the database refused a statement: %s", reason)
        raise StoreFailed(f"the database refuses: {reason}; nothing was changed") from error
