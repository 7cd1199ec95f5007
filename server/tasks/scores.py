"""Scores of answers against references: accuracy, exact match, ROUGE-L, BLEU and chrF, each from 0 to 1 or 100.

Pure functions of strings. BLEU and chrF are corpus scores as `sacrebleu` defines them (chrF of order 6, beta 2; BLEU
over its 13a tokens, smoothed exponentially), ROUGE-L is the mean F of `rouge-score` over lower-case words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

CHRF_ORDER = 6
CHRF_BETA = 2.0
BLEU_ORDER = 4

_WORDS = re.compile(r"[^a-z0-9]+")
_WRITTEN = {"<skipped>": "", "-\n": "", "\n": " ", "&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
"""What mteval-v13a takes for something else, in its order."""


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the reference but for case and surrounding space, 0 to 1."""
    same = [a.strip().lower() == r.strip().lower() for a, r in zip(answers, references, strict=True)]
    return sum(same) / len(same)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """The share of answers that are the reference to the letter, surrounding space aside, 0 to 1."""
    same = [a.strip() == r.strip() for a, r in zip(answers, references, strict=True)]
    return sum(same) / len(same)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F measure of the longest common subsequence of words, 0 to 1 (Lin 2004)."""
    return sum(map(_rouge_l, answers, references)) / len(answers)


def _rouge_l(answer: str, reference: str) -> float:
    a, r = ([w for w in _WORDS.split(text.lower()) if w] for text in (answer, reference))
    if not a or not r:
        return 0.0
    row = [0] * (len(r) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(r, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    common = row[-1]
    return 2.0 * common / (len(a) + len(r))


def chrf(answers: Sequence[str], references: Sequence[str]) -> float:
    """Corpus chrF2 over character n-grams up to 6, white space left out, 0 to 100 (Popović 2015)."""
    totals = [[0, 0, 0] for _ in range(CHRF_ORDER)]
    for answer, reference in zip(answers, references, strict=True):
        a, r = "".join(answer.split()), "".join(reference.split())
        for n, total in enumerate(totals, 1):
            counts = [Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in (a, r)]
            if counts[1]:  # a reference that is too short for an order has no say in it, and so has its answer none
                total[0] += sum((counts[0] & counts[1]).values())
                total[1] += sum(counts[0].values())
                total[2] += sum(counts[1].values())
    scored = [(hit / given, hit / wanted) for hit, given, wanted in totals if given and wanted]
    if not scored:
        return 0.0
    precision, recall = (sum(values) / len(scored) for values in zip(*scored, strict=True))
    factor = CHRF_BETA**2
    both = factor * precision + recall
    return 100.0 * (1 + factor) * precision * recall / both if both else 0.0


def bleu(answers: Sequence[str], references: Sequence[str], effective_order: bool = False) -> float:
    """Corpus BLEU over n-grams of tokens up to 4, 0 to 100 (Papineni et al. 2002).

    With `effective_order` only orders that the answers are long enough for count, which is for single sentences.
    """
    hits, totals = [0] * BLEU_ORDER, [0] * BLEU_ORDER
    given = wanted = 0
    for answer, reference in zip(answers, references, strict=True):
        a, r = _tokens(answer), _tokens(reference)
        given, wanted = given + len(a), wanted + len(r)
        for n in range(1, BLEU_ORDER + 1):
            mine, theirs = (Counter(tuple(t[i : i + n]) for i in range(len(t) - n + 1)) for t in (a, r))
            hits[n - 1] += sum((mine & theirs).values())
            totals[n - 1] += sum(mine.values())
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


METRICS: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "rougeL": rouge_l,
    "chrf": chrf,
    "bleu": bleu,
}
"""Names of metrics -> function of answers and references."""


def single(metric: str, answer: str, reference: str) -> float:
    """What a metric says of one answer, from 0 to 1: for BLEU (of effective order) and chrF the score of its own."""
    if metric == "bleu":
        return bleu([answer], [reference], effective_order=True) / 100.0
    value = METRICS[metric]([answer], [reference])
    return value / 100.0 if metric == "chrf" else value
