"""/generate and /classify: answers, mixes, streams, bounds, and requests that are refused."""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import server.app
from server.api.generate import finite
from server.api.startup import build
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch
from server.model.loader import Base
from server.tasks.prompts import Prompts
from tests.waiting import SECONDS, until

KEYS = {"id", "task", "text", "finish_reason", "adapters", "logprobs", "usage", "timings"}
TIMINGS = {"queue_ms", "load_ms", "ttft_ms", "total_ms", "tokens_per_second"}


def test_answer_of_a_task(live: Any) -> None:
    answer = live.generate("A fine day.", task="mood", logprobs=3)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == KEYS and body["task"] == "mood" and body["id"].startswith("gen-")
    assert body["finish_reason"] in ("stop", "length") and body["usage"]["completion_tokens"] <= 6
    version = live.http.get("/adapters/mood").json()["version"]
    assert body["adapters"] == [{"name": "mood", "version": version, "weight": 1.0}]
    assert len(body["logprobs"]) == body["usage"]["completion_tokens"]
    for entry in body["logprobs"]:
        assert len(entry["top"]) == 3 and entry["top"] == sorted(entry["top"], key=lambda t: -t["logprob"])
        assert entry["top"][0] == {"token": entry["token"], "logprob": entry["logprob"]}, "greedy takes the best"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert set(body["timings"]) == TIMINGS and 0 < body["timings"]["ttft_ms"] <= body["timings"]["total_ms"]


def test_without_a_task_the_base_continues_the_raw_prompt(live: Any) -> None:
    text = live.services.prompts.tokenizer
    for prompt in ("hello", "<|im_end|>"):  # special tokens in a prompt are plain text
        body = live.generate(prompt, logprobs=0).json()
        assert body["task"] is None and body["adapters"] == [] and body["logprobs"] is None
        assert body["usage"]["prompt_tokens"] == len(text.encode(prompt))


def test_default_task(live: Any) -> None:
    named, plain = live.generate("x", task="default").json(), live.generate("x").json()
    assert named["text"] == plain["text"] and named["adapters"] == plain["adapters"] == []
    assert live.http.get("/tasks/default").status_code == 404
    assert live.http.put("/tasks/default", json={"prompt": ">> {input}", "route": {"choice": []}}).status_code == 201
    body = live.generate("hello").json()
    assert body["task"] == "default"
    assert body["usage"]["prompt_tokens"] == len(live.services.prompts.tokenizer.encode(">> hello"))


@pytest.mark.parametrize("name", ["nothing", "a"])
def test_unknown_tasks_and_adapter_names_are_404(live: Any, name: str) -> None:
    answer = live.generate("x", task=name)
    assert answer.status_code == 404 and answer.json()["error"]["param"] == "task"


def test_adapters_of_the_request_replace_the_tasks_mix(live: Any) -> None:
    mixed = live.generate("x", task="mood", adapters=[{"name": "b", "weight": 0.7}, {"name": "a", "weight": -0.3}])
    assert [(a["name"], a["weight"]) for a in mixed.json()["adapters"]] == [("b", 0.7), ("a", -0.3)]
    assert live.generate("x", task="mood", adapters=[]).json()["adapters"] == []
    version = live.http.get("/adapters/a").json()["version"]
    pinned = live.generate("x", adapters=[{"name": version, "weight": None}]).json()
    assert pinned["adapters"] == [{"name": "a", "version": version, "weight": 1.0}]


def test_weight_zero_is_the_base_bit_for_bit(live: Any) -> None:
    def ask(**fields: Any) -> Any:
        return live.generate("once upon", logprobs=5, max_tokens=8, **fields).json()

    base, zero = ask(), ask(adapters=[{"name": "a", "weight": 0}])
    assert zero["logprobs"] == base["logprobs"] and zero["adapters"][0]["weight"] == 0.0
    assert ask(adapters=[{"name": "a"}])["logprobs"] != base["logprobs"]


