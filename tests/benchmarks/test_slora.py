"""S-LoRA's workload and comparison."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plots
from benchmarks.client import NoAnswer, Outcome, Summary, summarize
from benchmarks.slora import (
    BURST_RATE,
    BURST_REQUESTS,
    Client,
    Load,
    Plan,
    compare,
    completion_body,
    llama_body,
    ratios,
)
from benchmarks.workloads import Arrival, Poisson, closed, generate, spread
from server.errors import BadSetting
from tests.benchmarks.conftest import FakeServer, events


def test_workload_has_the_random_numbers_of_the_paper() -> None:
    spec = Poisson(rate=3, duration=40, adapters=200, alpha=0.3, cv=2, prompt=(8, 128), output=(8, 64), seed=42)
    found = generate(spec)
    np.random.seed(42)
    popularity = np.random.power(0.3, 120)
    prompts = np.random.randint(8, 128, 120)
    outputs = np.random.randint(8, 64, 120)
    times = np.cumsum(np.random.gamma(0.25, 4 / 3, 120))
    assert [a.adapter for a in found] == (popularity * 200).astype(int).tolist()
    assert [a.prompt_tokens for a in found] == prompts.tolist()
    assert [a.output_tokens for a in found] == outputs.tolist()
    assert np.allclose([a.time for a in found], times)
    assert {a.adapter for a in generate(Poisson(rate=10, duration=1, adapters=5, alpha=1e18))} == {4}


@pytest.mark.parametrize("wrong", [{"rate": 0.1}, {"adapters": 0}, {"alpha": 0.0}, {"cv": 0.0}])
def test_workloads_without_requests(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least one adapter"):
        generate(Poisson(**{"rate": 10, "duration": 1, "adapters": 5, **wrong}))  # type: ignore[arg-type]


def test_spread_over_time() -> None:
    plain = closed(2000, [0, 1], 8, 4)
    assert plain[:2] == [Arrival(0.0, 0, 8, 4), Arrival(0.0, 1, 8, 4)]
    for cv in (1.0, 0.5):
        gaps = np.diff([a.time for a in spread(plain, rate=20, cv=cv)])
        assert gaps.min() > 0 and gaps.mean() == pytest.approx(1 / 20, rel=0.1)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.1)
    assert spread(plain, 20) == spread(plain, 20) != spread(plain, 20, seed=1)


def summary(rate: float = 2.0, ttft: float = 0.1, failed: int = 0) -> Summary:
    """A summary of 100 requests."""
    done = [Outcome(0, True, 10, ttft, 1.0, 0.0, (ttft,))] * (100 - failed)
    return summarize([*done, *[Outcome(0, False, 0, math.nan, 1.0, 0.0, error="429: full")] * failed], 100 / rate)


def client() -> Client:
    return Client("http://nowhere", lambda number: completion_body(["a"] * 9, 200, seed=number))


@pytest.fixture
def specs(monkeypatch: pytest.MonkeyPatch) -> list[Poisson]:
    """Records the runs instead of sending requests."""
    found: list[Poisson] = []
    numbers: list[int] = []

    def run(self: Client, spec: Poisson, slo: float, number: int) -> Summary:
        numbers.append(number)
        assert len(set(numbers)) == len(numbers), "two runs share prompts"
        found.append(spec)
        return summary()

    monkeypatch.setattr(Client, "run", run)
    monkeypatch.setattr(Client, "warm_up", lambda self, adapters: None)
    return found


def test_ratios_of_medians() -> None:
    rates = {5: (2.0, 4.0, 100.0), 9: (3.0, 0.1, 6.0)}
    loads = [Load(n, 1.0, 0.7, 9, summary(rate), i) for n, values in rates.items() for i, rate in enumerate(values)]
    assert ratios(loads)[0]["throughput"] == pytest.approx(3.0 / 4.0)
    few, many = Load(5, 1.0, 0.7, 9, summary()), Load(1000, 1.0, 0.7, 9, summary(ttft=0.15))
    assert ratios([few, many])[0]["ttft_p99"] == pytest.approx(1.5)


@pytest.mark.parametrize(("few_failed", "many_failed"), [(0, 3), (3, 0), (1, 1)])
def test_no_ratios_with_failures(few_failed: int, many_failed: int) -> None:
    few = Load(5, 1.0, 0.7, 9, summary(failed=few_failed))
    many = Load(1000, 1.0, 0.7, 9, summary(failed=many_failed))
    [row] = ratios([few, many])
    assert math.isnan(row["throughput"]) and math.isnan(row["ttft_p99"])
    assert row["failed"] == {"few": few_failed, "many": many_failed}


def test_few_and_many_alternate(specs: list[Poisson]) -> None:
    plan = Plan(few=2, many=9, alphas=(0.3,), shares=(0.5,), requests=40, repeats=3, cv=2.0, seed=7)
    capacity, loads = compare(client(), plan)
    assert capacity == pytest.approx(2.0)
    assert [(load.adapters, load.repeat) for load in loads] == [(2, 0), (9, 0), (9, 1), (2, 1), (2, 2), (9, 2)]
    assert {(s.rate, s.alpha, s.cv, s.seed) for s in specs[1:]} == {(1.0, 0.3, 2.0, 7)}
    assert {int(s.rate * s.duration) for s in specs[1:]} == {40}


@pytest.mark.parametrize(("requests", "burst"), [(30, 30), (5000, BURST_REQUESTS)])
def test_requests_of_the_capacity_measurement(specs: list[Poisson], requests: int, burst: int) -> None:
    compare(client(), Plan(few=2, many=9, requests=requests, alphas=(1.0,), shares=(0.5,), prompt=(3, 5)))
    assert specs[0].rate == BURST_RATE and int(specs[0].rate * specs[0].duration) == burst and specs[0].prompt == (3, 5)


def test_number_of_requests_is_exact() -> None:
    for requests in (1, 5, 400, 1000):
        for rate in np.random.default_rng(1).uniform(0.01, 500, 100):
            spec = Plan(requests=requests).arrivals(float(rate), 5, 1.0)
            assert int(spec.rate * spec.duration) == requests


def test_rates_need_no_capacity(specs: list[Poisson], tmp_path: Path) -> None:
    plan = Plan(few=2, many=9, alphas=(1.0,), shares=(), rates=(3.0, 5.0), duration=20.0, repeats=1)
    capacity, loads = compare(client(), plan)
    assert capacity is None and [load.share for load in loads] == [None] * 4
    assert [(spec.rate, spec.duration) for spec in specs] == [(3.0, 20.0)] * 2 + [(5.0, 20.0)] * 2
    assert plots.loads(tmp_path / "x.png", "x", loads).stat().st_size > 1000
    failed = [Load(n, 1.0, 0.7, 9, summary(failed=100)) for n in (5, 9)]
    assert plots.loads(tmp_path / "y.png", "y", failed).stat().st_size > 1000


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"few": 5, "many": 5}, "--many"),
        ({"cv": 0.0}, "--cv must be above 0"),
        ({"slo": math.nan}, "--slo"),
        ({"alphas": (1.0, -1.0)}, "--alpha"),
        ({"shares": (0.0,)}, "--share"),
        ({"rates": (math.inf,)}, "--rate"),
        ({"duration": 0.0}, "--duration"),
        ({"duration": 0.5, "rates": (1.0,)}, "no request is due"),
        ({"duration": 1e5, "rates": (1.0, 1e5)}, "more than 1000000 requests are due"),
        ({"requests": 10**11}, "--requests"),
    ],
)
def test_invalid_plans(monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], message: str) -> None:
    monkeypatch.setattr(Client, "warm_up", lambda self, adapters: pytest.fail("a request was sent"))
    with pytest.raises(BadSetting, match=message):
        compare(client(), Plan(**wrong))


def test_a_share_without_requests_is_reported_before_the_runs(specs: list[Poisson]) -> None:
    with pytest.raises(BadSetting, match="no request is due"):
        compare(client(), Plan(few=1, many=2, requests=20, duration=2.0, alphas=(1.0,), shares=(0.7, 0.0005)))
    assert len(specs) == 1


def test_failures_before_the_runs(fake_server: FakeServer) -> None:
    plan = Plan(few=1, many=2, requests=5, alphas=(1.0,), shares=(0.5,), prompt=(3, 5), output=(4, 6))
    target = Client(fake_server.url, lambda number: completion_body(["s0", "s1"], 200, seed=number))
    fake_server.reply = lambda body: (200, events(1)) if len(fake_server.requests) <= 2 else (429, ["full"])
    with pytest.raises(NoAnswer, match="5 of 5 requests failed during the measurement of the capacity"):
        compare(target, plan)
    fake_server.reply = lambda body: (404, ["unknown"])
    with pytest.raises(NoAnswer, match="2 of 2 adapters did not answer; the first: 404: unknown"):
        compare(target, plan)


def test_short_answers_give_no_ratio(fake_server: FakeServer) -> None:
    fake_server.reply = lambda body: (200, events(1))
    plan = Plan(few=1, many=2, requests=5, alphas=(1.0,), shares=(), rates=(200.0,), prompt=(3, 5), output=(4, 6))
    lines: list[str] = []
    target = Client(fake_server.url, lambda number: completion_body(["s0", "s1"], 200, seed=number), "k:ey")
    _, loads = compare(target, plan, lines.append)
    assert [(load.summary.finished, load.summary.short) for load in loads] == [(5, 5)] * 4
    assert "5 shorter than requested" in lines[0] and math.isnan(ratios(loads)[0]["throughput"])
    assert {key for _, key, _ in fake_server.requests} == {"Bearer k:ey"} and "k:ey" not in repr(target)


def test_bodies() -> None:
    arrival = Arrival(0.0, 1, 16, 2)
    plain, words = completion_body(["a", "b"], 200), completion_body(["a", "b"], 200, text=True)
    chat = dict(completion_body(["a", "b"], 200, chat=True, ignore_eos=False)(arrival, 0))
    expected = {key: value for key, value in plain(arrival, 0).items() if key != "prompt"}
    assert expected["model"] == "b" and expected["max_tokens"] == 2 and expected["ignore_eos"]
    [message] = chat.pop("messages")
    assert message["role"] == "user" and len(message["content"].split()) == 16
    assert {**chat, "ignore_eos": True} == expected
    assert len(words(arrival, 0)["prompt"].split()) == len(plain(arrival, 0)["prompt"]) == 16
    assert len({words(arrival, i)["prompt"] for i in range(400)}) == 400
    llama = llama_body(2, 200)(replace(arrival, adapter=0), 0)
    assert [one["scale"] for one in llama["lora"]] == [1.0, 0.0] and llama["cache_prompt"] is False
    first = replace(arrival, adapter=0)
    assert llama_body(0, 200)(first, 0)["lora"] == [] and "messages" in llama_body(1, 200, chat=True)(first, 0)
