"""`best` routes: candidates take turns until one is proven better, and that one serves.

Owns the rule. Turns go on until every candidate has `min_samples` and the leader's mean is over each other's by an
interval that holds at all times. After that, one request in twenty still goes to the others in turn, to those first
that have few samples (a version that has just been published), so that a change is noticed; a rival takes over only
when it is proven better itself.

In which order is drawn anew every few rounds, and so is which of twenty requests goes around: clients that send one
easy and one hard prompt in turn would otherwise give each candidate prompts of one kind. Single rounds would not do:
what one candidate has of the two the other has not, and differences vary more than the interval takes them to.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapters.errors import AdapterError, StoreFailed
from adapters.weights import Choice, Version
from server.tasks.definitions import Best, Task
from server.tasks.intervals import ALPHA, Hours, Totals, lead
from server.tasks.quality import Quality, Subject

EXPLORED = 20
"""One request in so many goes around after a decision."""
ROUNDS = 5
"""Rounds whose order is drawn at once."""


class Versions(Protocol):
    """What a router asks of the registry."""

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]: ...


@dataclass(frozen=True)
class Decision:
    """Who leads, if anybody does, and why, in words."""

    leader: str | None
    reason: str


def decide(
    scores: Mapping[str, Hours], min_samples: int, current: str | None, lower_is_better: bool = False
) -> Decision:
    """The rule itself. `scores` are the candidates', by hour; `current` is the one that leads now."""
    if len(scores) < 2:
        return Decision(current, f"nothing to compare: {', '.join(scores) or 'no candidate'} is left")
    totals = {name: Totals.joined(hours.values()) for name, hours in scores.items()}
    told = ", ".join(f"{name} {t.mean:.3f} of {t.count}" if t.count else f"{name} none" for name, t in totals.items())
    if any(t.count < min_samples for t in totals.values()):
        return Decision(current, f"taking turns until each has {min_samples} samples: {told}")
    if lower_is_better:
        scores = {name: {hour: t.turned() for hour, t in hours.items()} for name, hours in scores.items()}
    alpha = ALPHA / (len(scores) - 1)
    for leader, hours in scores.items():
        least = 1.0
        for name, others in scores.items():
            if name != leader and least > 0:
                least = min(least, lead(hours, others, alpha))
        if least > 0:
            return Decision(leader, f"{leader} is better by at least {least:.3f}, at {1 - ALPHA:.0%}: {told}")
    return Decision(current, f"no candidate is proven better yet: {told}")


@dataclass
class _Turns:
    """Whose turn it is."""

    _left: list[str] = field(default_factory=list)
    """Whose turns are left of these rounds, in the order drawn."""
    _among: Sequence[str] = ()
    _ahead: int = 0
    """Requests until one goes around, itself among them, and those that are left of the twenty after it."""
    _after: int = 0

    def next(self, names: Sequence[str]) -> str:
        """One of the names. In `ROUNDS` rounds each has as many turns."""
        if not self._left or self._among != names:
            self._left, self._among = random.sample([*names] * ROUNDS, len(names) * ROUNDS), names
        return self._left.pop()

    def goes_around(self) -> bool:
        """Whether this request does, of those that a leader would have: one of each twenty."""
        if self._ahead == 0 and self._after == 0:
            self._ahead = random.randrange(EXPLORED) + 1
            self._after = EXPLORED - self._ahead
        if self._ahead > 0:
            self._ahead -= 1
            return self._ahead == 0
        self._after -= 1
        return False


class BestRouter:
    """Picks candidates by what is known of them."""

    def __init__(self, quality: Quality, versions: Versions, base: str) -> None:
        self._quality = quality
        self._versions = versions
        self._base = base
        self._turns: dict[str, _Turns] = {}
        self._leaders: dict[str, tuple[Best, Subject | None]] = {}

    def pick(self, task: Task, route: Best) -> str:
        """The candidate for the next request."""
        turns = self._turns.setdefault(task.name, _Turns())
        leader = self._leading(task, route)
        if leader is not None and not turns.goes_around():
            return leader
        subjects = self._subjects(task, route)
        if leader is None:
            return turns.next(list(subjects) or list(route.candidates))
        counts = {n: self._quality.totals(s, route.metric, route.source).count for n, s in subjects.items()}
        others = [name for name in subjects if name != leader]
        return turns.next([name for name in others if counts[name] < route.min_samples] or others or [leader])

    def review(self, task: Task, route: Best) -> Decision:
        """Look at the scores again, and change the leader if that is proven.

        Raises StoreFailed if a new leader cannot be written down.
        """
        subjects = self._subjects(task, route)
        scores = {name: self._quality.hours(s, route.metric, route.source) for name, s in subjects.items()}
        current = self._leading(task, route)
        decision = decide(scores, route.min_samples, current, route.metric == "loss")
        if decision.leader is not None and decision.leader != current:
            self._quality.lead(task.name, _rule(route), subjects[decision.leader], decision.reason)
            self._leaders[task.name] = (route, subjects[decision.leader])
        return decision

    def look(self, task: Task | None) -> None:
        """Review a task that has such a route: its scores, its route or a version of a candidate is another now.

        Raises StoreFailed as `review` does.
        """
        if task is not None and isinstance(task.route, Best):
            self.review(task, task.route)

    def describe(self, task: Task, route: Best) -> dict[str, Any]:
        """The `best` of a task's performance."""
        try:
            decision = self.review(task, route)
        except StoreFailed as error:  # a new leader has to wait for the disk, who asks need not
            decision = Decision(self._leading(task, route), error.message)
        known = self._quality.leader(task.name, _rule(route))
        subjects = self._subjects(task, route)
        leader = decision.leader
        return {
            "leader": leader,
            "version": subjects[leader].label if leader in subjects else None,
            "decided": known[1] if known and leader else None,
            "reason": decision.reason,
        }

    def forget(self, task: str) -> None:
        """Forget who leads a task that is gone or has no such route any more, and whose turn it is.

        Raises StoreFailed.
        """
        self._quality.forget(task)
        self._leaders.pop(task, None)
        self._turns.pop(task, None)

    def _leading(self, task: Task, route: Best) -> str | None:
        """The candidate whose very version has been proven better; None if there is none, or it has changed."""
        known = self._leaders.get(task.name)
        if known is None or known[0] != route:
            found = self._quality.leader(task.name, _rule(route))
            known = self._leaders[task.name] = (route, found[0] if found else None)
        if known[1] is None:
            return None
        for name, subject in self._subjects(task, route).items():
            if subject == known[1]:
                return name
        return None

    def _subjects(self, task: Task, route: Best) -> dict[str, Subject]:
        """Candidate -> what it is now. One whose adapter is gone is left out, and one that is the version of another,
        as `name` may be of `name@digest`: nothing is better than itself.
        """
        subjects: dict[str, Subject] = {}
        for name in route.candidates:
            try:
                subject = Subject.of(task.name, self._versions.resolve([(name, 1.0)]), self._base)
            except AdapterError:
                continue
            if subject not in subjects.values():
                subjects[name] = subject
        return subjects


def _rule(route: Best) -> str:
    """What a decision was made by: one that another metric or source has made says nothing here."""
    return f"{route.metric} by {route.source}"
