"""`best` routes: candidates take turns until one is proven better, and that one serves.

Owns the rule. Turns go on until every candidate has `min_samples` and the leader's mean is over each other's by an
interval that holds at all times. After that, one request in twenty still goes around, so that a change is noticed, and
a rival takes over only when it is proven better in its turn.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, Protocol

from adapters.errors import AdapterError
from adapters.weights import Choice, Version
from server.tasks.definitions import Best, Task
from server.tasks.intervals import ALPHA, Totals, lead
from server.tasks.quality import Quality, Subject

EXPLORED = 20
"""One request in so many goes around after a decision."""


class Versions(Protocol):
    """What a router asks of the registry."""

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]: ...


@dataclass(frozen=True)
class Decision:
    """Who leads, if anybody does, and why, in words."""

    leader: str | None
    reason: str


def decide(scores: dict[str, Totals], min_samples: int, current: str | None, lower_is_better: bool = False) -> Decision:
    """The rule itself. `scores` are the candidates'; `current` is the one that leads now."""
    if lower_is_better:
        scores = {name: Totals(t.count, t.count - t.total, t.count - 2 * t.total + t.squares)
                  for name, t in scores.items()}  # fmt: skip
    told = ", ".join(f"{name} {t.mean:.3f} of {t.count}" if t.count else f"{name} none" for name, t in scores.items())
    if any(t.count < min_samples for t in scores.values()):
        return Decision(current, f"taking turns until each has {min_samples} samples: {told}")
    leader = max(scores, key=lambda name: scores[name].mean)
    alpha = ALPHA / max(1, len(scores) - 1)
    leads = [lead(scores[leader], totals, alpha) for name, totals in scores.items() if name != leader]
    if min(leads, default=1.0) > 0:
        return Decision(leader, f"{leader} is better by at least {min(leads):.3f}, at {1 - ALPHA:.0%}: {told}")
    return Decision(current, f"no candidate is proven better yet: {told}")


class BestRouter:
    """Picks candidates by what is known of them."""

    def __init__(self, quality: Quality, versions: Versions, base: str) -> None:
        self._quality = quality
        self._versions = versions
        self._base = base
        self._turns: dict[str, itertools.count[int]] = {}
        self._leaders: dict[str, tuple[Best, Subject | None]] = {}

    def pick(self, task: Task, route: Best) -> str:
        """The candidate for the next request."""
        turn = next(self._turns.setdefault(task.name, itertools.count()))
        leader = self._leading(task, route)
        if leader is not None and turn % EXPLORED:
            return leader
        names = list(self._subjects(task, route)) or list(route.candidates)
        return names[(turn // EXPLORED if leader else turn) % len(names)]

    def review(self, task: Task, route: Best) -> Decision:
        """Look at the scores again, and change the leader if that is proven. Called when a score has come."""
        subjects = self._subjects(task, route)
        scores = {name: self._quality.totals(s, route.metric, route.source) for name, s in subjects.items()}
        current = self._leading(task, route)
        decision = decide(scores, route.min_samples, current, route.metric == "loss")
        if decision.leader is not None and decision.leader != current:
            self._quality.lead(task.name, subjects[decision.leader], decision.reason)
            self._leaders[task.name] = (route, subjects[decision.leader])
        return decision

    def describe(self, task: Task, route: Best) -> dict[str, Any]:
        """The `best` of a task's performance."""
        decision = self.review(task, route)
        known = self._quality.leader(task.name)
        subjects = self._subjects(task, route)
        leader = decision.leader
        return {
            "leader": leader,
            "version": subjects[leader].label if leader in subjects else None,
            "decided": known[1] if known and leader else None,
            "reason": decision.reason,
        }

    def _leading(self, task: Task, route: Best) -> str | None:
        """The candidate whose very version has been proven better; None if there is none, or it has changed."""
        known = self._leaders.get(task.name)
        if known is None or known[0] != route:
            found = self._quality.leader(task.name)
            known = self._leaders[task.name] = (route, found[0] if found else None)
        if known[1] is None:
            return None
        for name, subject in self._subjects(task, route).items():
            if subject == known[1]:
                return name
        return None

    def _subjects(self, task: Task, route: Best) -> dict[str, Subject]:
        """Candidate -> what it is now. One whose adapter is gone is left out."""
        subjects: dict[str, Subject] = {}
        for name in route.candidates:
            try:
                subjects[name] = Subject.of(task.name, self._versions.resolve([(name, 1.0)]), self._base)
            except AdapterError:
                continue
        return subjects
