"""Structured output: compiles JSON schemas with `llguidance` and masks the tokens that a schema does not allow."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from server.engine.json_schema import PARAM, prepare_schema
from server.errors import EngineFailed, InvalidRequest, QueueFull, ServerError, UnsupportedParameter
from server.model.tokenizer import ModelTokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_SCHEMA = 1 << 16
"""Most characters of a schema as compact JSON."""

MAX_WAITING = 256
"""Most requests of a tenant that wait for a compilation. They are not in the engine's queue yet."""

MAX_WAITING_IN_ALL = 4 * MAX_WAITING

STACK_BYTES = 256 << 20
"""Stack of the compiler's thread. The compiler is recursive and needs up to 64 MiB. Unused stack takes no memory."""

ANY_OBJECT: Mapping[str, Any] = {"type": "object"}

_WHITESPACE = r"( |\n {0,16})?"
"""Whitespace between two JSON tokens. Small models may otherwise generate spaces until the answer is cut off."""

_UNSUPPORTED = ("Unimplemented keys", "Unknown format")
"""Error messages of the compiler for valid schemas that it cannot enforce."""

_NO_TOKEN = "NoExtensionBias"
"""Error message of the compiler if no token can come next."""

_OVERLAPPING = "oneOf constraints are not supported"
"""Error message of the compiler if alternatives may overlap."""


