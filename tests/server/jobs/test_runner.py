"""The job queue: order, states, requests of clients, and restarts of the server."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from adapters.errors import StoreFailed
from server.errors import Conflict, UnknownName
from server.jobs.active_job import ActiveJob, JobStopped
from server.jobs.errors import JobError
from server.jobs.job_store import CANCELLED, EVALUATION, TRAINING, Job, JobStore
from server.jobs.runner import JobRunner
from server.jobs.worker_messages import DATA, RESUME_FILES, TEMPORARY_FILES
from tests.server.engine.conftest import Panic
from tests.waiting import SECONDS, until


class Work:
    """Runs until the test lets it finish or it is stopped. With `deaf` set, it does not hear a stop."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.finish = threading.Event()
        self.error: BaseException | None = None
        self.killed = False
        self.deaf = False

    def __call__(self, active: ActiveJob) -> None:
        self.started.append(active.job.id)
        active.set_status("running")
        active.on_stop((lambda: None) if self.deaf else self.finish.set, self._kill)
        assert self.finish.wait(10)
        self.finish.clear()
        active.check_stop()
        if self.error is not None:
            raise self.error

    def _kill(self) -> None:
        self.killed = True
        if not self.deaf:
            self.finish.set()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def start(open_store: Callable[[], JobStore], work: Work) -> Iterator[Callable[[], JobRunner]]:
    """Starts a job runner as a new server does."""
    started: list[JobRunner] = []

    def start() -> JobRunner:
        runner = JobRunner(open_store(), {TRAINING: work, EVALUATION: work})
        runner.start()
        started.append(runner)
        return runner

    yield start
    for runner in started:
        work.deaf = False
        work.finish.set()
        runner.close(1.0)


def submit(runner: JobRunner, kind: str = TRAINING, **request: object) -> Job:
    return runner.submit(kind, "", request, "ftjob")


def running(runner: JobRunner, kind: str = TRAINING) -> Job:
    job = submit(runner, kind)
    until(lambda: job.status == "running")
    return job


def messages(runner: JobRunner, job: Job) -> list[str]:
    return [event["message"] for event in runner.store.events(job.id)]


def test_jobs_of_a_kind_run_one_at_a_time_in_order(start: Callable[[], JobRunner], work: Work) -> None:
    runner = start()
    first, second = running(runner), submit(runner)
    assert second.status == "queued"
    work.finish.set()
    until(lambda: first.finished and second.status == "running")
    assert work.started == [first.id, second.id] and first.status == "succeeded" and first.finished_at
    evaluation = running(runner, EVALUATION)
    assert second.status == "running", "kinds run in parallel"
    for change in (runner.pause, runner.resume):
        with pytest.raises(Conflict):
            change(evaluation.id)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (JobError("bad", "the reason", "lora.r"), "bad", "the reason"),
        (JobError("bad", "half of a pair: \ud800"), "bad", r"half of a pair: \ud800"),
        (StoreFailed("no disk: \ud800"), "failed", r"no disk: \ud800"),
        (Conflict("no pair: \ud800"), "failed", r"no pair: \ud800"),
        (OSError(28, "No space left on device", "/a/secret/spec.json"), "failed", "No space left on device"),
        (ZeroDivisionError("a secret"), "internal", "internal error"),
        (Panic("a secret"), "internal", "internal error"),
    ],
)
def test_a_failed_job_has_an_error_and_the_next_job_runs(
    start: Callable[[], JobRunner], work: Work, error: BaseException, code: str, text: str
) -> None:
    runner, work.error = start(), error
    job = running(runner)
    work.finish.set()
    until(lambda: job.finished)
    assert job.status == "failed" and job.error is not None and job.error["code"] == code
    assert text in job.error["message"] and "secret" not in job.error["message"]
    assert job.error["param"] == getattr(error, "param", None)
    assert runner.store.events(job.id)[-1]["level"] == "error" and messages(runner, job)[0] == "Created."
    work.error = None
    other = running(runner)
    resumed = runner.resume(job.id)
    assert (resumed.status, resumed.error, resumed.finished_at) == ("queued", None, None)
    work.finish.set()
    until(lambda: other.finished and job.status == "running")


