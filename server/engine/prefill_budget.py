"""`PrefillBudget`: limits the prefill tokens of a step so that its time stays well below `step_limit`.

Nothing is delivered during a step, and the watchdog ends a process whose step exceeds the limit. The number of tokens
that fit differs by machine and model, so it is estimated from recent steps.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field

MIN_TOKENS = 16
"""Prefill tokens that every step may have. Fewer save little, because each step reads all weights."""

FIRST_TOKENS = 64
"""Prefill tokens of the first step, before any measurement."""

MAX_GROWTH = 8
"""Largest factor by which the budget grows after one step."""

TARGET, TOO_LONG = 1 / 12, 1 / 6
"""Shares of the limit: the intended time of a step, and the time from which the budget is lowered."""

MIN_STEP_FACTOR, MAX_TARGET = 1.5, 0.4
"""If the smallest steps are slow, the target is this multiple of their time, up to this share of the limit."""

DEPTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Boundaries of depth classes. The depth of a token is the number of tokens before it, which it attends to."""


def _class(depth: int) -> int:
    return bisect_right(DEPTHS, depth)


@dataclass
class PrefillLoad:
    """Prefill tokens of one step: counts by depth class, and the share of the budget (1 in total) that they use."""

    tokens: Counter[int] = field(default_factory=Counter)
    shares: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))


class PrefillBudget:
    """Estimates how many prefill tokens fit into a step, for each depth class.

    An unknown class gets half the budget of the class before it.

    Args:
        max_tokens: Most tokens of a step.
        step_limit: Seconds after which a step counts as stuck. If infinite, the budget is always `max_tokens`.
    """

    def __init__(self, max_tokens: int, step_limit: float = math.inf) -> None:
        self._max = max_tokens
        self._limit = step_limit
        self._budget: dict[int, float] = {0: min(max_tokens, FIRST_TOKENS)}
        if math.isinf(step_limit):
            self._budget = dict.fromkeys(range(len(DEPTHS) + 1), max_tokens)
        self._was_long = set[int]()
        """Classes whose last step took too long."""
        self._last = 0.0
        self._smallest = (0.0, 0.0)
        """Seconds of the last two steps with almost no prefill, lowered by faster larger steps."""

    def room(self, depth: int, load: PrefillLoad) -> int:
        """Return how many tokens at `depth` can be added to a step that has `load`."""
        left = math.floor(self._full(_class(depth)) * (1.0 - sum(load.shares.values())) + 1e-6)
        return max(MIN_TOKENS - load.tokens.total(), left)

    def add(self, depth: int, tokens: int, load: PrefillLoad) -> None:
        """Add tokens to the load of a step. A negative number removes them."""
        at = _class(depth)
        load.tokens[at] += tokens
        load.shares[at] += tokens / self._full(at)

    def update(self, load: PrefillLoad, seconds: float) -> None:
        """Update the estimate from the time of a finished step.

        One long step lowers nothing, because the process may have been suspended. One short step raises nothing,
        because it may have been measured from a late start.
        """
        if load.tokens.total() <= MIN_TOKENS:
            self._smallest = (self._smallest[1], seconds)
        else:
            self._smallest = (min(self._smallest[0], seconds), min(self._smallest[1], seconds))
        target = max(self._limit * TARGET, min(MIN_STEP_FACTOR * min(self._smallest), self._limit * MAX_TARGET))
        is_long = seconds > max(self._limit * TOO_LONG, target)
        shrink = target / max(seconds, 1e-9)
        growth = min(MAX_GROWTH, target / max(seconds, self._last, 1e-9))
        self._last = seconds
        used = min(1.0, sum(load.shares.values()))
        for at, tokens in load.tokens.items():
            if not tokens:
                continue
            if not is_long:
                self._was_long.discard(at)
                self._budget[at] = max(self._full(at), min(self._max, tokens * growth))
            elif at in self._was_long:
                full = tokens / load.shares[at] * used
                self._budget[at] = min(self._full(at), max(MIN_TOKENS, full * shrink))
            else:
                self._was_long.add(at)

    def _full(self, at: int) -> float:
        """Tokens of a class that fill a step."""
        known = self._budget.get(at)
        return max(MIN_TOKENS, self._full(at - 1) / 2.0) if known is None else known
