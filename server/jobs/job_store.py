"""`Job` and `JobStore`: what is known of each job, on disk so that it outlives the server.

Owns `jobs/` in the state directory. A job's state is one file, replaced whole; its events are a journal, to which
lines are added. What a job does, and when, is not known here.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from adapters.atomic_files import known_fields, refused, replace_file
from adapters.errors import StoreFailed, encodable

log = logging.getLogger(__name__)

TRAINING, EVALUATION = "training", "evaluation"
QUEUED, VALIDATING, RUNNING, PAUSED = "queued", "validating_files", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
OVER = frozenset({SUCCEEDED, FAILED, CANCELLED})
ACTIVE = frozenset({VALIDATING, RUNNING})

MOST_OVER = 2000
"""Jobs that are over and still told of, the oldest going first: of each kind, and of those that have failed and could
go on, which keep the most, so that no number of others takes that away."""
STATE, EVENTS = "job.json", "events.jsonl"
CURVES = ("train_loss", "train_mean_token_accuracy", "valid_loss", "valid_mean_token_accuracy")
"""What events tell of a step, as OpenAI's result files have it."""
OURS = re.compile(r"[a-z]+-[0-9a-f]{24}")
"""The names of folders that are made here: the ids of jobs."""
TRAINING_ID = re.compile(r"ftjob-[0-9a-f]{24}")
"""Those of training jobs. Their results are measured under them, so nothing else is called so."""


@dataclass
class Progress:
    """How far a job is. Of an evaluation, steps are examples; `loss` is the last one of training.

    `most_tokens` is what `tokens` was at most: a run that goes on from a checkpoint has fewer again.
    """

    step: int = 0
    steps: int = 0
    loss: float | None = None
    tokens: int = 0
    most_tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.most_tokens = max(self.most_tokens, self.tokens)  # records of before have none

    @property
    def share(self) -> float:
        return min(1.0, self.step / self.steps) if self.steps else 0.0


@dataclass
class Job:
    """`name` is what the result is called (training), or the task (evaluation). `request` is what was asked, checked.

    `place` is where it stands among the others by their times of creation, if that is not its own: 0 where it is.
    `trained` is what the training process told at its end; with it, only evaluation and publishing are left. `pausing`
    and `cancelling` are wishes that the work has not come to yet; they outlive the server, so that the job does not go
    on. `interrupted` counts servers that have ended in its midst, since its last checkpoint or since it was resumed.
    """

    id: str
    kind: str
    name: str
    request: dict[str, Any]
    status: str = QUEUED
    created_at: float = field(default_factory=time.time)
    place: float = 0.0
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
    def over(self) -> bool:
        return self.status in OVER

    @property
    def resumable(self) -> bool:
        """Whether it has failed, and could go on."""
        return self.status == FAILED and self.kind == TRAINING

    @property
    def order(self) -> float:
        return self.place or self.created_at


def _told(job: Job) -> dict[str, Any]:
    """A job's record, without what its reader finds out by itself: versions before 2026-11-29 know no `most_tokens`."""
    told = asdict(job)
    if job.progress.most_tokens == job.progress.tokens:
        del told["progress"]["most_tokens"]
    return told


def _read(written: bytes) -> Any:
    """What was written here. Messages of before 2026-12-02 may quote half of a surrogate pair from a file, and whoever
    was sent one of them would be sent nothing.
    """
    found = json.loads(written)
    return _encodable(found) if b"\\ud" in written else found


def _encodable(value: Any) -> Any:
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, dict):
        return {encodable(key): _encodable(inner) for key, inner in value.items()}
    return [_encodable(inner) for inner in value] if isinstance(value, list) else value


