"""Scores of answers against references: accuracy, exact match, ROUGE-L, BLEU and chrF.

BLEU and chrF are computed by `sacrebleu` from statistics of single answers, which are kept for confidence intervals.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

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
