"""Training data: JSON and JSONL files in three forms, validated line by line and tokenized."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import InvalidData, error_text
from adapters.strict_json import unique_keys

MAX_LINE = 4 << 20
INSTRUCTIONS = ("instruction", "instructions", "system", "history")
"""Fields of other formats. Ignoring them would train answers to other questions, so they are refused."""
BESIDE_INPUTS = (*INSTRUCTIONS, "context")
"""Fields that are refused beside an input."""
ROLES = ("system", "developer", "user", "assistant", "tool")
TABLES = (".csv", ".tsv")
_BYTE_ORDER_MARKS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}  # fmt: skip


@dataclass(frozen=True)
class _Located:
    """The position of an example in its file: a line of JSONL, or an entry of a list (`unit`)."""

    line: int
    unit: str = field(default="line", kw_only=True)

    @property
    def place(self) -> str:
        """`line 3` or `entry 3`, for messages."""
        return f"{self.unit} {self.line}"


@dataclass(frozen=True)
class Pair(_Located):
    """`{"input", "output"}`: the input goes into the task's prompt template, the output is the target."""

    input: str
    output: str


@dataclass(frozen=True)
class Completion(_Located):
    """`{"prompt", "completion"}`: raw text; the completion is the target."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat(_Located):
    """`{"messages"}`: a conversation; assistant messages are targets, except those of weight 0."""

    messages: tuple[dict[str, Any], ...]


Record = Pair | Completion | Chat


@dataclass(frozen=True)
class Example:
    """A sequence of tokens. `learned[i]` says whether token i is a target of the loss."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]

    @property
    def targets(self) -> int:
        return sum(self.learned)


Encode = Callable[[Record], tuple[Sequence[int], Sequence[bool]]]
"""Record -> token ids with the end token, and a flag for each that marks targets."""


@dataclass(frozen=True)
class Tokens:
    """Tokenized examples, and the number of records that were skipped because they are too long."""

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
        """How many of these examples are also in `others`."""
        known = {example.ids for example in others.examples}
        return sum(example.ids in known for example in self.examples)


def read(path: Path) -> list[Record]:
    """Read a .json file (a list of objects) or a .jsonl file (one object per line; empty lines are skipped).

    Raises InvalidData with the file, the line or entry, and the reason.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise InvalidData(f"{path} cannot be read: {error_text(error)}") from error


def parse(data: bytes, name: str = "data") -> list[Record]:
    """Parse the bytes of a file; see `read`. The first character tells JSON from JSONL."""
    if encoding := _wide_encoding(data):
        raise InvalidData(f"{name} looks like {encoding}; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise InvalidData(f"{name}, line {line}: not UTF-8 ({error.reason})") from error
    records = list(_from_list(text, name) if text.lstrip()[:1] == "[" else _from_lines(text, name))
    if not records:
        raise InvalidData(f"{name} has no examples")
    return records


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32 if the data look like that, by the byte order mark or zero bytes at the start."""
    if data.startswith(b"\x1f\x8b"):  # gzip
        return None
    marked = next((encoding for mark, encoding in _BYTE_ORDER_MARKS.items() if data.startswith(mark)), None)
    zeros = data[:4].count(0)
    return marked or ("UTF-32" if zeros > 2 else "UTF-16" if zeros else None)


def _from_list(text: str, name: str) -> Iterator[Record]:
    try:
        entries = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise InvalidData(f"{name} is not valid JSON: {error}") from error
    for number, entry in enumerate(entries, 1):
        yield record(entry, number, name, "entry")


def _from_lines(text: str, name: str) -> Iterator[Record]:
    first = True
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            raise InvalidData(f"{where}: {len(line):,} characters are over the limit of {MAX_LINE:,}")
        try:
            entry = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            if first and name.lower().endswith(TABLES):
                raise InvalidData(
                    f"{name} is {name[-3:].upper()}; convert it to JSON or JSONL (docs/training.md has a command)"
                ) from error
            raise InvalidData(f"{where}: not valid JSON ({error})") from error
        first = False
        yield record(entry, number, name)


