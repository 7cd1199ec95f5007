"""`best` routes: candidates take turns until one is proven better, and that one serves.

Owns the rule. Turns go on until every candidate has `min_samples` and the leader's mean is over each other's by an
interval that holds at all times; one that is proven worse than some other has few turns meanwhile. After that, one
request in twenty still goes to the others in turn, half of these to those that have few samples (a version that has
just been published), so that a change is noticed; a rival takes over only when it is proven better itself, and turns
begin anew where the leader is proven worse than some other. A candidate may be published so often that it never has
`min_samples`: nobody can begin to lead beside it, but who is worse than another has few turns all the same, and a
leader that is gives way. Where evaluations decide, nobody goes around: requests would change nothing. But who could not
be read when it was last loaded has such few turns by any rule, until it is: its requests end with an error.

In which order is drawn anew every few rounds, and so is which of twenty requests goes around: clients that send one
easy and one hard prompt in turn would otherwise give each candidate prompts of one kind. Single rounds would not do:
what one candidate has of the two the other has not, and differences vary more than the interval takes them to.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from adapters.errors import AdapterError, StoreFailed
from adapters.weights import Choice, Version
from server.tasks.definitions import BestRoute, Task
from server.tasks.intervals import ALPHA, Apart, Hours, Totals, by_hours, by_pairs
from server.tasks.mix_key import MixKey
from server.tasks.quality import FEEDBACK, Quality

EXPLORED = 20
"""One request in so many goes around after a decision."""
ROUNDS = 5
"""Rounds whose order is drawn at once."""


class Versions(Protocol):
    """What a router asks of the registry."""

    def resolve(self, choice: Choice) -> list[tuple[Version, float]]: ...

    def load_failed(self, text: str) -> bool: ...


@dataclass(frozen=True)
class Decision:
    """Who leads, if anybody does, and why, in words; and who is proven worse than some other."""

    leader: str | None
    reason: str
    behind: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Known:
    """What is known of candidates: all scores of each; of each two how many count, called `samples`, and how far one is
    over the other, asked for once."""

    totals: Mapping[str, Totals]
    common: Callable[[str, str], int]
    samples: str
    apart: Callable[[str, str], Apart]
    advice: str = ""


def by_feedback(scores: Mapping[str, Hours]) -> Known:
    """Of scores by hour: compared within hours."""
    totals = {name: Totals.joined(hours.values()) for name, hours in scores.items()}

    def common(one: str, other: str) -> int:
        return min(totals[one].count, totals[other].count)

    return Known(totals, common, "samples", lambda one, other: by_hours(scores[one], scores[other]))


def by_evaluation(
    totals: Mapping[str, Totals], paired: Callable[[str, str], Totals], lower_is_better: bool = False
) -> Known:
    """Of evaluations: compared on the examples that two were asked both, of which `paired` tells."""
    pairs = {pair: paired(*pair) for pair in itertools.combinations(totals, 2)}

    def apart(one: str, other: str) -> Apart:
        found = by_pairs(pairs[one, other])
        return found.turned() if lower_is_better else found

    # Their own scores may be of other examples, or from before there were pairs.
    advice = "" if all(p.count for p in pairs.values()) else "; have all of them evaluated on one file"
    return Known(totals, lambda one, other: pairs[one, other].count, "samples of the same examples", apart, advice)


def decide(known: Known, min_samples: int, current: str | None) -> Decision:
    """The rule itself. `current` is the one that leads now; it does no more once it is proven worse than another."""
    names = list(known.totals)
    if len(names) < 2:
        return Decision(current, f"nothing to compare: {', '.join(names) or 'no candidate'} is left")
    told = ", ".join(
        f"{name} {t.mean:.3f} of {t.count}" if t.count else f"{name} none" for name, t in known.totals.items()
    )
    alpha = ALPHA / (len(names) - 1)
    leads: dict[str, dict[str, float]] = {name: {} for name in names}
    pairs = list(itertools.combinations(names, 2))
    known_pairs = [pair for pair in pairs if known.common(*pair) >= min_samples]
    for one, other in known_pairs:
        apart = known.apart(one, other)
        leads[one][other], leads[other][one] = apart.least(alpha), apart.turned().least(alpha)
    behind = frozenset(other for of_one in leads.values() for other, least in of_one.items() if least > 0)
    worse = f", {', '.join(sorted(behind))} worse than another" if behind else ""
    all_known = len(known_pairs) == len(pairs)
    for name, of_one in leads.items():
        # Over all others; or, if these are not all known, over all that are, with the one that leads now among them.
        least = min(1.0, *of_one.values()) if all_known or current in of_one else 0.0
        if least > 0:
            than = "" if all_known else f", than all with {min_samples} {known.samples}"
            return Decision(name, f"{name} is better by at least {least:.3f}, at {1 - ALPHA:.0%}{than}: {told}", behind)
    current = None if current in behind else current
    if all_known:
        return Decision(current, f"no candidate is proven better yet{worse}: {told}", behind)
    meanwhile = "taking turns" if current is None else f"{current} serves"
    until = f"until each has {min_samples} {known.samples}"
    return Decision(current, f"{meanwhile} {until}{worse}: {told}{known.advice}", behind)


@dataclass
class _Turns:
    """Whose turn it is."""

    _left: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    """Among whom -> whose turns are left of these rounds, in the order drawn."""
    _ahead: int = 0
    """Requests until one goes around, itself among them, and those that are left of the twenty after it."""
    _after: int = 0

    def next(self, names: Sequence[str]) -> str:
        """One of the names. In `ROUNDS` rounds each has as many turns."""
        left = self._left.get(tuple(names))
        if not left:
            left = random.sample([*names] * ROUNDS, len(names) * ROUNDS)
            self._left = {among: turns for among, turns in self._left.items() if turns} | {tuple(names): left}
        return left.pop()

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
        self._turns: dict[str, tuple[BestRoute, _Turns]] = {}
        self._leaders: dict[str, tuple[BestRoute, MixKey | None]] = {}
        self._behind: dict[str, tuple[BestRoute, frozenset[MixKey]]] = {}
        """Who was proven worse than some other when a task was last looked at."""

    def pick(self, task: Task, route: BestRoute) -> str:
        """The candidate for the next request."""
        taken = self._turns.get(task.name)
        if taken is None or taken[0] != route:
            taken = self._turns[task.name] = (route, _Turns())
        turns = taken[1]
        subjects = self._subjects(task, route)
        leader = self._leading(task, route, subjects)
        known, behind = self._behind.get(task.name, (route, frozenset[MixKey]()))
        sound = [name for name in subjects if not self._versions.load_failed(name)] or list(subjects)
        first = [n for n in sound if known != route or subjects[n] not in behind] or sound
        if leader in sound:
            first = [leader]
        # Of what is evaluated nothing is learned by requests, but whether it can be read again.
        rest = [n for n in subjects if n not in first and (route.source == FEEDBACK or n not in sound)]
        if not rest or not turns.goes_around():
            return first[0] if len(first) == 1 else turns.next(first or list(route.candidates))
        counts = {n: self._quality.totals(subjects[n], route.metric, route.source).count for n in rest}
        few = [name for name in rest if counts[name] < route.min_samples]
        return turns.next(few if few and random.random() < 0.5 else rest)

    def review(self, task: Task, route: BestRoute) -> Decision:
        """Look at the scores again, and change the leader if that is proven.

        Raises StoreFailed if a new leader, or that there is none any more, cannot be written down.
        """
        subjects = self._subjects(task, route)
        current = self._leading(task, route, subjects)
        decision = decide(self._known(subjects, route), route.min_samples, current)
        self._behind[task.name] = (route, frozenset(subjects[name] for name in decision.behind))
        if decision.leader != current:
            found = None if decision.leader is None else subjects[decision.leader]
            if found is None:
                self._quality.clear_leader(task.name)
            else:
                self._quality.set_leader(task.name, _rule(route), found, decision.reason)
            self._leaders[task.name] = (route, found)
        return decision

    def _known(self, subjects: Mapping[str, MixKey], route: BestRoute) -> Known:
        if route.source == FEEDBACK:  # of accuracy alone
            return by_feedback({name: self._quality.hours(s, route.metric, FEEDBACK) for name, s in subjects.items()})
        return by_evaluation(
            {name: self._quality.totals(s, route.metric, route.source) for name, s in subjects.items()},
            lambda one, other: self._quality.paired(subjects[one], subjects[other], route.metric),
            route.metric == "loss",
        )

    def review_task(self, task: Task | None) -> None:
        """Review a task that has such a route: its scores, its route or a version of a candidate is another now.

        Raises StoreFailed as `review` does.
        """
        if task is not None and isinstance(task.route, BestRoute):
            self.review(task, task.route)

    def describe(self, task: Task, route: BestRoute) -> dict[str, Any]:
        """The `best` of a task's performance."""
        try:
            decision = self.review(task, route)
        except StoreFailed as error:  # a new leader has to wait for the disk, who asks need not
            decision = Decision(self._leading(task, route, self._subjects(task, route)), error.message)
        known = self._quality.leader(task.name, _rule(route))
        subjects = self._subjects(task, route)
        leader = decision.leader
        return {
            "leader": leader,
            "version": subjects[leader].label if leader in subjects else None,
            "decided": known[1] if known and leader else None,
            "reason": decision.reason,
        }

    def forget_task(self, task: str) -> None:
        """Forget who leads a task that is gone or has no such route any more, and whose turn it is.

        Raises StoreFailed.
        """
        self._quality.clear_leader(task)
        self._leaders.pop(task, None)
        self._behind.pop(task, None)
        self._turns.pop(task, None)

    def _leading(self, task: Task, route: BestRoute, subjects: Mapping[str, MixKey]) -> str | None:
        """The candidate whose very version has been proven better; None if there is none, or it has changed."""
        known = self._leader(task, route)
        return next((name for name, subject in subjects.items() if subject == known), None)

    def _leader(self, task: Task, route: BestRoute) -> MixKey | None:
        """What has been proven better, be it a candidate still or not."""
        known = self._leaders.get(task.name)
        if known is None or known[0] != route:
            found = self._quality.leader(task.name, _rule(route))
            known = self._leaders[task.name] = (route, found[0] if found else None)
        return known[1]

    def _subjects(self, task: Task, route: BestRoute) -> dict[str, MixKey]:
        """Candidate -> what it is now. One whose adapter is gone is left out.

        Of those of one content, as `name` may be `name@digest`, or be published under a second name, it is the one that
        leads, or else of which most is known: nothing is better than itself.
        """
        same: dict[tuple[str, ...], dict[str, MixKey]] = {}
        for name in route.candidates:
            try:
                versions = self._versions.resolve([(name, 1.0)])
            except AdapterError:
                continue
            content = tuple(version.digest for version, _ in versions)
            same.setdefault(content, {})[name] = MixKey.of(task.name, versions, self._base)

        def standing(item: tuple[str, MixKey]) -> tuple[bool, int]:
            subject = item[1]
            count = self._quality.totals(subject, route.metric, route.source).count
            return subject == self._leader(task, route), count

        return dict(max(several.items(), key=standing) if len(several) > 1 else next(iter(several.items()))
                    for several in same.values())  # fmt: skip


def _rule(route: BestRoute) -> str:
    """What a decision was made by: one that another metric or source has made says nothing here."""
    return f"{route.metric} by {route.source}"
