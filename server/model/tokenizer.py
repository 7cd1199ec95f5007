"""`ModelTokenizer`: text to token ids and back, for serving, training and evaluation.

A rendered prompt is a list of *segments*: strings are plain text, integers are special tokens that the chat template
wrote. Special tokens inside user text stay plain text. Tokenizers split text at added tokens before anything else, so
encoding the segments one by one equals encoding the whole.

SentencePiece tokenizers put a prefix space before each text between added tokens. It is removed again when decoding.
Tokenizers with Metaspace's scheme `first` put it before the first text of a prompt only.
"""

from __future__ import annotations

import functools
import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from server.errors import BadModel, InvalidRequest
from server.model.chat_template import ChatTemplate
from server.model.detokenizer import Detokenizer
from server.model.gguf_vocabulary import SPACE
from server.model.vocabulary import Vocabulary

Message = Mapping[str, Any]
Segment = str | int
Format = Literal["raw", "chat"]

INPUT = "{input}"
FAST_ENCODE_CHARS = 4096
"""Texts up to this length are tokenized in well under a millisecond."""


class _Continued(str):
    """A text segment that gets no prefix space, because it is not the first of its prompt."""

    def __add__(self, more: str) -> _Continued:
        return _Continued(str(self) + more)


class ModelTokenizer:
    """Encodes prompts and decodes tokens of a vocabulary. Thread-safe.

    Sets `encode_special_tokens` of the vocabulary's tokenizer, so that it reads special tokens in text as plain text.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.eos_id = vocabulary.eos_id
        self.size = vocabulary.size
        self._tokenizer: Tokenizer = vocabulary.tokenizer
        self._tokenizer.encode_special_tokens = True
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: t.content for token, t in added.items()}
        self._special = {t.content: (token, t) for token, t in added.items() if t.special and t.content}
        self._special_ids = frozenset(token for token, _ in self._special.values())
        self._special_pattern, self._begin_pattern = _special_patterns(list(self._special))
        self._template = self._chat_template() if vocabulary.chat_template else None
        self._to_bytes = _token_to_bytes(self._tokenizer)
        self.token_bytes = functools.cache(self._token_bytes)
        """Bytes of one token id: leading spaces are kept, a special token is its own name."""
        self.standalone_text = functools.cache(self._standalone_text)
        """Text of one token id within a text; None if it is part of a character or an added token."""
        self._has_prefix = b"".join(map(self.token_bytes, self.encode_segments(["a"]))) == b" a"
        self._prefix_once = self._has_prefix and _prefix_scheme(self._tokenizer) == "first"

    def _chat_template(self) -> ChatTemplate:
        names = {"bos_token": self.vocabulary.bos_id, "eos_token": self.eos_id}
        tokens = {name: self._added.get(token, "") for name, token in names.items() if token is not None}
        return ChatTemplate(self.vocabulary.chat_template or "", {**self.vocabulary.names, **tokens})

    # -- encoding

    def encode(self, text: str, *, add_bos: bool = True, prefix_space: bool = True) -> list[int]:
        """Ids of plain text.

        Args:
            text: Special tokens in it are plain text.
            add_bos: Begin with the BOS token if the vocabulary asks for one.
            prefix_space: False continues a text, without SentencePiece's prefix space (and without BOS).
        """
        if not (add_bos or prefix_space) and self._has_prefix:
            return self.encode_segments([_Continued(text)])
        return self.encode_segments(self._raw(text) if add_bos else [text])

    def encode_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation. Raises InvalidRequest without a template or if it rejects the messages."""
        return self.encode_segments(self.chat_segments(messages, generation_prompt=generation_prompt))

    def encode_task(self, prompt: str, format: Format, system: str | None, input: str) -> list[int]:
        """Ids of a task's prompt, see `render_task`."""
        return self.encode_segments(self.render_task(prompt, format, system, input))

    def encode_example(
        self, prompt: str, format: Format, system: str | None, input: str, output: str
    ) -> tuple[list[int], int]:
        """A training example: ids of prompt, answer and end token, and the number of trailing ids of the answer.

        The prompt of a chat has the ids that the server sends, even if an answer that begins with spaces would merge
        with the template's last line break.
        """
        segments = self.render_task(prompt, format, system, input)
        prompt_ids = self.encode_segments(segments)
        [(ids, scored)] = self.encode_continuations(segments, prompt_ids, [output], format)
        if format == "chat" and ids[: len(prompt_ids)] != prompt_ids:
            prefix_space = not prompt_ids or self.adds_space_after(prompt_ids[-1])
            answer = self.encode(output, add_bos=False, prefix_space=prefix_space)
            ids = [*prompt_ids, *answer, self.end_of_turn]
            scored = len(ids) - len(prompt_ids)
        return ids, scored

    def encode_continuations(
        self, segments: Sequence[Segment], prompt: Sequence[int], answers: Iterable[str], format: Format = "chat"
    ) -> list[tuple[list[int], int]]:
        """Each answer tokenized together with its prompt, for scoring.

        Args:
            segments: The rendered prompt. `prompt` holds its ids.
            answers: Texts to score.

        Returns:
            For each answer the ids of prompt, answer and end token, and how many trailing ids to score. All answers
            are scored from the first position at which any of them differs from the prompt, so sums compare.
        """
        end = [self.end_of_turn if format == "chat" else self.eos_id]
        if format == "chat" and self._prefix_once:
            answers = map(_Continued, answers)
        encoded = [self.encode_segments(_append_text(segments, answer)) for answer in answers]
        shared = min((_common_prefix(prompt, ids) for ids in encoded), default=0)
        return [(ids + end, len(ids) + 1 - shared) for ids in encoded]

    def encode_segments(self, segments: Iterable[Segment]) -> list[int]:
        """Ids of a rendered prompt."""
        ids: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                ids.append(segment)
            elif segment:
                continued = isinstance(segment, _Continued) and self._has_prefix
                ids.extend(_encode(self._without_prefix if continued else self._tokenizer, segment))
        return ids

    # -- rendering

    def render_task(self, prompt: str, format: Format, system: str | None, input: str) -> list[Segment]:
        """A task's prompt with `input` in place of its first `{input}`, for training, evaluation and serving.

        Args:
            prompt: The task's template.
            format: `raw` is the text itself; `chat` makes it the user message.
            system: System message of a chat; None leaves it to the chat template.

        Raises:
            InvalidRequest: see `chat_segments`.
        """
        text = prompt.replace(INPUT, input, 1)
        if format == "raw":
            return self._raw(text)
        messages = [{"role": "system", "content": system}] if system is not None else []
        return self.chat_segments([*messages, {"role": "user", "content": text}])

    def chat_segments(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[Segment]:
        """Render a conversation. Special tokens within the messages stay plain text.

        A random mark is inserted into every special token in the messages (and into beginnings of one at the end of a
        string) before rendering. The special tokens without a mark are then the template's own.

        Raises:
            InvalidRequest: the model has no chat template, or it rejects the messages.
        """
        if self._template is None:
            raise InvalidRequest("this base has no chat template; send a plain prompt instead", "messages")
        mark = _random_mark()
        rendered = self._template.render([self._marked(message, mark) for message in messages], generation_prompt)
        segments = [s if isinstance(s, int) else s.replace(mark, "") for s in self._split(rendered, mark)]
        if not self._prefix_once:
            return segments
        return [_Continued(s) if isinstance(s, str) and i else s for i, s in enumerate(segments)]

    @functools.cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer in a chat: the end token that the template writes after an answer."""
        turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
        try:
            segments = self.chat_segments(turns, generation_prompt=False)
        except InvalidRequest:
            return self.eos_id
        answers = [i for i, s in enumerate(segments) if isinstance(s, str) and "answer" in s]
        after = next((s for s in segments[answers[-1] :] if isinstance(s, int)), None) if answers else None
        return after if after is not None and after in self.vocabulary.eos_ids else self.eos_id

    def _raw(self, text: str) -> list[Segment]:
        bos = self.vocabulary.bos_id
        return [bos, text] if self.vocabulary.add_bos and bos is not None else [text]

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._begin_pattern.sub(lambda found: found[0] + mark, value) if self._begin_pattern else value
        if isinstance(value, Mapping):
            return {key: self._marked(item, mark) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item, mark) for item in value]
        return value

    def _split(self, text: str, mark: str) -> list[Segment]:
        """Cut at the unmarked special tokens. They strip spaces beside them if the tokenizer says so."""
        segments: list[Segment] = []
        start = 0
        for found in self._special_pattern.finditer(text) if self._special_pattern else ():
            if text.startswith(mark, found.end()) or found.start() < start:
                continue  # a token of one character in a message
            token, added = self._special[found[0]]
            before, start_after = text[start : found.start()], found.end()
            if added.rstrip:
                start_after = len(text) - len(text[start_after:].lstrip())
            segments += [before.rstrip() if added.lstrip else before, token]
            start = start_after
        return [segment for segment in [*segments, text[start:]] if segment != ""]

    def is_added_token(self, token: int) -> bool:
        """Whether `token` is an added token. Text after one is a new segment: its prefix space is not shown."""
        return token in self._added

    def adds_space_after(self, token: int) -> bool:
        """Whether the tokenizer puts a prefix space before text that follows `token`."""
        return token in self._added and not self._prefix_once

    @functools.cached_property
    def _without_prefix(self) -> Tokenizer:
        """The same tokenizer without the prefix space."""
        state = json.loads(self._tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = _without_prefix_steps(state[part])
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.encode_special_tokens = True
        return tokenizer

    # -- decoding

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        name = self._tokenizer.id_to_token(token)
        return b"" if name is None else self._to_bytes(name)

    def _standalone_text(self, token: int) -> str | None:
        try:
            return None if token in self._added else self.token_bytes(token).decode()
        except UnicodeDecodeError:
            return None

    def token_text(self, token: int) -> str:
        """The text of one id. Bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def strip_prefix_space(self, text: bytes) -> bytes:
        """`text` without the prefix space, if this tokenizer adds one."""
        return text.removeprefix(b" ") if self._has_prefix else text

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of an answer: without special tokens and without an incomplete character at the end."""
        detokenizer = Detokenizer(self)
        return "".join([detokenizer.add(token) for token in tokens]) + detokenizer.rest()

    def is_special(self, token: int) -> bool:
        """Whether `token` is special: it is not shown in generated text."""
        return token in self._special_ids


def _special_patterns(contents: list[str]) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """Patterns of a whole special token, and of the first character of one (or of a beginning at the end of a text)."""
    if not contents:
        return None, None
    rests: dict[str, set[str]] = {}
    for text in contents:
        beginnings = {re.escape(text[1:n]) + r"\Z" for n in range(1, len(text))}
        rests.setdefault(text[0], set()).update({re.escape(text[1:])} | beginnings)
    begun = (f"{re.escape(first)}(?={'|'.join(sorted(group))})" for first, group in rests.items())
    longest_first = sorted(contents, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))), re.compile("|".join(begun))


def _random_mark() -> str:
    """Private-use characters that the author of the messages cannot know."""
    return "\ue000" + "".join(chr(0xE001 + byte) for byte in secrets.token_bytes(12)) + "\ue000"


def _append_text(segments: Sequence[Segment], text: str) -> list[Segment]:
    if segments and isinstance(segments[-1], str):
        return [*segments[:-1], segments[-1] + text]
    return [*segments, text]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    if len(text) <= FAST_ENCODE_CHARS:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    # Unlike `encode`, this releases the GIL.
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _token_to_bytes(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """The function from a token's name to its bytes. Raises BadModel for an unsupported kind of decoder."""
    state = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {"decoders": []}
    parts = state.get("decoders", [state])
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda name: b"".join(table[char] if char in table else char.encode() for char in name)
    for part in parts:
        sign = part.get("replacement") or part.get("pattern")
        if sign not in (None, SPACE, {"String": SPACE}) or (part["type"] == "Replace" and part["content"] != " "):
            raise BadModel(f"a tokenizer whose decoder replaces {sign!r} is not supported, only {SPACE!r} by a space")
    if kinds & {"Metaspace", "Replace"}:
        return lambda name: _byte_or_text(name.replace(SPACE, " "))
    if "ByteFallback" in kinds:
        return _byte_or_text
    raise BadModel(f"a tokenizer with the decoder {', '.join(sorted(kinds)) or None} is not supported")


def _byte_or_text(name: str) -> bytes:
    return bytes([int(name[3:5], 16)]) if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name) else name.encode()


@functools.cache
def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's byte alphabet: printable bytes stand for themselves, the others count up from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


def _without_prefix_steps(state: Any) -> Any:
    """The JSON of a normalizer or pre-tokenizer without the steps that add a prefix space."""
    if state is None or state["type"] == "Prepend":
        return None
    for steps in ("normalizers", "pretokenizers"):
        if steps in state:
            kept = [step for step in map(_without_prefix_steps, state[steps]) if step is not None]
            return state | {steps: kept}
    if state["type"] == "Metaspace":
        return state | {"prepend_scheme": "never"}
    return state | {"add_prefix_space": False} if "add_prefix_space" in state else state


def _prefix_scheme(tokenizer: Tokenizer) -> str | None:
    """Metaspace's `prepend_scheme`, if the tokenizer has that pre-tokenizer."""
    if tokenizer.pre_tokenizer is None:
        return None
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    schemes = [part.get("prepend_scheme") for part in state.get("pretokenizers", [state])]
    return "first" if "first" in schemes else None
