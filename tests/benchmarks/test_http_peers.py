"""llama-server is asked for as many threads as we are, and never for adapters of another base."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import http_peers

if TYPE_CHECKING:
    from server.model.loader import Base


def test_waves_take_turns_and_medians_are_compared() -> None:
    asked: list[str] = []
    rates = {
        "in process": iter([9.0, 40.0, 50.0, 45.0]),
        "loramux": iter([9.0, 30.0, 36.0, 90.0]),
        "llama-server": iter([9.0, 4.0, 3.0, 2.0]),
    }

    def wave(name: str) -> http_peers.Wave:
        def run() -> dict[str, float]:
            asked.append(name)
            rate = next(rates[name])
            return {"whole": rate, "decode": 2 * rate, "steady decode": 3 * rate}

        return run

    found = http_peers.measure({name: wave(name) for name in rates}, 3)
    names = list(rates)
    assert asked == [*names, *names, *names[::-1], *names], "the first of each warms up"
    told = http_peers.report(found)
    assert told["ratios"] == {"HTTP over in process, whole": 36 / 45} | {
        f"over llama-server, {key}": 36 / 3 for key in ("steady decode", "decode", "whole")
    }
    assert len(told["rounds"]["loramux"]) == 3


def test_converted_adapters_are_kept_for_their_base_alone(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[str] = []
    commands: list[list[str]] = []

    @contextlib.contextmanager
    def running(command: list[str], *_: Any) -> Iterator[Any]:
        commands.append(command)
        yield type("Server", (), {"url": "http://x"})

    def convert(command: list[str], **_: Any) -> None:
        converted.append(command[command.index("--base") + 1])
        Path(command[-1]).touch()

    monkeypatch.setattr(http_peers, "running", running)
    monkeypatch.setattr(subprocess, "run", convert)
    other = replace(tiny_base, id="f" * 64)
    for base in (tiny_base, other, other):
        with http_peers.llama_serving(
            tmp_path, tmp_path / "llama", tmp_path / "x.gguf", base, [tmp_path / "s0"], 16, 3
        ) as url:
            assert url == "http://x"
    assert [Path(path).name for path in converted] == [tiny_base.id[:32], "f" * 32]
    loras = [command[command.index("--lora") + 1] for command in commands]
    assert loras[0] != loras[1] == loras[2]
    assert all(command[command.index(flag) + 1] == "3" for command in commands for flag in ("-t", "-tb"))
