"""Available processors: CPU affinity and cgroup quotas."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.kernels import threads


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cgroup hierarchy with this process in /shop/till; its affinity has 8 processors."""
    (tmp_path / "own").write_text("1:cpu:/old\n0::/shop/till\n")
    (tmp_path / "shop" / "till").mkdir(parents=True)
    monkeypatch.setattr(threads, "CGROUP", tmp_path / "own")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8),
        ({"shop/till": "max 100000"}, 8),
        ({"shop/till": "200000 100000"}, 2),
        ({"shop/till": "150000 100000"}, 2),
        ({"shop/till": "10000 100000"}, 1),
        ({"shop/till": "max 100000", "shop": "300000 100000"}, 3),
        ({"shop/till": "900000 100000", "": "400000 100000"}, 4),
        ({"shop/till": "1600000 100000"}, 8),
        ({"shop/till": "what is this"}, 8),
    ],
)
def test_the_smallest_cgroup_quota_limits_cpus(groups: Path, limits: dict[str, str], expected: int) -> None:
    for group, text in limits.items():
        (groups / group / "cpu.max").write_text(text)
    assert threads.available_cpus() == expected


@pytest.mark.parametrize(
    ("quota", "period", "around", "expected"),
    [("-1", "100000", "-1", 8), ("150000", "100000", "-1", 2), ("-1", "100000", "300000", 3), ("", "100000", "-1", 8)],
)
def test_cgroup_v1_quotas_limit_cpus(groups: Path, quota: str, period: str, around: str, expected: int) -> None:
    (groups / "own").write_text("4:cpu,cpuacct:/old/till\n3:memory:/old\n0::/\n")
    (groups / "cpu" / "old" / "till").mkdir(parents=True)
    for group, text in (("old/till", quota), ("old", around)):
        (groups / "cpu" / group / "cpu.cfs_quota_us").write_text(text)
        (groups / "cpu" / group / "cpu.cfs_period_us").write_text(period)
    assert threads.available_cpus() == expected


def test_affinity_without_cgroups(groups: Path) -> None:
    (groups / "own").write_text("1:cpu:/old\n")
    assert threads.available_cpus() == 8
    (groups / "own").unlink()
    assert threads.available_cpus() == 8


ANY_THREAD = """
import json, os, threading
from server.settings import leave_threads_alone
before = os.sched_getaffinity(0)
left_out = leave_threads_alone()
import torch
torch.set_num_threads(2)
torch.ones(1 << 20).sum()
found = []
thread = threading.Thread(target=lambda: found.append(os.sched_getaffinity(0)))
thread.start()
thread.join()
print(json.dumps([left_out, list(before), list(os.sched_getaffinity(0)), *map(list, found)]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell of affinity")
@pytest.mark.parametrize(
    "bound",
    [
        {"OMP_PROC_BIND": "close"},
        {"OMP_PLACES": "cores"},
        {"GOMP_CPU_AFFINITY": "0-1", "KMP_AFFINITY": "granularity=fine,compact,1,0"},
    ],
)
def test_thread_binding_variables_are_removed_before_torch_is_loaded(bound: dict[str, str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", ANY_THREAD], env={**os.environ, **bound}, capture_output=True, timeout=120, check=True
    )
    left_out, before, loading, other = json.loads(run.stdout)
    assert left_out == list(bound) and before == loading == other
