"""`Engine`: one thread that runs requests together, step by step, on any mix of adapters.

`Engine.step` is the architecture. Owns the thread, the order of a step, and that every request hears of its end
exactly once, whatever happens. Does not know HTTP, tasks or the names of adapters; reads no file.
"""

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
from server.engine.batch import ScheduledRequest, build_batch, most_logits, most_tokens
from server.engine.kv_cache import KVCache, root_key
from server.engine.queue import RequestInbox
from server.engine.request import Delivery, Request, State
from server.engine.sampler import SampledToken, Sampler
from server.engine.scheduler import Scheduler, SchedulerConfig
from server.engine.step_plan import StepPlan
from server.engine.step_stats import StepStats
from server.errors import Conflict, EngineFailed, InvalidRequest, NoCapacity, NotFinite, NotReady
from server.model.tokenizer import Detokenizer, ModelTokenizer

log = logging.getLogger(__name__)

STUCK_SECONDS = 10.0
"""How long `stop` waits for a step that is running after all its time is over."""

SWITCH_SECONDS = 0.0005
"""How long another thread may hold the interpreter while the engine wants it."""

IDLE_SECONDS = 0.02
"""How long the thread sleeps at most while requests wait and none can run: their deadlines are looked at then."""

LONGEST_REST = 1.0
"""Seconds that the thread leaves the processors to others at most, however long the step was: the process may have been
stopped within it for hours, and nothing is answered while the thread rests."""


