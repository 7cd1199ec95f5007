"""Data files: the three forms of examples, and errors that name the line and the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import data
from adapters.data import Chat, Completion, Pair, Record
from adapters.errors import InvalidData

GOOD = '{"input": "a", "output": "b"}\n'
SAID = {"role": "assistant", "content": "x"}


def chat(*messages: object, **fields: object) -> str:
    return json.dumps({"messages": list(messages), **fields})


def test_three_forms_in_jsonl_and_json(tmp_path: Path) -> None:
    lines = [
        {"input": "a", "output": "b", "note": "ignored"},
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
    ]
    (tmp_path / "x.jsonl").write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    (tmp_path / "x.json").write_text(json.dumps(lines))
    records = data.read(tmp_path / "x.jsonl")
    assert records[:2] == [Pair(1, "a", "b"), Completion(3, "p", "c")]
    assert isinstance(records[2], Chat) and records[2].line == 5 and records[2].messages[1]["content"] == "v"
    listed = data.read(tmp_path / "x.json")
    assert [record.place for record in listed] == ["entry 1", "entry 2", "entry 3"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not valid JSON"),
        ("[" * 99_999, "not valid JSON"),
        ("3", "an example is an object, not int"),
        ("{}", "it has nothing"),
        ('{"text": "x"}', "it has text; use"),
        ('{"\\ud800": 1}', r"it has \ud800; use"),
        ('{"input": "x"}', "'output' is missing"),
        ('{"output": "x"}', "'input' is missing"),
        ('{"input": "x", "output": 3}', "'output' must be a string, not int; write it as text, in quotes"),
        ('{"input": [3], "output": "x"}', "'input' must be a string, not list"),
        ('{"input": "x", "output": " "}', "'output' is empty"),
        ('{"prompt": "x", "completion": null}', "'completion' must be a string"),
        ('{"input": "x", "output": "ab\\ud800"}', "'output' has a lone surrogate at character 3"),
        ('{"input": "x", "output": "y", "output": "z"}', "'output'"),
        ('{"input": "x", "output": "y", "tools": [1]}', "'tools' is not supported"),
        ('{"instruction": "Translate.", "input": "x", "output": "y"}', "'instruction' is not supported; put it into"),
        ('{"system": "Be brief.", "prompt": "x", "completion": "y"}', "put it into 'prompt'"),
        ('{"input": "Who?", "context": "A passage.", "output": "y"}', "'context' is not supported"),
        ('{"input": "x", "output": "y", "completion": "z"}', "'completion' is not supported; remove it beside"),
        (chat(), "must be a list"),
        (chat(3), "message 1 is not an object"),
        (chat({"role": "bot", "content": "x"}), "message 1 has the role 'bot'"),
        (chat({"role": "user"}), "message 1 has no text"),
        (chat({"role": "user", "content": "x"}), "no assistant message"),
        (chat({**SAID, "weight": 2}), "weight 2"),
        (chat({**SAID, "content": " "}), "message 1 is empty"),
        (chat({**SAID, "content": "\udfff"}), "message 1 has a lone surrogate"),
        (chat({**SAID, "tool_calls": [1]}), "message 1: 'tool_calls' is not supported"),
        (chat({**SAID, "content": None, "function_call": {"name": "f"}}), "message 1: 'function_call'"),
        (chat(SAID, tools=[{"type": "function"}]), "'tools' is not supported"),
        (chat(SAID, system="Be brief."), "'system' is not supported; put it into the first"),
        (chat(SAID, input="y", output="z"), "'input' is not supported; remove it beside 'messages'"),
    ],
)
def test_a_bad_line_is_refused_with_its_number(line: str, reason: str) -> None:
    with pytest.raises(InvalidData) as error:
        data.parse((GOOD * 2 + "\n" + line + "\n" + GOOD).encode(), "my.jsonl")
    assert error.value.message.startswith("my.jsonl, line 4: ") and reason in error.value.message


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        (chat({"role": "developer", "content": "Be brief."}, SAID), [("system", "Be brief."), ("assistant", "x")]),
        (chat(SAID, context={"source": "web"}, prompt="hi"), [("assistant", "x")]),
        (chat({**SAID, "tool_calls": None}, tools=[]), [("assistant", "x")]),
        (chat({**SAID, "content": "", "weight": 0}, SAID), [("assistant", ""), ("assistant", "x")]),
        (chat({**SAID, "weight": None}), [("assistant", "x")]),
        (
            chat({"role": "user", "content": [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]}, SAID),
            [("user", "hi you"), ("assistant", "x")],
        ),
    ],
)
def test_accepted_conversations(line: str, messages: list[tuple[str, str]]) -> None:
    [record] = data.parse(line.encode())
    assert isinstance(record, Chat) and [(m["role"], m["content"]) for m in record.messages] == messages


@pytest.mark.parametrize(
    "content", [[{"type": "image_url"}], [{"type": "text"}], [{"type": "text", "text": 3}], ["hi"], []]
)
def test_content_parts_other_than_text_are_refused(content: list[object]) -> None:
    with pytest.raises(InvalidData, match="message 2"):
        data.parse(chat(SAID, {"role": "assistant", "content": content}).encode())


def test_null_and_unknown_fields_are_ignored() -> None:
    rows = [
        {"input": "a", "output": "b", "messages": None, "prompt": None, "completion": None, "id": 7, "label": "x"},
        {"input": None, "output": None, "prompt": "p:", "completion": " c", "text": "z"},
        {"instruction": "", "input": "x", "output": "y", "history": []},
    ]
    assert [type(record) for record in data.parse(json.dumps(rows).encode())] == [Pair, Completion, Pair]


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        (b"\n \n", "d", "d has no examples"),
        (GOOD.encode() + b"\xff\xfe", "d", "line 2: not UTF-8"),
        (b"\x1f\x8b\x08\x00" + bytes(8), "d", "line 1: not UTF-8"),
        (b'[{"input": "a"', "d", "not valid JSON"),
        (b'[{"input": "a", "output": "b"}, 7]', "d", "entry 2: an example is an object"),
        (b"input,output\na,b\n", "mine/train.csv", "mine/train.csv is CSV; convert it to JSON or JSONL"),
        (b"\n1\t2\n", "train.TSV", "train.TSV is TSV; convert it"),
        (GOOD.encode() + b"{", "train.csv", "line 2: not valid JSON"),
    ],
)
def test_a_bad_file_is_refused(content: bytes, name: str, reason: str) -> None:
    with pytest.raises(InvalidData) as error:
        data.parse(content, name)
    assert reason in error.value.message


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [GOOD, f"[{GOOD}]"])
def test_utf16_and_utf32_are_named(encoding: str, text: str) -> None:
    with pytest.raises(InvalidData, match=rf"^d looks like {encoding[:6].upper()}; save it as UTF-8$"):
        data.parse(text.encode(encoding), "d")


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="cannot be read: No such file or directory$"):
        data.read(tmp_path / "missing.jsonl")


def test_tokenize_skips_long_records_and_refuses_records_without_targets() -> None:
    def encode(record: Record) -> tuple[list[int], list[bool]]:
        assert isinstance(record, Pair)
        ids = [ord(c) for c in record.input + record.output]
        return ids, [False] * len(record.input) + [True] * len(record.output)

    records = [Pair(1, "ab", "c"), Pair(2, "abcdefgh", "i")]
    tokens = data.tokenize(records, encode, 5)
    assert tokens.too_long == 1 and tokens.examples[0].targets == 1
    assert tokens.digest != data.tokenize(records, encode, 50).digest
    with pytest.raises(InvalidData, match="longer than 2 tokens .max_length, or the base.s context"):
        data.tokenize(records, encode, 2)
    with pytest.raises(InvalidData, match=r"^d, line 1: it has no target tokens"):
        data.tokenize(records, lambda record: ([1, 2], [True, False]), 5, "d")


@given(st.binary(max_size=60))
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_parsed_or_refused(noise: bytes) -> None:
    for content in (noise, GOOD.encode() + noise, b"[" + noise):
        try:
            assert data.parse(content)
        except InvalidData as error:
            assert error.message
