"""How a process is asked to end, and who hears of it meanwhile.

Owns which signals that are, whose handlers come back, and that a loop which waits is woken. What is done about them is
the commands'.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

SAME_SIGNAL = 0.1
"""Seconds within which a signal that comes twice is one."""

INTERRUPTED = 130
"""The status of a process that Ctrl-C has ended, as shells count it."""

Handler = Callable[[int, FrameType | None], None]


class Interrupted(Exception):
    """A command was asked to end, and says so; if it has `told` all that it found, within its JSON too."""

    param = None

    def __init__(self, message: str = "interrupted", told: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.told = told


@contextlib.contextmanager
def heard(handler: Handler, *numbers: signal.Signals) -> Iterator[Callable[[], None]]:
    """While inside, `handler` hears these signals, and that a terminal is closed, unless `nohup` has said otherwise.

    Yields what gives the handlers of before back at once.
    """
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers = (*numbers, signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield give_back
    finally:
        give_back()


@contextlib.contextmanager
def waking(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """While inside, a signal wakes the loop, which runs on the main thread: also one that comes between the
    interpreter's last look for signals and the wait for events, which otherwise waits for something else to happen.
    """
    read, written = socket.socketpair()
    with read, written:
        read.setblocking(False)
        written.setblocking(False)
        loop.add_reader(read, read.recv, 4096)
        before = signal.set_wakeup_fd(written.fileno(), warn_on_full_buffer=False)  # a full one wakes as well
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            loop.remove_reader(read)
