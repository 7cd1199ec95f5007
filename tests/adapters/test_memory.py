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
    monkeypatch.setattr(memory, "_LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    return tmp_path


@pytest.mark.parametrize(
    ("group", "text", "limit", "free"),
    [
        ("v2", "max\n", None, 600),
        ("v2", f"{400 * MIB}\n", 400, 300),
        ("v2", f"{900 * MIB}\n", 900, 600),
        ("v2", f"{50 * MIB}\n", 50, 0),
        ("v1", f"{400 * MIB}\n", 400, 300),
        ("v1", "9223372036854771712\n", None, 600),
    ],
)
def test_a_containers_limit_less_what_the_process_has_bounds_what_is_free(
    machine: Path, group: str, text: str, limit: int | None, free: int
) -> None:
    (machine / group).write_text(text)
    assert memory.limit() == (None if limit is None else limit * MIB)
    assert memory.free() == free * MIB


def test_without_a_container_what_the_machine_has_free_is_free(machine: Path) -> None:
    assert (memory.total(), memory.limit(), memory.free()) == (1000 * MIB, None, 600 * MIB)


def test_half_of_the_machine_is_taken_for_free_where_the_system_does_not_say(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.free() == memory.total() // 2 > 0
