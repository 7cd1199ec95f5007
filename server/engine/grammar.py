"""Answers that follow a JSON schema: compiled off the engine's thread, then a mask for each token of a request.

Owns how a vocabulary is told to `llguidance`, and the limits on a grammar's size and time; what a schema may ask for is
`schema`'s. Knows neither OpenAI's fields nor the sampler, which asks a `Constraint` for its mask.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from server.engine.json_schema import PARAM, prepared
from server.errors import EngineFailed, InvalidRequest, QueueFull, ServerError, UnsupportedParameter
from server.model.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 1 << 16
"""Characters of a schema, as compact JSON."""
MAX_WAITING = 256
"""Schemas of a tenant that wait to be compiled: requests are not in the engine's queue yet, which would bound them."""
MAX_WAITING_IN_ALL = 4 * MAX_WAITING
STACK = 256 << 20
"""Bytes that the compiler's thread may use of a stack. The compiler calls itself for each part of a schema and for each
`$ref`, up to its own limit of 50,000 parts, which takes up to 64 MiB; no more is taken than is used."""
BETWEEN = 60.0
"""Seconds between two lines of the log that say that the system has no such thread."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_WHITESPACE = r"( |\n {0,16})?"
"""Between two tokens of JSON: a space, or a new line and what it is indented by. A small model may otherwise write
spaces and empty lines until it is cut off."""

log = logging.getLogger(__name__)


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


@dataclass(eq=False)
class _Asked:
    """Grammars of one request, those that are made and those that are not."""

    left: Iterator[Grammar]
    made: list[Grammar] = field(default_factory=list)
    whole: Future[list[Grammar]] = field(default_factory=Future)

    def go_on(self) -> None:
        """Make one more, or be done with those that are made."""
        try:
            grammar = next(self.left, None)
        except ServerError as error:
            # Without the frames that raised it: they have what was compiled, and this, which keeps the error.
            error.__context__ = None
            self.fail(error.with_traceback(None))
            return
        except BaseException as error:  # a panic of the library is no Exception
            known = isinstance(error, Exception)
            self.fail(error if known else EngineFailed(f"the schema could not be compiled: {error}"))
            return
        if grammar is not None:
            self.made.append(grammar)
        elif self.whole.set_running_or_notify_cancel():
            self.whole.set_result(self.made)

    def fail(self, error: BaseException) -> None:
        if self.whole.set_running_or_notify_cancel():
            self.whole.set_exception(error)


UNSERVED = ("Unimplemented keys", "Unknown format")
"""How the library says that a schema may be one, but asks for what is not held to."""
NOWHERE = "NoExtensionBias"
"""How the library says that no token can come next."""
ALIKE = "oneOf constraints are not supported"
"""How the library says that alternatives may overlap. It goes on with an option of its own, which is not served."""


def check_size(schema: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a schema that is too long, or nested too deeply, to be looked at."""
    try:
        size = len(json.dumps(schema, separators=(",", ":")))
    except RecursionError:
        raise InvalidRequest("the schema is nested too deeply", PARAM) from None
    if size > MAX_SCHEMA:
        raise InvalidRequest(f"the schema has {size} characters, over the limit of {MAX_SCHEMA}", PARAM)