def test_stream_equals_the_whole_answer(live: Any) -> None:
    fields = {"max_tokens": 20, "ignore_eos": True, "logprobs": 2}
    whole = live.generate("the cat", task="mood", **fields).json()
    streamed = live.generate("the cat", task="mood", stream=True, **fields)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    assert streamed.headers["x-accel-buffering"] == "no" and "no-cache" in streamed.headers["cache-control"]
    assert streamed.text.endswith("data: [DONE]\n\n")
    *steps, last = [json.loads(e.removeprefix("data: ")) for e in streamed.text.split("\n\n")[:-2]]
    assert all(set(event) == {"id", "text"} and event["id"] == last["id"] for event in steps)
    assert "".join(event["text"] for event in steps) == whole["text"]
    assert set(last) == KEYS - {"text"}
    assert [t["token"] for t in last["logprobs"]] == [t["token"] for t in whole["logprobs"]]
    expected = [t["logprob"] for t in whole["logprobs"]]
    assert [t["logprob"] for t in last["logprobs"]] == pytest.approx(expected, abs=1e-5)


def test_seeds_repeat_and_stop_strings_are_hidden(live: Any) -> None:
    fields = {"temperature": 1.5, "seed": 7, "max_tokens": 30, "ignore_eos": True}
    first, again = (live.generate("so", **fields).json()["text"] for _ in range(2))
    assert first == again
    stop = first[3:5]
    for given in ([stop], stop):
        stopped = live.generate("so", stop=given, **fields).json()
        assert stopped["text"] == first[: first.find(stop)] and stopped["finish_reason"] == "stop"


def test_classify(live: Any) -> None:
    body = live.http.post("/classify", params={"task": "mood"}, json={"prompt": "A fine day."}).json()
    assert set(body) == (KEYS - {"text", "finish_reason", "logprobs"}) | {"label", "scores"}
    assert list(body["scores"]) == ["good", "bad", "goodish"]
    assert math.isclose(sum(body["scores"].values()), 1.0, rel_tol=1e-6)
    assert body["label"] == max(body["scores"], key=body["scores"].__getitem__)
    assert 0 < body["timings"]["ttft_ms"] == body["timings"]["total_ms"]
    assert live.http.post("/classify", json={"prompt": "x"}).json()["error"]["param"] == "labels"
    merged = live.http.post("/classify", json={"prompt": "t", "labels": ["h", "he"]})
    assert merged.status_code == 400 and merged.json()["error"]["param"] == "prompt"


def test_classify_is_a_softmax_over_label_log_probabilities(live: Any, tiny_runner: TorchRunner) -> None:
    """Compared with one forward pass over each label and its end token."""
    labels = ["a", "b", "ab"]
    scores = live.http.post("/classify", json={"prompt": "q: ", "labels": labels}).json()["scores"]
    text = live.services.prompts.tokenizer
    first, sums = len(text.encode("q: ")), []
    for label in labels:
        ids = [*text.encode("q: " + label), text.eos_id]
        logprobs = torch.log_softmax(forward(tiny_runner, ids), dim=-1)
        sums.append(sum(float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids))))
    expected = torch.softmax(torch.tensor(sums), dim=0).tolist()
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-4)


def forward(runner: TorchRunner, ids: list[int]) -> torch.Tensor:
    """Logits [T, vocab] of one sequence on the base."""
    count = len(ids)
    return runner.run(
        Batch(
            tokens=np.array(ids),
            positions=np.arange(count),
            row_start=np.array([0, count], np.int32),
            context=np.array([count], np.int32),
            blocks=np.arange(4, dtype=np.int32)[None],
            logit_rows=np.arange(count),
            mixes=((),),
        )
    ).rows


