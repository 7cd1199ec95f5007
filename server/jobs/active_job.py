"""`ActiveJob`: a job while its work runs. The work reports through it and is stopped through it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from server.jobs.job_store import CANCELLED, Job, JobStore

CLOSING = "closing"
"""The stop reason when the server shuts down."""


class JobStopped(Exception):
    """The work stopped because it was asked to."""


def _do_nothing() -> None:
    """The stop callback between two pieces of work."""


class ActiveJob:
    """A job while its work runs. The work reports through it, and clients stop the work through it.

    Attributes:
        folder: The folder of the job's files.
        stop_reason: CANCELLED, PAUSED or CLOSING once the work is asked to stop.
    """

    def __init__(self, job: Job, store: JobStore) -> None:
        self.job, self.store = job, store
        self.folder = store.folder(job.id)
        self.stop_reason: str | None = None
        self._lock = threading.Lock()
        self._stop: Callable[[], object] = _do_nothing
        self._kill: Callable[[], object] = _do_nothing

    def request_stop(self, reason: str, now: bool = False) -> None:
        """Ask the work to stop at its next checkpoint. With `now`, or when cancelled, it is killed.

        A later request replaces an earlier one, but nothing replaces a cancel.
        """
        with self._lock:
            if self.stop_reason != CANCELLED:
                self.stop_reason = reason
            (self._kill if now or self.stop_reason == CANCELLED else self._stop)()

    def on_stop(self, stop: Callable[[], object], kill: Callable[[], object]) -> None:
        """Register how the current piece of work is stopped. If a stop is already requested, it is called at once."""
        with self._lock:
            self._stop, self._kill = stop, kill
            if self.stop_reason is not None:
                (kill if self.stop_reason == CANCELLED else stop)()

    def check_stop(self) -> None:
        """Raise JobStopped if the work was asked to stop."""
        if self.stop_reason is not None:
            raise JobStopped

    def set_status(self, status: str) -> None:
        """Save a new status of the running job."""
        self.job.status = status
        self.store.save(self.job)

    def add_event(self, message: str, **more: Any) -> None:
        """Add an event; see `JobStore.add_event`."""
        self.store.add_event(self.job, message, **more)
