"""`SchedulerOutput`: the work of one step, filled by the scheduler and executed by the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from server.engine.batch import ScheduledRequest
from server.engine.prefill_budget import PrefillLoad
from server.engine.request import Delivery, Request


@dataclass
class SchedulerOutput:
    """One step: what is computed for which request, and which requests were admitted or have ended."""

    scheduled: list[ScheduledRequest] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    """Requests admitted for the first time."""
    ended: list[tuple[Request, Delivery]] = field(default_factory=list)
    """Requests that ended without a step, such as by a deadline, with their last delivery."""
    max_tokens: int = 0
    """Token limit of the step. Decodes may exceed it, prefills not."""
    max_logits: int = 0
    num_tokens: int = 0
    num_logits: int = 0
    prefill: PrefillLoad = field(default_factory=PrefillLoad)
    """Prefill tokens of the step by depth."""
    reserved: int = 0
    """Tokens reserved for the oldest long prompt."""
    finishing: int = 0
    """Running requests without work in this step, because their last token is being computed."""
    copying: set[str] = field(default_factory=set)
    """Digests of adapters that are being copied to the device. Requests that use them wait for the next step."""

    def add(self, request: Request, tokens: int, logits: int) -> None:
        self.scheduled.append(ScheduledRequest(request, tokens, logits))
        self.num_tokens += tokens
        self.num_logits += logits
