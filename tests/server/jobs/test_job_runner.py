"""Queue, states and their changes, with work that a test holds in its hands; and what is on the disk of it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import StoreFailed
from server.errors import Conflict, UnknownName
from server.jobs import training_job as training_module
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.job_store import CANCELLED, EVALUATION, EVENTS, STATE, TRAINING, Job, JobStore, Progress
from server.jobs.runner import ActiveJob, JobRunner, JobStopped
from server.jobs.training_job import TrainingJob, _Heard
from server.jobs.worker_messages import DATA, NEEDED_TO_RUN, RESULT, UNFINISHED
from tests.server.engine.conftest import Panic
from tests.waiting import SECONDS, until


class Work:
    """Waits until a test lets it go on, or the job is stopped."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.go = threading.Event()
        self.error: BaseException | None = None
        self.killed = False
        self.deaf = False

    def __call__(self, active: ActiveJob) -> None:
        self.begun.append(active.job.id)
        active.become("running")
        active.stopped_by((lambda: None) if self.deaf else self.go.set, self._kill)
        assert self.go.wait(10)
        self.go.clear()
        active.check()
        if self.error is not None:
            raise self.error

    def _kill(self) -> None:
        self.killed = True
        self.go.set()


@pytest.fixture
def work() -> Work:
    return Work()


@pytest.fixture
def make(tmp_path: Path, work: Work):
    made: list[JobRunner] = []

    def build() -> JobRunner:
        jobs = JobRunner(JobStore(tmp_path / "jobs"), {TRAINING: work, EVALUATION: work})
        jobs.start()
        made.append(jobs)
        return jobs

    yield build
    for jobs in made:
        work.go.set()
        jobs.close(1.0)


def add(jobs: JobRunner, kind: str = TRAINING, **request: object) -> Job:
    return jobs.enter(jobs.records.prepare(kind, "", request, "ftjob", {}))


def test_of_the_last_jobs_those_that_are_not_over_are_the_last(make, work):
    jobs = make()
    first, second = add(jobs), add(jobs)
    for job in (first, second):
        job.progress.loss = 1.0
    until(lambda: first.status == "running")
    assert [job for job, *_ in jobs.training()] == [first.id, second.id]
    second.status = "succeeded"
    assert [job for job, *_ in jobs.training()] == [second.id, first.id]


def test_a_process_that_others_have_stopped_is_no_end_of_the_server(make, work):
    jobs = make()
    job = add(jobs)
    until(lambda: job.status == "running")
    work.error = JobStopped()
    work.go.set()
    until(lambda: "The training process was stopped; the job goes on from step 0." in said(jobs, job))
    assert not [message for message in said(jobs, job) if "server" in message]


def said(jobs: JobRunner, job: Job) -> list[str]:
    return [event["message"] for event in jobs.records.events(job.id)]


def test_one_at_a_time_in_their_order(make, work):
    jobs = make()
    first, second = add(jobs), add(jobs)
    until(lambda: first.status == "running")
    assert second.status == "queued" and first.name == f"ft-{first.id}"
    work.go.set()
    until(lambda: first.over and second.status == "running")
    assert work.begun == [first.id, second.id] and first.status == "succeeded" and first.finished_at
    work.go.set()
    until(lambda: second.over)


def test_an_evaluation_does_not_wait_for_a_training(make, work):
    jobs = make()
    training, evaluation = add(jobs), add(jobs, EVALUATION)
    until(lambda: training.status == evaluation.status == "running")
    with pytest.raises(Conflict):
        jobs.pause(evaluation.id)
    with pytest.raises(Conflict):
        jobs.resume(evaluation.id)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (JobError("bad", "the reason", "field"), "bad"),
        (JobError("bad", "half of a pair: \ud800"), "bad"),
        (StoreFailed("no disk"), "failed"),
        (StoreFailed("half of a pair: \ud800"), "failed"),
        (Conflict("half of a pair: \ud800"), "failed"),
        (OSError(28, "No space left on device", "/a/secret/spec.json"), "failed"),
        (ZeroDivisionError("a secret"), "internal"),
        (Panic("a secret"), "internal"),
    ],
)
def test_a_failure_is_told_and_the_next_job_runs(make, work, error, code):
    jobs, work.error = make(), error
    job = add(jobs)
    work.go.set()
    until(lambda: job.over)
    assert job.status == "failed" and job.error["code"] == code and "secret" not in job.error["message"]
    assert job.error["message"].encode(), "it can be sent"
    assert jobs.records.events(job.id)[-1]["level"] == "error"
    assert not isinstance(error, OSError) or "No space left on device" in job.error["message"]
    work.error = None
    other = add(jobs)
    until(lambda: other.status == "running")
    assert jobs.resume(job.id).error is None
    work.go.set()
    until(lambda: other.over and job.status == "running")


def test_pause_resume_and_cancel(make, work):
    jobs = make()
    job, waiting = add(jobs), add(jobs)
    until(lambda: job.status == "running")
    assert jobs.pause(waiting.id).status == "paused" and jobs.cancel(waiting.id).status == "cancelled"
    jobs.pause(job.id)
    until(lambda: job.status == "paused")
    assert not work.killed
    with pytest.raises(Conflict):
        jobs.resume(waiting.id)
    jobs.resume(job.id)
    until(lambda: job.status == "running")
    jobs.cancel(job.id)
    until(lambda: job.status == "cancelled")
    assert work.killed, "a cancelled job needs no checkpoint"
    for change in (jobs.cancel, jobs.pause, jobs.resume):
        with pytest.raises(Conflict, match=r"is over \(cancelled\) and can not be|is cancelled; only a job"):
            change(job.id)
        with pytest.raises(UnknownName):
            change("ftjob-none")


@pytest.mark.parametrize("end", ["succeeded", "failed", "paused", "cancelled", "cancelled while it waits"])
def test_what_a_run_needs_stays_for_as_long_as_it_can_go_on(make, work, end):
    jobs = make()
    first, second = add(jobs), add(jobs)
    until(lambda: first.status == "running")
    job = second if end.endswith("waits") else first
    folder = jobs.records.folder(job.id)
    for name in (*NEEDED_TO_RUN, RESULT, *UNFINISHED):
        (folder / name).mkdir()
        (folder / name / "file").touch()
    work.error = JobError("bad", "the reason") if end == "failed" else None
    change = {"paused": jobs.pause, "cancelled": jobs.cancel}.get(end.split()[0])
    work.go.set() if change is None else change(job.id)
    until(lambda: job.status == end.split()[0])
    with jobs._condition:  # until the end is written, and what it leaves is gone
        pass
    assert [(folder / name / "file").exists() for name in NEEDED_TO_RUN] == [end in ("failed", "paused")] * len(
        NEEDED_TO_RUN
    )
    assert (folder / RESULT).exists() == (end in ("failed", "paused"))
    assert [(folder / name).exists() for name in UNFINISHED] == [end == "paused"] * 2
    assert folder.exists() and jobs.records.events(job.id)


