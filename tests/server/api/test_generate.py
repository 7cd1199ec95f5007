"""/generate and /classify against a live server: the answers' form, mixes, streams, bounds, and who is refused."""

from __future__ import annotations

import asyncio
import gzip
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


def test_an_answer_has_the_contracts_form(live: Any) -> None:
    answer = live.generate("A fine day.", task="mood", logprobs=3)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == KEYS and body["task"] == "mood" and body["id"].startswith("gen-")
    assert body["finish_reason"] in ("stop", "length") and body["usage"]["completion_tokens"] <= 6
    version = live.http.get("/adapters/mood").json()["version"]
    assert body["adapters"] == [{"name": "mood", "version": version, "weight": 1.0}]
    assert len(body["logprobs"]) == body["usage"]["completion_tokens"]
    for entry in body["logprobs"]:
        assert len(entry["top"]) == 3
        assert entry["top"] == sorted(entry["top"], key=lambda t: -t["logprob"])
        assert entry["top"][0] == {"token": entry["token"], "logprob": entry["logprob"]}, "greedy takes the best"
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + body["usage"]["completion_tokens"]
    assert set(body["timings"]) == {"queue_ms", "load_ms", "ttft_ms", "total_ms", "tokens_per_second"}
    assert 0 < body["timings"]["ttft_ms"] <= body["timings"]["total_ms"]


def test_without_a_task_the_base_continues_the_raw_prompt(live: Any) -> None:
    body = live.generate("hello").json()
    assert body["task"] is None and body["adapters"] == [] and body["logprobs"] is None
    assert body["usage"]["prompt_tokens"] == len(live.services.prompts.tokenizer.encode("hello"))
    assert live.generate("hello", logprobs=0).json()["logprobs"] is None


def test_the_default_task_is_the_base_where_nobody_has_defined_it(live: Any) -> None:
    named, plain = live.generate("x", task="default").json(), live.generate("x").json()
    assert named["text"] == plain["text"] and named["adapters"] == plain["adapters"] == []
    assert live.http.get("/tasks/default").status_code == 404


def test_the_default_task_answers_when_none_is_named(live: Any) -> None:
    assert live.http.put("/tasks/default", json={"prompt": ">> {input}", "route": {"choice": []}}).status_code == 201
    body = live.generate("hello").json()
    assert body["task"] == "default"
    assert body["usage"]["prompt_tokens"] == len(live.services.prompts.tokenizer.encode(">> hello"))


def test_adapters_of_a_request_replace_the_tasks_mix(live: Any) -> None:
    mixed = live.generate("x", task="mood", adapters=[{"name": "b", "weight": 0.7}, {"name": "a", "weight": -0.3}])
    assert [(a["name"], a["weight"]) for a in mixed.json()["adapters"]] == [("b", 0.7), ("a", -0.3)]
    assert live.generate("x", task="mood", adapters=[]).json()["adapters"] == []
    version = live.http.get("/adapters/a").json()["version"]
    pinned = live.generate("x", adapters=[{"name": version}]).json()
    assert pinned["adapters"] == [{"name": "a", "version": version, "weight": 1.0}]


def test_weight_zero_is_the_base_bit_for_bit(live: Any) -> None:
    base = live.generate("once upon", logprobs=5, max_tokens=8).json()
    zero = live.generate("once upon", logprobs=5, max_tokens=8, adapters=[{"name": "a", "weight": 0}]).json()
    assert zero["logprobs"] == base["logprobs"] and zero["adapters"][0]["weight"] == 0.0
    other = live.generate("once upon", logprobs=5, max_tokens=8, adapters=[{"name": "a"}]).json()
    assert other["logprobs"] != base["logprobs"]


