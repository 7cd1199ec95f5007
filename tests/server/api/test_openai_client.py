"""/v1 through the real `openai` package: shapes, streams, usage, log-probabilities, errors, and what is not served."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import openai
import pytest

from server.api.openai_shapes import CompletionShape
from server.engine.request import Delivery, Request, Sampling, TokenLogprob
from server.model.tokenizer import ModelTokenizer
from server.tasks.inference import Generation, Reply


@pytest.fixture
def client(live: Any) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as made:
        yield made


HELLO: Any = [{"role": "user", "content": "hello"}]


def test_models_lists_each_id_once(live: Any, client: openai.OpenAI) -> None:
    found = {m.id: m for m in client.models.list()}
    assert set(found) == {"tiny", "a", "b", "mood", "adapter:mood"}
    kinds = {id: (m.model_extra or {})["kind"] for id, m in found.items()}
    assert kinds == {"tiny": "base", "a": "adapter", "b": "adapter", "mood": "task", "adapter:mood": "adapter"}
    parents = {id: (m.model_extra or {})["parent"] for id, m in found.items()}
    assert parents.pop("tiny") is None and set(parents.values()) == {"tiny"}
    context = live.http.get("/stats").json()["base"]["context"]
    assert all(m.model_extra and (m.model_extra["root"], m.model_extra["max_model_len"]) == (id, context)
               for id, m in found.items())  # fmt: skip
    assert client.models.retrieve("adapter:mood").id == "adapter:mood"
    version = live.http.get("/adapters/a").json()["version"]
    for exact in (version, "adapter:a", f"adapter:{version}"):
        told = client.models.retrieve(exact)
        assert told.id == exact and told.model_extra and told.model_extra["kind"] == "adapter"
    assert "/" not in json.dumps([m.model_dump() for m in found.values()]), "no path of the server"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_chat_whole_and_streamed_agree(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="a", messages=HELLO, max_tokens=12, temperature=0, logprobs=True,
                                           top_logprobs=2, extra_body={"ignore_eos": True})  # fmt: skip
    assert whole.object == "chat.completion" and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].finish_reason == "length" and whole.usage is not None
    assert whole.usage.completion_tokens == 12 and whole.usage.prompt_tokens_details is not None
    told = whole.choices[0].logprobs
    assert told is not None and told.content is not None and len(told.content) == 12
    assert all(len(t.top_logprobs) == 2 and t.bytes is not None for t in told.content)
    stream = client.chat.completions.create(model="a", messages=HELLO, max_tokens=12, temperature=0, stream=True,
                                            stream_options={"include_usage": True},
                                            extra_body={"ignore_eos": True})  # fmt: skip
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


@pytest.mark.parametrize("n", [1, 2])
def test_each_token_has_its_event_though_it_shows_no_text(client: openai.OpenAI, n: int) -> None:
    """Load generators take the time between events for the time between tokens."""
    asked: Any = {"model": "a", "max_tokens": 60, "n": n, "temperature": 1.5, "seed": 3, "stream": True}
    asked |= {"stream_options": {"include_usage": True}, "extra_body": {"ignore_eos": True}}
    texts = [c.choices[0].text for c in client.completions.create(prompt="x", **asked) if c.choices]
    assert len(texts) == 60 * n and "" in texts
    chunks = [c.choices[0] for c in client.chat.completions.create(messages=HELLO, **asked) if c.choices]
    assert len(chunks) == 61 * n and sum(c.delta.role == "assistant" for c in chunks) == n


def test_completions_of_texts_ids_and_n(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt=["one", "two"], n=2, max_tokens=3, temperature=0)
    assert [c.index for c in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text == made.choices[1].text, "greedy answers to one prompt are equal"
    assert made.usage is not None and made.usage.prompt_tokens == 5
    ids = client.completions.create(model="tiny", prompt=[40, 41, 42], max_tokens=2, logprobs=1, temperature=0)
    told = ids.choices[0].logprobs
    assert told is not None and told.tokens is not None and told.text_offset is not None and told.top_logprobs
    assert len(told.tokens) == 2 and told.text_offset[0] == 0 and told.text_offset[1] == len(told.tokens[0])
    as_chat: Any = True  # as load tools ask
    again = client.completions.create(model="tiny", prompt=[40, 41, 42], max_tokens=2, logprobs=as_chat, temperature=0)
    assert again.choices[0].logprobs == told
    assert len(client.completions.create(model="tiny", prompt=[[40], [41, 42]], max_tokens=1).choices) == 2
    assert client.completions.create(model="tiny", prompt="x").choices[0].finish_reason in ("stop", "length")


def test_a_prompts_length_is_no_matter_of_the_others(live: Any, client: openai.OpenAI) -> None:
    context = live.services.prompts.limit.context
    long = [40 + i % 8 for i in range(context - 5)]

    def ends(*prompts: list[int], **more: Any) -> list[int]:
        made = client.completions.create(
            model="tiny", prompt=list(prompts), temperature=0, logprobs=0, extra_body={"ignore_eos": True, **more}
        )
        return [len(choice.logprobs.tokens) for choice in made.choices]  # type: ignore[union-attr, arg-type]

    assert ends(long, [40, 41]) == [5, 16] and ends([40, 41]) == [16]
    with pytest.raises(openai.BadRequestError, match="at most 5"):
        ends([40, 41], long, max_tokens=6)


def test_answers_to_one_prompt_differ_by_seed_and_repeat(client: openai.OpenAI) -> None:
    def ask() -> list[str]:
        made = client.completions.create(model="tiny", prompt="so", n=4, seed=3, max_tokens=12, temperature=1.5,
                                         extra_body={"ignore_eos": True})  # fmt: skip
        return [c.text for c in made.choices]

    first = ask()
    assert len(set(first)) > 1 and ask() == first


def test_streamed_completions_carry_logprobs(client: openai.OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="x", n=2, max_tokens=5, logprobs=1, stream=True,
                                       temperature=0, extra_body={"ignore_eos": True})  # fmt: skip
    tokens: dict[int, list[str]] = {0: [], 1: []}
    offsets: dict[int, list[int]] = {0: [], 1: []}
    for chunk in stream:
        for choice in chunk.choices:
            assert choice.logprobs is not None
            tokens[choice.index] += choice.logprobs.tokens or []
            offsets[choice.index] += choice.logprobs.text_offset or []
    assert len(tokens[0]) == 5 and tokens[0] == tokens[1]
    assert offsets[0] == [sum(map(len, tokens[0][:i])) for i in range(5)]


def test_the_token_that_was_drawn_is_among_the_best(client: openai.OpenAI) -> None:
    made = client.completions.create(model="tiny", prompt="one", max_tokens=20, temperature=2, logprobs=2, seed=3,
                                     extra_body={"ignore_eos": True})  # fmt: skip
    told = made.choices[0].logprobs
    assert told is not None and told.tokens and told.top_logprobs and told.token_logprobs
    assert any(len(top) == 3 for top in told.top_logprobs), "one of them was not likely"
    for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
        assert top[token] >= logprob


def test_offsets_of_tokens_are_places_in_the_text(tiny_vocabulary: Any) -> None:
    text = ModelTokenizer(tiny_vocabulary)
    shape = CompletionShape("cmpl-1", 0, "tiny", text, [False])
    offsets = []
    for id in (*text.encode("é日x"), text.eos_id, *text.encode("!")):
        choice = json.loads(shape.choice(0, Delivery(logprobs=(TokenLogprob(id, -1.0, ()),)), True))
        offsets += choice["logprobs"]["text_offset"]
    assert offsets == [0, 0, 1, 1, 1, 2, 3, 3], "two bytes, three, one; the end token is not in the text"


def test_of_tokens_that_read_alike_the_better_one_is_told(tiny_vocabulary: Any) -> None:
    """Each is but a piece of a character."""
    text = ModelTokenizer(tiny_vocabulary)
    first, second, third = text.encode("日")
    told = TokenLogprob(third, -3.0, ((first, -0.5), (second, -1.0)))
    shape = CompletionShape("cmpl-1", 0, "tiny", text, [False])
    choice = json.loads(shape.choice(0, Delivery(logprobs=(told,)), True))
    assert choice["logprobs"]["top_logprobs"] == [{text.token_text(first): -0.5}]


def test_model_means_version_then_task_then_adapter_then_base(live: Any, client: openai.OpenAI) -> None:
    text = live.services.prompts.text

    def prompt_tokens(model: str) -> int:
        made = client.chat.completions.create(model=model, messages=HELLO, max_tokens=1)
        assert made.usage is not None
        return made.usage.prompt_tokens

    plain = len(text.encode_chat(HELLO))
    wrapped = len(text.encode_chat([{"role": "user", "content": "Is it good?\n\nhello"}]))
    version = live.http.get("/adapters/mood").json()["version"]
    assert prompt_tokens("mood") == wrapped
    assert prompt_tokens("adapter:mood") == prompt_tokens(version) == prompt_tokens("tiny") == plain
    for unknown in ("nobody", "adapter:nobody", "mood@000000000000"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.chat.completions.create(model=unknown, messages=HELLO)
        assert caught.value.param == "model"


def test_a_task_in_the_query_is_not_answered_by_the_base(live: Any) -> None:
    for path, body in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        refused = live.http.post(f"/v1/{path}?task=mood", json={"model": "tiny", "max_tokens": 1, **body})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "task"
        known = live.http.post(f"/v1/{path}?api-version=1", json={"model": "tiny", "max_tokens": 1, **body})
        assert known.status_code == 200, "other clients' own words are let by"


def test_a_tasks_defaults_stand_between_the_request_and_openais(client: openai.OpenAI) -> None:
    own = client.chat.completions.create(model="mood", messages=HELLO, extra_body={"ignore_eos": True})
    assert own.usage is not None and own.usage.completion_tokens == 6
    asked = client.chat.completions.create(model="mood", messages=HELLO, max_tokens=3, extra_body={"ignore_eos": True})
    assert asked.usage is not None and asked.usage.completion_tokens == 3


def test_a_tasks_logprobs_are_told_unless_the_request_says_otherwise(live: Any, client: openai.OpenAI) -> None:
    for name, count in (("shown", 2), ("unshown", 0)):
        task = {"prompt": "{input}", "defaults": {"logprobs": count, "max_tokens": 2, "ignore_eos": True}}
        live.http.put(f"/tasks/{name}", json=task).raise_for_status()
    told = client.chat.completions.create(model="shown", messages=HELLO).choices[0].logprobs
    assert told is not None and [len(token.top_logprobs) for token in told.content or ()] == [2, 2]
    assert client.chat.completions.create(model="shown", messages=HELLO, logprobs=False).choices[0].logprobs is None
    assert client.chat.completions.create(model="unshown", messages=HELLO).choices[0].logprobs is None
    plain = client.completions.create(model="shown", prompt="hello").choices[0].logprobs
    assert plain is not None and plain.top_logprobs and len(plain.top_logprobs) == 2
    assert client.completions.create(model="unshown", prompt="hello").choices[0].logprobs is None


def test_a_mix_goes_in_extra_body(client: openai.OpenAI) -> None:
    fields: Any = {"model": "tiny", "prompt": "hello you", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    base = client.completions.create(**fields)
    mixed = client.completions.create(**fields, extra_body={"adapters": [{"name": "a"}, {"name": "b", "weight": -2}]})
    assert base.choices[0].logprobs != mixed.choices[0].logprobs


ASKING_FOR_NOTHING: list[dict[str, Any]] = [
    {"n": 1, "presence_penalty": 0, "frequency_penalty": 0, "tool_choice": "none", "tools": []},
    {"logit_bias": {}, "response_format": {"type": "text"}, "parallel_tool_calls": True, "top_logprobs": None},
    {"user": "u", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "s"},
    {
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "prompt_cache_options": {"mode": "implicit"},
        "stream_options": {"include_obfuscation": False},
        "stop": None,
        "modalities": ["text"],
    },
    {"skip_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False},
    {"add_generation_prompt": True, "continue_final_message": False},
    {"response_format": {}, "stop": "", "top_k": -1, "length_penalty": 1.0, "priority": 0, "return_token_ids": False},
    {"stream_options": {"include_usage": False, "continuous_usage_stats": False}},
]


def test_what_asks_for_nothing_is_accepted(live: Any, subtests: pytest.Subtests) -> None:
    for extra in ASKING_FOR_NOTHING:
        with subtests.test(str(extra)[:80]):
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 1, **extra}
            answer = live.http.post("/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text


def test_a_name_is_for_the_template(live: Any) -> None:
    """Whose has no place for it gives the same prompt."""
    plain = {"model": "tiny", "messages": HELLO, "max_tokens": 4, "temperature": 0}
    named = {**plain, "messages": [{**HELLO[0], "name": "ada"}, *HELLO[1:]]}
    answers = [live.http.post("/v1/chat/completions", json=body).json() for body in (plain, named)]
    assert answers[0]["choices"] == answers[1]["choices"]
    assert answers[0]["usage"]["prompt_tokens"] == answers[1]["usage"]["prompt_tokens"]


def test_what_was_used_so_far_is_in_each_chunk(client: openai.OpenAI) -> None:
    for ask, more in (
        (client.chat.completions.create, {"messages": HELLO}),
        (client.completions.create, {"prompt": "x"}),
    ):
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = list(ask(model="tiny", max_tokens=5, stream=True, stream_options=options, temperature=0,
                          extra_body={"ignore_eos": True}, **more))  # type: ignore[call-overload]  # fmt: skip
        used = [chunk.usage.completion_tokens for chunk in chunks]
        assert used == sorted(used) and used[-1] == 5 and not chunks[-1].choices
        assert len({chunk.usage.prompt_tokens for chunk in chunks if chunk.usage.completion_tokens}) == 1


def test_what_was_used_so_far_is_in_no_chunk_without_usage(live: Any) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "stream": True}
    for options in ({"continuous_usage_stats": True}, {"include_usage": False, "continuous_usage_stats": True}):
        answer = live.http.post("/v1/completions", json={**body, "stream_options": options})
        assert answer.status_code == 200 and '"usage"' not in answer.text and '"choices": []' not in answer.text


def test_a_stream_has_used_what_has_arrived() -> None:
    """Where steps overlap, a request's output has a place for the token that is still computed."""
    asked = Request("x", (1, 2), Sampling(), lambda delivery: None, output=[7, 8, -1])
    generation = Generation.__new__(Generation)
    generation.answers, generation.replies = 1, [Reply(asked, tokens=2)]
    assert generation.usage()["completion_tokens"] == 2
    asked.output[-1], generation.replies[0].finish_reason = 9, "length"
    assert generation.usage() == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "cached_tokens": 0}