class Grammars:
    """Compiles schemas for one vocabulary of `vocab_size` ids. Thread-safe.

    Making it takes about a second of a slow processor, most of it with the interpreter's lock held: do it before there
    is traffic.
    """

    def __init__(self, text: ModelTokenizer, vocab_size: int) -> None:
        self._text = text
        self._size = vocab_size
        ends = np.zeros(-(-vocab_size // 32) * 4, np.uint8)
        for token in text.vocabulary.eos_ids:
            ends[token // 8] |= 1 << token % 8
        self._ends = ends
        self._tokenizer = self._told()
        self._lock = threading.Lock()
        self._asked: dict[str, deque[_Asked]] = {}
        """By tenant. The first one's turn is next."""
        self._at_work = False
        self._warned = -math.inf

    def ask(self, schema: Mapping[str, Any], count: int, tenant: str = "") -> Future[list[Grammar]]:
        """`count` grammars for answers that follow `schema`, each of which takes up to a second. They are made on a
        thread of their own, which is there as long as there are any, and on which tenants take turns: each has one made
        at a time, those of its requests in the order in which they came.

        Cancel the future when nobody waits for it any more: what is left is dropped. Raises QueueFull if too many wait;
        the future InvalidRequest for a schema that is none, asks for what cannot be held to, or is too large.
        """
        asked = _Asked(self._grammars(schema, count))
        # Before it can be done. Weak, since a future keeps its callbacks: in a cycle grammars would stay until the
        # collector comes by, which sees nothing of their megabytes.
        still = weakref.ref(asked)
        asked.whole.add_done_callback(lambda _: self._drop(tenant, still()))
        with self._lock:
            own, in_all = len(self._asked.get(tenant, ())), sum(map(len, self._asked.values()))
            if own >= MAX_WAITING or in_all >= MAX_WAITING_IN_ALL:
                raise QueueFull(f"{in_all} schemas wait to be compiled; come back later", retry_after=1.0)
            self._asked.setdefault(tenant, deque()).append(asked)
            begin, self._at_work = not self._at_work, True
        if begin:
            try:
                _begin(self._work)
            except RuntimeError as error:  # the system has no thread to spare
                self._warn(error)
                while (waiting := self._next()) is not None:
                    waiting.fail(QueueFull("no schema can be compiled now; come back later", retry_after=1.0))
        return asked.whole

    def close(self) -> None:
        """Let go of what is not compiled yet. What is being compiled goes on, and holds up no end of the process."""
        with self._lock:
            left = [asked for queue in self._asked.values() for asked in queue]
        for asked in left:
            asked.whole.cancel()

    def _warn(self, error: RuntimeError) -> None:
        """Say, but not for each request, what whoever runs the server can do."""
        now = time.monotonic()
        if now - self._warned >= BETWEEN:
            self._warned = now
            told = "no schema can be compiled: %s; that thread's stack has %d MiB; raise the limits (ulimit -u and -v)"
            log.warning(told, error, STACK >> 20)

    def _work(self) -> None:
        while (asked := self._next()) is not None:
            asked.go_on()

    def _next(self) -> _Asked | None:
        """The first request of the tenant whose turn it is, which has its next one after all others."""
        with self._lock:
            while self._asked:
                tenant = next(iter(self._asked))
                own = self._asked.pop(tenant)
                while own and own[0].whole.cancelled():  # which is so a moment before `_drop` hears of it
                    own.popleft()
                if own:
                    self._asked[tenant] = own
                    return own[0]
            self._at_work = False
            return None

    def _drop(self, tenant: str, asked: _Asked | None) -> None:
        """One that is over, unless `_next` has come across it before."""
        with self._lock:
            own = self._asked.get(tenant)
            if asked is None or own is None or asked not in own:
                return
            own.remove(asked)
            if not own:
                del self._asked[tenant]

    def _grammars(self, schema: Mapping[str, Any], count: int) -> Iterator[Grammar]:
        check_size(schema)
        held = json.dumps(prepared(schema), separators=(",", ":"))
        for _ in range(count):
            # Each from the beginning, though most schemas are asked for again: copies of one share the states of its
            # text, and what one answer uses up of these another one lacks.
            yield Grammar(self._compile(held), self._ends)

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
            reason = _reason(matcher.get_error())
            kind = UnsupportedParameter if reason.startswith(UNSERVED) else InvalidRequest
            raise kind(f"the schema cannot be used: {reason}", PARAM)
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


_beginning = threading.Lock()


def _begin(work: Callable[[], None]) -> None:
    """Have `work` done on a thread of its own, with a stack of `STACK` bytes. Raises RuntimeError."""
    with _beginning:
        usual = threading.stack_size(STACK)
        try:
            # A daemon: what takes long in the library cannot be stopped, and nobody wants to wait for it in the end.
            threading.Thread(target=work, name="loramux-grammar", daemon=True).start()
        finally:
            threading.stack_size(usual)


class _Vocabulary:
    """What `TokenizerWrapper` asks of a tokenizer."""

    def __init__(self, text: ModelTokenizer, size: int) -> None:
        self._text = text
        self.eos_token_id = text.eos_id
        self.bos_token_id = text.vocabulary.bos_id
        self.tokens = [text.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted({*text.vocabulary.special.values(), *text.vocabulary.eos_ids})

    def __call__(self, text: str) -> list[int]:
        return self._text.encode(text, add_bos=False, prefix_space=False)


def _reason(message: str) -> str:
    """The first line of what the library says, and the last where that is what the first one announces."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    if lines[0] == NOWHERE:
        return "no text can go on as it asks; does it refer to itself without an end?"
    if lines[0].startswith(ALIKE):
        return (
            "several alternatives of a oneOf may be right at once, as far as is seen (numbers are not compared); write "
            "anyOf, or make them exclude each other"
        )
    return (f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0])[:200]
