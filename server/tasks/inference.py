"""Runs prompts on the engine for a target: lease, request, deliveries, release, record.

`Inference.start` makes a `Generation`, the sequences of one call that share a mix. Whatever becomes of its reader, the
lease is released and the metrics are written when the engine has delivered the last word on each reply.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from adapters.leases import Lease
from adapters.weights import Choice, Mix, Version, is_nonzero
from server.engine.request import Constraint, Delivery, Request, Sampling, TokenLogprob
from server.errors import SHUTTING_DOWN, InvalidRequest, NotFinite, NotReady, QueueFull
from server.metrics import Metrics, RequestRecord
from server.tasks.admission import Admission
from server.tasks.delivery import DeliveryInbox, EventLoopDelivery
from server.tasks.resolve import Target

log = logging.getLogger(__name__)


class Engine(Protocol):
    """What running a prompt asks of the engine."""

    def check_call(self, requests: int, tokens: int = 0) -> None: ...

    def check_mix(self, mix: Mix) -> None: ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> None: ...


class Leases(Protocol):
    """What running a prompt asks of the registry."""

    def lease(self, choice: Choice) -> Lease: ...

    def mix(self, choice: Choice) -> Mix: ...

    def check_room(self, mix: Mix) -> None: ...


@dataclass(frozen=True)
class Caller:
    """Who asks and on what terms. `deadline` is in `time.monotonic()` seconds."""

    tenant: str = ""
    deadline: float = math.inf
    priority: int = 0
    arrived: float = field(default_factory=time.monotonic)
    """When, from which latencies count: before prompts are tokenized and schemas compiled."""
    client: bool = True
    """False for the server's own traffic, evaluations: in no latency record, and under no limit of a key or a task."""


@dataclass(eq=False)
class Reply:
    """One answer as it grows."""

    request: Request
    text: list[str] = field(default_factory=list)
    tokens: int = 0
    """Those that have arrived: its request may have more, and such as are not known yet."""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: str | None = None
    error: Exception | None = None


class Generation:
    """The sequences of one call. Read `steps()` or `finished()`; `cancel()` when nobody listens any more."""

    def __init__(self, id: str, target: Target, lease: Lease, caller: Caller, engine: Engine) -> None:
        self.id = id
        self.target = target
        self.caller = caller
        self.versions: list[tuple[Version, float]] = list(lease.versions)
        self.replies: list[Reply] = []
        self.labels: tuple[str, ...] = ()
        """Of a classification: what its replies score, in their order."""
        self.answers = 1
        """How many replies in a row answer the same prompt."""
        self.status = ""
        """The HTTP status that was recorded, or "cancelled"; empty while it runs."""
        self.inbox = DeliveryInbox()
        self.whole = False
        """Nobody reads the steps: the reader is woken for the ends alone."""
        self._lease = lease
        self._engine = engine
        self._open = 0

    async def steps(self) -> AsyncIterator[list[tuple[int, Delivery]]]:
        """What has arrived, as (sequence, delivery), until all sequences have ended. Raises the first error."""
        left = len(self.replies)
        while left:
            arrived: list[tuple[int, Delivery]] = await self.inbox.take()
            for _, delivery in arrived:
                if delivery.finish_reason is not None:
                    left -= 1
                if delivery.error is not None:
                    self.cancel()
                    raise delivery.error
            yield arrived

    async def finished(self) -> None:
        """Wait until all sequences have ended, without waking for every token. Raises the first error."""
        self.whole = True
        async for _ in self.steps():
            continue

    def cancel(self) -> None:
        """Stop what still runs. Idempotent; leases, blocks and slots return when the engine has let go."""
        for reply in self.replies:
            if reply.finish_reason is None:
                self._engine.cancel(reply.request.id)

    @property
    def cancelled(self) -> bool:
        return any(s.finish_reason == "cancelled" for s in self.replies)

    def scores(self) -> dict[str, float]:
        """A classification's probabilities: softmax over each label's sum of log-probabilities."""
        sums = [sum(token.logprob for token in reply.logprobs) for reply in self.replies]
        weights = [math.exp(x - max(sums)) for x in sums]
        return {label: weight / sum(weights) for label, weight in zip(self.labels, weights, strict=True)}

    def answer_text(self) -> str:
        """The first answer's text; a classification's best label."""
        if self.labels:
            scores = self.scores()
            return max(scores, key=scores.__getitem__)
        return "".join(self.replies[0].text)

    def usage(self) -> dict[str, int]:
        """Tokens of the call so far. A prompt that has several answers is_nonzero once."""
        firsts = [reply.request for reply in self.replies[:: self.answers]]
        prompt = sum(len(request.prompt) for request in firsts)
        completion = sum(len(s.request.output) if s.finish_reason is not None else s.tokens for s in self.replies)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "cached_tokens": sum(request.cached for request in firsts),
        }


