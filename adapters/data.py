"""Training data: JSON and JSONL files as people write them, checked line by line, and as tokens.

Owns the three forms of an example and what can be wrong with one. How text becomes tokens is the caller's `encode`;
neither templates nor tokenizers are known here.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import InvalidData, reason
from adapters.strict_json import once

MAX_LINE = 4 << 20
INSTRUCTIONS = ("instruction", "instructions", "system", "history")
"""What others' forms have beside an input, and ours has not: without it the answer would be to another question."""
BESIDE_INPUTS = (*INSTRUCTIONS, "context")
"""The same beside an input alone: a conversation has all that was said in its messages."""
ROLES = ("system", "developer", "user", "assistant", "tool")
TABLES = (".csv", ".tsv")
"""Names of what spreadsheets write, which begins with no JSON."""
_MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


@dataclass(frozen=True)
class _Placed:
    """Where an example stands in its file: in which line, or as which entry of a list; `unit` says which."""

    line: int
    unit: str = field(default="line", kw_only=True)

    @property
    def place(self) -> str:
        """For people: `line 3`, `entry 3`."""
        return f"{self.unit} {self.line}"


@dataclass(frozen=True)
class Pair(_Placed):
    """`{"input", "output"}`: the input goes into the task's prompt template, the output is learned."""

    input: str
    output: str


@dataclass(frozen=True)
class Completion(_Placed):
    """`{"prompt", "completion"}`: the text as it is, the completion is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat(_Placed):
    """`{"messages"}`: a conversation; what the assistant says is learned, but for messages of weight 0."""

    messages: tuple[dict[str, Any], ...]


Record = Pair | Completion | Chat


@dataclass(frozen=True)
class Example:
    """A sequence of tokens. `learned[i]` says whether token i is a target: predicted from those before it."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def targets(self) -> int:
        return sum(self.learned)


Encode = Callable[[Record], tuple[Sequence[int], Sequence[bool]]]
"""A record -> its token ids, and which of them are learned; the end token is among both."""


@dataclass(frozen=True)
class Tokens:
    """Examples, and how many records were left out because they are longer than the limit."""

    examples: tuple[Example, ...]
    too_long: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 over all ids and masks, in order."""
        h = hashlib.sha256()
        for example in self.examples:
            h.update(json.dumps([example.ids, [int(b) for b in example.learned]]).encode())
        return h.hexdigest()

    def among(self, others: Tokens) -> int:
        """How many of these examples are among others, token for token."""
        known = {example.ids for example in others.examples}
        return sum(example.ids in known for example in self.examples)


def read(path: Path) -> list[Record]:
    """The records of a .json file (a list of objects) or a .jsonl file (one object a line; empty lines are skipped).

    Raises InvalidData, which names the file, the line or the entry, and what is wrong with it.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {reason(error)}") from error


def parse(data: bytes, name: str = "data") -> list[Record]:
    """The records in the bytes of a file; see `read`. Whether it is JSON or JSONL is seen from its first character."""
    if wide := _wide(data):
        raise InvalidData(f"{name} looks like {wide}, and UTF-8 is read: save it as that")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidData(f"{name}, line {line}: not UTF-8 ({error.reason})") from error
    records = list(_from_list(text, name) if text.lstrip()[:1] == "[" else _from_lines(text, name))
    if not records:
        raise InvalidData(f"{name} has no examples")
    return records


def _wide(data: bytes) -> str | None:
    """The encoding of more than a byte a letter that this looks like: by its mark, or as none of JSON's first
    characters is a zero."""
    if data.startswith(b"\x1f\x8b"):  # gzip, whose third byte may be followed by zeros
        return None
    marked = next((encoding for mark, encoding in _MARKS.items() if data.startswith(mark)), None)
    zeros = data[:4].count(0)
    return marked or ("UTF-32" if zeros > 2 else "UTF-16" if zeros else None)


def _from_list(text: str, name: str) -> Iterator[Record]:
    try:
        entries = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{name} is no valid JSON: {error}") from error
    for number, entry in enumerate(entries, 1):
        yield record(entry, number, name, "entry")


def _from_lines(text: str, name: str) -> Iterator[Record]:
    begun = False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            raise InvalidData(f"{where}: {len(line):,} characters are over the limit of {MAX_LINE:,}")
        try:
            entry = json.loads(line, object_pairs_hook=once)
        except (ValueError, RecursionError) as error:
            if not begun and name.lower().endswith(TABLES):
                raise InvalidData(
                    f"{name} is {name[-3:].upper()}, and JSON or JSONL is read; docs/training.md has a line that makes "
                    "the one of the other"
                ) from error
            raise InvalidData(f"{where}: no valid JSON ({error})") from error
        begun = True
        yield record(entry, number, name)