def test_completions_take_what_asks_for_nothing(live: Any) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1, "logprobs": False, "echo": False, "best_of": 1}
    answer = live.http.post("/v1/completions", json={**body, "suffix": "", "top_logprobs": 0})
    assert answer.status_code == 200 and answer.json()["choices"][0]["logprobs"] is None, answer.text
    assert live.http.post("/v1/completions", json={**body, "logprobs": 0}).json()["choices"][0]["logprobs"]
    assert live.http.post("/v1/completions", json={**body, "logprobs": "all"}).status_code == 400


CHANGING: list[tuple[dict[str, Any], str]] = [
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"logit_bias": {"5": 1}}, "logit_bias"),
    ({"response_format": {"type": "json_object", "made_up": 1}}, "response_format.made_up"),
    ({"best_of": 3}, "best_of"),
    ({"echo": True}, "echo"),
    ({"suffix": "end"}, "suffix"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"chat_template": "x"}, "chat_template"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"response_format": {"type": "grammar", "value": "x"}}, "response_format.type"),
]
SPEAKING: list[tuple[dict[str, Any], str]] = [
    ({"role": "tool", "content": "4", "tool_call_id": "x"}, "messages.0.role"),
    ({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, "messages.0.tool_calls"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
        "messages.0.content.0.type",
    ),
    ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "messages.0.content.0.type"),
    (
        {"role": "user", "content": [{"type": "text", "text": "b", "detail": "high"}]},
        "messages.0.content.0.detail",
    ),
]


