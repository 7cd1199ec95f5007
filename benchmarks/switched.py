"""`loramux` whose records can be replaced by nothing while it runs: SIGUSR1 does so, SIGUSR2 puts them back.

For benchmarks: the same process, the same memory and the same clients on both sides of a comparison. What is replaced
is all that is written down of a request that has ended, for /metrics and for the quality records. At the end it says on
its last line how much processor time the records took, in microseconds for each request.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from server.cli.main import main
from server.metrics import Metrics
from server.tasks.quality import Quality

spent = 0.0
"""Seconds of processor time."""
requests = 0


def timed(record: Callable[..., Any]) -> Callable[..., Any]:
    def timing(*given: Any, **named: Any) -> Any:
        global spent
        start = time.thread_time()
        try:
            return record(*given, **named)
        finally:
            spent += time.thread_time() - start

    return timing


def counted(record: Callable[..., Any]) -> Callable[..., Any]:
    def counting(*given: Any) -> Any:
        global requests
        requests += 1
        return record(*given)

    return counting


RECORDS = (
    (Metrics, "record", counted(timed(Metrics.record))),
    (Quality, "record_answer", timed(Quality.record_answer)),
    (Quality, "flush", timed(Quality.flush)),
)
"""Owner, name, and what is there while records are made."""


def nothing(*_: Any) -> None:
    """Stands where a record was made."""


def off(number: int, frame: FrameType | None) -> None:
    for owner, name, _ in RECORDS:
        setattr(owner, name, nothing)


def on(number: int, frame: FrameType | None) -> None:
    for owner, name, record in RECORDS:
        setattr(owner, name, record)


if __name__ == "__main__":
    on(0, None)
    signal.signal(signal.SIGUSR1, off)
    signal.signal(signal.SIGUSR2, on)
    try:
        main()
    finally:
        print(f"records: {1e6 * spent / max(1, requests):.1f} us of {requests} requests", flush=True)
