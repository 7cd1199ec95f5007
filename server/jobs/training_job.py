"""The work of a training job: run the training process, then evaluate and publish the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from server.jobs.active_job import CLOSING, ActiveJob, JobStopped
from server.jobs.errors import JobError
from server.jobs.job_store import RUNNING
from server.jobs.publisher import Publisher
from server.jobs.training_request import TrainingContext, check_base, worker_spec
from server.jobs.worker_messages import CHECKPOINT, EVALUATED, FAILED, NOTE, STEP, STOPPED, TRAINED, VALIDATED
from server.jobs.worker_process import WorkerProcess

MAX_STEP_EVENTS = 1000
"""About how many training steps of a job become events. Of longer runs, every second, third, ... step does."""
SUMMARY = ("samples", "steps", "tokens", "seconds", "tokens_per_second", "memory")


class TrainingJob:
    """`JobWork` of training jobs.

    Args:
        context: What requests are validated against.
        publisher: Evaluates and publishes results.
        on_training: Called with True when a training process starts and with False when it has ended.
    """

    def __init__(self, context: TrainingContext, publisher: Publisher, on_training: Callable[[bool], None]) -> None:
        self._context, self._publisher, self._on_training = context, publisher, on_training

    def __call__(self, active: ActiveJob) -> None:
        job = active.job
        check_base(job.request["base"], self._context)
        if job.trained is None:
            spec = worker_spec(job.name, job.request, self._context, active.folder)
            replace(spec, created_at=job.created_at).write(active.folder)
            self._train(active)
            active.check_stop()
        active.set_status(RUNNING)
        self._publisher.publish(active)

    def _train(self, active: ActiveJob) -> None:
        process = WorkerProcess(active.folder)
        progress = WorkerProgress(active)
        active.on_stop(process.stop, process.kill)
        self._on_training(True)
        try:
            for message in process.messages():
                progress.handle(message)
        finally:
            process.kill()
            self._on_training(False)
        end = progress.end
        if end is not None and end["kind"] == TRAINED:
            active.job.trained = {k: v for k, v in end.items() if k != "kind"}
            summary = {k: end["training"][k] for k in SUMMARY}
            active.job.result["training"] = {"parameters": end["parameters"], **summary}
            active.job.interrupted = 0
            active.store.save(active.job)
        elif end is not None and end["kind"] == FAILED:
            raise JobError(str(end["code"]), str(end["message"]), end.get("param"))
        elif active.stop_reason is not None or end is not None:
            active.stop_reason = active.stop_reason or CLOSING  # something else stopped the process at a checkpoint
            raise JobStopped
        else:
            raise JobError("process_died", process.exit_message())


class WorkerProgress:
    """Turns the messages of a training process into progress and events of its job.

    Attributes:
        end: The last message, which says how training ended.
    """

    def __init__(self, active: ActiveJob) -> None:
        self._active, self._job = active, active.job
        self.end: dict[str, Any] | None = None
        self._last: dict[str, float] = {}

    def handle(self, message: dict[str, Any]) -> None:
        """Handle one message."""
        kind = message.get("kind")
        if kind == VALIDATED:
            self._validated(message)
        elif kind == STEP:
            self._step(message)
        elif kind == EVALUATED:
            loss = message.get("loss")
            data = {"valid_mean_token_accuracy": message["accuracy"]} | ({} if loss is None else {"valid_loss": loss})
            self._last.update(data)
            shown = "not finite" if loss is None else f"{loss:.4f}"
            self._add_metrics(f"Step {message['step']}/{message['steps']}: validation loss={shown}", message, data)
        elif kind == CHECKPOINT:
            data = {"checkpoint": message["step"], **self._last}
            self._active.add_event(f"Checkpoint at step {message['step']}.", data=data)
            self._job.interrupted = 0
            self._active.store.save(self._job)
        elif kind == NOTE:
            self._active.add_event(str(message["message"]), data=message.get("data"))
        elif kind in (TRAINED, STOPPED, FAILED):
            self.end = message

    def _validated(self, message: dict[str, Any]) -> None:
        self._job.progress.steps = message["steps"]
        text = f"Files are valid: {message['examples']:,} training examples"
        if message["validation_examples"]:
            text += f", {message['validation_examples']:,} validation examples"
            text += " (held out of the training file)" if message["held_out"] else ""
        self._active.add_event(f"{text}; {message['steps']:,} steps.")
        if message["too_long"]:
            text = f"{message['too_long']:,} examples exceed the maximum sequence length and are skipped."
            self._active.add_event(text, level="warn")
        self._active.set_status(RUNNING)

    def _step(self, message: dict[str, Any]) -> None:
        progress = self._job.progress
        progress.step, progress.steps, progress.loss = message["step"], message["steps"], message["loss"]
        progress.tokens, progress.seconds = message["tokens"], message["seconds"]
        progress.counted_tokens = max(progress.counted_tokens, progress.tokens)
        data = {"train_loss": message["loss"], "train_mean_token_accuracy": message["accuracy"]}
        self._last.update(data)
        every = max(1, message["steps"] // MAX_STEP_EVENTS)
        if message["step"] % every == 0 or message["step"] == message["steps"]:
            text = f"Step {message['step']}/{message['steps']}: training loss={message['loss']:.4f}"
            self._add_metrics(text, message, {**data, "learning_rate": message["learning_rate"]})

    def _add_metrics(self, text: str, message: dict[str, Any], data: dict[str, float]) -> None:
        data = {"step": message["step"], "total_steps": message["steps"], **data}
        self._active.add_event(text, type="metrics", data=data)
