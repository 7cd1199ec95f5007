"""Atomic and durable file replacement."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from adapters.atomic_files import replace_file, sync_folder


def test_a_file_is_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    rename = os.replace

    def renamed(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr("os.fsync", lambda fd: events.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    monkeypatch.setattr("os.replace", renamed)
    replace_file(tmp_path / "names", b"new")
    assert events == [".names.part", "rename", tmp_path.name]
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("names", b"new")]


def test_a_failed_write_keeps_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    replace_file(tmp_path / "names", b"old")
    for step in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(f"os.{step}", full)
            with pytest.raises(OSError, match="No space"):
                replace_file(tmp_path / "names", b"new")
        assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("names", b"old")]


def test_a_folder_that_cannot_be_synced_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("adapters.atomic_files.sync_folder", refused)
    replace_file(tmp_path / "names", b"new")
    assert (tmp_path / "names").read_bytes() == b"new"
    assert "names is written, but its folder could not be synced" in caplog.text


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_file_systems_without_folder_sync_are_supported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    def refused(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refused)
    replace_file(tmp_path / "names", b"new")
    assert (tmp_path / "names").read_bytes() == b"new"
    if number == errno.EIO:
        assert "could not be synced" in caplog.text
        with pytest.raises(OSError, match=os.strerror(number)):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)
        assert not caplog.records
