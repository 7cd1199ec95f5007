"""Waiting for what another thread or process does, for as long as a busy machine may need.

How long that is says nothing of what is tested, so there is one bound, after which it is a hang.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

SECONDS = 60.0


def until(condition: Callable[[], T], what: str = "it never came true", every: float = 0.002) -> T:
    """The first true value of `condition()`, asked for again `every` so many seconds."""
    end = time.monotonic() + SECONDS
    while not (value := condition()):
        assert time.monotonic() < end, what
        time.sleep(every)
    return value
