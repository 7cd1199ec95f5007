"""One SQL database for all state that is not adapter content: SQLite in the state directory, or PostgreSQL."""

from server.database.connection import Database, database_url

__all__ = ["Database", "database_url"]