def test_a_stream_says_the_same_as_the_whole_answer(live: Any) -> None:
    fields = {"max_tokens": 20, "ignore_eos": True, "logprobs": 2}
    whole = live.generate("the cat", task="mood", **fields).json()
    streamed = live.generate("the cat", task="mood", stream=True, **fields)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    found = [
        json.loads(d) for line in streamed.text.split("\n\n") if (d := line.removeprefix("data: ")).startswith("{")
    ]
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert all(set(event) == {"id", "text"} for event in found[:-1])
    assert "".join(event["text"] for event in found[:-1]) == whole["text"]
    assert set(found[-1]) == KEYS - {"text"}
    told, again = found[-1]["logprobs"], whole["logprobs"]
    assert [t["token"] for t in told] == [t["token"] for t in again]
    assert [t["logprob"] for t in told] == pytest.approx([t["logprob"] for t in again], abs=1e-5)
    assert {event["id"] for event in found} == {found[0]["id"]}


def test_seeds_repeat_and_stop_strings_hide(live: Any) -> None:
    fields = {"temperature": 1.5, "seed": 7, "max_tokens": 30, "ignore_eos": True}
    first, again = (live.generate("so", **fields).json()["text"] for _ in range(2))
    assert first == again
    stop = first[3:5]
    stopped = live.generate("so", stop=[stop], **fields).json()
    assert stopped["text"] == first[: first.find(stop)] and stopped["finish_reason"] == "stop"
    assert live.generate("so", stop=stop, **fields).json()["text"] == stopped["text"]


def test_classify_scores_labels_of_which_one_begins_another(live: Any) -> None:
    answer = live.http.post("/classify", params={"task": "mood"}, json={"prompt": "A fine day."})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == (KEYS - {"text", "finish_reason", "logprobs"}) | {"label", "scores"}
    assert list(body["scores"]) == ["good", "bad", "goodish"]
    assert math.isclose(sum(body["scores"].values()), 1.0, rel_tol=1e-6)
    assert body["label"] == max(body["scores"], key=body["scores"].__getitem__)
    assert 0 < body["timings"]["ttft_ms"] == body["timings"]["total_ms"], "there is one piece, and it is all"
    own = live.http.post("/classify", json={"prompt": "x", "labels": ["yes", "no"]}).json()
    assert set(own["scores"]) == {"yes", "no"} and own["task"] is None
    assert live.http.post("/classify", json={"prompt": "x"}).json()["error"]["param"] == "labels"
    merged = live.http.post("/classify", json={"prompt": "t", "labels": ["h", "he"]})
    assert merged.status_code == 400 and "form one token" in merged.json()["error"]["message"]


def test_classify_is_a_softmax_over_the_sums_of_log_probabilities(live: Any, tiny_runner: TorchRunner) -> None:
    """Against one whole pass of the decoder over each label with its end token."""
    labels = ["a", "b", "ab"]
    scores = live.http.post("/classify", json={"prompt": "q: ", "labels": labels}).json()["scores"]
    text = live.services.prompts.tokenizer
    sums = []
    for label in labels:
        ids = [*text.encode("q: " + label), text.eos_id]
        first = len(text.encode("q: "))
        told = torch.log_softmax(whole_pass(tiny_runner, ids), dim=-1)
        sums.append(sum(float(told[i - 1, ids[i]]) for i in range(first, len(ids))))
    expected = torch.softmax(torch.tensor(sums), dim=0).tolist()
    assert [scores[label] for label in labels] == pytest.approx(expected, abs=1e-4)


def whole_pass(runner: TorchRunner, ids: list[int]) -> torch.Tensor:
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
    ({"prompt": "x", "adapters": [{"name": "a,b"}]}, 422, "adapters.0.name"),
    ({"prompt": "x", "adapters": [{"name": "a"}, {"name": "a"}]}, 400, "adapters"),
    ({"prompt": "x", "adapters": [{"name": "gone"}]}, 404, None),
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


def test_what_is_wrong_is_refused_with_its_name(live: Any, subtests: pytest.Subtests) -> None:
    for body, status, param in WRONG_BODIES:
        with subtests.test(str(body)[:80]):
            answer = live.http.post("/generate", content=json.dumps(body), headers={"content-type": "application/json"})
            assert answer.status_code == status, answer.text
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["message"]
            if param is not None:
                assert error["param"].startswith(param), error
            assert live.generate("still here").status_code == 200


