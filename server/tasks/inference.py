"""Starts generations on the engine: leases adapters, submits requests, delivers results, and records the end.

The lease is released and the metrics are written when the engine has finished every reply, whether or not anyone reads
the generation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from adapters.leases import Lease
from adapters.weights import Choice, is_nonzero
from server.engine.request import Constraint, Delivery, Request, Sampling
from server.errors import SHUTTING_DOWN, InvalidRequest, NotFinite, NotReady, QueueFull
from server.metrics import Metrics, RequestRecord
from server.tasks.admission import Admission
from server.tasks.delivery import EventLoopDelivery
from server.tasks.generation import Caller, Generation, Reply, new_id, request_record
from server.tasks.resolve import Target

if TYPE_CHECKING:
    from adapters.registry import Registry
    from server.engine.engine import Engine

log = logging.getLogger(__name__)


class Inference:
    """Starts generations. All methods are called on the event loop's thread.

    Args:
        status_of: the HTTP status of an error, for metrics.

    Attributes:
        on_ended: called with each generation that has ended and was recorded.
        live: generations that run.
        admission: limits of keys and tasks.
    """

    def __init__(
        self,
        engine: Engine,
        registry: Registry,
        metrics: Metrics,
        delivery: EventLoopDelivery,
        status_of: Callable[[Exception], int],
    ) -> None:
        self.engine = engine
        self.on_ended: Callable[[Generation], None] = lambda generation: None
        self.live: set[Generation] = set()
        self.admission = Admission()
        self.registry = registry
        self._metrics = metrics
        self._delivery = delivery
        self._status_of = status_of
        self._closed_to_clients = False

    def abort_client_requests(self) -> None:
        """Cancel the generations of clients and refuse new ones. Those of jobs go on until their job stops."""
        self._closed_to_clients = True
        for generation in list(self.live):
            if generation.caller.client:
                generation.cancel()

    def check(self, target: Target, caller: Caller) -> None:
        """Refuse a call early, before its prompt is tokenized.

        Raises:
            QueueFull: the key or the task is over its limit.
            UnknownAdapter, InvalidChoice, NoRoom: as `lease`.
            NoCapacity: the mix can never fit into the engine.
        """
        self.admission.check(caller.tenant, target.task.name if target.task else None)
        if target.held is None:
            self.engine.check_mix(self.registry.mix(target.choice))

    def lease(self, target: Target) -> Lease:
        """A lease on the target's adapters. Raises UnknownAdapter, InvalidChoice, NoRoom."""
        return self.registry.lease(target.choice) if target.held is None else target.held.clone()

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
        """Submit one sequence for each prompt, all on one lease.

        Args:
            answers: number of consecutive sequences with the same prompt.
            scored: for each sequence, how many of its last prompt tokens are scored.
            labels: labels that the sequences score.
            constraints: one for each sequence, or none.

        Raises:
            UnknownAdapter, InvalidChoice, NoRoom, QueueFull, NotReady, NoCapacity: nothing runs.
        """
        try:
            self._admit(target, caller)
        except Exception as error:
            self.record_rejection(target, error, caller)
            raise
        try:
            self.engine.check_call(len(prompts), sum(map(len, prompts)))
            lease = self.lease(target)
        except Exception as error:
            self._leave(target, caller)
            self.record_rejection(target, error, caller)
            raise
        generation = Generation(id or new_id("gen"), target, lease, caller, self.engine)
        generation.answers = answers
        generation.labels = tuple(labels)
        fair_key = _fair_key(target, lease, caller)
        for index, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True)):
            request = Request(
                id=f"{generation.id}.{index}",
                prompt=tuple(prompt),
                sampling=sampling,
                deliver=self._deliver_to(generation, index),
                mix=lease.mix,
                check_fits=lambda: self.registry.check_room(lease.mix),
                fair_key=fair_key,
                tenant=caller.tenant,
                priority=caller.priority,
                deadline=caller.deadline,
                scored=scored[index] if scored else 0,
                constraint=constraints[index] if constraints else None,
            )
            generation.replies.append(Reply(request))
        self._submit(generation)
        return generation

    def record_rejection(self, target: Target | None, error: Exception, caller: Caller) -> None:
        """Count a call of a client that failed before it ran."""
        self._record_unstarted(target, str(self._status_of(error)), caller)

    def record_disconnect(self, target: Target | None, caller: Caller) -> None:
        """Count a call whose client disconnected before it ran."""
        self._record_unstarted(target, "cancelled", caller)

    def _record_unstarted(self, target: Target | None, status: str, caller: Caller) -> None:
        if not caller.client:
            return
        self._metrics.record(
            RequestRecord(
                task=target.task.name if target and target.task else None,
                adapters=_adapter_names(target.choice) if target else (),
                status=status,
                known=target is not None and status != "404",  # unknown names are no metric labels
                custom_mix=target is not None and target.custom_mix,
            )
        )

    def _admit(self, target: Target, caller: Caller) -> None:
        if caller.client:
            if self._closed_to_clients:
                raise NotReady(SHUTTING_DOWN, retry_after=2.0)
            self.admission.enter(caller.tenant, target.task.name if target.task else None)

    def _leave(self, target: Target, caller: Caller) -> None:
        if caller.client:
            self.admission.leave(caller.tenant, target.task.name if target.task else None)

    def _submit(self, generation: Generation) -> None:
        """Submit all sequences. If one is refused, those before it are cancelled and the error is raised."""
        submitted = 0
        try:
            for reply in generation.replies:
                self.engine.submit(reply.request)
                submitted += 1
        except Exception as error:
            generation.status = str(self._status_of(error))
            self.record_rejection(generation.target, error, generation.caller)
            del generation.replies[submitted:]
            generation.open_replies = submitted
            if not submitted:
                generation.lease.release()
                self._leave(generation.target, generation.caller)
            generation.cancel()
            raise
        generation.open_replies = submitted
        self.live.add(generation)

    def _deliver_to(self, generation: Generation, index: int) -> Callable[[Delivery], None]:
        """The callback of the engine's thread: passes deliveries to `_on_delivery` on the event loop."""
        delivery_queue = self._delivery

        def on_delivery(delivery: Delivery) -> None:
            self._on_delivery(generation, index, delivery)

        return lambda delivery: delivery_queue.post(on_delivery, delivery)

    def _on_delivery(self, generation: Generation, index: int, delivery: Delivery) -> None:
        if isinstance(delivery.error, NotFinite):
            delivery = delivery._replace(error=_overflow_error(generation, delivery.error))
        generation.replies[index].add(delivery)
        ended = delivery.finish_reason is not None
        if ended:
            generation.open_replies -= 1
        if ended or not generation.only_ends:
            generation.inbox.put((index, delivery))
        if ended and not generation.open_replies:
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        """Release the lease and record a generation whose replies have all finished."""
        generation.lease.release()
        self._leave(generation.target, generation.caller)
        self.live.discard(generation)
        if generation.status:
            return  # recorded by `_submit`
        errors = [reply.error for reply in generation.replies if reply.error is not None]
        if any(isinstance(error, QueueFull) for error in errors) and not generation.caller.client:
            return  # displaced by a client; the evaluation tries again
        if errors:
            generation.status = str(self._status_of(errors[0]))
        else:
            generation.status = "cancelled" if generation.cancelled else "200"
        if generation.caller.client or generation.status == "200":
            self._metrics.record(request_record(generation))
        self.on_ended(generation)


def _fair_key(target: Target, lease: Lease, caller: Caller) -> str:
    """What the queue shares time between: tasks, mixes, and all custom mixes of one tenant together."""
    if target.task is not None:
        return target.task.name
    return f"mixes of {caller.tenant}" if target.custom_mix else "+".join(lease.mix.digests)


def _overflow_error(generation: Generation, error: NotFinite) -> Exception:
    """Logits that are not finite are the fault of the request's adapters, if it has any."""
    labels = " + ".join(version.label for version, weight in generation.versions if is_nonzero(weight))
    log.warning("%s: the logits of %s are not finite", generation.id, labels or "the base model")
    if not labels:
        return error
    return InvalidRequest(
        f"the numbers overflow with {labels} on this prompt; ask for smaller weights, or publish adapters with smaller "
        "values",
        "adapters",
    )


def _adapter_names(choice: Choice) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.partition("@")[0] for name, weight in choice if is_nonzero(weight)))
