"""What the engine remembers of its steps, in a few numbers: counts, seconds, and how many rows a step had.

Written by the engine's thread, read by any; a reader may see a step half counted.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Literal, TypeVar

from adapters.weights import SHORT_DIGEST
from server.engine.batch import ScheduledRequest
from server.engine.step_plan import StepPlan

ROW_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)

FAILING_SECONDS = 10.0
"""How long a failed step counts if none is tried after it: who is told of it sends no request that could show more."""

_NO_PLAN = StepPlan()

T = TypeVar("T")


class StepStats:
    """Totals since the start. `seconds` are those of steps, of which `runner_seconds` were spent in the runner.

    `tell` hears in a line whose steps run from now on, whenever other requests run together than before.
    """

    def __init__(self, tell: Callable[[str], None] = lambda text: None) -> None:
        self._tell = tell
        self._together: list[str] = []
        """Ids of the requests that ran together last."""
        self._prompt = 0
        """Rows of the current step that are of prompts."""
        self.steps = 0
        self.failures = 0
        self.rows = 0
        self.logits = 0
        self.generated = 0
        """Tokens that answers were given: the engine counts them as it delivers."""
        self.prompt = 0
        """Tokens of prompts that were computed."""
        self.seconds = 0.0
        self.last_seconds = 0.0
        self.runner_seconds = 0.0
        self.last_batch = 0
        self.histogram = [0] * (len(ROW_BUCKETS) + 1)
        self._failed: float | None = None
        """When the last step that was tried has failed, if it has."""
        self._began: float | None = None
        self._since = 0.0
        """When the current step began, or an earlier one came to its end within it."""
        self._plan = _NO_PLAN

    def begin(self) -> float:
        """A step is tried from now on; answers the time."""
        self._began = self._since = now = time.monotonic()
        return now

    def nothing(self) -> Literal[False]:
        """There was nothing to run."""
        self._began = None
        return False

    def run(self, plan: StepPlan, runner: Callable[[], T]) -> T:
        """What the runner's part of the step answers, timed."""
        self._plan = plan
        self._prompt = sum(_of_prompt(item) for item in plan.work)
        together = [item.request.id for item in plan.work]
        if together != self._together:
            self._together = together
            self._tell(", ".join(f"{item.request.id}{_digests(item)}" for item in plan.work))
        return self.wait(runner)

    def wait(self, runner: Callable[[], T]) -> T:
        """What the runner answers, timed as its part: of this step, or what it owes of the one before."""
        began = time.monotonic()
        answer = runner()
        self.runner_seconds += time.monotonic() - began
        return answer

    def land(self, plan: StepPlan, read: Callable[[], T]) -> T:
        """What an earlier step still owes. If that fails, or does not end, it is this step that is told of."""
        current, self._plan = self._plan, plan
        answer = self.wait(read)
        self._plan, self._since = current, time.monotonic()
        return answer

    def landed(self) -> Literal[True]:
        """Nothing new was run; what the runner owed has come."""
        assert self._began is not None, "it has begun"
        self.seconds += time.monotonic() - self._began
        self._began = None
        return True

    def end(self) -> Literal[True]:
        """The step is over."""
        plan, began = self._plan, self._began
        assert began is not None, "a step that ends has begun"
        self.steps += 1
        self.rows += plan.tokens
        self.logits += plan.logits
        self.prompt += self._prompt
        self.last_batch = len(plan.work)
        self.histogram[bisect_left(ROW_BUCKETS, plan.tokens)] += 1
        self.last_seconds = time.monotonic() - began
        self.seconds += self.last_seconds
        self._failed = None
        self._began, self._plan = None, _NO_PLAN
        return True

    def failed(self) -> None:
        """The step has raised."""
        self.failures += 1
        self._failed = time.monotonic()
        self._began, self._plan = None, _NO_PLAN

    @property
    def failing(self) -> bool:
        """Whether the last step that was tried has failed, not long ago."""
        failed = self._failed
        return failed is not None and time.monotonic() - failed < FAILING_SECONDS

    @property
    def plan(self) -> StepPlan:
        """The step that runs or is read; one without work if there is none."""
        return self._plan

    def stuck_for(self) -> float:
        """Seconds since the current step began, or an earlier one came to its end within it; 0 between steps."""
        return 0.0 if self._began is None else time.monotonic() - self._since

    def current_step(self) -> str:
        """The current step in a line for the log: its size, its requests and the digests of their adapters."""
        plan = self._plan
        if not plan.work:
            return "no step"
        parts = [f"{item.request.id}[{item.tokens} tokens{_digests(item)}]" for item in plan.work]
        return f"a step of {plan.tokens} rows: {' '.join(parts)}"

    def snapshot(self) -> dict[str, Any]:
        """All of it, as JSON."""
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


def _of_prompt(item: ScheduledRequest) -> int:
    """Its rows that are of its prompt, before it has run."""
    request = item.request
    return max(0, min(item.tokens, len(request.prompt) - request.computed))


def _digests(item: ScheduledRequest) -> str:
    """The adapters of a request, for a line."""
    return "".join(f" {digest[:SHORT_DIGEST]}" for digest in item.request.mix.digests)