def test_what_would_change_the_answer_is_refused_by_name(live: Any, subtests: pytest.Subtests) -> None:
    for extra, param in CHANGING:
        with subtests.test(str(extra)[:80]):
            answer = live.http.post("/v1/completions", json={"model": "tiny", "prompt": "x", **extra})
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["code"] == "unsupported_parameter" and error["param"] == param and param in error["message"]
    for calling, param in (
        ({"tool_choice": "required", "tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"guided_json": {"type": "object"}}, "guided_json"),
    ):
        answer = live.http.post("/v1/chat/completions", json={"model": "tiny", "messages": HELLO, **calling})
        assert answer.json()["error"]["param"] == param and "response_format" in answer.json()["error"]["message"]
    for message, param in SPEAKING:
        with subtests.test(param):
            answer = live.http.post("/v1/chat/completions", json={"model": "tiny", "messages": [message, *HELLO]})
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            assert error["code"] == "unsupported_parameter" and error["param"] == param and param in error["message"]
    for message, param in (
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages.0.content.0.text"),
    ):
        answer = live.http.post("/v1/chat/completions", json={"model": "tiny", "messages": [message]})
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_request", param), "it asks for nothing else"


def test_malformed_bodies_are_400_on_v1(client: openai.OpenAI, live: Any) -> None:
    for extra in ({"temperature": 9}, {"n": 1_000_000}, {"max_tokens": 0}, {"top_logprobs": 3}):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model="tiny", messages=HELLO, extra_body=extra)
        assert caught.value.param == next(iter(extra)), caught.value
    broken = live.http.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["code"] == "invalid_json"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert client.chat.completions.create(model="tiny", messages=parts, max_tokens=1).choices  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError):
        image: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]
        client.chat.completions.create(model="tiny", messages=image)


