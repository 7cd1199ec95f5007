"""What an evaluation job tells of its candidates."""

from __future__ import annotations

from server.jobs.evaluating import told
from server.tasks import scores
from server.tasks.evaluation import Evaluation, Score

LONG = "the cat sat on the mat and looked at the moon with joy"


def found(metric: str, answers: list[str], references: list[str]) -> Evaluation:
    """As it comes of these answers."""
    corpus = scores.CORPUS[metric]
    counts = [corpus.count(a, r) for a, r in zip(answers, references, strict=True)]
    values, parts = tuple(map(corpus.single, counts)), scores.parts(corpus.score, counts)
    score = Score(metric, corpus.score(scores.sums(counts)), values, parts)
    return Evaluation({metric: score}, tuple(answers), (), 3, 4, 0.5)


def test_the_best_by_score_is_the_best_by_difference() -> None:
    """Although the other has more of the single answers right."""
    references = ["no"] * 9 + [LONG]
    for metric in scores.CORPUS:
        many = found(metric, ["no"] * 9 + ["yes " * 12], references)
        long = found(metric, ["yes"] * 9 + [LONG], references)
        result = told([many, long], metric)
        first, second = result["candidates"]
        assert result["best"] == 1 and second["difference_to_best"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        apart = first["difference_to_best"]
        assert apart["mean"] == first["score"] - second["score"] < -1
        assert apart["low"] < apart["mean"] < apart["high"]
