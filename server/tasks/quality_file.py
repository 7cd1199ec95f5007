"""How `quality.db` is opened: made, looked through, set aside where it is damaged, in memory where the disk is full.

Owns the tables and the file. What is in them is `quality`'s.
"""

from __future__ import annotations

import logging
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path

from adapters.atomic_files import set_aside

log = logging.getLogger(__name__)

HOUR = 3_600
SUMS = ("hours", "traffic")
SCORES = ("scores", "examples")
"""What the sums of `hours` are of."""
LEAST_ROOM = 1 << 20
"""Bytes that are free on a disk that is not full."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS subjects (
  id INTEGER PRIMARY KEY, task TEXT NOT NULL, mix TEXT NOT NULL, base TEXT NOT NULL, UNIQUE (task, mix, base));
CREATE TABLE IF NOT EXISTS custom_mix (subject INTEGER PRIMARY KEY);
CREATE TABLE IF NOT EXISTS answers (
  id BLOB PRIMARY KEY, subject INTEGER NOT NULL, tenant TEXT NOT NULL, at REAL NOT NULL, text BLOB NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scores (
  id BLOB PRIMARY KEY, subject INTEGER NOT NULL, metric TEXT NOT NULL, value REAL NOT NULL, at REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS examples (
  subject INTEGER NOT NULL, metric TEXT NOT NULL, example BLOB NOT NULL, value REAL NOT NULL, at REAL NOT NULL,
  PRIMARY KEY (subject, metric, example)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS hours (
  subject INTEGER NOT NULL, metric TEXT NOT NULL, source TEXT NOT NULL, hour INTEGER NOT NULL,
  count INTEGER NOT NULL, total REAL NOT NULL, squares REAL NOT NULL,
  PRIMARY KEY (subject, metric, source, hour)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS traffic (
  subject INTEGER NOT NULL, hour INTEGER NOT NULL, requests INTEGER NOT NULL, errors INTEGER NOT NULL,
  prompt_tokens INTEGER NOT NULL, generated_tokens INTEGER NOT NULL, ttft BLOB NOT NULL, tpot BLOB NOT NULL,
  e2e BLOB NOT NULL, PRIMARY KEY (subject, hour)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS decisions (
  task TEXT PRIMARY KEY, rule TEXT NOT NULL, mix TEXT NOT NULL, base TEXT NOT NULL, since REAL NOT NULL,
  reason TEXT NOT NULL) WITHOUT ROWID;
"""


Load = Callable[[sqlite3.Connection], None]
"""Reads what is kept in memory. Raises sqlite3.DatabaseError or ValueError where it cannot."""


def opened(file: Path, load: Load) -> sqlite3.Connection:
    """The file, loaded. A damaged one is set aside, as the server does without its records rather than not at all.

    Raises sqlite3.OperationalError for what is the disk's, or another process's, but for a disk that is full.
    """
    db = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
    try:
        if (found := db.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(found)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(_SCHEMA)
        load(db)
        return db
    except (sqlite3.DatabaseError, ValueError) as error:
        db.close()
        # SQLITE_ERROR is of tables that are not as they were made, and no code at all of a text that is none.
        code = getattr(error, "sqlite_errorcode", None)
        if isinstance(error, sqlite3.OperationalError) and code not in (None, sqlite3.SQLITE_ERROR):
            if shutil.disk_usage(file.parent).free > LEAST_ROOM:
                raise
            return in_memory(file, load)
        aside = set_aside(file)
        log.error("%s cannot be read (%s); it is set aside as %s", file.name, error, aside.name)
        for rest in ("-wal", "-shm"):  # they belong to no other content
            Path(f"{file}{rest}").unlink(missing_ok=True)
    return opened(file, load)


def still_there(file: Path, db: sqlite3.Connection) -> Callable[[], None]:
    """What raises sqlite3.OperationalError once the file that `db` writes into is not found under its name any more."""
    if not db.execute("PRAGMA database_list").fetchone()[2]:  # it is in memory
        return lambda: None
    begun = file.stat()

    def check() -> None:
        try:
            now = file.stat()
        except OSError:
            now = None
        if now is None or not os.path.samestat(now, begun):
            raise sqlite3.OperationalError(
                f"{file.name} was taken away or replaced while the server runs; start it again"
            )

    return check


def swept(
    db: sqlite3.Connection, hour: int, keys: Iterable[tuple[int, str, str]], subjects: Iterable[int]
) -> tuple[list[int], set[int]]:
    """Delete what is of before an hour, within a transaction: scores and their sums, which are found by `keys`
    (subject, metric, source), and the traffic of `subjects`. Answers who has less traffic now, and who is gone.

    Rows of sums are not gone through, which may come to gigabytes, while who gives feedback waits.
    """
    for scores in SCORES:  # as long as the sums have them
        db.execute(f"DELETE FROM {scores} WHERE at < ?", (hour * HOUR,))
    drop = "DELETE FROM hours WHERE subject = ? AND metric = ? AND source = ? AND hour < ?"
    db.executemany(drop, [(*key, hour) for key in keys])
    drop = "DELETE FROM traffic WHERE subject = ? AND hour < ?"
    less = [subject for subject in subjects if db.execute(drop, (subject, hour)).rowcount]
    left = " OR ".join(f"EXISTS (SELECT 1 FROM {sums} WHERE subject = subjects.id)" for sums in SUMS)
    gone = {number for (number,) in db.execute(f"SELECT id FROM subjects WHERE NOT ({left})")}
    db.executemany("DELETE FROM subjects WHERE id = ?", [(number,) for number in gone])
    db.execute("DELETE FROM custom_mix WHERE subject NOT IN (SELECT id FROM subjects)")
    return less, gone


def in_memory(file: Path, load: Load) -> sqlite3.Connection:
    """A copy of the file, as a full disk lets it be read alone: routes go by what it knows."""
    log.error("the disk is full: quality records are kept in memory until the server ends; make room, start again")
    db = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
    try:
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=rw", uri=True)) as there:
            there.execute("PRAGMA locking_mode=EXCLUSIVE")  # what was written last is read without a file beside it
            there.backup(db)
    except sqlite3.Error as error:
        log.error("%s cannot be read (%s): nothing is known of before", file.name, error)
    db.executescript(_SCHEMA)
    load(db)
    return db