def test_a_failed_job_is_cancelled_and_keeps_nothing_to_go_on_from(make, work):
    jobs, work.error = make(), JobError("bad", "the reason")
    job = add(jobs)
    work.go.set()
    until(lambda: job.over)
    other = add(jobs, EVALUATION)
    work.go.set()
    until(lambda: other.over)
    checkpoints = jobs.records.folder(job.id) / NEEDED_TO_RUN[0]
    checkpoints.mkdir()
    assert jobs.cancel(job.id) is job and (job.status, job.error) == ("cancelled", None) and not checkpoints.exists()
    assert said(jobs, job)[-2:] == ["the reason", "Cancelled."]
    for change, id in ((jobs.cancel, job.id), (jobs.resume, job.id), (jobs.cancel, other.id)):
        with pytest.raises(Conflict):
            change(id)


def test_a_job_that_fails_when_its_cancel_was_accepted_is_cancelled(make, work):
    jobs, work.deaf = make(), True
    job = add(jobs)
    until(lambda: job.status == "running")
    jobs._active[job.id].stopped_by(lambda: None, lambda: None)  # busy with what cannot be ended
    jobs._active[job.id].check = lambda: None
    work.error = JobError("bad", "the reason")
    assert jobs.cancel(job.id).status == "running"
    work.go.set()
    until(lambda: job.over)
    assert (job.status, job.error) == ("cancelled", None)


def test_of_jobs_that_are_over_the_oldest_go(make, work, tmp_path, monkeypatch):
    monkeypatch.setattr("server.jobs.job_store.MOST_OVER", 3)
    jobs = make()
    over = [add(jobs) for _ in range(6)]
    for job in over[1:]:
        jobs.cancel(job.id)
    until(lambda: over[0].status == "running")
    last = add(jobs)
    assert {job.id for job in jobs.records.all()} == {over[0].id, over[4].id, over[5].id, last.id}, "what runs stays"
    assert not jobs.records.folder(over[1].id).exists() and jobs.records.folder(over[5].id).exists()
    with pytest.raises(UnknownName):
        jobs.get(over[1].id)


def test_what_ran_is_queued_again_after_the_server(make, work, tmp_path):
    jobs = make()
    job, paused, done = add(jobs, training_file="file-1"), add(jobs), add(jobs)
    until(lambda: job.status == "running")
    jobs.pause(paused.id)
    jobs.cancel(done.id)
    jobs.close(1.0)
    assert job.status == "queued"
    jobs.records.note(job, "whole")
    with (tmp_path / "jobs" / job.id / "events.jsonl").open("ab") as journal:
        journal.write(b'\n{"at": 1, "mess')  # a kill
    state = tmp_path / "jobs" / job.id / "job.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "status": "running"}))
    (tmp_path / "jobs" / "odd").mkdir()
    (tmp_path / "jobs" / "odd" / "job.json").write_text("{")
    work.go.clear()
    again = make()
    until(lambda: again.get(job.id).status == "running")
    assert {again.get(j.id).status for j in (paused, done)} == {"paused", "cancelled"}
    said = [event["message"] for event in again.records.events(job.id)]
    assert said[-2] == "whole" and "started again" in said[-1]
    ids = [event["id"] for event in again.records.events(job.id)]
    assert len(set(ids)) == len(ids)
    assert again.using("file-1") == job.id and again.using("file-2") is None


def interrupted(tmp_path: Path, job: Job, **told: object) -> Job:
    """The job as a start finds it after the server has ended in its midst."""
    state = tmp_path / "jobs" / job.id / STATE
    state.write_text(json.dumps({**json.loads(state.read_text()), "status": "running", **told}))
    return JobRunner(JobStore(tmp_path / "jobs"), {}).get(job.id)


@pytest.mark.parametrize(("kind", "advice"), [(TRAINING, "resume it"), (EVALUATION, "ask for it anew")])
def test_a_job_in_whose_midst_every_server_ends_has_failed_in_the_end(tmp_path, kind, advice):
    records = JobStore(tmp_path / "jobs")
    job = records.prepare(kind, "", {}, "ftjob", {DATA: b"examples"})
    records.enter(job)
    state = tmp_path / "jobs" / job.id / STATE
    before = json.loads(state.read_text())
    del before["interrupted"]  # a version that did not count
    state.write_text(json.dumps(before))
    assert [interrupted(tmp_path, job).status for _ in range(2)] == ["queued", "queued"]
    assert JobRunner(JobStore(tmp_path / "jobs"), {}).get(job.id).interrupted == 2, "it waited, and was not interrupted"
    jobs = JobRunner(JobStore(tmp_path / "jobs"), {})
    failed = interrupted(tmp_path, job)
    assert failed.status == "failed" and failed.finished_at and failed.error is not None
    assert failed.error["code"] == "server_ended" and advice in failed.error["message"]
    assert said(jobs, job)[-1] == failed.error["message"] and "ended 3 times" in failed.error["message"]
    assert (tmp_path / "jobs" / job.id / DATA).exists() == (kind == TRAINING), "where it can be resumed"
    if kind == TRAINING:
        again = JobRunner(JobStore(tmp_path / "jobs"), {})
        assert again.resume(job.id).status == "queued" and again.get(job.id).error is None
        assert interrupted(tmp_path, job).status == "queued", "it is counted anew"


def test_a_pause_that_was_asked_is_no_reason_for_the_server_s_end(tmp_path):
    records = JobStore(tmp_path / "jobs")
    job = records.prepare(TRAINING, "", {}, "ftjob", {})
    records.enter(job)
    assert interrupted(tmp_path, job, interrupted=2, pausing=True).status == "paused"


@pytest.mark.parametrize("killed", [False, True])
def test_a_pause_that_was_asked_before_the_server_ended_holds(make, work, tmp_path, killed):
    """Of a job within a step that takes longer than the server lives."""
    jobs, work.deaf = make(), True
    job = add(jobs)
    until(lambda: job.status == "running")
    active = jobs._active[job.id]
    jobs.pause(job.id)
    state = tmp_path / "jobs" / job.id / "job.json"
    seen = state.read_bytes()
    assert json.loads(seen)["status"] == "running"
    closing = threading.Thread(target=jobs.close, args=(5.0,))
    closing.start()
    until(lambda: active.wanted == "closing")
    work.deaf = False
    work.go.set()
    closing.join()
    assert job.status == "paused"
    if killed:
        state.write_bytes(seen)
    again = make()
    found = again.get(job.id)
    assert found.status == "paused" and not found.pausing
    assert again.records.events(job.id)[-1]["message"].startswith("Paused")
    work.go.clear()
    again.resume(job.id)
    until(lambda: found.status == "running")
    again.close(1.0)
    assert found.status == "queued", "a pause is over once the job has been resumed"


