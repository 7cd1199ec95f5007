"""Training records as tokens: which tokens are learned, and that prompts have the tokens that are served."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models

from adapters.data import Chat, Completion, Pair
from adapters.errors import InvalidData
from server.jobs.encoding import Template, encoder
from server.model.gguf_vocabulary import from_gguf
from server.model.tokenizer import ModelTokenizer


def test_the_answer_and_the_end_token_of_a_pair_are_learned(tiny_vocabulary):
    text = ModelTokenizer(tiny_vocabulary)
    ids, learned = encoder(text, Template("Say {input}!"), 100)(Pair(1, "this", "and that"))
    asked = text.encode_task("Say {input}!", "chat", None, "this")
    assert ids[: len(asked)] == asked and ids[-1] == text.end_of_turn
    assert not any(learned[: len(asked)]) and all(learned[len(asked) :])
    assert text.decode(ids[len(asked) : -1]) == "and that"


def test_completions_and_chats_learn_the_answers_of_weight_1(tiny_vocabulary):
    text = ModelTokenizer(tiny_vocabulary)
    encode = encoder(text, Template(), 100)
    ids, learned = encode(Completion(1, "def f():", " pass"))
    assert text.decode([i for i, on in zip(ids, learned, strict=True) if on][:-1]) == " pass"
    turns = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "weight": 0},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    )
    ids, learned = encode(Chat(1, turns))
    assert text.decode([i for i, on in zip(ids, learned, strict=True) if on][:-1]) == "four"
    assert ids[: len(text.encode_chat(turns[:1]))] == text.encode_chat(turns[:1])


def test_a_chat_that_is_too_long_is_rendered_only_in_part(tiny_vocabulary, monkeypatch):
    """Rendering is quadratic in the number of answers."""
    text = ModelTokenizer(tiny_vocabulary)
    turns = tuple({"role": role, "content": "one"} for _ in range(50) for role in ("user", "assistant"))
    whole, learned = encoder(text, Template(), 10_000)(Chat(1, turns))
    rendered: list[int] = []
    encode_chat = text.encode_chat
    monkeypatch.setattr(text, "encode_chat", lambda messages: rendered.append(len(messages)) or encode_chat(messages))
    ids, begun = encoder(text, Template(), len(whole) // 10)(Chat(1, turns))
    assert len(ids) > len(whole) // 10 and (ids, begun) == (whole[: len(ids)], learned[: len(ids)])
    assert any(begun) and max(rendered) < 15
    rendered.clear()
    assert encoder(text, Template(), len(whole))(Chat(1, turns))[0] == whole and len(rendered) == 50


def test_a_chat_has_the_tokens_that_its_template_writes(spm_metadata):
    """A SentencePiece tokenizer puts a space before a text, but not within one."""
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
    )
    text = ModelTokenizer(from_gguf(spm_metadata | {"tokenizer.chat_template": template}))
    turns = tuple(
        {"role": role, "content": content}
        for role, content in [("user", "one"), ("assistant", "the other"), ("user", "this"), ("assistant", "that")]
    )
    ids, learned = encoder(text, Template(), 100)(Chat(1, turns))
    written = text.encode_chat(turns, generation_prompt=False)
    assert ids == written[: len(ids)] and ids[-1] == text.end_of_turn
    assert [text.token_text(i) for i, on in zip(ids, learned, strict=True) if on][:2] == ["the", " other"]


def test_a_template_that_rewrites_earlier_answers_is_refused(tiny_vocabulary):
    odd = "{% for m in messages %}{{ m['role'] + loop.revindex|string + m['content'] }}{% endfor %}"
    text = ModelTokenizer(replace(tiny_vocabulary, chat_template=odd))
    turns = tuple({"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant"))
    with pytest.raises(InvalidData, match="line 7"):
        encoder(text, Template(), 100)(Chat(7, turns))


def test_answers_of_weight_0_are_part_of_the_prompt(tiny_vocabulary):
    odd = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] | trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    text = ModelTokenizer(replace(tiny_vocabulary, chat_template=odd))

    def turns(weight: int) -> tuple[dict[str, Any], ...]:
        return (
            {"role": "assistant", "content": "Hello there.\n", "weight": weight},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "  two\n", "weight": weight},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four"},
        )

    encode = encoder(text, Template(), 100)
    message = "renders message 1 differently before message 3; .* the earlier ones at weight 0"
    with pytest.raises(InvalidData, match=message):
        encode(Chat(7, turns(1)))
    ids, learned = encode(Chat(7, turns(0)))
    asked = text.encode_chat([{k: v for k, v in turn.items() if k != "weight"} for turn in turns(0)[:-1]])
    assert ids[: len(asked)] == asked and learned == [False] * len(asked) + [True] * (len(ids) - len(asked))
    assert text.decode(ids[len(asked) : -1]) == "four" and ids[-1] == text.end_of_turn


def test_an_answer_is_tokenized_apart_from_the_prompt(tiny_vocabulary):
    """Because the server does not tokenize the prompt again with the answer."""
    letters = {"<end>": 0, "a": 1, "b": 2, " ": 3, "\n": 4, "\n ": 5}
    merging = Tokenizer(models.BPE(letters, [("\n", " ")]))
    merging.decoder = decoders.ByteFallback()
    template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    text = ModelTokenizer(
        replace(
            tiny_vocabulary, tokenizer=merging, chat_template=template, eos_ids=frozenset({0}), eos_id=0,
            special={"<end>": 0}, bos_id=None, add_bos=False, names={},
        )
    )  # fmt: skip
    encode = encoder(text, Template(), 100)
    assert encode(Pair(1, "a", " b")) == ([1, 4, 3, 2, 0], [False, False, True, True, True])
    assert encode(Chat(1, ({"role": "user", "content": "a"}, {"role": "assistant", "content": " b"})))[0] == [
        1,
        4,
        3,
        2,
        0,
    ]
    raw = encoder(text, Template(format="raw"), 100)
    assert raw(Pair(1, "a\n", " b"))[0] == [1, 5, 2, 0]
