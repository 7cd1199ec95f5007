"""What S-LoRA's comparison runs, in which order, and that a failure is never a good ratio."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plots
from benchmarks.client import NoAnswer, Outcome, Summary, summarize
from benchmarks.slora import BURST, BURST_REQUESTS, Client, Load, Plan, body_of, compare, llama_body, ratios
from benchmarks.workloads import Arrival, Poisson
from server.errors import BadSetting
from tests.benchmarks.conftest import Answering, events


def summary(rate: float = 2.0, first: float = 0.1, failed: int = 0) -> Summary:
    """Of a hundred requests."""
    done = [Outcome(0, True, 10, first, 1.0, 0.0, (first,))] * (100 - failed)
    return summarize([*done, *[Outcome(0, False, 0, math.nan, 1.0, 0.0, error="429: full")] * failed], 100 / rate)


def client() -> Client:
    return Client("http://nowhere", lambda number: body_of(["a"] * 9, 200, seed=number))


def recorded(monkeypatch: pytest.MonkeyPatch, answers: Summary | None = None) -> list[Poisson]:
    """Runs that are only noted."""
    asked: list[Poisson] = []
    numbers: list[int] = []

    def run(self: Client, spec: Poisson, slo_seconds: float, number: int) -> Summary:
        numbers.append(number)
        assert len(set(numbers)) == len(numbers), "each has prompts of its own"
        asked.append(spec)
        return answers or summary()

    monkeypatch.setattr(Client, "run", run)
    monkeypatch.setattr(Client, "warm", lambda self, adapters: None)
    return asked


def test_failures_of_either_leave_no_ratio() -> None:
    """Three percent of the many fail, which looked as fast as the few; few that fail made the many look faster."""
    few, many = Load(5, 1.0, 0.7, 9, summary()), Load(1000, 1.0, 0.7, 9, summary(first=0.15))
    [row] = ratios([few, many])
    assert (row["throughput"], row["failed"]) == (pytest.approx(1.0), {"few": 0, "many": 0})
    assert row["ttft_p99"] == pytest.approx(1.5)
    for a, b in ((0, 3), (3, 0), (1, 1)):
        [row] = ratios([replace(few, summary=summary(failed=a)), replace(many, summary=summary(failed=b))])
        assert math.isnan(row["throughput"]) and math.isnan(row["ttft_p99"]) and row["failed"] == {"few": a, "many": b}


def test_answers_that_are_shorter_than_asked_leave_no_ratio(answering: Answering) -> None:
    """A server that takes no `ignore_eos` does less than was asked for."""
    answering.reply = lambda body: (200, events(1))
    plan = Plan(few=1, many=2, requests=5, alphas=(1.0,), shares=(), rates=(200.0,), prompt=(3, 5), output=(4, 6))
    said: list[str] = []
    asking = Client(answering.url, lambda number: body_of(["s0", "s1"], 200, seed=number))
    _, loads = compare(asking, plan, said.append)
    assert [(load.summary.finished, load.summary.short, load.summary.tokens) for load in loads] == [(5, 5, 5)] * 4
    assert "5 shorter than asked" in said[0] and math.isnan(ratios(loads)[0]["throughput"])


def test_a_share_that_cannot_be_run_is_told_before_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recorded(monkeypatch)
    plan = Plan(few=1, many=2, requests=20, duration=2.0, alphas=(1.0,), shares=(0.7, 0.0005))
    with pytest.raises(BadSetting, match="no request is due"):
        compare(client(), plan)
    assert len(asked) == 1, "the capacity's"


def test_ratios_are_of_the_medians_of_repeats() -> None:
    rates = {5: (2.0, 4.0, 100.0), 9: (3.0, 0.1, 6.0)}
    loads = [Load(n, 1.0, 0.7, 9, summary(rate), i) for n, all_ in rates.items() for i, rate in enumerate(all_)]
    [row] = ratios(loads)
    assert row["throughput"] == pytest.approx(3.0 / 4.0)


def test_few_and_many_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = recorded(monkeypatch)
    plan = Plan(few=2, many=9, alphas=(0.3,), shares=(0.5,), requests=40, repeats=3, cv=2.0, seed=7)
    most, loads = compare(client(), plan)
    assert most == pytest.approx(2.0)
    assert [spec.adapters for spec in asked[1:]] == [2, 9, 9, 2, 2, 9]
    assert [(load.adapters, load.repeat) for load in loads] == [(2, 0), (9, 0), (9, 1), (2, 1), (2, 2), (9, 2)]
    assert {(s.rate, s.alpha, s.cv, s.seed) for s in asked[1:]} == {(1.0, 0.3, 2.0, 7)}
    assert {int(s.rate * s.duration) for s in asked[1:]} == {40}


@pytest.mark.parametrize(("requests", "measured"), [(30, 30), (5000, BURST_REQUESTS)])
def test_the_capacity_is_measured_by_no_more_than_a_run_has(
    monkeypatch: pytest.MonkeyPatch, requests: int, measured: int
) -> None:
    asked = recorded(monkeypatch)
    compare(client(), Plan(few=2, many=9, requests=requests, alphas=(1.0,), shares=(0.5,), prompt=(3, 5)))
    assert asked[0].rate == BURST and int(asked[0].rate * asked[0].duration) == measured
    assert asked[0].prompt == (3, 5)


@pytest.mark.parametrize("requests", [1, 5, 400, 1000])
def test_a_run_has_as_many_requests_as_are_asked_for(requests: int) -> None:
    for rate in np.random.default_rng(1).uniform(0.01, 500, 300):
        spec = Plan(requests=requests).arrivals(float(rate), 5, 1.0)
        assert int(spec.rate * spec.duration) == requests


def test_rates_that_are_given_need_no_capacity(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = recorded(monkeypatch)
    plan = Plan(few=2, many=9, alphas=(1.0,), shares=(), rates=(3.0, 5.0), duration=20.0, repeats=1)
    most, loads = compare(client(), plan)
    assert most is None and [load.share for load in loads] == [None] * 4
    assert [(spec.rate, spec.duration) for spec in asked] == [(3.0, 20.0)] * 2 + [(5.0, 20.0)] * 2
    assert [row["rate"] for row in ratios(loads)] == [3.0, 5.0]
    assert plots.loads(tmp_path / "x.png", "x", loads).stat().st_size > 1000


def test_a_picture_of_failures_alone_stands_on_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = plots._pyplot().close
    drawn = []
    monkeypatch.setattr(plots._pyplot(), "close", lambda figure: (drawn.append(figure.axes), close(figure)))
    plots.loads(tmp_path / "x.png", "x", [Load(n, 1.0, 0.7, 9, summary(failed=100)) for n in (5, 9)])
    plots.loads(tmp_path / "x.png", "x", [Load(n, 1.0, 0.7, 9, summary(failed=n - 5)) for n in (5, 8)])
    assert [axes.get_ylim()[0] for axes in drawn[0]] == [0, 0]
    told = [[text.get_text() for text in axes.texts] for axes in drawn[1]]
    assert all("failed" not in few and many.endswith("\n3 failed") for few, many in told), "even where a bar is drawn"


def test_a_capacity_with_failures_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(monkeypatch, summary(failed=2))
    with pytest.raises(NoAnswer, match=r"2 of 100 requests failed.*429: full.*--max-queue.*--rate"):
        compare(client(), Plan(few=2, many=9))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"few": 9, "many": 5}, "must be more adapters"),
        ({"few": 5, "many": 5}, "must be more adapters"),
        ({"few": 0}, "must be more adapters"),
        ({"cv": 0.0}, "--cv must be above 0"),
        ({"slo": math.nan}, "--slo"),
        ({"alphas": (1.0, -1.0)}, "--alpha"),
        ({"shares": (0.0,)}, "--share"),
        ({"rates": (math.inf,)}, "--rate"),
        ({"duration": 0.0}, "--duration"),
        ({"duration": 0.5, "rates": (1.0,)}, "no request is due"),
        ({"duration": 1e5, "rates": (1.0, 1e5)}, "more than 1000000 requests are due"),
        ({"cv": 1e-200}, "--cv must be above 0, from 0.0001 to 1000000, not 1e-200"),
        ({"alphas": (1e18,)}, "--alpha"),
        ({"requests": 10**11}, "--requests"),
        ({"many": 10**11}, "--many"),
    ],
)
def test_a_plan_that_cannot_be_run_is_refused_before_anything_is_asked(
    monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], told: str
) -> None:
    monkeypatch.setattr(Client, "warm", lambda self, adapters: pytest.fail("something was asked"))
    with pytest.raises(BadSetting, match=told):
        compare(client(), Plan(**wrong))


def test_llama_server_reads_every_prompt_again() -> None:
    arrival = Arrival(0.0, 0, 4, 2)
    assert llama_body(0, 200)(arrival, 0) | {"prompt": 0} == body_of([""], 200)(arrival, 0) | {
        "prompt": 0,
        "lora": [],
        "cache_prompt": False,
    }
    assert [one["scale"] for one in llama_body(2, 200)(arrival, 0)["lora"]] == [1.0, 0.0]


def test_prompts_of_words_are_as_long_as_those_of_ids() -> None:
    body, plain = body_of(["a"], 200, text=True), body_of(["a"], 200)
    for i, length in enumerate((1, 7, 128)):
        arrival = Arrival(0.0, 0, length, 2)
        assert len(body(arrival, i)["prompt"].split()) == length == len(plain(arrival, i)["prompt"])
        assert body(arrival, i) | {"prompt": 0} == plain(arrival, i) | {"prompt": 0}
        assert llama_body(1, 200, text=True)(arrival, i)["prompt"] == body(arrival, i)["prompt"]
    assert len({body(Arrival(0.0, 0, 16, 2), i)["prompt"] for i in range(400)}) == 400


def test_a_chat_asks_in_words_and_what_some_servers_do_not_know_can_be_left_out() -> None:
    arrival = Arrival(0.0, 1, 16, 2)
    plain, chat = (
        body_of(["a", "b"], 200)(arrival, 0),
        body_of(["a", "b"], 200, chat=True, ignore_eos=False)(arrival, 0),
    )
    [message] = chat.pop("messages")
    assert message["role"] == "user" and len(message["content"].split()) == 16
    assert {**chat, "ignore_eos": True} == {key: value for key, value in plain.items() if key != "prompt"}
    assert "messages" in llama_body(1, 200, chat=True)(Arrival(0.0, 0, 16, 2), 0)


def test_a_server_is_asked_with_its_key(answering: Answering) -> None:
    answering.reply = lambda body: (200, events(body["max_tokens"]))
    plan = Plan(few=1, many=3, requests=5, alphas=(1.0,), shares=(), rates=(200.0,), prompt=(3, 5), output=(2, 4))
    asking = Client(f"{answering.url}/v1/", lambda number: body_of(["s0", "s1", "s2"], 200, seed=number), "k:ey")
    _, loads = compare(asking, plan)
    assert [(load.summary.finished, load.summary.failed) for load in loads] == [(5, 0)] * 4
    assert {key for _, key, _ in answering.asked} == {"Bearer k:ey"} and "k:ey" not in repr(asking)
    assert {len(body["prompt"]) for *_, body in answering.asked[3:]} <= {3, 4}
