"""Scores of answers against references: accuracy, exact match, ROUGE-L, BLEU, chrF and loss, and their differences.

BLEU and chrF are computed by `sacrebleu` from statistics of single answers, which are kept for confidence intervals.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist, stdev
from typing import Any

LOSS = "loss"
MAX_REFERENCE = 100_000
"""Most characters of a reference: scoring runs in the server's process and takes time in proportion."""
BLEU_ORDER = 4

Statistics = Sequence[float]
"""What one answer adds to a corpus score, or the sum over all answers."""

_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


def column_sums(statistics: Iterable[Statistics]) -> Statistics:
    """Statistics of a corpus from those of its answers."""
    return [sum(column) for column in zip(*statistics, strict=True)]


def jackknife(score: Callable[[Statistics], float], statistics: Sequence[Statistics]) -> tuple[float, ...]:
    """Influence of each answer on a corpus score: n - 1 times the loss of score without it (Tukey, 1958).

    For a mean this is the distance of each value from the mean.
    """
    if len(statistics) < 2:
        return (0.0,)
    total = column_sums(statistics)
    value = score(total)
    without = ([all_ - own for all_, own in zip(total, one, strict=True)] for one in statistics)
    return tuple((len(statistics) - 1) * (value - score(rest)) for rest in without)


def too_long(reference: str) -> bool:
    return len(reference) > MAX_REFERENCE


def accuracy(answer: str, reference: str) -> float:
    """1 if the answer equals the reference, ignoring case and surrounding space, else 0."""
    return float(answer.strip().lower() == reference.strip().lower())


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer equals the reference, ignoring surrounding space, else 0."""
    return float(answer.strip() == reference.strip())


def rouge_l(answer: str, reference: str) -> float:
    """F measure of the longest common subsequence of words, 0 to 1 (Lin, 2004).

    Equals `rouge-score` without stemming. Bit-parallel (Hyyrö, 2004), because a table of all pairs of words takes a
    minute for texts of some thousand words.
    """
    a, r = _words(answer), _words(reference)
    if not a or not r:
        return 0.0
    known, places = set(a), Counter[str]()
    for j, word in enumerate(r):
        if word in known:
            places[word] |= 1 << j
    full = row = (1 << len(r)) - 1  # a 0 bit: the length grows at this word of the reference
    for word in a:
        match = row & places[word]
        row = (row + match | row - match) & full
    common = len(r) - row.bit_count()
    return 2.0 * common / (len(a) + len(r))


def _words(text: str) -> list[str]:
    return [word for word in _NOT_A_WORD.split(text.lower()) if word]


class CorpusMetric:
    """BLEU or chrF, 0 to 100, computed from the sums of the answers' statistics."""

    def __init__(self, name: str) -> None:
        self._name = name

    def statistics(self, answer: str, reference: str) -> Statistics:
        """What one answer adds to the corpus."""
        (found,) = _sacrebleu(self._name)._extract_corpus_statistics([answer], [[reference]])
        return [float(x) for x in found]

    def score(self, statistics: Statistics) -> float:
        """The score of a corpus, 0 to 100."""
        return float(_sacrebleu(self._name)._compute_score_from_stats(statistics).score)

    def single(self, statistics: Statistics) -> float:
        """The score of one answer, 0 to 1; BLEU by the orders that the answer is long enough for."""
        name = "sentence_bleu" if self._name == "bleu" else self._name
        return float(_sacrebleu(name)._compute_score_from_stats(statistics).score) / 100.0


@cache
def _sacrebleu(name: str) -> Any:
    """Metrics with their defaults: 13a tokens and exponential smoothing for BLEU; chrF2 of order 6.

    The two methods used are those that every sacrebleu metric implements; a test compares them with `corpus_score`.
    """
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    if name == "chrf":
        return CHRF()
    return BLEU(force=True, effective_order=name == "sentence_bleu", max_ngram_order=BLEU_ORDER)


MEAN: Mapping[str, Callable[[str, str], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rougeL": rouge_l,
}
"""Metrics that are the mean of the answers' scores, 0 to 1."""

CORPUS: Mapping[str, CorpusMetric] = {"chrf": CorpusMetric("chrf"), "bleu": CorpusMetric("bleu")}
"""Metrics of a whole corpus, 0 to 100."""


def always_zero(metric: str, references: Iterable[str]) -> str | None:
    """Why the metric is 0 for these references even if the answers equal them; None if it is not."""
    if metric == "bleu" and not any(CORPUS["bleu"].statistics(text, text)[-1] for text in references):
        return f"bleu needs {BLEU_ORDER} tokens in a row, and no expected answer has as many"
    if metric == "rougeL" and not any(map(_words, references)):
        return "rougeL compares words of a to z and 0 to 9, and no expected answer has one"
    return None


@dataclass(frozen=True)
class Score:
    """A metric over the examples.

    Attributes:
        value: a share from 0 to 1 (accuracy, exact_match, rougeL), a corpus score from 0 to 100 (bleu, chrf), or nats a
            token (loss).
        values: one number for each example: 0 to 1 (for bleu and chrf the sentence score / 100), or its mean loss.
        influences: what each example contributes to `value`, up to a constant, if `value` is not the mean of `values`.
    """

    metric: str
    value: float
    values: tuple[float, ...]
    influences: tuple[float, ...] = ()

    @property
    def lower_is_better(self) -> bool:
        return self.metric == LOSS


def combine(metric: str, each: Sequence[Any]) -> Score:
    """The score of a metric from the scores or statistics of the answers."""
    if metric in MEAN:
        return Score(metric, sum(each) / len(each), tuple(each))
    corpus = CORPUS[metric]
    value, influences = corpus.score(column_sums(each)), jackknife(corpus.score, each)
    return Score(metric, value, tuple(map(corpus.single, each)), influences)


def loss_score(losses: Sequence[tuple[float, int]]) -> Score:
    """The loss from (nats, tokens) of each example."""
    each = tuple(map(_loss_per_token, losses))
    return Score(LOSS, _loss_per_token(column_sums(losses)), each, jackknife(_loss_per_token, losses))


def _loss_per_token(loss: Statistics) -> float:
    nats, tokens = loss
    return nats / tokens


@dataclass(frozen=True)
class Difference:
    """Difference of two scores on the same examples, with its 95 % interval."""

    mean: float
    low: float
    high: float


def difference(first: Score, second: Score) -> Difference:
    """First minus second, with the paired 95 % interval by Student's t. One example has infinite bounds.

    For hits and misses one example is added that only the first hits and one that only the second hits, as in Bonett
    and Price (2012): otherwise a few equal examples would have an interval of width 0.
    """
    mean, half = first.value - second.value, math.inf
    n = len(first.values)
    if n > 1:
        both = zip(first.influences or first.values, second.influences or second.values, strict=True)
        each = [a - b for a, b in both]
        binary = first.metric in MEAN and {*each} <= {-1.0, 0.0, 1.0}
        half = _t_quantile(n - 1) * stdev([*each, *((1.0, -1.0) if binary else ())]) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half)


def _t_quantile(degrees: int) -> float:
    """0.975 quantile of Student's t. Within 1 % by Abramowitz and Stegun 26.7.5, exact for one degree of freedom."""
    if degrees == 1:
        return 1 / math.tan(math.pi / 40)
    x = NormalDist().inv_cdf(0.975)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return math.fsum(term / float(degrees) ** i for i, term in enumerate(terms))
