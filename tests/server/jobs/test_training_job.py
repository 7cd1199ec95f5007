"""How messages of the training process become progress and events, and how its end ends the job."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.jobs import training_job
from server.jobs.active_job import ActiveJob, JobStopped
from server.jobs.errors import JobError
from server.jobs.job_store import JobStore
from server.jobs.training_job import SUMMARY, TrainingJob, WorkerProgress

NOTHING: Any = None


def step(number: int, steps: int = 9, **fields: Any) -> dict[str, Any]:
    values = {"tokens": 10 * number, "seconds": 2.0 * number, "loss": 1.5, "accuracy": 0.5, "learning_rate": 1e-4}
    return {"kind": "step", "step": number, "steps": steps, **values, **fields}


def handled(active: ActiveJob, *messages: dict[str, Any]) -> list[dict[str, Any]]:
    """The events of these messages."""
    progress = WorkerProgress(active)
    for message in messages:
        progress.handle(message)
    return active.store.events(active.job.id)


def test_events_of_a_training_run(active: ActiveJob) -> None:
    validated, skipped, stepped, evaluated, kept, noted = handled(
        active,
        {"kind": "validated", "examples": 7, "validation_examples": 2, "held_out": 2, "too_long": 3, "steps": 9},
        step(1),
        {"kind": "eval", "step": 1, "steps": 9, "loss": 2.0, "accuracy": 0.25},
        {"kind": "checkpoint", "step": 1},
        {"kind": "note", "message": "so", "data": {"error": 0.5}},
    )
    assert validated["message"] == (
        "Files are valid: 7 training examples, 2 validation examples (held out of the training file); 9 steps."
    )
    assert skipped["level"] == "warn" and skipped["message"].startswith("3 examples exceed")
    losses = {"train_loss": 1.5, "train_mean_token_accuracy": 0.5}
    assert stepped["data"] == {"step": 1, "total_steps": 9, **losses, "learning_rate": 1e-4}
    scores = {"valid_loss": 2.0, "valid_mean_token_accuracy": 0.25}
    assert evaluated["data"] == {"step": 1, "total_steps": 9, **scores}
    assert [event["type"] for event in (stepped, evaluated, kept)] == ["metrics", "metrics", "message"]
    assert kept["data"] == {"checkpoint": 1, **losses, **scores}
    assert (noted["message"], noted["data"]) == ("so", {"error": 0.5})
    assert active.job.status == "running" and active.job.progress.steps == 9


def test_a_validation_loss_that_is_not_finite_is_left_out(active: ActiveJob) -> None:
    evaluated, kept = handled(
        active,
        {"kind": "eval", "step": 3, "steps": 9, "accuracy": 0.5, "loss": None},
        {"kind": "checkpoint", "step": 3},
    )
    assert evaluated["data"] == {"step": 3, "total_steps": 9, "valid_mean_token_accuracy": 0.5}
    assert kept["data"] == {"checkpoint": 3, "valid_mean_token_accuracy": 0.5}


def test_a_long_run_has_events_for_some_steps_and_the_last(active: ActiveJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.jobs.training_job.MAX_STEP_EVENTS", 4)
    events = handled(active, *(step(number, 11) for number in range(1, 12)))
    assert [event["data"]["step"] for event in events] == [2, 4, 6, 8, 10, 11]
    progress = active.job.progress
    assert (progress.step, progress.tokens, progress.seconds) == (11, 110, 22.0)


def test_a_checkpoint_stores_progress_and_ends_the_count_of_interruptions(
    active: ActiveJob, open_store: Callable[[], JobStore]
) -> None:
    active.job.interrupted = 2
    handled(active, step(3))
    assert active.job.interrupted == 2
    handled(active, {"kind": "checkpoint", "step": 3})
    stored = open_store().jobs[active.job.id]
    assert (stored.progress.step, stored.interrupted) == (3, 0)


def test_the_token_counter_never_falls_when_a_run_resumes(active: ActiveJob) -> None:
    handled(active, step(5), step(3))
    assert (active.job.progress.tokens, active.job.progress.counted_tokens) == (30, 50)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        ({"kind": "failed", "code": "bad", "message": "the reason", "param": "lora.r"}, ("bad", "lora.r")),
        (None, ("process_died", None)),
        ({"kind": "stopped"}, None),
        ({"kind": "trained", "parameters": 1, "training": dict.fromkeys(SUMMARY, 1), "losses": {}}, ()),
    ],
)
def test_how_the_end_of_the_process_ends_the_work(
    active: ActiveJob,
    open_store: Callable[[], JobStore],
    monkeypatch: pytest.MonkeyPatch,
    end: dict[str, Any] | None,
    error: tuple[Any, ...] | None,
) -> None:
    happened: list[Any] = []

    class Process:
        def __init__(self, folder: Path) -> None:
            pass

        def messages(self) -> list[dict[str, Any]]:
            happened.append("trains")
            return [] if end is None else [end]

        def stop(self) -> None:
            pass

        def kill(self) -> None:
            happened.append("killed")

        def exit_message(self) -> str:
            return "it died"

    monkeypatch.setattr(training_job, "WorkerProcess", Process)
    active.job.interrupted = 2
    work = TrainingJob(NOTHING, NOTHING, happened.append)
    if error == ():
        work._train(active)
        stored = open_store().jobs[active.job.id]
        assert stored.interrupted == 0 and stored.trained == {k: v for k, v in (end or {}).items() if k != "kind"}
        assert stored.result["training"] == {"parameters": 1, **dict.fromkeys(SUMMARY, 1)}
    elif error is None:
        with pytest.raises(JobStopped):
            work._train(active)
        assert active.stop_reason == "closing"
    else:
        with pytest.raises(JobError) as failure:
            work._train(active)
        assert (failure.value.code, failure.value.param) == error
    assert happened == [True, "trains", "killed", False]
