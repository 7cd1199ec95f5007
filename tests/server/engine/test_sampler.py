"""The sampler: each rule against a simple reference, and rows independent of each other."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.batch import Logits, ScheduledRequest
from server.engine.request import Request, Sampling
from server.engine.sampler import SampledToken, Sampler, token_logprob, uniform
from server.errors import EngineFailed, InvalidRequest

VOCAB = 1000
EOS = 5


def request(output: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2), seed: int = 7, **options: Any) -> Request:
    constraint = options.pop("constraint", None)
    made = Request("r", prompt, Sampling(**options), lambda d: None, seed=seed, constraint=constraint)
    made.output.extend(output)
    return made


def sample(logits: Any, *requests: Request) -> list[SampledToken]:
    rows = torch.from_numpy(np.atleast_2d(np.asarray(logits, np.float32)))
    return Sampler(rows.shape[1], frozenset({EOS})).sample(Logits(rows), [ScheduledRequest(r, 1, 1) for r in requests])


def noise(seed: int, rows: int = 1, vocab: int = VOCAB) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, vocab)).astype(np.float32) * 3


def chances(row: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    x = row.astype(np.float64) / temperature
    e = np.exp(x - x.max())
    return e / e.sum()


def drawn(row: np.ndarray, count: int = 4000, **options: Any) -> Counter[int]:
    options = {"temperature": 1.0} | options
    return Counter(sample(row, request(seed=i, **options))[0].token for i in range(count))


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    row = np.zeros(VOCAB)
    row[[700, 30, 31]] = 4.0
    assert sample(row, request())[0] == SampledToken(30)
    assert sample(row, request(logprobs=3))[0].token == 30
    assert [t for t, _ in sample(row, request(logprobs=3))[0].logprob.top] == [30, 31, 700]


@pytest.mark.parametrize("temperature", [5e-324, 1e-50, 1e-45, 1e-39, 1.2e-38, 1e-20])
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 5e-324}, {"min_p": 1.0}, {"repetition_penalty": 0.01}])
def test_tiny_temperatures_are_greedy(temperature: float, options: dict[str, Any]) -> None:
    row = noise(3)[0]
    greedy = sample(row, request(**options | {"top_p": 1.0}))[0].token
    assert sample(row, request(temperature=temperature, **options))[0].token == greedy


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"logprobs": 1}])
def test_a_row_that_is_not_finite_fails_alone(bad: float, options: Any) -> None:
    rows = noise(1, 3)
    rows[1, 400] = bad
    samples = sample(rows, request(), request(**options), request())
    assert isinstance(samples[1].error, EngineFailed)
    assert [samples[0].token, samples[2].token] == [int(rows[0].argmax()), int(rows[2].argmax())]


def test_logprobs_come_from_the_raw_logits() -> None:
    row = noise(2)[0]
    expected = torch.log_softmax(torch.from_numpy(row).double(), 0).numpy()
    p = sample(row, request(output=(3, 4), temperature=0.7, presence_penalty=1.5, top_k=3, logprobs=20))[0]
    assert p.logprob is not None and p.logprob.id == p.token
    assert p.logprob.logprob == pytest.approx(expected[p.token], abs=1e-5)
    best = np.argsort(-expected, kind="stable")[:20]
    assert [i for i, _ in p.logprob.top] == best.tolist()
    assert [v for _, v in p.logprob.top] == pytest.approx(expected[best].tolist(), abs=1e-5)
    assert sample(row, request(logprobs=0))[0].logprob.top == ()
    assert len(token_logprob(row[:5].copy(), 1, 20).top) == 5


def test_temperature_follows_the_distribution() -> None:
    row = noise(3, vocab=40)[0] / 2
    for temperature in (0.5, 1.0, 2.0):
        counts, p = drawn(row, temperature=temperature), chances(row, temperature)
        for token in range(40):
            sigma = math.sqrt(p[token] * (1 - p[token]) / 4000)
            assert abs(counts[token] / 4000 - p[token]) < 5 * sigma + 1e-9


def test_the_grouped_search_equals_the_search_in_the_whole_sum() -> None:
    row = noise(4)[0]
    sums = np.cumsum(chances(row))
    for seed in range(300):
        u = uniform(seed, 0)
        expected = int(np.searchsorted(sums, u, side="right"))
        got = sample(row, request(seed=seed, temperature=1.0))[0].token
        assert got == expected or abs(sums[min(got, expected)] - u) < 1e-5


@given(seed=st.integers(0, 2**31), k=st.integers(1, 1200), p=st.floats(0.01, 1.0), m=st.floats(0.0, 1.0))
@settings(max_examples=150, deadline=None)
def test_top_k_top_p_and_min_p_filter_as_defined(seed: int, k: int, p: float, m: float) -> None:
    row = np.round(noise(seed)[0], 1)  # with many equals
    order = np.argsort(-row, kind="stable")
    order = order[:k]
    probabilities = chances(row)
    kept = probabilities[order] / probabilities[order].sum()
    before = np.concatenate([[0.0], np.cumsum(kept)[:-1]])
    allowed = {int(t) for t, b in zip(order, before, strict=True) if b < p + 1e-5}
    allowed &= {int(t) for t in order if probabilities[t] >= (m - 1e-5) * probabilities.max()}
    for i in range(5):
        token = sample(row, request(seed=i, temperature=1.0, top_k=k, top_p=p, min_p=m))[0].token
        assert token in allowed


def test_top_p_includes_the_token_that_crosses_it() -> None:
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05, 1e-9, 1e-9]))
    assert set(drawn(row, 600, top_p=0.79)) == {0, 1}
    assert set(drawn(row, 600, top_p=0.81)) == {0, 1, 2}
    assert set(drawn(row, 600, top_p=1e-9)) == {0}
    assert set(drawn(row, 600, top_k=2)) == {0, 1}
    assert set(drawn(row, 600, min_p=0.29)) == {0, 1, 2}
    counts = drawn(row, 2000, top_k=2)
    assert counts[0] / 2000 == pytest.approx(0.625, abs=0.04)


def test_penalties() -> None:
    row = np.zeros(8)
    row[:4] = [2.0, 1.9, -1.0, 1.5]
    seen = {"prompt": (0,), "output": (1, 1)}
    assert sample(row, request(**seen))[0].token == 0
    assert sample(row, request(**seen, repetition_penalty=2.0))[0].token == 3  # 1.0, 0.95, -1, 1.5
    assert sample(row, request(prompt=(3,), output=(0, 1), presence_penalty=0.6))[0].token == 3
    assert sample(row, request(prompt=(9,), output=(0,), presence_penalty=0.05))[0].token == 0
    assert sample(row, request(prompt=(3,), output=(0, 0, 1), frequency_penalty=0.3))[0].token == 1
    assert sample(-row - 1, request(prompt=(2,), output=(), repetition_penalty=0.5))[0].token == 2


def test_min_tokens_masks_end_tokens() -> None:
    row = np.zeros(VOCAB)
    row[[EOS, 9, 4]] = [5.0, 4.0, 3.0]
    options: dict[str, Any] = {"min_tokens": 2, "stop_token_ids": (9,)}
    assert sample(row, request(output=(1,), **options))[0].token == 4
    for more in ({}, {"logprobs": 0}):
        assert sample(row, request(output=(1, 1), **options, **more))[0].token == EOS


class Allow:
    def __init__(self, *ids: int) -> None:
        self.bits = np.zeros(VOCAB // 32 + 1, np.uint32)
        for i in ids:
            self.bits[i // 32] |= np.uint32(1 << (i % 32))

    def mask(self) -> np.ndarray:
        return self.bits

    def accept(self, token: int) -> None:
        pass


def test_a_constraint_masks_all_other_tokens() -> None:
    rows = noise(6, 3)
    samples = sample(rows, request(), request(constraint=Allow(33, 999)), request(constraint=Allow(1), temperature=3.0))
    assert samples[0].token == int(rows[0].argmax())
    assert samples[1].token == (33 if rows[1, 33] > rows[1, 999] else 999)
    assert samples[2].token == 1
    nothing = sample(rows[0], request(constraint=Allow()))[0]
    assert isinstance(nothing.error, InvalidRequest)


def test_a_complete_constraint_ends_before_min_tokens() -> None:
    row = np.zeros(VOCAB)
    row[EOS] = 5.0
    going_on, whole = (request(output=(1,), min_tokens=9, constraint=Allow(*ids)) for ids in ((EOS, 33), (EOS,)))
    assert [p.token for p in sample([row, row], going_on, whole)] == [33, EOS]
    assert (going_on.sampling.min_tokens, whole.sampling.min_tokens) == (9, 0)
    stop = request(min_tokens=9, stop_token_ids=(33,), constraint=Allow(33))
    assert sample(row, stop)[0].token == 33


def test_random_numbers_depend_on_seed_and_index_only() -> None:
    assert uniform(3, 4) == uniform(3, 4)
    values = {uniform(seed, index) for seed in (-1, 0, 3, 2**63) for index in range(50)}
    assert len(values) == 200 and all(0 <= v < 1 for v in values)
    assert uniform(-1, 0) == uniform(2**64 - 1, 0)


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    rows = noise(8, 6)
    requests = [
        request(),
        request(temperature=1.0, seed=1),
        request(temperature=0.7, top_p=0.9, seed=2, logprobs=5),
        request(temperature=1.2, top_k=50, seed=3, output=(1, 2, 3), frequency_penalty=0.5),
        request(temperature=1.0, min_p=0.1, seed=4, repetition_penalty=1.2),
        request(logprobs=2),
    ]
    together = sample(rows, *requests)
    for i in reversed(range(6)):
        assert sample(rows[i], requests[i])[0] == together[i]
    assert sample(rows[::-1].copy(), *reversed(requests)) == together[::-1]


def test_extreme_temperatures() -> None:
    row = noise(9)[0]
    assert sample(row, request(temperature=1e-6))[0].token == int(row.argmax())
    assert sample(row * 1e30, request(temperature=1e-30))[0].token == int(row.argmax())
    assert len(drawn(row, 200, temperature=1e6)) > 150


class Draws:
    """A device sampler that returns fixed tokens and records its arguments."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = np.array(tokens, np.int32)
        self.asked: list[tuple[int, np.ndarray, np.ndarray]] = []

    def __call__(self, logits: Logits, how: np.ndarray, top_k: np.ndarray) -> Draws:
        self.asked.append((logits.rows.shape[0], how.copy(), top_k.copy()))
        return self

    def read(self) -> np.ndarray:
        return self.tokens


