"""`Scheduler`: decides which requests run in the next step, and with how many tokens (continuous batching).

A step contains, in this order:

1. one token for each running request whose prompt is computed (decode),
2. prefill chunks of running prompts, in the order of `PrefillOrder`, within the `PrefillBudget`,
3. prefill chunks of newly admitted requests.

Requests are admitted in queue order. Admission reserves KV blocks and adapter slots atomically. A request whose
adapters are still loading, or that finds no room, does not hold up the others until `Aging` applies. A running request
that needs a KV block preempts the youngest one of the lowest priority. The special rules are in `policies`.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.engine.adapter_loader import AdapterLoader
from server.engine.adapter_slots import AdapterSlots
from server.engine.admission import Admission
from server.engine.batch import ScheduledRequest
from server.engine.kv_cache import BlockHash, KVCache
from server.engine.policies import CpuSharing, Preemption, PrefillOrder
from server.engine.prefill_budget import PrefillBudget
from server.engine.queue import OUTPUT_COST, FairQueue
from server.engine.request import Delivery, Request, State
from server.engine.scheduler_output import SchedulerOutput
from server.errors import DeadlineExceeded, EngineFailed, NoCapacity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a step, and times in seconds.

    `max_batch` and `max_step_tokens` correspond to vLLM's max_num_seqs and max_num_batched_tokens.
    """

    max_batch: int = 32
    max_step_tokens: int = 512
    max_logits: int = 64
    age_limit: float = 2.0
    """Waiting for room longer than this gives a request precedence."""
    step_limit: float = math.inf
    """A step that takes longer counts as stuck."""


