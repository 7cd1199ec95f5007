"""Ends the process when the engine hangs or cannot run any more, so that a supervisor restarts it.

A step runs in native code that cannot be interrupted: while it hangs, so does every request. A GPU that failed does not
work again in the same process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)

EXIT_CODE = 70


class Steps(Protocol):
    """The watched engine."""

    def stuck_for(self) -> float: ...

    def current_step(self) -> str: ...

    def fatal_error(self) -> str | None:
        """Why no step can run any more, None if steps can run."""


class Watchdog:
    """Checks the engine's current step once a second, on its own thread.

    Args:
        limit: longest step in seconds.
        end: ends the process.
    """

    def __init__(
        self, steps: Steps, *, limit: float, interval: float = 1.0, end: Callable[[int], object] = os._exit
    ) -> None:
        self._steps = steps
        self._limit = limit
        self._interval = interval
        self._end = end
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="loramux-watchdog", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        stuck, last_check = 0.0, time.monotonic()
        while not self._stop.wait(self._interval):
            elapsed, last_check = time.monotonic() - last_check, time.monotonic()
            # A paused process (SIGSTOP, hypervisor) is not stuck, so one check adds at most two intervals.
            stuck = min(self._steps.stuck_for(), stuck + min(elapsed, 2 * self._interval))
            reason = self._steps.fatal_error()
            if reason is None and stuck > self._limit:
                reason = f"a step is stuck for {stuck:.0f} s (--step-limit): {self._steps.current_step()}"
            if reason is not None:
                log.critical("the process ends: %s", reason)
                for handler in logging.getLogger().handlers:
                    with contextlib.suppress(OSError, ValueError):  # its stream may be closed
                        handler.flush()
                self._end(EXIT_CODE)
                return
