"""`StepStats`: counters and times of the engine's steps. Written by the engine's thread, read by any."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from adapters.weights import SHORT_DIGEST
from server.engine.batch import ScheduledRequest
from server.engine.scheduler_output import SchedulerOutput

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

FAILING_SECONDS = 10.0
"""How long the engine counts as failing after a failed step if no other step runs."""

_NO_STEP = SchedulerOutput()

T = TypeVar("T")


class StepStats:
    """Totals since the start, and the current step.

    `seconds` is the time of all steps, `runner_seconds` the part of it spent in the runner.

    Args:
        on_batch_change: Receives a line with the requests of a step whenever they differ from those of the last.
    """

    def __init__(self, on_batch_change: Callable[[str], None] = lambda text: None) -> None:
        self._on_batch_change = on_batch_change
        self._batch_ids: list[str] = []
        self._prompt_rows = 0
        """Prompt tokens of the current step."""
        self.steps = 0
        self.failures = 0
        self.rows = 0
        self.logits = 0
        self.generated = 0
        """Generated tokens, counted by the engine when it delivers them."""
        self.prompt = 0
        """Computed prompt tokens."""
        self.seconds = 0.0
        self.last_seconds = 0.0
        self.runner_seconds = 0.0
        self.last_batch = 0
        self.histogram = [0] * (len(ROW_BUCKETS) + 1)
        self._failed_at: float | None = None
        self._began: float | None = None
        self._since = 0.0
        """When the current step began, or an earlier one finished within it."""
        self._current = _NO_STEP

    def begin(self) -> float:
        """A step begins. Returns the time."""
        self._began = self._since = now = time.monotonic()
        return now

    def cancel(self) -> Literal[False]:
        """There was nothing to run."""
        self._began = None
        return False

    def run(self, step: SchedulerOutput, runner: Callable[[], T]) -> T:
        """Call the runner for a new step, timed."""
        self._current = step
        self._prompt_rows = sum(_prompt_rows(item) for item in step.scheduled)
        ids = [item.request.id for item in step.scheduled]
        if ids != self._batch_ids:
            self._batch_ids = ids
            self._on_batch_change(", ".join(f"{item.request.id}{_digests(item)}" for item in step.scheduled))
        return self.wait(runner)

    def wait(self, runner: Callable[[], T]) -> T:
        """Call the runner, and count the time as the runner's."""
        began = time.monotonic()
        result = runner()
        self.runner_seconds += time.monotonic() - began
        return result

    def wait_for_previous(self, step: SchedulerOutput, read: Callable[[], T]) -> T:
        """Wait for an earlier step. If this fails or hangs, `current_step` names the earlier step."""
        current, self._current = self._current, step
        result = self.wait(read)
        self._current, self._since = current, time.monotonic()
        return result

    def end_previous(self) -> Literal[True]:
        """An earlier step was completed, and no new one was started."""
        assert self._began is not None, "begin comes first"
        self.seconds += time.monotonic() - self._began
        self._began = None
        return True

    def end(self) -> Literal[True]:
        """The step has ended."""
        step, began = self._current, self._began
        assert began is not None, "begin comes first"
        self.steps += 1
        self.rows += step.num_tokens
        self.logits += step.num_logits
        self.prompt += self._prompt_rows
        self.last_batch = len(step.scheduled)
        self.histogram[bisect_left(ROW_BUCKETS, step.num_tokens)] += 1
        self.last_seconds = time.monotonic() - began
        self.seconds += self.last_seconds
        self._failed_at = None
        self._began, self._current = None, _NO_STEP
        return True

    def fail(self) -> None:
        """The step has raised an error."""
        self.failures += 1
        self._failed_at = time.monotonic()
        self._began, self._current = None, _NO_STEP

    @property
    def failing(self) -> bool:
        """Whether the last step failed, not long ago."""
        failed_at = self._failed_at
        return failed_at is not None and time.monotonic() - failed_at < FAILING_SECONDS

    @property
    def current(self) -> SchedulerOutput:
        """The step that runs or is read. Empty between steps."""
        return self._current

    def stuck_for(self) -> float:
        """Seconds since the current step began, or an earlier one finished within it. 0 between steps."""
        return 0.0 if self._began is None else time.monotonic() - self._since

    def current_step(self) -> str:
        """Describe the current step for the log: its size, requests and adapters."""
        step = self._current
        if not step.scheduled:
            return "no step"
        parts = [f"{item.request.id}[{item.tokens} tokens{_digests(item)}]" for item in step.scheduled]
        return f"a step of {step.num_tokens} rows: {' '.join(parts)}"

    def snapshot(self) -> dict[str, Any]:
        """Return the totals as JSON."""
        return {
            "steps": self.steps,
            "failures": self.failures,
            "rows": self.rows,
            "logits": self.logits,
            "generated": self.generated,
            "prompt": self.prompt,
            "last_batch": self.last_batch,
            "seconds": self.seconds,
            "runner_seconds": self.runner_seconds,
            "outside_seconds": self.seconds - self.runner_seconds,
            "batch_rows": {"buckets": list(ROW_BUCKETS), "counts": list(self.histogram), "sum": self.rows},
        }


def _prompt_rows(item: ScheduledRequest) -> int:
    request = item.request
    return max(0, min(item.tokens, len(request.prompt) - request.computed))


def _digests(item: ScheduledRequest) -> str:
    return "".join(f" {digest[:SHORT_DIGEST]}" for digest in item.request.mix.digests)
