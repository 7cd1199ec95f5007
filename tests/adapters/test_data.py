"""Data files: the three forms, and a bad line is named by its number and what is wrong with it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters import data
from adapters.data import Chat, Completion, Pair
from adapters.errors import InvalidData


def test_the_three_forms(tmp_path):
    lines = [
        {"input": "a", "output": "b", "note": "ignored"},
        {"prompt": "p", "completion": "c"},
        {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "v"}]},
    ]
    path = tmp_path / "x.jsonl"
    path.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    found = data.read(path)
    assert found[:2] == [Pair(1, "a", "b"), Completion(3, "p", "c")]
    assert isinstance(found[2], Chat) and found[2].line == 5 and found[2].messages[1]["content"] == "v"
    (tmp_path / "x.json").write_text(json.dumps(lines))
    assert [r.line for r in data.read(tmp_path / "x.json")] == [1, 2, 3]


GOOD = '{"input": "a", "output": "b"}\n'


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("{", "no valid JSON"),
        ("3", "an example is an object, not int"),
        ("{}", "it has nothing"),
        ('{"text": "x"}', "it has text; an example has"),
        ('{"\\ud800": 1}', r"it has \ud800; an example has"),
        ('{"input": "x"}', "'output' is missing"),
        ('{"output": "x"}', "'input' is missing"),
        ('{"input": "x", "output": 3}', "'output' must be a string, not int; write it as text, in quotes"),
        ('{"input": "x", "output": true}', "'output' must be a string, not bool; write it as text, in quotes"),
        ('{"input": [3], "output": "x"}', "'input' must be a string, not list"),
        ('{"input": "x", "output": " "}', "'output' is empty"),
        ('{"prompt": "x", "completion": null}', "'completion' must be a string"),
        ('{"messages": []}', "must be a list"),
        ('{"messages": [3]}', "message 1 is no object"),
        ('{"messages": [{"role": "bot", "content": "x"}]}', "message 1 has the role 'bot'"),
        ('{"messages": [{"role": "user"}]}', "message 1 has no text"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the assistant"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 2}]}', "weight 2"),
        ("[" * 99_999, "no valid JSON"),
        ('{"input": "x", "output": "ab\\ud800"}', "'output' is no text: character 3"),
        ('{"messages": [{"role": "assistant", "content": "\\udfff"}]}', "message 1 is no text"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "", "tool_calls": [1]}]}',
            "message 2: 'tool_calls' cannot be learned",
        ),
        (
            '{"messages": [{"role": "assistant", "content": null, "function_call": {"name": "f"}}]}',
            "message 1: 'function_call' cannot be learned",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "tools": [{"type": "function"}]}',
            "'tools' cannot be learned",
        ),
        (
            '{"system": "Be brief.", "messages": [{"role": "assistant", "content": "x"}]}',
            "'system' cannot be learned; make it the first of the 'messages'",
        ),
        ('{"input": "x", "output": "y", "tools": [{"type": "function"}]}', "'tools' cannot be learned"),
        ('{"instruction": "Translate.", "input": "x", "output": "y"}', "'instruction' cannot be learned; make it part"),
        ('{"system": "Be brief.", "prompt": "x", "completion": "y"}', "part of 'prompt' or of"),
        ('{"input": "Who?", "context": "A passage.", "output": "y"}', "'context' cannot be learned; make it part of"),
        ('{"input": "x", "output": "y", "completion": "z"}', "'completion' cannot be learned; leave it out beside"),
        (
            '{"messages": [{"role": "assistant", "content": "x"}], "input": "y", "output": "z"}',
            "'input' cannot be learned; leave it out beside 'messages'",
        ),
        ('{"input": "x", "output": "y", "output": "z"}', "'output' is there twice"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}',
            "message 2 is empty",
        ),
    ],
)
def test_a_bad_line_is_named(line, wrong):
    with pytest.raises(InvalidData) as error:
        data.parse((GOOD * 2 + "\n" + line + "\n" + GOOD).encode(), "my.jsonl")
    assert error.value.message.startswith("my.jsonl, line 4: ") and wrong in error.value.message


def test_a_developer_speaks_as_the_system():
    line = b'{"messages": [{"role": "developer", "content": "Be brief."}, {"role": "assistant", "content": "Yes."}]}'
    [chat] = data.parse(line)
    assert [m["role"] for m in chat.messages] == ["system", "assistant"]


def test_what_is_beside_a_conversation_and_none_of_it_is_left_aside():
    line = b'{"context": {"source": "web"}, "prompt": "hi", "messages": [{"role": "assistant", "content": "Yes."}]}'
    [chat] = data.parse(line)
    assert [m["content"] for m in chat.messages] == ["Yes."]


def test_text_may_come_in_parts():
    parts = [{"type": "text", "text": "hi "}, {"type": "text", "text": "you"}]
    example = {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "yo"}]}
    whole = {"messages": [{"role": "user", "content": "hi you"}, {"role": "assistant", "content": "yo"}]}
    assert data.parse(json.dumps(example).encode())[0] == data.parse(json.dumps(whole).encode())[0]
    for odd in ([{"type": "image_url"}], [{"type": "text"}], [{"type": "text", "text": 3}], ["hi"], [3], []):
        example["messages"][1]["content"] = odd
        with pytest.raises(InvalidData, match="message 2"):
            data.parse(json.dumps(example).encode())


def test_tools_that_ask_for_nothing_are_no_fault():
    line = b'{"messages": [{"role": "assistant", "content": "x", "tool_calls": null}], "tools": []}'
    assert len(data.parse(line)) == 1
    assert len(data.parse(b'{"instruction": "", "input": "x", "output": "y", "history": []}')) == 1
    quiet = b'{"messages": [{"role": "assistant", "content": "", "weight": 0}, {"role": "assistant", "content": "x"}]}'
    assert len(data.parse(quiet)) == 1


def test_what_has_no_value_asks_for_nothing():
    """Tools that write rows of several forms give each the columns of all."""
    pair = b'{"input": "a", "output": "b", "messages": null, "prompt": null, "completion": null}'
    completion = b'{"input": null, "output": null, "prompt": "p:", "completion": " c"}'
    chat = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": null}]}'
    found = data.parse(b"\n".join((pair, completion, chat)))
    assert [type(record) for record in found] == [data.Pair, data.Completion, data.Chat]
    assert found[2].messages[1] == {"role": "assistant", "content": "b"}


def test_what_is_said_once_more_and_what_is_told_of_an_example_are_no_fault():
    told = {"id": 7, "label": "x", "category": "y", "text": "z"}
    chat = {"prompt": "x", "prompt_id": "y", "messages": [{"role": "assistant", "content": "x"}]}
    rows = [{"input": "a", "output": "b"} | told, {"prompt": "a", "completion": "b"} | told, chat | told]
    assert len(data.parse(json.dumps(rows).encode())) == 3


def test_an_entry_of_a_list_is_called_one_later_too():
    chat = '{"messages": [{"role": "assistant", "content": "x"}]}'
    listed = data.parse(f'[{GOOD}, {{"prompt": "a", "completion": "b"}}, {chat}]'.encode(), "d.json")
    assert [record.place for record in listed] == ["entry 1", "entry 2", "entry 3"]
    assert [record.place for record in data.parse(GOOD.encode() * 2)] == ["line 1", "line 2"]
    with pytest.raises(InvalidData, match=r"^d\.json, entry 2: no token"):
        data.tokenize(listed[1:], lambda r: ([1, 2], [True, False]), 5, "d.json")


def test_a_bad_file_is_named(tmp_path):
    with pytest.raises(InvalidData, match="no examples"):
        data.parse(b"\n \n")
    with pytest.raises(InvalidData, match="line 2: not UTF-8"):
        data.parse(GOOD.encode() + b"\xff\xfe")
    with pytest.raises(InvalidData, match="no valid JSON"):
        data.parse(b'[{"input": "a"')
    with pytest.raises(InvalidData, match="entry 2"):
        data.parse(b'[{"input": "a", "output": "b"}, 7]')
    nothing = tmp_path / "nothing.jsonl"
    with pytest.raises(InvalidData, match=f"^{nothing} cannot be read: No such file or directory$"):
        data.read(nothing)
    nothing.write_text(GOOD + "{}")
    with pytest.raises(InvalidData, match=f"^{nothing}, line 2: "):
        data.read(nothing)


@pytest.mark.parametrize("name", ["mine/train.csv", "train.TSV"])
def test_what_a_spreadsheet_writes_is_called_by_its_name(name):
    kind = name[-3:].upper()
    for text in ("input,output\na,b\n", "\n1,2\n", "\ufeffinput\toutput\n"):
        with pytest.raises(InvalidData) as error:
            data.parse(text.encode(), name)
        assert error.value.message.startswith(f"{name} is {kind}, and JSON or JSONL is read; docs/training.md")
    assert data.parse(GOOD.encode(), name) == [Pair(1, "a", "b")], "whatever it is called"
    with pytest.raises(InvalidData, match="line 2: no valid JSON"):
        data.parse(GOOD.encode() + b"{", name)


def test_what_is_packed_is_not_called_wide_letters() -> None:
    with pytest.raises(InvalidData, match="line 1: not UTF-8"):
        data.parse(b"\x1f\x8b\x08\x00" + bytes(8), "d.jsonl")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("text", [GOOD, f"[{GOOD}]", "\ufeffinput,output\n"])
def test_an_encoding_of_wide_letters_is_called_by_its_name(encoding, text):
    with pytest.raises(InvalidData, match=rf"^d\.csv looks like {encoding[:6].upper()}, and UTF-8 is read"):
        data.parse(text.encode(encoding), "d.csv")


def test_tokens_are_bounded_and_counted():
    records = [Pair(1, "ab", "c"), Pair(2, "abcdefgh", "i")]

    def encode(r):
        ids = [ord(c) for c in r.input + r.output]
        return ids, [False] * len(r.input) + [True] * len(r.output)

    tokens = data.tokenize(records, encode, 5)
    assert tokens.too_long == 1 and tokens.examples[0].targets == 1
    assert tokens.digest != data.tokenize(records, encode, 50).digest
    with pytest.raises(InvalidData, match="longer than 2 tokens .max_length, or the base.s context"):
        data.tokenize(records, encode, 2)
    with pytest.raises(InvalidData, match="line 1: no token"):
        data.tokenize(records, lambda r: ([1, 2], [True, False]), 5)


@given(st.binary(max_size=60))
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_read_or_refused(noise):
    for content in (noise, GOOD.encode() + noise, b"[" + noise):
        try:
            assert data.parse(content)
        except InvalidData as error:
            assert error.message
