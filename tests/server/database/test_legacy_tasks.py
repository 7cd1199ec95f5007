"""Import of tasks.json and quality.db, which the last version before the database wrote (data/legacy_tasks)."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from adapters.errors import StoreFailed
from server.database import Database
from server.database.legacy_tasks import BUCKETS, _histogram, import_legacy_tasks
from server.database.tables import deleted_tasks, task_owners, tasks
from server.tasks.intervals import Totals
from server.tasks.quality import Quality
from server.tasks.traffic import LatencyHistogram

LEGACY = Path(__file__).parent / "data" / "legacy_tasks"
FOREVER = 1e11


@pytest.fixture
def state_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(LEGACY, tmp_path / "state"))


def test_tasks_of_an_old_state_directory_are_imported(database: Database, state_dir: Path) -> None:
    import_legacy_tasks(state_dir, database)
    with database.read() as connection:
        rows: dict[str, Any] = {row.name: row for row in connection.execute(sa.select(tasks))}
        deleted = {row.name: row.marks for row in connection.execute(sa.select(deleted_tasks))}
        owners = {row.task: row.adapter for row in connection.execute(sa.select(task_owners))}
    assert {name: row.by_name for name, row in rows.items()} == {
        "polite": True,
        "base-only": True,
        "contest": False,
        "blend": False,
    }
    assert rows["polite"].body["system"] == "Be brief." and rows["polite"].body["defaults"] == {"max_tokens": 60}
    assert rows["contest"].body["route"]["best"] == ["mood", "polite"]
    assert list(deleted) == ["mood"] and len(deleted["mood"]) == 1 and owners == {"both": "first"}


def test_quality_of_an_old_state_directory_is_imported(database: Database, state_dir: Path) -> None:
    import_legacy_tasks(state_dir, database)
    quality = Quality(database, FOREVER)
    try:
        found = quality.performance("contest")
        versions = {v["version"].partition("@")[0]: v for v in found if len(v["adapters"]) == 1}
        assert len(found) == 3 and len(versions) == 2
        scores = [*versions["polite"]["quality"], *versions["mood"]["quality"]]
        assert [(q["metric"], q["source"], q["samples"], q["mean"]) for q in scores] == [
            ("accuracy", "feedback", 4, 0.0),
            ("chrf", "evaluation", 6, 0.25),
            ("accuracy", "feedback", 4, 1.0),
            ("chrf", "evaluation", 6, 0.75),
        ]
        assert versions["mood"]["tokens"] == {"prompt": 12, "generated": 8} and versions["mood"]["errors"] == 0
        assert versions["mood"]["ttft"]["p50"] == pytest.approx(0.04, rel=0.06)
        keys = {key.adapter: key for key, *_ in quality.means(["contest"])}
        assert quality.paired(keys["mood"], keys["polite"], "chrf") == Totals(6, 4.5, 3.375)
        leader = quality.leader("contest", "accuracy by feedback")
        assert leader is not None and leader[0] == keys["mood"]
        assert [m.client_defined for key, m in quality._mixes.items() if key.adapter == "mood+polite"] == [True]
    finally:
        quality.close()


def test_feedback_for_an_answer_before_the_import_replaces_its_score(
    database: Database, state_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite3.connect(state_dir / "quality.db") as old:
        (at,) = old.execute("SELECT max(at) FROM answers").fetchone()
    import_legacy_tasks(state_dir, database)
    monkeypatch.setattr("server.tasks.quality.time.time", lambda: at + 60)
    quality = Quality(database, FOREVER)
    quality.record_feedback("contest", "gen-0", "alice", score=1.0, expected=None)
    means = {(key.adapter, metric): mean for key, metric, _, mean in quality.means(["contest"])}
    assert means["polite", "accuracy"] == 0.25
    quality.close()


def test_files_are_imported_once(database: Database, state_dir: Path) -> None:
    import_legacy_tasks(state_dir, database)
    assert sorted(path.name for path in state_dir.iterdir()) == ["quality.db.imported", "tasks.json.imported"]
    with database.transaction() as connection:
        connection.execute(sa.delete(tasks).where(tasks.c.name == "blend"))
    for path in state_dir.iterdir():  # a crash before the renaming
        path.rename(path.with_suffix(""))
    import_legacy_tasks(state_dir, database)
    with database.read() as connection:
        assert "blend" not in {row.name for row in connection.execute(sa.select(tasks))}


@pytest.mark.parametrize("name", ["tasks.json", "quality.db"])
def test_a_file_that_cannot_be_read_stops_the_start_and_is_kept(database: Database, state_dir: Path, name: str) -> None:
    (state_dir / name).write_bytes(b"[" * 5000)
    with pytest.raises(StoreFailed, match=f"{name} cannot be imported"):
        import_legacy_tasks(state_dir, database)
    assert (state_dir / name).read_bytes() == b"[" * 5000


def test_histograms_of_all_buckets_become_pairs() -> None:
    counts = [0] * BUCKETS
    counts[3], counts[180] = 7, 300
    histogram = LatencyHistogram()
    histogram.load([_histogram(b"".join(count.to_bytes(4, "little") for count in counts))])
    assert histogram.counts.tolist() == counts
