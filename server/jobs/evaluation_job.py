"""The work of an evaluation job: runs each candidate of a task over the same examples on the engine."""

from __future__ import annotations

import concurrent.futures
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from adapters import data
from adapters.data import Pair
from adapters.errors import InvalidData, StoreFailed
from adapters.leases import Lease
from adapters.weights import Choice
from server.errors import InvalidRequest, NotReady
from server.jobs.active_job import ActiveJob
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.job_store import RUNNING, Progress
from server.jobs.worker_messages import DATA
from server.tasks.definitions import Task
from server.tasks.evaluation import (
    Evaluation,
    example_ids,
    pairs,
    prompt_fingerprint,
    unreachable_note,
)
from server.tasks.mix_key import MixKey, adapters_json
from server.tasks.quality import Quality
from server.tasks.resolve import Target
from server.tasks.scores import Score, difference
from server.tasks.task_store import TaskStore

log = logging.getLogger(__name__)

MAX_BYTES = 32 << 20
"""Size limit of the examples, which are parsed in the server's process."""

Evaluate = Callable[
    [Target, Sequence[Pair], Sequence[str], Callable[[int, int], None]], "concurrent.futures.Future[Evaluation]"
]
"""Starts an evaluation on the engine. Arguments: target, examples, metrics, progress callback (done, total)."""


def check_size(nbytes: int, name: str, field: str) -> None:
    """Raise InvalidData if the examples are too large."""
    if nbytes > MAX_BYTES:
        raise InvalidData(f"{name} exceeds {MAX_BYTES >> 20} MiB, the limit of an evaluation", field)


class EvaluationJob:
    """`JobWork` of evaluation jobs.

    Args:
        lease: Leases the versions of a candidate.
        evaluate: Starts an evaluation on the engine.
        on_scores: Called with a task's name when it has new scores.
    """

    def __init__(
        self,
        tasks: TaskStore,
        quality: Quality,
        files: FileStore,
        lease: Callable[[Choice], Lease],
        evaluate: Evaluate,
        on_scores: Callable[[str], object],
        base_id: str,
    ) -> None:
        self._tasks, self._quality, self._files = tasks, quality, files
        self._lease, self._evaluate, self._on_scores, self._base_id = lease, evaluate, on_scores, base_id

    def __call__(self, active: ActiveJob) -> None:
        job, request = active.job, active.job.request
        examples = self._examples(active)
        task = self._tasks.get(job.name)
        candidates: list[Choice] = [[(name, weight) for name, weight in choice] for choice in request["candidates"]]
        found: list[Evaluation] = []
        with ExitStack() as stack:
            leases = [stack.enter_context(self._lease(choice)) for choice in candidates]
            job.progress, job.result = Progress(steps=len(examples) * len(candidates)), {}
            active.set_status(RUNNING)
            try:
                for choice, lease in zip(candidates, leases, strict=True):
                    self._evaluate_one(active, Target(task, choice, lease), examples, found)
                    lease.release()
            except BaseException:
                try:
                    self._record(task, examples, request["metric"], found)
                except StoreFailed as error:
                    log.error("the scores of %s are lost: %s", job.id, error.message)
                raise
            self._record(task, examples, request["metric"], found)

    def _evaluate_one(
        self, active: ActiveJob, target: Target, examples: Sequence[Pair], found: list[Evaluation]
    ) -> None:
        job, metric = active.job, active.job.request["metric"]
        done_before = len(found) * len(examples)

        def on_progress(done: int, total: int) -> None:
            job.progress.step = done_before + done

        one = wait_for(active, self._evaluate(target, examples, (metric,), on_progress))
        found.append(one)
        if len(found) == 1:  # the same for all candidates
            warn_of_reach(active, one, len(examples))
        job.progress.tokens += one.prompt_tokens + one.completion_tokens
        job.progress.seconds += one.seconds
        job.result = comparison(found, metric)
        label = MixKey.of(job.name, one.versions, self._base_id).label
        active.add_event(f"{label}: {metric} {one.scores[metric].value:.4f}.")

    def _record(self, task: Task, examples: Sequence[Pair], metric: str, found: Sequence[Evaluation]) -> None:
        """Record the scores of all candidates together, so that routing never compares different examples."""
        for one in found:
            mix = MixKey.of(task.name, one.versions, self._base_id)
            values = zip(example_ids(examples), unit_values(one.scores[metric]), strict=True)
            self._quality.record_evaluation(mix, metric, dict(values), prompt_fingerprint(task, metric))
        self._on_scores(task.name)

    def _examples(self, active: ActiveJob) -> list[Pair]:
        file = active.job.request["training_file"]
        path = self._files.path(file) if file else active.folder / DATA
        name, field = (self._files.get(file).filename, "file") if file else ("data", "data")
        try:
            check_size(path.stat().st_size, name, field)
            return pairs(data.parse(path.read_bytes(), name))
        except InvalidData as error:
            raise JobError("invalid_file", error.message, field) from error
        except InvalidRequest as error:
            raise JobError("invalid_file", f"{name}, {error.message}", field) from error
        except OSError as error:
            raise JobError("invalid_file", f"{name} cannot be read: {error.strerror}", field) from error


def comparison(found: Sequence[Evaluation], metric: str) -> dict[str, Any]:
    """The result of the job: each candidate's score, its difference to the best, and the index of the best."""
    scores = [one.scores[metric] for one in found]
    best = (min if scores[0].lower_is_better else max)(range(len(scores)), key=lambda i: scores[i].value)
    rows: list[Mapping[str, Any]] = []
    for i, (one, score) in enumerate(zip(found, scores, strict=True)):
        # With a single example the interval has no bounds, which JSON cannot represent.
        compared = i != best and len(score.values) > 1
        rows.append(
            {
                "adapters": adapters_json(one.versions),
                "score": score.value,
                "samples": len(score.values),
                "difference_to_best": asdict(difference(score, scores[best])) if compared else None,
                "seconds": round(one.seconds, 3),
            }
        )
    return {"metric": metric, "candidates": rows, "best": best}


def wait_for(active: ActiveJob, future: concurrent.futures.Future[Evaluation]) -> Evaluation:
    """Wait for an evaluation. Raises JobStopped if the job is asked to stop, and what the evaluation raises."""
    active.on_stop(future.cancel, future.cancel)
    try:
        return future.result()
    except (concurrent.futures.CancelledError, NotReady):
        active.check_stop()
        raise


def warn_of_reach(active: ActiveJob, found: Evaluation, examples: int) -> None:
    """Add a warning if expected answers are longer than answers can be."""
    if found.out_of_reach:
        text = f"{unreachable_note(found.out_of_reach, examples)}."
        active.add_event(text, level="warn", data={"out_of_reach": found.out_of_reach})


def unit_values(score: Score) -> list[float]:
    """A score's values from 0 to 1, as quality records take them. A loss becomes 1 - exp(-loss)."""
    return [1.0 - math.exp(-v) for v in score.values] if score.lower_is_better else list(score.values)
