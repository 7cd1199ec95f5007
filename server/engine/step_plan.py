"""`StepPlan`: what the next step is to be, as the scheduler fills it and the engine runs, tells and records it.

Knows no rules: who gets what is the scheduler's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.batch import ScheduledRequest
from server.engine.prefill_budget import PrefillShare
from server.engine.request import Delivery, Request

Ended = list[tuple[Request, Delivery]]


@dataclass
class StepPlan:
    """The next step: its work, the requests that enter for the first time, and those that end without one."""

    work: list[ScheduledRequest] = field(default_factory=list)
    entered: list[Request] = field(default_factory=list)
    ended: Ended = field(default_factory=list)
    most: int = 0
    """Tokens up to which prompts may add to it, and logits."""
    most_logits: int = 0
    tokens: int = 0
    logits: int = 0
    prompts: PrefillShare = field(default_factory=PrefillShare)
    """What prompts have of its time."""
    held: int = 0
    """Tokens that a long prompt is sure to add."""
    whole: int = 0
    """Running requests that compute nothing more: the last token of each is on its way."""
    copied: set[str] = field(default_factory=set)
    """The adapters that are on their way to the device: what uses them now waits for them, with all of the step."""

    def add(self, request: Request, count: int, logits: int) -> None:
        self.work.append(ScheduledRequest(request, count, logits))
        self.tokens += count
        self.logits += logits
