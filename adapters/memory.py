"""How much memory this process takes, and took at most, as Linux counts it (elsewhere it says None); and less of it."""

from __future__ import annotations

import contextlib
import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


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
    """Bytes of this process in memory: now ("VmRSS") or at most ("VmHWM")."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None