@pytest.mark.parametrize("kind", [TRAINING, EVALUATION])
def test_a_cancel_that_has_not_come_yet_outlives_the_server(make, work, tmp_path, kind):
    jobs, work.deaf = make(), True
    job = add(jobs, kind)
    until(lambda: job.status == "running")
    state = tmp_path / "jobs" / job.id / "job.json"
    work._kill = lambda: None  # busy with what cannot be ended
    jobs._active[job.id].stopped_by(lambda: None, lambda: None)
    assert jobs.cancel(job.id).status == "running"
    seen = state.read_bytes()
    work.go.set()
    until(lambda: job.over)
    assert job.status == "cancelled" and not job.cancelling
    state.write_bytes(seen)  # as a server leaves it that is killed as soon as it has answered
    again = make().get(job.id)
    assert again.status == "cancelled" and again.finished_at and len(work.begun) == 1


@pytest.mark.parametrize("last", ["pause", "close"])
def test_a_cancel_holds_that_comes_as_the_work_has_already_stopped(make, work, last, monkeypatch):
    jobs = make()
    job = add(jobs)
    until(lambda: job.status == "running")
    stopped, cancelled = threading.Event(), threading.Event()

    def check(active: ActiveJob) -> None:
        stopped.set()
        assert cancelled.wait(10)
        raise JobStopped

    active = jobs._active[job.id]
    monkeypatch.setattr(ActiveJob, "check", check)
    if last == "pause":
        jobs.pause(job.id)
    else:
        active.ask("closing")
    assert stopped.wait(10)
    wanted, active.wanted = active.wanted, None
    jobs.cancel(job.id)
    active.wanted = wanted  # as the work has seen it
    cancelled.set()
    until(lambda: job.over)
    assert job.status == "cancelled"


def test_a_pause_that_has_not_come_yet_is_taken_back(make, work, tmp_path):
    jobs, work.deaf = make(), True
    job = add(jobs)
    until(lambda: job.status == "running")
    for _ in range(2):
        assert jobs.pause(job.id).status == "running"
    said = [event["message"] for event in jobs.records.events(job.id)]
    assert [message.startswith("A pause is asked for") for message in said] == [False, True]
    assert jobs.resume(job.id).status == "running"
    assert not json.loads((tmp_path / "jobs" / job.id / "job.json").read_text())["pausing"]
    with pytest.raises(Conflict, match="is running; only a job"):
        jobs.resume(job.id)
    work.go.set()  # the work comes to where it stops, and is begun again
    until(lambda: len(work.begun) == 2 and job.status == "running")
    assert jobs.records.events(job.id)[-1]["message"].startswith("The job goes on")
    jobs.pause(job.id)
    work.go.set()
    until(lambda: job.status == "paused")


def test_a_pause_is_kept_where_the_disk_refuses_its_record(make, work, monkeypatch):
    jobs = make()
    job = add(jobs)
    until(lambda: job.status == "running")

    def full(job: Job) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.records, "save", full)
        jobs.pause(job.id)
        until(lambda: job.status == "paused")


def test_a_job_that_waits_is_paused_and_resumed_where_the_disk_refuses_its_record(make, work, monkeypatch):
    jobs = make()
    first, second = add(jobs), add(jobs)
    until(lambda: first.status == "running")

    def full(job: Job) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.records, "save", full)
        assert jobs.pause(second.id).status == "paused"
        assert jobs.resume(second.id).status == "queued"
        assert jobs.pause(second.id).status == "paused"
    assert jobs.resume(second.id).status == "queued"
    assert json.loads((jobs.records.folder(second.id) / "job.json").read_text())["status"] == "queued"


def test_nothing_is_left_of_a_job_that_the_disk_refuses(tmp_path, monkeypatch):
    records = JobStore(tmp_path)
    with pytest.raises(StoreFailed, match="No such file"):
        records.prepare(EVALUATION, "x", {}, "eval", {"data": b"x", "no/folder": b"x"})
    assert list(tmp_path.iterdir()) == []
    job = records.prepare(EVALUATION, "x", {}, "eval", {"data": b"x"})
    assert not records.folder(job.id).stat().st_mode & 0o077, "nobody else on the machine reads the data"

    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.jobs.job_store.replace_file", full)
    with pytest.raises(StoreFailed, match="No space"):
        records.enter(job)
    assert list(tmp_path.iterdir()) == [] and records.all() == []


def test_what_is_left_of_a_job_that_was_never_entered_goes_with_the_next_start(tmp_path):
    records = JobStore(tmp_path)
    kept = records.prepare(EVALUATION, "x", {}, "eval", {})
    records.enter(kept)
    for kind, prefix in ((EVALUATION, "eval"), (TRAINING, "ftjob")):  # the server is killed before either is entered
        records.prepare(kind, "x", {}, prefix, {"data": b"x"})
    damaged = records.prepare(TRAINING, "x", {}, "ftjob", {"job.json": b"{"})
    (tmp_path / "mine").mkdir()
    assert list(JobStore(tmp_path).jobs) == [kept.id]
    assert {path.name for path in tmp_path.iterdir()} == {kept.id, damaged.id, "mine"}


def test_a_job_whose_record_is_gone_keeps_what_it_has(tmp_path, caplog):
    records = JobStore(tmp_path)
    job = records.prepare(TRAINING, "x", {}, "ftjob", {"checkpoint": b"x"})
    records.enter(job)
    records.note(job, "Created.")
    (tmp_path / job.id / "job.json").unlink()
    assert not JobStore(tmp_path).jobs and f"the record of job {job.id} is gone" in caplog.text
    assert (tmp_path / job.id / "checkpoint").read_bytes() == b"x"


def test_a_copy_of_a_job_takes_no_job_s_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = JobStore(tmp_path)
    job = records.prepare(TRAINING, "x", {}, "ftjob", {})
    job.status = "running"
    records.enter(job)
    shutil.copytree(tmp_path / job.id, tmp_path / f"{job.id}.bak")
    job.status = "succeeded"
    records.save(job)
    read = JobStore(tmp_path)
    assert list(read.jobs.values()) == [job] and (tmp_path / f"{job.id}.bak" / STATE).exists()
    assert [line.getMessage() for line in caplog.records] == [
        f"the record of job {job.id}.bak cannot be read and is left out: it is a copy of {job.id}"
    ]