class Engine:
    """See the module. Every method but `step` may be called from any thread.

    `fetch(mix)` gives a future of the weights of a mix, in its order, and must not block. `blocks` blocks of
    `block_size` tokens are allocated at once, in the constructor. At most `max_queue` requests with `max_queue_tokens`
    prompt tokens wait. Prompts have fewer rows of a step that would come near to `step_limit` seconds, as far as the
    steps before tell. `tell` hears in a line which requests run together, whenever that changes. `room` is what
    adapters may take of memory that they are copied to. `told` is called when requests may have been told something,
    after all that were told by a step: for listeners on another thread, who would otherwise come for the first while
    the others are still being told.
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
        prefix_share: float = 0.5,
        age_limit: float = 2.0,
        step_limit: float = math.inf,
        on_batch_change: Callable[[str], None] = lambda text: None,
        adapter_memory: AdapterMemory | None = None,
        on_delivered: Callable[[], None] = lambda: None,
    ) -> None:
        self.context_length = min(context_length, blocks * block_size)
        """Tokens that one request can have at most, prompt and answer together."""
        self._context_limit = context_length
        self._runner = runner
        self._text = tokenizer
        self._eos_ids = eos_ids
        self._block_size = block_size
        self._wake = threading.Event()
        self._inbox = RequestInbox(max_queue, max_queue_tokens, self._wake.set)
        self._slots = AdapterSlots(max_slots, runner.load_adapter, runner.unload_adapter, adapter_memory)
        self._scheduler = Scheduler(
            KVCache(blocks, block_size, prefix_share if prefix_cache else 0.0),
            self._slots,
            AdapterLoader(fetch, 2 * max_batch, self._wake.set),
            SchedulerConfig(
                max_batch, most_tokens(max_step_tokens, max_batch), most_logits(max_batch), age_limit, step_limit
            ),
            lambda request: root_key(base_id, request.mix, request.tenant),
        )
        self._sampler = Sampler(vocab_size, eos_ids, runner.draw)
        self._record = StepStats(on_batch_change)
        self._told = on_delivered
        self._live: dict[str, Request] = {}
        """Every request that has been drained from the inbox and has not heard of its end."""
        self._thread: threading.Thread | None = None
        self._stop_at: float | None = None
        self._lost: str | None = None
        runner.allocate(blocks, block_size)

    # -- from any thread

    def start(self) -> None:
        """Begin to run steps on a thread of its own."""
        assert self._thread is None, "an engine starts once"
        # process-wide: each return from native code would otherwise wait for a busy event loop for up to 5 ms
        sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._thread = threading.Thread(target=self._loop, name="loramux-engine", daemon=True)
        self._inbox.open()
        self._thread.start()

    def check_call(self, requests: int, tokens: int = 0) -> None:
        """Raises NoCapacity for requests of one call that the queue could never hold together. Before prompts are
        tokenized, their `tokens` are not known.
        """
        self._inbox.check(requests, tokens)

    def check_mix(self, mix: Mix) -> None:
        """Raises NoCapacity for a mix whose adapters could never be resident together."""
        if len(mix) > self._slots.count:
            raise NoCapacity(
                f"the mix has {len(mix)} adapters, and {self._slots.count} can be resident (--max-slots)", "adapters"
            )

    def submit(self, request: Request) -> None:
        """Let a request in. From here on it hears of its end exactly once.

        Raises QueueFull (with retry_after), NotReady, NoCapacity if it could never fit, InvalidRequest if it is over
        the context or has nothing to compute.
        """
        self._check(request)
        seed = request.sampling.seed
        request.seed = secrets.randbits(63) if seed is None else seed
        new_segment = self._text.is_added_token(request.prompt[-1])
        request.reader = Detokenizer(self._text, request.sampling.stop, new_segment=new_segment)
        if not self._inbox.waiting:
            self._scheduler.begin(request)
        try:
            self._inbox.put(request)
        except BaseException:
            self._scheduler.loads.drop(request)
            raise

    def cancel(self, request_id: str) -> None:
        """End a request within a step, wherever it is; it hears "cancelled". One that has ended is no error."""
        self._inbox.cancel(request_id)

    def holds(self, digest: str) -> bool:
        """Whether an adapter has a slot now."""
        return self._slots.holds(digest)

    def unload(self, digest: str) -> None:
        """Empty an adapter's slot as soon as no running request uses it."""
        self._inbox.unload(digest)

    def release_idle(self, nbytes: int) -> None:
        """Empty slots that no running request uses until adapters of about `nbytes` are let go."""
        self._inbox.release_idle(nbytes)

    def share_cpu(self, lending: bool) -> None:
        """Leave the processors to others for a while after each step, from now on or no more; see `Scheduler.rest`."""
        self._scheduler.lending = lending

    def stop(self, drain: float = 0.0) -> bool:
        """Let nothing more in, give what is there `drain` seconds to end; the rest hears NotReady.

        Answers whether the thread has ended; it has not if a step is stuck.
        """
        self._inbox.close("the server is stopping")
        self._stop_at = time.monotonic() + drain
        self._wake.set()
        if self._thread is None:
            self._finish()
            return True
        self._thread.join(drain + STUCK_SECONDS)
        return not self._thread.is_alive()

    def stuck_for(self) -> float:
        """Seconds since the current step began; 0 between steps."""
        return self._record.stuck_for()

    def current_step(self) -> str:
        """The current step in a line for the log."""
        return self._record.current_step()

    def fatal_error(self) -> str | None:
        """Why no step of this process can run any more; None as long as one can."""
        return self._lost

    @property
    def state(self) -> str:
        """ "stopped", "running", "draining", or "failing": for a while if the last step that was tried has failed, and
        for good once no step can run any more."""
        if self._thread is None or not self._thread.is_alive():
            return "stopped"
        if self._stop_at is not None:
            return "draining"
        return "failing" if self._lost is not None or self._record.failing else "running"

    def stats(self) -> dict[str, Any]:
        """A snapshot, as JSON. Cheap, and read while the engine runs: numbers of one step may be a little apart."""
        for _ in range(8):
            try:
                return self._snapshot()
            except RuntimeError:  # a dictionary changed while it was gone through
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
            **self._record.snapshot(),
        }

    # -- the thread

    def _loop(self) -> None:
        try:
            while not self._is_over():
                self._wake.clear()
                try:
                    ran = self.step()
                    self._pass_on()
                    if not ran:
                        self._wake.wait(IDLE_SECONDS if self._live or self._stop_at is not None else None)
                    elif rest := self._scheduler.rest:
                        time.sleep(min(LONGEST_REST, rest * self._record.last_seconds))
                # A panic in a library of Rust is no Exception, and would end this thread.
                except BaseException as error:
                    self._recover(error)
                    self._pass_on()
                    self._wake.wait(IDLE_SECONDS)
        except BaseException as error:  # nobody can tell what is left in which state, and no step will run any more
            log.critical("the engine could not go on after a step that failed", exc_info=error)
            self._lost = self._lost or f"the engine could not go on after a step that failed ({error!r})"
        finally:
            self._inbox.close("the engine has stopped")
            self._finish()

    def _is_over(self) -> bool:
        if self._stop_at is None:
            return False
        return time.monotonic() >= self._stop_at or not (self._live or self._inbox.waiting)

    def _finish(self) -> None:
        """End all that is left."""
        self._drain()
        for request in list(self._live.values()):
            self._end(request, Delivery(finish_reason="error", error=NotReady("the server is stopping")))
        self._pass_on()
        self._slots.reset()

    def _recover(self, error: BaseException) -> None:
        """A step has failed: its requests end with EngineFailed; those that wait, and the adapters, are unharmed.

        If memory lacked for it (NoCapacity), those end that had more than one row in it: without them it is a small
        step, which computes again what this one may have computed of the others. If no step was planned, something
        that waits is at fault, and no one can tell which: then all of them end.
        """
        log.error("a step failed: %s", self._record.current_step(), exc_info=error)
        work = self._record.plan.work
        self._record.failed()
        if isinstance(error, NoCapacity):
            large = [item.request for item in work if item.tokens > 1 and item.request.state is State.RUNNING]
            if large:
                return self._lose(large, error)
        lost = [request for request in self._live.values() if request not in self._scheduler.waiting]
        failed = "a step of the engine failed, and this request with it; it can be sent again"
        failure = error if isinstance(error, NoCapacity) else EngineFailed(failed)
        self._lose(lost if lost or work else list(self._live.values()), failure)
        self._scheduler.reset()

    def _lose(self, requests: list[Request], error: Exception) -> None:
        """End requests by an error, and trust nothing that they have computed."""
        for request in requests:
            if request.state is not State.DONE:
                self._scheduler.end(request, time.monotonic(), trusted=False)
            self._last(request, Delivery(finish_reason="error", error=error))

    def _check(self, request: Request) -> None:
        most, scored = request.most_tokens, request.scored
        if not request.prompt or scored >= len(request.prompt):
            raise InvalidRequest("the prompt is empty: there is nothing to go on from", "prompt")
        if most >= self._context_limit:
            raise InvalidRequest(
                f"{len(request.prompt)} prompt tokens and {request.sampling.max_tokens} to generate are over "
                f"the context of {self._context_limit}",
                "max_tokens",
            )
        if most > self._scheduler.kv.blocks * self._block_size:
            raise NoCapacity(
                f"the request needs the keys and values of {most} tokens, and there is room for "
                f"{self._scheduler.kv.blocks * self._block_size} (--kv-cache)"
            )
        self.check_mix(request.mix)

    # -- one step

    def step(self) -> bool:
        """Run one step; False if there was nothing to run. Called by the engine's thread alone."""
        now = self._record.begin()
        self._drain()
        plan = self._scheduler.plan(now)
        self._announce(plan)
        if not plan.work:
            return self._record.nothing()
        batch = build_batch(plan.work)
        logits = self._record.run(plan, lambda: self._runner.run(batch))
        picks = self._sampler.pick(logits, plan.work)
        self._scheduler.commit(plan.work, time.monotonic())
        self._deliver(plan.work, picks)
        self._record.end()
        self._scheduler.pace.learn(plan.prompts, self._record.last_seconds)
        return True

    def _drain(self) -> None:
        """Take in what came since the last step: requests first, so that one may be cancelled as soon as it came."""
        arrivals = self._inbox.take()
        if arrivals is None:
            return
        for request in arrivals.requests:
            if request.id in self._live:
                self._inbox.left(request)
                self._scheduler.loads.drop(request)
                self._tell(request, Delivery(finish_reason="error", error=Conflict(f"{request.id} runs already")))
                continue
            self._live[request.id] = request
            self._scheduler.add(request)
        while (key := self._inbox.overfull()) is not None:
            greedy = self._scheduler.waiting.newest(key)
            if greedy is None:
                break
            self._end(greedy, Delivery(finish_reason="error", error=self._inbox.full()))
        for request_id in arrivals.cancelled:
            if request_id in self._live:
                self._end(self._live[request_id], Delivery(finish_reason="cancelled"))
        for digest in arrivals.forgotten:
            self._scheduler.unload(digest)
        if arrivals.wanted_bytes:
            self._scheduler.press(arrivals.wanted_bytes, time.monotonic())

    def _announce(self, plan: StepPlan) -> None:
        for request in plan.entered:
            self._inbox.left(request)
        for request, delivery in plan.ended:
            self._last(request, delivery)
        self._pass_on()

    def _deliver(self, work: list[ScheduledRequest], picks: list[SampledToken]) -> None:
        row = 0
        for request, _, logits in work:
            if not logits:
                continue
            if request.scored:
                delivery = stop_conditions.score(request, picks[row : row + logits])
            else:
                delivery = stop_conditions.accept(request, picks[row], self._eos_ids)
                self._record.generated += 1
            row += logits
            if delivery is None:
                continue
            if delivery.finish_reason is None:
                self._tell(request, delivery)
            else:
                self._end(request, delivery)

    # -- what a request hears

    def _end(self, request: Request, delivery: Delivery) -> None:
        """End a request that the scheduler still has."""
        self._scheduler.end(request, time.monotonic(), trusted=not isinstance(delivery.error, NotFinite))
        self._last(request, delivery)

    def _last(self, request: Request, delivery: Delivery) -> None:
        """The one place from which a request hears of its end."""
        if self._live.pop(request.id, None) is None:
            return
        self._inbox.left(request)
        self._tell(request, delivery)

    def _tell(self, request: Request, delivery: Delivery) -> None:
        try:
            request.deliver(delivery)
        except Exception:  # whoever listens has a fault of its own: neither the step nor the others may suffer
            log.exception("request %s: its listener failed", request.id)
            if request.state is not State.DONE:
                self._inbox.cancel(request.id)
        if delivery.finish_reason is not None:
            # Who listens keeps its requests, and each of them who listens: the two would stay until the collector comes
            # by, which sees nothing of the megabytes that a grammar has.
            request.deliver, request.constraint = _nobody, None

    def _pass_on(self) -> None:
        """Let those who have been told something come for it, if anybody has."""
        try:
            self._told()
        except Exception:
            log.exception("those who were told could not be woken")


def _nobody(delivery: Delivery) -> None:
    """Who listens to a request that has ended."""
