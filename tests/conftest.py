"""What all tests share: single-threaded torch, and what happens when a real part is missing."""

from __future__ import annotations

import os
import shutil

import pytest

# Before torch is imported anywhere: tiny tensors are faster without a thread pool, and two cores are few.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"


def part_missing(reason: str) -> None:
    """Skips the test that calls it; fails it under REQUIRE_ALL=1, where every part has been installed."""
    if REQUIRE_ALL:
        pytest.fail(f"REQUIRE_ALL=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's LORAMUX_* variables never reach a test."""
    for name in [n for n in os.environ if n.startswith("LORAMUX_")]:
        monkeypatch.delenv(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("part"):
        for command in mark.args:
            if shutil.which(command) is None:
                part_missing(f"{command} is not on the path")
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
