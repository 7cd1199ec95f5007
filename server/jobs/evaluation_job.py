"""The work of an evaluation job: each candidate of a task over the same examples, through the engine.

Owns what is told of the comparison. How answers are scored is `tasks.evaluation`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from adapters import data
from adapters.data import Pair
from adapters.errors import InvalidData, StoreFailed
from adapters.leases import Lease
from adapters.weights import Choice
from server.errors import InvalidRequest
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.job_store import RUNNING, Progress
from server.jobs.publisher import Evaluate, awaited, shares, warn_of_reach
from server.jobs.runner import ActiveJob
from server.jobs.worker_messages import DATA
from server.tasks.definitions import Task
from server.tasks.evaluation import Evaluation, difference, example_ids, pairs, prompt_fingerprint
from server.tasks.mix_key import MixKey, adapters_json
from server.tasks.quality import Quality
from server.tasks.resolve import Target
from server.tasks.task_store import TaskStore

log = logging.getLogger(__name__)

MAX_BYTES = 32 << 20
"""Of the examples: they are read in the server's own process, whose steps would wait while they are."""


def check_size(nbytes: int, name: str, field: str) -> None:
    """Raises InvalidData for examples that are too many bytes to be read here."""
    if nbytes > MAX_BYTES:
        raise InvalidData(f"{name} is over the {MAX_BYTES >> 20} MiB that an evaluation reads", field)


class EvaluationJob:
    """`Work` for evaluation jobs. `lease` fixes a candidate's versions, `evaluate` runs it on the engine; `reviewed` is
    told the name of a task whose records have grown.
    """

    def __init__(
        self,
        tasks: TaskStore,
        quality: Quality,
        files: FileStore,
        lease: Callable[[Choice], Lease],
        evaluate: Evaluate,
        reviewed: Callable[[str], object],
        base_id: str,
    ) -> None:
        self._tasks, self._quality, self._files = tasks, quality, files
        self._lease, self._evaluate, self._reviewed, self._base_id = lease, evaluate, reviewed, base_id

    def __call__(self, active: ActiveJob) -> None:
        job, request = active.job, active.job.request
        examples = self._examples(active)
        task = self._tasks.get(job.name)
        candidates: list[Choice] = [[(name, weight) for name, weight in choice] for choice in request["candidates"]]
        metric: str = request["metric"]
        found: list[Evaluation] = []
        with ExitStack() as held:
            leases = [held.enter_context(self._lease(choice)) for choice in candidates]
            # Of one that begins again, too; where one is gone by then, what was measured before stays told.
            job.progress, job.result = Progress(steps=len(examples) * len(candidates)), {}
            active.become(RUNNING)

            def record(kind: object, error: BaseException | None, trace: object) -> None:
                """Whatever ends the rest. That is what is told then, not that the disk refuses the records as well."""
                try:
                    self._record(task, examples, metric, found)
                except StoreFailed as refused:
                    if error is None:
                        raise
                    log.error("what %s has measured is not in the task's records: %s", job.id, refused.message)

            held.push(record)
            for choice, lease in zip(candidates, leases, strict=True):

                def tell(done: int, total: int, before: int = len(found) * len(examples)) -> None:
                    job.progress.step = before + done

                target = Target(task, choice, lease)
                found.append(awaited(active, self._evaluate(target, examples, (metric,), tell)))
                lease.release()
                if len(found) == 1:  # of all others it is the same
                    warn_of_reach(active, found[0], len(examples))
                job.progress.tokens += found[-1].prompt_tokens + found[-1].completion_tokens
                job.progress.seconds += found[-1].seconds
                job.result = told(found, metric)
                label = MixKey.of(task.name, found[-1].versions, self._base_id).label
                active.note(f"{label}: {metric} {found[-1].scores[metric].value:.4f}.")

    def _record(self, task: Task, examples: Sequence[Pair], metric: str, found: Sequence[Evaluation]) -> None:
        """All at once: a route that looked in between would compare what had other examples."""
        for one in found:
            subject = MixKey.of(task.name, one.versions, self._base_id)
            values = zip(example_ids(examples), shares(one.scores[metric]), strict=True)
            self._quality.record_evaluation(subject, metric, dict(values), prompt_fingerprint(task, metric))
        self._reviewed(task.name)  # as it is now: it may have another route, or be gone

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


def told(found: Sequence[Evaluation], metric: str) -> dict[str, Any]:
    """The outcome: each candidate's score, how far it is from the best on the same examples, and which is best.

    The best one has no difference: it is the very answers that it would be compared with.
    """
    of = [one.scores[metric] for one in found]
    best = (min if of[0].lower_is_better else max)(range(len(of)), key=lambda i: of[i].value)
    rows: list[Mapping[str, Any]] = []
    for i, (one, score) in enumerate(zip(found, of, strict=True)):
        finite = asdict(difference(score, of[best])) if i != best and len(score.values) > 1 else None
        rows.append(
            {
                "adapters": adapters_json(one.versions),
                "score": score.value,
                "samples": len(score.values),
                "difference_to_best": finite,
                "seconds": round(one.seconds, 3),
            }
        )
    return {"metric": metric, "candidates": rows, "best": best}
