"""The rule of `best` routes, on simulated feedback, and that a decision outlives the process."""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import UnknownAdapter
from adapters.weights import Version
from server.tasks.definitions import BestRoute, Task
from server.tasks.intervals import ALPHA, Totals, by_hours, by_pairs, interval
from server.tasks.mix_key import AnswerRecord, MixKey
from server.tasks.quality import DAY, Quality
from server.tasks.routing import EXPLORED, ROUNDS, BestRouter, _Turns, by_evaluation, by_feedback
from server.tasks.routing import decide as decide_on

MIN_SAMPLES = 200


def decide(scores: Any, min_samples: int, current: str | None, lower_is_better: bool = False) -> Any:
    """By feedback; where lower is better, by evaluations on the same examples."""
    if not lower_is_better:
        return decide_on(by_feedback(scores), min_samples, current)
    totals = {name: Totals.joined(hours.values()) for name, hours in scores.items()}

    def paired(one: str, other: str) -> Totals:
        count, half = totals[one].count, (1 + totals[one].mean - totals[other].mean) / 2
        return Totals(count, count * half, count * half * half)

    return decide_on(by_evaluation(totals, paired, lower_is_better), min_samples, current)


TURNS = np.arange(10_000) % 2
"""Who gets each of 10,000 samples while two candidates take turns."""
LED = (np.arange(10_000) % EXPLORED == 0).astype(int)
"""The same once the first one leads."""


