"""Sampling of the native kernels gives the tokens of the engine's own sampler."""

from __future__ import annotations

import math
from ctypes import CDLL
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from server.engine.backends import make_runner
from server.engine.backends.protocol import Runner
from server.engine.batch import Logits, ScheduledRequest
from server.engine.request import Request, Sampling
from server.engine.sampler import SampledToken, Sampler
from server.errors import EngineFailed
from server.kernels import choose, cpu
from server.kernels.cpu import bindings
from tests.server.kernels import tiny

pytestmark = [
    pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native kernels: {cpu.unavailable()}"),
    pytest.mark.usefixtures("library"),
]

LIMITS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 900},
    {"top_k": 10**6},
    {"top_p": 2.0**-30},
    {"top_p": 0.3125},
    {"top_p": 0.6},
    {"top_p": 0.9375},
    {"top_p": 1 - 2.0**-20},
    {"min_p": 2.0**-6},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.875},
    {"top_k": 40, "min_p": 0.125},
    {"top_p": 0.8125, "min_p": 0.3125},
    {"top_k": 700, "top_p": 0.96875, "min_p": 2.0**-10},
]
"""0.6 is rounded up in float32, which admits one more token among equals."""


def runner_of(vocab: int, threads: int = 2) -> Runner:
    return made_by(bindings.library(), vocab, threads)


@lru_cache(maxsize=4)
def made_by(library: CDLL, vocab: int, threads: int) -> Runner:
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


def pick(rows: np.ndarray, requests: list[Request], *, native: bool, threads: int = 2) -> list[SampledToken]:
    logits = torch.from_numpy(rows)
    draw = runner_of(rows.shape[1], threads).draw if native else None
    return Sampler(rows.shape[1], frozenset(), draw).sample(
        Logits(logits), [ScheduledRequest(r, 1, 1) for r in requests]
    )


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


@cache
def oracle(vocab: int, kind: str, temperature: float, *limits: tuple[str, Any]) -> list[SampledToken]:
    """The tokens of the engine's sampler."""
    requests = requests_of(40, temperature=temperature, **dict(limits))
    return pick(rows_of(kind, 40, vocab), requests, native=False)


@pytest.mark.parametrize("vocab", [16, 97, 4099])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_tokens_equal_those_of_the_engines_sampler(vocab: int, limits: dict[str, Any]) -> None:
    for kind in ("noise", "equals", "flat", "steep"):
        rows = rows_of(kind, 40, vocab)
        for temperature in (1e-30, 0.3, 1.0, 5.0):
            requests = requests_of(40, temperature=temperature, **limits)
            assert pick(rows, requests, native=True) == oracle(vocab, kind, temperature, *limits.items()), kind


def draw(rows: np.ndarray, noise: np.ndarray, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    """Sample at temperature 1 with given noise."""
    how = np.array([[1.0, top_p, min_p, n] for n in noise], np.float32)
    runner, limits = runner_of(rows.shape[1]), np.full(len(how), top_k, np.int32)
    drawn = runner.draw(Logits(torch.from_numpy(rows)), how, limits)  # type: ignore[attr-defined]
    return [int(token) for token in drawn.read()]


@pytest.mark.parametrize(
    ("kept", "limits"),
    [
        (1024, {}),
        (1024, {"min_p": 1.0}),
        (512, {"top_k": 512}),
        (512, {"top_p": 0.5}),
        (64, {"top_k": 256, "top_p": 0.25}),
    ],
    ids=str,
)
def test_noise_equal_to_a_cumulative_sum_picks_the_next_token(kept: int, limits: dict[str, Any]) -> None:
    """With equal weights, whose sums are integers."""
    noise = np.arange(kept) / kept
    assert draw(np.zeros((kept, 1024), np.float32), noise, **limits) == list(range(kept))


@pytest.mark.parametrize("top_k", [0, 40])
def test_top_p_keeps_no_token_beyond_its_sum(top_k: int) -> None:
    """Four weights of 1 are half of the total, beside eight of 1/2."""
    row = np.full((1, 1000), -300, np.float32)
    row[0, 10:14], row[0, 100:108] = 0.0, -math.log(2)
    most = np.array([1 - 2.0**-24])
    assert draw(row, most, top_k=top_k, top_p=0.5) == [13]
    assert draw(row, most, top_k=top_k, top_p=0.5 + 2.0**-20) == [100]


@pytest.mark.parametrize("limits", [{}, {"top_k": 4}, {"top_k": 40}, {"top_p": 0.96875}, {"min_p": 2.0**-6}], ids=str)
@pytest.mark.parametrize("ids", [[0, 1, 2, 3], [300, 555, 556, 700], [5, 998, 999]], ids=str)
def test_extreme_noise_does_not_pick_impossible_tokens(ids: list[int], limits: dict[str, Any]) -> None:
    row = np.full(1000, -300, np.float32)
    row[ids] = 0.0
    assert draw(np.stack([row, row]), np.array([0.0, 1 - 2.0**-24]), **limits) == [ids[0], ids[-1]]


@pytest.mark.parametrize("ids", [[300, 555, 556, 700], [5, 998, 999]], ids=str)
def test_noise_that_rounds_to_one_picks_a_possible_token(ids: list[int]) -> None:
    row = np.full((1, 1000), -300, np.float32)
    row[0, ids] = 0.0
    assert draw(row, np.array([1 - 2.0**-30])) == [ids[-1]]


def test_samples_do_not_depend_on_the_batch() -> None:
    rows = rows_of("noise", 24, 1000)
    requests = [
        Request(f"r{i}", (1,), Sampling(temperature=0.5 + i / 20, top_p=1 - i / 40, top_k=i), lambda d: None, seed=i)
        for i in range(24)
    ]
    together = pick(rows, requests, native=True)
    assert together == [pick(rows[i : i + 1], requests[i : i + 1], native=True)[0] for i in range(24)]
    assert together == pick(rows, requests, native=True, threads=1)


def test_greedy_rows_logprobs_and_penalties_beside_sampled_rows() -> None:
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
def test_only_the_row_that_is_not_finite_fails(bad: float, at: int) -> None:
    rows = rows_of("noise", 3, 1000)
    rows[1, at] = bad
    picks = pick(rows, requests_of(3, temperature=1.0), native=True)
    assert isinstance(picks[1].error, EngineFailed)
    fine = pick(rows[[0, 2]], [requests_of(3, temperature=1.0)[i] for i in (0, 2)], native=True)
    assert [picks[0], picks[2]] == fine and all(p.error is None for p in fine)
