"""`PrefillBudget`: how many rows of prompts a step may have, so that it stays far within what a step that hangs takes.

Nothing is answered while a step runs, and a short step of one machine may be minutes on another, or with another base.
So the rows that fit are learned from the steps that ran. Knows no requests: only rows, how many tokens come before
them, and seconds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter, defaultdict
from dataclasses import dataclass, field

LEAST_ROWS = 16
"""Rows of prompts that a step may have however slow it is: fewer save little, as each reads all of the weights."""

FIRST_ROWS = 64
"""Rows of prompts of the first step, of which nothing is known yet."""

RAISED = 8
"""How many times the rows of a step that took little time another may have."""

AIM, LONG = 1 / 12, 1 / 6
"""Parts of the limit: what a step is to take, and what is too long."""

LEAST_STEP, MOST_AIM = 1.5, 0.4
"""Where the smallest steps take long, a step is to take so many times as much, up to such a part of the limit."""

DEPTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens before a row from which on it is of another class: it attends to twice as many."""


def _class(depth: int) -> int:
    return bisect_right(DEPTHS, depth)


@dataclass
class PrefillShare:
    """What prompts have of a step, by class of depth: rows, and the part of the step that these fill, of 1 in all."""

    rows: Counter[int] = field(default_factory=Counter)
    parts: defaultdict[int, float] = field(default_factory=lambda: defaultdict(float))


class PrefillBudget:
    """Steps have up to `most` rows, and hang after `limit` seconds; where that is infinite, nothing is learned, and
    every prompt has all rows.

    A row's time depends on the tokens before it, and on the model, the processor and the kernels how much: so what is
    learned is learned by classes of depth, and a depth of which nothing is known has half the rows of the one before.
    """

    def __init__(self, most: int, limit: float = math.inf) -> None:
        self._most = most
        self._limit = limit
        self._fit: dict[int, float] = {0: min(most, FIRST_ROWS)}
        """Rows that fill a step, by class of depth, where they are known."""
        if math.isinf(limit):
            self._fit = dict.fromkeys(range(len(DEPTHS) + 1), most)
        self._long = set[int]()
        """Classes whose last step was too long."""
        self._before = 0.0
        """Seconds of the last step."""
        self._smallest = (0.0, 0.0)
        """Seconds of the last two steps of hardly any rows of prompts, unless a larger one was shorter."""

    def room(self, depth: int, share: PrefillShare) -> int:
        """How many rows more a prompt may add to a step that has `share` of prompts, at `depth` tokens before them."""
        left = math.floor(self._full(_class(depth)) * (1.0 - sum(share.parts.values())) + 1e-6)
        return max(LEAST_ROWS - share.rows.total(), left)

    def add(self, depth: int, rows: int, share: PrefillShare) -> None:
        """So many rows are added to it; or taken back, if below 0."""
        at = _class(depth)
        share.rows[at] += rows
        share.parts[at] += rows / self._full(at)

    def learn(self, share: PrefillShare, seconds: float) -> None:
        """A step with so much of prompts has taken so long, whatever else it had. It may have been planned before what
        other steps have told since.

        One long step lowers nothing: the process may have been stopped within it. One short step raises nothing: of two
        that follow each other without a pause, the second seems short if the first was read late.
        """
        if share.rows.total() <= LEAST_ROWS:
            self._smallest = (self._smallest[1], seconds)
        else:
            self._smallest = (min(self._smallest[0], seconds), min(self._smallest[1], seconds))
        aim = max(self._limit * AIM, min(LEAST_STEP * min(self._smallest), self._limit * MOST_AIM))
        is_long = seconds > max(self._limit * LONG, aim)
        times = aim / max(seconds, 1e-9)
        """How many of this step would take what one is to take."""
        raised = min(RAISED, aim / max(seconds, self._before, 1e-9))
        self._before = seconds
        filled = min(1.0, sum(share.parts.values()))
        for at, rows in share.rows.items():
            if rows and is_long and at in self._long:
                full = rows / share.parts[at] * filled
                self._fit[at] = min(self._full(at), max(LEAST_ROWS, full * times))
            elif rows and is_long:
                self._long.add(at)
            elif rows:
                self._long.discard(at)
                self._fit[at] = max(self._full(at), min(self._most, rows * raised))

    def _full(self, at: int) -> float:
        """Rows that fill a step. Twice as deep ones are taken to cost twice as much as long as they are not known."""
        known = self._fit.get(at)
        return max(LEAST_ROWS, self._full(at - 1) / 2.0) if known is None else known
