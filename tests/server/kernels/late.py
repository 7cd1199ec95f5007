"""Simulated CUDA streams that run their work as late or as early as the events allow."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode


class LateStream:
    """Work submitted to a stream, of which `done` items have run."""

    def __init__(self) -> None:
        self.given: list[Callable[[], object] | LateEvent] = []
        self.done = 0

    def wait_event(self, event: LateEvent) -> None:
        self.given.append(event)

    def wait_stream(self, other: LateStream) -> None:
        self.wait_event(LateEvent(other))


class LateEvent:
    """The end of the work submitted to a stream so far."""

    def __init__(self, stream: LateStream) -> None:
        self.stream, self.count = stream, len(stream.given)

    def query(self) -> bool:
        return self.stream.done >= self.count


class LateDevice(TorchFunctionMode):
    """Queues copies between tensors on the current stream; they read and write when they run.

    `draw` chooses which stream runs next.
    """

    def __init__(self, draw: random.Random, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.main, self.copies = LateStream(), LateStream()
        self._draw, self._current = draw, self.main
        monkeypatch.setattr(torch.cuda, "Event", lambda: _Recorded(self))
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self._current)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.copy_:
            self._current.given.append(lambda: args[0].copy_(args[1]))
            return args[0]
        return func(*args, **(kwargs or {}))

    def go_on(self, most: int) -> None:
        """Run up to `most` items of streams that do not wait."""
        for _ in range(most):
            able = [stream for stream in (self.main, self.copies) if self._is_able(stream)]
            if not able:
                return
            stream = self._draw.choice(able)
            each = stream.given[stream.done]
            stream.done += 1
            if not isinstance(each, LateEvent):
                with torch._C.DisableTorchFunction():
                    each()

    def finish(self) -> None:
        while any(stream.done < len(stream.given) for stream in (self.main, self.copies)):
            self.go_on(1000)

    @staticmethod
    def _is_able(stream: LateStream) -> bool:
        if stream.done == len(stream.given):
            return False
        each = stream.given[stream.done]
        return not isinstance(each, LateEvent) or each.query()

    @contextlib.contextmanager
    def _on(self, stream: LateStream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before


class _Recorded(LateEvent):
    """An event with torch's interface."""

    def __init__(self, device: LateDevice) -> None:
        self._device = device

    def record(self) -> None:
        super().__init__(self._device._current)

    def synchronize(self) -> None:
        while not self.query():
            self._device.go_on(1)
