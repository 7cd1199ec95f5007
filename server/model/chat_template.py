"""A model's chat template, rendered by Jinja in a sandbox with bounds on size and time.

Owns how a template is run. Knows nothing of tokens: what it gives back is a string.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import BadModel, InvalidRequest

MAX_SECONDS = 2.0
MAX_GROWTH = 1 << 20
"""Characters that a template may add to those of the messages."""


class ChatTemplate:
    """One template; `tokens` are the names that it may use for special tokens, such as `bos_token`.

    Raises BadModel if the template does not parse. What it sees is what Transformers' `apply_chat_template` shows.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        try:
            self._template = _Environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as e:  # what Jinja lets through may be no Python
            raise BadModel(f"the model's chat template does not parse: {e}") from e

    def render(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        """The text of a conversation. Raises InvalidRequest if the template refuses it or runs out of its bounds."""
        room = MAX_GROWTH + 4 * _characters(messages)
        end = time.monotonic() + MAX_SECONDS
        parts: list[str] = []
        outer = _deadline.set(end)
        try:
            stream = self._template.generate(
                messages=messages,
                add_generation_prompt=generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            )
            for part in stream:
                parts.append(part)
                room -= len(part)
                if room < 0 or time.monotonic() > end:
                    raise jinja2.TemplateError("it wrote too much or took too long")
            text = "".join(parts)
            text.encode()  # half a pair is no character, and no tokenizer's
        except (
            jinja2.TemplateError,
            TypeError,
            ValueError,
            ArithmeticError,
            LookupError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as e:
            why = "it wants more memory than there is" if isinstance(e, MemoryError) else e
            raise InvalidRequest(f"the chat template refuses these messages: {why}", "messages") from e
        finally:
            _deadline.reset(outer)
        return text


_deadline: ContextVar[float] = ContextVar("_deadline")
_moment: ContextVar[float | None] = ContextVar("_moment", default=None)


@contextlib.contextmanager
def template_time(moment: float | None) -> Iterator[None]:
    """Within it templates that ask for the time are told `moment`, seconds since the epoch, in UTC; None is the present
    where the server is.

    What training reads must be the same tokens when it is rendered again on another day, or in another time zone.
    """
    outer = _moment.set(moment)
    try:
        yield
    finally:
        _moment.reset(outer)


def _now(form: str) -> str:
    moment = _moment.get()
    return (datetime.now() if moment is None else datetime.fromtimestamp(moment, UTC)).strftime(form)


class _Generator(CodeGenerator):
    """Loops go through `in_time`: one may have nothing in it that is called."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        node.iter = nodes.Call(nodes.EnvironmentAttribute("in_time"), [node.iter], [], None, None)
        super().visit_For(node, frame)


class _Environment(ImmutableSandboxedEnvironment):
    code_generator_class = _Generator

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _now

    def call(self, context: Context, function: Any, /, *args: Any, **options: Any) -> Any:
        """Every call of a template passes here."""
        _check_time()
        if isinstance(function, LoopContext):  # a recursive loop goes over what it is called with
            args = (self.in_time(args[0]), *args[1:])
        return super().call(context, function, *args, **options)

    def in_time(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, as long as there is time."""
        for item in items:
            _check_time()
            yield item


def _check_time() -> None:
    if time.monotonic() > _deadline.get():
        raise jinja2.TemplateError("it took too long")


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}`, by which some templates tell trainers what is an answer."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **more: Any) -> str:
    # Jinja's own filter escapes HTML characters, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **more)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return sum(map(_characters, parts))