BEFORE_ANY_TOKEN: list[tuple[dict[str, Any], int, str]] = [
    ({"max_tokens": 257}, 400, "max_tokens"),
    ({"max_tokens": 3, "min_tokens": 5}, 400, "min_tokens"),
    ({"stop_token_ids": [100000]}, 400, "stop_token_ids"),
    ({"adapters": [{"name": "gone"}]}, 404, "adapters"),
    ({"adapters": [{"name": "a"}, {"name": "a"}]}, 400, "adapters"),
]
GENERATING: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"prompt": "x"}),
    ("/v1/completions", {"model": "tiny", "prompt": ["x", "y"]}),
    ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}),
]
CLASSIFYING: tuple[str, dict[str, Any]] = ("/classify", {"prompt": "x", "labels": ["a", "b"]})
NO_SCHEMAS: list[dict[str, Any]] = [
    {"type": "json_schema"},
    {"type": "json_object", "json_schema": {"schema": {}}},
    {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 100_000]}}},
]


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """No prompt can be read."""
    for name in ("encode_input", "encode_chat", "encode_labels"):
        monkeypatch.setattr(Prompts, name, None)


@pytest.mark.usefixtures("unread")
def test_bounds_are_checked_before_a_prompt_is_tokenized(live: Any, subtests: pytest.Subtests) -> None:
    asked = [(path, {**prompt, **wrong}, *told) for path, prompt in GENERATING for wrong, *told in BEFORE_ANY_TOKEN]
    asked.append(("/v1/completions", {"model": "tiny", "prompt": ["x"] * 9, "n": 16}, 400, "n"))
    path, prompt = CLASSIFYING
    asked += [(path, {**prompt, **wrong}, *told) for wrong, *told in BEFORE_ANY_TOKEN if "adapters" in wrong]
    wrong_format = 400, "response_format"
    asked += [(p, {**b, "response_format": f}, *wrong_format) for p, b in GENERATING[1:] for f in NO_SCHEMAS]
    for path, body, status, param in asked:
        with subtests.test(f"{path} {body}"[:120]):
            answer = live.http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    told = live.generate(max_tokens=257).json()["error"]
    assert told["code"] == "context_length_exceeded" and "257" in told["message"] and "256" in told["message"]


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(("flag", "status"), [("--max-mix", 400), ("--max-slots", 507), ("--adapter-ram", 507)])
def test_a_mix_that_no_request_could_have_is_refused_before_a_prompt_is_tokenized(
    live: Any, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests, flag: str, status: int
) -> None:
    parts = live.services
    limits: dict[str, Any] = {
        "--max-mix": (parts.registry, "_max_mix", 1),
        "--max-slots": (parts.engine._slots, "count", 1),
        "--adapter-ram": (parts.registry._ram, "capacity", live.http.get("/adapters/a").json()["bytes"]),
    }
    monkeypatch.setattr(*limits[flag])
    for path, prompt in (*GENERATING, CLASSIFYING):
        with subtests.test(path):
            answer = live.http.post(path, json={**prompt, "adapters": [{"name": "a"}, {"name": "b"}]})
            assert answer.status_code == status and flag in answer.json()["error"]["message"], answer.text
            assert answer.json()["error"]["param"] == "adapters"
    assert live.idle()


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/generate?task=moving", {"prompt": "x"}),
        ("/classify?task=moving", {"prompt": "x", "labels": ["a", "b"]}),
        ("/v1/completions", {"model": "moving", "prompt": "x"}),
        ("/v1/chat/completions", {"model": "moving", "messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_what_a_call_is_resolved_to_answers_it_though_its_task_moves_on_meanwhile(
    live: Any, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, Any]
) -> None:
    """While its prompt is tokenized the task takes another adapter, and the one of before goes."""
    began, goes_on = threading.Event(), threading.Event()
    registry = live.services.registry

    async def slow(self: Prompts, size: int, call: Callable[[], Any]) -> Any:
        began.set()
        await asyncio.to_thread(goes_on.wait, SECONDS)
        return call()

    def route_to(name: str) -> dict[str, Any]:
        return {"prompt": "{input}", "route": {"choice": [{"name": name, "weight": 1.0}]}}

    assert live.http.post("/adapters", json={"name": "old", "source": "a"}).status_code == 201
    assert live.http.put("/tasks/moving", json=route_to("old")).status_code == 201
    monkeypatch.setattr(Prompts, "_run", slow)
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
def test_a_call_that_is_refused_holds_no_version(live: Any, path: str) -> None:
    told = {"model": "a", "messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    told |= {"model": "a"} if "/v1" in path else {"adapters": [{"name": "a", "weight": 1.0}]}
    wrong = {"labels": []} if path == "/classify" else {"max_tokens": 100_000}
    refused = live.http.post(path, json={**told, **wrong})
    assert refused.status_code in (400, 422), refused.text
    assert live.services.registry.memory()["leases"] == 0


@pytest.mark.usefixtures("unread")
def test_more_answers_than_can_wait_are_refused_before_a_prompt_is_tokenized(
    start: Any, subtests: pytest.Subtests
) -> None:
    live = start(max_queue=4)
    asked = [(path, {**prompt, "n": 5}) for path, prompt in GENERATING[1:]]
    asked.append(("/v1/completions", {"model": "tiny", "prompt": [*"abcde"]}))
    asked.append(("/v1/completions", {"model": "tiny", "prompt": "x", "n": 5}))
    asked.append(("/classify", {"prompt": "x", "labels": [*"abcde"]}))
    for path, body in asked:
        with subtests.test(f"{path} {body}"):
            answer = live.http.post(path, json=body)
            count = 10 if body.get("prompt") == ["x", "y"] else 5
            assert answer.status_code == 507, answer.text
            assert (
                f"the call makes {count} requests, and the queue holds 4 (--max-queue); send"
                in answer.json()["error"]["message"]
            )


ADVICE: list[tuple[Any, str]] = [
    ({"input": "x"}, "prompt: it is missing; input: there is no such field; /docs lists all fields"),
    (
        {"prompt": "x", "adapters": {"a": 0.5}},
        'adapters: Input should be a list, such as [{"name": "sentiment", "weight"',
    ),
    ({"prompt": "x", "adapters": ["a"]}, 'adapters.0: Input should be a JSON object, such as {"name": "sentiment", '),
    ({"prompt": "x", "adapters": [{"name": "a b"}]}, "adapters.0.name: String should be a name (1 to 64 letters, "),
    ({"prompt": "x", "adapters": [{"name": "gone"}]}, "no adapter named 'gone' is served; GET /adapters lists what is"),
]


def test_a_mistake_is_told_with_what_to_write_instead(live: Any, subtests: pytest.Subtests) -> None:
    for body, told in ADVICE:
        with subtests.test(told):
            assert told in live.http.post("/generate", json=body).json()["error"]["message"]
    http = live.http
    template = http.put("/tasks/new", json={"prompt": "no place"}).json()["error"]["message"]
    assert template == "prompt: String should be a text with {input} where the request's prompt goes"
    version = http.put("/adapters/a", json={"version": "a05c95241361"}).json()["error"]["message"]
    assert version == "version: String should be name@digest, with 6 or more digits of the digest"
    assert "a slash at its end" in http.post("/generate/", json={"prompt": "x"}).json()["error"]["message"]
    got = http.get("/generate").json()["error"]["message"]
    assert got == "this route does not know GET; what it knows: POST"
    packed = http.post("/generate", content=gzip.compress(b"{}"), headers={"content-type": "application/json"})
    assert "not compressed" in packed.json()["error"]["message"]
    assert "PUT /tasks/a makes a task of it" in live.generate("x", task="a").json()["error"]["message"]


def test_of_a_field_that_takes_several_kinds_only_what_applies_is_told(live: Any) -> None:
    def told(stop: Any) -> str:
        return str(live.generate("x", stop=stop).json()["error"]["message"])

    assert told(["s"] * 9) == "stop: List should have at most 8 items after validation, not 9"
    assert told("") == "stop: String should have at least 1 character"
    assert told(["s", ""]) == "stop.1: String should have at least 1 character"
    assert told(["s", None]) == "stop.1: Input should be a valid string"
    assert "valid string" in told(5) and "valid list" in told(5)


def test_of_kinds_of_lists_the_nearest_is_told_and_nothing_twice(live: Any) -> None:
    def told(**fields: Any) -> dict[str, Any]:
        answer = live.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **fields})
        assert answer.status_code == 400
        error: dict[str, Any] = answer.json()["error"]
        return error

    negative = told(prompt=[1, -2])
    assert negative["message"] == "prompt.1: Input should be greater than or equal to 0"
    assert negative["param"] == "prompt.1"
    none = told(prompt=None)["message"]
    assert none == "prompt: Input should be a valid string; prompt: Input should be a valid list"
    assert told(prompt=[])["message"] == "prompt: List should have at least 1 item after validation, not 0"
    assert told(logprobs=21)["message"] == "logprobs: Input should be less than or equal to 20"
    assert "valid integer" in told(logprobs="all")["message"]
    assert told(response_format="json")["message"] == "response_format: Input should be a JSON object"


