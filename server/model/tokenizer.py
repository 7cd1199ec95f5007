"""ModelTokenizer to token ids and back, for serving, training and evaluation alike.

Owns: plain text (in which special tokens are ordinary characters), the chat template, a task's template, and what is
shown of generated ids. Does not know requests or batches.

A prompt on its way to ids is a list of *pieces*: strings are plain text, integers are special tokens that the
template itself wrote. Added tokens split a text before its tokenizer's merges see it, so that encoding the strings
one by one gives what the tokenizer gives for the whole.

A tokenizer of SentencePiece's kind puts a space before a text. Each text between added tokens is one of its own, so
that this space is there after each of them, and is taken away again there from what was generated. One that puts it
before the whole alone (Metaspace's `first`) puts none amid a conversation.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import itertools
import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from server.errors import BadModel, InvalidRequest
from server.model.chat_template import ChatTemplate
from server.model.sentencepiece import SPACE
from server.model.vocabulary import Vocabulary

Message = Mapping[str, Any]
Piece = str | int
Format = Literal["raw", "chat"]

INPUT = "{input}"
FAST_ENCODE_CHARS = 4096
"""Characters up to which a text takes no time worth speaking of to tokenize."""
PIECE = 1 << 16
"""Characters that are searched at once for special tokens, for up to some tens of milliseconds."""
_SPACES = re.compile(r"\s*")


class _Amid(str):
    """A piece that is not the beginning of what a tokenizer would see at once, for one to which that matters."""

    def __add__(self, more: str) -> _Amid:
        return _Amid(str(self) + more)


class ModelTokenizer:
    """A vocabulary's way from text to ids and back. Thread-safe.

    Sets `encode_special_tokens` of the vocabulary's tokenizer: from here on that tokenizer reads special tokens in a
    text as ordinary characters, for whoever uses it.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.eos_id = vocabulary.eos_id
        self.size = vocabulary.size
        self._tokenizer: Tokenizer = vocabulary.tokenizer
        self._tokenizer.encode_special_tokens = True
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        self._added = {token: t.content for token, t in added.items()}
        self._special = {t.content: (token, t) for token, t in added.items() if t.special}
        self._special_ids = frozenset(token for token, _ in self._special.values())
        contents = sorted(self._special, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, contents))) if contents else None
        self._places = _Places(contents)
        self._template = self._chat_template(vocabulary) if vocabulary.chat_template else None
        self._bytes = _byte_reader(self._tokenizer)
        self._cache: dict[int, bytes] = {}
        self.standalone_text = _Whole(self)
        """What an id shows amid a text, None if that depends on others or if it ends the text that it is in."""
        self._prefixes = b"".join(map(self.token_bytes, self.encode_segments(["a"]))) == b" a"
        self._prefixes_once = self._prefixes and _has_scheme_first(self._tokenizer)

    def _chat_template(self, vocabulary: Vocabulary) -> ChatTemplate:
        names = {"bos_token": vocabulary.bos_id, "eos_token": self.eos_id}
        tokens = {k: self._added.get(v, "") for k, v in names.items() if v is not None}
        return ChatTemplate(vocabulary.chat_template or "", {**vocabulary.names, **tokens})

    # -- to ids

    def encode(self, text: str, *, add_bos: bool = True, prefix_space: bool = True) -> list[int]:
        """Ids of plain text. The beginning-of-text token comes first if the vocabulary asks for one and `add_bos`.

        Without `prefix_space` (and `add_bos`) it goes on amid a text, and the tokenizer puts no space before it.
        """
        if not (add_bos or prefix_space) and self._prefixes:
            return _ids(self._unprefixed, text)
        return self.encode_segments(self._raw(text) if add_bos else [text])

    def encode_chat(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation. Raises InvalidRequest if there is no template or it refuses the messages."""
        return self.encode_segments(self.chat_segments(messages, generation_prompt=generation_prompt))

    def encode_task(self, prompt: str, format: Format, system: str | None, input: str) -> list[int]:
        """Ids of a task's prompt. See `render_task`."""
        return self.encode_segments(self.render_task(prompt, format, system, input))

    def encode_example(
        self, prompt: str, format: Format, system: str | None, input: str, output: str
    ) -> tuple[list[int], int]:
        """Ids of a task's prompt with its answer and the end token, and how many of the last are the answer's.

        Of a chat the prompt's ids are those that a server sends, though an answer that begins with spaces would share a
        token with the line before it: nobody can end a template otherwise, as they can a prompt of their own.
        """
        pieces = self.render_task(prompt, format, system, input)
        asked = self.encode_segments(pieces)
        [(ids, scored)] = self.encode_continuations(pieces, asked, [output], format)
        if format == "chat" and ids[: len(asked)] != asked:
            prefix_space = not asked or self.adds_space_after(asked[-1])
            ids = [*asked, *self.encode(output, add_bos=False, prefix_space=prefix_space), self.end_of_turn]
            scored = len(ids) - len(asked)
        return ids, scored

    def encode_continuations(
        self, pieces: Sequence[Piece], prompt: Sequence[int], answers: Iterable[str], format: Format = "chat"
    ) -> list[tuple[list[int], int]]:
        """For each answer: the ids of prompt, answer and end token, and how many of the last are to be scored. `prompt`
        is the ids of `pieces` alone.

        Prompt and answer are tokenized together. All answers are scored from the same token on, the first at which
        one of them leaves the prompt's own ids, so that their sums of log-probabilities can be compared.
        """
        end = [self.end_of_turn if format == "chat" else self.eos_id]
        if format == "chat" and self._prefixes_once:
            answers = map(_Amid, answers)
        whole = [self.encode_segments(_extended(pieces, answer)) for answer in answers]
        shared = min((_common_prefix(prompt, ids) for ids in whole), default=0)
        return [(ids + end, len(ids) + 1 - shared) for ids in whole]

    def encode_segments(self, pieces: Iterable[Piece]) -> list[int]:
        """Ids of a rendered prompt."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                tokenizer = self._unprefixed if isinstance(piece, _Amid) else self._tokenizer
                ids.extend(_ids(tokenizer, piece))
        return ids

    # -- rendering

    def render_task(self, prompt: str, format: Format, system: str | None, input: str) -> list[Piece]:
        """A task's prompt with `input` in place of its one literal `{input}`: training, evaluation and serving.

        `raw` is that text; `chat` makes it the user's message, after a system message if `system` is not None (None
        keeps what the template says by itself). Raises InvalidRequest.
        """
        text = prompt.replace(INPUT, input, 1)
        if format == "raw":
            return self._raw(text)
        messages = [{"role": "system", "content": system}] if system is not None else []
        return self.chat_segments([*messages, {"role": "user", "content": text}])

    def chat_segments(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[Piece]:
        """A conversation by the template. Special tokens within the messages stay plain text. Raises InvalidRequest.

        Special tokens in a message (and the beginning of one at its end) are broken by a mark before the template
        sees them, and the marks are taken out again once the template's own special tokens have been found.
        """
        if self._template is None:
            raise InvalidRequest("this base has no chat template; send a plain prompt instead", "messages")
        mark = _fresh_mark()
        rendered = self._template.render([_marked(m, self._breaker(mark)) for m in messages], generation_prompt)
        pieces = [p if isinstance(p, int) else p.replace(mark, "") for p in self._split(rendered, mark)]
        if not self._prefixes_once:
            return pieces
        return [_Amid(p) if isinstance(p, str) and place else p for place, p in enumerate(pieces)]

    @functools.cached_property
    def end_of_turn(self) -> int:
        """The token that ends an answer: the one that the template puts after it if generation stops there, too."""
        if self._template is None:
            return self.eos_id
        try:
            pieces = self.chat_segments(
                [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}],
                generation_prompt=False,
            )
        except InvalidRequest:
            return self.eos_id
        after = [i for i, p in enumerate(pieces) if isinstance(p, str) and "answer" in p]
        ends = [p for p in pieces[after[-1] :] if isinstance(p, int)] if after else []
        return ends[0] if ends and ends[0] in self.vocabulary.eos_ids else self.eos_id

    def _raw(self, text: str) -> list[Piece]:
        bos = self.vocabulary.bos_id
        return [bos, text] if self.vocabulary.add_bos and bos is not None else [text]

    def _split(self, text: str, mark: str) -> list[Piece]:
        """`text` cut at its special tokens, which take the spaces beside them where the tokenizer says so. Those of one
        character that `mark` follows are none."""
        if self._pattern is None:
            return [text]
        pieces: list[Piece] = []
        start = 0
        for at in self._places.starts(text):
            found = self._pattern.match(text, at)
            if at < start or found is None or text.startswith(mark, found.end()):
                continue
            token, added = self._special[found[0]]
            before, end = text[start:at], found.end()
            if added.rstrip:
                end = _SPACES.match(text, end).end()  # type: ignore[union-attr]
            pieces += [before.rstrip() if added.lstrip else before, token]
            start = end
        return [p for p in [*pieces, text[start:]] if p != ""]

    def _breaker(self, mark: str) -> _Breaker:
        return _Breaker(self._places, mark)

    def is_added_token(self, token: int) -> bool:
        """Whether what comes after `token` is a text of its own, whose first space is none that anybody sees."""
        return token in self._added

    def adds_space_after(self, token: int) -> bool:
        """Whether the tokenizer puts its space before a text that comes after `token` in one that has begun."""
        return token in self._added and not self._prefixes_once

    @functools.cached_property
    def _unprefixed(self) -> Tokenizer:
        """The same tokenizer, which puts no space before a text. Made when it is first asked for."""
        state = json.loads(self._tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer"):
            state[part] = _without_prefix(state[part])
        tokenizer = Tokenizer.from_str(json.dumps(state))
        tokenizer.encode_special_tokens = True
        return tokenizer

    # -- from ids

    def token_bytes(self, token: int) -> bytes:
        """The bytes that one id stands for: a leading space is kept, a special token is its own name."""
        known = self._cache.get(token)
        if known is None:
            content = self._added.get(token)
            name = self._tokenizer.id_to_token(token)
            known = content.encode() if content is not None else self._bytes(name) if name is not None else b""
            self._cache[token] = known
        return known

    def token_text(self, token: int) -> str:
        """The decode of that one id; bytes that are no whole character are shown as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def strip_prefix_space(self, beginning: bytes) -> bytes:
        """The first bytes of a text without the space that the tokenizer put there, if it is of that kind."""
        return beginning.removeprefix(b" ") if self._prefixes else beginning

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of ids that begin one, as a client sees it: without special tokens and without half a character."""
        reader = Detokenizer(self)
        return "".join([reader.add(token) for token in tokens]) + reader.rest()

    def is_special(self, token: int) -> bool:
        """Whether `token` is a special one, which is not shown in generated text."""
        return token in self._special_ids


class _Whole(dict[int, str | None]):
    """`ModelTokenizer.standalone_text`, computed on first use: nearly every step looks up every token."""

    def __init__(self, text: ModelTokenizer) -> None:
        self._text = text

    def __missing__(self, token: int) -> str | None:
        shown = None
        if not self._text.is_added_token(token):
            with contextlib.suppress(UnicodeDecodeError):
                shown = self._text.token_bytes(token).decode()
        self[token] = shown
        return shown


class Detokenizer:
    """The text of one request, token by token: never half a character, never the start of a stop string.

    `new_segment` is what `ModelTokenizer.is_added_token` says of the token before the first: a text that goes on
    keeps its space.
    """

    def __init__(self, text: ModelTokenizer, stop: tuple[str, ...] = (), *, new_segment: bool = True) -> None:
        self.stopped = False
        """A stop string was found: what it begins with and all after it is hidden."""
        self._text = text
        self._stop = stop
        self._new_segment = new_segment
        self._held = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._amid = not new_segment
        """Whether whole characters came before, and not the beginning of a text."""

    def add(self, token: int, *, search: bool = True) -> str:
        """The text that `token` makes visible. Without `search`, stop strings are not looked for in it."""
        if self.stopped:
            return ""
        new = self._text.standalone_text[token] if self._amid else None
        if new is None:
            new = self._decode(token)
        if not self._stop:
            return new
        if not search:
            new, self._held = self._held + new, ""
            return new
        return self._release(self._held + new)

    def _decode(self, token: int) -> str:
        """What the id shows after those before it, whatever it is."""
        new_segment, self._new_segment = self._new_segment, self._text.adds_space_after(token)
        new = ""
        if not self._text.is_special(token):
            spelled = self._text.token_bytes(token)
            new = self._decoder.decode(
                self._text.strip_prefix_space(spelled) if new_segment and not self._new_segment else spelled
            )
        self._amid = not self._new_segment and not self._decoder.getstate()[0]
        return new

    def rest(self) -> str:
        """What was held back in case that a stop string would follow. Half a character is dropped."""
        held, self._held = self._held, ""
        return held

    def _release(self, text: str) -> str:
        ends = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)]
        hold = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


class _Places:
    """Where special tokens begin in a text, those that overlap among them."""

    def __init__(self, contents: Iterable[str]) -> None:
        given = [content for content in contents if content]
        self._begun = {content[:n] for content in given for n in range(1, len(content))}
        self._longest = max(map(len, self._begun), default=0)
        rests: dict[str, dict[str, list[str]]] = {}
        for content in given:
            rests.setdefault(content[0], {}).setdefault(content[1:2], []).append(content[2:])
        # What is looked for is one character each time, in which case `re` is quick to pass over all others. It sees
        # what all of some texts begin with, but would try a thousand after each `<` that begin in three ways.
        each = (f"{re.escape(first)}(?={'|'.join(_any_of(*s) for s in some.items())})" for first, some in rests.items())
        self._first = re.compile("|".join(each)) if rests else None

    def starts(self, text: str) -> Iterator[int]:
        """In order. Others come to run after each piece, for `re` does not let go of the interpreter by itself."""
        if self._first is None:
            return
        for begin in range(0, len(text), PIECE):
            end = begin + PIECE
            for found in self._first.finditer(text, begin, end + self._longest):
                if found.start() < end:
                    yield found.start()

    def at_end(self, text: str) -> Iterator[int]:
        """Where something begins at the end of a text that what comes behind it may make a special token."""
        for at in range(max(0, len(text) - self._longest), len(text)):
            if text[at:] in self._begun:
                yield at


def _any_of(first: str, rests: Sequence[str]) -> str:
    """A pattern of texts that begin with `first` and go on in one of several ways."""
    return f"{re.escape(first)}(?:{'|'.join(map(re.escape, rests))})"


class _Breaker:
    """Puts a mark into each special token of a text, and into each beginning of one at its end."""

    def __init__(self, places: _Places, mark: str) -> None:
        self._places, self._mark = places, mark

    def __call__(self, text: str) -> str:
        places = {*self._places.starts(text), *self._places.at_end(text)}
        cuts = [0, *sorted(at + 1 for at in places), len(text)]
        return self._mark.join(text[a:b] for a, b in itertools.pairwise(cuts))


def _marked(value: Any, breaker: _Breaker) -> Any:
    if isinstance(value, str):
        return breaker(value)
    if isinstance(value, Mapping):
        return {k: _marked(v, breaker) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_marked(v, breaker) for v in value]
    return value


def _fresh_mark() -> str:
    """A string of private-use characters that nobody who wrote the messages can know."""
    return "\ue000" + "".join(chr(0xE001 + digit) for digit in secrets.token_bytes(12)) + "\ue000"


def _overlap(text: str, other: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `other`."""
    for n in range(min(len(text), len(other) - 1), 0, -1):
        if text.endswith(other[:n]):
            return n
    return 0


