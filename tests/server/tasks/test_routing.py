"""The rule of `best` routes on simulated scores, and the router over stored ones."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import StoreFailed, UnknownAdapter
from adapters.weights import Version
from server.database import Database, database_url
from server.tasks.definitions import BestRoute, Task
from server.tasks.intervals import ALPHA, Hours, Totals, compare_by_hours
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.quality import Quality
from server.tasks.routing import (
    EXPLORE_EVERY,
    ROUNDS,
    BestRouter,
    Decision,
    _Turns,
    decide,
    evaluation_evidence,
    feedback_evidence,
)

MIN_SAMPLES = 200
TURNS = np.arange(10_000) % 2
"""Which of two candidates gets each sample while they take turns."""
LED = (np.arange(10_000) % EXPLORE_EVERY == 0).astype(int)
"""The same while the first one leads."""


def by_feedback(scores: Mapping[str, Hours], current: str | None = None, min_samples: int = MIN_SAMPLES) -> Decision:
    return decide(feedback_evidence(scores), min_samples, current)


def one_hour(share: float, count: int) -> dict[int, Totals]:
    return {0: Totals(count, count * share, count * share)}


# -- error rates


def simulate(values: np.ndarray, who: np.ndarray, min_samples: int = MIN_SAMPLES) -> tuple[np.ndarray, np.ndarray]:
    """For each run [runs, samples]: the first sample with a leader (-1: none), and whether it is the first candidate.

    The formula is written with arrays here; every tenth run is compared with `decide`.
    """
    sums = []
    for k in (0, 1):
        mine = values * (who == k)
        sums.append((np.cumsum(who == k), np.cumsum(mine, axis=1), np.cumsum(mine * mine, axis=1)))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [total / count for count, total, _ in sums]
        spread = [(sq + 1) / (count + 2) - ((total + 1) / (count + 2)) ** 2 for count, total, sq in sums]
        pooled = (sums[0][0] * spread[0] + sums[1][0] * spread[1]) / (sums[0][0] + sums[1][0])
        spread = [np.maximum(each, pooled) for each in spread]
        variance = spread[0] + spread[1]
        count = variance / (spread[0] / sums[0][0] + spread[1] / sums[1][0])
        rho2 = (-2 * np.log(ALPHA) + np.log(1 - 2 * np.log(ALPHA))) / 1000
        x = count * rho2 + 1
        width = np.sqrt(variance * x / (count**2 * rho2) * np.log(x / ALPHA**2))
        difference = means[0] - means[1]
        decided = (np.abs(difference) > width) & (np.minimum(sums[0][0], sums[1][0]) >= min_samples)
    at = np.where(decided.any(axis=1), decided.argmax(axis=1), -1)
    for run in range(0, len(values), 10):
        for t in (at[run], at[run] - 1) if at[run] > 0 else (-1,):
            totals = [Totals(int(c[t]), float(s[run, t]), float(q[run, t])) for c, s, q in sums]
            found = by_feedback(dict(zip("ab", ({0: total} for total in totals), strict=True)), None, min_samples)
            expected = None if at[run] < 0 or t < at[run] else "ab"[int(difference[run, t] < 0)]
            assert found.leader == expected
    return at, difference[np.arange(len(values)), at] > 0


def hits(seed: int, runs: int, *shares: float, who: np.ndarray = TURNS) -> np.ndarray:
    return (np.random.default_rng(seed).random((runs, len(who))) < np.asarray(shares)[who]).astype(float)


def test_a_real_difference_is_found_and_rarely_the_wrong_way() -> None:
    """0.90 against 0.85: decided within 10,000 samples, half of the runs within 1,500."""
    at, first = simulate(hits(1, 500, 0.90, 0.85), TURNS)
    decided = at >= 0
    assert decided.mean() >= 0.99 and first[decided].mean() >= 0.95 and np.median(at[decided] + 1) < 1500


@pytest.mark.parametrize("min_samples", [1, MIN_SAMPLES])
@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 0.999])
def test_equal_candidates_rarely_get_a_leader_or_a_new_one(share: float, min_samples: int) -> None:
    at, _ = simulate(hits(2, 500, share, share), TURNS, min_samples)
    assert (at >= 0).mean() <= ALPHA
    at, first = simulate(hits(3, 500, share, share, who=LED), LED, min_samples)
    assert ((at >= 0) & ~first).mean() <= ALPHA


@pytest.mark.parametrize("kind", ["rouge", "three values", "nearly constant"])
def test_equal_candidates_with_scores_between_0_and_1_rarely_get_a_leader(kind: str) -> None:
    rng, shape = np.random.default_rng(4), (500, len(TURNS))
    values = {
        "rouge": lambda: rng.beta(2, 6, shape),
        "three values": lambda: rng.choice([0.0, 0.5, 1.0], shape),
        "nearly constant": lambda: np.maximum(rng.beta(50, 1, shape), 0.9),
    }[kind]()
    assert (simulate(values, TURNS)[0] >= 0).mean() <= ALPHA


def test_three_equal_candidates_rarely_get_a_leader() -> None:
    sums = np.cumsum(np.random.default_rng(5).random((300, 3, 3000)) < 0.9, axis=2)[:, :, 199::56]
    counts = np.arange(200, 3001, 56)
    wrong = 0
    for run in sums:
        tables = ({n: {0: Totals(int(c), float(s), float(s))} for n, s in zip("abc", run[:, i], strict=True)}
                  for i, c in enumerate(counts))  # fmt: skip
        wrong += any(by_feedback(table).leader for table in tables)
    assert wrong / len(sums) <= ALPHA


# -- the rule


def test_a_leader_that_serves_more_hard_questions_keeps_its_place() -> None:
    scores: dict[str, dict[int, Totals]] = {"a": {}, "b": {}}
    for hour in range(200):
        for name, share in ({"a": 0.95, "b": 0.93} if hour < 10 else {"a": 0.75, "b": 0.73}).items():
            count = 1000 if hour < 10 or name == "a" else 50
            scores[name][hour] = Totals(count, count * share, count * share)
    totals = {name: Totals.sum(hours.values()) for name, hours in scores.items()}
    assert totals["b"].mean > totals["a"].mean + 0.05, "in total the worse one looks better"
    assert by_feedback(scores, "a").leader == "a" and compare_by_hours(scores["b"], scores["a"]).lower_bound() < 0


@pytest.mark.parametrize("tried", [{}, {0: Totals(1, 1, 1)}])
def test_scores_from_before_a_candidate_was_in_use_are_ignored(tried: dict[int, Totals]) -> None:
    """A month of easy questions, then hard ones since the other is in use again."""
    leads = {**{hour: Totals(100, 95, 95) for hour in range(700)}, 700: Totals(1000, 700, 700)}
    equal, better = {**tried, 700: Totals(1000, 700, 700)}, {**tried, 700: Totals(1000, 800, 800)}
    assert by_feedback({"a": leads, "b": equal}, "a").worse == frozenset()
    assert by_feedback({"a": leads, "b": better}, "a").leader == "b" == by_feedback({"b": better, "a": leads}).leader


def test_the_lower_bound_is_divided_between_the_rivals() -> None:
    a = one_hour(0.85, 400)
    found = set()
    for more in (0, 1):
        for right in range(340):
            b = {0: Totals(400, float(right), float(right))}
            proven = compare_by_hours(a, b).lower_bound(ALPHA / (1 + more)) > 0
            assert (by_feedback({"a": a, "b": b, **dict.fromkeys("c" * more, b)}, None, 1).leader == "a") is proven
            found.add((more, right, proven))
    assert sum(proven for more, _, proven in found if more) < sum(proven for more, _, proven in found if not more)


def test_min_samples_are_needed_of_both() -> None:
    good = one_hour(1.0, MIN_SAMPLES)
    assert by_feedback({"a": good, "b": one_hour(0.0, MIN_SAMPLES)}).leader == "a"
    few = by_feedback({"a": good, "b": one_hour(0.0, MIN_SAMPLES - 1)})
    assert few.leader is None and few.reason.startswith("taking turns until each has 200 samples: a 1.000 of 200")


def test_a_leader_stays_until_a_rival_is_proven_better() -> None:
    close = {"a": one_hour(0.85, 1000), "b": one_hour(0.87, 1000)}
    assert by_feedback(close, "a").leader == "a"
    assert by_feedback({**close, "b": one_hour(0.98, 1000)}, "a").leader == "b"
    assert by_feedback({"a": close["a"]}, "a").leader == "a", "nothing to compare"
    assert by_feedback({"a": close["a"]}).leader is by_feedback({}).leader is None


@pytest.mark.parametrize(
    ("current", "leader", "reason"),
    [
        (None, None, "taking turns until each has 200 samples, b worse than another: a 0.950 of 600"),
        ("a", "a", "a serves until each has 200 samples, b worse than another"),
        ("b", "a", "a is better by at least 0."),
        ("c", "c", "c serves until each has 200 samples, b worse than another"),
    ],
)
def test_a_candidate_with_few_samples_does_not_block_the_others(
    current: str | None, leader: str | None, reason: str
) -> None:
    good, bad, new = one_hour(0.95, 600), one_hour(0.1, 600), one_hour(1.0, 3)
    decision = by_feedback({"a": good, "b": bad, "c": new}, current)
    assert (decision.leader, decision.worse) == (leader, {"b"}) and decision.reason.startswith(reason)
    if current == "b":
        assert " at 95%, than all with 200 samples: a 0.950 of 600" in decision.reason
        assert by_feedback({"a": good, "b": bad, "c": new, "d": good}, "b").leader is None, "a and d are equal"


def test_a_lower_loss_is_better() -> None:
    totals = {"a": Totals(1000, 100, 100), "b": Totals(1000, 900, 900)}
    paired = Totals(1000, 100, 10)  # (1 + 0.1 - 0.9) / 2 each
    for lower, leader in ((False, "b"), (True, "a")):
        assert decide(evaluation_evidence(totals, lambda one, other: paired, lower), 200, None).leader == leader


def test_turns_are_equal_within_rounds_even_if_the_candidates_change_in_between() -> None:
    turns = _Turns()
    for _ in range(20):
        names = [turns.next("ab") for _ in range(3)]
        others = [turns.next("cd") for _ in range(2 * ROUNDS)]
        names += [turns.next("ab") for _ in range(2 * ROUNDS - 3)]
        assert Counter(names) == dict.fromkeys("ab", ROUNDS) and Counter(others) == dict.fromkeys("cd", ROUNDS)
    assert not any(turns._remaining.values())


# -- the router


class Names:
    """A registry whose versions can be changed."""

    def __init__(self, *names: str) -> None:
        self.contents = {name: name for name in names}
        self.failing: set[str] = set()

    def load_failed(self, text: str) -> bool:
        return text in self.failing

    def resolve(self, choice: Any) -> list[tuple[Version, float]]:
        for name, _ in choice:
            if name not in self.contents:
                raise UnknownAdapter(name)
        return [(Version(n, hashlib.sha256(self.contents[n].encode()).hexdigest()), w) for n, w in choice]


class Bench:
    """A router over three adapters, with scores."""

    def __init__(self, database: Database, names: Names, route: BestRoute) -> None:
        self.names, self.route, self.task = names, route, Task("t", "{input}", route)
        self.quality = Quality(database)
        self.router = BestRouter(self.quality, names, "base")
        self._ids = 0

    def key(self, name: str) -> MixKey:
        return MixKey.of("t", self.names.resolve([(name, 1.0)]), "base")

    def score(self, name: str, value: float, count: int, source: str | None = None) -> None:
        if (source or self.route.source) == "evaluation":
            values = {f"{i}": value for i in range(count)}
            self.quality.record_evaluation(self.key(name), self.route.metric, values)
            return
        key, ids = self.key(name), range(self._ids, self._ids + count)
        self._ids += count
        for i in ids:
            self.quality.record_answer(AnswerRecord(f"{i}", key, "", "yes"))
        self.quality.flush()
        for i in ids:
            self.quality.record_feedback("t", f"{i}", "", score=value, expected=None)

    def review(self) -> Decision:
        return self.router.review(self.task, self.route)

    def picks(self, count: int) -> Counter[str]:
        return Counter(self.router.pick(self.task, self.route) for _ in range(count))


Open = Callable[..., Bench]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Open]:
    """Opens a bench; called again, over the same database, with the same adapters."""
    database = Database(database_url(None, tmp_path))
    names, opened = Names("a", "b", "c"), list[Bench]()

    def open_(**route: Any) -> Bench:
        while opened:
            opened.pop().quality.close()
        opened.append(Bench(database, names, BestRoute(**{"candidates": ("a", "b", "c"), "min_samples": 50} | route)))
        return opened[0]

    yield open_
    while opened:
        opened.pop().quality.close()
    database.close()


@pytest.mark.parametrize("source", ["feedback", "evaluation"])
def test_a_leader_survives_a_restart_and_ends_with_its_version(bench: Open, source: str) -> None:
    b = bench(source=source)
    assert b.picks(3 * ROUNDS) == dict.fromkeys("abc", ROUNDS)
    for name, value in (("a", 0.5), ("b", 1.0), ("c", 0.5)):
        b.score(name, value, 100)
    decision = b.review()
    assert decision.leader == "b" and decision.worse == {"a", "c"}
    for again in (b, bench(source=source)):
        described = again.router.describe(again.task, again.route)
        assert (described["leader"], described["version"]) == ("b", again.key("b").label)
        assert described["decided"] == decision.reason
        explored = 0 if source == "evaluation" else 3
        assert again.picks(EXPLORE_EVERY * 3)["b"] == EXPLORE_EVERY * 3 - explored
    again.names.contents["b"] = "other"
    described = again.router.describe(again.task, again.route)
    assert described["leader"] is described["version"] is described["decided"] is None
    del again.names.contents["c"]
    assert "c" not in again.picks(4 * ROUNDS), "an adapter that is gone gets no turn"
    again.names.contents.clear()
    assert again.router.pick(again.task, again.route) in again.route.candidates, "resolving it says what is missing"


def test_worse_candidates_get_one_request_in_twenty(bench: Open) -> None:
    b = bench()
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 0.0)):
        b.score(name, value, 60)
    decision = b.review()
    assert decision.leader is None and decision.worse == {"c"} and "c worse than another" in decision.reason
    picks = b.picks(EXPLORE_EVERY * 2 * ROUNDS)
    assert picks["c"] == 2 * ROUNDS and abs(picks["a"] - picks["b"]) <= ROUNDS
    b.names.contents["c"] = "other"
    assert b.picks(3 * ROUNDS)["c"] >= ROUNDS - 1, "a new version is not proven worse"


def test_a_leader_that_is_worse_than_another_loses_its_place(bench: Open) -> None:
    b = bench()
    for name, value in (("a", 0.5), ("b", 0.0), ("c", 0.0)):
        b.score(name, value, 100)
    assert b.review().leader == "a"
    for name in "bc":
        b.names.contents[name] = f"{name}2"
    assert b.review().reason.startswith("a serves until each has 50 samples")
    for name in "bc":
        b.score(name, 1.0, 100)
    assert b.review().leader is None, "b and c are better and equal"
    assert bench().quality.leader("t", "accuracy by feedback") is None


def test_half_of_exploration_goes_to_candidates_with_few_samples(bench: Open) -> None:
    b = bench()
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        b.score(name, value, 60)
    assert b.review().leader == "b"
    assert b.picks(EXPLORE_EVERY * 2 * ROUNDS) == {"a": ROUNDS, "c": ROUNDS, "b": 2 * ROUNDS * (EXPLORE_EVERY - 1)}
    b.names.contents["c"] = "other"
    picks = b.picks(EXPLORE_EVERY * 400)
    assert picks["a"] + picks["c"] == 400 and 240 < picks["c"] < 360
    b.score("c", 1.0, 20)
    assert b.review().leader == "b"


@pytest.mark.parametrize("source", ["feedback", "evaluation"])
def test_adapters_that_cannot_be_loaded_are_only_explored(bench: Open, source: str) -> None:
    b = bench(source=source)
    count = EXPLORE_EVERY * 6 * ROUNDS
    b.names.failing = {"a"}
    picks = b.picks(count)
    assert picks["a"] == 6 * ROUNDS and abs(picks["b"] - picks["c"]) <= ROUNDS
    b.names.failing = {"a", "b", "c"}
    assert min(b.picks(count).values()) > EXPLORE_EVERY * ROUNDS, "requests report the error"
    b.names.failing = set()
    for name, value in (("a", 1.0), ("b", 0.5), ("c", 0.5)):
        b.score(name, value, 150)
    assert b.review().leader == "a" and b.picks(count)["a"] >= count - 6 * ROUNDS
    b.names.failing = {"a"}
    picks = b.picks(count)
    assert 0 < picks["a"] <= 6 * ROUNDS and abs(picks["b"] - picks["c"]) <= ROUNDS and b.review().leader == "a"


def test_candidates_with_equal_content_are_one(bench: Open) -> None:
    b = bench()
    b.names.contents["c"] = b.names.contents["b"]
    b.score("c", 1.0, 3)
    assert set(b.picks(2 * ROUNDS)) == {"a", "c"}, "the one with more scores"
    b.score("a", 0.0, 100)
    b.score("c", 1.0, 100)
    assert b.review().leader == "c"
    b.score("b", 1.0, 150)
    assert b.review().leader == "c", "the leader stays"
    b.names.contents = dict.fromkeys("abc", "same")
    assert len(b.picks(3 * ROUNDS)) == 1


def test_evaluations_are_compared_on_the_same_examples_only(bench: Open) -> None:
    b = bench(candidates=("a", "b"), source="evaluation", min_samples=200)

    def evaluate(name: str, kind: str, right: int) -> None:
        values = {f"{kind} {i}": float(i < right) for i in range(300)}
        b.quality.record_evaluation(b.key(name), "accuracy", values)

    evaluate("a", "easy", 270)
    evaluate("b", "hard", 180)
    decision = b.review()
    assert decision.leader is None and "200 samples of the same examples" in decision.reason
    assert decision.reason.endswith("; evaluate all of them on one file")
    evaluate("a", "hard", 180)
    for _ in range(3):
        evaluate("b", "easy", 270)
    assert b.review().leader is None, "they are equal"
    evaluate("b", "hard", 240)
    assert b.review().leader == "b" and b.quality.totals(b.key("b"), "accuracy", "evaluation").count == 600


def test_scores_of_another_source_or_metric_do_not_count(bench: Open) -> None:
    b = bench()
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        b.score(name, value, 100, source="evaluation")
    assert b.review().leader is None
    for metric, leader in (("accuracy", "b"), ("loss", None)):
        route = BestRoute(("a", "b"), metric, "evaluation", min_samples=50)
        assert b.router.review(Task("t", "{input}", route), route).leader == leader
    assert b.picks(3 * ROUNDS) == dict.fromkeys("abc", ROUNDS), "the decision of another rule does not apply"


def test_the_route_of_a_loss_leads_to_the_lowest(bench: Open) -> None:
    b = bench(metric="loss", source="evaluation")
    for name, value in (("a", 0.9), ("b", 0.1), ("c", 0.5)):
        b.score(name, value, 100)
    assert b.review().leader == "b"


def test_labels_that_come_late_are_compared_in_the_hours_of_the_answers(
    bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hard questions in the morning, easy ones later, when the second of two equal candidates is added."""
    b, now = bench(candidates=("a", "b")), 1.8e9
    monkeypatch.setattr("server.tasks.quality.time.time", lambda: now + 18 * 3600)
    ids = []
    for hour, value, who in ((0, 0.0, "a"), (6, 1.0, "ab")):
        for name in who:
            for i in range(60):
                ids.append((f"{name} {hour} {i}", value))
                b.quality.record_answer(AnswerRecord(ids[-1][0], b.key(name), "", "yes", at=now + hour * 3600))
    for id, value in ids:
        b.quality.record_feedback("t", id, "", score=value, expected=None)
    decision = b.review()
    assert decision.leader is None and "a 0.500 of 120, b 1.000 of 60" in decision.reason


