"""Evaluates a trained adapter against the version that it would replace, and publishes it by the job's rule."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters import data
from adapters.atomic_files import store_errors
from adapters.data import Pair
from adapters.errors import (
    AdapterConflict,
    AdapterError,
    InvalidChoice,
    InvalidData,
    NoRoom,
    StoreFailed,
    UnknownAdapter,
    VersionMismatch,
)
from adapters.peft_format import CONFIG_FILE, TENSOR_FILE, read_folder
from adapters.registry import Registry
from adapters.weights import Version
from server.errors import InvalidRequest, UnknownName
from server.jobs.active_job import ActiveJob
from server.jobs.comparison import Comparison, compare_losses, reason_to_withhold
from server.jobs.errors import JobError
from server.jobs.evaluation_job import Evaluate, unit_values, wait_for, warn_of_reach
from server.jobs.file_store import FileStore
from server.jobs.job_store import METRICS, TRAINING_ID
from server.jobs.worker_messages import CANDIDATE, RESULT, VALIDATION_PAIRS
from server.metrics import OTHER
from server.model.tokenizer import INPUT
from server.tasks.definitions import FixedRoute, Task, parse
from server.tasks.evaluation import default_metric, example_ids, prompt_fingerprint
from server.tasks.evaluation import pairs as of_pairs
from server.tasks.mix_key import MixKey
from server.tasks.quality import Quality
from server.tasks.resolve import Target
from server.tasks.scores import LOSS, Score
from server.tasks.task_store import TaskStore

log = logging.getLogger(__name__)

RESULTS = "fine-tune-results"
SOURCE = "job"
"""The publisher in the registry's records."""