def test_a_copy_of_a_file_is_no_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FileStore(tmp_path)
    file = files.add(lambda path: path.write_bytes(b"x"), "a.jsonl", "fine-tune")
    shutil.copytree(tmp_path / file.id, tmp_path / f"{file.id}.bak")
    assert FileStore(tmp_path).all() == [file] and f"it is a copy of {file.id}" in caplog.text
    files.delete(file.id)
    assert not FileStore(tmp_path).all()


def test_a_file_that_leads_nowhere_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = FileStore(tmp_path).add(lambda path: path.write_bytes(b"x"), "a.jsonl", "fine-tune")
    (tmp_path / "file-lost").mkdir()
    (tmp_path / "file-lost" / "file.json").symlink_to("nowhere")
    (tmp_path / "file-away").symlink_to("nowhere")
    found = [tmp_path / name / "file.json" for name in ("file-lost", "file-away", file.id)]
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: iter(found if "json" in pattern else []))  # Python 3.13's
    assert FileStore(tmp_path).all() == [file]
    assert "what file-lost is" in caplog.text and "what file-away is" in caplog.text


def test_a_file_that_nobody_knows_any_more_is_told(tmp_path, caplog):
    file = FileStore(tmp_path).add(lambda path: path.write_bytes(b"x"), "a.jsonl", "fine-tune")
    (tmp_path / file.id / "file.json").write_text("{")
    assert not FileStore(tmp_path).all() and f"what {file.id} is cannot be read" in caplog.text
    assert (tmp_path / file.id / "content").read_bytes() == b"x"


def test_what_a_later_version_tells_of_jobs_and_files_is_let_be(tmp_path: Path) -> None:
    """Else going back to this one would lose them."""
    records, files = JobStore(tmp_path / "jobs"), FileStore(tmp_path / "files")
    job = records.prepare(TRAINING, "x", {"a": 1}, "ftjob", {})
    job.progress.step = 3
    records.enter(job)
    file = files.add(lambda path: path.write_bytes(b"x"), "a.jsonl", "fine-tune")
    for told in (tmp_path / "jobs" / job.id / "job.json", tmp_path / "files" / file.id / "file.json"):
        content = json.loads(told.read_text())
        if "progress" in content:
            content["progress"]["of_tomorrow"] = 1
        told.write_text(json.dumps({**content, "of_tomorrow": {}}))
    assert list(JobStore(tmp_path / "jobs").jobs.values()) == [job] and FileStore(tmp_path / "files").all() == [file]


@pytest.mark.parametrize("damage", [[], None, 5])
def test_a_record_that_is_no_object_costs_itself_alone(tmp_path: Path, damage: object, caplog: Any) -> None:
    records, files = JobStore(tmp_path / "jobs"), FileStore(tmp_path / "files")
    job = records.prepare(TRAINING, "x", {}, "ftjob", {})
    records.enter(job)
    file = files.add(lambda path: path.write_bytes(b"x"), "a.jsonl", "fine-tune")
    (tmp_path / "jobs" / job.id / "job.json").write_text(json.dumps(damage))
    (tmp_path / "files" / file.id / "file.json").write_text(json.dumps(damage))
    assert not JobStore(tmp_path / "jobs").jobs and not FileStore(tmp_path / "files").all()
    assert job.id in caplog.text and file.id in caplog.text


def test_halves_of_pairs_in_what_was_written_before_are_read_as_what_can_be_sent(tmp_path: Path) -> None:
    """One of them would take the whole list of jobs along."""
    records = JobStore(tmp_path)
    job = records.prepare(EVALUATION, "x", {"a": ["\U0001f600"]}, "eval", {})
    job.status, job.error = "failed", {"code": "bad", "message": "it has \ud800", "param": None}
    records.enter(job)
    records.note(job, "it has \ud800, and \U0001f600", data={"\udc00": 1})
    read = JobStore(tmp_path)
    found, [event] = read.jobs[job.id], read.events(job.id)
    assert found.error == {"code": "bad", "message": "it has \\ud800", "param": None}
    assert found.request == {"a": ["\U0001f600"]} and event["data"] == {"\\udc00": 1}
    assert event["message"] == "it has \\ud800, and \U0001f600"


@pytest.mark.parametrize("passed", [0.0, 3600.0, 7200.0])
def test_jobs_keep_their_order_when_the_clock_is_set_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: float
) -> None:
    """However much of what it was set back by has passed when they begin; of jobs that are over nothing is known."""
    records, begun, now = JobStore(tmp_path), list[str](), time.time()
    monkeypatch.setattr("server.jobs.runner.time.time", lambda: now + passed)
    for name, ahead in (("over", 9e6), ("first", 3500.0), ("second", 3700.0), ("late", 0.0), ("later", 1.0)):
        job = records.prepare(TRAINING, name, {}, "ftjob", {})
        job.created_at = now + ahead
        job.status = "failed" if name == "over" else "queued"
        records.enter(job)
    assert [job.name for job in JobStore(tmp_path).all()] == ["first", "second", "late", "later", "over"]
    assert job.created_at == now + 1.0, "which templates are told, too"

    def work(active: ActiveJob) -> None:
        begun.append(active.job.name)

    jobs = JobRunner(records, {TRAINING: work})
    jobs.start()
    until(lambda: len(begun) == 4)
    jobs.close(SECONDS)
    assert begun == ["first", "second", "late", "later"]


def test_of_an_evaluation_that_has_failed_no_data_stay(tmp_path: Path) -> None:
    """It is no job that can be resumed."""

    def work(active: ActiveJob) -> None:
        raise JobError("bad", "the reason")

    jobs = JobRunner(JobStore(tmp_path), {EVALUATION: work})
    job = jobs.enter(jobs.records.prepare(EVALUATION, "task", {}, "evaljob", {DATA: b"x"}))
    assert (tmp_path / job.id / DATA).exists()
    jobs.start()
    until(lambda: job.over)
    jobs.close(SECONDS)
    assert job.status == "failed" and not (tmp_path / job.id / DATA).exists()


def test_a_job_that_an_older_version_was_asked_for_says_so(tmp_path):
    work = TrainingJob(None, None, lambda trains: None)
    with pytest.raises(JobError, match="did not keep its task: ask anew"):
        work(SimpleNamespace(job=Job("ftjob-1", TRAINING, "x", {"lora": {}})))


