"""What becomes of a trained adapter: checked, measured against the one that it would replace, and published by rule.

Owns the rule. The result is measured under the job's own name, which is taken away again, so that nothing is served
under the name that clients use before it has been found good.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import csv
import io
import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import data
from adapters.atomic_files import refused
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
from server.errors import InvalidRequest, NotReady, UnknownName
from server.jobs.errors import JobError
from server.jobs.file_store import FileStore
from server.jobs.job_store import CURVES, TRAINING_ID, JobStore
from server.jobs.runner import ActiveJob
from server.jobs.worker_messages import CANDIDATE, EVALUATED, JUDGED, RESULT, WorkerSpec
from server.metrics import OTHER
from server.model.tokenizer import INPUT
from server.tasks.definitions import FixedRoute, Task, parse
from server.tasks.evaluation import (
    LOSS,
    Evaluation,
    Score,
    default_metric,
    example_ids,
    prompt_fingerprint,
    unreachable_note,
)
from server.tasks.evaluation import pairs as of_pairs
from server.tasks.mix_key import MixKey
from server.tasks.quality import Quality
from server.tasks.resolve import Target
from server.tasks.task_store import TaskStore

log = logging.getLogger(__name__)

TRIES = 3
"""Comparisons, where the name gets another version meanwhile."""
RESULTS = "fine-tune-results"
SOURCE = "job"
"""Who has published a result, in the registry."""
INTENT = "publishing"
"""In a job's result, the version that it is about to publish."""
REFUSED = (InvalidChoice, InvalidData, InvalidRequest)
"""Failures to measure that lie in what is measured, and would come again. After any other the job can be resumed."""

Evaluate = Callable[
    [Target, Sequence[Pair], Sequence[str], Callable[[int, int], None]], "concurrent.futures.Future[Evaluation]"
]
"""Starts an evaluation on the server's engine: target, examples, metrics, and whom to tell of its progress."""


@dataclass(frozen=True)
class Verdict:
    """A result against the version that has its name. `theirs` is None if there is none, or nothing to compare by.
    `asked` is what both were `prompt_fingerprint`.
    """

    metric: str
    samples: int
    ours: float
    theirs: float | None
    scores: tuple[Score, Score | None] | None = None
    examples: Sequence[str] = ()
    asked: str = ""

    @property
    def better(self) -> bool:
        """Nothing is better than what it equals; what overflows is worse than all."""
        if self.theirs is None:
            return False
        if math.isnan(self.theirs):
            return True
        return self.ours < self.theirs if self.metric == LOSS else self.ours > self.theirs

    def told(self) -> dict[str, Any]:
        theirs = self.theirs if self.theirs is not None and math.isfinite(self.theirs) else None  # JSON has no other
        return {"metric": self.metric, "samples": self.samples, "score": self.ours, "replaced": theirs}


