"""Wait for a condition that another thread or process makes true."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 60.0
"""Timeout of every wait: long enough for a busy machine, so reaching it means a hang."""


def until(condition: Callable[[], T], what: str = "the condition did not become true", every: float = 0.002) -> T:
    """Call `condition` every `every` seconds and return its first true value.

    Raises:
        AssertionError: With the message `what`, after `SECONDS`.
    """
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, what
        time.sleep(every)
    return value