def test_a_job_whose_spec_cannot_be_read_says_so(tmp_path):
    ground = SimpleNamespace(max_rank=8)
    job = Job("ftjob-1", TRAINING, "x", {"template": {}}, trained={"made": {}})
    for content in (None, "{", "{}", "[]"):
        if content is not None:
            (tmp_path / "spec.json").write_text(content)
        with pytest.raises(JobError, match=r"what the job was trained by cannot be read .*: ask anew"):
            TrainingJob(ground, None, lambda trains: None)(SimpleNamespace(job=job, folder=tmp_path))


def test_files_come_back_and_those_in_use_stay(tmp_path):
    files = FileStore(tmp_path / "files")
    file = files.add(lambda path: path.write_bytes(b"abc"), "C:\\data\\x.jsonl", "fine-tune")
    assert (file.filename, file.bytes) == ("x.jsonl", 3)
    again = FileStore(tmp_path / "files")
    assert again.get(file.id) == file and again.path(file.id).read_bytes() == b"abc" and again.all() == [file]
    again.used_by = lambda id: "ftjob-1"
    with pytest.raises(Conflict, match="ftjob-1"):
        again.delete(file.id)
    again.used_by = lambda id: None
    again.delete(file.id)
    with pytest.raises(UnknownName):
        again.path(file.id)
    assert list((tmp_path / "files").iterdir()) == []


def test_a_file_with_which_a_job_is_being_asked_for_stays(tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files")
    file, other = (files.add(lambda path: path.write_bytes(b"abc"), "x.jsonl", "fine-tune") for _ in range(2))
    with files.held(file.id, None), pytest.raises(StoreFailed), files.held(file.id, file.id):
        files.delete(other.id)
        raise StoreFailed("no space left")
    with files.held(file.id):
        with files.held(file.id):
            pass
        with pytest.raises(Conflict, match="being asked for"):
            files.delete(file.id)
    files.delete(file.id)
    assert not files.all()


def test_files_of_one_second_are_listed_newest_first_after_a_restart_too(tmp_path):
    files = FileStore(tmp_path / "files")
    names = [f"{i}.jsonl" for i in range(8)]
    for name in names:
        files.add(lambda path: path.write_bytes(b"x"), name, "fine-tune")
    assert [file.filename for file in files.all()] == names[::-1]
    assert FileStore(tmp_path / "files").all() == files.all()


def test_a_disk_that_refuses_a_file_leaves_nothing(tmp_path):
    files = FileStore(tmp_path / "files")

    def full(path: Path) -> None:
        path.write_bytes(b"x")
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreFailed, match="No space"):
        files.add(full, "x", "fine-tune")
    assert files.all() == [] and list((tmp_path / "files").iterdir()) == []


def test_the_name_of_a_file_is_durable_before_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, seen = FileStore(tmp_path / "files"), list[list[str]]()

    def sync(folder: Path) -> None:
        seen.append([path.name for path in folder.iterdir()])
        if len(seen) > 1:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("server.jobs.file_store.sync_folder", sync)
    file = files.add(lambda path: path.write_bytes(b"x"), "x", "fine-tune")
    assert seen == [[file.id]]
    with pytest.raises(StoreFailed, match="Input/output"):
        files.add(lambda path: path.write_bytes(b"x"), "y", "fine-tune")
    assert files.all() == FileStore(tmp_path / "files").all() == [file]


def test_stopping_reaches_a_piece_of_work_that_begins_late(tmp_path):
    records = JobStore(tmp_path)
    active = ActiveJob(records.prepare(TRAINING, "x", {}, "ftjob", {}), records)
    heard: list[str] = []
    active.ask("paused")
    active.stopped_by(lambda: heard.append("stop"), lambda: heard.append("kill"))
    active.ask("cancelled")
    active.ask("paused")
    assert heard == ["stop", "kill", "kill"] and active.wanted == "cancelled"
    with pytest.raises(JobStopped):
        active.check()


def test_what_is_left_of_an_upload_that_was_cut_short_goes(tmp_path: Path) -> None:
    files = FileStore(tmp_path / "files")
    kept = files.add(lambda path: path.write_text("x"), "x", "fine-tune")
    (tmp_path / "files" / ".new-cut").mkdir()
    (tmp_path / "files" / ".new-cut" / "content").write_text("half")
    assert FileStore(tmp_path / "files").get(kept.id) == kept
    assert [path.name for path in (tmp_path / "files").iterdir()] == [kept.id]


@pytest.mark.parametrize("then", ["another job", "the end"])
def test_an_end_that_the_disk_has_refused_is_written_later(make, work, monkeypatch, tmp_path, then):
    jobs = make()
    add(jobs)
    job = add(jobs)
    save = JobStore.save

    def full(self, job):
        raise StoreFailed("no space left")

    monkeypatch.setattr(JobStore, "save", full)
    jobs.cancel(job.id)
    assert job.status == "cancelled"
    monkeypatch.setattr(JobStore, "save", save)
    if then == "the end":
        work.go.set()
        jobs.close(1.0)
    else:
        jobs.cancel(add(jobs).id)
    assert JobStore(tmp_path / "jobs").jobs[job.id].status == "cancelled"


@pytest.mark.parametrize("killed", [False, True])
def test_what_a_run_needs_outlives_an_end_that_is_not_on_the_disk(tmp_path: Path, monkeypatch, killed) -> None:
    """A server that comes after does not know of it, and runs the job again."""

    def full(self: JobStore, job: Job) -> None:
        raise StoreFailed("no space left")

    save = JobStore.save
    jobs = JobRunner(JobStore(tmp_path), {EVALUATION: lambda active: monkeypatch.setattr(JobStore, "save", full)})
    job = jobs.enter(jobs.records.prepare(EVALUATION, "task", {}, "eval", {DATA: b"x"}))
    needed = tmp_path / job.id / DATA
    jobs.start()
    until(lambda: job.status == "succeeded")
    assert needed.exists()
    monkeypatch.setattr(JobStore, "save", save)
    if killed:
        assert not JobStore(tmp_path).jobs[job.id].over
    jobs.close(1.0)
    assert JobStore(tmp_path).jobs[job.id].status == "succeeded" and not needed.exists()


def test_a_job_that_is_cancelled_makes_room_on_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    jobs = JobRunner(JobStore(tmp_path), {EVALUATION: lambda active: None})
    job = jobs.enter(jobs.records.prepare(EVALUATION, "task", {}, "eval", {DATA: b"x"}))
    needed, save = tmp_path / job.id / DATA, JobStore.save

    def full(self: JobStore, job: Job) -> None:
        if needed.exists():
            raise StoreFailed("no space left")
        save(self, job)

    monkeypatch.setattr(JobStore, "save", full)
    jobs.cancel(job.id)
    assert JobStore(tmp_path).jobs[job.id].status == "cancelled"
    jobs.close(1.0)


