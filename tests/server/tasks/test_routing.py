"""The rule of `best` routes, on simulated feedback, and that a decision outlives the process."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters.errors import UnknownAdapter
from adapters.weights import Version
from server.tasks.definitions import Best, Task
from server.tasks.intervals import Totals, interval, lead
from server.tasks.quality import Quality, Subject
from server.tasks.routing import EXPLORED, BestRouter, decide


def simulate(first: float, second: float, samples: int, seed: int) -> tuple[str | None, int]:
    """Who is decided for, and after how many samples of each, looking after every tenth."""
    rng = np.random.default_rng(seed)
    a, b = (np.cumsum(rng.random(samples) < p) for p in (first, second))
    for n in range(200, samples + 1, 10):
        hits = {"a": float(a[n - 1]), "b": float(b[n - 1])}
        decision = decide({name: Totals(n, hit, hit) for name, hit in hits.items()}, 200, None)
        if decision.leader is not None:
            return decision.leader, n
    return None, samples


def test_a_real_difference_is_found_and_rarely_the_wrong_way() -> None:
    runs = [simulate(0.90, 0.85, 10_000, seed) for seed in range(500)]
    decided = [leader for leader, _ in runs if leader is not None]
    assert len(decided) >= 495 and decided.count("a") / len(decided) >= 0.95
    assert np.median([n for _, n in runs]) < 1500


@pytest.mark.parametrize("p", [0.5, 0.9, 0.98])
def test_equals_are_rarely_told_apart_however_often_one_looks(p: float) -> None:
    runs = [simulate(p, p, 5000, seed) for seed in range(300)]
    assert sum(leader is not None for leader, _ in runs) / len(runs) <= 0.05


def test_an_interval_narrows_and_holds_the_mean() -> None:
    few, many = Totals(100, 80, 80), Totals(10_000, 8000, 8000)
    for totals in (few, many):
        low, high = interval(totals)
        assert 0 <= low < 0.8 < high <= 1
    assert np.diff(interval(many))[0] < np.diff(interval(few))[0] / 5
    assert interval(Totals()) == (0, 1) and lead(many, Totals()) < 0


def test_loss_is_better_when_lower() -> None:
    scores = {"a": Totals(1000, 100, 100), "b": Totals(1000, 900, 900)}
    assert decide(scores, 200, None).leader == "b"
    assert decide(scores, 200, None, lower_is_better=True).leader == "a"


def test_a_leader_stays_until_a_rival_is_proven_better() -> None:
    close = {"a": Totals(1000, 850, 850), "b": Totals(1000, 870, 870)}
    assert decide(close, 200, "a").leader == "a"
    assert decide({**close, "b": Totals(1000, 980, 980)}, 200, "a").leader == "b"
    assert "taking turns" in decide({**close, "b": Totals(3, 3, 3)}, 200, None).reason


class Names:
    """A registry of names whose versions can be changed."""

    def __init__(self, *names: str) -> None:
        self.contents = dict.fromkeys(names, "1")

    def resolve(self, choice: Any) -> Any:
        for name, _ in choice:
            if name not in self.contents:
                raise UnknownAdapter(name)
        return [(Version(n, hashlib.sha256((n + self.contents[n]).encode()).hexdigest()), w) for n, w in choice]


ROUTE = Best(("a", "b", "c"), min_samples=50)
TASK = Task("t", "{input}", ROUTE)


def score(quality: Quality, names: Names, name: str, values: list[float]) -> None:
    quality.evaluated(Subject.of("t", names.resolve([(name, 1.0)]), "base"), "accuracy", values)


def test_decisions_outlive_the_process_and_end_with_the_version(tmp_path: Path) -> None:
    names, route = Names("a", "b", "c"), Best(("a", "b", "c"), source="evaluation", min_samples=50)
    task = Task("t", "{input}", route)
    quality = Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    assert [router.pick(task, route) for _ in range(6)] == ["a", "b", "c"] * 2
    for name, share in (("a", 0.5), ("b", 0.95), ("c", 0.6)):
        score(quality, names, name, [1.0] * int(200 * share) + [0.0] * int(200 * (1 - share)))
    assert router.review(task, route).leader == "b"
    picks = [router.pick(task, route) for _ in range(EXPLORED * 3)]
    assert picks.count("b") >= len(picks) - 3
    quality.close()
    quality = Quality(tmp_path / "quality.db")
    router = BestRouter(quality, names, "base")
    picks = [router.pick(task, route) for _ in range(EXPLORED)]
    assert picks.count("b") >= EXPLORED - 1
    names.contents["b"] = "2"
    assert BestRouter(quality, names, "base").pick(task, route) == "a"
    assert sorted({router.pick(task, route) for _ in range(9)}) == ["a", "b", "c"], "a new version starts anew"
    del names.contents["c"]
    assert {router.pick(task, route) for _ in range(9)} == {"a", "b"}, "one that is gone gets no turn"
    quality.close()


def test_feedback_does_not_count_where_evaluation_is_asked_for(tmp_path: Path) -> None:
    names, quality = Names("a", "b", "c"), Quality(tmp_path / "quality.db")
    for name, value in (("a", 0.0), ("b", 1.0), ("c", 0.0)):
        score(quality, names, name, [value] * 500)
    assert BestRouter(quality, names, "base").review(TASK, ROUTE).leader is None, "the route asks for feedback"
    quality.close()
