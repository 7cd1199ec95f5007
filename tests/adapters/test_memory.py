"""How much memory this process may still have: what the machine has free, and what its container leaves of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters import memory

MIB = 1 << 20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1000 MiB with 600 free, where this process has 100; no limits yet."""
    (tmp_path / "meminfo").write_text(
        f"MemTotal:  {1000 * 1024} kB\nMemFree: {10 * 1024} kB\nMemAvailable:  {600 * 1024} kB\n"
    )
    (tmp_path / "status").write_text(f"Name:\tserver\nVmHWM:\t{200 * 1024} kB\nVmRSS:\t{100 * 1024} kB\n")
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "group")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    return tmp_path


@pytest.mark.parametrize(
    ("group", "text", "limit", "free"),
    [
        ("memory.max", "max\n", None, 600),
        ("memory.max", f"{400 * MIB}\n", 400, 300),
        ("memory.max", f"{900 * MIB}\n", 900, 600),
        ("memory.max", f"{50 * MIB}\n", 50, 0),
        ("memory/memory.limit_in_bytes", f"{400 * MIB}\n", 400, 300),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None, 600),
    ],
)
def test_free_memory_respects_the_cgroup_limit(
    machine: Path, group: str, text: str, limit: int | None, free: int
) -> None:
    write_limit(machine, group, text)
    assert memory.limit() == (None if limit is None else limit * MIB)
    assert memory.free() == free * MIB


def write_limit(machine: Path, file: str, text: str) -> None:
    (machine / "groups" / file).parent.mkdir(parents=True, exist_ok=True)
    (machine / "groups" / file).write_text(text)


@pytest.mark.parametrize(
    ("own", "file"),
    [
        ("0::/system.slice/loramux.service", "system.slice/loramux.service/memory.max"),
        ("0::/system.slice/loramux.service", "system.slice/memory.max"),
        ("0::/a:b", "a:b/memory.max"),
        ("5:cpu:/x\n4:memory:/user/me", "memory/user/me/memory.limit_in_bytes"),
        ("0::/../outside", "memory.max"),
    ],
)
def test_the_smallest_cgroup_limit_applies(machine: Path, own: str, file: str) -> None:
    (machine / "group").write_text(own + "\n")
    write_limit(machine, "elsewhere/memory.max", f"{10 * MIB}")
    write_limit(machine, "memory.max", f"{700 * MIB}")
    write_limit(machine, file, f"{300 * MIB}")
    assert (memory.limit(), memory.free()) == (300 * MIB, 200 * MIB)


@pytest.mark.parametrize(
    ("group", "used", "stat", "free"),
    [
        ("memory.max", "memory.current", "anon 1\ninactive_file 0\nactive_file 5\n", 50),
        ("memory.max", "memory.current", f"inactive_file {40 * MIB}\n", 90),
        ("memory.max", "memory.current", "", 50),
        (
            "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes",
            f"inactive_file 7\ntotal_inactive_file {40 * MIB}\n", 90,
        ),
    ],
)  # fmt: skip
def test_memory_of_other_processes_in_the_cgroup_is_not_free(
    machine: Path, group: str, used: str, stat: str, free: int
) -> None:
    """A server and the job that it trains are in one container; files that nobody reads make room."""
    write_limit(machine, group, f"{400 * MIB}\n")
    write_limit(machine, used, f"{350 * MIB}\n")
    write_limit(machine, f"{Path(group).parent}/memory.stat", stat)
    assert memory.free() == free * MIB


def test_without_a_cgroup_limit_the_machine_decides(machine: Path) -> None:
    assert (memory.total(), memory.limit(), memory.free()) == (1000 * MIB, None, 600 * MIB)


def test_free_memory_without_meminfo(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.free() == memory.total() // 2 > 0
