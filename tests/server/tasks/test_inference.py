"""What is recorded of calls of several answers, and of those that never ran."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.request import Sampling
from server.errors import QueueFull
from server.tasks.admission import Admission
from server.tasks.inference import Caller, Generation, Inference, Reply, ended, timings


def test_a_call_of_several_answers_lasts_from_its_first_to_its_last() -> None:
    """The second began first, the third never ran."""
    target, lease = SimpleNamespace(task=None, made_up=False), SimpleNamespace(versions=())
    generation: Any = Generation("g", target, lease, Caller(arrived=1.0), None)  # type: ignore[arg-type]
    times = (3.0, 5.0, 9.0, 4), (2.0, 4.0, 8.0, 6), (math.nan, math.nan, 7.0, 0)
    for admitted, first, finished, tokens in times:
        request: Any = SimpleNamespace(
            prompt=(1, 2), output=[0] * tokens, submitted=1.5, admitted=admitted, first_token=first, finished=finished,
            load_seconds=0.25,
        )  # fmt: skip
        generation.replies.append(Reply(request))
    record = ended(generation)
    assert (record.submitted, record.admitted, record.first_token, record.finished) == (1.0, 2.0, 4.0, 9.0)
    assert (record.prompt_tokens, record.generated_tokens, record.longest) == (4, 10, 6)
    assert timings(generation) == {
        "queue_ms": 750.0, "load_ms": 250.0, "ttft_ms": 3000.0, "total_ms": 8000.0, "tokens_per_second": 1.0,
    }  # fmt: skip


def test_a_call_that_is_refused_at_the_door_leaves_its_place() -> None:
    refused: list[Any] = []

    def check_call(prompts: Any) -> None:
        raise QueueFull("full", retry_after=1.0)

    engine, metrics = SimpleNamespace(check_call=check_call), SimpleNamespace(record=refused.append)
    inference = Inference(engine, None, metrics, None, lambda error: 429)  # type: ignore[arg-type]
    inference.admission = Admission(per_key=1)
    target: Any = SimpleNamespace(task=None, choice=[("a", 1.0)], made_up=False)
    for _ in range(2):
        with pytest.raises(QueueFull, match="full"):
            inference.start(target, [[1]], [Sampling()], Caller("key"))
    assert [(ended.status, ended.adapters) for ended in refused] == [("429", ("a",))] * 2