WRONG_BODIES: list[tuple[Any, int, str | None]] = [
    ({}, 422, "prompt"),
    ({"prompt": "x", "nonsense": 1}, 422, "nonsense"),
    ({"prompt": "x", "temperature": float("nan")}, 422, "temperature"),
    ({"prompt": "x", "adapters": [{"name": "a", "weight": 1e308}]}, 422, "adapters.0.weight"),
    ({"prompt": "x", "adapters": [{"name": "a", "weight": 16.5}]}, 422, "adapters.0.weight"),
    ({"prompt": "x", "adapters": [{"name": "a,b"}]}, 422, "adapters.0.name"),
    ({"prompt": "x", "adapters": [{"name": "a"}, {"name": "a"}]}, 400, "adapters"),
    ({"prompt": "x", "adapters": [{"name": "gone"}]}, 404, "adapters"),
    ({"prompt": "x", "n": 2}, 422, "n"),
    ({"prompt": "x", "stop": ["s"] * 1000}, 422, "stop"),
    ({"prompt": "x", "stop": [""]}, 422, "stop"),
    ({"prompt": "x", "logprobs": 21}, 422, "logprobs"),
    ({"prompt": "x", "stop_token_ids": [100000]}, 400, "stop_token_ids"),
    ({"prompt": "x", "max_tokens": 100000}, 400, "max_tokens"),
    ({"prompt": "x", "max_tokens": 2, "max_completion_tokens": 3}, 400, "max_completion_tokens"),
    ({"prompt": "x " * 300}, 400, "prompt"),
    ({"prompt": "x" * 1_000_000}, 400, "prompt"),
    ({"prompt": "\ud800"}, 422, "prompt"),
    ({"prompt": 5}, 422, "prompt"),
]


def test_wrong_bodies_are_refused_with_the_field(live: Any, subtests: pytest.Subtests) -> None:
    for body, status, param in WRONG_BODIES:
        with subtests.test(str(body)[:80]):
            answer = live.http.post("/generate", content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["param"].startswith(param), error
    assert live.generate("x", adapters=[{"name": "a", "weight": -16}]).status_code == 200 and live.idle()


GENERATORS: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "x"}),
    ("/v1/completions", {"model": "tiny", "prompt": ["x", "y"]}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}),
]
CLASSIFY: tuple[str, dict[str, Any]] = ("/classify", {"prompt": "x", "labels": ["a", "b"]})
MAX_TOKENS: tuple[dict[str, Any], str] = ({"max_tokens": 257}, "max_tokens")
ADAPTERS: tuple[dict[str, Any], str] = ({"adapters": [{"name": "a"}, {"name": "a"}]}, "adapters")
FORMATS: list[dict[str, Any]] = [
    {"type": "json_schema"},
    {"type": "json_object", "json_schema": {"schema": {}}},
    {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 100_000]}}},
]


