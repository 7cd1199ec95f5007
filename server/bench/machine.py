"""The machine that a figure was taken on, as every JSON of a measurement has it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path

from server.kernels.threads import processors


def describe() -> dict[str, str | int]:
    """The processor's name, how many cores this process may use, Python's version, and now (UTC, ISO 8601)."""
    return {
        "processor": _processor(),
        "cores": processors(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on this system
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
