"""Uploaded files: names, order, use by jobs, and what is left when the disk refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.errors import StoreFailed
from server.database import Database
from server.errors import Conflict, UnknownName
from server.jobs.file_store import File, FileStore


@pytest.fixture
def open_files(database: Database, tmp_path: Path) -> Callable[[], FileStore]:
    return lambda: FileStore(database, tmp_path / "files")


def add(files: FileStore, name: str = "a.jsonl") -> File:
    return files.add(lambda path: path.write_bytes(b"abc"), name, "fine-tune")


def test_files_survive_a_restart_newest_first(open_files: Callable[[], FileStore], tmp_path: Path) -> None:
    files = open_files()
    added = [add(files, f"{i}.jsonl") for i in range(4)]
    (tmp_path / "files" / ".new-file-1").mkdir()  # an upload that a kill interrupted
    again = open_files()
    assert again.all() == files.all() == added[::-1]
    assert again.path(added[0].id).read_bytes() == b"abc" and added[0].bytes == 3
    assert {path.name for path in (tmp_path / "files").iterdir()} == {file.id for file in added}


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("C:\\data\\x.jsonl", "x.jsonl"), ("../../x", "x"), ("a\ud800b", "a?b"), ("a\0b", "ab"), ("/", "file"),
     ("é" * 300, "é" * 255)],
)  # fmt: skip
def test_a_filename_is_reduced_to_a_plain_name(open_files: Callable[[], FileStore], sent: str, kept: str) -> None:
    assert add(open_files(), sent).filename == kept


def test_a_file_that_a_job_needs_is_not_deleted(open_files: Callable[[], FileStore], tmp_path: Path) -> None:
    files = open_files()
    file = add(files)
    files.used_by = {file.id: "ftjob-1"}.get
    with pytest.raises(Conflict, match=r"ftjob-1 .*POST /jobs/ftjob-1/cancel"):
        files.delete(file.id)
    files.used_by = lambda id: None
    files.delete(file.id)
    assert open_files().all() == [] and not list((tmp_path / "files").iterdir())
    for change in (files.get, files.path, files.delete):
        with pytest.raises(UnknownName):
            change(file.id)


def test_a_file_is_not_deleted_while_a_job_that_uses_it_is_created(open_files: Callable[[], FileStore]) -> None:
    files = open_files()
    file = add(files)
    users: dict[str, str] = {}
    files.used_by = users.get
    refused: list[Conflict] = []

    def delete() -> None:
        try:
            files.delete(file.id)
        except Conflict as error:
            refused.append(error)

    thread = threading.Thread(target=delete)
    with files.lock:
        thread.start()
        thread.join(0.05)
        users[file.id] = "ftjob-1"
    thread.join()
    assert refused and files.get(file.id)


@pytest.mark.parametrize("refused", ["content", "name", "database"])
def test_a_file_that_cannot_be_stored_leaves_nothing(
    open_files: Callable[[], FileStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    files = open_files()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def refuse(*_: object) -> None:
        raise StoreFailed("No space left on device")

    if refused == "name":
        monkeypatch.setattr("server.jobs.file_store.sync_folder", full)
    if refused == "database":
        monkeypatch.setattr(Database, "transaction", refuse)
    with pytest.raises(StoreFailed, match="No space"):
        files.add(full if refused == "content" else lambda path: path.write_bytes(b"x"), "x", "fine-tune")
    assert files.all() == open_files().all() == [] and list((tmp_path / "files").iterdir()) == []
