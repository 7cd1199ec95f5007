"""`Engine`: runs requests with any mix of adapters together, step by step, on a thread of its own."""

from __future__ import annotations

import logging
import math
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from adapters.weights import Mix
from server.engine import stop_conditions
from server.engine.adapter_loader import AdapterLoader, Fetch
from server.engine.adapter_slots import AdapterMemory, AdapterSlots
from server.engine.backends.protocol import Runner
from server.engine.batch import ScheduledRequest, build_batch, step_logit_limit, step_token_limit
from server.engine.kv_cache import KVCache, root_hash
from server.engine.queue import RequestInbox
from server.engine.request import Delivery, Request, State
from server.engine.sampler import SampledToken, Sampler
from server.engine.scheduler import Scheduler, SchedulerConfig
from server.engine.scheduler_output import SchedulerOutput
from server.engine.step_stats import StepStats
from server.errors import Conflict, EngineFailed, InvalidRequest, NoCapacity, NotFinite, NotReady
from server.model.detokenizer import Detokenizer
from server.model.tokenizer import ModelTokenizer

log = logging.getLogger(__name__)

STUCK_SECONDS = 10.0
"""How long `stop` waits for a running step after the drain time."""

SWITCH_SECONDS = 0.0005
"""Interval after which other Python threads hand over to the engine's thread."""

POLL_SECONDS = 0.02
"""Longest sleep while requests wait and none can run, so that deadlines are checked."""

MAX_IDLE_SECONDS = 1.0
"""Longest idle time after a step, in case the process was suspended during it."""