@pytest.fixture
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizing any prompt raises."""
    for name in ("encode_input", "encode_chat", "encode_labels"):
        monkeypatch.setattr(Prompts, name, None)


@pytest.mark.usefixtures("no_tokenizer")
def test_bounds_are_checked_before_tokenizing(live: Any, subtests: pytest.Subtests) -> None:
    wrong = [MAX_TOKENS, ADAPTERS, ({"max_tokens": 3, "min_tokens": 5}, "min_tokens")]
    wrong.append(({"stop_token_ids": [100000]}, "stop_token_ids"))
    cases = [(path, {**body, **fields}, param) for path, body in GENERATORS for fields, param in wrong]
    cases.append((CLASSIFY[0], {**CLASSIFY[1], **ADAPTERS[0]}, "adapters"))
    cases.append(("/v1/completions", {"model": "tiny", "prompt": ["x"] * 9, "n": 16}, "n"))
    cases += [(p, {**b, "response_format": f}, "response_format") for p, b in GENERATORS[1:] for f in FORMATS]
    for path, body, param in cases:
        with subtests.test(f"{path} {body}"[:120]):
            answer = live.http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    error = live.generate(max_tokens=257).json()["error"]
    assert error["code"] == "context_length_exceeded" and "257" in error["message"] and "256" in error["message"]


@pytest.mark.usefixtures("no_tokenizer")
@pytest.mark.parametrize(("flag", "status"), [("--max-mix", 400), ("--max-slots", 507), ("--adapter-ram", 507)])
def test_mixes_over_a_limit_are_refused_before_tokenizing(
    live: Any, monkeypatch: pytest.MonkeyPatch, flag: str, status: int
) -> None:
    services = live.services
    limits: dict[str, Any] = {
        "--max-mix": (services.registry, "_max_mix", 1),
        "--max-slots": (services.engine._slots, "count", 1),
        "--adapter-ram": (services.registry._ram, "capacity", live.http.get("/adapters/a").json()["bytes"]),
    }
    monkeypatch.setattr(*limits[flag])
    for path, body in (*GENERATORS, CLASSIFY):
        answer = live.http.post(path, json={**body, "adapters": [{"name": "a"}, {"name": "b"}]})
        assert answer.status_code == status and flag in answer.json()["error"]["message"], answer.text
        assert answer.json()["error"]["param"] == "adapters"
    assert live.idle()


@pytest.mark.usefixtures("no_tokenizer")
def test_calls_that_the_queue_can_never_hold_are_refused_before_tokenizing(start: Any) -> None:
    live = start(max_queue=4)
    for path, body in (
        (GENERATORS[2][0], {**GENERATORS[2][1], "n": 5}),
        ("/v1/completions", {"model": "tiny", "prompt": [*"abcde"]}),
        ("/classify", {"prompt": "x", "labels": [*"abcde"]}),
    ):
        answer = live.http.post(path, json=body)
        assert answer.status_code == 507 and "--max-queue" in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/generate?task=moving", {"prompt": "x"}),
        ("/classify?task=moving", {"prompt": "x", "labels": ["a", "b"]}),
        ("/v1/completions", {"model": "moving", "prompt": "x"}),
        ("/v1/chat/completions", {"model": "moving", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_adapter_of_a_call_stays_available_while_its_prompt_is_tokenized(
    live: Any, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    """Meanwhile the task routes to another adapter, and the first one is deleted."""
    began, goes_on = threading.Event(), threading.Event()
    registry = live.services.registry

    def slowed(encode: Callable[..., Any]) -> Callable[..., Any]:
        async def slow(*given: Any) -> Any:
            began.set()
            await asyncio.to_thread(goes_on.wait, SECONDS)
            return await encode(*given)

        return slow

    def route_to(name: str) -> dict[str, Any]:
        return {"prompt": "{input}", "route": {"choice": [{"name": name, "weight": 1.0}]}}

    assert live.http.post("/adapters", json={"name": "old", "source": "a"}).status_code == 201
    assert live.http.put("/tasks/moving", json=route_to("old")).status_code == 201
    for name in ("encode_input", "encode_chat", "encode_labels"):
        monkeypatch.setattr(Prompts, name, slowed(getattr(Prompts, name)))
    with ThreadPoolExecutor(1) as threads:
        called = threads.submit(live.http.post, path, json=fields)
        assert began.wait(SECONDS)
        assert live.http.put("/tasks/moving", json=route_to("a")).status_code == 200
        assert live.http.delete("/adapters/old").status_code == 202
        assert live.http.get("/adapters/old").status_code == 404 and registry.memory()["leases"] == 1
        goes_on.set()
        answer = called.result(SECONDS)
    assert answer.status_code == 200, answer.text
    if "adapters" in answer.json():
        assert [each["name"] for each in answer.json()["adapters"]] == ["old"]
    until(lambda: registry.memory()["leases"] == 0)


@pytest.mark.parametrize("path", ["/generate", "/classify", "/v1/completions", "/v1/chat/completions"])
def test_refused_calls_keep_no_lease(live: Any, path: str) -> None:
    body = {"model": "a", "messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    body |= {"model": "a"} if "/v1" in path else {"adapters": [{"name": "a", "weight": 1.0}]}
    wrong = {"labels": []} if path == "/classify" else {"max_tokens": 100_000}
    assert live.http.post(path, json={**body, **wrong}).status_code in (400, 422)
    assert live.services.registry.memory()["leases"] == 0


def test_absent_max_tokens_is_clipped_to_the_context_and_an_explicit_one_is_refused(live: Any) -> None:
    prompt = "y" * 250
    clipped = live.generate(prompt, ignore_eos=True).json()
    assert clipped["usage"]["completion_tokens"] == 6 and clipped["finish_reason"] == "length"
    message = live.generate(prompt, max_tokens=64).json()["error"]["message"]
    assert "64" in message and "250" in message and "256" in message
    for too_long in ({"prompt": prompt, "max_tokens": 64}, {"prompt": "y" * 300}, {"prompt": "y" * 1_000_000}):
        error = live.http.post("/v1/completions", json={"model": "a", **too_long}).json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"] == "max_tokens" or "maximum context length is 256 tokens" in error["message"]


@pytest.mark.parametrize("server_limit", [True, False])
def test_deadline_ends_a_request_with_504(start: Any, server_limit: bool) -> None:
    live = start(deadline=0.15 if server_limit else 60.0)
    live.slow_down(0.05)
    deadline_ms = 60_000 if server_limit else 150
    answer = live.generate("x", max_tokens=100, ignore_eos=True, deadline_ms=deadline_ms)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"
    assert live.idle()


def test_context_is_limited_by_a_sliding_window(start: Any, tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    windowed = replace(tiny_base, config=replace(tiny_base.config, sliding_window=16))
    monkeypatch.setattr(server.app, "load_and_build", lambda settings, *given: build(settings, windowed, *given[:2]))
    live = start()
    for prompt, new, status in ((12, 4, 200), (12, 5, 400), (40, 1, 400)):
        body = {"model": windowed.name, "prompt": [5] * prompt, "max_tokens": new}
        answer = live.http.post("/v1/completions", json=body)
        assert answer.status_code == status and (status == 200 or "16" in answer.json()["error"]["message"])


@pytest.mark.parametrize(("logprob", "shown"), [(-math.inf, -9999.0), (-0.5, -0.5), (0.0, 0.0)])
def test_infinite_logprobs_become_numbers(logprob: float, shown: float) -> None:
    assert finite(logprob) == shown


def test_prompt_tokens_count_once_for_several_answers(live: Any) -> None:
    body = {"model": "mood", "prompt": "a long enough prompt for blocks of the cache, twice over", "max_tokens": 2}
    first = live.http.post("/v1/completions", json={**body, "ignore_eos": True}).json()["usage"]
    several = live.http.post("/v1/completions", json={**body, "ignore_eos": True, "n": 3}).json()["usage"]
    assert several["prompt_tokens"] == first["prompt_tokens"] and several["completion_tokens"] == 6
    assert 0 < several["prompt_tokens_details"]["cached_tokens"] <= several["prompt_tokens"]


def test_custom_mixes_of_a_client_share_one_queue(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, keys = live.services.engine, []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *given: (keys.append(given[0].fair_key), submit(*given))[1])
    for mix in ([{"name": "a"}], [{"name": "a"}, {"name": "b"}], [{"name": "b", "weight": 2}]):
        assert live.generate("x", max_tokens=1, adapters=mix).status_code == 200
    assert len(set(keys)) == 1
    for model in ("a", "b", "tiny"):
        body = {"model": model, "prompt": "x", "max_tokens": 1}
        assert live.http.post("/v1/completions", json=body).status_code == 200
    assert len(set(keys)) == 4
    assert live.generate("x", task="mood", adapters=[{"name": "b"}]).status_code == 200 and keys[-1] == "mood"