async def test_the_async_client_reads_many_streams_at_once(live: Any) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", timeout=30) as client:

        async def one(i: int) -> str:
            stream = await client.completions.create(model="ab"[i % 2], prompt=f"p{i}", max_tokens=10, temperature=0,
                                                     stream=True, extra_body={"ignore_eos": True})  # fmt: skip
            return "".join([c.choices[0].text async for c in stream])

        texts = await asyncio.gather(*map(one, range(12)))
        alone = await client.completions.create(model="b", prompt="p3", max_tokens=10, temperature=0,
                                                extra_body={"ignore_eos": True})  # fmt: skip
    assert alone.choices[0].text == texts[3]


def test_a_failure_after_the_first_byte_is_an_event(live: Any, client: openai.OpenAI) -> None:
    live.slow_down(0.05)
    stream = client.completions.create(model="tiny", prompt="x", max_tokens=100, stream=True,
                                       extra_body={"ignore_eos": True, "deadline_ms": 1500})  # fmt: skip
    with pytest.raises(openai.APIError) as caught:
        for _ in stream:
            pass
    assert "deadline" in str(caught.value.body) and live.idle()


def test_vllms_adapter_routes(live: Any, write_adapter: Any) -> None:
    write_adapter("late", 9)
    loaded = live.http.post("/v1/load_lora_adapter", json={"lora_name": "late", "lora_path": "late"})
    assert loaded.status_code == 200 and "late" in loaded.json()
    write_adapter("late", 10)
    again = {"lora_name": "late", "lora_path": "late"}
    refused = live.http.post("/v1/load_lora_adapter", json=again)
    assert refused.status_code == 409 and refused.headers["x-should-retry"] == "false"
    assert live.http.post("/v1/load_lora_adapter", json={**again, "load_inplace": True}).status_code == 200
    assert live.http.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 200
    assert live.http.post("/v1/unload_lora_adapter", json={"lora_name": "late"}).status_code == 404
    assert live.http.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc"}).status_code == 400
    for route in ("load", "unload"):
        asked = {**again, "is_3d_lora_weight": True}
        refused = live.http.post(f"/v1/{route}_lora_adapter", json=asked).json()["error"]
        wanted = "is_3d_lora_weight" if route == "load" else "lora_path"
        assert refused["code"] == "unsupported_parameter" and refused["param"] == wanted
    nothing = {**again, "is_3d_lora_weight": False, "load_inplace": None}
    for base in ("", "tiny", "elsewhere"):  # as the Kubernetes gateway's sidecar sends it
        assert live.http.post("/v1/load_lora_adapter", json={**nothing, "base_model_name": base}).status_code == 200


