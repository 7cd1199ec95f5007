"""Evaluation: runs examples with known answers through the engine and scores the answers.

Decoding is greedy, at the lowest priority, and outside the latency metrics. The adapter versions are leased for the
whole evaluation, so publishing or deleting adapters meanwhile has no effect on it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from adapters.data import Pair, Record
from adapters.weights import Version
from server.engine.request import Sampling
from server.errors import InvalidRequest, NotReady, QueueFull
from server.tasks import scores
from server.tasks.definitions import METRICS, Task
from server.tasks.generation import Caller, Generation
from server.tasks.inference import Inference
from server.tasks.prompts import Prompts
from server.tasks.resolve import Target
from server.tasks.sampling import OWN_DEFAULTS, build
from server.tasks.scores import LOSS, Score

PRIORITY = 1
"""Lower than every client request, which has 0."""
GREEDY_FIELDS = (
    *("max_tokens", "min_tokens", "stop", "stop_token_ids", "ignore_eos"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
"""Generation fields that change a greedy answer."""
MAX_RUNNING = 64
"""Examples in the engine at a time: a full batch and the next one."""
SCORING_BATCH = 8
"""Answers scored per thread call; a cancelled evaluation stops after one."""
MAX_WAIT = 1.0
"""Seconds before a full queue is tried again."""

Progress = Callable[[int, int], None]
"""Called with the number of finished examples and of all."""


@dataclass(frozen=True)
class Evaluation:
    """The result for one mix.

    `answers` is empty if only the loss was measured. `out_of_reach` counts examples whose expected answer has more
    tokens than an answer may have.
    """

    scores: Mapping[str, Score]
    answers: tuple[str, ...]
    versions: tuple[tuple[Version, float], ...]
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    out_of_reach: int = 0


def check_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics without duplicates. Raises InvalidRequest if there is none or an unknown one."""
    for metric in metrics:
        if metric not in METRICS:
            raise InvalidRequest(f"unknown metric {str(metric)[:64]!r}; use one of {', '.join(METRICS)}", "metric")
    if not metrics:
        raise InvalidRequest("a metric is needed", "metric")
    return tuple(dict.fromkeys(metrics))


def pairs(records: Sequence[Record]) -> list[Pair]:
    """Records that all have an input and an output. Raises InvalidRequest with the line of the first that does not."""
    for record in records:
        if not isinstance(record, Pair):
            raise InvalidRequest(f"{record.place}: an evaluation needs 'input' and 'output'", "data")
        if scores.too_long(record.output):
            size = f"{len(record.output):,} characters of 'output' are over the limit of {scores.MAX_REFERENCE:,}"
            raise InvalidRequest(f"{record.place}: {size}", "data")
    return [record for record in records if isinstance(record, Pair)]


def check_references(metrics: Sequence[str], examples: Sequence[Pair]) -> None:
    """Raises InvalidRequest for a metric that is 0 even if all answers equal the expected ones."""
    for metric in metrics:
        why = scores.always_zero(metric, (example.output for example in examples))
        if why is not None:
            raise InvalidRequest(f"{why}; use chrf, which compares characters", "metric")


def example_ids(examples: Sequence[Pair]) -> list[str]:
    """Ids of examples by their content, so that they are recognized in another file. Duplicates get different ids."""
    seen = Counter[str]()
    found = []
    for example in examples:
        content = json.dumps([example.input, example.output])
        found.append(hashlib.sha256(f"{seen[content]} {content}".encode()).hexdigest())
        seen[content] += 1
    return found


def prompt_fingerprint(task: Task, metric: str) -> str:
    """Digest of everything in a task that changes this metric's scores. Scores are comparable if it is equal."""
    defaults = {**vars(Sampling()), **OWN_DEFAULTS, **task.defaults}
    fields = [] if metric == LOSS else [defaults[name] for name in GREEDY_FIELDS]
    fields = [sorted(value) if isinstance(value, list | tuple) else value for value in fields]
    return hashlib.sha256(json.dumps([task.prompt, task.format, task.system, fields]).encode()).hexdigest()


def default_metric(task: Task | None) -> str:
    """Accuracy for a task with labels, else chrF."""
    return "accuracy" if task is not None and task.labels else "chrf"


