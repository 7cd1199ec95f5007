"""What each subject scored on each example of an evaluation, so that two can be compared on those that both were asked.

Owns the rows of `examples` in the file of quality records. Does not know when they are written, or what is made of it.
"""

from __future__ import annotations

import hashlib
import sqlite3

from server.tasks.intervals import Totals

_BEHIND_ALL = b"\xff" * 17
"""Put behind a digest, it is behind that one with any other put behind it."""


def digest(text: str) -> bytes:
    """16 bytes that stand for a text: an id, or the words of an answer."""
    return hashlib.sha256(text.encode()).digest()[:16]


def keep(db: sqlite3.Connection, subject: int, metric: str, example: str, asked: str, value: float, at: float) -> None:
    """Write a score over any that the subject had of this example, within a transaction. `asked` is what the example
    was asked with: scores of an example that was asked in two ways are of two questions.

    Both parts of the key are of one length; records of before the second was kept have the first alone.
    """
    this = digest(example)
    db.execute(
        "DELETE FROM examples WHERE subject = ? AND metric = ? AND example BETWEEN ? AND ?",
        (subject, metric, this, this + _BEHIND_ALL),
    )
    db.execute("INSERT INTO examples VALUES (?, ?, ?, ?, ?)", (subject, metric, this + digest(asked), value, at))


def between(db: sqlite3.Connection, first: int, second: int, metric: str) -> Totals:
    """(1 + first's - second's) / 2 on the examples that both were asked in one way."""
    query = (
        "SELECT count(*), total(half), total(half * half) FROM (SELECT (1 + a.value - b.value) / 2 AS half"
        " FROM examples a JOIN examples b ON b.metric = a.metric AND b.example = a.example"
        " WHERE a.subject = ? AND b.subject = ? AND a.metric = ?)"
    )
    return Totals(*db.execute(query, (first, second, metric)).fetchone())
