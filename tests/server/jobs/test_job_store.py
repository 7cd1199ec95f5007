"""Job records and events: what survives a restart, and what is left when the disk or the database refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import StoreFailed
from server.database import Database
from server.jobs.job_store import EVALUATION, TRAINING, Job, JobStore, Progress


def refuse(*_: object, **__: object) -> None:
    raise StoreFailed("no space left")


def test_records_and_events_survive_a_restart(store: JobStore, open_store: Callable[[], JobStore]) -> None:
    jobs = [store.create(TRAINING, name, {"a": [1, None]}, "ftjob") for name in ("b", "", "a")]
    job = jobs[0]
    assert jobs[1].name == f"ft-{jobs[1].id}"
    job.status, job.error, job.trained = "failed", {"code": "bad", "message": "é", "param": None}, {"losses": {}}
    job.progress = Progress(3, 9, 0.5, 10, 20, 1.5)
    job.started_at, job.finished_at, job.pausing, job.cancelling, job.interrupted = 1.5, 2.5, True, True, 2
    job.result["model"] = "m"
    store.save(job)
    store.add_event(job, "one")
    store.add_event(job, "half of a pair: \ud800", level="warn", type="metrics", data={"step": 1})
    again = open_store()
    assert again.all() == jobs and again.jobs[job.id].resumable
    first, second = again.events(job.id)
    assert (first["message"], first["level"], first["type"], first["data"]) == ("one", "info", "message", {})
    assert (second["level"], second["type"], second["data"]) == ("warn", "metrics", {"step": 1})
    assert second["message"] == "half of a pair: \\ud800", "it can be sent as UTF-8"
    assert len({event["id"] for event in again.events(job.id)}) == 2 and again.events(jobs[1].id) == []


def test_the_files_of_a_job_are_private(store: JobStore) -> None:
    job = store.create(EVALUATION, "x", {}, "eval", lambda folder: (folder / "data").write_bytes(b"x"))
    assert (store.folder(job.id) / "data").read_bytes() == b"x" and not store.folder(job.id).stat().st_mode & 0o077


@pytest.mark.parametrize("refused", ["files", "database"])
def test_a_job_that_cannot_be_stored_leaves_nothing(
    store: JobStore, open_store: Callable[[], JobStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    def write(folder: Path) -> None:
        (folder / "data").write_bytes(b"x")
        if refused == "files":
            raise OSError(28, "No space left on device", "/secret/place")

    if refused == "database":
        monkeypatch.setattr(Database, "transaction", refuse)
    with pytest.raises(StoreFailed, match="[Nn]o space left") as failure:
        store.create(EVALUATION, "x", {}, "eval", write)
    assert "secret" not in failure.value.message
    assert store.all() == open_store().all() == [] and not list((tmp_path / "jobs").iterdir())


def test_an_event_that_the_database_refuses_is_logged_and_lost(
    store: JobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    job = store.create(TRAINING, "", {}, "ftjob")
    with monkeypatch.context() as patch:
        patch.setattr(Database, "transaction", refuse)
        store.add_event(job, "Paused.")
    assert store.events(job.id) == [] and f"an event of job {job.id} is lost (Paused.)" in caplog.text


def test_the_jobs_of_a_kind_that_finished_first_are_deleted(
    store: JobStore, open_store: Callable[[], JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.jobs.job_store.MAX_FINISHED", 2)

    def add(kind: str, name: str, finished_at: float | None) -> Job:
        job = store.create(kind, name, {}, "job")
        store.add_event(job, "Created.")
        if finished_at is not None:
            job.status, job.finished_at = "succeeded", finished_at
            store.save(job)
        return job

    long, short = add(TRAINING, "long", 9.0), add(TRAINING, "short", 5.0)
    for kind, name, at in ((EVALUATION, "other", 1.0), (TRAINING, "runs", None), (TRAINING, "last", 10.0)):
        add(kind, name, at)
    add(TRAINING, "new", None)
    assert [job.name for job in store.all()] == ["long", "other", "runs", "last", "new"]
    assert open_store().all() == store.all() and store.events(short.id) == []
    assert store.folder(long.id).exists() and not store.folder(short.id).exists()
