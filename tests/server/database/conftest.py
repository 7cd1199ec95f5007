"""Databases to test on: SQLite in a folder, and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy.engine import URL

from server.database import Database, database_url
from tests.postgres import postgres  # noqa: F401


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> URL:
    """An empty database of each kind."""
    return database_url(None, tmp_path) if request.param == "sqlite" else request.getfixturevalue("postgres")()


@pytest.fixture
def database(url: URL) -> Iterator[Database]:
    """An empty database of each kind, at the current schema."""
    opened = Database(url)
    yield opened
    opened.close()
