"""The base that benchmarks of this package run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.bench import command
from server.kernels import cuda


def test_the_processor_is_measured_where_there_is_a_gpu_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert command._base(str(tiny_folder), tmp_path, "auto").backend.name in ("native", "aten")