def test_what_an_ended_job_needed_goes_with_the_next_start_too(tmp_path: Path) -> None:
    records = JobStore(tmp_path)
    job = records.prepare(EVALUATION, "task", {}, "eval", {DATA: b"x"})
    job.status, job.finished_at = "succeeded", 1.0  # and the server is killed
    records.enter(job)
    JobRunner(JobStore(tmp_path), {})
    assert not (tmp_path / job.id / DATA).exists()


def test_a_name_that_is_no_text_is_told_as_one(tmp_path):
    files = FileStore(tmp_path / "files")
    file = files.add(lambda path: path.write_bytes(b"{}"), "a\ud800b.jsonl", "fine-tune")
    assert file.filename == "a?b.jsonl"


def test_what_is_cancelled_before_its_process_begins_is_killed_at_once(tmp_path: Path) -> None:
    records = JobStore(tmp_path)
    active = ActiveJob(records.prepare(TRAINING, "", {}, "ftjob", {}), records)
    active.ask(CANCELLED)
    heard: list[str] = []
    active.stopped_by(lambda: heard.append("stop"), lambda: heard.append("kill"))
    assert heard == ["kill"]


def test_work_that_does_not_stop_in_time_is_ended_with_the_server(tmp_path: Path) -> None:
    begun, ended = threading.Event(), threading.Event()

    def deaf(active: ActiveJob) -> None:
        active.stopped_by(lambda: None, ended.set)
        begun.set()
        assert ended.wait(SECONDS)
        active.check()

    jobs = JobRunner(JobStore(tmp_path), {TRAINING: deaf})
    jobs.start()
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    assert begun.wait(SECONDS)
    try:
        jobs.close(0.0)
        assert ended.is_set() and job.status == "queued"
    finally:
        ended.set()


def test_what_the_disk_refused_is_kept_at_the_server_s_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))

    def full(job: Job) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.records, "save", full)
        jobs.cancel(job.id)
    assert JobStore(tmp_path).jobs[job.id].status == "queued"
    jobs.close(0.0)
    assert JobStore(tmp_path).jobs[job.id].status == "cancelled"


def test_work_is_asked_for_a_checkpoint_when_the_server_ends(tmp_path: Path) -> None:
    begun, go, heard = threading.Event(), threading.Event(), list[str]()

    def stop() -> None:
        heard.append("stop")
        go.set()

    def work(active: ActiveJob) -> None:
        active.stopped_by(stop, go.set)
        begun.set()
        assert go.wait(SECONDS)
        active.check()

    jobs = JobRunner(JobStore(tmp_path), {TRAINING: work})
    jobs.start()
    jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    assert begun.wait(SECONDS)
    jobs.close(SECONDS)
    assert heard[:1] == ["stop"]


def test_a_job_that_has_been_trained_is_not_paused(tmp_path: Path) -> None:
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    job.trained = {}
    with pytest.raises(Conflict, match="nothing left that could be paused"):
        jobs.pause(job.id)


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_file_is_in_use_until_its_job_is_over(tmp_path: Path, field: str) -> None:
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {field: "file-1"}, "ftjob", {}))
    assert jobs.using("file-1") == job.id and jobs.using("file-2") is None
    jobs.cancel(job.id)
    assert jobs.using("file-1") is None


@pytest.mark.parametrize("wish", ["pausing", "cancelling"])
@pytest.mark.parametrize("error", [None, StoreFailed("no space left")], ids=["succeeds", "fails"])
def test_work_that_ended_before_it_heard_of_a_wish_has_ended_as_it_did(
    tmp_path: Path, wish: str, error: Exception | None
) -> None:
    def work(active: ActiveJob) -> None:
        setattr(active.job, wish, True)
        if error is not None:
            raise error

    jobs = JobRunner(JobStore(tmp_path), {TRAINING: work})
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    jobs.start()
    try:
        until(lambda: job.finished_at is not None or job.status == "paused")
    finally:
        jobs.close(0.0)
    if error is None:
        assert job.status == "succeeded"
    else:  # and could be resumed: nobody who has cancelled a job wants that
        assert (job.status, job.error is None) == (("cancelled", True) if wish == "cancelling" else ("failed", False))
    assert not getattr(job, wish)


def test_a_trained_job_is_not_told_to_be_validating_and_began_when_it_did(tmp_path: Path) -> None:
    seen: list[str] = []
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: seen.append(active.job.status)})
    job = jobs.records.prepare(TRAINING, "", {}, "ftjob", {})
    job.trained, job.started_at = {}, 5.0
    jobs.enter(job)
    jobs.start()
    try:
        until(lambda: job.over)
    finally:
        jobs.close(0.0)
    assert (seen, job.started_at) == (["running"], 5.0)


def test_a_job_is_read_though_a_later_version_told_more_of_its_progress(tmp_path: Path) -> None:
    records = JobStore(tmp_path)
    job = records.prepare(TRAINING, "", {}, "ftjob", {})
    records.enter(job)
    state = tmp_path / job.id / STATE
    told = json.loads(state.read_text())
    told["progress"] |= {"step": 3, "watts": 5.0}
    state.write_text(json.dumps(told))
    assert JobStore(tmp_path).jobs[job.id].progress.step == 3


def test_what_the_disk_has_taken_is_not_saved_again_with_each_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    first, second = (jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {})) for _ in range(2))
    jobs.cancel(first.id)
    saved: list[Job] = []
    monkeypatch.setattr(jobs.records, "save", saved.append)
    jobs.cancel(second.id)
    assert saved == [second]


@pytest.mark.parametrize("drain", [0.0, SECONDS])
def test_the_server_s_end_gives_a_checkpoint_the_time_that_it_drains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drain: float
) -> None:
    """And a second at least."""
    begun, go, waits = threading.Event(), threading.Event(), list[float]()
    join = threading.Thread.join

    def work(active: ActiveJob) -> None:
        active.stopped_by(lambda: None, go.set)
        begun.set()
        assert go.wait(SECONDS)
        active.check()

    def wait(thread: threading.Thread, seconds: float) -> None:
        waits.append(seconds)
        go.set()  # the checkpoint is written meanwhile
        join(thread, SECONDS)

    jobs = JobRunner(JobStore(tmp_path), {TRAINING: work})
    jobs.start()
    jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    assert begun.wait(SECONDS)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", wait)
        jobs.close(drain)
    assert len(waits) == 1 and max(drain, 1.0) / 2 < waits[0] <= max(drain, 1.0)