def record(entry: object, number: int, name: str, unit: str = "line") -> Record:
    """One example from its JSON value, the `number`th line or other `unit` of the file. Raises InvalidData, which
    begins with the file's name and that place.
    """
    where = f"{name}, {unit} {number}"
    if not isinstance(entry, dict):
        raise InvalidData(f"{where}: an example is an object, not {type(entry).__name__}")
    # What has no value asks for nothing: tools write rows of several forms with the columns of all.
    keys = {key for key, value in entry.items() if value is not None}
    if "messages" in keys:
        _refuse(entry, ("tools", "functions"), where)
        _refuse(entry, INSTRUCTIONS, where, "make it the first of the 'messages'")
        # A 'prompt' alone is no second example: sets of conversations have the first message so once more.
        _refuse(entry, ("input", "output", "completion"), where, "leave it out beside 'messages'")
        return Chat(number, tuple(_messages(entry["messages"], where)), unit=unit)
    for first, second in (("input", "output"), ("prompt", "completion")):
        if first in keys or second in keys:
            _refuse(
                entry, BESIDE_INPUTS, where, f"make it part of {first!r} or of the task's template, or of 'messages'"
            )
            _refuse(entry, ("tools", "functions"), where)
            if first == "input":
                _refuse(entry, ("prompt", "completion"), where, "leave it out beside 'input' and 'output'")
            given, learned = _string(entry, first, where), _string(entry, second, where)
            if not learned.strip():
                raise InvalidData(f"{where}: {second!r} is empty; there is nothing to learn or to compare with")
            form = Pair if first == "input" else Completion
            return form(number, given, learned, unit=unit)
    shown = ", ".join(sorted(map(str, keys))[:8]) or "nothing"
    raise InvalidData(
        f"{where}: it has {shown}; an example has 'input' and 'output', or 'prompt' and 'completion', or 'messages'"
    )


def _string(entry: dict[str, Any], key: str, where: str) -> str:
    if key not in entry:
        raise InvalidData(f"{where}: {key!r} is missing")
    value = entry[key]
    if not isinstance(value, str):
        instead = "; write it as text, in quotes" if isinstance(value, int | float) else ""
        raise InvalidData(f"{where}: {key!r} must be a string, not {type(value).__name__}{instead}")
    return _written(value, repr(key), where)


def _written(text: str, what: str, where: str) -> str:
    """The text, which JSON lets be no text: its escapes can name half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidData(f"{where}: {what} is no text: character {error.start + 1} is half of a pair") from None
    return text


def _refuse(
    value: dict[str, Any], keys: Sequence[str], where: str, instead: str = "give what is said as text in 'content'"
) -> None:
    """What an example has beside its form would be dropped without a word, and an answer learned that nobody gave."""
    for key in keys:
        if value.get(key):
            raise InvalidData(f"{where}: {key!r} cannot be learned; {instead}, or leave the example out")


def _joined(content: object) -> str | None:
    """The text of a content in parts, as a server is given it too; None if it is none, or has parts of another kind."""
    if not isinstance(content, list):
        return None
    given = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in given if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(content) else None


def _messages(value: object, where: str) -> Iterator[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidData(f"{where}: 'messages' must be a list of messages")
    learned = 0
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise InvalidData(f"{where}: message {i} is no object")
        role, content, weight = message.get("role"), message.get("content"), message.get("weight")
        if weight is None:
            weight, message = 1, {key: value for key, value in message.items() if key != "weight"}
        if role not in ROLES:
            raise InvalidData(f"{where}: message {i} has the role {role!r}; roles are {', '.join(ROLES)}")
        _refuse(message, ("tool_calls", "function_call"), f"{where}: message {i}")
        if (text := _joined(content)) is not None:
            content, message = text, {**message, "content": text}
        if not isinstance(content, str):
            raise InvalidData(f"{where}: message {i} has no text in 'content'")
        _written(content, f"message {i}", where)
        if weight not in (0, 1):
            raise InvalidData(f"{where}: message {i} has the weight {weight!r}; it is 0 or 1")
        if role == "assistant" and weight == 1 and not content.strip():
            raise InvalidData(f"{where}: message {i} is empty; there is nothing to learn, so give it the weight 0")
        learned += role == "assistant" and weight == 1
        yield {**message, "role": "system"} if role == "developer" else message
    if not learned:
        raise InvalidData(f"{where}: no message of the assistant is there to learn")


def tokenize(records: Iterable[Record], encode: Encode, max_length: int, name: str = "data") -> Tokens:
    """The records as tokens. Those over `max_length` are left out and counted.

    Raises InvalidData if nothing is left, or for a record without a token to learn, naming its line or entry.
    """
    examples = []
    too_long = 0
    for item in records:
        ids, learned = encode(item)
        if len(ids) != len(learned) or not any(learned[1:]):
            raise InvalidData(f"{name}, {item.place}: no token of it would be learned")
        if len(ids) > max_length:
            too_long += 1
            continue
        # The first token has none before it to be predicted from.
        examples.append(Example(tuple(ids), (False, *map(bool, learned[1:]))))
    if not examples:
        raise InvalidData(
            f"{name}: all {too_long} examples are longer than {max_length} tokens (max_length, or the base's context)"
        )
    return Tokens(tuple(examples), too_long)
