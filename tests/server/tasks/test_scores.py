"""Scores of answers, on values worked out by hand and on what a score must be."""

from __future__ import annotations

import random
from statistics import stdev

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.tasks import scores


def corpus_score(metric, answers, references):
    corpus = scores.CORPUS[metric]
    return corpus.score(scores.sums(map(corpus.count, answers, references)))


def test_accuracy_and_exact_match():
    answers, references = [" Yes", " no", "maybe"], ["yes", "no", "No"]
    assert list(map(scores.accuracy, answers, references)) == [1.0, 1.0, 0.0]
    assert list(map(scores.exact_match, answers, references)) == [0.0, 1.0, 0.0]


def test_rouge_l_is_the_f_of_the_longest_common_subsequence():
    # "police the gunman" against four words: a subsequence of 3 of 4 and 4, so F = 3/4 (Lin 2004, section 3).
    assert scores.rouge_l("police killed the gunman", "Police kill the gunman!") == pytest.approx(0.75)
    assert scores.rouge_l("the gunman kill police", "police killed the gunman") == pytest.approx(0.5)
    assert scores.rouge_l("", "a") == scores.rouge_l("a", "") == 0.0


def test_rouge_l_is_that_of_the_table_written_out():
    dice = random.Random(0)
    for _ in range(200):
        a, r = (dice.choices("abcde", k=dice.randint(1, 90)) for _ in range(2))
        row = [0] * (len(r) + 1)
        for word in a:
            before = 0
            for j, other in enumerate(r, 1):
                before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
        assert scores.rouge_l(" ".join(a), " ".join(r)) == 2 * row[-1] / (len(a) + len(r))


def test_bleu_by_hand():
    # 6 tokens of 7, brevity exp(1 - 7/6); n-gram hits 5/6, 3/5, 1/4, and 1/(2*3) smoothed.
    answer, reference = "the cat sat on mat today", "the cat sat on the mat ."
    hits = (5 / 6) * (3 / 5) * (2 / 4) * (1 / 3)
    assert corpus_score("bleu", [answer], [reference]) == pytest.approx(
        100 * hits**0.25 * 2.718281828 ** (1 - 7 / 6), rel=1e-6
    )
    smoothed = (3 / 4) * (1 / 3) * (1 / (2 * 2)) * (1 / (4 * 1))
    assert corpus_score("bleu", ["a b x c"], ["a b c d"]) == pytest.approx(100 * smoothed**0.25, rel=1e-6)


def test_tokens_of_bleu():
    assert scores._tokens('He said: "3.5, not 4!" (twice)') == [
        "He", "said", ":", '"', "3.5", ",", "not", "4", "!", '"', "(", "twice", ")",
    ]  # fmt: skip
    assert scores._tokens("a &amp; b &lt;c&gt;, know-\nledge\nis") == [
        "a",
        "&",
        "b",
        "<",
        "c",
        ">",
        ",",
        "knowledge",
        "is",
    ]


def test_chrf_by_hand():
    # "ab" against "abc": unigrams 2/2 and 2/3, bigrams 1/1 and 1/2; no longer ones in the answer.
    recall = (2 / 3 + 1 / 2) / 2
    assert corpus_score("chrf", ["a b"], ["abc"]) == pytest.approx(100 * 5 * recall / (4 + recall))
    # Where a reference is too short for an order, its answer's n-grams are not counted either.
    sacrebleus = corpus_score("chrf", ["? Cat,", "? A", "?"], ["-", "? A", "?"])
    assert sacrebleus == pytest.approx(82.97413793, rel=1e-8)
    assert corpus_score("chrf", [""], [""]) == 0.0 and corpus_score("chrf", ["x"], ["y"]) == 0.0


def test_what_answers_do_for_a_mean_is_how_far_they_are_from_it():
    counts = [(0.25, 1), (0.5, 1), (0.0, 1)]
    assert scores.parts(lambda sums: sums[0] / sums[1], counts) == pytest.approx((0.0, 0.25, -0.25))
    assert scores.parts(lambda sums: sums[0] / sums[1], counts[:1]) == (0.0,)


def test_one_long_answer_does_more_for_a_corpus_than_many_short_ones():
    """By the mean of the sentences' own scores the first answers would be the better ones."""
    long = "the cat sat on the mat and looked at the moon with joy"
    references = ["no"] * 3 + [long]
    first, second = ["no"] * 3 + ["yes " * 12], ["yes"] * 3 + [long]
    for metric, corpus in scores.CORPUS.items():
        ours, theirs = ([corpus.count(a, r) for a, r in zip(said, references, strict=True)] for said in (first, second))
        assert sum(map(corpus.single, ours)) > sum(map(corpus.single, theirs))
        assert corpus.score(scores.sums(ours)) == corpus_score(metric, first, references)
        assert corpus.score(scores.sums(ours)) < corpus.score(scores.sums(theirs))
        assert scores.parts(corpus.score, theirs)[3] == max(scores.parts(corpus.score, theirs)) > 50


@pytest.mark.parametrize("metric", list(scores.CORPUS))
def test_a_corpus_score_varies_as_its_bootstrap_does(metric):
    draw, words = random.Random(5), [f"w{i}" for i in range(40)]
    references = [[draw.choice(words) for _ in range(draw.randint(4, 30))] for _ in range(150)]
    counts = []
    for reference in references:
        kept = draw.random()
        answer = [word if draw.random() < kept else draw.choice(words) for word in reference]
        counts.append(scores.CORPUS[metric].count(" ".join(answer), " ".join(reference)))
    score = scores.CORPUS[metric].score
    resampled = np.random.default_rng(5).multinomial(150, [1 / 150] * 150, 500) @ np.array(counts)
    assert stdev(scores.parts(score, counts)) / 150**0.5 == pytest.approx(stdev(map(score, resampled)), rel=0.1)


@given(st.lists(st.lists(st.sampled_from(["a", "bc", "cab."]), min_size=4, max_size=8).map(" ".join), min_size=1))
@settings(max_examples=40, deadline=None)
def test_the_reference_itself_is_perfect(texts):
    for text in texts:
        assert scores.accuracy(text, text) == scores.exact_match(text, text) == scores.rouge_l(text, text) == 1.0
    assert corpus_score("bleu", texts, texts) == pytest.approx(100.0)
    assert corpus_score("chrf", texts, texts) == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("metric", "nothing", "something"),
    [
        ("bleu", ["yes", "no", "not at all", "他今天去了图书馆看书"], "yes, it is"),
        ("rougeL", ["我们去吃饭吧。", "да", "!?"], "да, 3"),
    ],
)
def test_what_says_nothing_of_perfect_answers_is_told(metric: str, nothing: list[str], something: str) -> None:
    why = scores.says_nothing(metric, nothing)
    assert why is not None and why.startswith(f"{metric} looks at ")
    if metric == "bleu":
        assert corpus_score("bleu", nothing, nothing) == 0.0
    else:
        assert not any(map(scores.rouge_l, nothing, nothing))
    assert scores.says_nothing(metric, [*nothing, something]) is None, "one that says something is enough"
    assert all(scores.says_nothing(other, nothing) is None for other in ("accuracy", "exact_match", "chrf", "loss"))