@pytest.mark.parametrize("pausing", [False, True])
def test_a_full_disk_keeps_no_server_from_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pausing: bool
) -> None:
    records = JobStore(tmp_path)
    job = records.prepare(TRAINING, "", {}, "ftjob", {})
    job.status, job.pausing = "running", pausing  # as a server leaves it that is killed
    records.enter(job)

    def full(self: JobStore, job: Job) -> None:
        raise StoreFailed("no space left")

    monkeypatch.setattr(JobStore, "save", full)
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    assert jobs.get(job.id).status == ("paused" if pausing else "queued")


def test_a_failed_job_that_is_resumed_has_not_finished(make, work):
    jobs, work.error = make(), JobError("bad", "the reason")
    job, _ = add(jobs), add(jobs)
    work.go.set()
    until(lambda: job.over and len(work.begun) == 2)
    assert job.finished_at is not None
    resumed = jobs.resume(job.id)
    assert (resumed.status, resumed.finished_at, resumed.error) == ("queued", None, None)


def test_whoever_sees_a_status_finds_its_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    seen: list[str] = []
    note = jobs.records.note

    def noted(job: Job, message: str, **more: object) -> None:
        seen.append(job.status)
        note(job, message, **more)

    monkeypatch.setattr(jobs.records, "note", noted)
    jobs.cancel(job.id)
    assert seen == ["queued"] and job.status == "cancelled"


