"""What the card can do at most: the bandwidth and the rate of products that all else is a fraction of."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

WARM_SECONDS = 1.0
"""Work before anything is timed: an idle card's clocks are low."""
TOGETHER = 10
"""Launches that are timed as one, so that none waits for the host."""


def ceilings(bench: Any) -> None:
    """Bandwidth, of a copy (read and written) or a sum (read alone), whichever is higher, and the bf16 rate of a large
    product, on random data. Steps read, and memory that only reads is faster than one that turns.
    """
    copied, read, bench.peak = _measured(bench)
    bench.bandwidth = max(copied, read)
    bench.tell("bandwidth, GB/s", round(bench.bandwidth / 1e9, 1), copied=copied / 1e9, read=read / 1e9)
    bench.tell("bf16 products, TFLOP/s", round(bench.peak / 1e12, 1))


def again(bench: Any) -> None:
    """The same when all else is measured. Where that is more, the first was too low, and fractions of it too high."""
    copied, read, peak = _measured(bench)
    for name, first, last in (
        ("bandwidth", bench.bandwidth, max(copied, read)), ("bf16 products", bench.peak, peak),
    ):  # fmt: skip
        note = "higher: fractions of the first are too high" if last > first else "not higher"
        bench.tell(f"{name} at the end, of that at first", round(last / first, 3), note=note)
        print(f"  {note}", flush=True)


def _measured(bench: Any) -> tuple[float, float, float]:
    """Bytes copied and bytes read a second, operations a second."""
    size = 1 << (16 if bench.check else 31)
    source = torch.rand(size // 4, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * size / _least_seconds(bench, lambda: target.copy_(source))
    read = size / _least_seconds(bench, lambda: source.sum())
    n = 64 if bench.check else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.backend.dtype) for _ in range(2))
    return copied, read, 2 * n**3 / _least_seconds(bench, lambda: a @ b)


def _least_seconds(bench: Any, call: Callable[[], object]) -> float:
    """Of a call, the least of ten times, once the card is warm."""
    if bench.device.type != "cuda":
        seconds: float = bench.seconds(call)
        return seconds
    end = time.monotonic() + WARM_SECONDS
    while time.monotonic() < end:
        device_seconds(call, TOGETHER)
    return min(device_seconds(call, TOGETHER) for _ in range(10))


def device_seconds(call: Callable[[], object], count: int = 1) -> float:
    """Of a call by the GPU's own clock, in the mean of `count` that follow one another."""
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / count