class Inference:
    """Starts generations. `status_of` tells the HTTP status of an error, for the record."""

    def __init__(
        self,
        engine: Engine,
        leases: Leases,
        metrics: Metrics,
        mailbox: EventLoopDelivery,
        status_of: Callable[[Exception], int],
    ) -> None:
        self.engine = engine
        self.on_ended: Callable[[Generation], None] = lambda generation: None
        """Called on the loop's thread once a generation has ended and been recorded."""
        self.live: set[Generation] = set()
        self.admission = Admission()
        self.leases = leases
        self._metrics = metrics
        self._mailbox = mailbox
        self._status_of = status_of
        self._cut = False

    def abort_client_requests(self) -> None:
        """End what clients wait for, and begin nothing more for them: what is still being prepared would come too late
        to be told so. On the loop's thread.

        A job's generations end with the job, which goes on when the server starts again.
        """
        self._cut = True
        for generation in list(self.live):
            if generation.caller.client:
                generation.cancel()

    def check(self, target: Target, caller: Caller) -> None:
        """Before anything is worked out for a call: raises QueueFull where it is over a limit of its key or task, what
        `lease` does, and NoCapacity for a mix that the engine could never have."""
        self.admission.check(caller.tenant, target.task.name if target.task else None)
        if target.held is None:
            self.engine.check_mix(self.leases.mix(target.choice))

    def lease(self, target: Target) -> Lease:
        """A lease of what is to answer. Raises UnknownAdapter, InvalidChoice, NoRoom."""
        return self.leases.lease(target.choice) if target.held is None else target.held.clone()

    def start(
        self,
        target: Target,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        caller: Caller,
        *,
        id: str = "",
        answers: int = 1,
        scored: Sequence[int] = (),
        labels: Sequence[str] = (),
        constraints: Sequence[Constraint] = (),
    ) -> Generation:
        """Submit one sequence per prompt, all on one lease. On the loop's thread.

        `answers` sequences in a row have the same prompt; `scored` and `labels` are those of label scoring;
        `constraints` are one for each sequence, or none at all.
        Raises UnknownAdapter, InvalidChoice, NoRoom, QueueFull, NotReady, NoCapacity; nothing runs then.
        """
        task = target.task.name if target.task else None
        try:
            if caller.client:
                if self._cut:
                    raise NotReady(SHUTTING_DOWN, retry_after=2.0)
                self.admission.enter(caller.tenant, task)
        except Exception as error:
            self.record_rejection(target, error, caller)
            raise
        try:
            self.engine.check_call(len(prompts), sum(map(len, prompts)))
            lease = self.lease(target)
        except Exception as error:
            self._left(target, caller)
            self.record_rejection(target, error, caller)
            raise
        generation = Generation(id or new_id("gen"), target, lease, caller, self.engine)
        generation.answers = answers
        generation.labels = tuple(labels)
        fair_key = self._fair_key(target, lease, caller)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            request = Request(
                id=f"{generation.id}.{index}",
                prompt=tuple(prompt),
                sampling=sampling,
                deliver=self._delivery(generation, index),
                mix=lease.mix,
                check_fits=lambda: self.leases.check_room(lease.mix),
                fair_key=fair_key,
                tenant=caller.tenant,
                priority=caller.priority,
                deadline=caller.deadline,
                scored=scored[index] if scored else 0,
                constraint=constraints[index] if constraints else None,
            )
            generation.replies.append(Reply(request))
        self._submit(generation, lease)
        return generation

    @staticmethod
    def _fair_key(target: Target, lease: Lease, caller: Caller) -> str:
        """What the queue is fair between. Of a client that mixes anew each time no mix would be like another, and each
        have a turn of its own.
        """
        if target.task is not None:
            return target.task.name
        return f"mixes of {caller.tenant}" if target.custom_mix else "+".join(lease.mix.digests)

    def record_rejection(self, target: Target | None, error: Exception, caller: Caller) -> None:
        """Record a call of a client's that never ran. Names that were not found are its words, and no labels."""
        self._never_ran(target, str(self._status_of(error)), caller)

    def record_disconnect(self, target: Target | None, caller: Caller) -> None:
        """Record a call whose client left before it ran."""
        self._never_ran(target, "cancelled", caller)

    def _never_ran(self, target: Target | None, status: str, caller: Caller) -> None:
        if not caller.client:
            return
        self._metrics.record(
            RequestRecord(
                task=target.task.name if target and target.task else None,
                adapters=_names(target.choice) if target else (),
                status=status,
                known=target is not None and status != "404",
                custom_mix=target is not None and target.custom_mix,
            )
        )

    def _submit(self, generation: Generation, lease: Lease) -> None:
        submitted = 0
        try:
            for reply in generation.replies:
                self.engine.submit(reply.request)
                submitted += 1
        except Exception as error:
            generation.status = str(self._status_of(error))
            self.record_rejection(generation.target, error, generation.caller)
            rest = generation.replies[:submitted]
            generation.replies = rest
            generation._open = len(rest)
            if not rest:
                lease.release()
                self._left(generation.target, generation.caller)
            generation.cancel()
            raise
        generation._open = submitted
        self.live.add(generation)

    def _delivery(self, generation: Generation, index: int) -> Callable[[Delivery], None]:
        mailbox = self._mailbox

        def arrived(delivery: Delivery) -> None:
            self._arrived(generation, index, delivery)

        return lambda delivery: mailbox.post(arrived, delivery)

    def _arrived(self, generation: Generation, index: int, delivery: Delivery) -> None:
        reply = generation.replies[index]
        reply.tokens += len(delivery.tokens)
        if isinstance(delivery.error, NotFinite):
            delivery = delivery._replace(error=_overflow(generation, delivery.error))
        if delivery.text:
            reply.text.append(delivery.text)
        if delivery.logprobs:
            reply.logprobs.extend(delivery.logprobs)
        over = delivery.finish_reason is not None
        if over:
            reply.finish_reason, reply.error = delivery.finish_reason, delivery.error
            generation._open -= 1
        if over or not generation.whole:
            generation.inbox.put((index, delivery))  # first: whatever becomes of the record, the reader hears
        if over and not generation._open:
            self._ended(generation)

    def _ended(self, generation: Generation) -> None:
        """All sequences are over: give back, write down."""
        generation._lease.release()
        self._left(generation.target, generation.caller)
        self.live.discard(generation)
        if generation.status:
            return  # refused half-way, and recorded then
        errors = [s.error for s in generation.replies if s.error is not None]
        if any(isinstance(error, QueueFull) for error in errors) and not generation.caller.client:
            return  # it tries again, as one that `refused` heard of
        if errors:
            generation.status = str(self._status_of(errors[0]))
        else:
            generation.status = "cancelled" if generation.cancelled else "200"
        if generation.caller.client or generation.status == "200":  # an evaluation that ends early refuses nobody
            self._metrics.record(request_record(generation))
        self.on_ended(generation)

    def _left(self, target: Target, caller: Caller) -> None:
        if caller.client:
            self.admission.leave(caller.tenant, target.task.name if target.task else None)


