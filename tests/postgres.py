"""A PostgreSQL server for one test session, and empty databases on it."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL, make_url

from tests.conftest import part_missing


def _as_postgres(*command: object) -> list[str]:
    """PostgreSQL refuses to run as root."""
    words = [str(word) for word in command]
    return ["runuser", "-u", "postgres", "--", *words] if os.geteuid() == 0 else words


@pytest.fixture(scope="session")
def postgres() -> Iterator[Callable[[], URL]]:
    """Creates an empty database and returns its URL. The server listens on a socket in a temporary folder only."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not installed:
        part_missing("PostgreSQL is not installed")
    binaries = installed[-1]
    folder = Path(subprocess.check_output(_as_postgres("mktemp", "-d", "/tmp/pg-XXXXXX"), text=True).strip())
    data = folder / "data"
    options = f"-c listen_addresses= -c unix_socket_directories={folder}"
    try:
        for command in (
            [binaries / "initdb", "-D", data, "-A", "trust", "-U", "postgres"],
            [binaries / "pg_ctl", "-D", data, "-l", folder / "log", "-w", "-o", options, "start"],
        ):
            subprocess.run(_as_postgres(*command), check=True, capture_output=True)
        server = make_url(f"postgresql+psycopg://postgres@/postgres?host={folder}")

        def create() -> URL:
            import psycopg

            name = f"test_{os.urandom(6).hex()}"
            with psycopg.connect(server.set(drivername="postgresql").render_as_string(False), autocommit=True) as open_:
                open_.execute(f"CREATE DATABASE {name}")  # type: ignore[arg-type]
            return server.set(database=name)

        yield create
    finally:
        subprocess.run(_as_postgres(binaries / "pg_ctl", "-D", data, "-m", "immediate", "stop"), capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)