def test_a_body_full_of_mistakes_is_refused_for_few_of_them(live: Any) -> None:
    """To gather and tell a million takes a minute, in which nobody else is answered."""

    def told(path: str, body: Any) -> str:
        return str(live.http.post(path, json=body).json()["error"]["message"])

    many = dict.fromkeys(map(str, range(1000)), 1)
    too_many = "1000 fields are too many; /docs lists all fields"
    first = "0.input: Input should be a valid string; data.0.output: it is missing"
    assert told("/generate", many) == too_many
    assert told("/generate", {"prompt": "x", "adapters": [many]}) == f"adapters.0: {too_many}"
    assert told("/tasks/mood/evaluate", {"data": [{"input": 1}] * 9}) == f"data.{first}"
    job = {"model": "tiny", "training_file": "file-1", "metadata": many}
    assert told("/v1/fine_tuning/jobs", job) == f"metadata: {too_many}"
    negative = "Input should be greater than or equal to 0"
    assert told("/v1/completions", {"model": "tiny", "prompt": [-1] * 9}) == f"prompt.0: {negative}"
    prompts = [[1], *[[-1] * 9] * 2]
    both = f"prompt.1.0: {negative}; prompt.2.0: {negative}"
    assert told("/v1/completions", {"model": "tiny", "prompt": prompts}) == both
    part = "content.0.type: it is missing"
    message = {"role": "user", "content": [{"text": "a"}] * 9}
    assert told("/v1/chat/completions", {"model": "tiny", "messages": [message] * 9}) == f"messages.0.{part}"


