"""`best` routes: traffic is split between candidates until one is proven better, and that one then serves.

- Without a leader, candidates that are not proven worse than another take turns.
- A candidate becomes the leader when every pair has `min_samples` and its mean is higher than each other mean, by a
  confidence sequence.
- One request in 20 explores the other candidates, half of these candidates with fewer than `min_samples`.
- A leader that is proven worse loses its place. If one candidate never reaches `min_samples`, this still works between
  the others.
- If evaluations decide, there is no exploration, because requests give no information. A candidate whose weights failed
  to load is explored until it loads again.

The order of turns is random, five rounds at a time, so that clients which alternate between kinds of prompts do not
bias the comparison.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError, StoreFailed
from server.tasks.definitions import BestRoute, Task
from server.tasks.intervals import ALPHA, Comparison, Hours, Totals, compare_by_hours, compare_paired
from server.tasks.mix_key import MixKey
from server.tasks.quality import FEEDBACK, Quality

if TYPE_CHECKING:
    from adapters.registry import Registry

EXPLORE_EVERY = 20
"""Requests of which one explores."""
ROUNDS = 5
"""Rounds of turns whose order is drawn at once."""


@dataclass(frozen=True)
class Decision:
    """The leader, if any, the reason in words, and the candidates that are proven worse than another."""

    leader: str | None
    reason: str
    worse: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Evidence:
    """Scores of candidates, and how two of them compare.

    Attributes:
        totals: candidate -> all its scores.
        samples: number of samples in the comparison of two candidates.
        unit: the word for these samples.
        compare: the comparison of two candidates.
        advice: what the user can do if samples are missing.
    """

    totals: Mapping[str, Totals]
    samples: Callable[[str, str], int]
    unit: str
    compare: Callable[[str, str], Comparison]
    advice: str = ""


def feedback_evidence(scores: Mapping[str, Hours]) -> Evidence:
    """Evidence from feedback: candidates are compared within hours."""
    totals = {name: Totals.sum(hours.values()) for name, hours in scores.items()}
    return Evidence(
        totals,
        lambda one, other: min(totals[one].count, totals[other].count),
        "samples",
        lambda one, other: compare_by_hours(scores[one], scores[other]),
    )


def evaluation_evidence(
    totals: Mapping[str, Totals], paired: Callable[[str, str], Totals], lower_is_better: bool = False
) -> Evidence:
    """Evidence from evaluations: two candidates are compared on the examples that both answered."""
    pairs = {pair: paired(*pair) for pair in itertools.combinations(totals, 2)}

    def compare(one: str, other: str) -> Comparison:
        comparison = compare_paired(pairs[one, other])
        return comparison.reversed() if lower_is_better else comparison

    advice = "" if all(p.count for p in pairs.values()) else "; evaluate all of them on one file"
    return Evidence(totals, lambda one, other: pairs[one, other].count, "samples of the same examples", compare, advice)


def decide(evidence: Evidence, min_samples: int, current: str | None) -> Decision:
    """Choose the leader. `current` is the leader until now; it stays unless it is proven worse or another better."""
    names = list(evidence.totals)
    if len(names) < 2:
        return Decision(current, f"nothing to compare: {', '.join(names) or 'no candidate'} is left")
    scores = ", ".join(
        f"{name} {t.mean:.3f} of {t.count}" if t.count else f"{name} none" for name, t in evidence.totals.items()
    )
    alpha = ALPHA / (len(names) - 1)
    margins: dict[str, dict[str, float]] = {name: {} for name in names}  # lower bounds of differences
    pairs = list(itertools.combinations(names, 2))
    comparable = [pair for pair in pairs if evidence.samples(*pair) >= min_samples]
    for one, other in comparable:
        comparison = evidence.compare(one, other)
        margins[one][other] = comparison.lower_bound(alpha)
        margins[other][one] = comparison.reversed().lower_bound(alpha)
    worse = frozenset(other for over in margins.values() for other, margin in over.items() if margin > 0)
    worse_text = f", {', '.join(sorted(worse))} worse than another" if worse else ""
    complete = len(comparable) == len(pairs)
    for name, over in margins.items():
        # If some pairs lack samples, only a challenger of the current leader may take over.
        margin = min(1.0, *over.values()) if complete or current in over else 0.0
        if margin > 0:
            than = "" if complete else f", than all with {min_samples} {evidence.unit}"
            return Decision(
                name, f"{name} is better by at least {margin:.3f}, at {1 - ALPHA:.0%}{than}: {scores}", worse
            )
    current = None if current in worse else current
    if complete:
        return Decision(current, f"no candidate is proven better yet{worse_text}: {scores}", worse)
    action = "taking turns" if current is None else f"{current} serves"
    until = f"until each has {min_samples} {evidence.unit}"
    return Decision(current, f"{action} {until}{worse_text}: {scores}{evidence.advice}", worse)


@dataclass
class _Turns:
    """Turns of the candidates of one task."""

    _remaining: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    """Candidates -> their remaining turns, in random order."""
    _until: int = 0
    """Requests until the next exploring one, including it."""
    _after: int = 0
    """Requests of this group of 20 after the exploring one."""

    def next(self, names: Sequence[str]) -> str:
        """The candidate whose turn it is. Each has the same number of turns in `ROUNDS` rounds."""
        turns = self._remaining.get(tuple(names))
        if not turns:
            turns = random.sample([*names] * ROUNDS, len(names) * ROUNDS)
            self._remaining = {key: left for key, left in self._remaining.items() if left} | {tuple(names): turns}
        return turns.pop()

    def explores(self) -> bool:
        """Whether this request explores: one of every `EXPLORE_EVERY`, at a random place."""
        if self._until == 0 and self._after == 0:
            self._until = random.randrange(EXPLORE_EVERY) + 1
            self._after = EXPLORE_EVERY - self._until
        if self._until > 0:
            self._until -= 1
            return self._until == 0
        self._after -= 1
        return False


@dataclass
class _TaskState:
    """Routing state of one task; it is discarded when the route changes."""

    route: BestRoute
    leader: MixKey | None
    worse: frozenset[MixKey] = frozenset()
    turns: _Turns = field(default_factory=_Turns)


class BestRouter:
    """Picks the candidate for each request of a task with a `best` route."""

    def __init__(self, quality: Quality, registry: Registry, base: str) -> None:
        self._quality = quality
        self._registry = registry
        self._base = base
        self._states: dict[str, _TaskState] = {}

    def pick(self, task: Task, route: BestRoute) -> str:
        """The candidate for the next request."""
        state = self._state(task, route)
        keys = self._keys(task, route)
        leader = self._leader(state, keys)
        loadable = [name for name in keys if not self._registry.load_failed(name)] or list(keys)
        main = [name for name in loadable if keys[name] not in state.worse] or loadable
        if leader in loadable:
            main = [leader]
        others = [n for n in keys if n not in main and (route.source == FEEDBACK or n not in loadable)]
        if not others or not state.turns.explores():
            return main[0] if len(main) == 1 else state.turns.next(main or list(route.candidates))
        counts = {n: self._quality.totals(keys[n], route.metric, route.source).count for n in others}
        few = [name for name in others if counts[name] < route.min_samples]
        return state.turns.next(few if few and random.random() < 0.5 else others)

    def review(self, task: Task, route: BestRoute) -> Decision:
        """Decide again with the current scores, and store a change of the leader. Raises StoreFailed."""
        state = self._state(task, route)
        keys = self._keys(task, route)
        current = self._leader(state, keys)
        decision = decide(self._evidence(keys, route), route.min_samples, current)
        state.worse = frozenset(keys[name] for name in decision.worse)
        if decision.leader != current:
            leader = None if decision.leader is None else keys[decision.leader]
            if leader is None:
                self._quality.clear_leader(task.name)
            else:
                self._quality.set_leader(task.name, _rule(route), leader, decision.reason)
            state.leader = leader
        return decision

    def review_task(self, task: Task | None) -> None:
        """`review` if the task has a `best` route. To be called after new scores, routes and versions."""
        if task is not None and isinstance(task.route, BestRoute):
            self.review(task, task.route)

    def describe(self, task: Task, route: BestRoute) -> dict[str, Any]:
        """The `best` of a task's performance."""
        keys = self._keys(task, route)
        try:
            decision = self.review(task, route)
        except StoreFailed as error:
            decision = Decision(self._leader(self._state(task, route), keys), error.message)
        stored = self._quality.leader(task.name, _rule(route))
        leader = decision.leader
        return {
            "leader": leader,
            "version": keys[leader].label if leader in keys else None,
            "decided": stored[1] if stored and leader else None,
            "reason": decision.reason,
        }

    def forget_task(self, task: str) -> None:
        """Delete the leader and turns of a task that is gone or has no `best` route any more. Raises StoreFailed."""
        self._quality.clear_leader(task)
        self._states.pop(task, None)

    def _state(self, task: Task, route: BestRoute) -> _TaskState:
        state = self._states.get(task.name)
        if state is None or state.route != route:
            stored = self._quality.leader(task.name, _rule(route))
            state = self._states[task.name] = _TaskState(route, stored[0] if stored else None)
        return state

    def _evidence(self, keys: Mapping[str, MixKey], route: BestRoute) -> Evidence:
        if route.source == FEEDBACK:
            return feedback_evidence({n: self._quality.hours(key, route.metric, FEEDBACK) for n, key in keys.items()})
        return evaluation_evidence(
            {name: self._quality.totals(key, route.metric, route.source) for name, key in keys.items()},
            lambda one, other: self._quality.paired(keys[one], keys[other], route.metric),
            lower_is_better=route.metric == "loss",
        )

    def _leader(self, state: _TaskState, keys: Mapping[str, MixKey]) -> str | None:
        """The candidate that leads; None if there is none or it has a new version."""
        return next((name for name, key in keys.items() if key == state.leader), None)

    def _keys(self, task: Task, route: BestRoute) -> dict[str, MixKey]:
        """Candidate -> its current mix. Candidates whose adapter is missing are left out.

        Of candidates with equal content only one is kept: the leader, or the one with the most scores.
        """
        by_content: dict[tuple[str, ...], dict[str, MixKey]] = {}
        for name in route.candidates:
            try:
                versions = self._registry.resolve([(name, 1.0)])
            except AdapterError:
                continue
            content = tuple(version.digest for version, _ in versions)
            by_content.setdefault(content, {})[name] = MixKey.of(task.name, versions, self._base)
        leader = self._state(task, route).leader

        def rank(item: tuple[str, MixKey]) -> tuple[bool, int]:
            return item[1] == leader, self._quality.totals(item[1], route.metric, route.source).count

        return dict(max(same.items(), key=rank) for same in by_content.values())


def _rule(route: BestRoute) -> str:
    """Key of a stored decision. A decision by another metric or source does not apply."""
    return f"{route.metric} by {route.source}"
