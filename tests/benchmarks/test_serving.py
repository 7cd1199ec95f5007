"""The server that a benchmark starts finds the base where the benchmark was told that it lies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import serving


def test_where_the_base_lies_may_be_told_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link to it is read from where it lies itself, the state."""

    @contextlib.contextmanager
    def running(command: list[str], *_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(serving, "running", running)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "base.gguf").touch()
    with serving.serving(tmp_path / "deep" / "state", Path("fetched")):
        assert (tmp_path / "deep" / "state" / "models" / "base.gguf").is_file()