def looked_at(
    values: np.ndarray, who: np.ndarray, leasts: tuple[int, ...] = (MIN_SAMPLES,)
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Looking after each sample, in many runs [runs, samples]: where the first decision falls (-1 is nowhere), and for
    whom; for each number of samples that is the least. The formula is written out over whole arrays; the rule itself is
    asked where it says to be decided.
    """
    sums = []
    for k in (0, 1):
        mine = values * (who == k)
        sums.append((np.cumsum(who == k), np.cumsum(mine, axis=1), np.cumsum(mine * mine, axis=1)))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = [total / count for count, total, _ in sums]
        spread = [(sq + 1) / (count + 2) - ((total + 1) / (count + 2)) ** 2 for count, total, sq in sums]
        together = (sums[0][0] * spread[0] + sums[1][0] * spread[1]) / (sums[0][0] + sums[1][0])
        spread = [np.maximum(each, together) for each in spread]
        variance = spread[0] + spread[1]
        count = variance / (spread[0] / sums[0][0] + spread[1] / sums[1][0])
        rho2 = (-2 * np.log(ALPHA) + np.log(1 - 2 * np.log(ALPHA))) / 1000
        x = count * rho2 + 1
        reach = np.sqrt(variance * x / (count**2 * rho2) * np.log(x / ALPHA**2))
        apart = means[0] - means[1]
        clear = np.abs(apart) > reach
    found = []
    for least in leasts:
        decided = clear & (np.minimum(sums[0][0], sums[1][0]) >= least)
        at = np.where(decided.any(axis=1), decided.argmax(axis=1), -1)
        for run in range(0, len(values), 10):
            for t in (at[run], at[run] - 1) if at[run] > 0 else (-1,):
                totals = [Totals(int(c[t]), float(s[run, t]), float(q[run, t])) for c, s, q in sums]
                told = decide({name: {0: total} for name, total in zip("ab", totals, strict=True)}, least, None).leader
                assert told == (None if at[run] < 0 or t < at[run] else "ab"[int(apart[run, t] < 0)])
        found.append((at, apart[np.arange(len(values)), at] > 0))
    return found


def hits(seed: int, runs: int, *shares: float, who: np.ndarray = TURNS) -> np.ndarray:
    return (np.random.default_rng(seed).random((runs, len(who))) < np.asarray(shares)[who]).astype(float)


def test_a_real_difference_is_found_and_rarely_the_wrong_way() -> None:
    """0.90 against 0.85: all runs are decided within 10,000 samples of both together, half of them by 1,400."""
    ((at, first),) = looked_at(hits(1, 500, 0.90, 0.85), TURNS)
    decided = at >= 0
    assert decided.mean() >= 0.99 and first[decided].mean() >= 0.95
    assert np.median(at[decided] + 1) < 1500


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98, 0.999])
def test_equals_are_rarely_told_apart_however_often_one_looks(share: float) -> None:
    """While they take turns (a first decision), and while one leads (a switch), over 10,000 samples."""
    leasts = (1, MIN_SAMPLES)
    for at, _ in looked_at(hits(2, 500, share, share), TURNS, leasts):
        assert (at >= 0).mean() <= 0.05
    for at, first in looked_at(hits(3, 500, share, share, who=LED), LED, leasts):
        assert ((at >= 0) & ~first).mean() <= 0.05


def test_scores_that_are_no_shares_of_hits_are_told_apart_as_rarely() -> None:
    """ROUGE-like scores, thumbs of three kinds, and scores that nearly all are alike."""
    rng = np.random.default_rng(4)
    shape = 500, len(TURNS)
    for values in (rng.beta(2, 6, shape), rng.choice([0.0, 0.5, 1.0], shape), np.maximum(rng.beta(50, 1, shape), 0.9)):
        ((at, _),) = looked_at(values, TURNS)
        assert (at >= 0).mean() <= 0.05


def test_three_equals_are_told_apart_as_rarely_as_two() -> None:
    """Looked at fifty times; the difference has to be clear to both others."""
    rng = np.random.default_rng(5)
    sums = np.cumsum(rng.random((300, 3, 3000)) < 0.9, axis=2)[:, :, 199::56]
    counts = np.arange(200, 3001, 56)
    wrong = 0
    for run in sums:
        tables = ({n: {0: Totals(int(c), float(s), float(s))} for n, s in zip("abc", run[:, i], strict=True)}
                  for i, c in enumerate(counts))  # fmt: skip
        wrong += any(decide(table, MIN_SAMPLES, None).leader for table in tables)
    assert wrong / len(sums) <= 0.05


def test_harder_questions_for_all_take_nothing_from_the_one_that_leads() -> None:
    """After the decision one in twenty goes to the other, so the sums of the one that leads are mostly of the hard
    hours: only what was seen at the same time is compared."""
    easy, hard = {"a": 0.95, "b": 0.93}, {"a": 0.75, "b": 0.73}
    scores: dict[str, dict[int, Totals]] = {"a": {}, "b": {}}
    for hour in range(200):
        for name, share in (easy if hour < 10 else hard).items():
            count = 1000 if hour < 10 or name == "a" else 50
            scores[name][hour] = Totals(count, count * share, count * share)
    totals = {name: Totals.joined(hours.values()) for name, hours in scores.items()}
    assert totals["b"].mean > totals["a"].mean + 0.05, "all together, the worse one looks better"
    assert by_hours(scores["b"], scores["a"]).least() < 0
    assert decide(scores, MIN_SAMPLES, "a").leader == "a"


def test_what_one_had_before_the_other_came_says_nothing() -> None:
    """A month of easy questions, and hard ones since the hour in which the other was published."""
    before = {hour: Totals(100, 95, 95) for hour in range(700)}
    leads = {**before, 700: Totals(1000, 700, 700)}
    equal, better = {700: Totals(1000, 700, 700)}, {700: Totals(1000, 800, 800)}
    assert decide({"a": leads, "b": equal}, MIN_SAMPLES, "a").behind == frozenset()
    assert decide({"a": leads, "b": better}, MIN_SAMPLES, "a").leader == "b"
    assert decide({"b": better, "a": leads}, MIN_SAMPLES, "a").leader == "b"
    tried = {0: Totals(1, 1, 1)}  # a month ago, before it was away
    assert decide({"a": leads, "b": {**tried, **equal}}, MIN_SAMPLES, "a").behind == frozenset()
    assert decide({"a": leads, "b": {**tried, **better}}, MIN_SAMPLES, "a").leader == "b"
    assert decide({"b": {**tried, **better}, "a": leads}, MIN_SAMPLES, "a").leader == "b"
    alone = {**{hour: Totals(100, 95, 95) for hour in range(48)}, 700: Totals(100, 30, 30)}  # back by itself
    meanwhile = {**dict.fromkeys(range(48), Totals(1, 1, 1)), **{hour: before[hour] for hour in range(48, 699)}}
    meanwhile |= {hour: Totals(20, 6, 6) for hour in (699, 701)}
    assert decide({"a": alone, "b": meanwhile}, MIN_SAMPLES, None).behind == frozenset()
    assert decide({"b": meanwhile, "a": alone}, MIN_SAMPLES, None).behind == frozenset()
    rare = [{hour: Totals(1, value, value) for hour in range(first, 9000, 40)} for first, value in ((0, 1), (13, 0))]
    assert decide(dict(zip("ab", rare, strict=True)), MIN_SAMPLES, None).leader == "a", "and is compared all the same"


def test_scores_that_are_rare_are_compared_too() -> None:
    """One an hour, in turn: hours are put together until both have a score, and nothing is lost."""
    rare: dict[str, dict[int, Totals]] = {"a": {}, "b": {}}
    for hour in range(2000):
        value = float(hour % 20 > 1) if hour % 2 else float(hour % 8 > 1)
        rare["ab"[hour % 2]][hour] = Totals(1, value, value)
    whole = {name: {0: Totals.joined(hours.values())} for name, hours in rare.items()}
    assert by_hours(rare["b"], rare["a"]).least() == pytest.approx(by_hours(whole["b"], whole["a"]).least(), abs=0.005)
    assert by_hours(whole["b"], whole["a"]).least() > 0


def test_an_interval_narrows_and_holds_the_mean() -> None:
    few, many = Totals(100, 80, 80), Totals(10_000, 8000, 8000)
    for totals in (few, many):
        low, high = interval(totals)
        assert 0 <= low < 0.8 < high <= 1
    assert np.diff(interval(many))[0] < np.diff(interval(few))[0] / 5
    assert interval(Totals()) == (0, 1) and by_hours({0: many}, {}).least() < 0


@pytest.mark.parametrize("share", [0.9, 0.98, 0.995])
def test_an_interval_holds_at_all_times_where_misses_are_rare(share: float) -> None:
    """The chance, exactly, that one of 3,000 looks finds the true share outside."""
    ever, fewest, most = 0.0, 0, 0
    chances = np.zeros(3001)  # of each number of misses, if it was inside at every look so far
    chances[0] = 1.0
    for n in range(1, 3001):
        missed = chances[:-1] * (1 - share)
        chances *= share
        chances[1:] += missed

        def holds(misses: int, n: int = n) -> bool:
            low, high = interval(Totals(n, n - misses, n - misses))
            return low <= share <= high

        while not holds(fewest):
            fewest += 1
        most = max(most, fewest)
        while most < n and holds(most + 1):
            most += 1
        ever += chances[:fewest].sum() + chances[most + 1 :].sum()
        chances[:fewest] = chances[most + 1 :] = 0.0
    assert ever <= ALPHA


def test_turned_scores_are_those_of_one_minus_each() -> None:
    turned = Totals().plus(0.2).plus(0.7).turned()
    other = Totals().plus(0.8).plus(0.3)
    assert turned.count == other.count
    assert (turned.total, turned.squares) == pytest.approx((other.total, other.squares))


def test_loss_is_better_when_lower() -> None:
    scores = {"a": {0: Totals(1000, 100, 100)}, "b": {0: Totals(1000, 900, 900)}}
    assert decide(scores, 200, None).leader == "b"
    decision = decide(scores, 200, None, lower_is_better=True)
    assert decision.leader == "a" and "a 0.100 of 1000, b 0.900 of 1000" in decision.reason


def test_a_leader_stays_until_a_rival_is_proven_better() -> None:
    close = {"a": {0: Totals(1000, 850, 850)}, "b": {0: Totals(1000, 870, 870)}}
    assert decide(close, 200, "a").leader == "a"
    assert decide({**close, "b": {0: Totals(1000, 980, 980)}}, 200, "a").leader == "b"
    assert decide({"a": close["a"]}, 200, None).leader is None and decide({}, 200, None).leader is None
    assert "taking turns" in decide({**close, "b": {0: Totals(3, 3, 3)}}, 200, None).reason


class Names:
    """A registry of names whose versions can be changed."""

    def __init__(self, *names: str) -> None:
        self.contents = dict.fromkeys(names, "1")
        self.failing: set[str] = set()

    def load_failed(self, text: str) -> bool:
        return text in self.failing

    def resolve(self, choice: Any) -> Any:
        for name, _ in choice:
            if name not in self.contents:
                raise UnknownAdapter(name)
        return [(Version(n, hashlib.sha256((n + self.contents[n]).encode()).hexdigest()), w) for n, w in choice]


ROUTE = BestRoute(("a", "b", "c"), min_samples=50)
TASK = Task("t", "{input}", ROUTE)


def score(quality: Quality, names: Names, name: str, values: list[float]) -> None:
    quality.record_evaluation(
        MixKey.of("t", names.resolve([(name, 1.0)]), "base"),
        "accuracy",
        {f"{i}": value for i, value in enumerate(values)},
    )


def thumbs(quality: Quality, names: Names, name: str, values: list[float]) -> None:
    subject = MixKey.of("t", names.resolve([(name, 1.0)]), "base")
    for i, value in enumerate(values):
        quality.record_answer(AnswerRecord(f"{subject.label} {i}", subject, "", "yes"))
        quality.record_feedback("t", f"{subject.label} {i}", "", score=value, expected=None)


def test_rounds_of_candidates_of_before_are_forgotten(tmp_path: Path) -> None:
    names, quality = Names(*"abcdefgh"), Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    for some in itertools.combinations("abcdefgh", 3):
        route = BestRoute(some, min_samples=50)
        assert router.pick(Task("t", "{input}", route), route) in some
    assert len(router._turns["t"][1]._left) == 1
    assert Counter(router.pick(TASK, ROUTE) for _ in range(3 * ROUNDS)) == dict.fromkeys("abc", ROUNDS)
    quality.close()


def test_decisions_outlive_the_process_and_end_with_the_version(tmp_path: Path) -> None:
    names, route = Names("a", "b", "c"), ROUTE
    task = Task("t", "{input}", route)
    quality = Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    assert Counter(router.pick(task, route) for _ in range(3 * ROUNDS)) == dict.fromkeys("abc", ROUNDS)
    for name, share in (("a", 0.5), ("b", 0.95), ("c", 0.6)):
        thumbs(quality, names, name, [1.0] * int(200 * share) + [0.0] * int(200 * (1 - share)))
    assert router.review(task, route).leader == "b"
    picks = [router.pick(task, route) for _ in range(EXPLORED * 3)]
    assert picks.count("b") == len(picks) - 3
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    picks = [router.pick(task, route) for _ in range(EXPLORED)]
    assert picks.count("b") == EXPLORED - 1
    names.contents["b"] = "2"
    assert {router.pick(task, route) for _ in range(3 * ROUNDS)} == {"a", "b", "c"}, "a new version starts anew"
    del names.contents["c"]
    assert {router.pick(task, route) for _ in range(4 * ROUNDS)} == {"a", "b"}, "one that is gone gets no turn"
    names.contents.clear()
    assert router.pick(task, route) in route.candidates, "who resolves it says what is missing"
    quality.close()


def evaluated(tmp_path: Path, *values: float) -> tuple[Names, BestRoute, Task, Quality, BestRouter]:
    """A task with three candidates, and what each scored in all of 200 examples."""
    names, route = Names("a", "b", "c"), BestRoute(("a", "b", "c"), source="evaluation", min_samples=50)
    task, quality = Task("t", "{input}", route), Quality(tmp_path / "quality.db")
    for name, value in zip("abc", values, strict=True):
        score(quality, names, name, [value] * 200)
    return names, route, task, quality, BestRouter(quality, names, "base")


def test_nobody_goes_around_where_nothing_would_be_learned(tmp_path: Path) -> None:
    names, route, task, quality, router = evaluated(tmp_path, 1.0, 1.0, 0.0)
    assert router.review(task, route).leader is None
    assert Counter(router.pick(task, route) for _ in range(EXPLORED * 2 * ROUNDS)) == dict.fromkeys(
        "ab", EXPLORED * ROUNDS
    )
    score(quality, names, "a", [0.5] * 200)
    assert router.review(task, route).leader == "b"
    assert {router.pick(task, route) for _ in range(EXPLORED * 3)} == {"b"}
    quality.close()


@pytest.mark.parametrize("source", ["feedback", "evaluation"])
def test_what_cannot_be_read_has_few_turns_until_it_can(tmp_path: Path, source: Any) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    route = BestRoute(("a", "b", "c"), source=source, min_samples=50)
    task, router = Task("t", "{input}", route), BestRouter(quality, names, "base")

    def picks() -> Counter[str]:
        return Counter(router.pick(task, route) for _ in range(EXPLORED * 6 * ROUNDS))

    names.failing = {"a"}
    turns = picks()
    assert turns["a"] == 6 * ROUNDS and abs(turns["b"] - turns["c"]) <= ROUNDS
    names.failing = {"a", "b", "c"}
    assert min(picks().values()) > EXPLORED * ROUNDS, "whoever is asked says why"
    names.failing = set()
    for name, value in (("a", 1.0), ("b", 0.5), ("c", 0.5)):
        (thumbs if source == "feedback" else score)(quality, names, name, [value] * 300)
    assert router.review(task, route).leader == "a"
    assert picks()["a"] >= EXPLORED * 6 * ROUNDS - 6 * ROUNDS
    names.failing = {"a"}
    turns = picks()
    assert 0 < turns["a"] <= 6 * ROUNDS and abs(turns["b"] - turns["c"]) <= ROUNDS, "the others serve, worse or not"
    assert router.review(task, route).leader == "a"
    quality.close()


def test_one_that_is_worse_than_another_has_few_turns_while_these_are_equal(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 0.0)):
        thumbs(quality, names, name, [value] * 60)
    decision = router.review(TASK, ROUTE)
    assert decision.leader is None and decision.behind == {"c"} and "c worse than another" in decision.reason
    picks = Counter(router.pick(TASK, ROUTE) for _ in range(EXPLORED * 2 * ROUNDS))
    assert picks["c"] == 2 * ROUNDS and abs(picks["a"] - picks["b"]) <= ROUNDS
    names.contents["c"] = "2"
    picks = Counter(router.pick(TASK, ROUTE) for _ in range(3 * ROUNDS))
    assert picks["c"] >= ROUNDS - 1, "a new version starts anew"
    quality.close()


def test_a_leader_that_is_worse_than_another_leads_no_more(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    for name, value in (("a", 0.5), ("b", 0.0), ("c", 0.0)):
        thumbs(quality, names, name, [value] * 300)
    assert router.review(TASK, ROUTE).leader == "a"
    for name in "bc":
        names.contents[name] = "2"
    assert router.review(TASK, ROUTE).reason.startswith("a serves until each has 50 samples")
    for name in "bc":
        thumbs(quality, names, name, [1.0] * 300)
    assert router.review(TASK, ROUTE).leader is None, "two are better, and as good as each other"
    picks = Counter(router.pick(TASK, ROUTE) for _ in range(EXPLORED * 2 * ROUNDS))
    assert picks["a"] == 2 * ROUNDS and abs(picks["b"] - picks["c"]) <= ROUNDS
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    assert quality.leader("t", "accuracy by feedback") is None, "and after a restart"
    quality.close()


def of_an_hour(share: float, count: int) -> dict[int, Totals]:
    """Scores of one hour, of 0 and of 1."""
    return {0: Totals(count, count * share, count * share)}


def test_one_that_never_has_samples_enough_holds_up_nobody_else() -> None:
    """As one that is published each hour: who is worse has few turns, and a leader that is gives way."""
    good, bad, new = of_an_hour(0.95, 600), of_an_hour(0.1, 600), of_an_hour(1.0, 3)
    turns = decide({"a": good, "b": bad, "c": new}, MIN_SAMPLES, None)
    assert turns.leader is None and turns.behind == {"b"}
    assert turns.reason.startswith(
        "taking turns until each has 200 samples, b worse than another: a 0.950 of 600, b 0.100 of 600, c 1.000 of 3"
    )
    stays = decide({"a": good, "b": bad, "c": new}, MIN_SAMPLES, "a")
    assert stays.leader == "a" and stays.behind == {"b"}
    gives_way = decide({"a": good, "b": bad, "c": new}, MIN_SAMPLES, "b")
    assert gives_way.leader == "a" and gives_way.reason.startswith("a is better by at least 0.")
    assert " at 95%, than all with 200 samples: a 0.950 of 600" in gives_way.reason
    two = decide({"a": good, "b": bad, "c": new, "d": good}, MIN_SAMPLES, "b")
    assert two.leader is None and two.behind == {"b"}, "as good as each other"
    assert decide({"a": new, "b": bad, "c": new}, MIN_SAMPLES, "b").leader == "b", "nobody to compare it with"
    few = decide({"a": good, "b": bad, "c": new}, MIN_SAMPLES, "c")
    assert few.leader == "c" and few.reason.startswith("c serves until each has 200 samples, b worse than another")


def test_one_that_was_never_evaluated_holds_up_nobody_else(tmp_path: Path) -> None:
    names, route, task, quality, router = evaluated(tmp_path, 0.5, 1.0, 0.5)
    assert router.review(task, route).leader == "b"
    names.contents["c"] = "2"
    for name, value in (("a", 1.0), ("b", 0.0)):
        score(quality, names, name, [value] * 200)
    decision = router.review(task, route)
    assert decision.leader == "a" and decision.behind == {"b"}
    assert decision.reason.startswith("a is better by at least 0.") and ", c none" in decision.reason
    assert {router.pick(task, route) for _ in range(EXPLORED * 3)} == {"a"}
    quality.close()


def test_one_that_is_published_each_hour_leaves_the_others_their_turns(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    for name, value in (("a", 1.0), ("b", 0.0)):
        thumbs(quality, names, name, [value] * 60)
    router.review(TASK, ROUTE)
    picks = Counter(router.pick(TASK, ROUTE) for _ in range(EXPLORED * 2 * ROUNDS))
    assert picks["b"] == 2 * ROUNDS and abs(picks["a"] - picks["c"]) <= ROUNDS
    quality.close()


def test_scores_that_come_at_night_are_compared_within_the_hours_of_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mornings are hard and afternoons easy. One of two equals is new at noon; all labels come at night."""
    names, quality = Names("a", "b"), Quality(tmp_path / "quality.db")
    route, dawn = BestRoute(("a", "b"), min_samples=50), time.time()
    task, router, asked = Task("t", "{input}", route), BestRouter(quality, names, "base"), []
    for hour, value, who in ((0, 0.0, "a"), (6, 1.0, "ab"), (18, None, "")):
        monkeypatch.setattr("server.tasks.quality.time.time", lambda hour=hour: dawn + hour * 3600)
        for name in who:
            for i in range(300):
                subject = MixKey.of("t", names.resolve([(name, 1.0)]), "base")
                quality.record_answer(AnswerRecord(f"{name} {hour} {i}", subject, "", "yes", at=time.time()))
                asked.append((f"{name} {hour} {i}", value))
    for id, value in asked:
        quality.record_feedback("t", id, "", score=value, expected=None)
    decision = router.review(task, route)
    assert decision.leader is None and "a 0.500 of 600, b 1.000 of 300" in decision.reason
    quality.close()


@pytest.mark.parametrize("source", ["feedback", "evaluation"])
def test_a_leader_that_is_published_under_a_second_name_leads_on(tmp_path: Path, source: Any) -> None:
    names, route = Names("a", "b", "c"), BestRoute(("a", "b", "c"), source=source, min_samples=50)
    task, quality = Task("t", "{input}", route), Quality(tmp_path / "quality.db")
    router, judge = BestRouter(quality, names, "base"), thumbs if source == "feedback" else score
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.5)):
        judge(quality, names, name, [value] * 200)
    assert router.review(task, route).leader == "b"
    resolve = names.resolve
    contents = {"a": resolve([("b", 1.0)])[0][0].digest}
    names.resolve = lambda choice: [(Version(v.name, contents.get(v.name, v.digest)), w) for v, w in resolve(choice)]  # type: ignore[method-assign]
    assert router.review(task, route).leader == "b"
    assert Counter(router.pick(task, route) for _ in range(EXPLORED))["b"] >= EXPLORED - 1
    quality.close()