class Publisher:
    """Publishes results. `evaluate` runs an evaluation on the engine; `reviewed` is told the name of a task whose
    records have grown; `records` are those of all jobs.

    Takes away at once what a server that was killed was measuring: its job may be cancelled and never run again.
    """

    def __init__(
        self,
        registry: Registry,
        tasks: TaskStore,
        quality: Quality,
        files: FileStore,
        evaluate: Evaluate,
        reviewed: Callable[[str], object],
        *,
        shapes: dict[str, tuple[int, int]],
        base_id: str,
        records: JobStore,
    ) -> None:
        self._registry, self._tasks, self._quality, self._files = registry, tasks, quality, files
        self._evaluate, self._reviewed, self._shapes, self._base_id = evaluate, reviewed, shapes, base_id
        self._records = records
        for name in filter(self._is_left_over, registry.names(source=SOURCE)):
            try:
                registry.retire_now(name)
            except AdapterError as error:
                log.error("%s, the result of a job that was being measured, stays: %s", name, error.message)

    def _is_left_over(self, name: str) -> bool:
        """Whether what a job has put there was being measured when a server ended, and is no job's result: requests of
        before 2026-12-02 could call theirs as jobs are.
        """
        jobs = self._records.jobs
        return bool(TRAINING_ID.fullmatch(name)) and name in jobs and all(job.name != name for job in jobs.values())

    def publish(self, active: ActiveJob, spec: WorkerSpec) -> None:
        """The rest of a training job. Raises InvalidAdapter, all that publishing raises, JobError, and Stopped."""
        job, folder = active.job, active.folder / RESULT
        if "files" in job.result:  # all was done when the server was ended
            return
        weights = read_folder(folder, name=job.name, max_rank=spec.max_rank, shapes=self._shapes)
        rule = job.request["lora"]["publish"]
        for _ in range(TRIES):
            active.check()
            rival = self._current(job.name)
            if rival is not None and rival.label in (job.result.pop(INTENT, None), job.result.get("version")):
                # It was published before the server was ended or the job failed, and is no rival of itself.
                job.result |= {"model": job.name, "version": rival.label}
                active.note(f"It is served already, as {rival.label}.", data={"version": rival.label})
                break
            try:
                verdict, failure = self._judge(active, rival), None
            except UnknownAdapter:
                if self._current(job.name) == rival:
                    raise
                active.note(f"{job.name} was deleted or replaced meanwhile; the result is measured again.")
                continue
            except (*REFUSED, NoRoom) as error:
                if isinstance(error, NoRoom) and rule != "never":  # else it has no room to be served either
                    raise
                verdict, failure = None, error.message
                active.note(f"The result could not be measured: {failure}", level="warn")
            job.result.pop("evaluation", None)
            if verdict is not None:
                job.result["evaluation"] = verdict.told()
                active.note(_words(verdict), data=verdict.told())
            elif failure is None and rival is not None:
                active.note(f"Whether it is better than {rival.label} is not known: give a validation_file.")
            # Before it is published: a job that is ended in between knows its scores no more.
            self._record(job.request["lora"]["task"], Version(job.name, weights.digest), rival, verdict)
            reason = _kept_back(rule, rival, verdict, failure)
            if reason is not None:
                job.result["model"] = None
                active.note(f"Not published: {reason}")
                break
            compared = rule == "if_better"
            job.result[INTENT] = weights.version.label
            active.records.save(job)
            try:
                published = self._registry.publish_now(
                    job.name,
                    folder,
                    source=SOURCE,
                    if_match=rival.label if compared and rival is not None else None,
                    create_only=compared and rival is None,
                )
            except (VersionMismatch, AdapterConflict):
                del job.result[INTENT]
                active.note(f"{job.name} got another version meanwhile; the result is compared with that.")
                continue
            del job.result[INTENT]
            job.result |= {"model": job.name, "version": published.version.label}
            active.note(f"Published as {published.version.label}.", data={"version": published.version.label})
            self._warn_of_route(active)
            break
        else:
            raise JobError("conflict", f"{job.name} got another version at each of {TRIES} tries to publish", "suffix")
        self._leave_files(active, published_=job.result["model"] is not None)

    def _warn_of_route(self, active: ActiveJob) -> None:
        """Whoever asks for a task by the adapter's name would not get the adapter."""
        name = active.job.name
        task = self._tasks.find(name)
        if task is not None and not task.route.allows([(name, 1.0)]):
            active.note(
                f"The task {name} goes by a route that is not this adapter alone: PUT /tasks/{name} changes it, "
                f"and the model adapter:{name} is the adapter itself.",
                level="warn",
            )

    # ---- measuring

    def _judge(self, active: ActiveJob, rival: Version | None) -> Verdict | None:
        """How the result does, on the engine if the data allow it, else by the loss that the training has told."""
        if not (active.folder / JUDGED).exists():
            losses = (active.job.trained or {}).get("losses")
            if not losses:
                return None
            if not math.isfinite(losses[EVALUATED]):
                raise InvalidData(f"its numbers overflow: its loss is {losses[EVALUATED]}")
            # The process knew the version that had the name when it began.
            known = rival is not None and rival.digest == losses.get("rival_digest")
            return Verdict(LOSS, losses["examples"], losses[EVALUATED], losses["rival"] if known else None)
        pairs = of_pairs(data.parse((active.folder / JUDGED).read_bytes(), JUDGED))
        task = self._task(active.job.request)
        metric = default_metric(task) if task is not None else LOSS
        active.note(f"Evaluating {metric} on {len(pairs):,} examples.")
        template = task or Task(OTHER, INPUT, FixedRoute(), format="chat")
        with self._named(active) as name:
            ours = self._score(active, template, name, pairs, metric)
        theirs, value = None, None
        if rival is not None:
            try:
                theirs = self._score(active, template, f"{rival.name}@{rival.digest}", pairs, metric)
                value = theirs.value
            except InvalidRequest as error:  # the result was asked the same: what is at fault is the version
                value = math.nan
                active.note(f"{rival.label} could not be measured: {error.message}", level="warn")
        asked = prompt_fingerprint(template, metric)
        return Verdict(metric, len(pairs), ours.value, value, (ours, theirs), example_ids(pairs), asked)

    def _task(self, request: Mapping[str, Any]) -> Task | None:
        """The task that a result is for: one that is gone is as it was when the job was asked for."""
        name = request["lora"]["task"]
        found = self._tasks.find(name) if name is not None else None
        if found is not None or not request["template"]:
            return found
        return parse(name, request["template"], default_route=FixedRoute(), source="api")

    def _named(self, active: ActiveJob) -> _Named:
        """Raises JobError where the name is somebody's: what is measured under it is taken away again."""
        name = active.job.id
        if name in self._registry.names():
            if name not in self._registry.names(source=SOURCE) or not self._is_left_over(name):
                raise JobError(
                    "name_taken",
                    f"the adapter {name} is called as this job is, whose result is measured under that name: "
                    f"DELETE /adapters/{name}, or publish it under another name, then resume the job",
                )
            self._registry.retire_now(name)
        return _Named(self._registry, name, active.folder)

    def _score(self, active: ActiveJob, task: Task, name: str, pairs: Sequence[Pair], metric: str) -> Score:
        target = Target(task, [(name, 1.0)])
        found = awaited(active, self._evaluate(target, pairs, (metric,), lambda done, total: None))
        if name == active.job.id:  # of the other it is the same
            warn_of_reach(active, found, len(pairs))
        return found.scores[metric]

    def _record(self, task: str | None, version: Version, rival: Version | None, verdict: Verdict | None) -> None:
        """Scores go to the task's records: those of the result, and of what it was compared with."""
        if task is None or verdict is None or verdict.scores is None:
            return
        for whose, score in zip((version, rival), verdict.scores, strict=True):
            if whose is not None and score is not None:
                subject = MixKey.of(task, [(whose, 1.0)], self._base_id)
                values = zip(verdict.examples, shares(score), strict=True)
                self._quality.record_evaluation(subject, score.metric, dict(values), verdict.asked)
        self._reviewed(task)

    def _current(self, name: str) -> Version | None:
        try:
            return self._registry.current(name)
        except UnknownAdapter:
            return None

    # ---- what is left behind

    def _leave_files(self, active: ActiveJob, *, published_: bool) -> None:
        """The losses by step as a file; of an adapter that is not published, its two files too."""
        table = losses_table(active.records.events(active.job.id))
        files: list[str] = []
        try:
            files.append(self._files.add(lambda path: path.write_text(table), f"{active.job.id}.csv", RESULTS).id)
            if not published_:
                for name in (CONFIG_FILE, TENSOR_FILE):
                    files.append(self._files.add(_copier(active.folder / RESULT / name), name, RESULTS).id)
            active.job.result["files"] = files
            active.records.save(active.job)  # before what it was made from goes
        except StoreFailed:
            active.job.result.pop("files", None)
            for id in files:  # which nobody knows of, and which are made anew when the job goes on
                with contextlib.suppress(UnknownName):  # somebody has seen and deleted it
                    self._files.delete(id)
            raise
        shutil.rmtree(active.folder / RESULT, ignore_errors=True)


