"""An empty database and job store, and the spec of a small training run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.training import TrainingConfig
from server.database import Database, database_url
from server.jobs.active_job import ActiveJob
from server.jobs.job_store import TRAINING, JobStore
from server.jobs.worker_messages import BaseSource, WorkerSpec

CONFIG = TrainingConfig(
    epochs=2, batch_size=4, lora_rank=2, target_modules=("q_proj",), compute_dtype="float32", save_steps=2
)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("database")
    Database(database_url(None, folder)).close()
    return folder / "loramux.db"


@pytest.fixture
def database(tmp_path: Path, empty_database: Path) -> Iterator[Database]:
    """An empty SQLite database."""
    (tmp_path / "database").mkdir()
    shutil.copy(empty_database, tmp_path / "database")
    opened = Database(database_url(None, tmp_path / "database"))
    yield opened
    opened.close()


@pytest.fixture
def open_store(tmp_path: Path, database: Database) -> Callable[[], JobStore]:
    """Opens the job store as a new server does."""
    return lambda: JobStore(database, tmp_path / "jobs")


@pytest.fixture
def store(open_store: Callable[[], JobStore]) -> JobStore:
    return open_store()


@pytest.fixture
def active(store: JobStore) -> ActiveJob:
    """A training job that runs."""
    return ActiveJob(store.create(TRAINING, "", {}, "ftjob"), store)


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    """Ten examples for the tiny base."""
    content = tmp_path / "content"
    content.write_text("".join(json.dumps({"input": f"the {i}", "output": "good"}) + "\n" for i in range(10)))
    source = BaseSource(tmp_path, "tiny", "reference", "none", None, False, 8, tmp_path, "0" * 64)
    return WorkerSpec(
        base=source, name="x", config=CONFIG, data=content, data_name="d.jsonl", template={}, threads=1, max_rank=64
    )
