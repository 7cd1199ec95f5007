"""Encodes what clients send into token ids: applies templates, checks lengths, and tokenizes long text on threads.

Lengths are checked in characters before tokenizing and in tokens after it.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from server.errors import DeadlineExceeded, InvalidRequest, NoCapacity
from server.model.tokenizer import FAST_ENCODE_CHARS, INPUT, ModelTokenizer
from server.tasks.definitions import Task
from server.tasks.sampling import ContextLimit

T = TypeVar("T")
Message = Mapping[str, Any]

MESSAGE_COST = 64
"""Characters that a chat message counts besides its content: the template runs for each."""
CHARS_PER_TOKEN = 8
"""Most characters per token in nearly any text. Longer texts are checked by a prefix first."""
PREFIX_SLACK = 64
"""Tokens that a prefix may have more than the same characters within the text."""
THREADS = 2
"""Threads for long text only. Those of the event loop may all wait for a disk; more would slow down engine steps."""


class Prompts:
    """Encodes prompts.

    Args:
        tokenizer: of the base model.
        limit: context length and vocabulary.
        longest_token: most characters of one token.
        max_queue_tokens: most tokens of all prompts of one call together.
    """

    def __init__(
        self, tokenizer: ModelTokenizer, limit: ContextLimit, longest_token: int, max_queue_tokens: int
    ) -> None:
        self.tokenizer = tokenizer
        self.limit = limit
        self._longest_token = longest_token
        self._max_queue_tokens = max_queue_tokens
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="loramux-prompts")

    def close(self) -> None:
        """Stop the threads; text that is not tokenized yet is dropped."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode_input(self, task: Task | None, prompt: str) -> list[int]:
        """Token ids of a prompt in the task's template, or of the prompt alone. Raises InvalidRequest."""
        self._check_characters(len(prompt), "prompt")
        await self._check_prefix(prompt, CHARS_PER_TOKEN * self.limit.context)
        if task is None:
            ids = await self._run(len(prompt), lambda: self.tokenizer.encode(prompt))
        else:
            ids = await self._run(
                len(prompt) + _template_size(task),
                lambda: self.tokenizer.encode_task(task.prompt, task.format, task.system, prompt),
            )
        self.limit.check_prompt(len(ids))
        return ids

    async def encode_chat(self, task: Task | None, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation. A task's template wraps the last user message. Raises InvalidRequest."""
        size = sum(len(m["content"]) for m in messages)
        self._check_characters(size, "messages")
        if task is not None and task.format == "raw":
            return await self.encode_input(task, _single_message(task, messages))
        # Chat templates may drop earlier answers, so these do not count.
        text = "".join(m["content"] for m in messages if m["role"] != "assistant")
        await self._check_prefix(text, CHARS_PER_TOKEN * self.limit.context, "messages")
        wrapped = messages if task is None else _wrap_last(task, messages)
        size += _template_size(task) + MESSAGE_COST * len(wrapped)
        ids = await self._run(size, lambda: self.tokenizer.encode_chat(wrapped))
        self.limit.check_prompt(len(ids), "messages")
        return ids

    def check_token_ids(self, ids: Sequence[int]) -> list[int]:
        """Check token ids that the client sent as prompt. Raises InvalidRequest."""
        self.limit.check_prompt(len(ids))
        if min(ids) < 0 or max(ids) >= self.limit.vocabulary:
            raise InvalidRequest(f"prompt has a token id that is not within 0 to {self.limit.vocabulary - 1}", "prompt")
        return list(ids)

    async def encode_labels(
        self,
        task: Task | None,
        prompt: str,
        labels: Sequence[str],
        deadline: float = math.inf,
        disconnected: Callable[[], bool] = lambda: False,
    ) -> list[tuple[list[int], int]]:
        """For each label: token ids of prompt, label and end token, and how many of the last are scored.

        Args:
            deadline: in `time.monotonic()` seconds.
            disconnected: whether the client has gone; further labels are skipped then.

        Raises:
            InvalidRequest: prompt and label are longer than the context.
            NoCapacity: prompt times labels are too many tokens for the queue.
            DeadlineExceeded: the deadline passed.
        """
        self._check_characters(len(prompt), "prompt")
        tokenizer, format = self.tokenizer, task.format if task else "raw"
        template, system = (task.prompt, task.system) if task else (INPUT, None)
        pieces = await self._run(
            len(prompt) + _template_size(task), lambda: tokenizer.render_task(template, format, system, prompt)
        )
        text = "".join(piece for piece in pieces if isinstance(piece, str))
        await self._check_prefix(text, self.limit.context)
        self._check_total(len(text), len(labels), CHARS_PER_TOKEN * self._max_queue_tokens)
        ids = await self._run(len(text), lambda: tokenizer.encode_segments(pieces))
        self._check_total(len(ids) - PREFIX_SLACK, len(labels), self._max_queue_tokens)

        def remaining() -> Iterator[str]:
            for label in labels:
                if disconnected():
                    return
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the deadline passed before the prompt and all labels were tokenized")
                yield label

        size = (len(text) + sum(map(len, labels))) * len(labels)
        scored = await self._run(size, lambda: tokenizer.encode_continuations(pieces, ids, remaining(), format))
        longest = max((len(ids) for ids, _ in scored), default=0)
        if longest > self.limit.context:
            raise self.limit.exceeded(f"; prompt and label have {longest}: shorten them", "prompt")
        if any(len(ids) <= count for ids, count in scored):
            why = "the prompt and a label form one token; end the prompt with a space or a newline"
            raise InvalidRequest(why if prompt else "the prompt is empty", "prompt")
        return scored

    async def has_more_tokens(self, text: str, tokens: int) -> bool:
        """Whether a text alone has more than `tokens` tokens."""
        if len(text) > tokens * self._longest_token:
            return True
        return len(await self._run(len(text), lambda: self.tokenizer.encode(text, add_bos=False))) > tokens

    async def _run(self, size: int, call: Callable[[], T]) -> T:
        """Run `call`, on a thread if `size` characters would block the event loop for long."""
        if size <= FAST_ENCODE_CHARS:
            return call()
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _check_characters(self, size: int, param: str) -> None:
        most = self.limit.context * self._longest_token
        if size > most:
            raise self.limit.exceeded(f"; {param} has {size} characters, more than {most}: shorten it", param)

    async def _check_prefix(self, text: str, over: int, param: str = "prompt") -> None:
        """Raises InvalidRequest if a text of more than `over` characters has a prefix of too many tokens."""
        if len(text) <= over:
            return
        prefix = text[: CHARS_PER_TOKEN * self.limit.context]
        tokens = await self._run(len(prefix), lambda: self.tokenizer.encode(prefix, add_bos=False))
        if len(tokens) > self.limit.context + PREFIX_SLACK:
            why = f"has {len(text)} characters, of which the first {len(prefix)} alone are more tokens"
            raise self.limit.exceeded(f"; {param} {why}: shorten it", param)

    def _check_total(self, size: int, labels: int, most: int) -> None:
        if labels > 1 and size * labels > most:
            raise NoCapacity(
                f"the prompt is scored with each of {labels} labels: together over {self._max_queue_tokens} tokens "
                f"(--max-queue-tokens) or {CHARS_PER_TOKEN} times as many characters. Send fewer labels at a time or "
                "a shorter prompt"
            )


def _template_size(task: Task | None) -> int:
    return 0 if task is None else len(task.prompt) + len(task.system or "")


def _single_message(task: Task, messages: Sequence[Message]) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise InvalidRequest(
            f"the task {task.name!r} has a raw template, which has no place for a conversation; send one user message",
            "messages",
        )
    return str(messages[0]["content"])


def _wrap_last(task: Task, messages: Sequence[Message]) -> list[Message]:
    """The conversation with the task's template around its last user message, after the task's system message."""
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        raise InvalidRequest(f"the task {task.name!r} needs a user message", "messages")
    wrapped = list(messages)
    wrapped[last] = {**messages[last], "content": task.prompt.replace(INPUT, messages[last]["content"], 1)}
    if task.system is not None and messages[0]["role"] != "system":
        wrapped.insert(0, {"role": "system", "content": task.system})
    return wrapped
