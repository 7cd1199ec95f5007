"""Generation fields: their bounds and defaults, and how request, task and server combine into `Sampling`.

The HTTP schemas and task files use the same bounds. A field of the request wins over one of the task, and that over the
server's default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.engine.request import Sampling
from server.errors import ContextExceeded, InvalidRequest

MAX_TOKENS = 1_000_000
MAX_STOP = 8
MAX_STOP_LENGTH = 256
MAX_STOP_TOKENS = 64
MAX_LOGPROBS = 20
MAX_N = 16
SEED = (-9223372036854776000, 9223372036854776000)
"""OpenAI's bounds: 64 bits, as a double can represent them. The seed is used modulo 2^63."""


@dataclass(frozen=True)
class Number:
    """Type and bounds of a number. With `above` the lower bound itself is not allowed."""

    kind: type[int] | type[float]
    low: float
    high: float
    above: bool = False
    description: str | None = None

    def check(self, name: str, value: Any) -> Any:
        """`value` as this type. Raises InvalidRequest."""
        valid = isinstance(value, int) and not isinstance(value, bool)
        valid = valid or (self.kind is float and isinstance(value, float) and math.isfinite(value))
        if not valid or not self.low <= value <= self.high or (self.above and value == self.low):
            lower = f"over {self.low:,}" if self.above else f"from {self.low:,}"
            kind = "whole number" if self.kind is int else "number"
            raise InvalidRequest(f"{name} must be a {kind} {lower} to {self.high:,}", name)
        return self.kind(value)


NUMBERS: Mapping[str, Number] = {
    "max_tokens": Number(int, 1, MAX_TOKENS),
    "min_tokens": Number(int, 0, MAX_TOKENS, description="no end of sequence before so many tokens"),
    "temperature": Number(float, 0, 2),
    "top_p": Number(float, 0, 1, above=True),
    "top_k": Number(int, 0, MAX_TOKENS),
    "min_p": Number(float, 0, 1),
    "seed": Number(int, *SEED),
    "repetition_penalty": Number(float, 0.01, 10),
    "presence_penalty": Number(float, -2, 2),
    "frequency_penalty": Number(float, -2, 2),
    "logprobs": Number(int, 0, MAX_LOGPROBS),
}
"""The HTTP schemas and the defaults of tasks have these fields. Each one is a field of `Sampling` too."""
OWN_DEFAULTS: Mapping[str, Any] = {"max_tokens": 64, "temperature": 0.0}
COMPLETION_DEFAULTS: Mapping[str, Any] = {"max_tokens": 16, "temperature": 1.0}
CHAT_DEFAULTS: Mapping[str, Any] = {"temperature": 1.0}
"""Without `max_tokens`, as in OpenAI's chat: the answer may fill the context."""


def check_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """A task's `defaults`. Raises InvalidRequest, which names the field."""
    checked: dict[str, Any] = {}
    for name, value in values.items():
        if value is None:
            continue
        if name in NUMBERS:
            checked[name] = NUMBERS[name].check(f"defaults.{name}", value)
        elif name == "stop":
            checked[name] = _check_stop(value)
        elif name == "stop_token_ids":
            checked[name] = _check_token_ids(value)
        elif name == "ignore_eos" and isinstance(value, bool):
            checked[name] = value
        else:
            known = ", ".join((*NUMBERS, "stop", "stop_token_ids", "ignore_eos"))
            raise InvalidRequest(f"defaults has no field {str(name)[:64]!r} of that type; use {known}", "defaults")
    return checked


def _check_stop(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MAX_STOP:
        raise InvalidRequest(f"defaults.stop takes up to {MAX_STOP} strings", "defaults.stop")
    if not all(isinstance(s, str) and 0 < len(s) <= MAX_STOP_LENGTH for s in stops):
        raise InvalidRequest(f"a stop is a string of 1 to {MAX_STOP_LENGTH} characters", "defaults.stop")
    return stops


def _check_token_ids(value: Any) -> list[int]:
    valid = isinstance(value, list) and len(value) <= MAX_STOP_TOKENS
    if not valid or not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value):
        raise InvalidRequest(f"stop_token_ids takes up to {MAX_STOP_TOKENS} token ids", "defaults.stop_token_ids")
    return list(value)


@dataclass(frozen=True)
class ContextLimit:
    """Context length in tokens, for prompt and answer together, and size of the vocabulary."""

    context: int
    vocabulary: int

    def check_prompt(self, tokens: int, param: str = "prompt") -> None:
        """Raises InvalidRequest if a prompt of so many tokens leaves no room for an answer, or is empty."""
        if tokens >= self.context:
            raise self.exceeded(f", for prompt and answer; the prompt has {tokens}: shorten it", param)
        if tokens == 0:
            raise InvalidRequest("the prompt is empty", param)

    def exceeded(self, detail: str, param: str) -> ContextExceeded:
        """The error for text that is too long. Clients recognize OpenAI's words at its beginning."""
        return ContextExceeded(f"this model's maximum context length is {self.context} tokens{detail}", param)


def build(
    request: Mapping[str, Any],
    task: Mapping[str, Any],
    server: Mapping[str, Any],
    limit: ContextLimit,
    longest_prompt: int = 0,
) -> Sampling:
    """Combine the fields of request, task and server.

    A default `max_tokens` is reduced to what fits into the context. One of the request that does not fit is refused.

    Args:
        request: its fields; None counts as absent.
        longest_prompt: tokens of the longest prompt. 0, before tokenizing, refuses what fits no prompt.

    Raises:
        InvalidRequest, ContextExceeded: a value is out of range.
    """
    given = {name: value for name, value in request.items() if value is not None}
    values = {**server, **task, **given}
    left = limit.context - longest_prompt
    if (wanted := given.get("max_tokens")) is not None and wanted > left:
        why, most = f"the prompt's {longest_prompt} tokens leave {left} of a", f"at most {left}"
        if not longest_prompt:
            why, most = "prompt and answer share a", "less"
        raise ContextExceeded(
            f"max_tokens is {wanted}, but {why} context of {limit.context}; ask for {most}, or leave max_tokens out",
            "max_tokens",
        )
    length = min(values.get("max_tokens", left), left)
    if values.get("min_tokens", 0) > length:
        if given.get("min_tokens") is not None:
            raise InvalidRequest(f"min_tokens is over the {length} tokens that the answer may have", "min_tokens")
        values["min_tokens"] = length
    for token in values.get("stop_token_ids", ()):
        if token >= limit.vocabulary:
            raise InvalidRequest(f"{token} is no token id; the vocabulary has {limit.vocabulary}", "stop_token_ids")
    stop = values.get("stop") or ()
    values["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    values["stop_token_ids"] = tuple(values.get("stop_token_ids") or ())
    values["max_tokens"] = length
    if values.get("seed") is not None:
        values["seed"] %= 1 << 63
    return Sampling(**{name: value for name, value in values.items() if name in _FIELDS})


_FIELDS = frozenset(Sampling.__dataclass_fields__)
