"""/v1 through the `openai` package: shapes, streams, usage, log-probabilities, errors, unsupported fields."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

HELLO: Any = [{"role": "user", "content": "hello"}]
LONG: Any = {"ignore_eos": True}


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


def test_model_list(live: Any, client: openai.OpenAI) -> None:
    found = {m.id: m.model_dump() for m in client.models.list()}
    kinds = {id: m["kind"] for id, m in found.items()}
    assert kinds == {"tiny": "base", "a": "adapter", "b": "adapter", "mood": "task", "adapter:mood": "adapter"}
    assert found["tiny"]["parent"] is None and {m["parent"] for m in found.values()} == {None, "tiny"}
    context = live.http.get("/stats").json()["base"]["context"]
    assert all((m["root"], m["max_model_len"]) == (id, context) for id, m in found.items())
    assert "/" not in json.dumps(list(found.values())), "no path of the server"
    version = live.http.get("/adapters/a").json()["version"]
    for exact in (version, "adapter:a", f"adapter:{version}"):
        assert client.models.retrieve(exact).model_dump()["kind"] == "adapter"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    common: Any = {"model": "a", "messages": HELLO, "max_tokens": 12, "temperature": 0, "extra_body": LONG}
    whole = client.chat.completions.create(**common, logprobs=True, top_logprobs=2)
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens_details is not None
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and len(logprobs.content) == 12
    assert all(len(t.top_logprobs) == 2 and t.bytes is not None for t in logprobs.content)
    chunks = list(client.chat.completions.create(**common, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("n", [1, 2])
def test_every_token_has_a_chunk_even_without_text(client: openai.OpenAI, n: int) -> None:
    """Load generators measure the time between tokens by chunks."""
    fields: Any = {"model": "a", "max_tokens": 60, "n": n, "temperature": 1.5, "seed": 3, "stream": True}
    fields |= {"stream_options": {"include_usage": True}, "extra_body": LONG}
    texts = [c.choices[0].text for c in client.completions.create(prompt="x", **fields) if c.choices]
    assert len(texts) == 60 * n and "" in texts
    chunks = [c.choices[0] for c in client.chat.completions.create(messages=HELLO, **fields) if c.choices]
    assert len(chunks) == 61 * n and sum(c.delta.role == "assistant" for c in chunks) == n


def test_completions_of_texts_and_token_ids(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=3, temperature=0)
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text == made.choices[1].text, "greedy answers to one prompt are equal"
    assert made.usage is not None and made.usage.prompt_tokens == 5
    fields: Any = {"model": "tiny", "prompt": [40, 41, 42], "max_tokens": 2, "temperature": 0}
    logprobs = client.completions.create(**fields, logprobs=1).choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and logprobs.text_offset == [0, len(logprobs.tokens[0])]
    assert client.completions.create(**fields, logprobs=True).choices[0].logprobs == logprobs
    assert len(client.completions.create(model="tiny", prompt=[[40], [41, 42]], max_tokens=1).choices) == 2


def test_length_limits_apply_to_each_prompt(live: Any, client: openai.OpenAI) -> None:
    context = live.services.prompts.limit.context
    long = [40 + i % 8 for i in range(context - 5)]

    def lengths(*prompts: list[int], **more: Any) -> list[int]:
        made = client.completions.create(
            model="tiny", prompt=list(prompts), temperature=0, logprobs=0, extra_body={**LONG, **more}
        )
        return [len(choice.logprobs.tokens) for choice in made.choices]  # type: ignore[union-attr, arg-type]

    assert lengths(long, [40, 41]) == [5, 16]
    with pytest.raises(openai.BadRequestError, match="at most 5"):
        lengths([40, 41], long, max_tokens=6)


def test_seeds_repeat_and_differ_between_choices(client: openai.OpenAI) -> None:
    fields: Any = {"n": 4, "seed": 3, "max_tokens": 12, "temperature": 1.5, "extra_body": LONG}
    first, again = (
        [c.text for c in client.completions.create(model="tiny", prompt="so", **fields).choices] for _ in range(2)
    )
    assert len(set(first)) > 1 and again == first


def test_streamed_logprobs_and_offsets(client: openai.OpenAI) -> None:
    fields: Any = {"n": 2, "max_tokens": 5, "logprobs": 1, "stream": True, "temperature": 0, "extra_body": LONG}
    tokens: dict[int, list[str]] = {0: [], 1: []}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in client.completions.create(model="tiny", prompt="x", **fields):
        for choice in chunk.choices:
            tokens[choice.index] += choice.logprobs.tokens
            offsets[choice.index] += choice.logprobs.text_offset
    assert len(tokens[0]) == 5 and tokens[0] == tokens[1]
    assert offsets[0] == [sum(map(len, tokens[0][:i])) for i in range(5)]


def test_sampled_token_is_among_the_top_logprobs(client: openai.OpenAI) -> None:
    fields: Any = {"max_tokens": 20, "temperature": 2, "logprobs": 2, "seed": 3, "extra_body": LONG}
    logprobs: Any = client.completions.create(model="tiny", prompt="one", **fields).choices[0].logprobs
    assert any(len(top) == 3 for top in logprobs.top_logprobs), "one of them was unlikely"
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] >= logprob


def test_model_resolves_to_version_then_task_then_adapter_then_base(live: Any, client: openai.OpenAI) -> None:
    text = live.services.prompts.tokenizer

    def prompt_tokens(model: str) -> int:
        usage = client.chat.completions.create(model=model, messages=HELLO, max_tokens=1).usage
        assert usage is not None
        return usage.prompt_tokens

    plain = len(text.encode_chat(HELLO))
    wrapped = len(text.encode_chat([{"role": "user", "content": "Is it good?\n\nhello"}]))
    version = live.http.get("/adapters/mood").json()["version"]
    assert prompt_tokens("mood") == wrapped
    assert prompt_tokens("adapter:mood") == prompt_tokens(version) == prompt_tokens("tiny") == plain
    for unknown in ("nobody", "adapter:nobody", "mood@000000000000"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=unknown, messages=HELLO)
        assert caught.value.param == "model"


def test_task_in_the_query_is_refused_and_other_parameters_are_ignored(live: Any) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    refused = live.http.post("/v1/completions?task=mood", json=body)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "task"
    assert live.http.post("/v1/completions?api-version=1", json=body).status_code == 200


def test_task_defaults_override_openais(live: Any, client: openai.OpenAI) -> None:
    for fields, tokens in (({}, 6), ({"max_tokens": 3}, 3)):
        made = client.chat.completions.create(model="mood", messages=HELLO, extra_body={**LONG, **fields})
        assert made.usage is not None and made.usage.completion_tokens == tokens
    for name, count in (("shown", 2), ("unshown", 0)):
        task = {"prompt": "{input}", "defaults": {"logprobs": count, "max_tokens": 2, "ignore_eos": True}}
        live.http.put(f"/tasks/{name}", json=task).raise_for_status()
    logprobs = client.chat.completions.create(model="shown", messages=HELLO).choices[0].logprobs
    assert logprobs is not None and [len(token.top_logprobs) for token in logprobs.content or ()] == [2, 2]
    assert client.chat.completions.create(model="shown", messages=HELLO, logprobs=False).choices[0].logprobs is None
    assert client.chat.completions.create(model="unshown", messages=HELLO).choices[0].logprobs is None
    assert client.completions.create(model="unshown", prompt="hello").choices[0].logprobs is None


def test_mix_in_extra_body(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "hello you", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    base = client.completions.create(**fields)
    mixed = client.completions.create(**fields, extra_body={"adapters": [{"name": "a"}, {"name": "b", "weight": -2}]})
    assert base.choices[0].logprobs != mixed.choices[0].logprobs


@pytest.mark.parametrize("chat", [False, True])
def test_continuous_usage(client: openai.OpenAI, live: Any, chat: bool) -> None:
    create: Any = client.chat.completions.create if chat else client.completions.create
    fields: Any = {"messages": HELLO} if chat else {"prompt": "x"}
    fields |= {"model": "tiny", "max_tokens": 5, "stream": True, "temperature": 0, "extra_body": LONG}
    chunks = list(create(**fields, stream_options={"include_usage": True, "continuous_usage_stats": True}))
    used = [chunk.usage.completion_tokens for chunk in chunks]
    assert used == sorted(used) and used[-1] == 5 and not chunks[-1].choices
    without = list(create(**fields, stream_options={"continuous_usage_stats": True}))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


WITHOUT_EFFECT: list[dict[str, Any]] = [
    {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "tool_choice": "none", "tools": [], "best_of": 1},
    {"logit_bias": {}, "response_format": {"type": "text"}, "parallel_tool_calls": True, "top_logprobs": None},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"},
    {"prompt_cache_key": "k", "prompt_cache_retention": "24h", "prompt_cache_options": {"mode": "implicit"}},
    {"stream_options": {"include_obfuscation": False}, "stop": None, "modalities": ["text"]},
    {"skip_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False},
    {"add_generation_prompt": True, "continue_final_message": False, "echo": False, "suffix": ""},
    {"response_format": {}, "stop": "", "top_k": -1, "length_penalty": 1.0, "priority": 0, "return_token_ids": False},
]


@pytest.mark.parametrize("extra", WITHOUT_EFFECT, ids=lambda extra: ",".join(extra))
def test_fields_without_effect_are_accepted(live: Any, extra: dict[str, Any]) -> None:
    body = {"model": "tiny", "messages": HELLO, "max_tokens": 1, **extra}
    answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required", "tools": [{"type": "function"}]}, "tools"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"best_of": 3}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"chat_template": "x"}, "chat_template"),
    ({"response_format": {"type": "json_object", "made_up": 1}}, "response_format.made_up"),
    ({"response_format": {"type": "grammar", "value": "x"}}, "response_format.type"),
    ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}]}, "messages.0.tool_calls"),
    ({"messages": [{"role": "user", "content": [image("http://x")]}]}, "messages.0.content.0.type"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "b", "detail": "high"}]}]},
        "messages.0.content.0.detail",
    ),
]


@pytest.mark.parametrize(("extra", "param"), UNSUPPORTED, ids=[str(extra)[:60] for extra, _ in UNSUPPORTED])
def test_fields_that_would_change_the_answer_are_refused(live: Any, extra: dict[str, Any], param: str) -> None:
    answer = live.http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **extra})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "unsupported_parameter", param), answer.text
    assert param in error["message"]
    assert ("response_format" in error["message"]) == (param in ("tools", "guided_json") or "format" in param)


@pytest.mark.parametrize(
    ("extra", "param"),
    [
        ({"temperature": 9}, "temperature"),
        ({"n": 17}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"metadata": [{}] * 1001}, "metadata"),
        ({"metadata": {"a": [[{}] * 600, [{}] * 600]}}, "metadata"),
    ],
    ids=str,
)
def test_invalid_values_are_400(live: Any, extra: dict[str, Any], param: str) -> None:
    answer = live.http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **extra})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_text_parts_and_names_are_accepted(live: Any) -> None:
    def ask(*messages: Any) -> Any:
        body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
        answer = live.http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"], answer.json()["usage"]["prompt_tokens"]

    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert ask(*HELLO) == ask({"role": "user", "content": parts}) == ask({**HELLO[0], "name": "ada"})


def test_async_client_reads_many_streams_at_once(live: Any) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=30) as client:

            async def one(i: int) -> str:
                stream = await client.completions.create(
                    model="ab"[i % 2], prompt=f"p{i}", max_tokens=10, temperature=0, stream=True, extra_body=LONG
                )
                return "".join([c.choices[0].text async for c in stream])

            texts = await asyncio.gather(*map(one, range(12)))
            assert texts[3] == await one(3)
            stream = await client.chat.completions.create(
                model="a", messages=HELLO, max_tokens=200, stream=True, extra_body=LONG
            )
            await anext(aiter(stream))
            await stream.close()

    asyncio.run(run())
    assert live.idle(2.0), "closing a stream ends the work"


def test_errors_after_the_first_byte_are_events(live: Any, client: openai.OpenAI) -> None:
    live.slow_down(0.05)
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=100, stream=True, extra_body={**LONG, "deadline_ms": 1500}
    )
    with pytest.raises(openai.APIError, match="deadline"):
        list(stream)
    assert live.idle()


def test_error_classes_of_the_package(start: Any) -> None:
    live = start(api_keys="me:secret", max_body=1 << 12)
    options: Any = {"base_url": f"{live.url}/v1", "max_retries": 0, "timeout": 30}
    with openai.OpenAI(**options, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with openai.OpenAI(**options, api_key="secret") as client:
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError):
            client.fine_tuning.jobs.list()
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="tiny", prompt="x" * 5000)
        assert caught.value.status_code == 413
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt="x", max_tokens=100_000)
        assert "100000" in refused.value.message and refused.value.param == "max_tokens"


def test_client_retries_429_and_503_but_not_409(start: Any, write_adapter: Any) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        write_adapter(name, seed)
    live = start(max_queue=1, max_batch=1)
    statuses: list[int] = []

    def answered(answer: httpx.Response) -> None:
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            live.slow_down(0.0)
        elif answer.status_code == 503:
            live.state.state = "ready"

    options: Any = {"base_url": f"{live.url}/v1", "api_key": "none", "max_retries": 5, "timeout": 60}
    with openai.OpenAI(**options, http_client=httpx.Client(event_hooks={"response": [answered]})) as client:

        def ask(i: int) -> int:
            made = client.completions.create(model="tiny", prompt=f"p{i}", max_tokens=10, extra_body=LONG)
            assert made.usage is not None
            return made.usage.completion_tokens

        live.slow_down(1.0)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(4))) == [10] * 4
        assert 429 in statuses and statuses.count(200) == 4
        live.state.state = "loading"
        statuses.clear()
        assert ask(9) == 10 and statuses == [503, 200]
        statuses.clear()
        assert live.http.post("/adapters", json={"name": "c", "source": "a"}).status_code == 201
        with pytest.raises(openai.ConflictError):
            client.post(f"{live.url}/adapters", body={"name": "c", "source": "b"}, cast_to=object)
        assert statuses == [409]


def test_vllm_adapter_routes(live: Any, write_adapter: Any) -> None:
    write_adapter("late", 9)
    body = {"lora_name": "late", "lora_path": "late"}
    loaded = live.http.post("/v1/load_lora_adapter", json=body)
    assert loaded.status_code == 200 and "late" in loaded.json()
    write_adapter("late", 10)
    assert live.http.post("/v1/load_lora_adapter", json=body).status_code == 409
    assert live.http.post("/v1/load_lora_adapter", json={**body, "load_inplace": True}).status_code == 200
    gateway = {**body, "is_3d_lora_weight": False, "load_inplace": None, "base_model_name": "elsewhere"}
    assert live.http.post("/v1/load_lora_adapter", json=gateway).status_code == 200
    for status in (200, 404):
        assert live.http.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == status
    for route, param in (("load", "is_3d_lora_weight"), ("unload", "lora_path")):
        refused = live.http.post(f"/v1/{route}_lora_adapter", json={**body, "is_3d_lora_weight": True})
        assert refused.json()["error"]["param"] == param


@pytest.fixture
def started(live: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of every `Inference.start`: prompts, samplings, caller, options."""
    inference, calls = live.services.inference, []
    start = inference.start

    def recording(target: Any, prompts: Any, samplings: Any, caller: Any, **more: Any) -> Any:
        calls.append(([list(prompt) for prompt in prompts], samplings, caller, more))
        return start(target, prompts, samplings, caller, **more)

    monkeypatch.setattr(inference, "start", recording)
    return calls


