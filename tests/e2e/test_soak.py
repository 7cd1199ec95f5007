"""The soak, for seconds: fewer adapters and solo answers than `make soak`, less room, the same clients and rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.soak import soak
from tests.e2e.conftest import STATE

pytestmark = pytest.mark.e2e


def test_a_short_soak(tmp_path: Path, embedded: Path) -> None:
    report = soak(8 / 60, tmp_path, STATE / "models", alone=20, steady=14, churned=3, kv_cache=64)
    assert not report.wrong, report.as_dict()
    assert report.alone > 10 and report.compared > report.alone
    assert {"publish", "retire", "gone", "malformed", "stream"} <= set(report.calls)