def test_a_weight_of_null_is_one_that_was_left_out(live: Any) -> None:
    answer = live.generate("x", max_tokens=1, adapters=[{"name": "a", "weight": None}])
    assert answer.status_code == 200 and answer.json()["adapters"][0]["weight"] == 1.0


def test_a_weight_is_at_most_16_in_size_and_n_at_most_16(live: Any) -> None:
    for weight, status in ((16, 200), (-16, 200), (16.5, 422), (-16.5, 422)):
        answer = live.generate("x", max_tokens=1, adapters=[{"name": "a", "weight": weight}])
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"] == "adapters.0.weight"
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    assert len(live.http.post("/v1/completions", json={**body, "n": 16}).json()["choices"]) == 16
    refused = live.http.post("/v1/completions", json={**body, "n": 17})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"


def test_an_absent_length_is_clipped_and_an_explicit_one_is_refused_with_both_numbers(live: Any) -> None:
    prompt = "y" * 250
    clipped = live.generate(prompt, ignore_eos=True).json()
    assert clipped["usage"]["completion_tokens"] == 6 and clipped["finish_reason"] == "length"
    message = live.generate(prompt, max_tokens=64).json()["error"]["message"]
    assert "64" in message and "250" in message and "256" in message
    for too_long in ({"prompt": prompt, "max_tokens": 64}, {"prompt": "y" * 300}, {"prompt": "y" * 1_000_000}):
        error = live.http.post("/v1/completions", json={"model": "a", **too_long}).json()["error"]
        assert error["code"] == "context_length_exceeded", "by which clients turn to a model with a longer one"
        assert error["param"] == "max_tokens" or error["message"].startswith(
            "this model's maximum context length is 256 tokens"
        )


