"""Timings, records and scores of generations."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from server.engine.request import Sampling, TokenLogprob
from server.tasks.generation import Caller, Generation, Reply, request_record, samplings_per_choice, timings

NAN = math.nan


def generation(*sequences: tuple[float, float, float, int, float]) -> Generation:
    """A finished one; of each sequence: admitted, first token, finished, tokens, load time."""
    target, lease = SimpleNamespace(task=None, custom_mix=False), SimpleNamespace(versions=())
    made = Generation("g", target, lease, Caller(arrived=1.0), None)  # type: ignore[arg-type]
    for admitted, first, finished, tokens, load in sequences:
        request: Any = SimpleNamespace(
            prompt=(1, 2), output=[0] * tokens, submitted=1.5, admitted=admitted, first_token=first, finished=finished,
            load_seconds=load,
        )  # fmt: skip
        made.replies.append(Reply(request))
    return made


def test_several_sequences_last_from_the_first_to_the_last() -> None:
    made = generation((3.0, 5.0, 9.0, 4, 0.0), (2.0, 4.0, 8.0, 6, 0.25), (NAN, NAN, 7.0, 0, 0.0))
    record = request_record(made)
    assert (record.submitted, record.admitted, record.first_token, record.finished) == (1.0, 2.0, 4.0, 9.0)
    assert (record.prompt_tokens, record.generated_tokens, record.longest) == (4, 10, 6)
    assert record.tpot == pytest.approx(8 / 8)
    assert timings(made) == {
        "queue_ms": 750.0, "load_ms": 250.0, "ttft_ms": 3000.0, "total_ms": 8000.0, "tokens_per_second": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize(("admitted", "queue_ms"), [(NAN, 5750.0), (2.0, 750.0)])
def test_without_a_token_the_time_until_the_end_counts_as_waiting(admitted: float, queue_ms: float) -> None:
    assert timings(generation((admitted, NAN, 7.0, 0, 0.25))) == {
        "queue_ms": queue_ms, "load_ms": 250.0, "ttft_ms": 6000.0, "total_ms": 6000.0, "tokens_per_second": 0.0,
    }  # fmt: skip


def test_each_answer_to_one_prompt_has_its_own_seed() -> None:
    largest = (1 << 63) - 1
    seeds = [each.seed for each in samplings_per_choice(Sampling(seed=largest), 4)]
    assert (
        seeds[0] == largest and len(set(seeds)) == 4 and all(seed is not None and 0 <= seed < 1 << 63 for seed in seeds)
    )
    assert seeds == [each.seed for each in samplings_per_choice(Sampling(seed=largest), 4)]
    assert samplings_per_choice(Sampling(seed=5), 1) == [Sampling(seed=5)]
    assert samplings_per_choice(Sampling(), 3) == [Sampling()] * 3


def test_a_classification_chooses_the_label_with_the_largest_sum() -> None:
    made = generation()
    made.labels = ("no", "yes")
    made.replies = [Reply(None, logprobs=[TokenLogprob(1, value)] * 2) for value in (-1000.0, -999.5)]  # type: ignore[arg-type]
    assert made.answer_text() == "yes"
    assert made.scores() == pytest.approx({"no": 1 / (1 + math.e), "yes": math.e / (1 + math.e)})