def test_simple_rows_are_sampled_on_the_device() -> None:
    draw = Draws(11, -1, 13)
    requests = [request(), request(temperature=0.5, top_k=3, top_p=0.9, seed=7), request(logprobs=2)]
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(1))
    work, sampler = [ScheduledRequest(r, 1, 1) for r in requests], Sampler(20, frozenset(), draw)
    samples = sampler.sample(Logits(logits), work)
    assert sampler.sample_async(Logits(logits), work) is None
    [(rows, how, top_k)] = draw.asked
    assert rows == 3 and how[0].tolist() == [0.0, 0.0, 0.0, 0.0] and top_k.tolist() == [0, 3, 0]
    assert how[1].tolist() == pytest.approx([0.5, 0.9, 0.0, uniform(requests[1].seed, 0)])
    assert samples[0].token == 11 and samples[1].error is not None
    assert samples[2].token == int(logits[2].argmax()) and samples[2].logprob is not None
    assert sampler.sample_async(Logits(logits[:2]), work[:2]) is not None and draw.asked[1][0] == 2
    assert Sampler(20, frozenset()).sample_async(Logits(logits[:2]), work[:2]) is None


def test_random_numbers_stay_below_one_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.engine.sampler.uniform", lambda seed, index: 1 - 2.0**-53)
    draw = Draws(1)
    Sampler(20, frozenset(), draw).sample(
        Logits(torch.randn(1, 20)), [ScheduledRequest(request(temperature=1.0), 1, 1)]
    )
    [(_, how, _)] = draw.asked
    assert how[0, 3] == np.nextafter(np.float32(1), np.float32(0))