class Scheduler:
    """Owns the waiting queue and the running list, and through them KV blocks, adapter slots and adapter loads.

    Only the engine's thread uses it, except for `prefetch`. `root` returns the prefix cache's root hash of a request.
    """

    def __init__(
        self,
        kv: KVCache,
        slots: AdapterSlots,
        loader: AdapterLoader,
        config: SchedulerConfig,
        root: Callable[[Request], BlockHash],
    ) -> None:
        self.kv = kv
        self.slots = slots
        self.loader = loader
        self.config = config
        self.waiting = FairQueue()
        self.running: list[Request] = []
        self.preemptions = 0
        self.budget = PrefillBudget(config.max_step_tokens, config.step_limit)
        self.cpu_sharing = CpuSharing(config.max_batch)
        self.admission = Admission(kv, slots, loader, self.waiting, self.running, config.age_limit, root)
        self._next_deadline = math.inf
        """No waiting or running request has an earlier deadline."""
        self._check_fits = False
        """Whether loads that lack RAM must be checked for ones that can never complete."""

    # -- one step

    def schedule(self, now: float) -> SchedulerOutput:
        """Return the next step. Requests that end here (deadline, failed load) only have to be notified."""
        output = SchedulerOutput(max_tokens=self.config.max_step_tokens, max_logits=self.config.max_logits)
        self._end_expired(now, output)
        self._poll_loads(now, output)
        if self.cpu_sharing.begin_step(self._num_active):
            output.max_tokens = min(output.max_tokens, len(self.running) + CpuSharing.PREFILL_TOKENS)
        output.finishing = sum(request.computed >= request.required for request in self.running)
        self._preempt_for_waiting(now, output)
        self._schedule_decodes(output)
        self._schedule_prefills(now, output)
        return output

    def _schedule_decodes(self, output: SchedulerOutput) -> None:
        """One token for each request whose prompt is computed. Allocates blocks, preempting others if needed."""
        size = self.kv.block_size
        for request in [r for r in self.running if r.required > r.computed >= len(r.blocks) * size]:
            if request.state is State.RUNNING:
                self._append_block(request)
        for request in self.running:
            if request.required - request.computed == 1:
                output.add(request, 1, 1)

    def _schedule_prefills(self, now: float, output: SchedulerOutput) -> None:
        """Chunks of running prompts, with admission in between."""
        prompts = [r for r in self.running if r.required - r.computed > 1]
        order = PrefillOrder(prompts, lambda depth: self._room(depth, output))
        depth = logits = 0
        if order.oldest is not None:
            depth = order.oldest.computed
            output.reserved, logits = self._chunk(order.oldest, output, -(-self._room(depth, output) // 2))
        self._reserve(output, depth, output.reserved, logits)
        for request in order.short:
            self._add_chunk(request, output)
        self._admit(now, output)
        before, after = order.split_long()
        for request in before:
            self._add_chunk(request, output)
        self._reserve(output, depth, -output.reserved, -logits)
        for request in after:
            self._add_chunk(request, output)

    def commit(self, scheduled: Sequence[ScheduledRequest], now: float) -> None:
        """Record that a step has run: its tokens are in the KV cache, and full blocks can be found by their hash."""
        for request, tokens, logits in scheduled:
            request.computed += tokens
            if self.kv.has_prefix_cache and request.computed >= (request.num_hashed_blocks + 1) * self.kv.block_size:
                self.admission.register_full_blocks(request)
            if logits and not request.scored:
                if not request.output:
                    request.first_token = now
                self.waiting.charge(request, OUTPUT_COST)

    @property
    def may_preempt(self) -> bool:
        """Whether the next `schedule` may preempt a running request."""
        if len(self.running) > self.kv.available:  # each needs one more block at most
            return True
        if not self.waiting or not self.running:
            return False
        return Preemption.victim(self.running).priority > self.waiting.best_priority

    @property
    def idle_time(self) -> float:
        """How long to leave the CPU idle after the last step, in multiples of its time."""
        return self.cpu_sharing.end_step(self._num_active)

    def _num_active(self) -> int:
        """Running requests and waiting ones that could run, up to `max_batch` of these. Adapters that load do not."""
        ready = (r for r in self.waiting if self.slots.has(r.mix) or not self.loader.is_pending(r))
        return len(self.running) + sum(1 for _ in itertools.islice(ready, self.config.max_batch))

    # -- requests

    def prefetch(self, request: Request) -> None:
        """Start to load a new request's adapters, if nothing waits before it. From any thread.

        `add` must follow, or `loader.cancel_prefetch`.
        """
        if len(self.running) < self.config.max_batch and not self.slots.has(request.mix):
            self.loader.prefetch(request)

    def add(self, request: Request) -> None:
        """Add a new request to the waiting queue."""
        self.waiting.add(request)
        if self.slots.has(request.mix):
            self.loader.cancel_prefetch(request)
        else:
            self.loader.add(request, request.submitted)
        self._next_deadline = min(self._next_deadline, request.deadline)
        self.admission.retry = True

    def finish(self, request: Request, now: float, *, trusted: bool = True) -> None:
        """Remove a request in any state and free everything that it holds.

        Args:
            trusted: Whether its computed blocks may stay in the prefix cache.
        """
        assert request.state is not State.DONE, "a request finishes once"
        if request.state is State.RUNNING:
            if not trusted:
                self.kv.unregister(request.blocks)
            self.running.remove(request)
            self.waiting.leave(request)
            self.admission.release(request)
        else:
            self.waiting.remove(request)
            self.admission.stop_waiting(request)
        request.state = State.DONE
        request.finished = now
        self.admission.retry = True

    def unload(self, digest: str) -> None:
        """Empty an adapter's slot as soon as no request uses it."""
        self.slots.unload(digest)
        self.admission.retry = True

    def free_ram(self, nbytes: int, now: float) -> None:
        """A load lacks `nbytes` of RAM: empty idle slots for it, and cancel loads of lower priorities."""
        self.slots.release_idle(nbytes)
        if self.waiting:
            self.loader.cancel_lower_priority(self.waiting.best_priority)
        self.admission.ram_pressure.report(now)
        self._check_fits = self.admission.retry = True

    def reset(self) -> None:
        """Discard all computed blocks and adapters after a failed step. No request may be running."""
        assert not self.running, "running requests end before a reset"
        self.kv.clear()
        self.slots.reset()
        self.admission.retry = True

    # -- deadlines and loads

    def _end_expired(self, now: float, output: SchedulerOutput) -> None:
        if now < self._next_deadline:
            return
        live = [*self.running, *self.waiting]
        self._next_deadline = min((r.deadline for r in live if r.deadline > now), default=math.inf)
        for request in [r for r in live if r.deadline <= now]:
            waited = f"{now - request.submitted:.1f} s"
            where = "running" if request.state is State.RUNNING else "waiting"
            self._end(output, request, DeadlineExceeded(f"the deadline passed after {waited}, while {where}"), now)

    def _poll_loads(self, now: float, output: SchedulerOutput) -> None:
        any_done, failed = self.loader.poll(now)
        if any_done:
            self.admission.retry = True
            self.admission.ram_pressure.clear()
        if self._check_fits:
            self._check_fits = False
            failed += self.loader.never_fitting()
        for request, error in failed:
            self._end(output, request, error, now)

    def _end(self, output: SchedulerOutput, request: Request, error: Exception, now: float) -> None:
        self.finish(request, now)
        output.ended.append((request, Delivery(finish_reason="error", error=error)))

    # -- preemption

    def _preempt_for_waiting(self, now: float, output: SchedulerOutput) -> None:
        """Preempt one running request if a waiting one of a higher priority lacks room."""
        if not self.waiting or not self.running:
            return
        priority = self.waiting.best_priority
        if all(r.priority <= priority for r in self.running):
            return
        lacks_room = not self._has_place(output) or self.admission.aging.is_blocked(priority)
        lacks_ram = self.slots.use_ram and self.admission.is_ram_urgent(now)
        victim = Preemption.for_priority(self.running, priority, lacks_room=lacks_room, lacks_ram=lacks_ram)
        if victim is not None:
            self._preempt(victim)

    def _append_block(self, request: Request) -> None:
        """Allocate a block for the request's next token. May preempt the request itself."""
        while (block := self.kv.allocate(1)) is None:
            victim = Preemption.victim(self.running)
            self._preempt(victim)
            if victim is request:
                return
        request.blocks.extend(block)

    def _preempt(self, request: Request) -> None:
        """Take back everything that a running request holds, and return it to the waiting queue."""
        self.running.remove(request)
        self.admission.release(request)
        request.state = State.QUEUED
        self.waiting.requeue(request)
        self.preemptions += 1
        self.admission.retry = True

    # -- prefill chunks

    def _room(self, depth: int, output: SchedulerOutput) -> int:
        """Return how many more tokens a prompt with `depth` computed tokens may have in this step."""
        return min(output.max_tokens - output.num_tokens, self.budget.room(depth, output.prefill))

    def _reserve(self, output: SchedulerOutput, depth: int, tokens: int, logits: int) -> None:
        """Reserve a part of the step. Negative numbers release it."""
        output.max_tokens -= tokens
        output.max_logits -= logits
        self.budget.add(depth, tokens, output.prefill)

    def _add_chunk(self, request: Request, output: SchedulerOutput) -> None:
        """Add as much of a prompt as fits."""
        tokens, logits = self._chunk(request, output, self._room(request.computed, output))
        if tokens > 0:
            output.add(request, tokens, logits)
            self.budget.add(request.computed, tokens, output.prefill)

    def _chunk(self, request: Request, output: SchedulerOutput, limit: int) -> tuple[int, int]:
        """Return the tokens and logits of a prompt's next chunk, of at most `limit` tokens."""
        before = max(0, request.first_logit - request.computed)
        tokens = min(request.required - request.computed, limit, before + max(0, output.max_logits - output.num_logits))
        return max(0, tokens), max(0, tokens - before)

    # -- admission

    def _admit(self, now: float, output: SchedulerOutput) -> None:
        """Admit waiting requests while the step has room."""
        if not self.admission.retry or not self.waiting:
            return
        ram_urgent = self.admission.is_ram_urgent(now)
        self.admission.retry = ram_urgent
        candidates = self.admission.candidates(now, ram_urgent)
        while self._room(0, output) > 0 and self._has_place(output):
            request = next(candidates, None)
            if request is None:
                break
            try:
                new_adapters = self.admission.reserve(request, lambda depth: self._room(depth, output), now)
            except Exception as e:
                self._refuse(output, request, e, now)
                continue
            if new_adapters is not None:
                self._start(request, new_adapters, now, output)
        else:
            self.admission.retry = True  # not all candidates were tried
        if self.slots.memory is not None and not ram_urgent:
            for request, error in self.admission.copy_ahead(now):
                self._refuse(output, request, error, now)

    def _start(self, request: Request, new_adapters: list[str], now: float, output: SchedulerOutput) -> None:
        """Let a request run for which everything is reserved."""
        self.waiting.admit(request)
        self.admission.stop_waiting(request)
        request.state = State.RUNNING
        self.running.append(request)
        if math.isnan(request.admitted):
            request.admitted = now
            request.cached = request.computed
            self.kv.count_query(len(request.prompt), request.num_hashed_blocks)
            self.waiting.charge(request, max(1, len(request.prompt) - request.computed))
            output.admitted.append(request)
        if self.slots.memory is not None:
            output.copying.update(new_adapters)
        # While adapters are copied, the other requests run. An empty step would have to wait for the copy anyway.
        if not (output.scheduled or output.reserved) or output.copying.isdisjoint(request.mix.digests):
            self._add_chunk(request, output)

    def _has_place(self, output: SchedulerOutput) -> bool:
        """Whether the batch has room for another request."""
        return len(self.running) - output.finishing < self.config.max_batch

    def _refuse(self, output: SchedulerOutput, request: Request, error: Exception, now: float) -> None:
        """End a request whose adapters cannot be placed in slots."""
        if not isinstance(error, NoCapacity):
            log.error("%s: cannot place its adapters", request.id, exc_info=error)
            error = EngineFailed("the request's adapters could not be loaded; see the server's log")
        # The traceback's frames refer to the weights and would keep them in memory.
        self._end(output, request, error.with_traceback(None), now)
