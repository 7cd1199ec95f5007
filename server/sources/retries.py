"""Retry policy for requests to other hosts."""

from __future__ import annotations

from collections.abc import Callable

import tenacity

TRIES, PAUSE = 3, 0.5
"""Attempts, and seconds of the first pause. The second pause is twice as long."""
_TRANSIENT = frozenset({408, 425, 429})  # of the statuses below 500


def is_transient(status: int) -> bool:
    """Whether a request with this HTTP status may succeed later."""
    return status >= 500 or status in _TRANSIENT


def retrying(should_retry: Callable[[BaseException], bool]) -> tenacity.Retrying:
    """Calls a function up to TRIES times, while it raises errors that `should_retry`; then the error is raised."""
    return tenacity.Retrying(
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_incrementing(start=PAUSE, increment=PAUSE),
        retry=tenacity.retry_if_exception(should_retry),
        reraise=True,
    )
