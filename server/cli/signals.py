"""Signals that ask a process to stop."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

REPEAT_WINDOW = 0.1
"""Seconds within which a repeated signal counts as one: `make` forwards a signal that its group also receives."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells."""

Handler = Callable[[int, FrameType | None], None]


class Interrupted(Exception):
    """The user interrupted a command. `in_output`: its JSON output already contains this error."""

    param = None

    def __init__(self, message: str = "interrupted", in_output: bool = False) -> None:
        super().__init__(message)
        self.message = message
        self.in_output = in_output


@contextlib.contextmanager
def handle_signals(handler: Handler, *signals: signal.Signals) -> Iterator[Callable[[], None]]:
    """Call `handler` on these signals, and on SIGHUP unless it is ignored (`nohup`), until the context ends.

    Yields a function that restores the previous handlers early.
    """
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals = (*signals, signal.SIGHUP)
    previous = {number: signal.signal(number, handler) for number in signals}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    try:
        yield restore
    finally:
        restore()
