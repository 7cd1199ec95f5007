"""`response_format` through the `openai` package, on a model that does not know JSON."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import jsonschema
import openai
import pydantic
import pytest

from server.engine.grammar import Grammar
from server.engine.request import Request
from server.tasks.generation import Generation
from tests.waiting import until

HELLO: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "sure": {"type": "boolean"}},
    "required": ["mood", "sure"],
    "additionalProperties": False,
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "mood", "strict": True, "schema": SCHEMA}}


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_answers_match_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="a", messages=HELLO, max_tokens=120, temperature=1, seed=3, n=4, response_format=FORMAT
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content or ""), SCHEMA)
    pieces = client.chat.completions.create(
        model="a", messages=HELLO, max_tokens=120, temperature=0, stream=True, response_format=FORMAT
    )
    streamed = "".join(c.choices[0].delta.content or "" for c in pieces if c.choices)
    whole = client.chat.completions.create(
        model="a", messages=HELLO, max_tokens=120, temperature=0, response_format=FORMAT
    )
    assert streamed == whole.choices[0].message.content
    jsonschema.validate(json.loads(streamed), SCHEMA)


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of the client
def test_parsed_answers_can_be_sent_back(client: openai.OpenAI) -> None:
    class Mood(pydantic.BaseModel):
        sure: bool

    said = client.chat.completions.parse(
        model="a", messages=HELLO, max_tokens=60, temperature=0, response_format=Mood
    ).choices[0]
    assert isinstance(said.message.parsed, Mood)
    marks = {"cache_control": {"type": "ephemeral"}, "prompt_cache_breakpoint": {"mode": "explicit"}}
    noted: Any = [{"type": "text", "text": "and now?", **marks}]
    messages: Any = [*HELLO, said.message, {"role": "user", "content": noted, "provider_specific_fields": {"a": 1}}]
    bare: Any = [
        *HELLO,
        {"role": "assistant", "content": said.message.content},
        {"role": "user", "content": "and now?"},
    ]
    answers = [
        client.chat.completions.create(model="a", messages=m, max_tokens=8, temperature=0) for m in (messages, bare)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    large: Any = {"role": "assistant", "content": "x", "parsed": [0] * 2000}
    with pytest.raises(openai.BadRequestError, match=r"messages\.0\.parsed has more than 1000 entries"):
        client.chat.completions.create(model="a", messages=[large, *HELLO], max_tokens=1)


def test_json_object_and_completions(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=40, temperature=0, response_format={"type": "json_object"}
    )
    assert (chat.choices[0].message.content or "").startswith("{")
    said = client.completions.create(
        model="tiny", prompt=["one", "two"], max_tokens=120, temperature=0, extra_body={"response_format": FORMAT}
    )
    for choice in said.choices:
        jsonschema.validate(json.loads(choice.text), SCHEMA)


async def test_requests_of_a_batch_have_different_schemas(live: Any) -> None:
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

        async def ask(i: int) -> str:
            more: Any = {"response_format": FORMAT} if i % 2 else {}
            if i % 4 == 3:
                more = {"response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [["x", i]]}}}}
            answer = await client.chat.completions.create(
                model=("tiny", "a", "b")[i % 3], messages=HELLO, max_tokens=150, temperature=0, **more
            )
            return answer.choices[0].message.content or ""

        together = await asyncio.gather(*map(ask, range(12)))
        alone = [await ask(i) for i in range(12)]
    assert together == alone
    assert [json.loads(text) for text in together[3::4]] == [["x", 3], ["x", 7], ["x", 11]]
    for i in range(1, 12, 4):
        jsonschema.validate(json.loads(together[i]), SCHEMA)
    assert live.idle()


WRONG_FORMATS: list[Any] = [
    {"type": "json_schema"},
    {"type": "json_schema", "json_schema": {"name": "x"}},
    {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}},
    {"type": "json_schema", "json_schema": {"schema": {"$ref": "https://example.com/x"}}},
    {"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 100_000]}}},
    {"type": "json_object", "json_schema": {"schema": {}}},
    {"type": "grammar"},
]


def test_wrong_formats_are_400(live: Any, client: openai.OpenAI, subtests: pytest.Subtests) -> None:
    for format in WRONG_FORMATS:
        with subtests.test(str(format)[:80]):
            with pytest.raises(openai.BadRequestError) as refused:
                client.chat.completions.create(model="a", messages=HELLO, max_tokens=4, response_format=format)
            assert str(refused.value.param).startswith("response_format")
            assert live.idle()


async def test_slow_schema_compilation_delays_no_other_request(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    release, grammars = threading.Event(), live.services.grammars
    compile = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda schema: release.wait(60) and compile(schema))
    body: dict[str, Any] = {"model": "a", "messages": HELLO, "max_tokens": 2, "response_format": FORMAT}
    async with httpx.AsyncClient(base_url=live.url, timeout=60) as http:
        waiting = [asyncio.create_task(http.post("/v1/chat/completions", json=body)) for _ in range(40)]
        late = await http.post("/v1/chat/completions", json={**body, "deadline_ms": 300})
        assert late.status_code == 504 and "response_format" in late.json()["error"]["message"]
        assert (await http.get("/metrics")).status_code == 200
        long = await http.post("/generate", json={"prompt": "x" * 5000})
        assert long.status_code == 400
        assert (await http.get("/tasks/mood/performance")).status_code == 200
        assert not any(task.done() for task in waiting)
        monkeypatch.setattr("server.engine.grammar.MAX_WAITING", 40)
        refused = await http.post("/v1/chat/completions", json=body)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) == 1
        release.set()
        assert {answer.status_code for answer in await asyncio.gather(*waiting)} == {200}


def test_answers_are_freed_without_the_garbage_collector(live: Any) -> None:
    """The collector does not know how large a grammar is."""

    def alive() -> list[str]:
        return [kind.__name__ for thing in gc.get_objects() if (kind := type(thing)) in (Grammar, Request, Generation)]

    body: dict[str, Any] = {"model": "a", "messages": HELLO, "max_tokens": 30, "n": 2, "response_format": FORMAT}
    nowhere = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#/no"}}}
    assert live.http.post("/v1/chat/completions", json=body).status_code == 200  # creates what is cached
    assert live.idle()
    gc.collect()
    gc.disable()
    try:
        before = alive()
        for sent, status in ((body, 200), ({**body, "stream": True}, 200), ({**body, "response_format": nowhere}, 400)):
            assert live.http.post("/v1/chat/completions", json=sent).status_code == status
        assert live.idle()
        until(lambda: len(alive()) <= len(before), f"more than {before} is alive", every=0.1)
    finally:
        gc.enable()
