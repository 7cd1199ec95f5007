"""Digests of files are remembered once their files have settled."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from server.model import digest
from server.model.digest import Digests


@pytest.mark.parametrize(("age", "reads"), [(3600.0, 1), (0.0, 2), (-3600.0, 1)], ids=["old", "new", "future"])
def test_a_file_that_is_not_of_just_now_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, age: float, reads: int
) -> None:
    """As is one that a clock was ahead for."""
    file = tmp_path / "base.gguf"
    file.write_bytes(b"base")
    now = time.time()
    monkeypatch.setattr(digest, "time", SimpleNamespace(time=lambda: now))
    os.utime(file, (now - age,) * 2)
    read: list[Path] = []
    sha256 = digest.sha256

    def reading(path: Path, *part: int | None) -> str:
        read.append(path)
        return sha256(path, *part)

    monkeypatch.setattr(digest, "sha256", reading)
    assert Digests(tmp_path).of(file) == Digests(tmp_path).of(file) == sha256(file)
    assert len(read) == reads
