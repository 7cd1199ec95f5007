"""OpenAI's response shapes from known replies."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from adapters.strict_json import unique_keys
from server.api.openai_shapes import ChatShape, CompletionShape, V1Events
from server.engine.request import Delivery, Request, Sampling, TokenLogprob
from server.errors import ServerError
from server.model.gguf_vocabulary import from_gguf
from server.model.tokenizer import ModelTokenizer
from server.tasks.generation import Generation, Reply


@pytest.fixture
def text(tiny_vocabulary: Any) -> ModelTokenizer:
    return ModelTokenizer(tiny_vocabulary)


def answered(text: ModelTokenizer, *answers: str, logprobs: int | None = None) -> Generation:
    """A generation with these answers. Each prompt has two tokens, one of them cached."""
    generation = Generation.__new__(Generation)
    generation.answers, generation.replies = 1, []
    for answer in answers:
        ids = text.encode(answer)
        request = Request("x", (1, 2), Sampling(logprobs=logprobs), lambda delivery: None, output=ids, cached=1)
        told = [TokenLogprob(id, -0.5, ((id, -0.5), (ids[0], -2.0))) for id in ids] if logprobs is not None else []
        generation.replies.append(Reply(request, [answer[:1], answer[1:]], len(ids), told, "length"))
    return generation


def parsed(data: bytes) -> list[Any]:
    events = data.decode().split("\n\n")
    assert events.pop() == "" and all(event.startswith("data: ") for event in events)
    return [json.loads(event.removeprefix("data: "), object_pairs_hook=unique_keys) for event in events]


USAGE = {
    "prompt_tokens": 4,
    "completion_tokens": 5,
    "total_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 2},
}


def test_completion_choices(text: ModelTokenizer) -> None:
    shape = CompletionShape("cmpl-1", 77, "tiny", text, [False, False])
    told = shape.whole(answered(text, "日", "xy", logprobs=1))
    own = {key: told[key] for key in ("id", "object", "created", "model", "usage")}
    assert own == {"id": "cmpl-1", "object": "text_completion", "created": 77, "model": "tiny", "usage": USAGE}
    first, second = told["choices"]
    assert [(c["index"], c["text"], c["finish_reason"]) for c in (first, second)] == [
        (0, "日", "length"),
        (1, "xy", "length"),
    ]
    assert first["logprobs"]["text_offset"] == [0, 0, 0] and second["logprobs"]["text_offset"] == [0, 1]
    assert second["logprobs"]["tokens"] == ["x", "y"] and second["logprobs"]["token_logprobs"] == [-0.5, -0.5]
    assert second["logprobs"]["top_logprobs"] == [{"x": -0.5}, {"y": -0.5, "x": -2.0}]
    plain = CompletionShape("cmpl-1", 77, "tiny", text, [False, False]).whole(answered(text, "日", "xy"))
    assert [choice["logprobs"] for choice in plain["choices"]] == [None, None]


def test_leading_space_of_a_new_segment_is_not_in_the_text(spm_metadata: dict[str, Any]) -> None:
    text = ModelTokenizer(from_gguf(spm_metadata))
    other = text.encode("other", add_bos=False)
    generation = answered(text, "", "", logprobs=1)
    for reply in generation.replies:
        reply.logprobs = [TokenLogprob(id, -1.0) for id in other * 2]
    told = CompletionShape("c", 0, "tiny", text, [True, False]).whole(generation)["choices"]
    assert [choice["logprobs"]["text_offset"] for choice in told] == [[0, 5], [0, 6]]
    assert told[0]["logprobs"]["top_logprobs"] is None


def test_chat_choices(text: ModelTokenizer) -> None:
    told = ChatShape("chatcmpl-1", 77, "tiny", text).whole(answered(text, "日", "xy", logprobs=1))
    own = {key: told[key] for key in ("id", "object", "created", "model", "usage")}
    assert own == {"id": "chatcmpl-1", "object": "chat.completion", "created": 77, "model": "tiny", "usage": USAGE}
    first, second = told["choices"]
    assert (first["message"]["content"], second["message"]["content"], second["index"]) == ("日", "xy", 1)
    assert bytes(b for token in first["logprobs"]["content"] for b in token["bytes"]) == "日".encode()
    last = second["logprobs"]["content"][1]
    assert (last["token"], last["bytes"], last["logprob"]) == ("y", [121], -0.5)
    assert [(t["token"], t["bytes"], t["logprob"]) for t in last["top_logprobs"]] == [
        ("y", [121], -0.5),
        ("x", [120], -2.0),
    ]


def test_infinite_logprobs_are_json_numbers(text: ModelTokenizer) -> None:
    [id] = text.encode("x")
    told = (TokenLogprob(id, -math.inf, ((id, -math.inf),)),)
    for shape in (CompletionShape("c", 0, "tiny", text, [False]), ChatShape("c", 0, "tiny", text)):
        choice = shape.choice(0, Delivery(text="x", logprobs=told), True)
        assert "Infinity" not in choice and choice.count("-9999.0") == 2


@pytest.mark.parametrize(("usage", "each"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize("chat", [False, True])
def test_usage_in_chunks(text: ModelTokenizer, chat: bool, usage: bool, each: bool) -> None:
    generation = answered(text, "日", "xy")
    shape: Any = (
        ChatShape("c-1", 77, "tiny", text) if chat else CompletionShape("c-1", 77, "tiny", text, [False, False])
    )
    events = V1Events(generation, shape, usage, each)
    first, step = parsed(events.first()), parsed(events.step(1, Delivery(text="x", tokens=(5,))))
    kind = {
        "id": "c-1",
        "object": "chat.completion.chunk" if chat else "text_completion",
        "created": 77,
        "model": "tiny",
    }
    so_far = {} if not usage else {"usage": USAGE if each else None}
    assert all({k: v for k, v in chunk.items() if k != "choices"} == kind | so_far for chunk in (*first, *step))
    assert parsed(events.last()) == ([{**kind, "choices": [], "usage": USAGE}] if usage else [])
    opened = {"role": "assistant", "content": "", "refusal": None}
    assert [(c["choices"][0]["index"], c["choices"][0]["delta"]) for c in first] == (
        [(0, opened), (1, opened)] if chat else []
    )
    shown = {"delta": {"content": "x"}} if chat else {"text": "x"}
    assert step[0]["choices"] == [{"index": 1, **shown, "logprobs": None, "finish_reason": None}]


def test_chat_chunk_without_text(text: ModelTokenizer) -> None:
    shape = ChatShape("c", 0, "tiny", text)
    assert json.loads(shape.choice(0, Delivery(finish_reason="stop"), True)) == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop",
    }  # fmt: skip
    [id] = text.encode("x")
    told = json.loads(shape.choice(0, Delivery(logprobs=(TokenLogprob(id, -1.0, ()),)), True))
    assert told["delta"] == {} and [token["token"] for token in told["logprobs"]["content"]] == ["x"]


def test_text_offsets_and_equal_token_texts(text: ModelTokenizer) -> None:
    """Bytes of one character share its offset; of tokens with the same text the better logprob is shown."""
    shape = CompletionShape("c", 0, "tiny", text, [False])
    offsets = []
    for id in (*text.encode("é日x"), text.eos_id, *text.encode("!")):
        choice = json.loads(shape.choice(0, Delivery(logprobs=(TokenLogprob(id, -1.0, ()),)), True))
        offsets += choice["logprobs"]["text_offset"]
    assert offsets == [0, 0, 1, 1, 1, 2, 3, 3]
    first, second, third = text.encode("日")
    piece = TokenLogprob(third, -3.0, ((first, -0.5), (second, -1.0)))
    shape = CompletionShape("c", 0, "tiny", text, [False])
    choice = json.loads(shape.choice(0, Delivery(logprobs=(piece,)), True))
    assert choice["logprobs"]["top_logprobs"] == [{text.token_text(first): -0.5}]


def test_usage_counts_delivered_tokens_until_the_end() -> None:
    """While steps overlap, the output of a request has a placeholder for the token of the running step."""
    request = Request("x", (1, 2), Sampling(), lambda delivery: None, output=[7, 8, -1])
    generation = Generation.__new__(Generation)
    generation.answers, generation.replies = 1, [Reply(request, tokens=2)]
    assert generation.usage()["completion_tokens"] == 2
    request.output[-1], generation.replies[0].finish_reason = 9, "length"
    assert generation.usage() == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, "cached_tokens": 0}


def test_cancelled_stream_raises(text: ModelTokenizer) -> None:
    events = V1Events(answered(text, "x"), ChatShape("c", 0, "tiny", text), False)
    with pytest.raises(ServerError):
        events.step(0, Delivery(finish_reason="cancelled"))
