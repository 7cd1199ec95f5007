"""The machine that a figure was taken on, as every JSON of a measurement has it."""

from __future__ import annotations

import platform
from datetime import UTC, datetime

from server.kernels.cpu_info import cpuinfo_field
from server.kernels.threads import available_cpus


def describe() -> dict[str, str | int]:
    """The processor's name, how many cores this process may use, Python's version, and now (UTC, ISO 8601)."""
    return {
        "processor": cpuinfo_field("model name") or platform.processor() or platform.machine(),
        "cores": available_cpus(),
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
