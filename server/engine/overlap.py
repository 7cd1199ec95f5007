"""`OverlappedEngine`: plans a step, and delivers the one before, while a device or a thread of its own computes.

Owns the step whose tokens have not been read yet: its flight. The next step is planned and launched without them: a
token that is still to come is -1 - r in its request's output, r being its row among those that the flight draws, and
the runner puts in what the device has drawn there. Then the flight lands: its tokens are read and delivered.

What a plan made without them cannot know is made good when they land:
- An answer that has ended by an end token or a stop string, or was cancelled, has one row too many in the next step.
  Nobody reads what is drawn there; its keys and values are in a block that later steps write after it.
- An answer whose last token is on its way by max_tokens has no row in the next step, and another may have its place.
- A request whose next token depends on more than logits and temperature (penalties, a grammar, log-probabilities,
  scores) makes its step one that is read at once: nothing is planned ahead of it.
- What arrives after a plan waits for one step more: so the runner has it made as late as it can.
- A request is never preempted while its token is on its way: when the next plan might, the flight lands first. So
  what is looked up in the prefix cache, and what is computed again, is made of known tokens alone.
The order of the device is what makes this right: a step, its draw, and copies into slots run in the order of launch.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from server.engine.backends.protocol import Runner
from server.engine.batch import ScheduledRequest, build_batch
from server.engine.engine import Engine
from server.engine.request import Delivery, Request, State
from server.engine.sampler import DeviceSamples, SampledToken, drawn_picks
from server.engine.step_plan import StepPlan

log = logging.getLogger(__name__)


@runtime_checkable
class DeviceRunner(Runner, Protocol):
    """A runner that computes while others go on. `run` takes a token below 0 for the one that was last drawn in row
    -1 - token."""

    def wait_until_nearly_done(self) -> None:
        """Wait until the next step has to be planned, so that the device need not wait for it: the later that is, the
        more of what arrives meanwhile is in it."""

    def wait(self) -> None:
        """Wait for all that the device was given. Raises a fault after which it answers nothing any more."""


class _Flight(NamedTuple):
    plan: StepPlan
    drawn: DeviceSamples
    launched: float


class OverlappedEngine(Engine):
    """An `Engine` on a `DeviceRunner`, by which tokens are drawn."""

    def __init__(self, runner: DeviceRunner, **options: Any) -> None:
        super().__init__(runner, **options)
        self._device = runner
        self._flight: _Flight | None = None
        self._landed = -math.inf
        """When the last step came to its end, before which the next did not begin."""

    def step(self) -> bool:
        """Launch a step and land the one before; False if there was neither."""
        now = self._record.begin()
        if self._flight is not None:
            self._record.land(self._flight.plan, self._device.wait_until_nearly_done)
            now = time.monotonic()
        self._drain()
        if not self._scheduler.keeps_all:
            self._land()
        plan = self._scheduler.plan(now)
        self._announce(plan)
        if not plan.work:
            if self._flight is None:
                return self._record.nothing()
            self._land()
            self._device.wait()  # for what follows no step, such as adapters that have left
            return self._record.landed()
        batch = build_batch(plan.work)
        launched = time.monotonic()
        logits = self._record.run(plan, lambda: self._runner.run(batch))
        drawn = self._sampler.ahead(logits, plan.work)
        self._land()
        if drawn is None:
            picks = self._record.wait(lambda: self._sampler.pick(logits, plan.work))
            self._took(plan, launched)
            work, picks = _running(plan.work, picks)
            self._scheduler.commit(work, time.monotonic())
            self._deliver(work, picks)
            return self._record.end()
        self._scheduler.commit(_running(plan.work, ())[0], time.monotonic())
        _promise(plan.work)
        self._flight = _Flight(plan, drawn, launched)
        if self._scheduler.lending:  # nobody waits for a token while processors rest
            self._land()
        return self._record.end()

    def _land(self) -> None:
        """Read and deliver the tokens of the step that is on its way, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        tokens = self._record.land(flight.plan, flight.drawn.read)
        self._took(flight.plan, flight.launched)
        work, picks = _running(flight.plan.work, drawn_picks(tokens))
        now = time.monotonic()
        for request, _, logits in work:
            if logits:
                _forget_promise(request)
                if not request.output:
                    request.first_token = now
        self._deliver(work, picks)

    def _took(self, plan: StepPlan, launched: float) -> None:
        """What was launched then has come to its end."""
        began, self._landed = max(launched, self._landed), time.monotonic()
        self._scheduler.pace.learn(plan.prompts, self._landed - began)

    def _land_before_the_end(self) -> BaseException | None:
        """What was drawn before a step failed, or the engine stops, is right: some answers are whole with it. Answers
        what kept it from being told, if anything has."""
        try:
            self._land()
        except BaseException as error:  # whatever it is, all that is left has to hear of its end
            log.exception("the tokens of a step were lost: %s", self._record.current_step())
            return error
        return None

    def _last(self, request: Request, delivery: Delivery) -> None:
        _forget_promise(request)
        super()._last(request, delivery)

    def _finish(self) -> None:
        """And let what was launched come to its end, while what it reads and writes is there."""
        if self._lost is None:
            self._land_before_the_end()
        super()._finish()
        if self._lost is None:
            self._device.wait()

    def _recover(self, error: BaseException) -> None:
        """And see whether the device still answers: after a fault (an address that is not there, a launch that failed,
        memory that lost a bit) it never does again in this process, whose requests would all fail from now on."""
        fault = None
        try:
            self._device.wait()
        except Exception as found:
            self._flight = None
            fault = f"the device answers nothing any more after a fault ({found})"
            error = found
        super()._recover(self._land_before_the_end() or error)
        if fault is not None:
            self._lost = fault


def engine_on(runner: Runner, **options: Any) -> Engine:
    """The engine that suits a runner: one that plans ahead wherever the runner computes meanwhile."""
    if isinstance(runner, DeviceRunner):
        return OverlappedEngine(runner, **options)
    return Engine(runner, **options)


def _running(
    work: Sequence[ScheduledRequest], picks: Sequence[SampledToken]
) -> tuple[list[ScheduledRequest], list[SampledToken]]:
    """The part of a step whose requests have not ended since it was launched, and their picks."""
    kept: list[ScheduledRequest] = []
    theirs: list[SampledToken] = []
    row = 0
    for item in work:
        if item.request.state is State.RUNNING:
            kept.append(item)
            theirs += picks[row : row + item.logits]
        row += item.logits
    return kept, theirs


def _promise(work: Sequence[ScheduledRequest]) -> None:
    """Give the token that each request is to have its place, unless it is the last."""
    row = 0
    for request, _, logits in work:
        if logits and request.state is State.RUNNING and len(request.output) + 1 < request.sampling.max_tokens:
            request.output.append(-1 - row)
        row += logits


def _forget_promise(request: Request) -> None:
    if request.output and request.output[-1] < 0:
        request.output.pop()