@pytest.mark.parametrize("more", [{"logprobs": 0}, {"repetition_penalty": 1.5}], ids=str)
def test_host_and_device_use_the_same_random_number(monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]) -> None:
    """Ten equally likely tokens, and a number that float32 rounds across a boundary."""
    monkeypatch.setattr("server.engine.sampler.uniform", lambda seed, index: 0.5 - 2.0**-40)
    row = np.zeros(VOCAB)
    row[100:110] = 50.0
    draw, chosen = Draws(0), request(temperature=1.0)
    Sampler(VOCAB, frozenset(), draw).sample(Logits(torch.zeros(1, VOCAB)), [ScheduledRequest(chosen, 1, 1)])
    [(_, how, _)] = draw.asked
    assert how[0, 3] == 0.5
    assert sample(row, request(temperature=1.0, **more))[0].token == 105


def test_a_temperature_below_float32_is_greedy_on_the_device() -> None:
    draw = Draws(3)
    Sampler(20, frozenset(), draw).sample(
        Logits(torch.zeros(1, 20)), [ScheduledRequest(request(temperature=1e-39), 1, 1)]
    )
    [(_, how, _)] = draw.asked
    assert how.tolist() == [[0.0, 0.0, 0.0, 0.0]]


def test_the_largest_random_number_samples_a_possible_token() -> None:
    sampler = Sampler(512, frozenset())
    for seed in range(50):
        row = np.random.default_rng(seed).standard_normal(512).astype(np.float32)
        row[256:] = -np.inf
        at = sampler._draw(row, row.max(), Sampling(max_tokens=1, temperature=1.0), 1.0 - 2.0**-53)
        assert at < 256
