"""`Scheduler`: which requests run in the next step, with how many tokens, and what becomes of them after it.

The only one, with its loads, that changes a request's state. Owns the running set and, through the KV cache, the slots,
the queue and the loads, everything that a request holds. Does not know models, logits or text.

A step's tokens go to running answers first (one each), then to prompts that have begun, then to requests that enter.
Prompts that need more than all of the step's rows for prompts come last, so that a short one does not wait for a long
one; the oldest of them has half of these rows, so that it does not wait for ever, and the other half where no other has
half of what it has left, or less. Where a step of all its rows would take too long, prompts have fewer
(`PrefillBudget`).

Requests enter when their blocks and their slots can be reserved together, in the queue's order. A request whose
adapters are not in memory is passed over until they are; one that finds no room is passed over too, until it has
waited `age_limit` seconds for it: then nothing else enters before it does, but for what runs on the base alone where
slots are all that it lacks. So it is for room in RAM, where slots hold it. What less urgent requests hold, running or
waiting, is given up for a more urgent one that lacks it. Where adapters are copied to a device, a request whose own are
copied now has its first tokens computed a step later, so that the copy goes on beside this one.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from server.engine.adapter_loader import AdapterLoader
from server.engine.adapter_slots import AdapterSlots
from server.engine.batch import ScheduledRequest
from server.engine.kv_cache import Key, KVCache, next_key
from server.engine.prefill_budget import PrefillBudget
from server.engine.queue import OUTPUT_COST, FairQueue
from server.engine.request import Delivery, Request, State
from server.engine.step_plan import StepPlan
from server.errors import DeadlineExceeded, EngineFailed, NoCapacity

log = logging.getLogger(__name__)

PRESSED_SECONDS = 0.2
"""For how long a call for room in RAM counts; it is repeated more often than that while it lasts."""

PREFETCHED = 8
"""Waiting requests whose adapters are copied to a GPU ahead of them."""

REST = 1.25
"""The longest that processors are lent after a step, in times of what it took: with less, a job beside half a load
keeps under 0.3 of its speed where steps are quick; with more, answers come more slowly still."""

LENT_ROWS = 12
"""Rows of prompts that a step may have while processors are lent, so that neither it nor the rest after it is long."""


@dataclass(frozen=True)
class SchedulerConfig:
    """What a step may be: rows of `max_batch` requests and `max_step_tokens` tokens, of which `max_logits` logits,
    that hang after `step_limit` seconds."""

    max_batch: int = 32
    max_step_tokens: int = 512
    max_logits: int = 64
    age_limit: float = 2.0
    step_limit: float = math.inf


class Scheduler:
    """See the module. `root` gives the prefix cache's name for what comes before a request's first token."""

    def __init__(
        self,
        kv: KVCache,
        slots: AdapterSlots,
        loads: AdapterLoader,
        limits: SchedulerConfig,
        root: Callable[[Request], Key],
    ) -> None:
        self.kv = kv
        self.slots = slots
        self.loads = loads
        self.limits = limits
        self.pace = PrefillBudget(limits.max_step_tokens, limits.step_limit)
        self.waiting = FairQueue()
        self.running: list[Request] = []
        self.preemptions = 0
        self.lending = False
        """Whether processors are lent to others between steps; may be set from any thread."""
        self._planned_rest = 0.0
        """What the last plan went by: it is a short step, or no rest may follow it."""
        self._root = root
        self._blocked: dict[Request, float] = {}
        """Those that had their weights and found no room, and since when."""
        self._slotless: set[Request] = set()
        """Those of them that had room for their tokens when they were last tried: slots are what they lack."""
        self._spared = 0
        """Blocks that are left to one that nobody else may pass by."""
        self._coming: dict[Key, Request] = {}
        """The full blocks that running requests are about to compute: who shares them waits instead of repeating it."""
        self._changed = False
        """Whether anything has come or been given back since the queue was last gone through in vain."""
        self._first_deadline = math.inf
        """No request that waits or runs has an earlier one."""
        self._pressed = -math.inf
        """When a load last lacked room in RAM."""
        self._doubtful = False
        """Whether one has since it was last looked at whether such a load can come at all."""

    # -- between steps

    def begin(self, request: Request) -> None:
        """From any thread: a new request that nobody waits before, and that there is a place for, has its adapters read
        at once. `add` has to follow, or the load be dropped."""
        if len(self.running) < self.limits.max_batch and not self.slots.has(request.mix):
            self.loads.begin(request)

    def add(self, request: Request) -> None:
        """A new request waits from now on."""
        self.waiting.add(request)
        if self.slots.has(request.mix):
            self.loads.drop(request)
        else:
            self.loads.add(request, request.submitted)
        self._first_deadline = min(self._first_deadline, request.deadline)
        self._changed = True

    def end(self, request: Request, now: float, *, trusted: bool = True) -> None:
        """Take a request out, in whatever state it is; all that it held is free after it.

        What it computed can be found again only if it is `trusted`.
        """
        assert request.state is not State.DONE, "a request ends once"
        if request.state is State.RUNNING:
            if not trusted:
                self.kv.disown(request.blocks)
            self.running.remove(request)
            self.waiting.leave(request)
            self._release(request)
        else:
            self.waiting.remove(request)
            self._stop_waiting(request)
        request.state = State.DONE
        request.finished = now
        self._changed = True

    def unload(self, digest: str) -> None:
        """An adapter leaves its slot as soon as no request holds it."""
        self.slots.unload(digest)
        self._changed = True

    def press(self, nbytes: int, now: float) -> None:
        """A load lacks `nbytes` of RAM: slots that no request holds are emptied for it, if that frees any, and less
        urgent loads given up."""
        self.slots.release_idle(nbytes)
        if self.waiting:
            self.loads.give_way(self.waiting.priority)
        self._pressed = now
        self._doubtful = self._changed = True

    def reset(self) -> None:
        """After a failed step: nothing that was computed is trusted any more. Running requests must have ended."""
        assert not self.running, "running requests end before a reset"
        self.kv.clear()
        self.slots.reset()
        self._changed = True

    # -- a step

    @property
    def keeps_all(self) -> bool:
        """Whether the next plan is sure to take back nothing that a running request holds."""
        if len(self.running) > self.kv.available:  # each needs one block more, at most
            return False
        return not self.waiting or not self.running or self._youngest(self.running).priority <= self.waiting.priority

    def plan(self, now: float) -> StepPlan:
        """What runs next. Requests that end here (deadline, failed load) are done and only have to be told."""
        plan = StepPlan(most_logits=self.limits.max_logits)
        self._sweep(now, plan)
        self._settle_loads(now, plan)
        self._planned_rest = self._spare()
        plan.most = self._most_tokens()
        plan.whole = sum(request.computed >= request.goal for request in self.running)
        self._make_way(now, plan)
        self._answer(plan)
        self._prompt(now, plan)
        return plan

    def commit(self, work: list[ScheduledRequest], now: float) -> None:
        """The step has run: its tokens are in the cache, and full blocks can be found by their content."""
        for request, count, logits in work:
            request.computed += count
            if self.kv.remembers and request.computed >= (request.kept + 1) * self.kv.block_size:
                self._keep_full_blocks(request)
            if logits and not request.scored:
                if not request.output:
                    request.first_token = now
                self.waiting.charge(request, OUTPUT_COST)

    # -- processors lent

    @property
    def rest(self) -> float:
        """How long the processors are to be left to others after the last step, in times of what it took: no longer
        than it was planned for."""
        return min(self._planned_rest, self._spare())

    def _spare(self) -> float:
        """Up to a quarter of `max_batch` it is REST, from half of it on nothing.

        What a server that is not full lends is mostly not lost: a step of few sequences takes nearly as long as one of
        some more, and requests that come more slowly than they could be taken gather in fewer and larger steps. Those
        that wait for a step, or for what running ones hold, fill it as these do: where prompts are most of the work few
        ever run. Those that wait for a load do not, which no step brings nearer.
        """
        if not self.lending:
            return 0.0
        ready = (r for r in self.waiting if self.slots.has(r.mix) or not self.loads.holds_up(r))
        most = self.limits.max_batch
        count = len(self.running) + sum(1 for _ in itertools.islice(ready, most))
        return REST * min(1.0, max(0.0, 2.0 - 4.0 * count / most))

    def _most_tokens(self) -> int:
        most = self.limits.max_step_tokens
        return min(most, len(self.running) + LENT_ROWS) if self._planned_rest else most

    # -- deadlines and loads

    def _sweep(self, now: float, plan: StepPlan) -> None:
        if now < self._first_deadline:
            return
        live = [*self.running, *self.waiting]
        self._first_deadline = min((r.deadline for r in live if r.deadline > now), default=math.inf)
        for request in [r for r in live if r.deadline <= now]:
            waited = f"{now - request.submitted:.1f} s"
            where = "running" if request.state is State.RUNNING else "waiting"
            self._end_in(plan, request, DeadlineExceeded(f"the deadline passed after {waited}, while {where}"), now)

    def _settle_loads(self, now: float, plan: StepPlan) -> None:
        came, failed = self.loads.settle(now)
        if came:
            self._changed = True
            self._pressed = -math.inf
        if self._doubtful:
            self._doubtful = False
            failed += self.loads.misfits()
        for request, error in failed:
            self._end_in(plan, request, error, now)

    def _end_in(self, plan: StepPlan, request: Request, error: Exception, now: float) -> None:
        self.end(request, now)
        plan.ended.append((request, Delivery(finish_reason="error", error=error)))

    # -- running requests

    def _answer(self, plan: StepPlan) -> None:
        """A token for each of those whose prompt is done. Makes room for it by preemption."""
        size = self.kv.block_size
        for request in [r for r in self.running if r.goal > r.computed >= len(r.blocks) * size]:
            if request.state is State.RUNNING:
                self._grow(request)
        for request in self.running:
            if request.goal - request.computed == 1:
                plan.add(request, 1, 1)

    def _prompt(self, now: float, plan: StepPlan) -> None:
        """The rest of the step for prompts, of which some enter."""
        prompts = [r for r in self.running if r.goal - r.computed > 1]
        long = [r for r in prompts if r.goal - r.computed > self._room(r.computed, plan)]
        depth = logits = 0
        if long:
            depth = long[0].computed
            plan.held, logits = self._chunk(long[0], plan, -(-self._room(depth, plan) // 2))
        self._hold(plan, depth, plan.held, logits)
        for request in prompts:
            if request not in long:
                self._add_chunk(request, plan)
        self._enter(now, plan)
        shorter = [r for r in long if 2 * (r.goal - r.computed) <= long[0].goal - long[0].computed]
        for request in sorted(shorter, key=lambda r: r.goal - r.computed):
            self._add_chunk(request, plan)
        self._hold(plan, depth, -plan.held, -logits)
        for request in long:
            if request not in shorter:
                self._add_chunk(request, plan)

    def _hold(self, plan: StepPlan, depth: int, count: int, logits: int) -> None:
        """Keep so much of the step from others; or give it back, if below 0."""
        plan.most -= count
        plan.most_logits -= logits
        self.pace.add(depth, count, plan.prompts)

    def _room(self, depth: int, plan: StepPlan) -> int:
        """How many rows more a prompt with so many tokens before them may have."""
        return min(plan.most - plan.tokens, self.pace.room(depth, plan.prompts))

    def _make_way(self, now: float, plan: StepPlan) -> None:
        """A less urgent request gives up its place, one a step, while a more urgent one finds none."""
        if not self.waiting or not self.running:
            return
        urgent = self.waiting.priority
        victims = [r for r in self.running if r.priority > urgent]
        if not victims:
            return
        blocked = [r for r in self._blocked if r.priority == urgent]
        if self._has_place(plan) and self._slotless.issuperset(blocked):
            if not blocked and not (self.slots.hold_ram and self._owes_room(now)):
                return
            used = {digest for r in self.running if r.priority <= urgent for digest in r.mix.digests}
            victims = [r for r in victims if not used.issuperset(r.mix.digests)]  # whose slots fall idle
        if victims:
            self._preempt(self._youngest(victims))

    def _grow(self, request: Request) -> None:
        """A block for the request's next token, if it needs one."""
        while request.computed >= len(request.blocks) * self.kv.block_size:
            got = self.kv.reserve(1)
            if got is not None:
                request.blocks.extend(got)
                return
            victim = self._youngest(self.running)
            self._preempt(victim)
            if victim is request:
                return

    @staticmethod
    def _youngest(running: list[Request]) -> Request:
        """Who of them is preempted first: of the least urgent, the last that entered."""
        return max(reversed(running), key=lambda r: r.priority)

    def _preempt(self, request: Request) -> None:
        """Take back all that a request holds. What it has computed is found again if it is still cached then."""
        self.running.remove(request)
        self._release(request)
        request.state = State.QUEUED
        self.waiting.put_back(request)
        self.preemptions += 1
        self._changed = True

    def _release(self, request: Request) -> None:
        self._let_come(request, request.kept, len(request.keys) - 1)
        self.kv.free(request.blocks)
        self.slots.free(request.mix)
        del request.blocks[:]
        request.slots = ()
        request.computed = request.kept = 0
        request.scores.clear()

    def _add_chunk(self, request: Request, plan: StepPlan) -> None:
        """As much of a prompt as the step has room for."""
        count, logits = self._chunk(request, plan, self._room(request.computed, plan))
        if count > 0:
            plan.add(request, count, logits)
            self.pace.add(request.computed, count, plan.prompts)

    def _chunk(self, request: Request, plan: StepPlan, most: int) -> tuple[int, int]:
        """How many of a prompt's tokens, at most so many, and how many of their logits the step has room for."""
        before = max(0, request.first_logit - request.computed)
        """Rows that come before the first whose logits are wanted."""
        count = min(request.goal - request.computed, most, before + max(0, plan.most_logits - plan.logits))
        return max(0, count), max(0, count - before)

    def _keep_full_blocks(self, request: Request) -> None:
        full = request.computed // self.kv.block_size
        keys = self._keys(request, full)
        for i in range(request.kept, full):
            self.kv.keep(request.blocks[i], keys[i + 1], request.mix)
        self._let_come(request, request.kept, full)
        request.kept = full

    def _let_come(self, request: Request, start: int, stop: int) -> None:
        """Blocks `start` to `stop` of the request are there, or will not be: nobody waits for them any more."""
        for key in request.keys[start + 1 : stop + 1] if self._coming else ():
            if self._coming.get(key) is request:
                del self._coming[key]
                self._changed = True

    def _keys(self, request: Request, count: int) -> list[Key]:
        """The request's root and the keys of its first `count` blocks, at least."""
        keys, size = request.keys, self.kv.block_size
        if not keys:
            keys.append(self._root(request))
        for i in range(len(keys) - 1, count):
            keys.append(next_key(keys[-1], request.slice(i * size, (i + 1) * size)))
        return keys

    # -- waiting requests

    def _enter(self, now: float, plan: StepPlan) -> None:
        if not self._changed or not self.waiting:
            return
        owing = self._owes_room(now)
        self._changed = owing  # a request that is refused changes it again
        candidates = self._candidates(now)
        while not self._is_full(plan):
            request = next(candidates, None)
            if request is None:
                break
            if owing and not (self._needs_no_ram(request) or self.loads.came_for(request)):
                continue
            try:
                self._try(request, now, plan)
            except Exception as e:
                self._refuse(plan, request, e, now)
        else:
            self._changed = True  # the rest is still to be tried
        if self.slots.room is not None and not owing:
            self._prefetch(now, plan)

    def _needs_no_ram(self, request: Request) -> bool:
        """Whether what it runs on is not in RAM for it: the base alone, or copies that are there."""
        return not request.mix or (not self.slots.hold_ram and self.slots.has(request.mix))

    def _is_full(self, plan: StepPlan) -> bool:
        return self._room(0, plan) <= 0 or not self._has_place(plan)

    def _has_place(self, plan: StepPlan) -> bool:
        """Whether another request may have a row."""
        return len(self.running) - plan.whole < self.limits.max_batch

    def _prefetch(self, now: float, plan: StepPlan) -> None:
        """Ask for the adapters of the next to enter, and let those that have come be copied beside the steps."""
        following = list(itertools.islice(self.waiting.in_order(), PREFETCHED))
        wanted = {digest for request in following for digest in request.mix.digests}
        for request in following:
            if not self.slots.has(request.mix):
                weights = self.loads.ask(request, now)
                if weights is not None:
                    try:
                        self.slots.offer(request.mix, weights, wanted)
                    except Exception as e:
                        self._refuse(plan, request, e, now)

    def _refuse(self, plan: StepPlan, request: Request, error: Exception, now: float) -> None:
        """Its adapters could not be placed: that is this request's failure alone."""
        if not isinstance(error, NoCapacity):
            log.error("%s: its adapters could not be placed", request.id, exc_info=error)
            error = EngineFailed("the request's adapters could not be placed; the server's log says why")
        # Whoever keeps the error would keep the adapters' memory by the frames that raised it.
        self._end_in(plan, request, error.with_traceback(None), now)

    def _owes_room(self, now: float) -> bool:
        """Whether a load of the most urgent has lacked room in RAM for too long, so that slots must fall idle.

        Only those may enter then that need no RAM, or whose own load has come: these hold room themselves, and give it
        back by running.
        """
        pressed = now - self._pressed < PRESSED_SECONDS
        return pressed and self.loads.waited(self.waiting.priority, now) > self.limits.age_limit

    def _candidates(self, now: float) -> Iterator[Request]:
        self._spared = 0
        without_slots = False
        starving = self._starving(now)
        if starving is not None:
            yield starving
            if starving.state in (State.QUEUED, State.LOADING):  # nobody passes it by who could take what it lacks
                if starving not in self._slotless:
                    return
                self._spared = self.kv.blocks_for(starving.goal)
                without_slots = True
        for request in self.waiting.in_order():
            if request.priority > self.waiting.priority:
                return
            if request is not starving and not (without_slots and request.mix):
                yield request

    def _starving(self, now: float) -> Request | None:
        """The first of the best waiting priority that has waited for room too long, if its weights are there: by the
        queue's order, as all that wait for room grow old, and one key's many would go before another's one."""
        first = next(iter(self._blocked.values()), now)  # they stand in the order of their ages
        if now - first <= self.limits.age_limit:
            return None
        for request in self.waiting.in_order():
            if request.priority != self.waiting.priority:
                return None
            if now - self._blocked.get(request, now) > self.limits.age_limit and (
                self.slots.has(request.mix) or self.loads.ask(request, now) is not None
            ):
                return request
        return None

    def _try(self, request: Request, now: float, plan: StepPlan) -> None:
        """Let a request in if its weights, its slots and its blocks are all there."""
        weights = None
        if not self.slots.has(request.mix):
            weights = self.loads.ask(request, now)
            if weights is None:
                return
        most, keys, found = 0, request.keys, list[int]()
        if self.kv.remembers:
            most = request.first_logit // self.kv.block_size
            keys = self._keys(request, request.goal // self.kv.block_size)
            found = self.kv.match(keys[1 : most + 1])
        if len(found) < most and keys[len(found) + 1] in self._coming:
            self.kv.free(found)
            return
        if self._room(len(found) * self.kv.block_size, plan) <= 0:
            self.kv.free(found)
            self._changed = True  # the next step has room again
            return
        fresh = [digest for digest in request.mix.digests if not self.slots.holds(digest)]
        need = self.kv.blocks_for(request.goal) - len(found)
        spare = len(self.running)  # each of the others may need a block soon
        fits, slots = need + spare + self._spared <= self.kv.available, None
        try:
            if fits:
                slots = self.slots.reserve(request.mix, weights)
        finally:
            if slots is None:
                self.kv.free(found)
        if slots is None:
            self._blocked.setdefault(request, now)
            if fits:
                self._slotless.add(request)
            else:
                self._slotless.discard(request)
            return
        blocks = self.kv.reserve(need)
        assert blocks is not None, "there was room"
        self.waiting.enter(request)
        self._stop_waiting(request)
        request.state = State.RUNNING
        request.slots = slots
        request.blocks.extend(found + blocks)
        request.kept = len(found)
        request.computed = len(found) * self.kv.block_size
        self.running.append(request)
        if self.kv.remembers:
            for key in keys[len(found) + 1 :]:
                self._coming.setdefault(key, request)
        if math.isnan(request.admitted):
            request.admitted = now
            request.cached = request.computed
            self.kv.count_query(len(request.prompt), len(found))
            self.waiting.charge(request, max(1, len(request.prompt) - request.computed))
            plan.entered.append(request)
        if self.slots.room is not None:
            plan.copied.update(fresh)
        if not (plan.work or plan.held) or plan.copied.isdisjoint(request.mix.digests):
            self._add_chunk(request, plan)

    def _stop_waiting(self, request: Request) -> None:
        """Nothing is kept for it any more that its waiting needed: loads, and its age."""
        if self.loads.leave(request):
            self._changed = True  # who was refused that place may stand before this one in the queue
        self._blocked.pop(request, None)
        self._slotless.discard(request)
