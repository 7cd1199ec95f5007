"""The engine under load: fairness between keys, and more requests than fit."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from server.errors import DeadlineExceeded, QueueFull


def first_tokens(bench: Callable[..., Any], share: float, load: float, steps: int = 1200) -> list[int]:
    """Steps from arrival to first token of requests of the key "small", which sends `share` of all requests.

    Time is counted in steps. A request takes one of 8 places for 8 steps, so a load of 1 is one request per step.
    """
    b = bench(max_queue=10_000, max_queue_tokens=10**7, blocks=256, max_step_tokens=128)
    rng = random.Random(1)
    arrived: list[tuple[int, Any]] = []
    seen: dict[Any, int] = {}
    due = 0.0
    for step in range(steps):
        due += load
        while due >= 1:
            due -= 1
            key = "small" if rng.random() < share else "large"
            heard = b.submit([3 + rng.randrange(200) for _ in range(10)], fair_key=key, max_tokens=8)
            arrived.append((step, heard))
        b.engine.step()
        for start, heard in arrived:
            if heard.deliveries and heard not in seen:
                seen[heard] = step - start
        arrived = [(start, heard) for start, heard in arrived if heard not in seen]
    waiting = [steps - start for start, heard in arrived if heard.request.fair_key == "small"]
    return sorted([n for heard, n in seen.items() if heard.request.fair_key == "small"] + waiting)


@pytest.mark.parametrize("load", [0.9, 1.3])
def test_a_large_key_does_not_delay_a_small_one(bench: Callable[..., Any], load: float) -> None:
    even, uneven = (first_tokens(bench, share, load) for share in (0.5, 1 / 51))
    assert len(uneven) >= 10
    p95 = [values[int(0.95 * len(values))] for values in (even, uneven)]
    assert p95[1] <= max(2 * p95[0], p95[0] + 1)


def test_a_thousand_requests_are_answered_or_rejected_in_time(bench: Callable[..., Any], tools: Any) -> None:
    b = bench(max_queue=256, max_batch=16, max_slots=8, blocks=256, max_step_tokens=256)
    b.runner.before = lambda batch: time.sleep(0.001)
    b.engine.start()
    heard: list[Any] = []
    refused: list[QueueFull] = []
    lock = threading.Lock()
    deadline = time.monotonic() + 1.0

    def send(worker: int) -> None:
        rng = random.Random(worker)
        for _ in range(125):
            names = rng.sample([f"a{i}" for i in range(12)], rng.randrange(4))
            try:
                one = b.submit(
                    [rng.randrange(3, 200) for _ in range(12)],
                    mix=tools.mix_of(*names),
                    fair_key=str(rng.randrange(5)),
                    deadline=deadline,
                    max_tokens=4,
                )
            except QueueFull as error:
                with lock:
                    refused.append(error)
            else:
                with lock:
                    heard.append(one)

    threads = [threading.Thread(target=send, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = deadline + 2.0
    while not all(h.reason for h in heard) and time.monotonic() < end:
        time.sleep(0.005)
    assert all(h.reason for h in heard)
    assert len(heard) + len(refused) == 1000 and refused
    assert any(h.reason == "length" for h in heard)
    assert all(1 <= error.retry_after <= 30 for error in refused)
    for h in heard:
        if h.reason == "error":
            assert isinstance(h.error, DeadlineExceeded | QueueFull)
        else:
            assert h.tokens == tools.solo(h, b.runner.vocab)
    assert b.engine.stop(1.0)
    b.check_empty()
