"""Databases for tests of tasks and quality."""

from tests.server.database.conftest import database, postgres, url

__all__ = ["database", "postgres", "url"]
