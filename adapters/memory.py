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
    """Counts the peak from here on; the kernel keeps it, so nothing is sampled and nothing missed."""

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
    found = [int(text) for path in _limits() if (text := _text(path).strip()).isdigit()]
    least = min(found, default=total())
    return least if least < total() else None


def most() -> int:
    """Bytes that this process could ever have: what the machine has, or less by its control groups."""
    return limit() or total()


def _limits() -> Iterator[Path]:
    """The files of cgroup v2 and of v1 that may limit this process: those of its own groups and of all around them."""
    own = {line.split(":", 2)[1]: line.split(":", 2)[2] for line in _text(_GROUP).splitlines() if line.count(":") >= 2}
    for controller, root, file in (("", _GROUPS, "memory.max"),
                                   ("memory", _GROUPS / "memory", "memory.limit_in_bytes")):  # fmt: skip
        group = PurePosixPath(own.get(controller, "/"))
        for around in (group, *group.parents):
            yield root / around.relative_to(around.anchor or ".") / file


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def free() -> int:
    """Bytes that this process can have without swapping, within its control groups' limit. Half of the machine's memory
    where the system does not say."""
    available, most = _field(_MACHINE, "MemAvailable"), limit()
    found = total() // 2 if available is None else available
    return found if most is None else max(0, min(found, most - (resident() or 0)))


def _field(path: Path, name: str) -> int | None:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