def test_pause_resume_and_cancel(start: Callable[[], JobRunner], work: Work) -> None:
    runner = start()
    job, waiting = running(runner), submit(runner)
    assert runner.pause(waiting.id).status == "paused" and runner.cancel(waiting.id).status == "cancelled"
    runner.pause(job.id)
    until(lambda: job.status == "paused")
    assert not work.killed, "it writes a checkpoint"
    runner.resume(job.id)
    until(lambda: job.status == "running")
    runner.cancel(job.id)
    until(lambda: job.status == "cancelled")
    assert work.killed
    for change in (runner.cancel, runner.pause, runner.resume):
        with pytest.raises(Conflict, match="cancelled"):
            change(job.id)
        with pytest.raises(UnknownName):
            change("ftjob-none")


def test_a_trained_job_cannot_be_paused(start: Callable[[], JobRunner]) -> None:
    runner = start()
    job = running(runner)
    job.trained = {}
    with pytest.raises(Conflict, match="no training left to pause"):
        runner.pause(job.id)


def test_a_requested_pause_can_be_withdrawn(start: Callable[[], JobRunner], work: Work) -> None:
    runner, work.deaf = start(), True
    job = running(runner)
    for _ in range(2):
        assert runner.pause(job.id).status == "running"
    assert [message.startswith("Pause requested") for message in messages(runner, job)] == [False, True]
    assert runner.resume(job.id).status == "running" and not job.pausing
    with pytest.raises(Conflict, match="is running; only paused or failed"):
        runner.resume(job.id)
    work.finish.set()  # the work stops at its checkpoint and starts again
    until(lambda: len(work.started) == 2 and job.status == "running")
    assert messages(runner, job)[-1] == "The job continues from step 0."


def test_a_process_that_something_else_stopped_is_started_again(start: Callable[[], JobRunner], work: Work) -> None:
    runner, work.error = start(), JobStopped()
    job = running(runner)
    work.finish.set()
    until(lambda: len(work.started) == 2)
    assert messages(runner, job)[-1] == "The job continues from step 0."


@pytest.mark.parametrize("end", ["succeeded", "failed", "paused", "cancelled"])
def test_files_are_kept_while_a_job_can_be_resumed(start: Callable[[], JobRunner], work: Work, end: str) -> None:
    runner = start()
    job = running(runner)
    folder = runner.store.folder(job.id)
    for name in (*RESUME_FILES, *TEMPORARY_FILES):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    work.error = JobError("bad", "the reason") if end == "failed" else None
    {"paused": runner.pause, "cancelled": runner.cancel}.get(end, lambda id: work.finish.set())(job.id)
    until(lambda: job.status == end)
    with runner._condition:  # until the files are deleted
        pass
    assert {(folder / name / "file").exists() for name in RESUME_FILES} == {end in ("failed", "paused")}
    assert {(folder / name).exists() for name in TEMPORARY_FILES} == {end == "paused"}
    if end == "failed":
        assert runner.cancel(job.id).status == "cancelled" and job.error is None
        assert not any((folder / name).exists() for name in RESUME_FILES)


def test_a_failed_evaluation_keeps_no_data_and_cannot_be_resumed(start: Callable[[], JobRunner], work: Work) -> None:
    runner, work.error = start(), JobError("bad", "the reason")
    job = runner.submit(EVALUATION, "x", {}, "eval", lambda folder: (folder / DATA).write_bytes(b"x"))
    work.finish.set()
    until(lambda: job.finished)
    with pytest.raises(Conflict, match="only paused or failed training jobs"):
        runner.resume(job.id)
    assert not (runner.store.folder(job.id) / DATA).exists()