def test_pairs_are_asked_of_the_file_once_until_they_change(tmp_path: Path) -> None:
    names, route = Names("a", "b", "c"), BestRoute(("a", "b", "c"), source="evaluation", min_samples=50)
    task, quality = Task("t", "{input}", route), Quality(tmp_path / "quality.db")
    router, asked = BestRouter(quality, names, "base"), []
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.5)):
        score(quality, names, name, [value] * 100)
    quality._db.set_trace_callback(lambda text: asked.append(text) if "JOIN examples" in text else None)
    for _ in range(3):
        assert router.review(task, route).leader == "b"
    assert len(asked) == 3
    score(quality, names, "c", [1.0] * 150)
    assert router.review(task, route).reason.startswith("no candidate is proven better yet, a worse than another")
    assert len(asked) == 5, "of the two pairs that it is one of"
    quality.close()


def test_evaluations_are_compared_on_the_same_examples(tmp_path: Path) -> None:
    """Easy ones of one candidate and hard ones of another say nothing, and scored again they say no more."""
    names, route = Names("a", "b"), BestRoute(("a", "b"), source="evaluation", min_samples=200)
    task, quality = Task("t", "{input}", route), Quality(tmp_path / "quality.db")
    router, subject = BestRouter(quality, names, "base"), {
        name: MixKey.of("t", names.resolve([(name, 1.0)]), "base") for name in "ab"}  # fmt: skip

    def asked(name: str, kind: str, right: int) -> None:
        quality.record_evaluation(subject[name], "accuracy", {f"{kind} {i}": float(i < right) for i in range(300)})

    asked("a", "easy", 270)
    asked("b", "hard", 180)
    decision = router.review(task, route)
    assert decision.leader is None and "200 samples of the same examples" in decision.reason
    asked("a", "hard", 180)
    asked("b", "easy", 270)
    for _ in range(3):
        asked("a", "easy", 270)
    assert router.review(task, route).leader is None, "they are equal"
    asked("b", "hard", 240)
    assert router.review(task, route).leader == "b"
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    assert quality.paired(subject["b"], subject["a"], "accuracy") == Totals(600, 330.0, 195.0)
    quality._sweep(time.time() + 200 * DAY)
    assert quality.paired(subject["b"], subject["a"], "accuracy") == Totals()
    quality.close()