async def test_a_failure_in_the_async_clients_stream_is_its_error(live: Any) -> None:
    live.slow_down(0.05)
    async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        stream = await client.chat.completions.create(model="a", messages=HELLO, max_tokens=100, stream=True,
                                                      extra_body={"ignore_eos": True, "deadline_ms": 1500})  # fmt: skip
        with pytest.raises(openai.APIError, match="deadline"):
            async for _ in stream:
                pass
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="nobody", messages=HELLO)
        stream = await client.chat.completions.create(model="a", messages=HELLO, max_tokens=200, stream=True,
                                                      extra_body={"ignore_eos": True})  # fmt: skip
        await anext(aiter(stream))
        await stream.close()
    assert live.idle(2.0), "closing a stream ends the work"


def test_errors_have_the_packages_own_classes(start: Any) -> None:
    live = start(api_keys="me:secret", max_body=1 << 12)
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="wrong", max_retries=0, timeout=30) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="secret", max_retries=0, timeout=30) as client:
        assert client.models.list().data
        with pytest.raises(openai.PermissionDeniedError):
            client.fine_tuning.jobs.list()
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model="tiny", prompt="x" * 5000)
        assert caught.value.status_code == 413
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model="tiny", prompt="x", max_tokens=100_000)
        assert "100000" in refused.value.message and refused.value.param == "max_tokens"


