"""How much memory this process takes, took at most and may still have, as Linux counts it; and less of it."""

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
    """Resident bytes: `before` when the watch began, `peak` the most since then."""

    before: int | None
    peak: int | None

    def told(self) -> dict[str, int | None]:
        """For a report: the peak, and how far it is above what was there before."""
        above = self.peak - self.before if self.peak is not None and self.before is not None else None
        return {"peak_process": self.peak, "peak_above_start": above}


class Watch:
    """Counts the peak from here on; the kernel keeps it, so nothing is sampled and nothing missed. It keeps one: where
    another watch begins, as each training run's does, this one's peak is of what comes after."""

    def __init__(self) -> None:
        # Forgets the peak so far. Where that is not allowed, it is that of the process's whole life, never less.
        with contextlib.suppress(OSError):
            _RESET.write_text("5")
        self.before = resident("VmRSS")

    def peak(self) -> Peak:
        """The peak until now."""
        return Peak(self.before, resident("VmHWM"))


def trim() -> None:
    """Gives back to the system what the C library's heap holds in pieces and nobody uses. Nothing where it cannot."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def resident(field: str = "VmRSS") -> int | None:
    """Bytes of this process in memory: now ("VmRSS") or at most ("VmHWM"). None where the system does not say."""
    return _field(_STATUS, field)


def total() -> int:
    """Bytes of memory that the machine has."""
    found = _field(_MACHINE, "MemTotal")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if found is None else found


def limit() -> int | None:
    """Bytes that this process's control groups may have, as containers and systemd's `MemoryMax` set them. None where
    that is no less than what the machine has."""
    least = min((most for _, most in _limits()), default=total())
    return least if least < total() else None


def most() -> int:
    """Bytes that this process could ever have: what the machine has, or less by its control groups."""
    return limit() or total()


def _limits() -> Iterator[tuple[Path, int]]:
    """The control groups of v2 and of v1 that limit this process, and their bytes: its own and all around them."""
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
    """Bytes that this process can have without swapping, within its control groups' limit. Half of the machine's memory
    where the system does not say."""
    available = _field(_MACHINE, "MemAvailable")
    found = total() // 2 if available is None else available
    return max(0, min([found, *(most - _held(group) for group, most in _limits())]))


def _held(group: Path) -> int:
    """Bytes that a control group has, less the files that it last read long ago, which make room: of this process and
    of all others in it. Those of this process alone where the group does not say."""
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