async def evaluate(
    inference: Inference,
    prompts: Prompts,
    target: Target,
    examples: Sequence[Pair],
    metrics: Sequence[str] = ("accuracy",),
    *,
    max_running: int = MAX_RUNNING,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Run every example and compute the metrics. Called on the event loop; cancelling it stops running examples.

    Raises:
        InvalidRequest: an example does not fit into the context (names its line), or a metric is useless for these
            examples.
        UnknownAdapter: the target's adapter is missing.
    """
    metrics = check_metrics(metrics)
    if not examples:
        raise InvalidRequest("there are no examples", "data")
    await asyncio.to_thread(check_references, metrics, examples)
    started = time.monotonic()
    with inference.lease(target) as lease:
        run = _Run(inference, prompts, replace(target, held=lease), examples, metrics)
        await run.run(max_running, on_progress or (lambda done, total: None))
        versions = tuple(lease.versions)
    return Evaluation(
        {metric: await run.score(metric) for metric in metrics},
        tuple(run.answers) if run.generates else (),
        versions,
        run.prompt_tokens,
        run.completion_tokens,
        time.monotonic() - started,
        run.out_of_reach,
    )


def unreachable_note(out_of_reach: int, examples: int) -> str:
    """Warning for expected answers that are longer than an answer may be."""
    return (
        f"{out_of_reach:,} of {examples:,} expected answers have more tokens than an answer may have, so scores are "
        f"too low. Raise the task's defaults.max_tokens ({OWN_DEFAULTS['max_tokens']} if it is not set)"
    )


class _Run:
    """One evaluation in progress."""

    def __init__(
        self, inference: Inference, prompts: Prompts, target: Target, examples: Sequence[Pair], metrics: Sequence[str]
    ) -> None:
        self._inference, self._prompts, self._target, self._examples = inference, prompts, target, examples
        self._caller = Caller(priority=PRIORITY, client=False)
        self._with_loss = LOSS in metrics
        self.generates = any(metric != LOSS for metric in metrics)
        self.answers = [""] * len(examples)
        self._losses = [(0.0, 0)] * len(examples)  # nats, tokens
        self.prompt_tokens = self.completion_tokens = self.out_of_reach = 0

    async def run(self, max_running: int, on_progress: Progress) -> None:
        total, done = len(self._examples), 0
        remaining = iter(enumerate(self._examples))

        async def work() -> None:
            nonlocal done
            for index, example in remaining:
                await self._run_one(index, example)
                done += 1
                on_progress(done, total)

        await self._check_all()
        on_progress(0, total)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(max_running, total)):
                    group.create_task(work())
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the first failure is the cause of the others

    async def _check_all(self) -> None:
        """Raises for an example that the engine would refuse, before any example runs."""
        for example in self._examples:
            with _with_place(example):
                if self.generates:
                    _, sampling = await self._encode(example)
                    self.out_of_reach += await self._prompts.has_more_tokens(example.output, sampling.max_tokens)
                if self._with_loss:
                    await self._encode_scored(example)
            await asyncio.sleep(0)

    async def _run_one(self, index: int, example: Pair) -> None:
        with _with_place(example):
            if self.generates:
                ids, sampling = await self._encode(example)
                generation = await self._generate([ids], [sampling])
                self.answers[index] = "".join(generation.replies[0].text)
            if self._with_loss:
                encoded = await self._encode_scored(example)
                sampling, counts = Sampling(max_tokens=1, logprobs=0), [count for _, count in encoded]
                generation = await self._generate([ids for ids, _ in encoded], [sampling], counts)
                logprobs = generation.replies[0].logprobs
                self._losses[index] = (-sum(token.logprob for token in logprobs), len(logprobs))

    async def _encode(self, example: Pair) -> tuple[list[int], Sampling]:
        task = self._target.task
        ids = await self._prompts.encode_input(task, example.input)
        defaults = {**(task.defaults if task else {}), "temperature": 0.0, "logprobs": None}
        return ids, build({}, defaults, OWN_DEFAULTS, self._prompts.limit, len(ids))

    async def _encode_scored(self, example: Pair) -> list[tuple[list[int], int]]:
        return await self._prompts.encode_labels(self._target.task, example.input, [example.output])

    async def _generate(
        self, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling], scored: Sequence[int] = ()
    ) -> Generation:
        """Run until it finishes. Tries again if the queue is full or a client request displaced it."""
        while True:
            generation = None
            try:
                generation = self._inference.start(self._target, prompts, samplings, self._caller, scored=scored)
                await generation.finished()
                break
            except BaseException as error:
                if generation is not None:
                    generation.cancel()
                if not isinstance(error, QueueFull):
                    raise
                wait = min(error.retry_after or MAX_WAIT, MAX_WAIT)
            await asyncio.sleep(wait)
        if generation.cancelled:
            raise NotReady("the engine stopped before the evaluation was complete; start it again", retry_after=2.0)
        usage = generation.usage()
        self.prompt_tokens += usage["prompt_tokens"]
        self.completion_tokens += usage["completion_tokens"]
        return generation

    async def score(self, metric: str) -> Score:
        """Compute a metric, on threads: some take seconds."""
        if metric == LOSS:
            return await asyncio.to_thread(scores.loss_score, self._losses)
        score: Callable[[str, str], Any] = scores.MEAN.get(metric) or scores.CORPUS[metric].statistics
        references = [example.output for example in self._examples]
        each: list[Any] = []
        for start in range(0, len(references), SCORING_BATCH):
            batch = slice(start, start + SCORING_BATCH)
            each += await asyncio.to_thread(list, map(score, self.answers[batch], references[batch]))
        return await asyncio.to_thread(scores.combine, metric, each)


@contextmanager
def _with_place(example: Pair) -> Iterator[None]:
    """Errors inside name the example's line."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{example.place}: {error.message}", error.param) from error