def test_pairs_of_equals_are_rarely_told_apart_however_often_one_looks() -> None:
    """Both are right as often, on the same examples or not: looked at after each of 3,000."""
    rng, wrong = np.random.default_rng(6), 0
    for _ in range(300):
        easy = rng.random(3000) < 0.7
        halves = (1 + np.where(easy, 0.0, rng.integers(0, 2, 3000) - rng.integers(0, 2, 3000))) / 2
        sums, squares = np.cumsum(halves), np.cumsum(halves * halves)
        for n in range(50, 3000, 25):
            paired = Totals(n, float(sums[n - 1]), float(squares[n - 1]))
            apart = by_pairs(paired)
            assert apart.turned().least() == pytest.approx(by_pairs(paired.turned()).least())
            if apart.least() > 0 or apart.turned().least() > 0:
                wrong += 1
                break
    assert wrong <= 15


def test_scores_again_do_not_move_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two equals, easy questions in one hour and hard ones in the next: one's are judged again later."""
    names, quality = Names("a", "b"), Quality(tmp_path / "quality.db")
    route, now = BestRoute(("a", "b"), min_samples=50), time.time()
    task, router = Task("t", "{input}", route), BestRouter(quality, names, "base")
    for hour, value in ((0, 1.0), (1, 0.5), (2, 1.0)):
        monkeypatch.setattr("server.tasks.quality.time.time", lambda hour=hour: now + hour * 3600)
        for name in "ab" if hour < 2 else "b":
            subject = MixKey.of("t", names.resolve([(name, 1.0)]), "base")
            for i in range(300):
                id = f"{name} {value} {i}"
                quality.record_answer(AnswerRecord(id, subject, "", "yes"))
                quality.record_feedback("t", id, "", score=value - 0.5 * (i % 2), expected=None)
    decision = router.review(task, route)
    assert decision.leader is None and "a 0.500 of 600, b 0.500 of 600" in decision.reason
    quality.close()