def test_a_client_hears_when_a_change_cannot_be_stored(
    start: Callable[[], JobRunner], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, work.deaf = start(), True
    job, waiting = running(runner), submit(runner)

    def full(job: Job) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(runner.store, "save", full)
        for one in (job, waiting):
            for change in (runner.pause, runner.cancel):
                with pytest.raises(StoreFailed):
                    change(one.id)
    assert (job.status, job.pausing, job.cancelling) == ("running", False, False) and waiting.status == "queued"


def test_a_cancelled_job_makes_room_on_a_full_disk(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = JobRunner(store, {})
    job = runner.submit(EVALUATION, "x", {}, "eval", lambda folder: (folder / DATA).write_bytes(b"x"))
    data, save = store.folder(job.id) / DATA, store.save

    def full(job: Job) -> None:
        if data.exists():
            raise StoreFailed("no space left")
        save(job)

    monkeypatch.setattr(store, "save", full)
    assert runner.cancel(job.id).status == "cancelled" and not data.exists()


def test_a_job_whose_end_cannot_be_stored_runs_again_after_a_restart(
    open_store: Callable[[], JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: JobStore, job: Job) -> None:
        raise StoreFailed("no space left")

    runner = JobRunner(open_store(), {EVALUATION: lambda active: monkeypatch.setattr(JobStore, "save", full)})
    job = runner.submit(EVALUATION, "x", {}, "eval", lambda folder: (folder / DATA).write_bytes(b"x"))
    runner.start()
    until(lambda: job.finished)
    runner.close(1.0)
    assert job.status == "failed" and job.error is not None and "no space left" in job.error["message"]
    monkeypatch.undo()
    assert JobRunner(open_store(), {}).get(job.id).status == "queued"
    assert (runner.store.folder(job.id) / DATA).exists()


def recovered(store: JobStore, job: Job, **fields: object) -> Job:
    """The job after a restart. `fields` are what was stored when the server ended."""
    vars(job).update({"status": "running", **fields})
    store.save(job)
    return JobRunner(store, {}).get(job.id)


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({}, "queued"),
        ({"status": "validating_files"}, "queued"),
        ({"status": "paused"}, "paused"),
        ({"pausing": True, "interrupted": 2}, "paused"),
        ({"cancelling": True}, "cancelled"),
        ({"interrupted": 2}, "failed"),
    ],
)
def test_the_state_of_a_job_after_a_restart(
    store: JobStore, open_store: Callable[[], JobStore], fields: dict[str, Any], status: str
) -> None:
    job = recovered(store, store.create(TRAINING, "", {}, "ftjob"), **fields)
    assert (job.status, job.pausing, job.cancelling) == (status, False, False)
    assert open_store().jobs[job.id] == job


@pytest.mark.parametrize(("kind", "advice"), [(TRAINING, "resume it"), (EVALUATION, "submit it")])
def test_a_job_during_which_the_server_ends_three_times_fails(store: JobStore, kind: str, advice: str) -> None:
    job = store.create(kind, "", {}, "ftjob", lambda folder: (folder / DATA).write_bytes(b"x"))
    assert [recovered(store, job).status for _ in range(3)] == ["queued", "queued", "failed"]
    assert job.error is not None and job.error["code"] == "server_ended" and advice in job.error["message"]
    assert "ended 3 times" in store.events(job.id)[-1]["message"]
    assert (store.folder(job.id) / DATA).exists() == (kind == TRAINING)
    if kind == TRAINING:
        assert JobRunner(store, {}).resume(job.id).interrupted == 0


def test_files_that_a_finished_job_left_are_deleted_at_the_start(store: JobStore) -> None:
    job = store.create(EVALUATION, "", {}, "eval", lambda folder: (folder / DATA).write_bytes(b"x"))
    job.status = "succeeded"
    JobRunner(store, {})
    assert not (store.folder(job.id) / DATA).exists()


@pytest.mark.parametrize("kind", [TRAINING, EVALUATION])
@pytest.mark.parametrize(
    ("wish", "error", "status"),
    [
        ("cancelling", None, "succeeded"),
        ("pausing", None, "succeeded"),
        ("cancelling", StoreFailed("full"), "cancelled"),
        ("pausing", StoreFailed("full"), "failed"),
        ("cancelling", JobStopped(), "cancelled"),
        ("pausing", JobStopped(), "paused"),
    ],
)
def test_how_work_ends_after_a_cancel_or_a_pause_was_requested(
    store: JobStore, kind: str, wish: str, error: Exception | None, status: str
) -> None:
    def work(active: ActiveJob) -> None:
        setattr(active.job, wish, True)
        if error is not None:
            raise error

    runner = JobRunner(store, {kind: work})
    job = submit(runner, kind)
    runner.start()
    until(lambda: job.status == status)
    runner.close(0.0)
    assert not getattr(job, wish) and (job.error is None) == (status != "failed")


def test_a_closing_runner_asks_for_a_checkpoint_and_then_kills(open_store: Callable[[], JobStore]) -> None:
    heard, begun, ended = list[str](), threading.Event(), threading.Event()

    def deaf(active: ActiveJob) -> None:
        active.on_stop(lambda: heard.append("stop"), ended.set)
        begun.set()
        assert ended.wait(SECONDS)
        active.check_stop()

    runner = JobRunner(open_store(), {TRAINING: deaf})
    runner.start()
    job = submit(runner)
    assert begun.wait(SECONDS)
    runner.close(0.0)
    assert heard == ["stop"] and ended.is_set() and job.status == "queued"
    assert open_store().jobs[job.id].status == "queued"


def test_work_that_registers_after_a_stop_was_requested_is_stopped(store: JobStore) -> None:
    for reason, heard in (("paused", "stop"), (CANCELLED, "kill")):
        active, calls = ActiveJob(store.create(TRAINING, "", {}, "ftjob"), store), list[str]()
        active.request_stop(reason)
        active.on_stop(lambda calls=calls: calls.append("stop"), lambda calls=calls: calls.append("kill"))
        assert calls == [heard]
        active.request_stop(CANCELLED)
        active.request_stop("paused")
        assert active.stop_reason == CANCELLED and calls[1:] == ["kill", "kill"], "nothing replaces a cancel"
        with pytest.raises(JobStopped):
            active.check_stop()


def test_a_trained_job_continues_as_running_with_its_first_start_time(store: JobStore) -> None:
    seen: list[str] = []
    runner = JobRunner(store, {TRAINING: lambda active: seen.append(active.job.status)})
    job = submit(runner)
    job.trained, job.started_at = {}, 5.0
    runner.start()
    until(lambda: job.finished)
    runner.close(0.0)
    assert (seen, job.started_at) == (["running"], 5.0)


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_is_in_use_until_its_job_has_finished(store: JobStore, field: str) -> None:
    runner = JobRunner(store, {})
    job = submit(runner, **{field: "file-1"})
    assert runner.using("file-1") == job.id and runner.using("file-2") is None
    runner.cancel(job.id)
    assert runner.using("file-1") is None


def test_metrics_list_unfinished_jobs_last(store: JobStore) -> None:
    runner = JobRunner(store, {})
    first, second, _ = (submit(runner) for _ in range(3))
    for job in (first, second):
        job.progress.loss = 1.0
    second.status = "succeeded"
    assert [id for id, *_ in runner.training_metrics()] == [second.id, first.id]


def test_the_event_of_a_status_comes_before_the_status(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = JobRunner(store, {})
    job, seen = submit(runner), list[str]()
    monkeypatch.setattr(store, "add_event", lambda job, message, **more: seen.append(job.status))
    runner.cancel(job.id)
    assert seen == ["queued"] and job.status == "cancelled"