def test_the_package_comes_back_when_there_is_room(start: Any) -> None:
    """Its own retries: 429 and 503 with `Retry-After` are tried again; 409 says that it would be in vain."""
    live = start(max_queue=1, max_batch=1)
    statuses: list[int] = []

    def answered(answer: httpx.Response) -> None:
        """Once the client has been refused, there is room."""
        statuses.append(answer.status_code)
        if answer.status_code == 429:
            live.slow_down(0.0)
        elif answer.status_code == 503:
            live.state.state = "ready"

    options: Any = {"base_url": f"{live.url}/v1", "api_key": "none", "max_retries": 5, "timeout": 60}
    with openai.OpenAI(**options, http_client=httpx.Client(event_hooks={"response": [answered]})) as client:

        def ask(i: int) -> int:
            made = client.completions.create(model="tiny", prompt=f"p{i}", max_tokens=10,
                                             extra_body={"ignore_eos": True})  # fmt: skip
            assert made.usage is not None
            return made.usage.completion_tokens

        live.slow_down(1.0)
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(ask, range(4))) == [10] * 4
        assert 429 in statuses and statuses.count(200) == 4
        live.state.state = "loading"
        statuses.clear()
        assert ask(9) == 10 and statuses == [503, 200]
    assert live.idle()


def test_a_conflict_is_not_tried_again(live: Any, write_adapter: Any) -> None:
    statuses: list[int] = []
    http = httpx.Client(event_hooks={"response": [lambda answer: statuses.append(answer.status_code)]})
    with openai.OpenAI(base_url=live.url, api_key="none", max_retries=3, timeout=30, http_client=http) as client:
        with pytest.raises(openai.ConflictError):
            client.post("/adapters", body={"name": "a", "source": "b"}, cast_to=object)
    assert statuses == [409]


def test_notes_that_nobody_reads_are_few(live: Any) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    for notes in ({"a": {"b": ["c"]}}, {str(i): "x" for i in range(500)}, ["x"] * 999, "x" * 10_000):
        assert live.http.post("/v1/completions", json={**body, "metadata": notes}).status_code == 200
    deep: Any = {}
    for _ in range(500):
        deep = {"a": deep, "b": 0, "c": 0}
    for notes in ([{}] * 1001, {"a": [[{}] * 600, [{}] * 600]}, deep):
        refused = live.http.post("/v1/completions", json={**body, "metadata": notes})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "metadata", refused.text


