"""`Turns`: another process takes its turns on the processors between steps, and none within one.

A step is many short phases in which all threads wait for each other, so a process that gets a processor for a moment
within one holds all of it up, at whatever priority: beside a training process at idle priority alone, steps took ten
times as long. So it stands still (SIGSTOP) while a step runs, and gets whole turns after some of them, and all the time
that there is nothing to run. Owns that rule; knows nothing of what the other process does.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable

SHARE = 0.3
"""Of the time in which there are steps to run, for the other process."""
TURN = 0.03
"""Seconds: shorter turns are saved up until they make one. Both sides lose some time at every change: with turns of
4 ms the median step took twice as long as with 8. Of the steps of a few ms that decoding takes, about 1 in 25 is
followed by a turn of this length."""

Send = Callable[[int], object]
"""Sends a signal to the process, or does nothing if it has ended."""


class Turns:
    """`join` and `leave` are for whoever starts the process, all else for the engine's thread. Linux's signals."""

    def __init__(self, share: float = SHARE, turn: float = TURN, sleep: Callable[[float], object] = time.sleep) -> None:
        self._rate = share / (1.0 - share)
        self._turn = turn
        self._sleep = sleep
        self._lock = threading.Lock()
        self._send: Send | None = None
        self._held = False
        self._owed = 0.0

    def join(self, send: Send) -> None:
        """From now on the process behind `send` takes turns."""
        with self._lock:
            self._send, self._held, self._owed = send, False, 0.0

    def leave(self) -> None:
        """It takes none any more, and stands still no longer."""
        with self._lock:
            self._signal(False)
            self._send = None

    def hold(self) -> None:
        """A step begins."""
        if self._send is not None:
            with self._lock:
                self._signal(True)

    def free(self) -> None:
        """There is nothing to run."""
        if self._send is not None:
            with self._lock:
                self._signal(False)
                self._owed = 0.0

    def after(self, seconds: float) -> None:
        """A step has ended that took so long. Gives a turn if one is due, and waits for its end."""
        if self._send is None:
            return
        self._owed += seconds * self._rate
        if self._owed >= self._turn:
            with self._lock:
                self._signal(False)
            self._sleep(self._owed)
            self._owed = 0.0

    def _signal(self, held: bool) -> None:
        if self._send is not None and held != self._held:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._send(signal.SIGSTOP if held else signal.SIGCONT)
            self._held = held