def record(entry: object, number: int, name: str, unit: str = "line") -> Record:
    """Validate one example. `number` and `unit` are its position in the file `name`. Raises InvalidData."""
    where = f"{name}, {unit} {number}"
    if not isinstance(entry, dict):
        raise InvalidData(f"{where}: an example is an object, not {type(entry).__name__}")
    # Tools write null for the fields of other forms.
    keys = {key for key, value in entry.items() if value is not None}
    if "messages" in keys:
        _refuse(entry, ("tools", "functions"), where)
        _refuse(entry, INSTRUCTIONS, where, "put it into the first of the 'messages'")
        # 'prompt' is allowed: some data sets repeat the first message there.
        _refuse(entry, ("input", "output", "completion"), where, "remove it beside 'messages'")
        return Chat(number, tuple(_messages(entry["messages"], where)), unit=unit)
    for first, second in (("input", "output"), ("prompt", "completion")):
        if first in keys or second in keys:
            _refuse(entry, BESIDE_INPUTS, where, f"put it into {first!r}, the task's template, or 'messages'")
            _refuse(entry, ("tools", "functions"), where)
            if first == "input":
                _refuse(entry, ("prompt", "completion"), where, "remove it beside 'input' and 'output'")
            text, target = _string(entry, first, where), _string(entry, second, where)
            if not target.strip():
                raise InvalidData(f"{where}: {second!r} is empty")
            form = Pair if first == "input" else Completion
            return form(number, text, target, unit=unit)
    shown = ", ".join(sorted(map(str, keys))[:8]) or "nothing"
    raise InvalidData(f"{where}: it has {shown}; use 'input' and 'output', or 'prompt' and 'completion', or 'messages'")


def _string(entry: dict[str, Any], key: str, where: str) -> str:
    if key not in entry:
        raise InvalidData(f"{where}: {key!r} is missing")
    value = entry[key]
    if not isinstance(value, str):
        hint = "; write it as text, in quotes" if isinstance(value, int | float) else ""
        raise InvalidData(f"{where}: {key!r} must be a string, not {type(value).__name__}{hint}")
    return _check_text(value, repr(key), where)


def _check_text(text: str, what: str, where: str) -> str:
    """Refuse lone surrogates, which JSON escapes allow."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidData(f"{where}: {what} has a lone surrogate at character {error.start + 1}") from None
    return text


def _refuse(value: dict[str, Any], keys: Sequence[str], where: str, hint: str = "use text in 'content' only") -> None:
    """Refuse fields that training would ignore silently."""
    for key in keys:
        if value.get(key):
            raise InvalidData(f"{where}: {key!r} is not supported; {hint}, or remove the example")


def _joined(content: object) -> str | None:
    """The text of a content that is a list of text parts; None for anything else."""
    if not isinstance(content, list):
        return None
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in parts if isinstance(text, str)]
    return "".join(texts) if len(texts) == len(content) else None


def _messages(value: object, where: str) -> Iterator[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise InvalidData(f"{where}: 'messages' must be a list of messages")
    targets = 0
    for i, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise InvalidData(f"{where}: message {i} is not an object")
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
        _check_text(content, f"message {i}", where)
        if weight not in (0, 1):
            raise InvalidData(f"{where}: message {i} has the weight {weight!r}; it is 0 or 1")
        if role == "assistant" and weight == 1 and not content.strip():
            raise InvalidData(f"{where}: message {i} is empty; set its weight to 0")
        targets += role == "assistant" and weight == 1
        yield {**message, "role": "system"} if role == "developer" else message
    if not targets:
        raise InvalidData(f"{where}: there is no assistant message with weight 1")


def tokenize(records: Iterable[Record], encode: Encode, max_length: int, name: str = "data") -> Tokens:
    """Tokenize records. Those over `max_length` tokens are skipped and counted.

    Raises InvalidData if no record is left, or for a record without target tokens.
    """
    examples = []
    too_long = 0
    for item in records:
        ids, learned = encode(item)
        if len(ids) != len(learned) or not any(learned[1:]):
            raise InvalidData(f"{name}, {item.place}: it has no target tokens")
        if len(ids) > max_length:
            too_long += 1
            continue
        # The first token has no context to be predicted from.
        examples.append(Example(tuple(ids), (False, *map(bool, learned[1:]))))
    if not examples:
        raise InvalidData(
            f"{name}: all {too_long} examples are longer than {max_length} tokens (max_length, or the base's context)"
        )
    return Tokens(tuple(examples), too_long)