class Publisher:
    """Evaluates and publishes results of training jobs.

    Args:
        evaluate: Starts an evaluation on the engine.
        on_scores: Called with a task's name when it has new scores.
        shapes: Shapes of the base's linear modules.
    """

    def __init__(
        self,
        registry: Registry,
        tasks: TaskStore,
        quality: Quality,
        files: FileStore,
        evaluate: Evaluate,
        on_scores: Callable[[str], object],
        *,
        shapes: dict[str, tuple[int, int]],
        base_id: str,
        max_rank: int,
    ) -> None:
        self._registry, self._tasks, self._quality, self._files = registry, tasks, quality, files
        self._evaluate, self._on_scores = evaluate, on_scores
        self._shapes, self._base_id, self._max_rank = shapes, base_id, max_rank
        for name in registry.names(source=SOURCE):
            if TRAINING_ID.fullmatch(name):  # its evaluation was interrupted by the end of the server
                self._retire(name)

    def publish(self, active: ActiveJob) -> None:
        """Do the rest of a trained job: evaluate, publish, and add the result files.

        Raises InvalidAdapter, JobError, JobStopped, and whatever the registry raises when publishing.
        """
        job = active.job
        if "files" in job.result:  # all done before the server ended
            return
        active.check_stop()
        folder = active.folder / RESULT
        result = read_folder(folder, name=job.name, max_rank=self._max_rank, shapes=self._shapes).version
        current = self._current(job.name)
        if current is not None and current.label == job.result.get("version"):
            job.result["model"] = job.name  # it was published before the server ended or the job failed
            active.add_event(f"Published as {current.label}.", data={"version": current.label})
        else:
            try:
                self._evaluate_and_publish(active, result, current)
            except (UnknownAdapter, VersionMismatch, AdapterConflict) as error:
                if self._current(job.name) == current:
                    raise
                message = f"{job.name} was replaced or deleted during the evaluation; resume the job to compare again"
                raise JobError("conflict", message, "suffix") from error
        self._add_files(active)

    def _evaluate_and_publish(self, active: ActiveJob, result: Version, current: Version | None) -> None:
        job, rule = active.job, active.job.request["lora"]["publish"]
        comparison, failure = None, None
        try:
            comparison = self._compare(active, current)
        except (InvalidChoice, InvalidData, InvalidRequest, NoRoom) as error:
            if isinstance(error, NoRoom) and rule != "never":
                raise  # there is no room to serve the result either; the job can be resumed
            failure = error.message
            active.add_event(f"The result could not be evaluated: {failure}", level="warn")
        for key in ("evaluation", "version"):
            job.result.pop(key, None)
        if comparison is not None:
            job.result["evaluation"] = comparison.as_json()
            active.add_event(str(comparison), data=comparison.as_json())
        elif failure is None and current is not None:
            active.add_event(f"The result is not compared with {current.label}, because there is no validation_file.")
        self._record_scores(job.request["lora"]["task"], result, current, comparison)
        reason = reason_to_withhold(rule, current, comparison, failure)
        if reason is not None:
            job.result["model"] = None
            active.add_event(f"Not published: {reason}")
            return
        compared, label = rule == "if_better", result.label
        job.result["version"] = label
        active.store.save(job)  # if the server ends now, the next one knows that this job published the version
        try:
            self._registry.publish_now(
                job.name,
                active.folder / RESULT,
                source=SOURCE,
                if_match=current.label if compared and current is not None else None,
                create_only=compared and current is None,
            )
        except BaseException:
            del job.result["version"]
            raise
        job.result["model"] = job.name
        active.add_event(f"Published as {label}.", data={"version": label})
        task = self._tasks.find(job.name)
        if task is not None and not task.route.allows([(job.name, 1.0)]):
            active.add_event(
                f"The task {job.name} does not route to this adapter alone. PUT /tasks/{job.name} changes its route; "
                f"the model adapter:{job.name} is the adapter itself.",
                level="warn",
            )

    # -- evaluation

    def _compare(self, active: ActiveJob, current: Version | None) -> Comparison | None:
        """Evaluate the result on the engine, or by losses if the data are not pairs. None if there are no data."""
        if not (active.folder / VALIDATION_PAIRS).exists():
            return compare_losses((active.job.trained or {}).get("losses"), current)
        pairs = of_pairs(data.parse((active.folder / VALIDATION_PAIRS).read_bytes(), VALIDATION_PAIRS))
        task = self._task(active.job.request)
        metric = default_metric(task) if task is not None else LOSS
        active.add_event(f"Evaluating {metric} on {len(pairs):,} examples.")
        template = task or Task(OTHER, INPUT, FixedRoute(), format="chat")
        with self._served(active) as name:
            ours = self._score(active, template, name, pairs, metric)
        theirs, value = None, None
        if current is not None:
            try:
                theirs = self._score(active, template, f"{current.name}@{current.digest}", pairs, metric)
                value = theirs.value
            except InvalidRequest as error:  # the result passed with the same data, so the version is at fault
                value = math.nan
                active.add_event(f"{current.label} could not be evaluated: {error.message}", level="warn")
        digest = prompt_fingerprint(template, metric)
        return Comparison(metric, len(pairs), ours.value, value, (ours, theirs), example_ids(pairs), digest)

    def _task(self, request: Mapping[str, Any]) -> Task | None:
        """The task of the result. A deleted task is as it was when the job was created."""
        name = request["lora"]["task"]
        found = self._tasks.find(name) if name is not None else None
        if found is not None or not request["template"]:
            return found
        return parse(name, request["template"], default_route=FixedRoute(), source="api")

    @contextmanager
    def _served(self, active: ActiveJob) -> Iterator[str]:
        """Serve the result under the job's id, without its task, and yield that name."""
        name, candidate = active.job.id, active.folder / CANDIDATE
        if name in self._registry.names(source=SOURCE):
            self._retire(name)  # it could not be deleted after an earlier evaluation
        shutil.rmtree(candidate, ignore_errors=True)
        try:
            with store_errors("a copy of the result"):
                candidate.mkdir()
                for file in (CONFIG_FILE, TENSOR_FILE):
                    shutil.copyfile(active.folder / RESULT / file, candidate / file)
            self._registry.publish_now(name, candidate, source=SOURCE, create_only=True)
        except AdapterConflict as error:
            raise JobError("name_taken", f"{error.message}; DELETE /adapters/{name} and resume the job") from error
        finally:
            shutil.rmtree(candidate, ignore_errors=True)
        try:
            yield name
        finally:
            self._retire(name)

    def _retire(self, name: str) -> None:
        try:
            self._registry.retire_now(name)
        except UnknownAdapter:
            pass
        except AdapterError as error:
            log.error("the adapter %s of an evaluated job is not deleted: %s", name, error.message)

    def _score(self, active: ActiveJob, task: Task, name: str, pairs: Sequence[Pair], metric: str) -> Score:
        target = Target(task, [(name, 1.0)])
        found = wait_for(active, self._evaluate(target, pairs, (metric,), lambda done, total: None))
        if name == active.job.id:
            warn_of_reach(active, found, len(pairs))
        return found.scores[metric]

    def _record_scores(
        self, task: str | None, result: Version, current: Version | None, comparison: Comparison | None
    ) -> None:
        """Add the scores to the task's records. This comes before publishing, which may be interrupted."""
        if task is None or comparison is None or comparison.scores is None:
            return
        for version, score in zip((result, current), comparison.scores, strict=True):
            if version is not None and score is not None:
                mix = MixKey.of(task, [(version, 1.0)], self._base_id)
                values = dict(zip(comparison.examples, unit_values(score), strict=True))
                self._quality.record_evaluation(mix, score.metric, values, comparison.prompt_digest)
        self._on_scores(task)

    def _current(self, name: str) -> Version | None:
        try:
            return self._registry.current(name)
        except UnknownAdapter:
            return None

    # -- result files

    def _add_files(self, active: ActiveJob) -> None:
        """Add the table of losses as a file, and the adapter's files if it is not published."""
        job, files = active.job, list[str]()
        table = losses_table(active.store.events(job.id))
        try:
            files.append(self._files.add(lambda path: path.write_text(table), f"{job.id}.csv", RESULTS).id)
            for name in () if job.result["model"] is not None else (CONFIG_FILE, TENSOR_FILE):
                files.append(self._files.add(_copy_from(active.folder / RESULT / name), name, RESULTS).id)
            job.result["files"] = files
            active.store.save(job)
        except StoreFailed:
            job.result.pop("files", None)
            for id in files:  # they are added again when the job is resumed
                with contextlib.suppress(UnknownName, StoreFailed):
                    self._files.delete(id)
            raise
        shutil.rmtree(active.folder / RESULT, ignore_errors=True)


def losses_table(events: Sequence[Mapping[str, Any]]) -> str:
    """Losses and accuracies by step as CSV, with the columns of OpenAI's result files."""
    rows: dict[int, dict[str, float]] = {}
    for event in events:
        if event["type"] == "metrics":
            rows.setdefault(event["data"]["step"], {}).update(event["data"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("step", *METRICS))
    for step, row in sorted(rows.items()):
        writer.writerow((step, *(f"{row[c]:.6g}" if c in row else "" for c in METRICS)))
    return out.getvalue()


def _copy_from(source: Path) -> Callable[[Path], object]:
    return lambda path: shutil.copyfile(source, path)
