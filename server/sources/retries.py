"""How often a host is asked again, and after what. Knows no host and no library."""

from __future__ import annotations

TRIES, PAUSE = 3, 0.5
"""How often a host is asked, and how many seconds the first pause is between."""
_MAY_PASS = frozenset({408, 425, 429})  # of the statuses below 500


def may_pass(status: int) -> bool:
    """Whether a host that answers with this status may say something else the next time."""
    return status >= 500 or status in _MAY_PASS
