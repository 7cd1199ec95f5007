"""Memory of this process as Linux counts it: resident, peak, limit by cgroups, and free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")
_MACHINE = Path("/proc/meminfo")
_GROUP, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_USED = ("memory.current", "memory.usage_in_bytes")


@dataclass(frozen=True)
class Peak:
    """Resident bytes at the start of a measurement (`before`) and at most since then (`peak`)."""

    before: int | None
    peak: int | None

    def as_dict(self) -> dict[str, int | None]:
        """For a report: the peak, and its difference to the start."""
        above = self.peak - self.before if self.peak is not None and self.before is not None else None
        return {"peak_process": self.peak, "peak_above_start": above}


class PeakMeter:
    """Measures peak memory by the kernel's high-water mark. A process has one; a second meter resets it."""

    def __init__(self) -> None:
        # Reset the high-water mark. Without the permission, the peak is that of the whole process.
        with contextlib.suppress(OSError):
            _RESET.write_text("5")
        self.before = resident("VmRSS")

    def peak(self) -> Peak:
        """The peak so far."""
        return Peak(self.before, resident("VmHWM"))


def trim() -> None:
    """Return unused heap memory to the system (glibc's malloc_trim)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(field: str = "VmRSS") -> int | None:
    """Resident bytes of this process, now ("VmRSS") or at most ("VmHWM"); None if unknown."""
    return _field(_STATUS, field)


def total() -> int:
    """Bytes of memory of the machine."""
    found = _field(_MACHINE, "MemTotal")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found


def limit() -> int | None:
    """The smallest cgroup limit of this process in bytes, as set by containers and systemd; None without one."""
    least = min((most for _, most in _limits()), default=total())
    return least if least < total() else None


def most() -> int:
    """The most bytes that this process could use: the machine's memory or the cgroup limit."""
    return limit() or total()


def _limits() -> Iterator[tuple[Path, int]]:
    """Folder and limit of each cgroup (v1 and v2) of this process, and of their parents."""
    own = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in _text(_GROUP).splitlines() if line.count(":") >= 2}
    for controller, root, file in (("", _GROUPS, "memory.max"),
                                   ("memory", _GROUPS / "memory", "memory.limit_in_bytes")):  # fmt: skip
        group = PurePosixPath(own.get(controller, "/"))
        for around in (group, *group.parents):
            folder = root / around.relative_to(around.anchor or ".")
            if (text := _text(folder / file).strip()).isdigit():
                yield folder, int(text)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def free() -> int:
    """Bytes that this process can allocate without swapping, within its cgroup limits."""
    available = _field(_MACHINE, "MemAvailable")
    found = total() // 2 if available is None else available
    return max(0, min([found, *(most - _used_by(group) for group, most in _limits())]))


def _used_by(group: Path) -> int:
    """Bytes used by all processes of a cgroup, without reclaimable page cache."""
    used = next((text for file in _USED if (text := _text(group / file).strip()).isdigit()), None)
    if used is None:
        return resident() or 0
    stat = _text(group / "memory.stat")
    kept = [re.search(rf"^{name} (\d+)$", stat, re.MULTILINE) for name in ("total_inactive_file", "inactive_file")]
    return int(used) - next((int(found[1]) for found in kept if found), 0)


def _field(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
