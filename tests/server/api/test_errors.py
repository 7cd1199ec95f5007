"""Error responses: one shape on every status, readable messages, and nothing internal in them."""

from __future__ import annotations

import gzip
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

import server.app
from server.errors import BadModel
from tests.waiting import until

JSON = {"content-type": "application/json"}


def error_of(answer: httpx.Response) -> dict[str, Any]:
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}, body
    assert answer.headers["content-type"] == "application/json" and answer.headers["x-request-id"].startswith("req-")
    error: dict[str, Any] = body["error"]
    return error


def test_every_status_has_the_same_shape(live: Any) -> None:
    seen = {
        404: live.http.get("/nowhere"),
        405: live.http.get("/generate"),
        422: live.http.post("/generate", json={}),
        400: live.http.post("/v1/completions", json={}),
        409: live.http.delete("/adapters/mood"),
    }
    for status, answer in seen.items():
        assert answer.status_code == status and error_of(answer), answer.text
    assert seen[405].headers["allow"] == "POST"
    assert "it supports POST" in error_of(seen[405])["message"]
    assert live.http.patch("/adapters/a").headers["allow"] == "DELETE, GET, PUT"
    assert seen[409].headers["x-should-retry"] == "false"
    slash = error_of(live.http.post("/generate/"))
    assert slash["code"] == "not_found" and "without a slash" in slash["message"]


@pytest.mark.parametrize("route", ["/generate", "/v1/completions"])
@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"prompt": "\xff"}', b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", gzip.compress(b"{}")],
    ids=["deep", "not UTF-8", "number", "compressed"],
)
def test_unreadable_json_is_400(live: Any, route: str, content: bytes) -> None:
    answer = live.http.post(route, content=content, headers=JSON)
    assert answer.status_code == 400 and error_of(answer)["code"] == "invalid_json"
    assert "valid JSON in UTF-8, uncompressed" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/generate", {"input": "x"}, "prompt: it is missing; input: there is no such field; /docs lists all fields"),
        ("/generate", {"prompt": "x", "adapters": {"a": 1}}, 'adapters: Input should be a list, such as [{"name": "s'),
        ("/generate", {"prompt": "x", "adapters": ["a"]}, "adapters.0: Input should be a JSON object, such as {"),
        ("/generate", {"prompt": "x", "adapters": [{"name": "a b"}]}, "adapters.0.name: String should be a name ("),
        ("/generate", {"prompt": "x", "adapters": [{"name": "gone"}]}, "GET /adapters lists all adapters"),
        ("/generate?task=a", {"prompt": "x"}, "PUT /tasks/a"),
        # Of a union type only the branch that is closest to the value is explained.
        ("/generate", {"prompt": "x", "stop": ["s"] * 9}, "stop: List should have at most 8 items after validation"),
        ("/generate", {"prompt": "x", "stop": ""}, "stop: String should have at least 1 character"),
        ("/generate", {"prompt": "x", "stop": ["s", None]}, "stop.1: Input should be a valid string"),
        ("/v1/completions", {"model": "tiny", "prompt": [1, -2]}, "prompt.1: Input should be greater than or equal to"),
        ("/v1/completions", {"model": "tiny", "prompt": []}, "prompt: List should have at least 1 item after"),
        ("/v1/completions", {"model": "tiny", "prompt": None}, "prompt: Input should be a valid string; prompt: Input"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "logprobs": 21}, "logprobs: Input should be less than or"),
        # Bodies full of errors are not checked to their end.
        ("/generate", dict.fromkeys(map(str, range(1000)), 1), "1000 fields are too many"),
        ("/v1/completions", {"model": "tiny", "prompt": [-1] * 9}, "prompt.0: Input should be greater than or equal"),
        ("/tasks/mood/evaluate", {"data": [{"input": 1}] * 9}, "data.0.input: Input should be a valid string; data.0."),
    ],
)
def test_messages_name_the_field_and_what_to_send(live: Any, path: str, body: dict[str, Any], message: str) -> None:
    answer = live.http.post(path, json=body)
    assert answer.status_code in (400, 404, 422) and message in error_of(answer)["message"], answer.text
    field = message.partition(":")[0]
    if "," not in field and " " not in field and "/" not in field:
        assert error_of(answer)["param"] == field


def test_patterns_are_explained_in_words(live: Any) -> None:
    template = live.http.put("/tasks/new", json={"prompt": "no place"}).json()["error"]["message"]
    assert template.startswith("prompt: String should be a text with {input}")
    version = live.http.put("/adapters/a", json={"version": "a05c95241361"}).json()["error"]["message"]
    assert version.startswith("version: String should be name@digest")


def test_unexpected_exceptions_reveal_only_the_request_id(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a secret path /somewhere and a value 0x7f00")

    monkeypatch.setattr(live.services.resolver, "task", broken)
    answer = live.generate("x")
    error = error_of(answer)
    assert answer.status_code == 500 and error["code"] == "internal"
    assert "secret" not in answer.text and answer.headers["x-request-id"] in error["message"]


def test_errors_while_loading_and_after_a_failed_start(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()

    def slow(*_: Any) -> Any:
        gate.wait(10)
        raise BadModel("there is no model at /a/path/of/ours")

    monkeypatch.setattr(server.app, "load_and_build", slow)
    live = start(ready=False)
    assert live.http.get("/health/live").status_code == 200
    for answer in (live.http.get("/health/ready"), live.generate("x"), live.http.get("/v1/models")):
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1 and error_of(answer)
    assert "loramux_memory_bytes" in live.http.get("/metrics").text
    gate.set()

    def message() -> str:
        return str(live.http.get("/health/ready").json()["error"]["message"])

    until(lambda: "could not start" in message())
    assert "/a/path" not in message()


def test_answers_contain_no_path_of_the_server(live: Any, tmp_path: Path) -> None:
    shown = [live.http.get(path).text for path in ("/adapters", "/adapters/a", "/tasks", "/v1/models", "/stats")]
    shown += [live.http.post("/adapters", json={"name": "n", "source": s}).text for s in ("../../etc", "absent")]
    assert all(str(tmp_path) not in text for text in shown)