def test_feedback_does_not_count_where_evaluation_is_asked_for(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        score(quality, names, name, [value] * 500)
    assert BestRouter(quality, names, "base").review(TASK, ROUTE).leader is None, "the route asks for feedback"
    quality.close()


def test_a_new_version_of_a_rival_is_tried_most_while_the_leader_serves(tmp_path: Path) -> None:
    names, route = Names("a", "b", "c"), ROUTE
    task, quality = Task("t", "{input}", route), Quality(tmp_path / "quality.db")
    for name, share in (("a", 0.5), ("b", 0.85), ("c", 0.5)):
        thumbs(quality, names, name, [1.0] * int(200 * share) + [0.0] * int(200 * (1 - share)))
    router = BestRouter(quality, names, "base")
    assert router.review(task, route).leader == "b"
    assert {router.pick(task, route) for _ in range(EXPLORED * 2 * ROUNDS)} == {"a", "b", "c"}
    names.contents["c"] = "2"
    picks = Counter(router.pick(task, route) for _ in range(EXPLORED * 400))
    assert picks["a"] + picks["c"] == 400 and 240 < picks["c"] < 360, "half of these, and its turn of the other half"
    thumbs(quality, names, "c", [1.0] * 300)
    assert router.review(task, route).leader == "c", "and takes over once it is proven"
    quality.close()


def test_a_version_under_two_names_is_one_candidate(tmp_path: Path) -> None:
    """None is better than itself, so that nobody could lead."""
    names, quality = Names("a", "b"), Quality(tmp_path / "quality.db")
    names.contents["a@1"] = "1"
    names.resolve = lambda choice, known=names.resolve: known([(name.partition("@")[0], w) for name, w in choice])  # type: ignore[method-assign]
    route = BestRoute(("a", "a@1", "b"), source="evaluation", min_samples=50)
    task, router = Task("t", "{input}", route), BestRouter(quality, names, "base")
    assert Counter(router.pick(task, route) for _ in range(2 * ROUNDS)) == {"a": ROUNDS, "b": ROUNDS}
    for name, value in (("a", 1.0), ("b", 0.0)):
        score(quality, names, name, [value] * 100)
    assert router.review(task, route).leader == "a"
    names.resolve = lambda choice: [(Version(name, "f" * 64), w) for name, w in choice]  # type: ignore[method-assign]
    assert {router.pick(task, route) for _ in range(3 * ROUNDS)} == {"a"}, "one content, published three times"
    quality.close()


def judged(tmp_path: Path) -> tuple[Names, BestRoute, Task, Quality, BestRouter]:
    """A task with two candidates, of whose 100 answers each b was right in all and a in none."""
    names, route = Names("a", "b"), BestRoute(("a", "b"), min_samples=50)
    task, quality = Task("t", "{input}", route), Quality(tmp_path / "quality.db")
    for name, value in (("a", 0.0), ("b", 1.0)):
        thumbs(quality, names, name, [value] * 100)
    router = BestRouter(quality, names, "base")
    return names, route, task, quality, router


def test_a_decision_keeps_its_reason_until_it_is_forgotten_with_the_turns(tmp_path: Path) -> None:
    names, route, task, quality, router = judged(tmp_path)
    decided = router.review(task, route).reason
    thumbs(quality, names, "b", [1.0] * 200)
    told = router.describe(task, route)
    assert (told["leader"], told["decided"]) == ("b", decided) and "b 1.000 of 200" in told["reason"]
    assert Counter(router.pick(task, route) for _ in range(2 * EXPLORED)) == {"a": 2, "b": 2 * EXPLORED - 2}
    router.forget_task("t")
    assert Counter(router.pick(task, route) for _ in range(2 * ROUNDS)) == {"a": ROUNDS, "b": ROUNDS}
    quality.close()


def test_who_leads_is_told_while_the_disk_refuses_a_new_leader(tmp_path: Path) -> None:
    names, route, task, quality, router = judged(tmp_path)
    quality._db.execute("PRAGMA query_only = 1")
    told = router.describe(task, route)
    assert told["leader"] is None and "cannot be written" in told["reason"]
    quality._db.execute("PRAGMA query_only = 0")
    assert router.describe(task, route)["leader"] == "b"
    quality.close()


def test_a_decision_is_for_the_metric_and_source_that_made_it(tmp_path: Path) -> None:
    names, quality = Names("a", "b"), Quality(tmp_path / "quality.db")
    by_evaluation = BestRoute(("a", "b"), source="evaluation", min_samples=50)
    task = Task("t", "{input}", by_evaluation)
    for name, value in (("a", 0.0), ("b", 1.0)):
        score(quality, names, name, [value] * 100)
    router = BestRouter(quality, names, "base")
    assert router.review(task, by_evaluation).leader == "b"
    by_feedback = BestRoute(("a", "b"), min_samples=50)
    picks = Counter(router.pick(task, by_feedback) for _ in range(2 * ROUNDS))
    assert picks == {"a": ROUNDS, "b": ROUNDS}, "nothing is known of thumbs"
    assert router.describe(task, by_feedback)["leader"] is None
    router.forget_task("t")
    picks = Counter(router.pick(task, by_evaluation) for _ in range(2 * ROUNDS))
    assert picks == {"a": ROUNDS, "b": ROUNDS}, "the task is gone, and its leader"
    quality.close()


def test_the_same_examples_twice_prove_nothing_more(tmp_path: Path) -> None:
    quality, subject = Quality(tmp_path / "quality.db"), MixKey.of("t", [], "base")
    values = {f"{i}": float(i % 3 > 0) for i in range(60)}
    for _ in range(5):
        quality.record_evaluation(subject, "accuracy", values)
    quality.record_evaluation(subject, "exact_match", values)
    totals = quality.totals(subject, "accuracy", "evaluation")
    assert (totals.count, totals.total) == (60, 40.0)
    quality.record_evaluation(subject, "accuracy", {"0": 1.0, "new": 1.0})
    quality.close()
    again = Quality(tmp_path / "quality.db")
    assert again.totals(subject, "accuracy", "evaluation") == Totals(61, 42.0, 42.0)
    assert Totals.joined(again.hours(subject, "accuracy", "evaluation").values()) == Totals(61, 42.0, 42.0)
    again.close()


def served_in_step(tmp_path: Path, period: int, seed: int) -> str | None:
    """Who is taken for the better one of two equals, of which one prompt in `period` is easy, within 3,000 requests."""
    random.seed(seed)
    names, route = Names("a", "b"), BestRoute(("a", "b"), min_samples=50)
    task, quality = Task("t", "{input}", route), Quality(tmp_path / f"{period}-{seed}.db")
    router, totals = BestRouter(quality, names, "base"), dict.fromkeys("ab", Totals())
    leader = None
    for i in range(3000):
        name = router.pick(task, route)
        totals[name] = totals[name].plus(0.95 if i % period == 0 else 0.6)
        if i % 20 == 0 and leader is None:
            leader = decide({n: {0: t} for n, t in totals.items()}, 50, None).leader
    quality.close()
    return leader


@pytest.mark.parametrize("period", [2, 3, 20])
def test_clients_that_keep_step_with_the_turns_make_nobody_better(tmp_path: Path, period: int) -> None:
    assert sum(served_in_step(tmp_path, period, seed) is not None for seed in range(12)) <= 1


def test_which_request_goes_around_is_in_no_step_with_clients(tmp_path: Path) -> None:
    names, route, task, quality, router = judged(tmp_path)
    router.review(task, route)
    places = {i % EXPLORED for i in range(EXPLORED * 40) if router.pick(task, route) == "a"}
    assert len(places) > EXPLORED // 3
    quality.close()


def test_one_request_in_twenty_goes_around() -> None:
    assert EXPLORED == 20


def test_each_more_candidate_has_to_be_beaten_more_clearly() -> None:
    """With three the leader is compared twice, and may be wrong either time."""
    scores = {"a": {0: Totals(400, 340.0, 340.0)}, "b": {0: Totals(400, 0.0, 0.0)}}
    near = two(scores, next(n for n in range(340, 0, -1) if decide(two(scores, n), 1, None).leader == "a"))
    assert decide({**near, "c": near["b"]}, 1, None).leader is None
    clear = two(scores, 200)
    assert decide({**clear, "c": clear["b"]}, 1, None).leader == "a"


def two(scores: dict[str, Any], right: int) -> dict[str, Any]:
    """The same with so many right answers of `b`."""
    return {**scores, "b": {0: Totals(400, float(right), float(right))}}


class Contents(Names):
    """Names of which several may have one content."""

    def resolve(self, choice: Any) -> Any:
        return [(Version(n, hashlib.sha256(self.contents[n].encode()).hexdigest()), w) for n, w in choice]


def test_of_one_content_the_leader_or_who_is_known_most_stands_for_it(tmp_path: Path) -> None:
    names, quality = Contents("a", "b", "c"), Quality(tmp_path / "quality.db")
    names.contents["a"] = "another"
    router = BestRouter(quality, names, "base")
    names.contents["c"] = names.contents["b"]
    thumbs(quality, names, "c", [1.0] * 3)
    assert set(router._subjects(TASK, ROUTE)) == {"a", "c"}, "of which more is known"
    thumbs(quality, names, "a", [0.0] * 300)
    thumbs(quality, names, "c", [1.0] * 300)
    assert router.review(TASK, ROUTE).leader == "c"
    thumbs(quality, names, "b", [1.0] * 400)
    assert router.review(TASK, ROUTE).leader == "c", "it leads still"
    assert router.describe(TASK, ROUTE)["leader"] == "c"
    quality.close()


def test_where_nobody_leads_nothing_is_told_as_decided(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    for name, value in (("a", 1.0), ("b", 0.0), ("c", 0.0)):
        thumbs(quality, names, name, [value] * 300)
    assert router.describe(TASK, ROUTE)["decided"]
    names.contents["a"] = "another version"
    told = router.describe(TASK, ROUTE)
    assert told["leader"] is told["version"] is told["decided"] is None
    quality.close()


def test_hours_are_gone_through_in_their_order() -> None:
    one, other = {8: Totals(4, 4.0, 4.0), 1: Totals(9, 2.0, 2.0)}, {1: Totals(3, 1.0, 1.0), 9: Totals(5, 2.0, 2.0)}
    later = ({at + 7: t for at, t in some.items()} for some in (one, other))
    assert by_hours(*later) == by_hours(one, other)
    assert by_hours(one, other).mean == pytest.approx(by_hours(dict(sorted(one.items())), other).mean)


@pytest.mark.parametrize("more", [0, 1])
def test_a_leader_is_proven_at_the_share_of_alpha_of_its_rivals(more: int) -> None:
    """All of it against one, and half of it against each of two."""
    a = {0: Totals(400, 340.0, 340.0)}
    found = []
    for right in range(340):
        b = {0: Totals(400, float(right), float(right))}
        proven = by_hours(a, b).least(ALPHA / (1 + more)) > 0
        found.append(proven)
        assert (decide({"a": a, "b": b, **dict.fromkeys("c" * more, b)}, 1, None).leader == "a") is proven
    assert {True, False} == set(found)


def test_as_many_samples_as_are_asked_for_are_enough() -> None:
    good, bad = of_an_hour(1.0, MIN_SAMPLES), of_an_hour(0.0, MIN_SAMPLES)
    assert decide({"a": good, "b": bad}, MIN_SAMPLES, None).leader == "a"
    assert decide({"a": good, "b": of_an_hour(0.0, MIN_SAMPLES - 1)}, MIN_SAMPLES, None).leader is None


def test_who_leads_goes_on_to_where_all_others_are_gone() -> None:
    assert decide({"a": of_an_hour(1.0, 300)}, MIN_SAMPLES, "a").leader == "a"


def test_rounds_among_some_go_on_after_those_among_others() -> None:
    turns = _Turns()
    for _ in range(20):
        names = [turns.next("ab") for _ in range(3)]
        others = [turns.next("cd") for _ in range(2 * ROUNDS)]
        names += [turns.next("ab") for _ in range(2 * ROUNDS - 3)]
        assert Counter(names) == dict.fromkeys("ab", ROUNDS) and Counter(others) == dict.fromkeys("cd", ROUNDS)


def test_rivals_with_as_many_samples_as_are_asked_for_have_as_many_turns(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    for name, value, samples in (("a", 0.0, 50), ("b", 1.0, 60), ("c", 0.0, 60)):
        thumbs(quality, names, name, [value] * samples)
    assert router.review(TASK, ROUTE).leader == "b"
    picks = Counter(router.pick(TASK, ROUTE) for _ in range(EXPLORED * 2 * ROUNDS))
    assert picks["a"] == picks["c"] == ROUNDS
    quality.close()


def test_a_route_by_loss_leads_to_the_least(tmp_path: Path) -> None:
    names, quality = Names("a", "b"), Quality(tmp_path / "quality.db")
    route = BestRoute(("a", "b"), metric="loss", source="evaluation", min_samples=50)
    for name, value in (("a", 0.9), ("b", 0.1)):
        subject = MixKey.of("t", names.resolve([(name, 1.0)]), "base")
        quality.record_evaluation(subject, "loss", {f"{i}": value for i in range(100)})
    assert BestRouter(quality, names, "base").review(Task("t", "{input}", route), route).leader == "b"
    quality.close()


def test_of_a_task_that_is_gone_nothing_is_kept(tmp_path: Path) -> None:
    _, route, task, quality, router = judged(tmp_path)
    router.pick(task, route)
    router.review(task, route)
    router.forget_task("t")
    assert not router._turns and not router._leaders and not router._behind
    quality.close()


def test_a_decision_by_one_metric_says_nothing_of_another(tmp_path: Path) -> None:
    names, quality = Names("a", "b"), Quality(tmp_path / "quality.db")
    by_accuracy = BestRoute(("a", "b"), source="evaluation", min_samples=50)
    by_loss = BestRoute(("a", "b"), metric="loss", source="evaluation", min_samples=50)
    for name, value in (("a", 0.0), ("b", 1.0)):
        score(quality, names, name, [value] * 100)
    router = BestRouter(quality, names, "base")
    assert router.review(Task("t", "{input}", by_accuracy), by_accuracy).leader == "b"
    assert router.review(Task("t", "{input}", by_loss), by_loss).leader is None
    quality.close()


def test_who_shares_examples_with_one_of_two_has_to_share_them_with_both(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    route = BestRoute(("a", "b", "c"), source="evaluation", min_samples=50)
    task, router = Task("t", "{input}", route), BestRouter(quality, names, "base")

    def asked(name: str, kind: str, value: float) -> None:
        subject = MixKey.of("t", names.resolve([(name, 1.0)]), "base")
        quality.record_evaluation(subject, "accuracy", {f"{kind} {i}": value for i in range(100)})

    for name, kind, value in (("a", "x", 1.0), ("a", "y", 1.0), ("b", "x", 0.0), ("c", "y", 0.0)):
        asked(name, kind, value)
    decision = router.review(task, route)
    assert decision.leader is None and decision.reason.endswith("; have all of them evaluated on one file")
    asked("c", "x", 0.0)
    decision = router.review(task, route)
    assert decision.leader == "a" and "one file" not in decision.reason
    quality.close()


def test_who_looks_at_a_task_has_its_leader_written_down(tmp_path: Path) -> None:
    names, route, task, quality, router = judged(tmp_path)
    router.review_task(None)
    assert quality.leader("t", "accuracy by feedback") is None
    router.review_task(task)
    leader = MixKey.of("t", names.resolve([("b", 1.0)]), "base")
    known = quality.leader("t", "accuracy by feedback")
    assert known is not None and known[0] == leader
    assert router.describe(task, route)["version"] == leader.label
    quality.close()


def test_a_mean_is_a_share_whatever_was_rounded() -> None:
    assert Totals(3, 3.0000000000000004, 3.0).mean == 1.0 and Totals(2, -1e-17, 0.0).mean == 0.0


def test_an_interval_is_of_shares() -> None:
    assert interval(Totals(5, 0.0, 0.0))[0] == 0.0 and interval(Totals(5, 5.0, 5.0))[1] == 1.0
    assert interval(Totals(2000, 0.0, 0.0))[1] < 0.1


def test_of_scores_that_were_all_taken_out_nothing_is_left() -> None:
    totals = Totals()
    for times in (1, -1):
        for value in (0.1, 0.7, 0.3):
            totals = totals.plus(value, times)
    assert totals == Totals()


def test_pairs_are_apart_by_the_difference_of_their_means() -> None:
    paired = Totals()
    for first, second in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (1.0, 0.0)):
        paired = paired.plus((1 + first - second) / 2)
    apart = by_pairs(paired)
    assert (apart.mean, apart.count) == (0.25, 4)
    assert by_pairs(Totals(1, 1.0, 1.0)).mean == 1.0 and by_pairs(Totals()).least() < -1


def test_hours_weigh_as_much_as_they_tell() -> None:
    one, other = {0: Totals(10, 8.0, 8.0), 1: Totals(40, 20.0, 20.0)}, {0: Totals(30, 9.0, 9.0), 1: Totals(5, 4.0, 4.0)}
    mine, theirs = Totals(50, 28.0, 28.0), Totals(35, 13.0, 13.0)
    together = (50 * mine.variance + 35 * theirs.variance) / 85
    first, second = max(mine.variance, together), max(theirs.variance, together)
    assert mine.variance != theirs.variance
    weights = [1 / (first / 10 + second / 30), 1 / (first / 40 + second / 5)]
    apart = by_hours(one, other)
    assert apart.mean == pytest.approx((weights[0] * (0.8 - 0.3) + weights[1] * (0.5 - 0.8)) / sum(weights))
    assert apart.variance == pytest.approx(first + second)
    assert apart.count == pytest.approx(sum(weights) * (first + second))