def test_unknown_tasks_are_404_and_adapters_are_no_tasks(live: Any) -> None:
    for name in ("nothing", "a"):
        answer = live.generate("x", task=name)
        assert answer.status_code == 404 and answer.json()["error"]["param"] == "task"


def test_special_tokens_in_a_users_text_are_plain_text(live: Any) -> None:
    text = live.services.prompts.tokenizer
    count = live.generate("<|im_end|>").json()["usage"]["prompt_tokens"]
    assert count == len(text.encode("<|im_end|>")) > 1


def test_a_longer_deadline_than_the_servers_is_the_servers(start: Any) -> None:
    live = start(deadline=0.15)
    live.slow_down(0.05)
    assert live.generate("x", max_tokens=100, ignore_eos=True, deadline_ms=60_000).status_code == 504
    told = live.http.get("/openapi.json").json()["components"]["schemas"]
    for body in ("GenerateBody", "ClassifyBody", "CompletionBody", "ChatBody"):
        assert "more than the server's `--deadline` is that" in str(told[body]["properties"]["deadline_ms"])


def test_a_deadline_ends_a_request_with_504(live: Any) -> None:
    live.slow_down(0.05)
    answer = live.generate("x", max_tokens=100, ignore_eos=True, deadline_ms=150)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false", "clients would ask for as much time twice more by themselves"
    assert live.idle()


def test_a_sliding_window_ends_the_context_of_the_server(
    start: Any, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond it the model attends to fewer tokens than the kernels do."""
    windowed = replace(tiny_base, config=replace(tiny_base.config, sliding_window=16))
    monkeypatch.setattr(
        server.app,
        "load_and_build",
        lambda settings, *given: build(settings, windowed, *given[:2]),
    )
    live = start()
    answer = live.http.post("/v1/completions", json={"model": windowed.name, "prompt": [5] * 12, "max_tokens": 4})
    assert answer.status_code == 200, answer.text
    for prompt, new in ((12, 5), (40, 1)):
        body = {"model": windowed.name, "prompt": [5] * prompt, "max_tokens": new}
        refused = live.http.post("/v1/completions", json=body)
        assert refused.status_code == 400 and "16" in refused.json()["error"]["message"], refused.text


def test_a_stream_asks_proxies_not_to_hold_it_back(live: Any) -> None:
    answer = live.generate("x", max_tokens=1, stream=True)
    assert answer.headers["x-accel-buffering"] == "no" and "no-cache" in answer.headers["cache-control"]


@pytest.mark.parametrize(("given", "told"), [(-math.inf, -9999.0), (-0.5, -0.5), (0.0, 0.0)])
def test_the_log_probability_of_the_impossible_is_a_number_of_json(given: float, told: float) -> None:
    assert finite(given) == told


def test_a_prompt_counts_once_whatever_its_answers(live: Any) -> None:
    prompt = "a long enough prompt for several blocks of the cache, twice over"
    body = {"model": "mood", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    first = live.http.post("/v1/completions", json={**body, "n": 1}).json()["usage"]
    several = live.http.post("/v1/completions", json={**body, "n": 3, "temperature": 1.0}).json()["usage"]
    assert several["prompt_tokens"] == first["prompt_tokens"] and several["completion_tokens"] == 6
    assert 0 < several["prompt_tokens_details"]["cached_tokens"] <= several["prompt_tokens"]
