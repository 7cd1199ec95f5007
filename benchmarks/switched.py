"""`loramux` whose records can be replaced by nothing while it runs: SIGUSR1 does so, SIGUSR2 puts them back.

For benchmarks: the same process, the same memory and the same clients on both sides of a comparison. What is replaced
is all that is written down of a request that has ended, for /metrics and for the quality records.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from server.api import assembly
from server.cli.main import main
from server.metrics import Metrics

RECORDS = ((Metrics, "record", Metrics.record), (assembly, "remember", assembly.remember))


def nothing(*_: Any) -> None:
    """Stands where a record was made."""


def off(number: int, frame: FrameType | None) -> None:
    for owner, name, _ in RECORDS:
        setattr(owner, name, nothing)


def on(number: int, frame: FrameType | None) -> None:
    for owner, name, record in RECORDS:
        setattr(owner, name, record)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, off)
    signal.signal(signal.SIGUSR2, on)
    main()
