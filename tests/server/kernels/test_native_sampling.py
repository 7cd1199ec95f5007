"""Draws of the native kernels: the tokens of the engine's own sampler, which is their oracle, whatever the batch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.batch import Logits, Work
from server.engine.request import Request, Sampling
from server.engine.runner import Runner, make_runner
from server.engine.sampler import Pick, Sampler
from server.errors import EngineFailed
from server.kernels import choose, cpu
from tests.server.kernels import tiny

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native kernels: {cpu.unavailable()}")

LIMITS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 900},
    {"top_k": 10**6},
    {"top_p": 2.0**-30},
    {"top_p": 0.3125},
    {"top_p": 0.9375},
    {"top_p": 1 - 2.0**-20},
    {"min_p": 2.0**-6},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.875},
    {"top_k": 40, "min_p": 0.125},
    {"top_p": 0.8125, "min_p": 0.3125},
    {"top_k": 700, "top_p": 0.96875, "min_p": 2.0**-10},
]
"""Numbers that float32, in which a runner is told them, has exactly."""


@lru_cache(maxsize=4)
def runner_of(vocab: int, threads: int = 2) -> Runner:
    config = tiny.llama(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=32,
    )
    base, _ = tiny.bases(config, "int4", 32, False, "int8", choose("native"), choose("reference"))
    return make_runner(base, 1, threads)


def requests_of(count: int, **options: Any) -> list[Request]:
    return [Request(f"r{i}", (1, 2), Sampling(**options), lambda d: None, seed=i) for i in range(count)]


def pick(rows: np.ndarray, requests: list[Request], *, native: bool, threads: int = 2) -> list[Pick]:
    logits = torch.from_numpy(rows)
    draw = runner_of(rows.shape[1], threads).draw if native else None
    return Sampler(rows.shape[1], frozenset(), draw).pick(Logits(logits), [Work(r, 1, 1) for r in requests])


def rows_of(kind: str, count: int, vocab: int) -> np.ndarray:
    random = np.random.default_rng(vocab)
    rows = random.standard_normal((count, vocab)) * 3
    if kind == "equals":
        rows = np.round(rows)
    elif kind == "flat":
        rows[:] = 0.25
    elif kind == "steep":
        rows *= 40
    return rows.astype(np.float32)


@pytest.mark.parametrize("vocab", [16, 97, 1000, 4099])
@pytest.mark.parametrize("kind", ["noise", "equals", "flat", "steep"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_tokens_are_those_of_the_engines_sampler(vocab: int, kind: str, limits: dict[str, Any]) -> None:
    rows = rows_of(kind, 40, vocab)
    for temperature in (1e-30, 0.3, 1.0, 5.0):
        requests = requests_of(40, temperature=temperature, **limits)
        assert pick(rows, requests, native=True) == pick(rows, requests, native=False)


def test_a_row_is_drawn_alike_in_any_batch() -> None:
    rows = rows_of("noise", 24, 1000)
    requests = [
        Request(f"r{i}", (1,), Sampling(temperature=0.5 + i / 20, top_p=1 - i / 40, top_k=i), lambda d: None, seed=i)
        for i in range(24)
    ]
    together = pick(rows, requests, native=True)
    assert together == [pick(rows[i : i + 1], requests[i : i + 1], native=True)[0] for i in range(24)]
    assert together == pick(rows, requests, native=True, threads=1)


def test_greedy_rows_and_those_that_want_more_than_a_token_beside_drawn_ones() -> None:
    rows = rows_of("equals", 4, 1000)
    requests = [
        *requests_of(1, temperature=1.0),
        *requests_of(1),
        *requests_of(1, temperature=1.0, logprobs=3),
        *requests_of(1, temperature=0.7, repetition_penalty=1.3),
    ]
    native, own = (pick(rows, requests, native=n) for n in (True, False))
    assert native == own
    assert native[1].token == int(rows[1].argmax()) and native[2].logprob is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 999])
def test_a_row_that_is_not_finite_fails_alone(bad: float, at: int) -> None:
    rows = rows_of("noise", 3, 1000)
    rows[1, at] = bad
    picks = pick(rows, requests_of(3, temperature=1.0), native=True)
    assert isinstance(picks[1].error, EngineFailed)
    fine = pick(rows[[0, 2]], [requests_of(3, temperature=1.0)[i] for i in (0, 2)], native=True)
    assert [picks[0], picks[2]] == fine and all(p.error is None for p in fine)
