"""Renders a model's chat template with Jinja in a sandbox.

Transformers' `apply_chat_template` is not used: it cannot fix the date for reproducible training, drops fields that
are None, and its import costs 0.8 s at start-up.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import BadModel, InvalidRequest

MAX_SECONDS = 2.0
MAX_ADDED_CHARS = 1 << 20
"""Characters that a template may add to those of the messages."""

_time: ContextVar[float | None] = ContextVar("_time", default=None)


@contextlib.contextmanager
def template_time(seconds: float | None) -> Iterator[None]:
    """Fix the time that templates see (`strftime_now`), in seconds since the epoch, UTC; None is the present.

    A training job must render the same tokens when it is resumed on another day.
    """
    token = _time.set(seconds)
    try:
        yield
    finally:
        _time.reset(token)


class ChatTemplate:
    """A parsed template, with the variables and functions that Transformers gives it.

    Args:
        source: Jinja source.
        tokens: Special tokens by the name that the template may use, such as `bos_token`.

    Raises:
        BadModel: the source does not parse.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        self._tokens = dict(tokens)
        try:
            self._template = _Environment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError) as error:
            raise BadModel(f"the model's chat template does not parse: {error}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        """The text of a conversation.

        Raises:
            InvalidRequest: the template rejects the messages, fails, or exceeds its limits on size and time.
        """
        room, end = MAX_ADDED_CHARS + 4 * _characters(messages), time.monotonic() + MAX_SECONDS
        parts: list[str] = []
        try:
            for part in self._template.generate(
                messages=messages,
                add_generation_prompt=generation_prompt,
                tools=None,
                documents=None,
                **self._tokens,
            ):
                parts.append(part)
                room -= len(part)
                if room < 0 or time.monotonic() > end:
                    raise jinja2.TemplateError("it wrote too much or took too long")
            text = "".join(parts)
            text.encode()  # refuses lone surrogates
        except (jinja2.TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest(f"the chat template rejects these messages: {error}", "messages") from error
        except (RecursionError, MemoryError) as error:
            raise InvalidRequest("the chat template needs too much memory for these messages", "messages") from error
        return text


class _Environment(ImmutableSandboxedEnvironment):
    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise
        self.globals["strftime_now"] = _strftime_now


class _GenerationBlock(Extension):
    """`{% generation %}...{% endgeneration %}` marks answers for trainers; it renders its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    seconds = _time.get()
    return (datetime.now() if seconds is None else datetime.fromtimestamp(seconds, UTC)).strftime(form)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, Sequence) else ()
    return sum(map(_characters, parts))