def test_of_jobs_that_are_over_those_go_that_ended_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long run that has just ended is not the oldest for having been asked for first."""
    monkeypatch.setattr("server.jobs.job_store.MOST_OVER", 2)
    records = JobStore(tmp_path)
    for name, finished in (("long", 9.0), ("short", 5.0), ("last", None)):
        job = records.prepare(TRAINING, name, {}, "ftjob", {})
        job.status, job.finished_at = ("succeeded", finished) if finished else ("queued", None)
        records.enter(job)
    assert [job.name for job in records.all()] == ["long", "last"]


def test_what_a_failed_job_goes_on_from_is_not_deleted_for_jobs_of_other_kinds_or_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.jobs.job_store.MOST_OVER", 3)
    records = JobStore(tmp_path)

    def ended(kind: str, name: str, status: str, at: float) -> Job:
        job = records.prepare(kind, name, {}, "ftjob" if kind == TRAINING else "eval", {})
        records.enter(job)
        job.status, job.finished_at = status, at
        records.save(job)
        return job

    failed = [ended(TRAINING, f"failed {i}", "failed", float(i)) for i in range(2)]
    for i in range(10, 15):
        ended(EVALUATION, f"measured {i}", "failed" if i % 2 else "succeeded", float(i))
        ended(TRAINING, f"trained {i}", "succeeded", float(i))
    names = {job.name for job in records.all()}
    assert names == {"failed 0", "failed 1", *(f"{did} {i}" for did in ("measured", "trained") for i in (12, 13, 14))}
    assert not caplog.records
    checkpoint = records.folder(failed[0].id) / "checkpoint"
    checkpoint.write_bytes(b"hours")
    for i in (2, 3):
        ended(TRAINING, f"failed {i}", "failed", 20.0 + i)
    assert not checkpoint.exists() and f"job {failed[0].id}, which has failed, can go on no more" in caplog.text
    assert {f"failed {i}" for i in (1, 2, 3)} < {job.name for job in records.all()}


def test_a_disk_that_refuses_an_event_costs_the_event_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jobs = JobRunner(JobStore(tmp_path), {TRAINING: lambda active: None})
    opened = Path.open

    def full(path: Path, *given: object, **options: object) -> object:
        if path.name == EVENTS:
            raise OSError(28, "No space left on device")
        return opened(path, *given, **options)

    monkeypatch.setattr(Path, "open", full)
    job = jobs.enter(jobs.records.prepare(TRAINING, "", {}, "ftjob", {}))
    assert jobs.cancel(job.id).status == "cancelled" and jobs.records.events(job.id) == []
    assert f"an event of job {job.id} cannot be written" in caplog.text


def test_a_record_of_before_has_counted_its_tokens() -> None:
    """Else a counter would begin at nothing again."""
    assert Progress(tokens=5).most_tokens == 5 and Progress(tokens=5, most_tokens=7).most_tokens == 7


def heard(tmp_path: Path) -> tuple[_Heard, ActiveJob]:
    records = JobStore(tmp_path)
    active = ActiveJob(records.prepare(TRAINING, "", {}, "ftjob", {}), records)
    return _Heard(active), active


def test_of_a_long_run_some_steps_are_told_and_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.jobs.training_job.METRIC_EVENTS", 4)
    process, active = heard(tmp_path)
    for step in range(1, 12):
        told = {"step": step, "steps": 11, "loss": 1.0, "accuracy": 0.5, "learning_rate": 1e-4, "seconds": 2.0 * step}
        process.line({"kind": "step", "tokens": 10 * step, **told})
    events = active.records.events(active.job.id)
    assert [event["data"]["step"] for event in events] == [2, 4, 6, 8, 10, 11]
    progress = active.job.progress
    assert (progress.step, progress.tokens, progress.seconds) == (11, 110, 22.0)


def test_what_is_told_again_becomes_an_event_once(tmp_path: Path) -> None:
    """The server before had heard of some of it."""
    process, active = heard(tmp_path)
    at = {"steps": 9, "tokens": 1, "seconds": 1.0, "loss": 1.0, "accuracy": 0.5, "learning_rate": 1e-4}
    kinds = ("step", "eval", "checkpoint")
    for kind in kinds:
        process.line({"kind": kind, "step": 1, **at})
    process.line({"kind": "step", "step": 2, **at})
    next_one = _Heard(active)
    for step in (1, 2, 3):
        for kind in kinds:
            next_one.line({"kind": kind, "step": step, "again": True, **at})
    next_one.line({"kind": "step", "step": 3, **at})
    events = [event["data"] for event in active.records.events(active.job.id)]
    assert [data["step"] for data in events if "train_loss" in data and "step" in data] == [1, 2, 3, 3]
    assert [data["step"] for data in events if "valid_loss" in data and "step" in data] == [1, 2, 3]
    assert [data["checkpoint"] for data in events if "checkpoint" in data] == [1, 2, 3]
    assert active.job.progress.step == 3, "what is trained again from a checkpoint is told as it was"


def test_a_validation_loss_that_is_no_number_is_not_told_as_one(tmp_path: Path) -> None:
    process, active = heard(tmp_path)
    process.line({"kind": "eval", "step": 3, "steps": 9, "accuracy": 0.5})
    process.line({"kind": "checkpoint", "step": 3})
    evaluated, kept = (event["data"] for event in active.records.events(active.job.id))
    assert evaluated == {"step": 3, "total_steps": 9, "valid_mean_token_accuracy": 0.5}
    assert kept == {"checkpoint": 3, "valid_mean_token_accuracy": 0.5}


def test_examples_that_are_left_out_are_a_warning(tmp_path: Path) -> None:
    process, active = heard(tmp_path)
    told = {"examples": 7, "validation_examples": 2, "held_out": 2, "too_long": 3, "steps": 9}
    process.line({"kind": "validated", **told})
    first, second = active.records.events(active.job.id)
    assert (
        first["message"] == "FileStore are valid: 7 examples to learn, 2 to validate on (held out of the training "
        "file); 9 steps."
    )
    assert second["level"] == "warn" and second["message"].startswith("3 examples are longer")
    assert active.job.status == "running" and active.job.progress.steps == 9


def test_a_failed_job_tells_which_field_is_to_blame(make, work):
    jobs, work.error = make(), JobError("bad", "the reason", "lora.r")
    job = add(jobs)
    work.go.set()
    until(lambda: job.over)
    assert job.error == {"code": "bad", "message": "the reason", "param": "lora.r"}
    assert said(jobs, job)[0] == "Created."


def test_an_evaluation_that_has_failed_is_not_resumed(make, work):
    """What it needs is gone with its end."""
    jobs, work.error = make(), JobError("bad", "the reason")
    job = add(jobs, EVALUATION)
    work.go.set()
    until(lambda: job.over)
    with pytest.raises(Conflict, match="only a job that is paused or has failed"):
        jobs.resume(job.id)


def test_what_is_told_between_checkpoints_is_told_of_them(tmp_path: Path) -> None:
    process, active = heard(tmp_path)
    step = {"loss": 1.5, "accuracy": 0.5, "learning_rate": 1e-4, "seconds": 2.0, "tokens": 10}
    process.line({"kind": "step", "step": 1, "steps": 2, **step})
    process.line({"kind": "eval", "step": 1, "steps": 2, "loss": 2.0, "accuracy": 0.25})
    process.line({"kind": "checkpoint", "step": 1})
    process.line({"kind": "note", "message": "so", "data": {"error": 0.5}})
    *_, kept, noted = active.records.events(active.job.id)
    assert kept["data"] == {
        "checkpoint": 1,
        "train_loss": 1.5,
        "train_mean_token_accuracy": 0.5,
        "valid_loss": 2.0,
        "valid_mean_token_accuracy": 0.25,
    }
    assert noted["data"] == {"error": 0.5}


def test_progress_is_on_the_disk_with_each_checkpoint(tmp_path: Path) -> None:
    process, active = heard(tmp_path)
    active.records.enter(active.job)
    step = {"loss": 1.5, "accuracy": 0.5, "learning_rate": 1e-4, "seconds": 2.0, "tokens": 10}
    process.line({"kind": "step", "step": 3, "steps": 9, **step})
    process.line({"kind": "checkpoint", "step": 3})
    assert JobStore(tmp_path).jobs[active.job.id].progress.step == 3


def test_a_server_that_ended_after_a_checkpoint_did_not_end_for_nothing(tmp_path: Path) -> None:
    process, active = heard(tmp_path)
    active.records.enter(active.job)
    active.job.interrupted = 2
    step = {"loss": 1.5, "accuracy": 0.5, "learning_rate": 1e-4, "seconds": 2.0, "tokens": 10}
    process.line({"kind": "step", "step": 3, "steps": 9, **step})
    assert active.job.interrupted == 2
    process.line({"kind": "checkpoint", "step": 3})
    assert JobStore(tmp_path).jobs[active.job.id].interrupted == 0


def test_nor_did_one_that_ended_after_all_was_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = dict.fromkeys(("samples", "steps", "tokens", "seconds", "tokens_per_second", "memory"), 1)
    end = {"kind": "trained", "parameters": 1, "made": told}
    process = SimpleNamespace(lines=lambda: [end], stop=lambda: None, kill=lambda: None)
    monkeypatch.setattr(training_module, "Process", lambda folder: process)
    _, active = heard(tmp_path)
    active.job.interrupted = 2
    nothing: Any = None
    TrainingJob(nothing, nothing, lambda lent: None)._train(active)
    assert JobStore(tmp_path).jobs[active.job.id].interrupted == 0


def test_tokens_that_were_counted_are_not_taken_back(tmp_path: Path) -> None:
    """A run that goes on from a checkpoint counts from there; a counter never falls."""
    process, active = heard(tmp_path)
    step = {"loss": 1.5, "accuracy": 0.5, "learning_rate": 1e-4, "seconds": 2.0}
    for number, tokens in ((5, 50), (3, 30)):
        process.line({"kind": "step", "step": number, "steps": 9, "tokens": tokens, **step})
    assert (active.job.progress.tokens, active.job.progress.most_tokens) == (30, 50)


@pytest.mark.parametrize(
    "end", [{"kind": "failed", "code": "bad", "message": "the reason", "param": "lora.r"}, {"kind": "stopped"}, None]
)
def test_processors_are_lent_while_a_process_trains_and_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: dict[str, Any] | None
) -> None:
    happened: list[Any] = []

    class Process:
        def __init__(self, folder: Path) -> None:
            pass

        def lines(self) -> list[dict[str, Any]]:
            happened.append("trains")
            return [] if end is None else [end]

        def stop(self) -> None:
            pass

        def kill(self) -> None:
            happened.append("killed")

        def how_it_ended(self) -> str:
            return "it died"

    monkeypatch.setattr(training_module, "Process", Process)
    _, active = heard(tmp_path)
    nothing: Any = None
    with pytest.raises((JobError, JobStopped)) as ended:
        TrainingJob(nothing, nothing, happened.append)._train(active)
    assert happened == [True, "trains", "killed", False]
    if end is None:
        assert ended.value.code == "process_died"  # type: ignore[union-attr]
    elif end["kind"] == "failed":
        assert (ended.value.code, ended.value.param) == ("bad", "lora.r")  # type: ignore[union-attr]
    else:
        assert active.wanted == "closing"


def test_a_job_of_a_version_that_kept_no_task_says_so(tmp_path: Path) -> None:
    _, active = heard(tmp_path)
    nothing: Any = None
    with pytest.raises(JobError, match="ask anew") as failure:
        TrainingJob(nothing, nothing, lambda lent: None)(active)
    assert failure.value.code == "older_version"
