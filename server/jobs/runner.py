"""`JobRunner`: what is queued, runs, and is over; one job of each kind at a time, in the order they came.

Owns states and who may change them: a client (cancel, pause, resume), the work itself, and the end of the server,
after which all that was queued or running is queued again, but for what may be why servers end. What a job does is its
`JobWork`'s.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from adapters.errors import AdapterError, StoreFailed, encodable
from server.errors import Conflict, ServerError, UnknownName
from server.jobs.errors import JobError, refused
from server.jobs.job_store import (
    ACTIVE,
    CANCELLED,
    FAILED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TRAINING,
    VALIDATING,
    Job,
    JobStore,
)
from server.jobs.worker_messages import NEEDED_TO_RUN, RESULT, UNFINISHED

log = logging.getLogger(__name__)

CLOSING = "closing"
MOST_INTERRUPTED = 3
"""Servers that end in the midst of a job before it has failed: one that takes its server along would do so for ever,
where something starts that again."""


class JobStopped(Exception):
    """The work has ended because it was asked to."""


def _nothing() -> None:
    """Between pieces of work there is nothing to end."""


class ActiveJob:
    """A job while it is worked on: what its work may do to it, and what is asked of the work meanwhile."""

    def __init__(self, job: Job, records: JobStore) -> None:
        self.job, self.records = job, records
        self.folder = records.folder(job.id)
        self.wanted: str | None = None
        """CANCELLED, PAUSED or CLOSING, once somebody wants the work to end."""
        self._lock = threading.Lock()
        self._stop: Callable[[], object] = _nothing
        self._kill: Callable[[], object] = _nothing

    def ask(self, wanted: str, now: bool = False) -> None:
        """Want the work to end, at its next checkpoint or `now`. The last word counts; nothing undoes a cancel.

        A pause or a cancel is in the job's record besides, and holds whatever is asked after it; a pause until it is
        taken back.
        """
        with self._lock:
            if self.wanted != CANCELLED:
                self.wanted = wanted
            (self._kill if now or self.wanted == CANCELLED else self._stop)()

    def stopped_by(self, stop: Callable[[], object], kill: Callable[[], object]) -> None:
        """How the present piece of work is ended; called at once if that is wanted already."""
        with self._lock:
            self._stop, self._kill = stop, kill
            if self.wanted is not None:
                (kill if self.wanted == CANCELLED else stop)()

    def check(self) -> None:
        """Between pieces of work. Raises JobStopped."""
        if self.wanted is not None:
            raise JobStopped

    def become(self, status: str) -> None:
        """Another status of a job that goes on."""
        self.job.status = status
        self.records.save(self.job)

    def note(self, message: str, **more: Any) -> None:
        """Add an event."""
        self.records.note(self.job, message, **more)


JobWork = Callable[[ActiveJob], None]
"""Does a job, from wherever it is. Raises JobError if it fails, JobStopped if it was asked to end."""


class JobRunner:
    """All jobs. Thread-safe. `works` has the work of each kind, each on a thread of its own."""

    def __init__(self, records: JobStore, works: Mapping[str, JobWork]) -> None:
        self.records = records
        self._unsaved: dict[str, Job] = {}
        """Those whose last turn the disk has refused."""
        self._works = dict(works)
        self._condition = threading.Condition()
        self._active: dict[str, ActiveJob] = {}
        self._closing = False
        for job in records.all():
            if job.status in ACTIVE:
                self._go_on(job)
            elif job.over:  # and what only it needed may be there still, if the server was killed just then
                self._clear(job)
        self._threads = [
            threading.Thread(target=self._run, args=(kind,), name=f"loramux-{kind}", daemon=True) for kind in works
        ]

    def _go_on(self, job: Job) -> None:
        """What becomes of a job in whose midst the server before has ended."""
        if job.cancelling:
            self._finish(job, CANCELLED, "Cancelled: that was asked before the server ended.")
            return
        message = "The server has started again; the job goes on from its last checkpoint."
        job.status = QUEUED
        if job.pausing:
            job.status, job.pausing = PAUSED, False
            message = "Paused: that was asked before the server ended."
        else:
            job.interrupted += 1
        if job.interrupted >= MOST_INTERRUPTED:
            message = f"the server ended {job.interrupted} times while this ran"
            message += ", with no new checkpoint between" if job.kind == TRAINING else ""
            message += "; memory that ran out or a step over --step-limit may be why, and its logs may tell; "
            message += "resume it to try again" if job.kind == TRAINING else "ask for it anew to try again"
            job.error = {"code": "server_ended", "message": message, "param": None}
            self._finish(job, FAILED, message)
            return
        with suppress(StoreFailed):  # a disk that is full: it will be said again at the next start
            self.records.save(job)
            self.records.note(job, message)

    def start(self) -> None:
        """Begin to work."""
        for thread in self._threads:
            thread.start()

    def close(self, drain: float) -> None:
        """Stop what runs, at a checkpoint, and leave it queued. What has not stopped after `drain` seconds is ended."""
        with self._condition:
            self._closing = True
            active = list(self._active.values())
            self._condition.notify_all()
        for one in active:
            one.ask(CLOSING)
        end = time.monotonic() + max(drain, 1.0)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))
        for one in active:
            one.ask(CLOSING, now=True)
        for thread in self._threads:
            if thread.is_alive():
                thread.join(10.0)
        self._keep_all()

    # ---- asked by clients

    def get(self, id: str) -> Job:
        """Raises UnknownName."""
        job = self.records.jobs.get(id)
        if job is None:
            raise UnknownName(f"there is no job {id[:64]!r}; GET /jobs lists them", "id")
        return job

    def enter(self, job: Job) -> Job:
        """Queue a job that has been prepared. Raises StoreFailed."""
        self.records.enter(job)
        self.records.note(job, "Created.")
        with self._condition:
            self._condition.notify_all()
        return job

    def cancel(self, id: str) -> Job:
        """End a job for good, one that has failed and could be resumed too: what it would go on from takes room.
        Raises UnknownName, Conflict if it is over.
        """
        with self._condition:
            job = self.get(id)
            if job.resumable:
                job.error = None
            else:
                self._open(id, "cancelled")
            active = self._active.get(id)
            if active is None:
                self._finish(job, CANCELLED, "Cancelled.")
            else:
                job.cancelling = True
                self._keep(job)
        if active is not None:
            active.ask(CANCELLED)
        return job

    def pause(self, id: str) -> Job:
        """Stop a job at a checkpoint until it is resumed. Raises UnknownName, Conflict."""
        with self._condition:
            job = self._open(id, "paused")
            if job.kind != TRAINING or job.trained is not None:
                raise Conflict(f"{id} has nothing left that could be paused; cancel it, or let it end", "id")
            active = self._active.get(id)
            if active is not None:
                if not job.pausing:
                    self.records.note(job, "A pause is asked for; the job stops after the step that runs.")
                job.pausing = True
                self._keep(job)
            elif job.status != PAUSED:
                self._turn(job, PAUSED, "Paused.")
        if active is not None:
            active.ask(PAUSED)
        return job

    def resume(self, id: str) -> Job:
        """Queue a job again that is paused, or that has failed: it goes on from its checkpoint. Raises Conflict,
        and UnknownName.

        A pause that the work has not come to is taken back: the work still stops there, and goes on at once.
        """
        with self._condition:
            job = self.get(id)
            if job.pausing:
                job.pausing = False
                self._keep(job)
                self.records.note(job, "Resumed before it was paused.")
                return job
            if job.status not in (PAUSED, FAILED) or job.kind != TRAINING:
                raise Conflict(f"{id} is {job.status}; only a job that is paused or has failed can be resumed", "id")
            job.error, job.finished_at, job.interrupted = None, None, 0
            self._turn(job, QUEUED, "Resumed; the job goes on from its last checkpoint.")
            self._condition.notify_all()
        return job

    def using(self, file_id: str) -> str | None:
        """A job that is not over and needs this file."""
        for job in self.records.all():
            if not job.over and file_id in (job.request.get("training_file"), job.request.get("validation_file")):
                return job.id
        return None

    def training(self) -> list[tuple[str, float, int, float]]:
        """Id, loss, most tokens and progress of every training job that has begun, for the metrics: oldest first, and
        those that are not over last."""
        return [
            (job.id, job.progress.loss, job.progress.most_tokens, job.progress.share)
            for job in sorted(self.records.all(), key=lambda job: not job.over)
            if job.kind == TRAINING and job.progress.loss is not None
        ]

    def _open(self, id: str, what: str) -> Job:
        job = self.get(id)
        if job.over:
            raise Conflict(f"{id} is over ({job.status}) and can not be {what}", "id")
        return job

    # ---- the threads

    def _run(self, kind: str) -> None:
        while True:
            with self._condition:
                job = self._next(kind)
                while job is None and not self._closing:
                    self._condition.wait()
                    job = self._next(kind)
                if self._closing or job is None:
                    return
                active = self._active[job.id] = ActiveJob(job, self.records)
                job.status = VALIDATING if kind == TRAINING and job.trained is None else RUNNING
                job.started_at = job.started_at or time.time()
            self._do(active, self._works[kind])

    def _next(self, kind: str) -> Job | None:
        return next((job for job in self.records.all() if job.kind == kind and job.status == QUEUED), None)

    def _do(self, active: ActiveJob, work: JobWork) -> None:
        job = active.job
        status, message, error = SUCCEEDED, "The job has succeeded.", None
        try:
            self.records.save(job)
            work(active)
        except JobStopped:
            status, message = QUEUED, "The server stops; the job goes on when it starts again."
            if not self._closing:
                message = f"The training process was stopped; the job goes on from step {job.progress.step}."
            if active.wanted == PAUSED:  # and taken back since; one that holds is seen below
                message = f"The job goes on from step {job.progress.step}."
        except JobError as failure:
            error = {"code": failure.code, "message": failure.message, "param": failure.param}
        except (AdapterError, ServerError) as failure:
            error = {"code": "failed", "message": encodable(failure.message), "param": failure.param}
        except OSError as failure:
            log.exception("job %s failed", job.id)
            error = {"code": "failed", "message": refused(failure), "param": None}
        except BaseException:  # a library's panic is no Exception, and the jobs behind this one wait for the thread
            log.exception("job %s failed", job.id)
            error = {
                "code": "internal",
                "message": "internal error; the log has more under the job's id",
                "param": None,
            }
        if error is not None:
            status, message, job.error = FAILED, str(error["message"]), error
        with self._condition:
            del self._active[job.id]
            if status in (QUEUED, FAILED) and job.cancelling:  # the wish holds, whatever else has stopped the work
                status, message, job.error = CANCELLED, "Cancelled.", None
            elif status == QUEUED and job.pausing:
                status, message = PAUSED, f"Paused at step {job.progress.step}."
            if status in (SUCCEEDED, FAILED, CANCELLED):
                self._finish(job, status, message)
            else:
                self._turn(job, status, message)

    def _finish(self, job: Job, status: str, message: str) -> None:
        """The end of a job."""
        job.finished_at = time.time()
        self._turn(job, status, message)

    def _turn(self, job: Job, status: str, message: str) -> None:
        """The event first: whoever sees the status finds it."""
        self.records.note(job, message, level="error" if status == FAILED else "info")
        job.status, job.pausing, job.cancelling = status, False, False
        self._keep(job)

    def _keep(self, job: Job) -> None:
        """Save a job, and those that could not be saved before: what is in memory goes on to be told."""
        self._unsaved[job.id] = job
        self._keep_all()

    def _keep_all(self) -> None:
        for job in list(self._unsaved.values()):
            try:
                self._save(job)
                self._unsaved.pop(job.id, None)
            except AdapterError as error:  # a full disk
                log.error("%s: %s; it is tried again with the next job's turn, and at the end", job.id, error.message)
                continue
            if job.over:
                self._clear(job)

    def _save(self, job: Job) -> None:
        try:
            self.records.save(job)
        except AdapterError:
            if job.status != CANCELLED:
                raise
            self._clear(job)  # which nobody wants, and is how people make room
            self.records.save(job)

    def _clear(self, job: Job) -> None:
        """What a run needs, and what it has made, are kept only where the job can be resumed: of a result, what is of
        use is served or among the files. Not before the end is on the disk: a job that the next server does not find
        over runs again.
        """
        for name in UNFINISHED if job.resumable else (*UNFINISHED, *NEEDED_TO_RUN, RESULT):
            self.records.remove(job, name)
