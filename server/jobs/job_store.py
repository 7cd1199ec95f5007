"""Job records and events in the database, and a folder of files for each job."""

from __future__ import annotations

import logging
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from adapters.atomic_files import store_errors
from adapters.errors import StoreFailed, valid_unicode
from server.database import Database
from server.database.tables import job_events, jobs

log = logging.getLogger(__name__)

TRAINING, EVALUATION = "training", "evaluation"
QUEUED, VALIDATING, RUNNING, PAUSED = "queued", "validating_files", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
FINISHED = frozenset({SUCCEEDED, FAILED, CANCELLED})
ACTIVE = frozenset({VALIDATING, RUNNING})

MAX_FINISHED = 2000
"""Finished jobs of each kind that are kept. The jobs that finished first are deleted first."""
TRAINING_ID = re.compile(r"ftjob-[0-9a-f]{24}")
"""Ids of training jobs. A result is served under its job's id while it is evaluated, so these names are reserved."""
METRICS = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""Metrics of a training step in events of the type "metrics", named as in OpenAI's result files."""


@dataclass
class Progress:
    """Progress of a job. A step is one optimizer step (training) or one example (evaluation).

    `loss` is the last training loss. `counted_tokens` is the maximum of `tokens` so far. It never falls, although
    `tokens` falls when training resumes from an earlier checkpoint.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens: int = 0
    counted_tokens: int = 0
    seconds: float = 0.0

    @property
    def fraction(self) -> float:
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass
class Job:
    """The record of a job.

    Attributes:
        name: Name of the result (training) or of the task (evaluation).
        request: The validated request.
        trained: The training process's last message. With it, only evaluation and publishing are left to do.
        pausing: A pause was requested and the work has not stopped yet.
        cancelling: A cancel was requested and the work has not stopped yet.
        interrupted: How often the server ended while the job ran, since its last checkpoint or resume.
    """

    id: str
    kind: str
    name: str
    request: dict[str, Any]
    status: str = QUEUED
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    error: dict[str, Any] | None = None
    progress: Progress = field(default_factory=Progress)
    trained: dict[str, Any] | None = None
    result: dict[str, Any] = field(default_factory=dict)
    pausing: bool = False
    cancelling: bool = False
    interrupted: int = 0

    @property
    def finished(self) -> bool:
        return self.status in FINISHED

    @property
    def resumable(self) -> bool:
        """Whether the job has failed and can be resumed from its checkpoint."""
        return self.status == FAILED and self.kind == TRAINING


class JobStore:
    """All jobs, in memory and in the database. Thread-safe.

    Args:
        database: Holds records and events.
        folder: Holds one folder of files for each job.

    Attributes:
        jobs: Jobs by id, oldest first.
    """

    def __init__(self, database: Database, folder: Path) -> None:
        self._database, self._folder = database, folder
        self._lock = threading.Lock()
        with database.read() as connection:
            rows = connection.execute(sa.select(jobs).order_by(jobs.c.sequence)).mappings().all()
        self.jobs: dict[str, Job] = {row["id"]: _job(row) for row in rows}

    def create(
        self,
        kind: str,
        name: str,
        request: Mapping[str, Any],
        prefix: str,
        write_files: Callable[[Path], object] = lambda folder: None,
    ) -> Job:
        """Create a queued job. It is in the database when this returns.

        Args:
            name: Empty for a name made from the job's id.
            prefix: The first part of the job's id.
            write_files: Called with the job's folder before the job becomes visible.

        Raises StoreFailed if the disk or the database refuses; nothing is left of the job then.
        """
        id = f"{prefix}-{uuid.uuid4().hex[:24]}"
        job = Job(id, kind, name or f"ft-{id}", dict(request))
        try:
            with store_errors("the job's files"):
                self._folder.mkdir(parents=True, exist_ok=True)
                self.folder(id).mkdir(mode=0o700)  # training data is private to this user
                write_files(self.folder(id))
            with self._lock:
                with self._database.transaction() as connection:
                    last = connection.scalar(sa.select(sa.func.max(jobs.c.sequence)))
                    connection.execute(sa.insert(jobs).values(id=id, sequence=(last or 0) + 1, **_columns(job)))
                self.jobs[id] = job
        except BaseException:
            shutil.rmtree(self.folder(id), ignore_errors=True)
            raise
        self._delete_old(kind)
        return job

    def folder(self, id: str) -> Path:
        """The folder of a job's files."""
        return self._folder / id

    def all(self) -> list[Job]:
        """All jobs, oldest first."""
        return list(self.jobs.values())

    def save(self, job: Job) -> None:
        """Write a job's record. Raises StoreFailed."""
        with self._lock, self._database.transaction() as connection:
            connection.execute(sa.update(jobs).where(jobs.c.id == job.id).values(**_columns(job)))

    def add_event(
        self,
        job: Job,
        message: str,
        *,
        level: str = "info",
        type: str = "message",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an event. If the database refuses, the event is logged and lost."""
        try:
            with self._database.transaction() as connection:
                connection.execute(
                    sa.insert(job_events).values(
                        job_id=job.id,
                        at=time.time(),
                        level=level,
                        type=type,
                        message=valid_unicode(message),
                        data=dict(data or {}),
                    )
                )
        except StoreFailed as error:
            log.error("an event of job %s is lost (%s): %s", job.id, message, error.message)

    def events(self, id: str) -> list[dict[str, Any]]:
        """A job's events, oldest first, each with a unique `id`. Raises StoreFailed."""
        with self._database.read() as connection:
            query = sa.select(job_events).where(job_events.c.job_id == id).order_by(job_events.c.id)
            rows = connection.execute(query).mappings().all()
        prefix = f"ftevent-{id.partition('-')[2]}"
        return [
            {key: row[key] for key in ("at", "level", "type", "message", "data")} | {"id": f"{prefix}-{row['id']}"}
            for row in rows
        ]

    def _delete_old(self, kind: str) -> None:
        finished = [job for job in self.all() if job.finished and job.kind == kind]
        finished.sort(key=lambda job: job.finished_at or 0.0)
        for job in finished[:-MAX_FINISHED]:
            try:
                with self._lock, self._database.transaction() as connection:
                    connection.execute(sa.delete(jobs).where(jobs.c.id == job.id))
            except StoreFailed as error:
                log.error("the finished job %s is not deleted: %s", job.id, error.message)
                return
            del self.jobs[job.id]
            shutil.rmtree(self.folder(job.id), ignore_errors=True)


_COLUMNS = ("kind", "name", "status", "created_at")


def _columns(job: Job) -> dict[str, Any]:
    fields = asdict(job)
    del fields["id"]
    return {name: fields.pop(name) for name in _COLUMNS} | {"state": fields}


def _job(row: sa.RowMapping) -> Job:
    state = dict(row["state"])
    progress = Progress(**state.pop("progress"))
    return Job(id=row["id"], **{name: row[name] for name in _COLUMNS}, progress=progress, **state)
