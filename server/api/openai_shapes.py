"""OpenAI's response shapes: completions and chat completions, whole and as chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from server.api.generate import finite
from server.api.stream import incomplete_answer
from server.engine.request import Delivery, TokenLogprob
from server.model.detokenizer import Detokenizer
from server.model.tokenizer import ModelTokenizer
from server.tasks.generation import Generation, Reply


class Shape(Protocol):
    """One kind of response. Chunks are built as JSON text, which is faster than encoding dicts."""

    id: str

    def whole(self, generation: Generation) -> dict[str, Any]:
        """The response in one piece."""

    def head(self, usage: bool) -> str:
        """The JSON of a chunk up to its choices; with `usage` it has a null usage."""

    def opening(self, count: int) -> list[str]:
        """JSON choices that come before the first token."""

    def choice(self, index: int, delivery: Delivery, logprobs: bool) -> str:
        """The JSON choice of one delivery."""


def usage(generation: Generation) -> dict[str, Any]:
    """OpenAI's usage object."""
    own = generation.usage()
    cached = own.pop("cached_tokens")
    return {**own, "prompt_tokens_details": {"cached_tokens": cached}}


class CompletionShape:
    """`text_completion`.

    Args:
        new_segments: for each choice, whether its text starts a new segment, so that the tokenizer's leading space is
            dropped: `ModelTokenizer.is_added_token` of the last prompt token.
    """

    def __init__(self, id: str, created: int, model: str, text: ModelTokenizer, new_segments: Sequence[bool]) -> None:
        self.id = id
        self._common = {"id": id, "object": "text_completion", "created": created, "model": model}
        self._tokenizer = text
        self._new_segments = new_segments
        self._offsets: dict[int, tuple[Detokenizer, int]] = {}
        """For each choice, a detokenizer and the length of the text so far."""

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "text": "".join(reply.text),
                "logprobs": self._logprobs(i, reply.logprobs) if _with_logprobs(reply) else None,
                "finish_reason": reply.finish_reason,
            }
            for i, reply in enumerate(generation.replies)
        ]
        return {**self._common, "choices": choices, "usage": usage(generation)}

    def head(self, usage: bool) -> str:
        return json.dumps(self._common)[:-1] + (', "usage": null' if usage else "")

    def opening(self, count: int) -> list[str]:
        return []

    def choice(self, index: int, delivery: Delivery, logprobs: bool) -> str:
        entries = json.dumps(self._logprobs(index, delivery.logprobs)) if logprobs else "null"
        return (
            f'{{"index": {index}, "text": {json.dumps(delivery.text)}, "logprobs": {entries}, '
            f'"finish_reason": {json.dumps(delivery.finish_reason)}}}'
        )

    def _logprobs(self, index: int, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Log-probabilities with text offsets. Tokens of one character share the offset of the character."""
        stored = self._offsets.get(index)
        detokenizer, offset = stored or (Detokenizer(self._tokenizer, new_segment=self._new_segments[index]), 0)
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(detokenizer.add(token.id))
        self._offsets[index] = detokenizer, offset
        return {
            "tokens": [self._tokenizer.token_text(t.id) for t in tokens],
            "token_logprobs": [finite(t.logprob) for t in tokens],
            "top_logprobs": [self._top(t) for t in tokens] if any(t.top for t in tokens) else None,
            "text_offset": offsets,
        }

    def _top(self, token: TokenLogprob) -> dict[str, float]:
        """Best first, including the sampled token. Of tokens with the same text the better one is kept."""
        top: dict[str, float] = {}
        for id, logprob in (*token.top, (token.id, token.logprob)):
            top.setdefault(self._tokenizer.token_text(id), finite(logprob))
        return top


class ChatShape:
    """`chat.completion`, and `chat.completion.chunk` with deltas."""

    def __init__(self, id: str, created: int, model: str, text: ModelTokenizer) -> None:
        self.id = id
        self._common = {"id": id, "object": "chat.completion", "created": created, "model": model}
        self._tokenizer = text

    def whole(self, generation: Generation) -> dict[str, Any]:
        choices = [
            {
                "index": i,
                "message": {"role": "assistant", "content": "".join(reply.text), "refusal": None},
                "logprobs": self._logprobs(reply.logprobs) if _with_logprobs(reply) else None,
                "finish_reason": reply.finish_reason,
            }
            for i, reply in enumerate(generation.replies)
        ]
        return {**self._common, "choices": choices, "usage": usage(generation)}

    def head(self, usage: bool) -> str:
        chunk = {**self._common, "object": "chat.completion.chunk"}
        return json.dumps(chunk)[:-1] + (', "usage": null' if usage else "")

    def opening(self, count: int) -> list[str]:
        delta = '{"role": "assistant", "content": "", "refusal": null}'
        return [f'{{"index": {i}, "delta": {delta}, "logprobs": null, "finish_reason": null}}' for i in range(count)]

    def choice(self, index: int, delivery: Delivery, logprobs: bool) -> str:
        delta = f'{{"content": {json.dumps(delivery.text)}}}' if delivery.text else "{}"
        entries = json.dumps(self._logprobs(delivery.logprobs)) if logprobs and delivery.logprobs else "null"
        return (
            f'{{"index": {index}, "delta": {delta}, "logprobs": {entries}, '
            f'"finish_reason": {json.dumps(delivery.finish_reason)}}}'
        )

    def _logprobs(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = [
            {**self._token(t.id, t.logprob), "top_logprobs": [self._token(id, value) for id, value in t.top]}
            for t in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        text, raw = self._tokenizer.token_text(id), self._tokenizer.token_bytes(id)
        return {"token": text, "logprob": finite(logprob), "bytes": list(raw)}


class V1Events:
    """The events of a stream: one chunk per token, even without text, because clients count and time them.

    Args:
        usage: add a last chunk with the usage.
        each: as in vLLM, add the usage so far to every chunk.
    """

    def __init__(self, generation: Generation, shape: Shape, usage: bool, each: bool = False) -> None:
        self._generation = generation
        self._shape = shape
        self._usage = usage
        self._each = usage and each
        self._head = f"data: {shape.head(usage and not each)}"
        self._logprobs = _with_logprobs(generation.replies[0])

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


def _with_logprobs(reply: Reply) -> bool:
    return reply.request.sampling.logprobs is not None
