"""The OpenAPI document: real answers match it, and the page made from it."""

from __future__ import annotations

import asyncio
import html
import json
import re
from typing import Any

import httpx
import jsonschema
import pytest

from server.api.schemas import NAME_PATTERN, PATTERNS
from server.tasks import sampling


@pytest.fixture
def document(live: Any) -> dict[str, Any]:
    found: dict[str, Any] = live.http.get("/openapi.json").json()
    return found


def closed(schemas: dict[str, Any]) -> dict[str, Any]:
    """The schemas with additional properties forbidden."""
    return {
        name: {**schema, **({"additionalProperties": False} if "properties" in schema else {})}
        for name, schema in schemas.items()
    }


def check(document: dict[str, Any], answer: httpx.Response) -> None:
    """The status and the body of an answer match the document."""
    method, path = answer.request.method.lower(), answer.request.url.path
    for template, operations in document["paths"].items():
        if re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", template), path) and method in operations:
            told = operations[method]["responses"]
            assert str(answer.status_code) in told, (method, path, answer.status_code)
            content = told[str(answer.status_code)].get("content", {})
            kind = answer.headers.get("content-type", "").partition(";")[0]
            assert (kind in content) or not answer.content, (method, path, answer.status_code, kind)
            if kind == "application/json":
                told_of = {
                    **content[kind]["schema"],
                    "components": {"schemas": closed(document["components"]["schemas"])},
                }
                jsonschema.validate(answer.json(), told_of)
            return
    raise AssertionError(f"{method} {path} is not in the document")