class Grammar:
    """The state of one answer in its grammar, a `Constraint`. Not thread-safe."""

    def __init__(self, matcher: LLMatcher, ends: npt.NDArray[np.uint8]) -> None:
        self._matcher = matcher
        self._ends = ends

    def mask(self) -> npt.NDArray[np.uint8]:
        """Return one bit per token id. Raises InvalidRequest if the grammar exceeds the compiler's limits."""
        self._check()
        if self._matcher.is_stopped():
            return self._ends
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return mask

    def accept(self, token: int) -> None:
        """Advance by a sampled token."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequest(f"the schema is too complex: {_reason(self._matcher.get_error())}", PARAM)


class _Job:
    """The grammars of one request, compiled one at a time."""

    def __init__(self, grammars: Iterator[Grammar]) -> None:
        self.future: Future[list[Grammar]] = Future()
        self._remaining = grammars
        self._compiled: list[Grammar] = []

    def advance(self) -> None:
        """Compile one more grammar, or complete the future."""
        try:
            grammar = next(self._remaining, None)
        except ServerError as error:
            # The traceback's frames refer to compiled grammars, and to this job, which keeps the error.
            error.__context__ = None
            self.fail(error.with_traceback(None))
        except BaseException as error:  # a panic of the library is not an Exception
            is_exception = isinstance(error, Exception)
            self.fail(error if is_exception else EngineFailed(f"the schema could not be compiled: {error}"))
        else:
            if grammar is not None:
                self._compiled.append(grammar)
            elif self.future.set_running_or_notify_cancel():
                self.future.set_result(self._compiled)

    def fail(self, error: BaseException) -> None:
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


def check_size(schema: Mapping[str, Any]) -> None:
    """Raise InvalidRequest if a schema is too long or nested too deeply to be processed."""
    try:
        size = len(json.dumps(schema, separators=(",", ":")))
    except RecursionError:
        raise InvalidRequest("the schema is nested too deeply", PARAM) from None
    if size > MAX_SCHEMA:
        raise InvalidRequest(f"the schema has {size} characters; the limit is {MAX_SCHEMA}", PARAM)


class Grammars:
    """Compiles schemas on a thread of its own, which exists while there is work. Thread-safe.

    Creating it takes about a second for the vocabulary, so create it before there is traffic.

    Args:
        text: The tokenizer.
        vocab_size: Number of ids of the model, at least that of the tokenizer.
    """

    def __init__(self, text: ModelTokenizer, vocab_size: int) -> None:
        self._text = text
        self._size = vocab_size
        ends = np.zeros(-(-vocab_size // 32) * 4, np.uint8)
        for token in text.vocabulary.eos_ids:
            ends[token // 8] |= 1 << token % 8
        self._ends = ends
        self._tokenizer = self._build_tokenizer()
        self._lock = threading.Lock()
        self._jobs: dict[str, deque[_Job]] = {}
        """Jobs by tenant. The first tenant is next."""
        self._busy = False

    def ask(self, schema: Mapping[str, Any], count: int, tenant: str = "") -> Future[list[Grammar]]:
        """Start to compile `count` grammars for answers that follow `schema`.

        Each may take a second. Tenants take turns after each grammar. Cancelling the future drops the rest.

        Returns:
            A future of the grammars. Its error is InvalidRequest if the schema is invalid, too large or not supported.

        Raises:
            QueueFull: Too many requests wait.
        """
        job = _Job(self._compile_all(schema, count))
        with self._lock:
            self._drop_cancelled()
            total = sum(map(len, self._jobs.values()))
            if len(self._jobs.get(tenant, ())) >= MAX_WAITING or total >= MAX_WAITING_IN_ALL:
                raise QueueFull(f"{total} schemas wait to be compiled; try again later", retry_after=1.0)
            self._jobs.setdefault(tenant, deque()).append(job)
            start, self._busy = not self._busy, True
        if start:
            try:
                start_compiler_thread(self._work)
            except RuntimeError:  # the system has no thread to spare
                while (waiting := self._next()) is not None:
                    waiting.fail(QueueFull("no schema can be compiled now; try again later", retry_after=1.0))
        return job.future

    def close(self) -> None:
        """Cancel all jobs. A compilation that has started continues, but does not delay the end of the process."""
        with self._lock:
            jobs = [job for queue in self._jobs.values() for job in queue]
        for job in jobs:
            job.future.cancel()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.advance()

    def _next(self) -> _Job | None:
        """Return the first job of the next tenant, and move the tenant to the end. None ends the thread."""
        with self._lock:
            self._drop_cancelled()
            tenant = next(iter(self._jobs), None)
            if tenant is None:
                self._busy = False
                return None
            queue = self._jobs[tenant] = self._jobs.pop(tenant)
            return queue[0]

    def _drop_cancelled(self) -> None:
        """Remove jobs that are cancelled or complete."""
        for tenant, queue in list(self._jobs.items()):
            if any(job.future.done() for job in queue):
                queue = self._jobs[tenant] = deque(job for job in queue if not job.future.done())
            if not queue:
                del self._jobs[tenant]

    def _compile_all(self, schema: Mapping[str, Any], count: int) -> Iterator[Grammar]:
        check_size(schema)
        prepared = json.dumps(prepare_schema(schema), separators=(",", ":"))
        for _ in range(count):
            # Copies would share a limit on lexer states, so that one answer could exhaust another's.
            yield Grammar(self._compile(prepared), self._ends)

    def _compile(self, schema: str) -> LLMatcher:
        if self._tokenizer is None:
            raise InvalidRequest("answers by a schema need the package llguidance, which is not installed", PARAM)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            max_items_in_row=1000,
            initial_lexer_fuel=2_000_000,  # about 40 ms
            step_lexer_fuel=100_000,  # about 7 ms, the longest delay of a step by one mask
            step_max_items=20_000,
            max_lexer_states=100_000,  # a string needs about eight per character
            max_grammar_size=100_000,
        )
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITESPACE})
        except ValueError as error:
            raise InvalidRequest(f"the schema cannot be used: {_reason(str(error))}", PARAM) from None
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            reason = _reason(matcher.get_error())
            kind = UnsupportedParameter if reason.startswith(_UNSUPPORTED) else InvalidRequest
            raise kind(f"the schema cannot be used: {reason}", PARAM)
        return matcher

    def _build_tokenizer(self) -> LLTokenizer | None:
        """Return the vocabulary as `llguidance` needs it, or None if that is not installed."""
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ImportError:
            return None
        return LLTokenizer(
            TokenizerWrapper(_Vocabulary(self._text, self._size)),
            n_vocab=self._size,
            eos_token=sorted(self._text.vocabulary.eos_ids),
            slices=LLTokenizer.json_slices(),
        )


_stack_size_lock = threading.Lock()


def start_compiler_thread(work: Callable[[], None]) -> None:
    """Run `work` on a daemon thread with a large stack. Raises RuntimeError if the system has no thread to spare."""
    with _stack_size_lock:
        default = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=work, name="loramux-grammar", daemon=True).start()
        finally:
            threading.stack_size(default)


class _Vocabulary:
    """The tokenizer interface that `TokenizerWrapper` expects."""

    def __init__(self, text: ModelTokenizer, size: int) -> None:
        self._text = text
        self.eos_token_id = text.eos_id
        self.bos_token_id = text.vocabulary.bos_id
        self.tokens = [text.token_bytes(token) for token in range(size)]
        self.special_token_ids = sorted({*text.vocabulary.special.values(), *text.vocabulary.eos_ids})

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._text.encode(text, add_bos=False, prefix_space=False)


def _reason(message: str) -> str:
    """Return the first line of the compiler's message, and the last if the first announces it."""
    lines = [line.strip() for line in message.strip().splitlines()] or [""]
    if lines[0] == _NO_TOKEN:
        return "no text can satisfy it; does it refer to itself without an end?"
    if lines[0].startswith(_OVERLAPPING):
        return (
            "several alternatives of a oneOf may match at once (numbers are not compared); use anyOf, or make the "
            "alternatives exclude each other"
        )
    return (f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0])[:200]
