"""`Comparison`: the scores of a result against the current version of its name, and the rule for publishing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import InvalidData
from adapters.weights import Version
from server.jobs.worker_messages import EVALUATED
from server.tasks.scores import LOSS, Score


@dataclass(frozen=True)
class Comparison:
    """The scores of a result and of the current version of its name.

    Attributes:
        current: None if there is no current version, or its score is unknown. NaN if it cannot be evaluated.
        scores: Both scores by example, if they are from the engine.
        examples: Identities of the examples.
        prompt_digest: What both were prompted with; see `prompt_fingerprint`.
    """

    metric: str
    samples: int
    result: float
    current: float | None
    scores: tuple[Score, Score | None] | None = None
    examples: Sequence[str] = ()
    prompt_digest: str = ""

    @property
    def better(self) -> bool:
        """Whether the result is strictly better. Anything is better than a version that cannot be evaluated."""
        if self.current is None:
            return False
        if math.isnan(self.current):
            return True
        return self.result < self.current if self.metric == LOSS else self.result > self.current

    def as_json(self) -> dict[str, Any]:
        current = self.current if self.current is not None and math.isfinite(self.current) else None
        return {"metric": self.metric, "samples": self.samples, "score": self.result, "replaced": current}

    def __str__(self) -> str:
        against = f"; the current version has {self.current:.4f}" if self.current is not None else ""
        return f"{self.metric} {self.result:.4f} on {self.samples:,} examples{against}."


def compare_losses(losses: Mapping[str, Any] | None, current: Version | None) -> Comparison | None:
    """The losses that the training process reported. None stands for a loss that is not finite."""
    if not losses:
        return None
    if losses[EVALUATED] is None:
        raise InvalidData("its validation loss is not finite")
    # The process compared with the version that was current when it started.
    known = current is not None and current.digest == losses.get("replaced_digest")
    theirs = None if not known else math.nan if losses["replaced"] is None else losses["replaced"]
    return Comparison(LOSS, losses["examples"], losses[EVALUATED], theirs)


def reason_to_withhold(
    rule: str, current: Version | None, comparison: Comparison | None, failure: str | None
) -> str | None:
    """Why a result is not published, or None. `failure` is why it could not be evaluated."""
    if rule == "never":
        return "the job has publish=never; the adapter is among its result files."
    if rule == "if_better" and current is not None:
        if failure is not None:
            return f"it could not be compared with {current.label}."
        if comparison is None:
            return f"it could not be compared with {current.label}, because there is no validation_file."
        if comparison.current is None:
            return f"{current.label} was published after training began, so there is no loss to compare with."
        if not comparison.better:
            return f"{current.label} is at least as good."
    return None
