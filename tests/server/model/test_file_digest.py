"""Digests of files are remembered once their files have settled."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.model import file_digest
from server.model.file_digest import Digests


@pytest.mark.parametrize(("age", "reads"), [(3600.0, 1), (0.0, 2), (-3600.0, 1)], ids=["old", "new", "future"])
def test_a_file_that_is_not_of_just_now_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, reads: int
) -> None:
    """As is one that a clock was ahead for."""
    file = tmp_path / "base.gguf"
    file.write_bytes(b"base")
    now = time.time()
    monkeypatch.setattr(file_digest, "time", SimpleNamespace(time=lambda: now))
    os.utime(file, (now - age,) * 2)
    read: list[Path] = []
    sha256 = file_digest.sha256

    def reading(path: Path, *part: int | None) -> str:
        read.append(path)
        return sha256(path, *part)

    monkeypatch.setattr(file_digest, "sha256", reading)
    assert Digests(tmp_path).of(file) == Digests(tmp_path).of(file) == sha256(file)
    assert len(read) == reads


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_file_of_the_same_size_and_time_is_another(tmp_path: Path, how: str) -> None:
    file, other = tmp_path / "base.gguf", tmp_path / "other"
    for path, content in ((file, b"one"), (other, b"two")):
        path.write_bytes(content)
        os.utime(path, (1e9, 1e9))
    assert Digests(tmp_path).of(file) == file_digest.sha256(file)
    if how == "replaced":
        os.replace(other, file)
    else:
        file.write_bytes(b"two")
        os.utime(file, (1e9, 1e9))
    assert Digests(tmp_path).of(file) == file_digest.sha256(file)


def test_what_an_earlier_version_remembered_is_not_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It knew size and time of the last write alone."""
    file = tmp_path / "base.gguf"
    file.write_bytes(b"base")
    os.utime(file, (1e9, 1e9))
    remembered = tmp_path / file_digest.REMEMBERED
    remembered.write_text(json.dumps({f"{file}[0:None]": [4, 10**18, "wrong"]}))
    assert Digests(tmp_path).of(file) == file_digest.sha256(file) and caplog.text == ""
    assert json.loads(remembered.read_text()) == {
        f"{file}[0:None]": [*file_digest.stamp(file), file_digest.sha256(file)]
    }


def test_a_use_that_is_noted_leaves_a_file_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "base.packed"
    file.write_bytes(b"base")
    os.utime(file, (1e9, 1e9))
    digests = Digests(tmp_path)
    whole, part = digests.of(file), digests.of(file, 1, 3)
    before = file_digest.stamp(file)
    digests.note_use(file)
    assert file_digest.stamp(file) != before and file.stat().st_mtime == 1e9 < file.stat().st_atime
    monkeypatch.setattr(file_digest, "sha256", None)
    assert (Digests(tmp_path).of(file), Digests(tmp_path).of(file, 1, 3)) == (whole, part)


def test_a_file_that_changed_since_it_was_read_is_not_known_by_its_use(tmp_path: Path) -> None:
    file = tmp_path / "base.packed"
    file.write_bytes(b"base")
    os.utime(file, (1e9, 1e9))
    digests = Digests(tmp_path)
    digests.of(file)
    file.write_bytes(b"more")
    os.utime(file, (1e9, 1e9))
    digests.note_use(file)
    assert digests.of(file) == file_digest.sha256(file)


def test_processes_over_one_cache_lose_nothing_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a base of its own, and two that begin with the same one."""
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_bytes(file.name.encode())
        os.utime(file, (1e9, 1e9))
    first, second, third = (Digests(tmp_path) for _ in range(3))
    first.of(files[0])
    second.of(files[1])
    third.of(files[0])
    for digests, file in ((first, files[0]), (third, files[0]), (second, files[1])):
        digests.note_use(file)
    monkeypatch.setattr(file_digest, "sha256", None)
    assert len({Digests(tmp_path).of(file) for file in files}) == 2
