"""`SqlCatalog`: saves the adapter catalog in the database."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from adapters.catalog_state import CatalogState, ImportedFolder, NameEntry, VersionRecord
from server.database.connection import Database
from server.database.legacy_catalog import NAMES_FILE, mark_migrated, read_legacy_catalog
from server.database.tables import adapter_versions, adapters, imported_folders


class SqlCatalog:
    """The `CatalogBackend` of a server.

    Args:
        database: the database.
        legacy_store: a store folder that may hold the catalog of an older version in `names.json`. It is imported if
            the database has no catalog, and the file is renamed.
    """

    def __init__(self, database: Database, legacy_store: Path | None = None) -> None:
        self._database = database
        self._legacy_store = legacy_store
        self._saved = CatalogState()

    def load(self) -> tuple[CatalogState, Mapping[str, VersionRecord]]:
        """Return the saved state and the records of its versions. Raises StoreFailed."""
        with self._database.read() as connection:
            names = {row.name: _name_entry(row) for row in connection.execute(sa.select(adapters))}
            folders = {row.folder: _folder(row) for row in connection.execute(sa.select(imported_folders))}
            records = {row.digest: _record(row) for row in connection.execute(sa.select(adapter_versions))}
        self._saved = CatalogState(names, folders)
        store = self._legacy_store
        if store is not None and not names and not folders and (store / NAMES_FILE).exists():
            state, records = read_legacy_catalog(store)
            self.save(state, list(records.values()))
            mark_migrated(store)
        return self._saved, records

    def save(self, state: CatalogState, records: Sequence[VersionRecord] = ()) -> None:
        """Save `state` and `records` in one transaction. Raises StoreFailed; nothing has changed then."""
        database, before = self._database, self._saved
        with database.transaction() as connection:
            for record in records:
                connection.execute(database.upsert(adapter_versions, **_record_values(record)))
            for name, entry in state.names.items():
                if before.names.get(name) != entry:
                    connection.execute(database.upsert(adapters, **_name_values(name, entry)))
            for key, folder in state.folders.items():
                if before.folders.get(key) != folder:
                    values = {"folder": key, "digest": folder.digest, "signature": folder.signature}
                    connection.execute(database.upsert(imported_folders, **values))
            _delete(connection, adapters.c.name, before.names.keys() - state.names.keys())
            _delete(connection, imported_folders.c.folder, before.folders.keys() - state.folders.keys())
            _delete(connection, adapter_versions.c.digest, before.digests - state.digests)
        self._saved = state


def _delete(connection: Connection, key: sa.Column[str], values: set[str] | frozenset[str]) -> None:
    for value in values:
        connection.execute(sa.delete(key.table).where(key == value))


def _name_values(name: str, entry: NameEntry) -> dict[str, Any]:
    return {
        "name": name,
        "history": list(entry.history),
        "source": entry.source,
        "since": entry.since,
        "pinned": entry.pinned,
        "replaced": entry.replaced,
    }


def _record_values(record: VersionRecord) -> dict[str, Any]:
    return {
        "digest": record.digest,
        "nbytes": record.nbytes,
        "modules": dict(record.modules),
        "metadata": dict(record.metadata),
        "metadata_by_name": dict(record.metadata_by_name),
        "created_at": record.created_at,
    }


def _name_entry(row: Any) -> NameEntry:
    return NameEntry(tuple(row.history), row.source, row.since, row.pinned, row.replaced)


def _folder(row: Any) -> ImportedFolder:
    return ImportedFolder(row.digest, tuple((f, s, m, c, i) for f, s, m, c, i in row.signature))


def _record(row: Any) -> VersionRecord:
    modules = {path: (rank, out, into) for path, (rank, out, into) in row.modules.items()}
    return VersionRecord(row.digest, row.nbytes, modules, row.metadata, row.created_at, row.metadata_by_name)