class Engine:
    """Executes requests by continuous batching. All methods except `step` may be called from any thread.

    Each submitted request ends exactly once, by a delivery with a finish reason, whatever happens.

    Args:
        runner: Executes the model.
        fetch: Returns a future of a mix's weights, in the mix's order. Must not block.
        tokenizer: Detokenizes the answers.
        eos_ids: Token ids that end an answer.
        vocab_size: Number of logits of a row.
        context_length: Most tokens of a sequence by the model.
        base_id: Identifies the base model in the prefix cache.
        blocks: Number of KV blocks, allocated in the constructor.
        block_size: Tokens of a KV block.
        max_batch: Most running requests.
        max_slots: Number of adapter slots.
        max_queue: Most waiting requests.
        max_queue_tokens: Most prompt tokens of waiting requests.
        max_step_tokens: Most tokens of a step.
        prefix_cache: Whether to cache KV blocks by their content.
        age_limit: Seconds after which a request that waits for room takes precedence.
        step_limit: Seconds after which a step counts as stuck. Prefill is limited to stay well below it.
        on_batch_change: Receives a line that names the running requests whenever they change.
        adapter_memory: Device memory for copies of adapters. None if they are used from RAM.
        on_delivered: Called after a step's deliveries, for listeners on other threads, so that they wake once.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        fetch: Fetch,
        tokenizer: ModelTokenizer,
        eos_ids: frozenset[int],
        vocab_size: int,
        context_length: int,
        base_id: str,
        blocks: int,
        block_size: int = 16,
        max_batch: int = 32,
        max_slots: int = 64,
        max_queue: int = 256,
        max_queue_tokens: int = 262144,
        max_step_tokens: int = 512,
        prefix_cache: bool = True,
        age_limit: float = 2.0,
        step_limit: float = math.inf,
        on_batch_change: Callable[[str], None] = lambda text: None,
        adapter_memory: AdapterMemory | None = None,
        on_delivered: Callable[[], None] = lambda: None,
    ) -> None:
        self.context_length = min(context_length, blocks * block_size)
        """Most tokens of a sequence, prompt and answer together."""
        self._model_context = context_length
        self._runner = runner
        self._tokenizer = tokenizer
        self._eos_ids = eos_ids
        self._block_size = block_size
        self._wake = threading.Event()
        self._inbox = RequestInbox(max_queue, max_queue_tokens, self._wake.set)
        self._slots = AdapterSlots(max_slots, runner.load_adapter, runner.unload_adapter, adapter_memory)
        self._scheduler = Scheduler(
            KVCache(blocks, block_size, prefix_cache),
            self._slots,
            AdapterLoader(fetch, 2 * max_batch, self._wake.set),
            SchedulerConfig(
                max_batch,
                step_token_limit(max_step_tokens, max_batch),
                step_logit_limit(max_batch),
                age_limit,
                step_limit,
            ),
            lambda request: root_hash(base_id, request.mix, request.tenant),
        )
        self._sampler = Sampler(vocab_size, eos_ids, runner.draw)
        self._stats = StepStats(on_batch_change)
        self._on_delivered = on_delivered
        self._live: dict[str, Request] = {}
        """Requests taken from the inbox that have not ended."""
        self._thread: threading.Thread | None = None
        self._stop_at: float | None = None
        self._fatal: str | None = None
        runner.allocate(blocks, block_size)

    # -- from any thread

    def start(self) -> None:
        """Start the engine's thread."""
        assert self._thread is None, "an engine starts once"
        # For the whole process: otherwise each return from native code may wait 5 ms for a busy event loop.
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._loop, name="loramux-engine", daemon=True)
        self._inbox.open()
        self._thread.start()

    def check_call(self, requests: int, tokens: int = 0) -> None:
        """Raise NoCapacity if the requests of one call can never wait together.

        Args:
            requests: Number of requests.
            tokens: Their prompt tokens in total, if known.
        """
        self._inbox.check(requests, tokens)

    def check_mix(self, mix: Mix) -> None:
        """Raise NoCapacity if the mix has more adapters than there are slots."""
        if len(mix) > self._slots.count:
            raise NoCapacity(
                f"the mix has {len(mix)} adapters, and the server has {self._slots.count} slots (--max-slots)",
                "adapters",
            )

    def submit(self, request: Request) -> None:
        """Accept a request.

        Raises:
            QueueFull: Too many requests wait. Has `retry_after`.
            NotReady: The engine is not running.
            NoCapacity: The request can never fit.
            InvalidRequest: The request exceeds the context or has an empty prompt.
        """
        self._check(request)
        seed = request.sampling.seed
        request.seed = secrets.randbits(63) if seed is None else seed
        new_segment = self._tokenizer.is_added_token(request.prompt[-1])
        request.detokenizer = Detokenizer(self._tokenizer, request.sampling.stop, new_segment=new_segment)
        if not self._inbox.waiting:
            self._scheduler.prefetch(request)
        try:
            self._inbox.put(request)
        except BaseException:
            self._scheduler.loader.cancel_prefetch(request)
            raise

    def cancel(self, request_id: str) -> None:
        """End a request, in any state, within one step. Does nothing if it has ended."""
        self._inbox.cancel(request_id)

    def holds(self, digest: str) -> bool:
        """Whether an adapter has a slot."""
        return self._slots.holds(digest)

    def unload(self, digest: str) -> None:
        """Empty an adapter's slot as soon as no running request uses it."""
        self._inbox.unload(digest)

    def release_idle(self, nbytes: int) -> None:
        """Empty unused adapter slots until about `nbytes` are released."""
        self._inbox.release_idle(nbytes)

    def share_cpu(self, enabled: bool) -> None:
        """Start or stop leaving the CPU idle after each step. See `CpuSharing`."""
        self._scheduler.cpu_sharing.enabled = enabled

    def stop(self, drain: float = 0.0) -> bool:
        """Accept no more requests, let the accepted ones run for `drain` seconds, and end the rest with NotReady.

        Returns:
            Whether the engine's thread has ended. It has not if a step is stuck.
        """
        self._inbox.close("the server is stopping")
        self._stop_at = time.monotonic() + drain
        self._wake.set()
        if self._thread is None:
            self._end_all()
            return True
        self._thread.join(drain + STUCK_SECONDS)
        return not self._thread.is_alive()

    def stuck_for(self) -> float:
        """Return the seconds since the current step began, or 0 between steps."""
        return self._stats.stuck_for()

    def current_step(self) -> str:
        """Describe the current step in a line for the log."""
        return self._stats.current_step()

    def fatal_error(self) -> str | None:
        """Return why no step can run any more in this process, or None."""
        return self._fatal

    @property
    def state(self) -> str:
        """ "stopped", "running", "draining", or "failing" (after a failed step for a while, or for ever)."""
        if self._thread is None or not self._thread.is_alive():
            return "stopped"
        if self._stop_at is not None:
            return "draining"
        return "failing" if self._fatal is not None or self._stats.failing else "running"

    def stats(self) -> dict[str, Any]:
        """Return a snapshot as JSON. Its numbers may be from slightly different times."""
        for _ in range(8):
            try:
                return self._snapshot()
            except RuntimeError:  # a dictionary changed during iteration
                continue
        return self._snapshot()

    def _snapshot(self) -> dict[str, Any]:
        scheduler = self._scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        kv = scheduler.kv
        return {
            "state": self.state,
            "running": len(running),
            "waiting": max(self._inbox.waiting, len(waiting)),
            "loading": sum(request.state is State.LOADING for request in waiting),
            "waiting_digests": sorted({digest for request in waiting for digest in request.mix.digests}),
            "running_digests": sorted({digest for request in running for digest in request.mix.digests}),
            "kv_blocks": {"total": kv.blocks, "block_size": self._block_size, **kv.counts},
            "prefix_cache": {"queried_tokens": kv.queries, "found_tokens": kv.hits},
            "slots": {
                "total": self._slots.count,
                "resident": self._slots.resident,
                "in_use": self._slots.in_use,
                "evictions": self._slots.evictions,
            },
            "preemptions": scheduler.preemptions,
            **self._stats.snapshot(),
        }

    def _check(self, request: Request) -> None:
        tokens = request.max_cache_tokens
        if not request.prompt or request.scored >= len(request.prompt):
            raise InvalidRequest("the prompt is empty; it needs at least one token", "prompt")
        if tokens >= self._model_context:
            raise InvalidRequest(
                f"{len(request.prompt)} prompt tokens and {request.sampling.max_tokens} tokens to generate exceed the "
                f"context of {self._model_context}",
                "max_tokens",
            )
        room = self._scheduler.kv.blocks * self._block_size
        if tokens > room:
            raise NoCapacity(f"the request needs a KV cache of {tokens} tokens, and it has {room} (--kv-cache)")
        self.check_mix(request.mix)

    # -- the engine's thread

    def _loop(self) -> None:
        try:
            while not self._is_over():
                self._wake.clear()
                try:
                    ran = self.step()
                    self._notify()
                    if not ran:
                        self._wake.wait(POLL_SECONDS if self._live or self._stop_at is not None else None)
                    elif idle := self._scheduler.idle_time:
                        time.sleep(min(MAX_IDLE_SECONDS, idle * self._stats.last_seconds))
                except BaseException as error:  # a panic of a Rust library is not an Exception
                    self._recover(error)
                    self._notify()
                    self._wake.wait(POLL_SECONDS)
        except BaseException as error:  # `_recover` has failed, so the state is unknown
            log.critical("the engine cannot continue after a failed step", exc_info=error)
            self._fatal = self._fatal or f"the engine cannot continue after a failed step ({error!r})"
        finally:
            self._inbox.close("the engine has stopped")
            self._end_all()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        return time.monotonic() >= self._stop_at or not (self._live or self._inbox.waiting)

    def _end_all(self) -> None:
        """End all requests that are left."""
        self._drain_inbox()
        for request in list(self._live.values()):
            self._end(request, Delivery(finish_reason="error", error=NotReady("the server is stopping")))
        self._notify()
        self._slots.reset()

    def _recover(self, error: BaseException) -> None:
        """End the requests of a failed step. Waiting requests are kept.

        If memory was lacking (NoCapacity), only the requests with more than one row end. Without them the step is
        small, and it overwrites what the failed one computed. If scheduling itself failed, all requests end, because
        it is unknown which is at fault.
        """
        log.error("a step failed: %s", self._stats.current_step(), exc_info=error)
        scheduled = self._stats.current.scheduled
        self._stats.fail()
        if isinstance(error, NoCapacity):
            large = [item.request for item in scheduled if item.tokens > 1 and item.request.state is State.RUNNING]
            if large:
                return self._fail_requests(large, error)
        running = [request for request in self._live.values() if request not in self._scheduler.waiting]
        failed = EngineFailed("the request failed because a step of the engine failed; send it again")
        failure = error if isinstance(error, NoCapacity) else failed
        self._fail_requests(running if running or scheduled else list(self._live.values()), failure)
        self._scheduler.reset()

    def _fail_requests(self, requests: list[Request], error: Exception) -> None:
        """End requests with an error, and discard the blocks that they have computed."""
        for request in requests:
            if request.state is not State.DONE:
                self._scheduler.finish(request, time.monotonic(), trusted=False)
            self._deliver_last(request, Delivery(finish_reason="error", error=error))

    # -- one step

    def step(self) -> bool:
        """Run one step on the engine's thread. Returns False if there was nothing to run."""
        now = self._stats.begin()
        self._drain_inbox()
        output = self._scheduler.schedule(now)
        self._announce(output)
        if not output.scheduled:
            return self._stats.cancel()
        batch = build_batch(output.scheduled)
        logits = self._stats.run(output, lambda: self._runner.run(batch))
        tokens = self._sampler.sample(logits, output.scheduled)
        self._scheduler.commit(output.scheduled, time.monotonic())
        self._deliver(output.scheduled, tokens)
        self._stats.end()
        self._scheduler.budget.update(output.prefill, self._stats.last_seconds)
        return True

    def _drain_inbox(self) -> None:
        """Process what has arrived: requests first, so that they can be cancelled at once."""
        arrivals = self._inbox.take()
        if arrivals is None:
            return
        for request in arrivals.requests:
            if request.id in self._live:
                self._inbox.remove(request)
                self._scheduler.loader.cancel_prefetch(request)
                error = Conflict(f"a request with the id {request.id} is already running")
                self._deliver_to(request, Delivery(finish_reason="error", error=error))
                continue
            self._live[request.id] = request
            self._scheduler.add(request)
        while (key := self._inbox.overfull_key()) is not None:
            rejected = self._scheduler.waiting.newest(key)
            if rejected is None:
                break
            self._end(rejected, Delivery(finish_reason="error", error=self._inbox.full()))
        for request_id in arrivals.cancelled:
            if request_id in self._live:
                self._end(self._live[request_id], Delivery(finish_reason="cancelled"))
        for digest in arrivals.unloaded:
            self._scheduler.unload(digest)
        if arrivals.wanted_bytes:
            self._scheduler.free_ram(arrivals.wanted_bytes, time.monotonic())

    def _announce(self, output: SchedulerOutput) -> None:
        """Process admissions and ends before the step runs."""
        for request in output.admitted:
            self._inbox.remove(request)
        for request, delivery in output.ended:
            self._deliver_last(request, delivery)
        self._notify()

    def _deliver(self, scheduled: list[ScheduledRequest], tokens: list[SampledToken]) -> None:
        """Deliver the tokens of a step."""
        row = 0
        for request, _, logits in scheduled:
            if not logits:
                continue
            if request.scored:
                delivery = stop_conditions.append_scores(request, tokens[row : row + logits])
            else:
                delivery = stop_conditions.append_token(request, tokens[row], self._eos_ids)
                self._stats.generated += 1
            row += logits
            if delivery is None:
                continue
            if delivery.finish_reason is None:
                self._deliver_to(request, delivery)
            else:
                self._end(request, delivery)

    def _end(self, request: Request, delivery: Delivery) -> None:
        """End a request that the scheduler still has."""
        self._scheduler.finish(request, time.monotonic(), trusted=not isinstance(delivery.error, NotFinite))
        self._deliver_last(request, delivery)

    def _deliver_last(self, request: Request, delivery: Delivery) -> None:
        """Deliver a request's end, once. All ends pass through here."""
        if self._live.pop(request.id, None) is None:
            return
        self._inbox.remove(request)
        self._deliver_to(request, delivery)

    def _deliver_to(self, request: Request, delivery: Delivery) -> None:
        try:
            request.deliver(delivery)
        except Exception:  # neither the step nor other requests may suffer from a listener's error
            log.exception("request %s: its listener failed", request.id)
            if request.state is not State.DONE:
                self._inbox.cancel(request.id)
        if delivery.finish_reason is not None:
            # Break the cycle between request and listener, which would keep the grammar's memory for long.
            request.deliver, request.constraint = _ignore, None

    def _notify(self) -> None:
        try:
            self._on_delivered()
        except Exception:
            log.exception("the listeners of deliveries could not be notified")


def _ignore(delivery: Delivery) -> None:
    """The listener of a request that has ended."""
