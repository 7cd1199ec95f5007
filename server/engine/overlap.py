"""`OverlappedEngine`: schedules the next step while the device computes the current one (asynchronous scheduling).

The next step is scheduled and launched before the tokens of the current one are read. A token that is not known yet is
-1 - r in its request's output, where r is its row among those that the current step samples. The runner replaces it on
the device. Then the current step is read and delivered.

Consequences:

- An answer that has ended by an end token or a stop string, or was cancelled, has one row too many in the next step.
  Its token is ignored. Its keys and values are in a block that later steps overwrite.
- An answer that ends by `max_tokens` has no row in the next step, and another request may take its place.
- A request whose next token needs more than logits and temperature (penalties, a grammar, log-probabilities, scores)
  makes its step a synchronous one, which is read before the next is scheduled.
- A request is never preempted while its token is unknown: if the next schedule may preempt, the current step is read
  first. So block hashes and recomputed prompts contain known tokens only.

This is correct because the device executes steps, sampling and copies into slots in the order of their launch.
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
from server.engine.sampler import DeviceSamples, SampledToken, to_sampled_tokens
from server.engine.scheduler_output import SchedulerOutput

log = logging.getLogger(__name__)


@runtime_checkable
class DeviceRunner(Runner, Protocol):
    """A runner that computes asynchronously.

    `run` replaces a token below 0 by the token that was last sampled in row -1 - token.
    """

    def wait_until_nearly_done(self) -> None:
        """Wait until the next step must be scheduled to keep the device busy. Requests that arrive until then join."""

    def wait(self) -> None:
        """Wait until the device is idle. Raises the error after which it cannot be used again."""


class _PendingStep(NamedTuple):
    output: SchedulerOutput
    samples: DeviceSamples
    launched: float


class OverlappedEngine(Engine):
    """An `Engine` on a `DeviceRunner`, which samples the tokens."""

    def __init__(self, runner: DeviceRunner, **options: Any) -> None:
        super().__init__(runner, **options)
        self._device = runner
        self._pending: _PendingStep | None = None
        """The step whose tokens are not read yet."""
        self._last_end = -math.inf

    def step(self) -> bool:
        """Launch a step and read the previous one. Returns False if there was neither."""
        now = self._stats.begin()
        if self._pending is not None:
            self._stats.wait_for_previous(self._pending.output, self._device.wait_until_nearly_done)
            now = time.monotonic()
        self._drain_inbox()
        if self._scheduler.may_preempt:
            self._read_pending()
        output = self._scheduler.schedule(now)
        self._announce(output)
        if not output.scheduled:
            if self._pending is None:
                return self._stats.cancel()
            self._read_pending()
            self._device.wait()  # for copies that no step follows
            return self._stats.end_previous()
        batch = build_batch(output.scheduled)
        launched = time.monotonic()
        logits = self._stats.run(output, lambda: self._runner.run(batch))
        samples = self._sampler.sample_async(logits, output.scheduled)
        self._read_pending()
        if samples is None:
            tokens = self._stats.wait(lambda: self._sampler.sample(logits, output.scheduled))
            self._record_time(output, launched)
            scheduled, tokens = _still_running(output.scheduled, tokens)
            self._scheduler.commit(scheduled, time.monotonic())
            self._deliver(scheduled, tokens)
            return self._stats.end()
        self._scheduler.commit(_still_running(output.scheduled, ())[0], time.monotonic())
        _append_placeholders(output.scheduled)
        self._pending = _PendingStep(output, samples, launched)
        if self._scheduler.cpu_sharing.enabled:  # deliver before the CPU is left idle
            self._read_pending()
        return self._stats.end()

    def _read_pending(self) -> None:
        """Read and deliver the tokens of the pending step, if any."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        ids = self._stats.wait_for_previous(pending.output, pending.samples.read)
        self._record_time(pending.output, pending.launched)
        scheduled, tokens = _still_running(pending.output.scheduled, to_sampled_tokens(ids))
        now = time.monotonic()
        for request, _, logits in scheduled:
            if logits:
                _remove_placeholder(request)
                if not request.output:
                    request.first_token = now
        self._deliver(scheduled, tokens)

    def _record_time(self, output: SchedulerOutput, launched: float) -> None:
        """Update the prefill budget with the time of a step that has finished."""
        began, self._last_end = max(launched, self._last_end), time.monotonic()
        self._scheduler.budget.update(output.prefill, self._last_end - began)

    def _try_read_pending(self) -> BaseException | None:
        """Read the pending step after a failure, because some answers may be complete with it. Returns the error."""
        try:
            self._read_pending()
        except BaseException as error:  # all requests must still be ended
            log.exception("the tokens of a step were lost: %s", self._stats.current_step())
            return error
        return None

    def _deliver_last(self, request: Request, delivery: Delivery) -> None:
        _remove_placeholder(request)
        super()._deliver_last(request, delivery)

    def _end_all(self) -> None:
        if self._fatal is None:
            self._try_read_pending()
        super()._end_all()
        if self._fatal is None:
            self._device.wait()  # the device may still use the KV cache and slots

    def _recover(self, error: BaseException) -> None:
        """Also check whether the device still works. After some CUDA errors it never does in the same process."""
        fatal = None
        try:
            self._device.wait()
        except Exception as device_error:
            self._pending = None
            fatal = f"the device cannot be used after an error ({device_error})"
            error = device_error
        super()._recover(self._try_read_pending() or error)
        if fatal is not None:
            self._fatal = fatal


def engine_on(runner: Runner, **options: Any) -> Engine:
    """Return an `OverlappedEngine` if the runner computes asynchronously, else an `Engine`."""
    if isinstance(runner, DeviceRunner):
        return OverlappedEngine(runner, **options)
    return Engine(runner, **options)


def _still_running(
    scheduled: Sequence[ScheduledRequest], tokens: Sequence[SampledToken]
) -> tuple[list[ScheduledRequest], list[SampledToken]]:
    """Return the part of a step whose requests have not ended since its launch, and their tokens."""
    kept: list[ScheduledRequest] = []
    theirs: list[SampledToken] = []
    row = 0
    for item in scheduled:
        if item.request.state is State.RUNNING:
            kept.append(item)
            theirs += tokens[row : row + item.logits]
        row += item.logits
    return kept, theirs


def _append_placeholders(scheduled: Sequence[ScheduledRequest]) -> None:
    """Append a placeholder for each unknown token, unless it is the request's last one."""
    row = 0
    for request, _, logits in scheduled:
        if logits and request.state is State.RUNNING and len(request.output) + 1 < request.sampling.max_tokens:
            request.output.append(-1 - row)
        row += logits


def _remove_placeholder(request: Request) -> None:
    if request.output and request.output[-1] < 0:
        request.output.pop()