class JobStore:
    """Jobs and their events by id. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self.jobs: dict[str, Job] = {}
        for part in folder.glob("*-*"):
            with contextlib.suppress(OSError):  # what cannot be looked into stays
                if OURS.fullmatch(part.name) and not (part / STATE).exists():
                    if (part / EVENTS).exists():
                        log.error("the record of job %s is gone, and it is left out; its folder stays", part.name)
                    else:  # the server's end kept it from being entered
                        shutil.rmtree(part, ignore_errors=True)
        for file in sorted(folder.glob(f"*/{STATE}")):
            try:
                raw = _read(file.read_bytes())
                progress = Progress(**known_fields(Progress, raw["progress"]))
                job = Job(**{**known_fields(Job, raw), "progress": progress})
                if job.id != file.parent.name:  # the job itself may be elsewhere than when somebody copied its folder
                    raise ValueError(f"it is a copy of {job.id}")
            except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
                log.error("the record of job %s cannot be read and is left out: %s", file.parent.name, error)
                continue
            self.jobs[job.id] = job

    def prepare(self, kind: str, name: str, request: Mapping[str, Any], prefix: str, files: Mapping[str, bytes]) -> Job:
        """A job with a folder and these files in it, which nobody sees before `enter`. An empty name is made of the id.

        Raises StoreFailed, and leaves nothing then.
        """
        id = f"{prefix}-{uuid.uuid4().hex[:24]}"
        job = Job(id, kind, name or f"ft-{id}", dict(request))
        try:
            with refused("the job"):
                self._folder.mkdir(parents=True, exist_ok=True)
                self.folder(id).mkdir(mode=0o700)  # data to learn and to judge by is nobody else's on the machine
                for file, content in files.items():
                    (self.folder(id) / file).write_bytes(content)
        except StoreFailed:
            self._drop(job)
            raise
        return job

    def enter(self, job: Job) -> None:
        """Make a prepared job known, on disk first. Raises StoreFailed, and leaves nothing then.

        Its place is behind that of every job that is not over, though the clock may have been set back.
        """
        newest = max((known.order for known in self.jobs.values() if not known.over), default=0.0)
        if job.created_at <= newest:
            job.place = math.nextafter(newest, math.inf)
        try:
            self.save(job)
        except StoreFailed:
            self._drop(job)
            raise
        over = [known for known in self.jobs.values() if known.over and known.kind == job.kind]
        over.sort(key=lambda known: known.finished_at or 0.0)
        alike = ([known for known in over if known.resumable], [known for known in over if not known.resumable])
        gone = {known.id: known for those in alike for known in those[: -MOST_OVER + 1]}
        with self._lock:
            self.jobs = {id: known for id, known in self.jobs.items() if id not in gone} | {job.id: job}
        for known in gone.values():
            if known.resumable:
                log.warning("job %s, which has failed, can go on no more: others have since; it is deleted", known.id)
            self._drop(known)

    def remove(self, job: Job, name: str) -> None:
        """Delete a file or a folder of a job, if it is there and the disk lets it go."""
        path = self.folder(job.id) / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def _drop(self, job: Job) -> None:
        shutil.rmtree(self.folder(job.id), ignore_errors=True)

    def folder(self, id: str) -> Path:
        """Where all that belongs to a job lies."""
        return self._folder / id

    def all(self) -> list[Job]:
        """Oldest first."""
        return sorted(self.jobs.values(), key=lambda job: (job.order, job.id))

    def save(self, job: Job) -> None:
        """Replace a job's state on disk. Raises StoreFailed."""
        with self._lock:
            try:
                replace_file(self.folder(job.id) / STATE, json.dumps(_told(job)).encode())
            except OSError as error:
                raise StoreFailed(f"the job's record cannot be written: {error.strerror}") from None

    def note(
        self,
        job: Job,
        message: str,
        *,
        level: str = "info",
        type: str = "message",
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Add an event. A disk that refuses it costs the event and a log line."""
        event = {"at": time.time(), "level": level, "message": message, "type": type, "data": dict(data or {})}
        with self._lock:
            try:
                with (self.folder(job.id) / EVENTS).open("ab") as out:
                    out.write(b"\n" + json.dumps(event).encode())  # a line that a kill cut short spoils no other
            except OSError as error:
                log.error("an event of job %s cannot be written: %s", job.id, error)

    def events(self, id: str) -> list[dict[str, Any]]:
        """A job's events, oldest first, each with the `id` that its place gives it."""
        try:
            lines = (self.folder(id) / EVENTS).read_bytes().split(b"\n")
        except OSError:
            return []
        found = []
        for number, line in enumerate(lines):
            try:
                event = _read(line)
            except ValueError:
                continue  # cut short by a kill
            found.append({**event, "id": f"ftevent-{id.partition('-')[2]}-{number}"})
        return found
