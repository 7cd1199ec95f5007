"""A running generation: its replies as they arrive, its usage and timings, and its record for metrics."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from adapters.leases import Lease
from adapters.weights import Version, is_nonzero
from server.engine.request import Delivery, Request, Sampling, TokenLogprob
from server.metrics import RequestRecord
from server.tasks.delivery import DeliveryInbox
from server.tasks.resolve import Target

if TYPE_CHECKING:
    from server.engine.engine import Engine


@dataclass(frozen=True)
class Caller:
    """Who sends a request and its terms.

    Attributes:
        tenant: id of the key.
        deadline: in `time.monotonic()` seconds.
        priority: lower values run first.
        arrived: start of all latencies, before prompts are tokenized.
        client: False for evaluations, which have no limits and stay out of the latency metrics.
    """

    tenant: str = ""
    deadline: float = math.inf
    priority: int = 0
    arrived: float = field(default_factory=time.monotonic)
    client: bool = True


@dataclass(eq=False)
class Reply:
    """One sequence as it grows. `tokens` counts those that have arrived."""

    request: Request
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None

    def add(self, delivery: Delivery) -> None:
        self.tokens += len(delivery.tokens)
        if delivery.text:
            self.text.append(delivery.text)
        if delivery.logprobs:
            self.logprobs.extend(delivery.logprobs)
        if delivery.finish_reason is not None:
            self.finish_reason, self.error = delivery.finish_reason, delivery.error


class Generation:
    """The sequences of one call. Read `steps()` or `finished()`; call `cancel()` if nobody reads any more.

    Attributes:
        replies: one for each sequence.
        labels: of a classification, what the replies score.
        answers: number of consecutive replies to the same prompt.
        status: HTTP status or "cancelled"; empty while it runs.
        open_replies: replies that have not finished.
        only_ends: the reader waits for the end and is not woken for each step.
    """

    def __init__(self, id: str, target: Target, lease: Lease, caller: Caller, engine: Engine) -> None:
        self.id = id
        self.target = target
        self.caller = caller
        self.lease = lease
        self.versions: list[tuple[Version, float]] = list(lease.versions)
        self.replies: list[Reply] = []
        self.labels: tuple[str, ...] = ()
        self.answers = 1
        self.status = ""
        self.inbox = DeliveryInbox()
        self.only_ends = False
        self.open_replies = 0
        self._engine = engine

    async def steps(self) -> AsyncIterator[list[tuple[int, Delivery]]]:
        """Deliveries as (reply index, delivery) until all replies have finished. Raises the first error."""
        left = len(self.replies)
        while left:
            deliveries: list[tuple[int, Delivery]] = await self.inbox.take()
            for _, delivery in deliveries:
                if delivery.finish_reason is not None:
                    left -= 1
                if delivery.error is not None:
                    self.cancel()
                    raise delivery.error
            yield deliveries

    async def finished(self) -> None:
        """Wait until all replies have finished. Raises the first error."""
        self.only_ends = True
        async for _ in self.steps():
            continue

    def cancel(self) -> None:
        """Stop replies that still run. Idempotent. The engine frees their memory at its next step."""
        for reply in self.replies:
            if reply.finish_reason is None:
                self._engine.cancel(reply.request.id)

    @property
    def cancelled(self) -> bool:
        return any(reply.finish_reason == "cancelled" for reply in self.replies)

    def scores(self) -> dict[str, float]:
        """Probability of each label: softmax over the sums of its log-probabilities."""
        sums = [sum(token.logprob for token in reply.logprobs) for reply in self.replies]
        weights = [math.exp(x - max(sums)) for x in sums]
        return {label: weight / sum(weights) for label, weight in zip(self.labels, weights, strict=True)}

    def answer_text(self) -> str:
        """The text of the first reply, or the best label of a classification."""
        if self.labels:
            scores = self.scores()
            return max(scores, key=scores.__getitem__)
        return "".join(self.replies[0].text)

    def usage(self) -> dict[str, int]:
        """Tokens so far. A prompt with several answers counts once."""
        firsts = [reply.request for reply in self.replies[:: self.answers]]
        prompt = sum(len(request.prompt) for request in firsts)
        completion = sum(len(r.request.output) if r.finish_reason is not None else r.tokens for r in self.replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "cached_tokens": sum(request.cached for request in firsts),
        }


def request_record(generation: Generation) -> RequestRecord:
    """The metrics record of a finished generation, from the engine's timestamps."""
    requests = [reply.request for reply in generation.replies]
    task = generation.target.task
    return RequestRecord(
        task=task.name if task else None,
        adapters=tuple(version.name for version, weight in generation.versions if is_nonzero(weight)),
        status=generation.status,
        submitted=generation.caller.arrived if generation.caller.client else min(r.submitted for r in requests),
        admitted=_earliest(r.admitted for r in requests),
        first_token=_earliest(r.first_token for r in requests),
        finished=max(r.finished for r in requests),
        prompt_tokens=sum(len(r.prompt) for r in requests[:: generation.answers] if not math.isnan(r.admitted)),
        generated_tokens=sum(len(r.output) for r in requests),
        longest=max(len(r.output) for r in requests),
        tpot=_time_per_output_token(requests),
        latency=generation.caller.client,
        custom_mix=generation.target.custom_mix,
    )


def _time_per_output_token(requests: Sequence[Request]) -> float:
    """Mean seconds between two tokens of one sequence; nan without two tokens."""
    several = [r for r in requests if len(r.output) > 1]
    tokens = sum(len(r.output) - 1 for r in several)
    return sum(r.finished - r.first_token for r in several) / tokens if tokens else math.nan


def timings(generation: Generation) -> dict[str, float]:
    """The `timings` of an answer. Without a first token or step, the time until the end counts as waiting for it."""
    record = request_record(generation)
    load = max(reply.request.load_seconds for reply in generation.replies)
    total = record.finished - record.submitted
    admitted, first_token = (record.finished if math.isnan(t) else t for t in (record.admitted, record.first_token))
    ttft = first_token - record.submitted
    seconds = total - ttft if record.longest > 1 else total
    tokens = record.longest - 1 if record.longest > 1 else record.longest
    return {
        "queue_ms": _ms(admitted - record.submitted - load),
        "load_ms": _ms(load),
        "ttft_ms": _ms(ttft),
        "total_ms": _ms(total),
        "tokens_per_second": round(tokens / seconds, 1) if seconds > 0 else 0.0,
    }


def samplings_per_choice(sampling: Sampling, n: int) -> list[Sampling]:
    """Samplings of `n` answers to one prompt. Each gets its own seed, derived from the given one."""
    if sampling.seed is None or n == 1:
        return [sampling] * n
    return [replace(sampling, seed=(sampling.seed + i * 0x9E3779B97F4A7C15) % (1 << 63)) for i in range(n)]


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def _earliest(times: Iterable[float]) -> float:
    return min((t for t in times if not math.isnan(t)), default=math.nan)


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 2)
