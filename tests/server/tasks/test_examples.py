"""What subjects scored on the same examples."""

from __future__ import annotations

import sqlite3

import pytest

from server.tasks.examples import between, digest, keep
from server.tasks.intervals import Totals


@pytest.fixture
def db() -> sqlite3.Connection:
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE examples (subject, metric, example BLOB, value, at, UNIQUE (subject, metric, example))")
    return db


def test_two_are_compared_on_what_both_were_asked_in_one_way(db: sqlite3.Connection) -> None:
    for subject, example, asked, value in [
        (1, "a", "so", 1.0),
        (2, "a", "so", 0.5),
        (1, "b", "so", 1.0),
        (2, "b", "otherwise", 0.0),
        (1, "c", "so", 1.0),
        (3, "c", "so", 0.0),
    ]:
        keep(db, subject, "chrf", example, asked, value, 0.0)
    assert between(db, 1, 2, "chrf") == Totals(1, 0.75, 0.5625)
    assert between(db, 2, 1, "chrf") == Totals(1, 0.25, 0.0625)
    assert between(db, 1, 2, "bleu") == between(db, 2, 3, "chrf") == Totals()


@pytest.mark.parametrize("before", [digest("a"), digest("a") + digest("so"), digest("a") + b"\xff" * 16])
def test_the_last_score_of_an_example_replaces_any_other(db: sqlite3.Connection, before: bytes) -> None:
    """Also one from before it was kept what an example was asked with; no other's is touched."""
    others = [(1, "chrf", digest("b"), 0.5, 0.0), (1, "bleu", before, 0.5, 0.0), (2, "chrf", before, 0.5, 0.0)]
    db.executemany("INSERT INTO examples VALUES (?, ?, ?, ?, ?)", [(1, "chrf", before, 0.5, 0.0), *others])
    keep(db, 1, "chrf", "a", "so", 1.0, 2.0)
    rows = db.execute("SELECT * FROM examples").fetchall()
    assert sorted(rows) == sorted([*others, (1, "chrf", digest("a") + digest("so"), 1.0, 2.0)])