def test_all_errors_have_the_same_schema(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            for status, told in operation["responses"].items():
                if status.startswith(("4", "5")):
                    schema = told["content"]["application/json"]["schema"]
                    assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, method, status)
            assert operation.get("description"), (path, method)
            if path.startswith("/v1/"):
                assert "422" not in operation["responses"], path
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_real_answers_match_the_document(live: Any, document: dict[str, Any]) -> None:
    http = live.http
    chat = {"model": "mood", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    answers = [
        live.generate("x", task="mood", logprobs=2),
        live.generate("x", stream=True, max_tokens=2),
        live.generate("x", task="nobody"),
        live.generate("", task="mood"),
        live.generate("x", max_tokens=100_000),
        http.post("/classify?task=mood", json={"prompt": "x"}),
        http.post("/classify", json={"prompt": "x"}),
        http.get("/v1/models"),
        http.get("/v1/models/mood"),
        http.get("/v1/models/nobody"),
        http.post("/v1/completions", json={"model": "a", "prompt": "x", "logprobs": 1}),
        http.post("/v1/completions", json={"model": "a"}),
        http.post("/v1/completions", json={"model": "nobody", "prompt": "x"}),
        http.post("/v1/chat/completions", json={**chat, "logprobs": True}),
        http.post("/v1/chat/completions", json={**chat, "stream": True}),
        http.get("/adapters"),
        http.get("/adapters/a"),
        http.get("/adapters/nobody"),
        http.post("/adapters", json={"name": "new", "source": "a"}),
        http.post("/adapters", json={"name": "new", "source": "a"}),
        http.post("/adapters", json={"name": "new", "source": "b"}),
        http.post("/adapters", json={"name": "x", "source": "/"}),
        http.put("/adapters/new", json={"source": "b"}),
        http.put("/adapters/new", json={"source": "a"}, headers={"if-match": "new@000000"}),
        http.post("/adapters/new/pin"),
        http.post("/adapters/new/unpin"),
        http.post("/adapters/compose", json={"name": "sum", "from": [{"name": "a"}, {"name": "b"}], "rank": 2}),
        http.put("/adapters/new", json={"from": [{"name": "a"}]}),
        http.delete("/adapters/new"),
        http.delete("/adapters/mood"),
        http.get("/tasks"),
        http.put("/tasks/own", json={"prompt": "{input}"}),
        http.put("/tasks/own", json={"prompt": "{input}"}),
        http.put("/tasks/own", json={}),
        http.get("/tasks/own"),
        http.get("/tasks/mood/performance"),
        http.post("/tasks/mood/feedback", json={"id": "x", "score": 1}),
        http.delete("/tasks/own"),
        http.get("/health/live"),
        http.get("/health/ready"),
        http.get("/stats"),
        http.get("/metrics"),
        http.post("/v1/load_lora_adapter", json={"lora_name": "v", "lora_path": "a"}),
        http.post("/v1/unload_lora_adapter", json={"lora_name": "v"}),
    ]
    for answer in answers:
        check(document, answer)
    assert {a.status_code for a in answers} >= {200, 201, 202, 400, 404, 409, 412, 422}


def test_docs_page_shows_routes_fields_and_bounds(live: Any, document: dict[str, Any]) -> None:
    response = live.http.get("/docs")
    page = response.text
    assert response.status_code == 200 and "<script" not in page and "https://" not in page
    assert all(path in page for path in document["paths"])
    assert "<code>?task=</code><td>string length ≤ 64 or null<td>" in page
    fields = page.split('<h3 id="GenerateBody">')[1].split("<h3")[0]
    stop = "string length ≥ 1 length ≤ 256"
    for field, text in (
        ("prompt", "string length ≥ 1 length ≤ 8388608, required"),
        ("max_tokens", "integer ≥ 1 ≤ 1000000 or null"),
        ("top_p", "number &gt; 0 ≤ 1 or null"),
        ("repetition_penalty", "number ≥ 0.01 ≤ 10 or null"),
        ("seed", f"integer ≥ {sampling.SEED[0]} ≤ {sampling.SEED[1]} or null"),
        ("stop", f"{stop} or list length ≤ 8 of {stop} or null"),
    ):
        assert f"<code>{field}</code><td>{text}<td>" in fields, field
    assert "{&quot;name&quot;: &quot;sentiment&quot;, &quot;weight&quot;: 0.7}" in page
    name = re.escape(html.escape(PATTERNS[NAME_PATTERN]))
    assert re.search(f"<code>name</code><td>string[^<]*, {name}", page)


def test_docs_page_shows_both_bodies_of_a_route_and_its_headers(live: Any, document: dict[str, Any]) -> None:
    page = live.http.get("/docs").text
    put = page.split("<code>PUT /adapters/{name}</code>")[1].split("<h2>")[0]
    for name in ("PublishBody", "PublishForm", "ComposedAnswer"):
        assert f'href="#{name}"' in put and f'<h3 id="{name}">' in page
    assert "<code>if-match:</code>" in put
    form = page.split('<h3 id="RegisterForm">')[1].split("<h3")[0]
    assert all(f"<code>{part}</code>" in form for part in ("name", "adapter_config.json", "adapter_model.safetensors"))
    required = document["components"]["schemas"]["PublishForm"]["required"]
    assert required == ["adapter_config.json", "adapter_model.safetensors"]


def test_deleting_an_unserved_adapter_matches_the_document(start: Any, live: Any) -> None:
    live.stop()
    lower = start(max_rank=1)
    answer = lower.http.delete("/adapters/a")
    assert (answer.status_code, answer.json()) == (202, {"name": "a"}) and "etag" not in answer.headers
    check(lower.http.get("/openapi.json").json(), answer)


def test_every_pattern_has_a_description(document: dict[str, Any]) -> None:
    patterns = set(re.findall(r'"pattern": ("(?:[^"\\]|\\.)*")', json.dumps(document)))
    assert {json.loads(pattern) for pattern in patterns} == set(PATTERNS)


def test_document_is_not_made_on_the_event_loop(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = live.app.openapi, []

    def beside() -> Any:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()
        made.append(1)
        return make()

    monkeypatch.setattr(live.app, "openapi", beside)
    assert live.http.get("/openapi.json").json() == make() and len(made) == 1
    assert live.http.get("/docs").status_code == 200 and len(made) == 2
