"""Signals, and a loop that waits."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time

from server.cli.signals import waking
from tests.waiting import SECONDS, until


def test_a_signal_that_does_not_break_the_wait_off_is_heard_at_once() -> None:
    main, heard = threading.main_thread(), threading.Event()

    def send() -> bool:
        until(lambda: sys._current_frames()[main.ident or 0].f_code.co_name == "select")
        time.sleep(0.05)  # and by then within the system's call
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        os.kill(os.getpid(), signal.SIGUSR1)
        return heard.wait(SECONDS)

    async def waits() -> bool:
        with waking(asyncio.get_running_loop()):
            # Like one that comes just before the wait, it does not wake this thread, whose handler it is.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            return await asyncio.to_thread(send)

    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.set())
    try:
        assert asyncio.run(waits())
        assert signal.set_wakeup_fd(-1) == -1, "as it was before"
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
        signal.signal(signal.SIGUSR1, before)
