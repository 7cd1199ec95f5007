"""Answers that follow a JSON schema: compiled off the engine's thread, then a mask for each token of a request.

Owns how a vocabulary is told to `llguidance`, and the limits on a grammar's size and time; what a schema may ask for is
`schema`'s. Knows neither OpenAI's fields nor the sampler, which asks a `Constraint` for its mask.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from server.engine.schema import PARAM, prepared
from server.engine.text import Text
from server.errors import InvalidRequest, QueueFull

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 1 << 16
"""Characters of a schema, as compact JSON."""
MAX_WAITING = 256
"""Schemas that wait to be compiled: requests are not in the engine's queue yet, which would bound them."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_WHITESPACE = r"[ \n]{0,16}"
"""Between two tokens of JSON. Bounded, since a small model may otherwise write spaces until it is cut off."""


class Grammar:
    """One request's place in its grammar: a `Constraint`. Only one thread at a time uses it."""

    def __init__(self, matcher: LLMatcher, ends: npt.NDArray[np.uint8]) -> None:
        self._matcher = matcher
        self._ends = ends

    def mask(self) -> npt.NDArray[np.uint8]:
        """A bit for each id. Raises InvalidRequest if the grammar has become too large to go on with."""
        if self._matcher.is_error():
            raise InvalidRequest(f"the schema is too complex: {_reason(self._matcher.get_error())}", PARAM)
        if self._matcher.is_stopped():
            return self._ends
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise InvalidRequest(f"the schema is too complex: {_reason(self._matcher.get_error())}", PARAM)
        return mask

    def accept(self, token: int) -> None:
        """`token` has been chosen."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


NOWHERE = "NoExtensionBias"
"""How the library says that no token can come next."""


class Grammars:
    """Compiles schemas for one vocabulary of `vocab_size` ids. Thread-safe.

    Making it takes about a second of a slow processor, most of it with the interpreter's lock held: do it before there
    is traffic.
    """

    def __init__(self, text: Text, vocab_size: int) -> None:
        self._text = text
        self._size = vocab_size
        ends = np.zeros(-(-vocab_size // 32) * 4, np.uint8)
        for token in text.vocabulary.eos_ids:
            ends[token // 8] |= 1 << token % 8
        self._ends = ends
        self._lock = threading.Lock()
        self._tokenizer = self._told()
        self._thread = ThreadPoolExecutor(1, "loramux-grammar")
        self._asked: set[Future[list[Grammar]]] = set()

    def ask(self, schema: Mapping[str, Any], count: int) -> Future[list[Grammar]]:
        """`compile` on a thread of its own: schemas wait for each other there, and nothing else waits for them.

        Cancel the future when nobody waits for it any more: what has not begun is dropped. Raises QueueFull if too many
        wait.
        """
        if len(self._asked) >= MAX_WAITING:
            raise QueueFull(f"{len(self._asked)} schemas wait to be compiled; come back later", retry_after=1.0)
        asked = self._thread.submit(self.compile, schema, count)
        self._asked.add(asked)
        asked.add_done_callback(self._asked.discard)
        return asked

    def close(self) -> None:
        """Let go of what has not begun to be compiled."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def compile(self, schema: Mapping[str, Any], count: int) -> list[Grammar]:
        """`count` grammars for answers that follow `schema`. Takes up to a second; call it off the event loop.

        One schema at a time is compiled, within limits on its size and time. Raises InvalidRequest for one that is no
        JSON schema, asks for what cannot be held to, or is too large.
        """
        try:
            asked = json.dumps(schema, separators=(",", ":"))
        except RecursionError:
            raise InvalidRequest("the schema is nested too deeply", PARAM) from None
        if len(asked) > MAX_SCHEMA:
            raise InvalidRequest(f"the schema has {len(asked)} characters, over the limit of {MAX_SCHEMA}", PARAM)
        held = json.dumps(prepared(schema), separators=(",", ":"))
        with self._lock:
            # Each from the beginning, though most schemas are asked for again: copies of one share the states of its
            # text, and what one answer uses up of these another one lacks.
            return [Grammar(self._compile(held), self._ends) for _ in range(count)]

    def _compile(self, schema: str) -> LLMatcher:
        if self._tokenizer is None:
            raise InvalidRequest("the package llguidance is not installed, and answers by a schema need it", PARAM)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_items_in_row=1000,
            initial_lexer_fuel=2_000_000,  # about 40 ms
            step_lexer_fuel=100_000,  # about 7 ms, the longest that one mask may hold up a step
            step_max_items=20_000,
            max_lexer_states=100_000,  # a text takes some eight for each character that it may have
            max_grammar_size=100_000,
        )
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise InvalidRequest(f"the schema cannot be used: {_reason(str(error))}", PARAM) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidRequest(f"the schema cannot be used: {_reason(matcher.get_error())}", PARAM)
        return matcher

    def _told(self) -> LLTokenizer | None:
        """Our vocabulary, as `llguidance` wants it; None if that is not installed."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            return None
        vocabulary = self._text.vocabulary
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._text, self._size)),
            n_vocab=self._size,
            eos_token=sorted(vocabulary.eos_ids),
            slices=LLTokenizer.json_slices(),
        )


class _Vocabulary:
    """What `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, text: Text, size: int) -> None:
        self._text = text
        self.eos_token_id = text.eos_id
        self.bos_token_id = text.vocabulary.bos_id
        self.tokens = [text.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted({*text.vocabulary.special.values(), *text.vocabulary.eos_ids})

    def __call__(self, text: str) -> list[int]:
        return self._text.encode(text, bos=False, begins=False)


def _reason(message: str) -> str:
    """The first line of what the library says, and the last where that is what the first one announces."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    if lines[0] == NOWHERE:
        return "no text can go on as it asks; does it refer to itself without an end?"
    return (f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0])[:200]
