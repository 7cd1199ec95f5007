"""Digests of files and their cache."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from server.model import file_digest
from server.model.file_digest import CACHE, Digests, sha256


def test_an_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, reads = tmp_path / "f", 0

    def counted(*arguments: object) -> str:
        nonlocal reads
        reads += 1
        return sha256(*arguments)  # type: ignore[arg-type]

    path.write_bytes(b"abc")
    monkeypatch.setattr(file_digest, "sha256", counted)
    for _ in range(3):
        assert Digests(tmp_path / "cache").of(path) == hashlib.sha256(b"abc").hexdigest()
    assert Digests(tmp_path / "cache").of(path, 1, 3) == hashlib.sha256(b"bc").hexdigest()
    assert reads == 2
    Digests(None).of(path)
    assert reads == 3


@pytest.mark.parametrize("how", ["written", "replaced"])
def test_a_change_is_noticed_even_with_the_old_size_and_time(tmp_path: Path, how: str) -> None:
    path, other = tmp_path / "f", tmp_path / "g"
    path.write_bytes(b"abc")
    before = path.stat()
    Digests(tmp_path).of(path)
    other.write_bytes(b"abd")
    if how == "written":
        path.write_bytes(b"abd")
    else:
        os.replace(other, path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert Digests(tmp_path).of(path) == hashlib.sha256(b"abd").hexdigest()


@pytest.mark.parametrize("content", ["[]", "{", '{"x": 5}'])
def test_a_broken_cache_is_ignored(tmp_path: Path, content: str) -> None:
    (tmp_path / CACHE).write_text(content)
    (tmp_path / "f").write_bytes(b"abc")
    assert Digests(tmp_path).of(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_of_all_covers_names_and_content_in_any_order(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text(name)
    digests, files = Digests(None), [tmp_path / "a", tmp_path / "b"]
    first = digests.of_all(tmp_path, files)
    assert digests.of_all(tmp_path, files[::-1]) == first
    os.replace(tmp_path / "b", tmp_path / "c")
    assert digests.of_all(tmp_path, [tmp_path / "a", tmp_path / "c"]) != first
