"""Alembic's entry point. The connection is given by `Database`; the command line uses `sqlalchemy.url`."""

from alembic import context
from sqlalchemy import create_engine

from server.database.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    with create_engine(
        context.config.get_main_option("sqlalchemy.url", "sqlite:///data/loramux.db")
    ).begin() as connection:
        context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
        context.run_migrations()
else:
    context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
    context.run_migrations()