class _Named:
    """The result, served under the job's name while inside; it brings no task along."""

    def __init__(self, registry: Registry, name: str, folder: Path) -> None:
        self._registry, self._name, self._folder = registry, name, folder

    def __enter__(self) -> str:
        candidate = self._folder / CANDIDATE
        shutil.rmtree(candidate, ignore_errors=True)
        try:
            with refused("a copy of the result"):
                candidate.mkdir()
                for file in (CONFIG_FILE, TENSOR_FILE):
                    shutil.copyfile(self._folder / RESULT / file, candidate / file)
                self._registry.publish_now(self._name, candidate, source=SOURCE, create_only=True)
        finally:
            shutil.rmtree(candidate, ignore_errors=True)
        return self._name

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(UnknownAdapter):  # somebody has deleted it
            self._registry.retire_now(self._name)


def awaited(active: ActiveJob, future: concurrent.futures.Future[Evaluation]) -> Evaluation:
    """The evaluation's outcome. Raises Stopped if the job was asked to end, and what the evaluation raises."""
    active.stopped_by(future.cancel, future.cancel)
    try:
        return future.result()
    except (concurrent.futures.CancelledError, NotReady):
        active.check()
        raise


def warn_of_reach(active: ActiveJob, found: Evaluation, examples: int) -> None:
    """Tell of examples whose expected answer is longer than an answer may be."""
    if found.out_of_reach:
        said = f"{unreachable_note(found.out_of_reach, examples)}."
        active.note(said, level="warn", data={"out_of_reach": found.out_of_reach})


def shares(score: Score) -> list[float]:
    """A score's values as quality records take them, 0 to 1: of a loss, the probability that a token falls short by."""
    return [1.0 - math.exp(-v) for v in score.values] if score.lower_is_better else list(score.values)


def losses_table(events: Sequence[dict[str, Any]]) -> str:
    """Step, losses and accuracies as CSV, with the columns of OpenAI's result files."""
    rows: dict[int, dict[str, float]] = {}
    for event in events:
        if event["type"] == "metrics":
            rows.setdefault(event["data"]["step"], {}).update(event["data"])
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(("step", *CURVES))
    for step, row in sorted(rows.items()):
        writer.writerow((step, *(f"{row[c]:.6g}" if c in row else "" for c in CURVES)))
    return out.getvalue()


def _kept_back(rule: str, rival: Version | None, verdict: Verdict | None, failure: str | None) -> str | None:
    """Why a result is not published, or None if it is. `failure` is why it could not be measured."""
    if rule == "never":
        return "the job asks for that; its files are among the results."
    if rule == "if_better" and rival is not None:
        if failure is not None:
            return f"it could not be compared with {rival.label}."
        if verdict is None:
            return f"there is nothing to compare it with {rival.label} by; give a validation_file."
        if verdict.theirs is None:
            return f"{rival.label} came after the training began, and only the training could compare the two by loss."
        if not verdict.better:
            return f"{rival.label} is at least as good."
    return None


def _words(verdict: Verdict) -> str:
    against = f", against {verdict.theirs:.4f} of the one that it would replace" if verdict.theirs is not None else ""
    return f"{verdict.metric} {verdict.ours:.4f} on {verdict.samples:,} examples{against}."


def _copier(source: Path) -> Callable[[Path], object]:
    return lambda path: shutil.copyfile(source, path)
