"""The import of jobs and files from a state directory of an earlier version, which wrote `data/jobs`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from adapters.errors import StoreFailed
from server.database import Database
from server.database.legacy_jobs import import_jobs
from server.jobs.file_store import FileStore
from server.jobs.job_store import JobStore
from server.jobs.runner import JobRunner

WRITTEN = Path(__file__).parent / "data" / "jobs"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    shutil.copytree(WRITTEN, tmp_path / "state")
    return tmp_path / "state"


def stores(database: Database, state: Path) -> tuple[JobStore, FileStore]:
    return JobStore(database, state / "jobs"), FileStore(database, state / "files")


def test_jobs_events_and_files_are_imported(database: Database, state: Path) -> None:
    import_jobs(database, state)
    store, files = stores(database, state)
    done, running, failed = store.all()
    assert (done.name, done.status, done.started_at, done.finished_at) == (
        "mood",
        "succeeded",
        1764500100.5,
        1764500200.5,
    )
    assert (done.progress.step, done.progress.tokens, done.progress.counted_tokens) == (1, 50, 70)
    assert done.trained is not None and done.trained["losses"] == {
        "examples": 2, "eval": None, "replaced": 2.5, "replaced_digest": "2" * 64
    }  # fmt: skip
    assert done.result["model"] == "mood" and done.request["lora"]["publish"] == "if_better"
    created, step, odd = store.events(done.id)
    assert (created["message"], step["type"], step["data"]["train_loss"]) == ("Created.", "metrics", 2.0)
    assert (odd["level"], odd["message"]) == ("warn", r"half of a pair: \ud800")
    assert (running.status, running.interrupted, running.progress.counted_tokens) == ("running", 1, 30)
    assert [event["message"] for event in store.events(running.id)] == ["Created."], "the second is truncated"
    assert failed.error == {"code": "invalid_file", "message": "line 1 is wrong", "param": "file"}

    table, data = files.all()
    assert (table.filename, table.purpose, done.result["files"]) == ("é.csv", "fine-tune-results", [table.id])
    assert files.path(data.id).read_text() == '{"input": "a", "output": "b"}\n' and data.bytes == 30
    runner = JobRunner(store, {})
    assert runner.get(running.id).status == "queued" and runner.using(data.id) == running.id
    assert (store.folder(running.id) / "judged.jsonl").exists()


def test_records_are_imported_once(database: Database, state: Path) -> None:
    import_jobs(database, state)
    store, files = stores(database, state)
    files.delete(files.all()[0].id)
    before = store.all()
    before[0].status = "cancelled"
    store.save(before[0])
    import_jobs(database, state)
    for path in (state / "jobs").glob("*/job.json.imported"):  # the server was killed before it renamed them
        path.rename(path.with_name("job.json"))
    import_jobs(database, state)
    store, files = stores(database, state)
    assert store.all() == before and len(files.all()) == 1
    assert not list(state.glob("*/*/*.json"))


def test_a_database_that_refuses_leaves_the_records(
    database: Database, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Database) -> None:
        raise StoreFailed("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Database, "transaction", refuse)
        with pytest.raises(StoreFailed):
            import_jobs(database, state)
    import_jobs(database, state)
    assert len(stores(database, state)[0].all()) == 3


@pytest.mark.parametrize("damage", ["{", "[]", "null", '{"id": "other"}', "{}"])
def test_a_damaged_record_is_left_and_logged(
    database: Database, state: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    broken = [next((state / kind).glob(f"*/{name}")) for kind, name in (("jobs", "job.json"), ("files", "file.json"))]
    for path in broken:
        path.write_text(damage)
    import_jobs(database, state)
    store, files = stores(database, state)
    assert len(store.all()) == 2 and len(files.all()) == 1
    assert all(path.read_text() == damage and path.parent.name in caplog.text for path in broken)


def test_jobs_of_versions_before_the_base_was_recorded(database: Database, state: Path) -> None:
    for path in (state / "jobs").glob("ftjob-*/job.json"):
        path.write_text(path.read_text().replace('"base"', '"unused"').replace('"template"', '"unused2"'))
    import_jobs(database, state)
    job = stores(database, state)[0].all()[0]
    assert job.request["base"] == {"name": "unknown", "id": ""} and job.request["template"] == {}
