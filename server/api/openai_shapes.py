"""What OpenAI's answers look like: whole, and as the chunks of a stream.

Owns the shapes of completions, chat completions and their log-probabilities. Knows no route.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from server.api.generate import finite
from server.api.stream import incomplete_answer
from server.engine.request import Delivery, TokenLogprob
from server.model.detokenizer import Detokenizer
from server.model.tokenizer import ModelTokenizer
from server.tasks.inference import Generation, Reply


class Shape(Protocol):
    """One kind of answer."""

    id: str

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The answer in one piece."""

    def head(self, usage: bool) -> str:
        """A chunk's JSON up to its choices."""

    def opening(self, count: int) -> list[str]:
        """Choices (JSON) that come before any token."""

    def choice(self, index: int, delivery: Delivery, logprobs: bool) -> str:
        """The choice (JSON) of one delivery."""


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's usage."""
    own = generation.usage()
    cached = own.pop("cached_tokens")
    return {**own, "prompt_tokens_details": {"cached_tokens": cached}}


class CompletionShape:
    """`text_completion`, whole and in chunks of the same form. `begins` says of each answer whether its text is one of
    its own: `ModelTokenizer.is_added_token` of its prompt's last token.
    """

    def __init__(self, id: str, created: int, model: str, text: ModelTokenizer, begins: Sequence[bool]) -> None:
        self.id = id
        self._own = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._text = text
        self._begins = begins
        self._read: dict[int, tuple[Detokenizer, int]] = {}
        """Of each answer, what reads its tokens again, and how many characters they have made."""

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": "".join(reply.text),
                "logprobs": self._logprobs(i, reply.logprobs) if _wants(reply) else None,
                "finish_reason": reply.finish_reason,
            }
            for i, reply in enumerate(generation.replies)
        ]
        return {**self._own, "choices": choices, "usage": usage(generation)}

    def head(self, usage: bool) -> str:
        return json.dumps(self._own)[:-1] + (', "usage": null' if usage else "")

    def opening(self, count: int) -> list[str]:
        return []

    def choice(self, index: int, delivery: Delivery, logprobs: bool) -> str:
        told = json.dumps(self._logprobs(index, delivery.logprobs)) if logprobs else "null"
        return (
            f'{{"index": {index}, "text": {json.dumps(delivery.text)}, "logprobs": {told}, '
            f'"finish_reason": {json.dumps(delivery.finish_reason)}}}'
        )

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Each with its place in the text: a character of several tokens begins where all of them do."""
        reader, at = self._read.get(index) or (Detokenizer(self._text, new_segment=self._begins[index]), 0)
        offsets = []
        for t in tokens:
            offsets.append(at)
            at += len(reader.add(t.id))
        self._read[index] = reader, at
        return {
            "tokens": [self._text.token_text(t.id) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if any(t.top for t in tokens) else None,
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Best first; where two ids read alike, the better one. The token itself is among them, as OpenAI has it."""
        top: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(self._text.token_text(id), finite(logprob))
        return top


class ChatShape:
    """`chat.completion`, and `chat.completion.chunk` with deltas."""

    def __init__(self, id: str, created: int, model: str, text: ModelTokenizer) -> None:
        self.id = id
        self._own = {"id": id, "object": "chat.completion", "created": created, "model": model}
        self._text = text

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(reply.text), "refusal": None},
                "logprobs": self._logprobs(reply.logprobs) if _wants(reply) else None,
                "finish_reason": reply.finish_reason,
            }
            for i, reply in enumerate(generation.replies)
        ]
        return {**self._own, "choices": choices, "usage": usage(generation)}

    def head(self, usage: bool) -> str:
        own = {**self._own, "object": "chat.completion.chunk"}
        return json.dumps(own)[:-1] + (', "usage": null' if usage else "")

    def opening(self, count: int) -> list[str]:
        delta = '{"role": "assistant", "content": "", "refusal": null}'
        return [f'{{"index": {i}, "delta": {delta}, "logprobs": null, "finish_reason": null}}' for i in range(count)]

    def choice(self, index: int, delivery: Delivery, logprobs: bool) -> str:
        delta = f'{{"content": {json.dumps(delivery.text)}}}' if delivery.text else "{}"
        told = json.dumps(self._logprobs(delivery.logprobs)) if logprobs and delivery.logprobs else "null"
        return (
            f'{{"index": {index}, "delta": {delta}, "logprobs": {told}, '
            f'"finish_reason": {json.dumps(delivery.finish_reason)}}}'
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        return {
            "content": [
                {**self._token(t.id, t.logprob), "top_logprobs": [self._token(id, value) for id, value in t.top]}
                for t in tokens
            ],
            "refusal": None,
        }

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._text.token_text(id),
            "logprob": finite(logprob),
            "bytes": list(self._text.token_bytes(id)),
        }


class V1Events:
    """The stream of an OpenAI answer: a chunk per token, be it one that shows no text, as clients count and time them;
    and one of usage at the end if it is wanted, or, as vLLM has it, what was used so far in `each` chunk too."""

    def __init__(self, generation: Generation, shape: Shape, usage: bool, each: bool = False) -> None:
        self._generation = generation
        self._shape = shape
        self._usage = usage
        self._each = usage and each
        self._head = f"data: {shape.head(usage and not each)}"
        self._logprobs = _wants(generation.replies[0])

    def first(self) -> bytes:
        opening = self._shape.opening(len(self._generation.replies))
        return "".join(map(self._chunk, opening)).encode()

    def step(self, index: int, delivery: Delivery) -> bytes:
        if delivery.finish_reason == "cancelled":
            raise incomplete_answer()
        return self._chunk(self._shape.choice(index, delivery, self._logprobs)).encode()

    def _chunk(self, choice: str) -> str:
        so_far = f', "usage": {json.dumps(usage(self._generation))}' if self._each else ""
        return f'{self._head}{so_far}, "choices": [{choice}]}}\n\n'

    def last(self) -> bytes:
        if not self._usage:
            return b""
        head = self._shape.head(False)
        return f'data: {head}, "choices": [], "usage": {json.dumps(usage(self._generation))}}}\n\n'.encode()


def _wants(reply: Reply) -> bool:
    return reply.request.sampling.logprobs is not None
