"""Scores of answers against references: accuracy, exact match, ROUGE-L, BLEU and chrF, each from 0 to 1 or 100.

Pure functions of strings. BLEU and chrF are corpus scores as `sacrebleu` defines them (chrF of order 6, beta 2; BLEU
over its 13a tokens, smoothed exponentially), ROUGE-L is the mean F of `rouge-score` over lower-case words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

CHRF_ORDER = 6
CHRF_BETA = 2.0
BLEU_ORDER = 4
LONGEST = 100_000
"""Characters of a reference at most: scores are computed in the server's process, beside its steps, and take the longer
the longer it is."""

Counts = Sequence[float]
"""What one answer adds to a corpus score, or what all add together."""

_BETWEEN_WORDS = re.compile(r"[^a-z0-9]+")
_WRITTEN = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
"""What mteval-v13a takes for something else, in its order."""


def sums(counts: Iterable[Counts]) -> Counts:
    """What all answers add together, of what each adds."""
    return [sum(column) for column in zip(*counts, strict=True)]


def parts(score: Callable[[Counts], float], counts: Sequence[Counts]) -> tuple[float, ...]:
    """What each answer does for a score of sums, but for a constant: how much of it is lost without that answer, times
    the number of the others (the jackknife; Tukey 1958). Of a mean it is how far each is from it.
    """
    whole = sums(counts)
    value = score(whole)
    without = ([total - own for total, own in zip(whole, one, strict=True)] for one in counts)
    return tuple((len(counts) - 1) * (value - score(rest)) for rest in without) if len(counts) > 1 else (0.0,)


def too_long(reference: str) -> bool:
    """Whether it has more characters than an answer is compared with."""
    return len(reference) > LONGEST


def accuracy(answer: str, reference: str) -> float:
    """1 if the answer is the reference but for case and surrounding space, else 0."""
    return float(answer.strip().lower() == reference.strip().lower())


def exact_match(answer: str, reference: str) -> float:
    """1 if the answer is the reference to the letter, surrounding space aside, else 0."""
    return float(answer.strip() == reference.strip())


def rouge_l(answer: str, reference: str) -> float:
    """F measure of the longest common subsequence of words, 0 to 1 (Lin 2004).

    Whole rows of the table at a time (Hyyrö 2004): a bit of `row` says that the length does not grow at that word.
    """
    a, r = _words(answer), _words(reference)
    if not a or not r:
        return 0.0
    known, places = set(a), Counter[str]()
    for j, word in enumerate(r):
        if word in known:
            places[word] |= 1 << j
    full = row = (1 << len(r)) - 1
    for word in a:
        met = row & places[word]
        row = (row + met | row - met) & full
    common = len(r) - row.bit_count()
    return 2.0 * common / (len(a) + len(r))


def _words(text: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(text.lower()) if word]


def _chrf_counts(answer: str, reference: str) -> Counts:
    """Of each order: the n-grams that both have, the answer's, the reference's."""
    a, r = "".join(answer.split()), "".join(reference.split())
    counts: list[int] = []
    for n in range(1, CHRF_ORDER + 1):
        mine, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, r))
        # A reference that is too short for an order has no say in it, and so has its answer none.
        counts += ((mine & theirs).total(), mine.total(), theirs.total()) if theirs else (0, 0, 0)
    return counts


def _chrf(counts: Counts) -> float:
    """Corpus chrF2 over character n-grams up to 6, white space left out, 0 to 100 (Popović 2015)."""
    orders = zip(counts[::3], counts[1::3], counts[2::3], strict=True)
    scored = [(hit / given, hit / wanted) for hit, given, wanted in orders if given and wanted]
    if not scored:
        return 0.0
    precision, recall = (sum(values) / len(scored) for values in zip(*scored, strict=True))
    factor = CHRF_BETA**2
    both = factor * precision + recall
    return 100.0 * (1 + factor) * precision * recall / both if both else 0.0


def _bleu_counts(answer: str, reference: str) -> Counts:
    """The tokens of both; then, of each order, the n-grams that both have, and the answer's."""
    a, r = _tokens(answer), _tokens(reference)
    counts = [len(a), len(r)]
    for n in range(1, BLEU_ORDER + 1):
        mine, theirs = (Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (a, r))
        counts += ((mine & theirs).total(), mine.total())
    return counts


def _bleu(counts: Counts, effective_order: bool = False) -> float:
    """Corpus BLEU over n-grams of tokens up to 4, 0 to 100 (Papineni et al. 2002). With `effective_order` only orders
    that the answers are long enough for count, which is for single sentences.
    """
    given, wanted, *rest = counts
    hits, totals = rest[::2], rest[1::2]
    if not hits[0]:
        return 0.0
    orders = sum(total > 0 for total in totals) if effective_order else BLEU_ORDER
    logs, smooth = 0.0, 1.0
    for hit, total in zip(hits[:orders], totals[:orders], strict=True):
        if not total:
            return 0.0
        if not hit:
            smooth *= 2.0
        logs += math.log(hit / total if hit else 1.0 / (smooth * total))
    brevity = min(0.0, 1.0 - wanted / given)
    return 100.0 * math.exp(logs / orders + brevity)


def _tokens(text: str) -> list[str]:
    """The tokens of mteval-v13a: punctuation apart from words, but for points inside numbers."""
    text = text.rstrip()
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    text = f" {text} "
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", text)
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])(-)", r"\1 \2 ", text)
    return text.split()


MEAN: Mapping[str, Callable[[str, str], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rougeL": rouge_l,
}
"""The metrics that are the mean of what each answer has by its reference, from 0 to 1."""


@dataclass(frozen=True)
class Corpus:
    """A score, 0 to 100, that is no mean of the answers' own but made of sums: `count` is what one answer adds to them
    by its reference, `score` that of the sums, `alone` that of one answer's counts."""

    count: Callable[[str, str], Counts]
    score: Callable[[Counts], float]
    alone: Callable[[Counts], float]

    def single(self, counts: Counts) -> float:
        """What one answer has alone (of BLEU by effective order), from 0 to 1."""
        return self.alone(counts) / 100.0


CORPUS: Mapping[str, Corpus] = {
    "chrf": Corpus(_chrf_counts, _chrf, _chrf),
    "bleu": Corpus(_bleu_counts, _bleu, partial(_bleu, effective_order=True)),
}
"""The metrics that are made so."""

_NEEDED: Mapping[str, tuple[Callable[[str], bool], str]] = {
    "bleu": (
        lambda text: len(_tokens(text)) >= BLEU_ORDER,
        f"{BLEU_ORDER} tokens in a row, and no expected answer has as many (what is written without spaces is one)",
    ),
    "rougeL": (lambda text: bool(_words(text)), "words of a to z and 0 to 9, and no expected answer has one"),
}
"""What a metric looks for in a reference, without which it is 0 even of that very answer."""


def says_nothing(metric: str, references: Iterable[str]) -> str | None:
    """Why the metric is 0 even of answers that are these references; None if it is not."""
    if metric not in _NEEDED:
        return None
    found, what = _NEEDED[metric]
    return None if any(map(found, references)) else f"{metric} looks at {what}: perfect ones would have 0"
