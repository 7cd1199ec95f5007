"""Databases to test on: SQLite in a folder, and a PostgreSQL server of the test run's own where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from glob import glob
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, make_url

from server.database import Database, database_url

BINARIES = sorted(glob("/usr/lib/postgresql/*/bin"))


def _as_postgres(command: list[str]) -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[URL]:
    """The URL of a PostgreSQL server that listens on a socket in a temporary folder."""
    if not BINARIES:
        assert not os.environ.get("REQUIRE_ALL"), "PostgreSQL is not installed"
        pytest.skip("PostgreSQL is not installed")
    folder = Path(subprocess.check_output(_as_postgres(["mktemp", "-d", "/tmp/pg-XXXXXX"]), text=True).strip())
    binaries = Path(BINARIES[-1])
    try:
        subprocess.run(
            _as_postgres([str(binaries / "initdb"), "-D", f"{folder}/data", "-A", "trust", "-U", "postgres"]),
            check=True,
            capture_output=True,
        )
        options = f"-c listen_addresses= -c unix_socket_directories={folder}"
        subprocess.run(
            _as_postgres(
                [str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-l", f"{folder}/log", "-w", "-o", options, "start"]
            ),
            check=True,
            capture_output=True,
        )
        yield make_url(f"postgresql+psycopg://postgres@/postgres?host={folder}")
    finally:
        subprocess.run(
            _as_postgres([str(binaries / "pg_ctl"), "-D", f"{folder}/data", "-m", "immediate", "stop"]),
            capture_output=True,
        )
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[URL]:
    """An empty database of each kind."""
    if request.param == "sqlite":
        yield database_url(None, tmp_path)
        return
    import psycopg

    server: URL = request.getfixturevalue("postgres")
    name = f"test_{os.urandom(6).hex()}"
    with psycopg.connect(server.set(drivername="postgresql").render_as_string(False), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
    yield server.set(database=name)


@pytest.fixture
def database(url: URL) -> Iterator[Database]:
    """An empty database of each kind, at the current schema."""
    opened = Database(url)
    yield opened
    opened.close()