def _extended(pieces: Sequence[Piece], answer: str) -> list[Piece]:
    if pieces and isinstance(pieces[-1], str):
        return [*pieces[:-1], pieces[-1] + answer]
    return [*pieces, answer]


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of plain text. `encode` would keep the interpreter to itself, for seconds if there is enough of it."""
    if len(text) <= FAST_ENCODE_CHARS:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _byte_reader(tokenizer: Tokenizer) -> Any:
    """A function from a token's name in the vocabulary to its bytes, by the tokenizer's own decoder.

    Raises BadModel for a decoder that is neither byte-level nor of SentencePiece's kind.
    """
    parts = _decoder_parts(tokenizer)
    kinds = {part["type"] for part in parts}
    if "ByteLevel" in kinds:
        table = _byte_level_table()
        return lambda name: b"".join(table[c] if c in table else c.encode() for c in name)
    for part in parts:
        sign = part.get("replacement") or part.get("pattern")
        if sign not in (None, SPACE, {"String": SPACE}) or (part["type"] == "Replace" and part["content"] != " "):
            raise BadModel(f"a tokenizer whose decoder takes {sign!r} for a space is not served, only {SPACE!r}")
    if kinds & {"Metaspace", "Replace"}:
        return _sentencepiece_bytes
    if "ByteFallback" in kinds:
        return _bytes_or_text
    if not kinds:
        raise BadModel("a tokenizer without a decoder is not served: it does not say what stands between its tokens")
    raise BadModel(f"a tokenizer whose decoder is {', '.join(sorted(kinds))} is not served")


def _decoder_parts(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    parts: list[dict[str, Any]] = state.get("decoders", [state])
    return parts


def _without_prefix(state: Any) -> Any:
    """A normalizer or pre-tokenizer, as JSON has it, that puts no space before a text."""
    if state is None or state["type"] == "Prepend":
        return None
    for steps in ("normalizers", "pretokenizers"):
        if steps in state:
            kept = [step for step in map(_without_prefix, state[steps]) if step is not None]
            return state | {steps: kept}
    if state["type"] == "Metaspace":
        return state | {"prepend_scheme": "never"}
    return state | {"add_prefix_space": False} if "add_prefix_space" in state else state


def _has_scheme_first(tokenizer: Tokenizer) -> bool:
    """Whether the space is put before the whole alone, and not before each text between added tokens."""
    if tokenizer.pre_tokenizer is None:
        return False
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    return any(part.get("prepend_scheme") == "first" for part in state.get("pretokenizers", [state]))


def _sentencepiece_bytes(name: str) -> bytes:
    return _bytes_or_text(name.replace(SPACE, " "))


def _bytes_or_text(name: str) -> bytes:
    if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", name):
        return bytes([int(name[3:5], 16)])
    return name.encode()


@functools.cache
def _byte_level_table() -> dict[str, bytes]:
    """GPT-2's printable stand-ins: the bytes that print stand for themselves, the others count up from U+0100."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): bytes([b]) for b in plain} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