def request_record(generation: Generation) -> RequestRecord:
    """The record of a generation, from its requests' own timestamps."""
    requests = [s.request for s in generation.replies]
    task = generation.target.task
    return RequestRecord(
        task=task.name if task else None,
        adapters=tuple(version.name for version, weight in generation.versions if is_nonzero(weight)),
        status=generation.status,
        submitted=generation.caller.arrived if generation.caller.client else min(r.submitted for r in requests),
        admitted=_least(r.admitted for r in requests),
        first_token=_least(r.first_token for r in requests),
        finished=max(r.finished for r in requests),
        prompt_tokens=sum(len(r.prompt) for r in requests[:: generation.answers] if not math.isnan(r.admitted)),
        generated_tokens=sum(len(r.output) for r in requests),
        longest=max(len(r.output) for r in requests),
        tpot=_between_tokens(requests),
        latency=generation.caller.client,
        custom_mix=generation.target.custom_mix,
    )


def _between_tokens(requests: Sequence[Request]) -> float:
    """Seconds between tokens of one answer, the mean of all answers' of a call: several need not run at once."""
    several = [r for r in requests if len(r.output) > 1]
    tokens = sum(len(r.output) - 1 for r in several)
    return sum(r.finished - r.first_token for r in several) / tokens if tokens else math.nan


def timings(generation: Generation) -> dict[str, float]:
    """Milliseconds of a generation that has ended, as clients see them; its longest sequence gives the rate.

    What never came was waited for until the end: a first token where none is written, a first step where none ran.
    """
    record = request_record(generation)
    load = max(s.request.load_seconds for s in generation.replies)
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
    """The samplings of `n` answers to one prompt: with a seed, each has its own, derived from it."""
    if sampling.seed is None or n == 1:
        return [sampling] * n
    return [replace(sampling, seed=(sampling.seed + i * 0x9E3779B97F4A7C15) % (1 << 63)) for i in range(n)]


def new_id(prefix: str) -> str:
    """An id of our own making, never a client's."""
    return f"{prefix}-{uuid.uuid4().hex}"


def _overflow(generation: Generation, error: NotFinite) -> Exception:
    """Whose numbers are at fault: the adapters', which a request chooses, if it has any; the base's are finite."""
    labels = " + ".join(version.label for version, weight in generation.versions if is_nonzero(weight))
    log.warning("%s: the logits of %s are not finite", generation.id, labels or "the base alone")
    if not labels:
        return error
    return InvalidRequest(
        f"the numbers overflow with {labels} on this prompt; ask for smaller weights of it, or publish it with smaller "
        "values",
        "adapters",
    )


def _least(times: Any) -> float:
    return min((t for t in times if not math.isnan(t)), default=math.nan)


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 2)


def _names(choice: Choice) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.partition("@")[0] for name, weight in choice if is_nonzero(weight)))
