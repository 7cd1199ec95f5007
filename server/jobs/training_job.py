"""The work of a training job: the process that trains, then evaluation and publishing.

Owns what the process tells and how it becomes progress and events.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from server.jobs.errors import JobError
from server.jobs.job_store import RUNNING
from server.jobs.publisher import Publisher
from server.jobs.requests import TrainingContext, check_base, spec_of
from server.jobs.runner import CLOSING, ActiveJob, JobStopped
from server.jobs.worker import AGAIN
from server.jobs.worker_messages import (
    CHECKPOINT,
    EVALUATED,
    FAILED,
    NOTE,
    STEP,
    STOPPED,
    TRAINED,
    VALIDATED,
    WorkerSpec,
)
from server.jobs.worker_process import WorkerProcess

METRIC_EVENTS = 1000
"""Events of single steps that a job may have, about; of a longer one every second, or third, ... is told."""


class TrainingJob:
    """`Work` for training jobs. `lend` hears whether a process trains, to which processors may be lent."""

    def __init__(self, ground: TrainingContext, publishing: Publisher, lend: Callable[[bool], None]) -> None:
        self._ground, self._publishing, self._lend = ground, publishing, lend

    def __call__(self, active: ActiveJob) -> None:
        job = active.job
        if "template" not in job.request:
            raise JobError("older_version", "a version of the server asked for it that did not keep its task: ask anew")
        if (base := job.request.get("base")) is not None:  # requests of before 2026-12-02 have none
            check_base(base["name"], base["id"], self._ground)
        if job.trained is None:
            spec = spec_of(job.name, job.request, self._ground, active.folder)
            spec = replace(spec, created_at=job.created_at)
            spec.write(active.folder)
            self._train(active)
            active.check()
        else:
            # As it was trained by: its files may be gone since. The bound is that of the server that publishes.
            spec = replace(WorkerSpec.read(active.folder), max_rank=self._ground.max_rank)
            check_base(spec.base.name, spec.base.id, self._ground)
        active.become(RUNNING)
        self._publishing.publish(active, spec)

    def _train(self, active: ActiveJob) -> None:
        process = WorkerProcess(active.folder)
        heard = _Heard(active)
        active.stopped_by(process.stop, process.kill)
        self._lend(True)
        try:
            for line in process.lines():
                heard.line(line)
        finally:
            process.kill()
            self._lend(False)
        end = heard.end
        if end is not None and end["kind"] == TRAINED:
            active.job.trained = {k: v for k, v in end.items() if k != "kind"}
            made = end["made"]
            shown = {k: made[k] for k in ("samples", "steps", "tokens", "seconds", "tokens_per_second", "memory")}
            active.job.result["training"] = {"parameters": end["parameters"], **shown}
            active.job.interrupted = 0
            active.records.save(active.job)
        elif end is not None and end["kind"] == FAILED:
            raise JobError(str(end["code"]), str(end["message"]), end.get("param"))
        elif active.wanted is not None or (end is not None and end["kind"] == STOPPED):
            active.wanted = active.wanted or CLOSING  # somebody else has stopped the process, at a checkpoint
            raise JobStopped
        else:
            raise JobError("process_died", process.how_it_ended())


class _Heard:
    """Turns what the process tells into progress and events."""

    def __init__(self, active: ActiveJob) -> None:
        self._active, self._job = active, active.job
        self.end: dict[str, Any] | None = None
        self._last: dict[str, float] = {}
        self._before: set[tuple[str, int]] | None = None
        """What was told of the job when this process began, where that has been asked."""

    def line(self, told: dict[str, Any]) -> None:
        kind = told.get("kind")
        if told.get(AGAIN) and (kind, told["step"]) in self._known():
            return
        if kind == VALIDATED:
            self._validated(told)
        elif kind == STEP:
            self._step(told)
        elif kind == EVALUATED:
            loss = told.get("loss", math.nan)  # JSON has no NaN: a loss that is none is not there
            data = {"valid_mean_token_accuracy": told["accuracy"]} | ({} if math.isnan(loss) else {"valid_loss": loss})
            self._last.update(data)
            self._metrics(f"Step {told['step']}/{told['steps']}: validation loss={loss:.4f}", told, data)
        elif kind == CHECKPOINT:
            data = {"checkpoint": told["step"], **self._last}
            self._active.note(f"Checkpoint at step {told['step']}.", data=data)
            self._job.interrupted = 0
            self._active.records.save(self._job)
        elif kind == NOTE:
            self._active.note(str(told["message"]), data=told.get("data"))
        elif kind in (TRAINED, STOPPED, FAILED):
            self.end = told

    def _known(self) -> set[tuple[str, int]]:
        """The lines, by kind and step, that became events before: a server that was killed had heard them."""
        if self._before is None:
            told = [event.get("data", {}) for event in self._active.records.events(self._job.id)]
            self._before = {
                (kind, data[place])
                for data in told
                for kind, place, sign in (
                    (STEP, "step", "train_loss"),
                    (EVALUATED, "step", "valid_mean_token_accuracy"),
                    (CHECKPOINT, "checkpoint", "checkpoint"),
                )
                if place in data and sign in data
            }
        return self._before

    def _validated(self, told: dict[str, Any]) -> None:
        self._job.progress.steps = told["steps"]
        said = f"Files are valid: {told['examples']:,} examples to learn"
        if told["validation_examples"]:
            said += f", {told['validation_examples']:,} to validate on"
            said += " (held out of the training file)" if told["held_out"] else ""
        self._active.note(f"{said}; {told['steps']:,} steps.")
        if told["too_long"]:
            self._active.note(f"{told['too_long']:,} examples are longer than a sequence may be and are left out.",
                              level="warn")  # fmt: skip
        self._active.become(RUNNING)

    def _step(self, told: dict[str, Any]) -> None:
        progress = self._job.progress
        progress.step, progress.steps, progress.loss = told["step"], told["steps"], told["loss"]
        progress.tokens, progress.seconds = told["tokens"], told["seconds"]
        progress.most_tokens = max(progress.most_tokens, progress.tokens)
        data = {"train_loss": told["loss"], "train_mean_token_accuracy": told["accuracy"]}
        data["learning_rate"], self._last["train_loss"] = told["learning_rate"], told["loss"]
        self._last["train_mean_token_accuracy"] = told["accuracy"]
        every = max(1, told["steps"] // METRIC_EVENTS)
        if told["step"] % every == 0 or told["step"] == told["steps"]:
            self._metrics(f"Step {told['step']}/{told['steps']}: training loss={told['loss']:.4f}", told, data)

    def _metrics(self, message: str, told: dict[str, Any], data: dict[str, float]) -> None:
        self._active.note(message, type="metrics", data={"step": told["step"], "total_steps": told["steps"], **data})
