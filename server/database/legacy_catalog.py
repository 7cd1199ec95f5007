"""Reads the catalog of versions without a database: `names.json`, and a `record.json` per stored version."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters.catalog_state import CatalogState, ImportedFolder, NameEntry, VersionRecord
from adapters.errors import StoreFailed
from adapters.weights import SHORT_DIGEST

log = logging.getLogger(__name__)

NAMES_FILE = "names.json"
FORMAT = 1
_DIGEST = re.compile(r"[0-9a-f]{64}")


def read_legacy_catalog(store: Path) -> tuple[CatalogState, dict[str, VersionRecord]]:
    """Read `names.json` and the records of the versions that it names.

    A version without a readable record is logged; it counts as missing from the store.

    Raises:
        StoreFailed: names.json cannot be read.
    """
    try:
        state = _state(json.loads((store / NAMES_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreFailed(
            f"{NAMES_FILE} in the store cannot be read ({error}); put a good copy back, or move it away to start "
            "without adapters"
        ) from error
    records = {}
    for digest in sorted(state.digests):
        try:
            records[digest] = _record(digest, store / "versions" / digest / "record.json")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.error("the record of version %s cannot be read: %s", digest[:SHORT_DIGEST], error)
    return state, records


def mark_migrated(store: Path) -> None:
    """Rename `names.json`, after its content was saved in the database."""
    os.replace(store / NAMES_FILE, store / f"{NAMES_FILE}.migrated")
    log.info("the adapter catalog was imported from %s", NAMES_FILE)


def _state(content: Mapping[str, Any]) -> CatalogState:
    if content["format"] != FORMAT:
        raise ValueError(f"unknown format {content['format']!r}")
    names = {
        name: NameEntry(
            _digests(entry["history"]),
            str(entry["source"]),
            float(entry["since"]),
            bool(entry["pinned"]),
            entry.get("below"),
        )
        for name, entry in content["names"].items()
    }
    folders = {
        key: ImportedFolder(
            str(folder["digest"]),
            tuple((str(f), int(s), int(m), int(c), int(i)) for f, s, m, c, i in folder["signature"]),
        )
        for key, folder in content["taken"].items()
    }
    return CatalogState(names, folders)


def _digests(values: Any) -> tuple[str, ...]:
    digests = tuple(values)
    if not digests or not all(isinstance(digest, str) and _DIGEST.fullmatch(digest) for digest in digests):
        raise ValueError("a digest must have 64 hex digits")
    return digests


def _record(digest: str, file: Path) -> VersionRecord:
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["digest"] != digest:
        raise ValueError("it belongs to another version")
    modules = {path: (int(r), int(o), int(i)) for path, (r, o, i) in content["modules"].items()}
    metadata, by_name = dict(content.get("metadata", {})), dict(content.get("told", {}))
    return VersionRecord(digest, int(content["nbytes"]), modules, metadata, float(content["created_at"]), by_name)