def test_a_client_that_mixes_anew_each_time_has_one_turn(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, keys = live.services.engine, []
    submit = engine.submit
    monkeypatch.setattr(engine, "submit", lambda *given: (keys.append(given[0].fair_key), submit(*given))[1])
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    for mix in ([{"name": "a"}], [{"name": "a"}, {"name": "b"}], [{"name": "b", "weight": 2}]):
        assert live.http.post("/v1/completions", json={**body, "adapters": mix}).status_code == 200
    assert len(set(keys)) == 1
    for model in ("a", "b", "tiny"):
        assert live.http.post("/v1/completions", json={**body, "model": model}).status_code == 200
    assert len(set(keys)) == 4
    mixed = {**body, "model": "mood", "adapters": [{"name": "b"}]}
    assert live.http.post("/v1/completions", json=mixed).status_code == 200 and keys[-1] == "mood", "the task's turn"


@pytest.fixture
def started(live: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the engine is asked for, call by call: prompts, samplings, who asks, and the rest."""
    inference, calls = live.services.inference, []
    start = inference.start

    def noted(target: Any, prompts: Any, samplings: Any, caller: Any, **more: Any) -> Any:
        calls.append(([list(prompt) for prompt in prompts], samplings, caller, more))
        return start(target, prompts, samplings, caller, **more)

    monkeypatch.setattr(inference, "start", noted)
    return calls


def test_prompts_of_a_completion_have_their_answers_in_a_row(
    live: Any, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, begins = live.services.prompts.text, []
    is_added_token = text.is_added_token
    monkeypatch.setattr(text, "is_added_token", lambda token: (begins.append(token), is_added_token(token))[1])
    body = {"model": "tiny", "prompt": [[40, 41], [42, 43, 44]], "n": 2, "deadline_ms": 60_000}
    before = int(time.time())
    told = live.http.post("/v1/completions", json={**body, "max_tokens": 1}).json()
    prompts, samplings, caller, more = started.pop()
    assert prompts == [[40, 41], [40, 41], [42, 43, 44], [42, 43, 44]] and begins[:4] == [41, 41, 44, 44]
    assert told["usage"]["prompt_tokens"] == 5 and told["id"] == more["id"] and told["id"].startswith("cmpl-")
    assert before <= told["created"] <= time.time() and 0 < caller.deadline - caller.arrived <= 60.0
    assert {(each.max_tokens, each.temperature) for each in samplings} == {(1, 1.0)}
    monkeypatch.setattr("server.api.openai_schemas.MAX_SEQUENCES", 4)
    assert live.http.post("/v1/completions", json={**body, "max_tokens": 1}).status_code == 200
    refused = live.http.post("/v1/completions", json={**body, "n": 3})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "n"
    refused = live.http.post("/v1/completions", json={**body, "prompt": [[40], [1 << 20]]})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt"


def test_each_text_of_a_completion_goes_through_the_tasks_template(live: Any, started: list[Any]) -> None:
    text = live.services.prompts.text
    wrapped = [text.encode_task("Is it good?\n\n{input}", "chat", None, word) for word in ("x", "yes")]
    for prompt in ("x", ["x", "yes"], [40, 41]):
        body = {"model": "mood", "prompt": prompt, "max_tokens": 1}
        assert live.http.post("/v1/completions", json=body).status_code == 200
    assert [call[0] for call in started] == [wrapped[:1], wrapped, [[40, 41]]]


def test_a_conversation_is_answered_as_it_was_spoken(
    live: Any, started: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, seen = live.services, []
    encode_chat = parts.prompts.encode_chat
    monkeypatch.setattr(parts.prompts, "limit", replace(parts.prompts.limit, context=128))
    monkeypatch.setattr(
        parts.prompts, "encode_chat", lambda task, said: (seen.append(said), encode_chat(task, said))[1]
    )
    said = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "hello", "name": "ada"}]
    body = {"model": "tiny", "messages": said, "logprobs": True, "deadline_ms": 60_000}
    told = live.http.post("/v1/chat/completions", json=body).json()
    assert seen.pop() == [{**said[0], "role": "system"}, said[1]]
    prompts, [sampling], caller, more = started.pop()
    assert sampling.max_tokens == 128 - len(prompts[0]) > 16 and sampling.temperature == 1.0
    assert told["id"] == more["id"] and told["id"].startswith("chatcmpl-") and caller.deadline - caller.arrived <= 60.0
    assert all(token["top_logprobs"] == [] for token in told["choices"][0]["logprobs"]["content"])
    refused = live.http.post("/v1/chat/completions", json={**body, "logprobs": False, "top_logprobs": 2})
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "top_logprobs"
    several = {**body, "n": 2, "max_tokens": 8, "response_format": {"type": "json_object"}}
    assert len(live.http.post("/v1/chat/completions", json=several).json()["choices"]) == 2
    assert len(started.pop()[3]["constraints"]) == 2