def test_completion_starts_n_sequences_per_prompt(
    live: Any, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "prompt": [[40, 41], [42, 43, 44]], "n": 2, "deadline_ms": 60_000, "max_tokens": 1}
    before = int(time.time())
    answer = live.http.post("/v1/completions", json=body).json()
    prompts, samplings, caller, more = started.pop()
    assert prompts == [[40, 41], [40, 41], [42, 43, 44], [42, 43, 44]]
    assert answer["usage"]["prompt_tokens"] == 5 and answer["id"] == more["id"] and answer["id"].startswith("cmpl-")
    assert before <= answer["created"] <= time.time() and 0 < caller.deadline - caller.arrived <= 60.0
    assert {(each.max_tokens, each.temperature) for each in samplings} == {(1, 1.0)}
    monkeypatch.setattr("server.api.openai_schemas.MAX_SEQUENCES", 4)
    assert live.http.post("/v1/completions", json=body).status_code == 200
    for wrong, param in (({"n": 3}, "n"), ({"prompt": [[40], [1 << 20]]}, "prompt")):
        refused = live.http.post("/v1/completions", json={**body, **wrong})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param


def test_texts_of_a_completion_go_through_the_template(live: Any, started: list[Any]) -> None:
    text = live.services.prompts.tokenizer
    wrapped = [text.encode_task("Is it good?\n\n{input}", "chat", None, word) for word in ("x", "yes")]
    for prompt in ("x", ["x", "yes"], [40, 41]):
        body = {"model": "mood", "prompt": prompt, "max_tokens": 1}
        assert live.http.post("/v1/completions", json=body).status_code == 200
    assert [call[0] for call in started] == [wrapped[:1], wrapped, [[40, 41]]]


def test_chat_messages_and_defaults(live: Any, started: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seen = live.services.prompts, []
    encode_chat = prompts.encode_chat
    monkeypatch.setattr(prompts, "limit", replace(prompts.limit, context=128))
    monkeypatch.setattr(prompts, "encode_chat", lambda task, said: (seen.append(said), encode_chat(task, said))[1])
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello", "name": "ada"}]
    body = {"model": "tiny", "messages": messages, "logprobs": True}
    answer = live.http.post("/v1/chat/completions", json=body).json()
    assert seen.pop() == [{**messages[0], "role": "system"}, messages[1]]
    encoded, [sampling], _, more = started.pop()
    assert sampling.max_tokens == 128 - len(encoded[0]) > 16 and sampling.temperature == 1.0
    assert answer["id"] == more["id"] and answer["id"].startswith("chatcmpl-")
    assert all(token["top_logprobs"] == [] for token in answer["choices"][0]["logprobs"]["content"])
    several = {**body, "n": 2, "max_tokens": 8, "response_format": {"type": "json_object"}}
    assert len(live.http.post("/v1/chat/completions", json=several).json()["choices"]) == 2
    assert len(started.pop()[3]["constraints"]) == 2
