"""Scores of answers: known values, the public functions of sacrebleu and rouge-score, and the jackknife."""

from __future__ import annotations

import random
from statistics import stdev

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from server.tasks import scores

TEXTS = st.lists(
    st.sampled_from(["a", "The", "cat.", "3.5", "&amp;", "don't", "é", "我们", "\n", "-"]), max_size=12
).map(" ".join)


def corpus_score(metric: str, answers: list[str], references: list[str]) -> float:
    corpus = scores.CORPUS[metric]
    return corpus.score(scores.column_sums(map(corpus.statistics, answers, references)))


def test_accuracy_and_exact_match() -> None:
    answers, references = [" Yes", " no", "maybe"], ["yes", "no", "No"]
    assert list(map(scores.accuracy, answers, references)) == [1.0, 1.0, 0.0]
    assert list(map(scores.exact_match, answers, references)) == [0.0, 1.0, 0.0]


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_corpus_scores_are_those_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    answers, references = map(list, zip(*pairs, strict=True))
    assert corpus_score("bleu", answers, references) == pytest.approx(
        sacrebleu.corpus_bleu(answers, [references], force=True).score
    )
    assert corpus_score("chrf", answers, references) == pytest.approx(
        sacrebleu.corpus_chrf(answers, [references]).score
    )
    for answer, reference in pairs:
        for metric, expected in (("bleu", sacrebleu.sentence_bleu), ("chrf", sacrebleu.sentence_chrf)):
            corpus = scores.CORPUS[metric]
            single = corpus.single(corpus.statistics(answer, reference))
            assert single == pytest.approx(expected(answer, [reference]).score / 100)


@pytest.mark.parametrize(
    ("metric", "answer", "reference", "score"),
    [
        # 6 tokens of 7, brevity exp(1 - 7/6); n-gram hits 5/6, 3/5, 1/4, and 1/(2*3) smoothed.
        (
            "bleu",
            "the cat sat on mat today",
            "the cat sat on the mat .",
            100 * ((5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)) ** 0.25 * 2.718281828 ** (1 - 7 / 6),
        ),
        ("bleu", "a b x c", "a b c d", 100 * ((3 / 4) * (1 / 3) * (1 / (2 * 2)) * (1 / (4 * 1))) ** 0.25),
        # "ab" against "abc": precision 1, recall (2/3 + 1/2) / 2.
        ("chrf", "a b", "abc", 100 * 5 * (7 / 12) / (4 + 7 / 12)),
        ("chrf", "", "", 0.0),
        ("bleu", "", "x", 0.0),
    ],
)
def test_bleu_and_chrf_have_known_values(metric: str, answer: str, reference: str, score: float) -> None:
    assert corpus_score(metric, [answer], [reference]) == pytest.approx(score, rel=1e-6)


@given(TEXTS, TEXTS)
@settings(max_examples=60, deadline=None)
def test_rouge_l_is_that_of_rouge_score(answer: str, reference: str) -> None:
    expected = rouge_scorer.RougeScorer(["rougeL"]).score(reference, answer)["rougeL"].fmeasure
    assert scores.rouge_l(answer, reference) == pytest.approx(expected)


def test_rouge_l_of_long_texts_is_fast() -> None:
    dice = random.Random(0)
    answer, reference = (" ".join(f"w{dice.randrange(50)}" for _ in range(20_000)) for _ in range(2))
    assert 0.2 < scores.rouge_l(answer, reference) < 0.5


def test_the_influences_on_a_mean_are_distances_from_it() -> None:
    statistics = [(0.25, 1), (0.5, 1), (0.0, 1)]
    assert scores.jackknife(lambda sums: sums[0] / sums[1], statistics) == pytest.approx((0.0, 0.25, -0.25))
    assert scores.jackknife(lambda sums: sums[0] / sums[1], statistics[:1]) == (0.0,)


def test_a_long_answer_has_more_influence_on_a_corpus_than_short_ones() -> None:
    long = "the cat sat on the mat and looked at the moon with joy"
    references = ["no"] * 3 + [long]
    first, second = ["no"] * 3 + ["yes " * 12], ["yes"] * 3 + [long]
    for metric, corpus in scores.CORPUS.items():
        ours, theirs = ([*map(corpus.statistics, answers, references)] for answers in (first, second))
        assert sum(map(corpus.single, ours)) > sum(map(corpus.single, theirs)), "by the mean of sentence scores"
        assert corpus_score(metric, first, references) < corpus_score(metric, second, references)
        influences = scores.jackknife(corpus.score, theirs)
        assert influences[3] == max(influences) > 50


@pytest.mark.parametrize("metric", list(scores.CORPUS))
def test_the_jackknife_agrees_with_the_bootstrap(metric: str) -> None:
    dice, words = random.Random(5), [f"w{i}" for i in range(40)]
    references = [[dice.choice(words) for _ in range(dice.randint(4, 30))] for _ in range(150)]
    statistics = []
    for reference in references:
        kept = dice.random()
        answer = [word if dice.random() < kept else dice.choice(words) for word in reference]
        statistics.append(scores.CORPUS[metric].statistics(" ".join(answer), " ".join(reference)))
    score = scores.CORPUS[metric].score
    resampled = np.random.default_rng(5).multinomial(150, [1 / 150] * 150, 500) @ np.array(statistics)
    error = stdev(scores.jackknife(score, statistics)) / 150**0.5
    assert error == pytest.approx(stdev(score([*map(float, row)]) for row in resampled), rel=0.1)


@pytest.mark.parametrize(
    ("metric", "zero", "enough"),
    [
        ("bleu", ["yes", "no", "not at all", "他今天去了图书馆看书"], "yes, it is"),
        ("rougeL", ["我们去吃饭吧。", "да", "!?"], "да, 3"),
    ],
)
def test_metrics_that_are_0_for_the_references_themselves_are_found(metric: str, zero: list[str], enough: str) -> None:
    why = scores.always_zero(metric, zero)
    assert why is not None and why.startswith(metric) and scores.always_zero(metric, [*zero, enough]) is None
    assert all(scores.always_zero(other, zero) is None for other in ("accuracy", "exact_match", "chrf", "loss"))
    found = corpus_score("bleu", zero, zero) if metric == "bleu" else sum(map(scores.rouge_l, zero, zero))
    assert found == 0.0
