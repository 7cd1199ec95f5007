"""`Clock`: time that stands still while the machine does, so that a pause is no hang.

Owns how a pause (SIGSTOP, a hypervisor) is told from work. Does not know what is timed.
"""

from __future__ import annotations

import asyncio
import time

BEAT, PAUSE = 0.25, 5.0
"""Seconds between two looks at the clock, and between which two this process cannot have been running."""


class Clock:
    """Seconds in which this process had the machine; `run` has to run beside what is timed."""

    def __init__(self) -> None:
        self.paused = 0.0

    def now(self) -> float:
        return time.monotonic() - self.paused

    async def run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(BEAT)
            now = time.monotonic()
            if now - last > PAUSE:
                self.paused += now - last
            last = now
