"""Evaluation: a target over examples with known answers, through the engine, in the same batches as all else.

Owns which metrics there are, what each says of single examples, and how two candidates are compared on the same ones.
Examples are the callers'; nothing is stored here. Answers are greedy, at the lowest priority, and stay out of the
latency records. The versions are leased for the whole evaluation: what is published or deleted meanwhile changes
nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import NormalDist, stdev
from typing import Any

from adapters.data import Pair, Record
from adapters.weights import Version
from server.engine.request import Sampling
from server.errors import InvalidRequest, NotReady, QueueFull
from server.tasks import scores
from server.tasks.definitions import METRICS, Task
from server.tasks.inference import Caller, Generation, Inference
from server.tasks.prompts import Prompts
from server.tasks.resolve import Target
from server.tasks.sampling import OWN_DEFAULTS, build

LOSS = "loss"
PRIORITY = 1
"""Behind everybody else's requests."""
OF_GREEDY = (
    *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""The fields of a task's defaults that greedy answers depend on."""
IN_FLIGHT = 64
"""Examples that are in the engine at a time: a full batch, and the next one waiting."""
SCORED_AT_A_TIME = 8
"""Answers: between so many it is seen that nobody wants the scores any more."""
LONGEST_WAIT = 1.0
"""Seconds before a full queue is tried again, at most."""

Tell = Callable[[int, int], None]
"""Called with the number of examples that are done, and of all."""


@dataclass(frozen=True)
class Score:
    """`value` is the metric as the field defines it: a share from 0 to 1 (accuracy, exact_match, rougeL), a corpus
    score from 0 to 100 (bleu, chrf), or nats a token (loss). `values` has one number for each example, in order: from
    0 to 1 (for bleu and chrf the sentence's own score over 100), or the example's mean nats a token. Where `value` is
    not their mean, `parts` are what each example does for it, in its unit, but for a constant.
    """

    metric: str
    value: float
    values: tuple[float, ...]
    parts: tuple[float, ...] = ()

    @property
    def lower_is_better(self) -> bool:
        return self.metric == LOSS


@dataclass(frozen=True)
class Evaluation:
    """What came of one candidate. `answers` are in the order of the examples, and empty if only the loss was asked.
    `out_of_reach` says of how many examples the expected answer is of more tokens than an answer may have.
    """

    scores: Mapping[str, Score]
    answers: tuple[str, ...]
    versions: tuple[tuple[Version, float], ...]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    out_of_reach: int = 0


@dataclass(frozen=True)
class Difference:
    """Of one candidate's score to another's on the same examples, in the metric's unit, with its 95 % interval."""

    mean: float
    low: float
    high: float


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics, each once. Raises InvalidRequest for none, and for one that is not known."""
    for metric in metrics:
        if metric not in METRICS:
            raise InvalidRequest(f"{str(metric)[:64]!r} is no metric; there are {', '.join(METRICS)}", "metric")
    if not metrics:
        raise InvalidRequest("a metric is needed", "metric")
    return tuple(dict.fromkeys(metrics))


def pairs(records: Sequence[Record]) -> list[Pair]:
    """Records that have an input and an output. Raises InvalidRequest, naming the line of the first that has not, or
    whose output is too long.
    """
    for record in records:
        if not isinstance(record, Pair):
            raise InvalidRequest(f"{record.place}: an evaluation needs 'input' and 'output'", "data")
        if scores.too_long(record.output):
            size = f"{len(record.output):,} characters of 'output' are over the limit of {scores.LONGEST:,}"
            raise InvalidRequest(f"{record.place}: {size} that an answer is compared with", "data")
    return [record for record in records if isinstance(record, Pair)]


def check_references(metrics: Sequence[str], examples: Sequence[Pair]) -> None:
    """Raises InvalidRequest for a metric that is 0 even where these very outputs are answered."""
    for metric in metrics:
        why = scores.says_nothing(metric, (example.output for example in examples))
        if why is not None:
            raise InvalidRequest(f"{why}; take chrf, which compares characters", "metric")


def example_ids(examples: Sequence[Pair]) -> list[str]:
    """What each example is, whatever file it came in; a line that is there twice is two."""
    seen = Counter[str]()
    found = []
    for example in examples:
        words = json.dumps([example.input, example.output])
        found.append(hashlib.sha256(f"{seen[words]} {words}".encode()).hexdigest())
        seen[words] += 1
    return found


def prompt_fingerprint(task: Task, metric: str) -> str:
    """What a task puts to a model beside the example, as far as this metric's scores hang on it. Scores that were had
    with another prompt, or by other rules of when an answer ends, are of another question.
    """
    defaults = {**vars(Sampling()), **OWN_DEFAULTS, **task.defaults}
    how = [] if metric == LOSS else [defaults[name] for name in OF_GREEDY]
    how = [sorted(value) if isinstance(value, list | tuple) else value for value in how]  # whichever comes first stops
    return hashlib.sha256(json.dumps([task.prompt, task.format, task.system, how]).encode()).hexdigest()


def default_metric(task: Task | None) -> str:
    """What is looked at if nobody says: accuracy where there are labels, else chrF."""
    return "accuracy" if task is not None and task.labels else "chrf"


async def evaluate(
    inference: Inference,
    prompts: Prompts,
    target: Target,
    examples: Sequence[Pair],
    metrics: Sequence[str] = ("accuracy",),
    *,
    in_flight: int = IN_FLIGHT,
    tell: Tell | None = None,
) -> Evaluation:
    """Answer (and, for the loss, score) every example, and measure. On the loop's thread.

    A queue that is full is waited for. Cancelling the coroutine stops what runs within a step. Raises InvalidRequest,
    naming the example's line, for one that does not fit into the context, and for a metric that says nothing of these
    examples; what the engine raises; UnknownAdapter.
    """
    metrics = check_metrics(metrics)
    if not examples:
        raise InvalidRequest("there are no examples", "data")
    await asyncio.to_thread(check_references, metrics, examples)
    started = time.monotonic()
    with inference.lease(target) as lease:
        versions = tuple(lease.versions)
        caller = Caller(priority=PRIORITY, client=False)
        run = _Run(inference, prompts, replace(target, held=lease), caller, metrics)
        await run.all(examples, in_flight, tell or (lambda done, total: None))
    return Evaluation(
        {metric: await run.score(metric, examples) for metric in metrics},
        tuple(run.answers) if run.with_text else (),
        versions,
        run.prompt_tokens,
        run.completion_tokens,
        time.monotonic() - started,
        run.out_of_reach,
    )


def unreachable_note(out_of_reach: int, examples: int) -> str:
    """What is told of examples whose expected answer no answer can reach."""
    return (
        f"{out_of_reach:,} of {examples:,} expected answers have more tokens than an answer may have, so that what is "
        f"measured is cut short: the task's defaults.max_tokens says how many, {OWN_DEFAULTS['max_tokens']} if it does "
        "not"
    )


def difference(ours: Score, theirs: Score) -> Difference:
    """How much more `ours` has (less is better for a loss), and its interval of 95 %. Paired, by what each example does
    for the two scores; without bounds where there is one example only.

    Of hits and misses the deviation has one example put in that only `ours` hits and one that only `theirs` does, as
    Bonett and Price (2012) do: of a few that are all alike it is 0, which is no certainty.
    """
    mean, half = ours.value - theirs.value, math.inf
    if len(ours.values) > 1:
        each = [a - b for a, b in zip(ours.parts or ours.values, theirs.parts or theirs.values, strict=True)]
        hits = ours.metric in scores.MEAN and {*each} <= {-1.0, 0.0, 1.0}
        half = _students_t(len(each) - 1) * stdev([*each, *((1.0, -1.0) if hits else ())]) / math.sqrt(len(each))
    return Difference(mean, mean - half, mean + half)


def _students_t(degrees: int) -> float:
    """Half the width of a mean's interval of 95 %, in standard errors, by its degrees of freedom, at least one.

    By the expansion of Abramowitz and Stegun, 26.7.5, within 1 % from two degrees on; of one it is known exactly.
    """
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


class _Run:
    """One evaluation while it goes on."""

    def __init__(
        self, inference: Inference, prompts: Prompts, target: Target, caller: Caller, metrics: Sequence[str]
    ) -> None:
        self._inference, self._prompts, self._target, self._caller = inference, prompts, target, caller
        self._with_loss = LOSS in metrics
        self.with_text = any(metric != LOSS for metric in metrics)
        self.answers: list[str] = []
        self._losses: list[tuple[float, int]] = []
        self.prompt_tokens = self.completion_tokens = self.out_of_reach = 0

    async def all(self, examples: Sequence[Pair], in_flight: int, tell: Tell) -> None:
        self.answers = [""] * len(examples)
        self._losses = [(0.0, 0)] * len(examples)
        left = iter(range(len(examples)))
        done = 0

        async def work(numbers: Iterator[int]) -> None:
            nonlocal done
            for number in numbers:
                await self._one(number, examples[number])
                done += 1
                tell(done, len(examples))

        await self._check(examples)
        tell(0, len(examples))
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(in_flight, len(examples))):
                    group.create_task(work(left))
        except BaseExceptionGroup as errors:
            # The first failure is the reason; the other workers were cancelled because of it, or failed alike.
            raise errors.exceptions[0] from None

    async def _check(self, examples: Sequence[Pair]) -> None:
        """Raises for an example that the engine would refuse, before the others have cost anything."""
        for example in examples:
            with _placed(example):
                if self.with_text:
                    _, sampling = await self._asked(example)
                    self.out_of_reach += await self._prompts.is_longer(example.output, sampling.max_tokens)
                if self._with_loss:
                    await self._scored(example)
            await asyncio.sleep(0)

    async def _one(self, number: int, example: Pair) -> None:
        with _placed(example):
            if self.with_text:
                await self._answer(number, example)
            if self._with_loss:
                await self._score(number, example)

    async def _asked(self, example: Pair) -> tuple[list[int], Sampling]:
        task = self._target.task
        ids = await self._prompts.encode_input(task, example.input)
        defaults = {**(task.defaults if task else {}), "temperature": 0.0, "logprobs": None}
        return ids, build({}, defaults, OWN_DEFAULTS, self._prompts.limit, len(ids))

    async def _scored(self, example: Pair) -> list[tuple[list[int], int]]:
        return await self._prompts.encode_labels(self._target.task, example.input, [example.output])

    async def _answer(self, number: int, example: Pair) -> None:
        ids, sampling = await self._asked(example)
        generation = await self._ran([ids], [sampling], ())
        self.answers[number] = "".join(generation.replies[0].text)

    async def _score(self, number: int, example: Pair) -> None:
        encoded = await self._scored(example)
        sampling = Sampling(max_tokens=1, logprobs=0)
        generation = await self._ran([ids for ids, _ in encoded], [sampling], [count for _, count in encoded])
        found = generation.replies[0].logprobs
        self._losses[number] = (-sum(token.logprob for token in found), len(found))

    async def _ran(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], scored: Sequence[int]
    ) -> Generation:
        while True:
            generation = await self._started(prompts, samplings, scored)
            try:
                await generation.finished()
                break
            except QueueFull as error:  # it was let in, and had to make room for somebody else's
                generation.cancel()
                await self._patience(error)
            except BaseException:
                generation.cancel()
                raise
        if generation.cancelled:
            raise NotReady("the engine stopped before the evaluation was complete; start it again", retry_after=2.0)
        usage: dict[str, Any] = generation.usage()
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"]
        return generation

    async def _started(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], scored: Sequence[int]
    ) -> Generation:
        """Submits, and waits where the queue has no place: those that it is full of go first anyway."""
        while True:
            try:
                return self._inference.start(self._target, prompts, samplings, self._caller, scored=scored)
            except QueueFull as error:
                await self._patience(error)

    async def _patience(self, error: QueueFull) -> None:
        await asyncio.sleep(min(error.retry_after or LONGEST_WAIT, LONGEST_WAIT))

    async def score(self, metric: str, examples: Sequence[Pair]) -> Score:
        """Off the loop, which would be held up for seconds. A thread that computes is not to be stopped."""
        if metric == LOSS:
            return await asyncio.to_thread(self._loss)
        of: Callable[[str, str], Any] = scores.MEAN.get(metric) or scores.CORPUS[metric].count
        references = [example.output for example in examples]
        each: list[Any] = []
        for start in range(0, len(references), SCORED_AT_A_TIME):
            some = slice(start, start + SCORED_AT_A_TIME)
            each += await asyncio.to_thread(list, map(of, self.answers[some], references[some]))
        return await asyncio.to_thread(_together, metric, each)

    def _loss(self) -> Score:
        each = tuple(map(_a_token, self._losses))
        return Score(LOSS, _a_token(scores.sums(self._losses)), each, scores.parts(_a_token, self._losses))


def _together(metric: str, each: Sequence[Any]) -> Score:
    """The score of what each answer has by its reference."""
    if metric in scores.MEAN:
        return Score(metric, sum(each) / len(each), tuple(each))
    corpus = scores.CORPUS[metric]
    value, parts = corpus.score(scores.sums(each)), scores.parts(corpus.score, each)
    return Score(metric, value, tuple(map(corpus.single, each)), parts)


@contextmanager
def _placed(example: Pair) -> Iterator[None]:
    """What is wrong with an example, with its place in its file."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{example.place}: {error.message}", error.param) from error


def _a_token(loss: scores.Counts) -> float:
    nats, tokens = loss
    return nats / tokens
