"""`Watchdog`: a step that is stuck ends the process, with a line that says what ran, so that something restarts it.

A step runs in native code that nothing can interrupt; while it hangs, every request hangs with it. A device that has
had a fault ends the process too: it computes nothing any more for a process that it has failed in. So does an engine
whose thread has ended though nobody stopped it.
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
    """What is watched."""

    def stuck_for(self) -> float: ...

    def current_step(self) -> str: ...

    def fatal_error(self) -> str | None:
        """Why no step can run any more."""


class Watchdog:
    """Looks at the engine's current step once a second, on a thread of its own."""

    def __init__(
        self,
        steps: Steps,
        *,
        limit: float,
        interval: float = 1.0,
        end: Callable[[int], object] = os._exit,
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
        """Counts the time between its own looks, of which none is long: a process that was paused (SIGSTOP, a
        hypervisor) or got no processor has not hung, however old its step is by the clock.
        """
        seconds, looked = 0.0, time.monotonic()
        while not self._stop.wait(self._interval):
            age, since, looked = self._steps.stuck_for(), time.monotonic() - looked, time.monotonic()
            seconds = min(age, seconds + min(since, 2 * self._interval))
            why = self._steps.fatal_error()
            if why is None and seconds > self._limit:
                why = f"a step is stuck for {seconds:.0f} s (--step-limit): {self._steps.current_step()}"
            if why is not None:
                log.critical("the process ends: %s", why)
                for handler in logging.getLogger().handlers:
                    with contextlib.suppress(OSError, ValueError):  # its stream may be closed or full
                        handler.flush()
                self._end(EXIT_CODE)
                return
