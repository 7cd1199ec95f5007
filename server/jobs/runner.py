"""The job queue: runs one job of each kind at a time, oldest first, and changes their states."""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError, StoreFailed, valid_unicode
from server.errors import Conflict, ServerError, UnknownName
from server.jobs.active_job import CLOSING, ActiveJob, JobStopped
from server.jobs.errors import JobError, os_error_message
from server.jobs.job_store import (
    ACTIVE,
    CANCELLED,
    FAILED,
    FINISHED,
    PAUSED,
    QUEUED,
    RUNNING,
    SUCCEEDED,
    TRAINING,
    VALIDATING,
    Job,
    JobStore,
)
from server.jobs.worker_messages import RESUME_FILES, TEMPORARY_FILES

log = logging.getLogger(__name__)

MAX_INTERRUPTED = 3
"""A job fails when the server has ended this often while it ran. Such a job may be what ends the server."""


JobWork = Callable[[ActiveJob], None]
"""Does or continues a job. Raises JobError if the job fails and JobStopped if it was asked to stop."""


class JobRunner:
    """Runs jobs and changes their states. Thread-safe.

    Args:
        store: The jobs. Jobs that ran when the last server ended are queued again.
        works: The work of each kind of job. Each kind has its own thread.
    """

    def __init__(self, store: JobStore, works: Mapping[str, JobWork]) -> None:
        self.store = store
        self._works = dict(works)
        self._condition = threading.Condition()
        self._active: dict[str, ActiveJob] = {}
        self._closing = False
        for job in store.all():
            if job.status in ACTIVE:
                self._recover(job)
            elif job.finished:
                self._delete_files(job, job.resumable)  # the last server may have ended before it did this
        self._threads = [
            threading.Thread(target=self._run, args=(kind,), name=f"loramux-{kind}", daemon=True) for kind in works
        ]

    def start(self) -> None:
        """Start to work."""
        for thread in self._threads:
            thread.start()

    def close(self, drain: float) -> None:
        """Stop the running jobs at a checkpoint and queue them. Kill what still runs after `drain` seconds."""
        with self._condition:
            self._closing = True
            active = list(self._active.values())
            self._condition.notify_all()
        for job in active:
            job.request_stop(CLOSING)
        self._join(max(drain, 1.0))
        for job in active:
            job.request_stop(CLOSING, now=True)
        self._join(10.0)

    # -- requests of clients

    def get(self, id: str) -> Job:
        """A job. Raises UnknownName."""
        job = self.store.jobs.get(id)
        if job is None:
            raise UnknownName(f"there is no job {id[:64]!r}; GET /jobs lists all jobs", "id")
        return job

    def submit(
        self,
        kind: str,
        name: str,
        request: Mapping[str, Any],
        prefix: str,
        write_files: Callable[[Path], object] = lambda folder: None,
    ) -> Job:
        """Create a job and queue it; see `JobStore.create`. Raises StoreFailed."""
        job = self.store.create(kind, name, request, prefix, write_files)
        self.store.add_event(job, "Created.")
        with self._condition:
            self._condition.notify_all()
        return job

    def cancel(self, id: str) -> Job:
        """End an unfinished job, or discard a failed one that could be resumed.

        Raises UnknownName, Conflict for a finished job, and StoreFailed.
        """
        with self._condition:
            job = self.get(id)
            if job.finished and not job.resumable:
                raise Conflict(f"{id} has finished ({job.status}) and cannot be cancelled", "id")
            active = self._active.get(id)
            if active is None:
                self._set_status(job, CANCELLED, "Cancelled.")
            else:
                self._update(job, cancelling=True)
                active.request_stop(CANCELLED)
        return job

    def pause(self, id: str) -> Job:
        """Stop a training job at a checkpoint until it is resumed.

        Raises UnknownName, Conflict for a job without training to do, and StoreFailed.
        """
        with self._condition:
            job = self.get(id)
            if job.finished:
                raise Conflict(f"{id} has finished ({job.status}) and cannot be paused", "id")
            if job.kind != TRAINING or job.trained is not None:
                raise Conflict(f"{id} has no training left to pause; cancel it or let it finish", "id")
            active = self._active.get(id)
            if active is not None:
                if not job.pausing:
                    self._update(job, pausing=True)
                    self.store.add_event(job, "Pause requested; the job stops after the current step.")
                active.request_stop(PAUSED)
            elif job.status != PAUSED:
                self._set_status(job, PAUSED, "Paused.")
        return job

    def resume(self, id: str) -> Job:
        """Queue a paused or failed training job again. It continues from its checkpoint.

        A requested pause that has not taken effect yet is withdrawn: the work still stops, and continues at once.
        Raises UnknownName, Conflict for a job that is neither paused nor failed, and StoreFailed.
        """
        with self._condition:
            job = self.get(id)
            if job.pausing:
                self._update(job, pausing=False)
                self.store.add_event(job, "Resumed before it was paused.")
                return job
            if job.kind != TRAINING or job.status not in (PAUSED, FAILED):
                raise Conflict(f"{id} is {job.status}; only paused or failed training jobs can be resumed", "id")
            self._set_status(job, QUEUED, "Resumed; the job continues from its last checkpoint.", interrupted=0)
            self._condition.notify_all()
        return job

    def using(self, file_id: str) -> str | None:
        """The id of an unfinished job that needs this file, or None."""
        for job in self.store.all():
            if not job.finished and file_id in (job.request.get("training_file"), job.request.get("validation_file")):
                return job.id
        return None

    def training_metrics(self) -> list[tuple[str, float, int, float]]:
        """Id, loss, token count and progress of the training jobs that have started, unfinished ones last."""
        return [
            (job.id, job.progress.loss, job.progress.counted_tokens, job.progress.fraction)
            for job in sorted(self.store.all(), key=lambda job: not job.finished)
            if job.kind == TRAINING and job.progress.loss is not None
        ]

    # -- the threads

    def _run(self, kind: str) -> None:
        while True:
            with self._condition:
                while (job := self._next(kind)) is None and not self._closing:
                    self._condition.wait()
                if self._closing or job is None:
                    return
                active = self._active[job.id] = ActiveJob(job, self.store)
                job.status = VALIDATING if kind == TRAINING and job.trained is None else RUNNING
                job.started_at = job.started_at or time.time()
            self._work(active, self._works[kind])

    def _next(self, kind: str) -> Job | None:
        return next((job for job in self.store.all() if job.kind == kind and job.status == QUEUED), None)

    def _work(self, active: ActiveJob, work: JobWork) -> None:
        job, stopped, error = active.job, False, None
        try:
            self.store.save(job)
            work(active)
        except JobStopped:
            stopped = True
        except BaseException as failure:  # a panic of a native library too: the thread has to go on
            error = _error_fields(job.id, failure)
        with self._condition:
            del self._active[job.id]
            try:
                self._end(job, stopped, error)
            except StoreFailed as failure:
                log.error("the end of job %s is not stored; it runs again after a restart: %s", job.id, failure.message)
                job.status, job.error = FAILED, _error_fields(job.id, failure)

    def _end(self, job: Job, stopped: bool, error: dict[str, Any] | None) -> None:
        """Store how a piece of work ended. A requested cancel or pause counts, unless the job has succeeded."""
        if not stopped and error is None:
            self._set_status(job, SUCCEEDED, "The job has succeeded.")
        elif job.cancelling:
            self._set_status(job, CANCELLED, "Cancelled.")
        elif error is not None:
            self._set_status(job, FAILED, str(error["message"]), error=error)
        elif job.pausing:
            self._set_status(job, PAUSED, f"Paused at step {job.progress.step}.")
        elif self._closing:
            self._set_status(job, QUEUED, "The server stops; the job continues when it starts again.")
        else:
            self._set_status(job, QUEUED, f"The job continues from step {job.progress.step}.")

    def _recover(self, job: Job) -> None:
        """Queue a job again that ran when the last server ended, or carry out what a client requested before."""
        count = job.interrupted + 1
        try:
            if job.cancelling:
                self._set_status(job, CANCELLED, "Cancelled before the server ended.")
            elif job.pausing:
                self._set_status(job, PAUSED, "Paused before the server ended.")
            elif count < MAX_INTERRUPTED:
                message = "The server has restarted; the job continues from its last checkpoint."
                self._set_status(job, QUEUED, message, interrupted=count)
            else:
                message = (
                    f"the server ended {count} times while this job ran; it may have run out of memory or exceeded "
                    f"--step-limit, see its log; {'resume' if job.kind == TRAINING else 'submit'} it to try again"
                )
                error = {"code": "server_ended", "message": message, "param": None}
                self._set_status(job, FAILED, message, error=error, interrupted=count)
        except StoreFailed as error:
            log.error("the state of job %s after the restart is not stored: %s", job.id, error.message)
            job.status = QUEUED

    def _set_status(
        self, job: Job, status: str, message: str, *, error: dict[str, Any] | None = None, **changes: Any
    ) -> None:
        """Change and store a status. The event comes first, so that a client that sees the status finds the event."""
        if status == CANCELLED:
            self._delete_files(job, resumable=False)  # first, because users cancel jobs to make room on a full disk
        self.store.add_event(job, message, level="error" if status == FAILED else "info")
        changes |= {"status": status, "error": error, "pausing": False, "cancelling": False}
        self._update(job, finished_at=time.time() if status in FINISHED else None, **changes)
        if job.finished:
            self._delete_files(job, resumable=job.resumable)

    def _update(self, job: Job, **changes: Any) -> None:
        """Store and set fields of a job. If the database refuses, they stay as they are. Raises StoreFailed."""
        self.store.save(replace(job, **changes))
        vars(job).update(changes)

    def _delete_files(self, job: Job, resumable: bool) -> None:
        """Delete the files that a finished job no longer needs. A job that can be resumed keeps its checkpoint."""
        for name in TEMPORARY_FILES if resumable else (*TEMPORARY_FILES, *RESUME_FILES):
            path = self.store.folder(job.id) / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def _join(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, end - time.monotonic()))


def _error_fields(id: str, failure: BaseException) -> dict[str, Any]:
    if isinstance(failure, JobError):
        return {"code": failure.code, "message": failure.message, "param": failure.param}
    if isinstance(failure, AdapterError | ServerError):
        return {"code": "failed", "message": valid_unicode(failure.message), "param": failure.param}
    log.error("job %s failed", id, exc_info=failure)
    if isinstance(failure, OSError):
        return {"code": "failed", "message": os_error_message(failure), "param": None}
    return {"code": "internal", "message": "internal error; the server's log has details", "param": None}
