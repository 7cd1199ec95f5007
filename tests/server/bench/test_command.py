"""The base that benchmarks of this package run on, what they print, and what they need."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from server.bench import command
from server.errors import BadSetting
from server.kernels import cuda


def test_the_processor_is_measured_where_there_is_a_gpu_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert command._base(str(tiny_folder), tmp_path, "auto").backend.name in ("native", "aten")


def test_what_is_printed_is_json_whatever_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result: dict[str, Any] = {"rate": float("nan"), "runs": [{"p99": float("inf"), "requests": 3}]}
    command._show(result, Table(), True, tmp_path, "x")
    told = {"rate": None, "runs": [{"p99": None, "requests": 3}]}
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "x.json").read_text()) == told


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    command._extra()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadSetting, match=r"pip install 'loramux\[bench\]'"):
        command._extra()
