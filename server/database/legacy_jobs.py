"""Imports the records of jobs and files that earlier versions kept as JSON files.

These are `jobs/<id>/job.json`, `jobs/<id>/events.jsonl` and `files/<id>/file.json`. An imported record gets the suffix
`.imported`. Contents of files stay where they are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from adapters.errors import valid_unicode
from server.database.connection import Database
from server.database.tables import files, job_events, jobs

log = logging.getLogger(__name__)

IMPORTED = ".imported"


def import_jobs(database: Database, state_dir: Path) -> None:
    """Import the jobs and files of a state directory. Records that cannot be read are logged and left where they are.

    Raises:
        StoreFailed: The database refused; nothing is imported.
    """
    found_jobs = sorted(_records(state_dir / "jobs", "job.json"), key=lambda found: _job_order(found[1]))
    found_files = sorted(_records(state_dir / "files", "file.json"), key=_file_order)
    if not found_jobs and not found_files:
        return
    with database.transaction() as connection:
        known = {*connection.scalars(sa.select(jobs.c.id)), *connection.scalars(sa.select(files.c.id))}
        last = connection.scalar(sa.select(sa.func.max(jobs.c.sequence))) or 0
        for sequence, (path, record) in enumerate(found_jobs, last + 1):
            if record["id"] not in known:
                connection.execute(sa.insert(jobs).values(sequence=sequence, **_job_row(record)))
                if events := [_event_row(record["id"], event) for event in _events(path.with_name("events.jsonl"))]:
                    connection.execute(sa.insert(job_events), events)
        last = connection.scalar(sa.select(sa.func.max(files.c.sequence))) or 0
        for sequence, (_, record) in enumerate(found_files, last + 1):
            if record["id"] not in known:
                row = {name: record[name] for name in ("id", "filename", "purpose", "bytes", "created_at")}
                connection.execute(sa.insert(files).values(sequence=sequence, **row))
    for path, _ in (*found_jobs, *found_files):
        path.rename(path.with_name(path.name + IMPORTED))
    log.info("imported %d jobs and %d files of an earlier version", len(found_jobs), len(found_files))


def _parse(text: str) -> Any:
    """JSON, with None for NaN and infinity, which the JSON of a database cannot represent."""
    return json.loads(text, parse_constant=lambda name: None)


def _records(folder: Path, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The readable records with this file name, in folders that are named by the record's id."""
    convert = _job_row if name == "job.json" else lambda record: record["created_at"]
    for path in folder.glob(f"*/{name}"):
        try:
            record = _parse(path.read_text(encoding="utf-8"))
            if record["id"] != path.parent.name:
                raise ValueError(f"it belongs to {record['id']}")
            convert(record)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.error("the record %s/%s of an earlier version is not imported: %s", path.parent.name, name, error)
        else:
            yield path, record


def _file_order(found: tuple[Path, Mapping[str, Any]]) -> tuple[int, int]:
    path, record = found
    return record["created_at"], path.stat().st_mtime_ns  # several files may have been added within a second


def _job_order(record: Mapping[str, Any]) -> tuple[float, str]:
    return record.get("place") or record["created_at"], record["id"]


def _job_row(record: Mapping[str, Any]) -> dict[str, Any]:
    request = dict(record["request"])
    if record["kind"] == "training":  # fields that older versions did not have
        unknown = {"name": "unknown", "id": ""}
        request = {"template": {}, "route": None, "metadata": None, "base": unknown} | request
    progress, error = record["progress"], record.get("error")
    state = {
        "request": request,
        "progress": {name: progress[name] for name in ("step", "steps", "loss", "tokens", "seconds")}
        | {"counted_tokens": max(progress.get("most_tokens", 0), progress["tokens"])},
        "error": error and {**error, "message": valid_unicode(error["message"])},
        "trained": _trained(record.get("trained")),
        "result": record.get("result") or {},
        "started_at": record.get("started_at"),
        "finished_at": record.get("finished_at"),
        "pausing": record.get("pausing", False),
        "cancelling": record.get("cancelling", False),
        "interrupted": record.get("interrupted", 0),
    }
    columns = {name: record[name] for name in ("id", "kind", "name", "status", "created_at")}
    return {**columns, "state": state}


def _trained(message: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The last message of a training process, with today's names."""
    if message is None:
        return None
    names = {"made": "training", "rival": "replaced", "rival_digest": "replaced_digest"}
    renamed = {names.get(key, key): value for key, value in message.items()}
    if losses := renamed.get("losses"):
        renamed["losses"] = {names.get(key, key): value for key, value in losses.items()}
    return renamed


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The events of a job. A kill may have truncated a line."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    for line in lines:
        try:
            event = _parse(line)
        except ValueError:
            continue
        yield event


def _event_row(job_id: str, event: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: event[name] for name in ("at", "level", "type")}
    return {**row, "job_id": job_id, "message": valid_unicode(event["message"]), "data": event.get("data") or {}}
