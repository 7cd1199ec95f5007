"""The server that a benchmark starts finds the base where the benchmark was told that it lies, and leaves a GPU be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import embedded_server, residency, soak


def test_where_the_base_lies_may_be_told_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The link to it is read from where it lies itself, the state."""

    @contextlib.contextmanager
    def running(command: list[str], *_: object) -> Iterator[None]:
        yield

    monkeypatch.setattr(embedded_server, "running", running)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "base.gguf").touch()
    with embedded_server.serving(tmp_path / "deep" / "state", Path("fetched")):
        assert (tmp_path / "deep" / "state" / "models" / "base.gguf").is_file()


def test_it_runs_on_the_processor_where_nothing_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a flag that is there twice the last one counts."""
    started: list[list[str]] = []

    @contextlib.contextmanager
    def running(command: list[str], *_: object) -> Iterator[None]:
        started.append(command[1:])
        yield

    for module in (embedded_server, residency):
        monkeypatch.setattr(module, "running", running)
    with embedded_server.serving(tmp_path / "a", tmp_path, "--device", "cuda", module="benchmarks.counted"):
        pass
    with residency.serving_again(tmp_path / "a", "--max-slots", "4"):
        pass
    both = ["--library", "none", "--device", "cpu"]
    assert [command[-6:] for command in started] == [[*both, "--device", "cuda"], [*both, "--max-slots", "4"]]
    assert [command[1] for command in started] == ["benchmarks.counted", "server.cli"]


def test_the_soak_counts_adapters_as_they_are_on_the_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def choose(name: str = "auto", device: str = "auto") -> None:
        asked.append(device)
        raise InterruptedError

    monkeypatch.setattr(soak, "choose", choose)
    monkeypatch.setattr(soak, "write_adapter", lambda *_, **__: None)
    with pytest.raises(InterruptedError):
        soak.soak(1.0, tmp_path, tmp_path)
    assert asked == ["cpu"]
