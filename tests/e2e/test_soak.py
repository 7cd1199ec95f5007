"""A short soak test, with fewer adapters than `make soak`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import soak
from tests.e2e.conftest import STATE

pytestmark = pytest.mark.e2e


def test_short_soak(tmp_path: Path, embedded: Path) -> None:
    report = soak(8 / 60, tmp_path, STATE / "models", alone=20, fixed=14, changing=3, kv_cache=64)
    assert not report.wrong, report.as_dict()
    assert report.alone > 10 and report.compared > report.alone
    assert {"publish", "retire", "disconnect", "malformed", "stream"} <= set(report.calls)