@pytest.mark.parametrize("period", [2, 3, 20])
def test_clients_that_alternate_prompts_favour_no_candidate(bench: Open, period: int) -> None:
    """Of two equal candidates one in `period` prompts is easy."""
    wrong = 0
    for seed in range(12):
        random.seed(seed)
        b, totals = bench(candidates=("a", "b")), dict.fromkeys("ab", Totals())
        for i in range(3000):
            name = b.router.pick(b.task, b.route)
            totals[name] = totals[name].plus(0.95 if i % period == 0 else 0.6)
            if i % 20 == 0 and by_feedback({n: {0: t} for n, t in totals.items()}, None, 50).leader:
                wrong += 1
                break
    assert wrong <= 1


def test_exploration_is_not_in_step_with_clients(bench: Open) -> None:
    b = bench(candidates=("a", "b"))
    for name, value in (("a", 0.0), ("b", 1.0)):
        b.score(name, value, 60)
    b.review()
    picks = [b.router.pick(b.task, b.route) for _ in range(EXPLORE_EVERY * 40)]
    assert len({i % EXPLORE_EVERY for i, name in enumerate(picks) if name == "a"}) > EXPLORE_EVERY // 3
    assert picks.count("a") == 40 and EXPLORE_EVERY == 20


def test_review_task_stores_the_leader_and_forget_task_deletes_it(bench: Open) -> None:
    b = bench(candidates=("a", "b"))
    for name, value in (("a", 0.0), ("b", 1.0)):
        b.score(name, value, 60)
    b.router.review_task(None)
    assert b.quality.leader("t", "accuracy by feedback") is None
    b.router.review_task(b.task)
    stored = b.quality.leader("t", "accuracy by feedback")
    assert stored is not None and stored[0] == b.key("b")
    b.router.forget_task("t")
    assert b.quality.leader("t", "accuracy by feedback") is None and not b.router._states
    assert b.picks(2 * ROUNDS) == dict.fromkeys("ab", ROUNDS)


def test_performance_is_described_while_the_database_refuses_a_new_leader(
    bench: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = bench(candidates=("a", "b"))
    for name, value in (("a", 0.0), ("b", 1.0)):
        b.score(name, value, 60)

    def full(*_: Any) -> None:
        raise StoreFailed("the database refuses: disk is full; nothing was changed")

    with monkeypatch.context() as patch:
        patch.setattr(b.quality, "set_leader", full)
        described = b.router.describe(b.task, b.route)
    assert described["leader"] is None and "disk is full" in described["reason"]
    assert b.router.describe(b.task, b.route)["leader"] == "b"
