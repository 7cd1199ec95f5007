"""From a client's words to token ids: templates, bounds, and a thread for what is long.

Owns the check by characters that comes before tokenizing, and the one by tokens that comes after.
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

MESSAGE = 64
"""Characters that a message of a conversation counts beside its own: the template runs for each."""

USUAL = 8
"""Characters that a token stands for at most, in nearly any text. One that has more for each token of the context is
looked at by its beginning first."""

SEAM = 64
"""Tokens that a beginning may have more than it has amid the text."""

THREADS = 2
"""For what is long, and for nothing else: those of the event loop may all wait for a disk, or for each other. More
would take the processors from the steps."""


class Prompts:
    """A text's way into the context. `longest_token` is the most characters that one token stands for, `most_tokens`
    what may wait of all prompts of one call.
    """

    def __init__(self, text: ModelTokenizer, limit: ContextLimit, longest_token: int, most_tokens: int) -> None:
        self.text = text
        self.limit = limit
        self._longest_token = longest_token
        self._characters = limit.context * longest_token
        self._most_tokens = most_tokens
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="loramux-prompts")

    def close(self) -> None:
        """Let go of what is not tokenized yet."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def encode_input(self, task: Task | None, prompt: str) -> list[int]:
        """The ids of `prompt` in a task's template, or as it is. Raises InvalidRequest."""
        self._check_characters(len(prompt), "prompt")
        await self._check_beginning(prompt, USUAL * self.limit.context)
        if task is None:
            ids = await self._off(len(prompt), lambda: self.text.encode(prompt))
        else:
            size = len(prompt) + _around(task)
            ids = await self._off(size, lambda: self.text.encode_task(task.prompt, task.format, task.system, prompt))
        self.limit.check_prompt(len(ids))
        return ids

    async def encode_chat(self, task: Task | None, messages: Sequence[Message]) -> list[int]:
        """The ids of a conversation; a task's template wraps its last user message. Raises InvalidRequest."""
        size = sum(len(m["content"]) for m in messages)
        self._check_characters(size, "messages")
        if task is not None and task.format == "raw":
            return await self.encode_input(task, _only_message(task, messages))
        asked = "".join(m["content"] for m in messages if m["role"] != "assistant")  # templates drop of answers' parts
        await self._check_beginning(asked, USUAL * self.limit.context, "messages")
        wrapped = messages if task is None else _wrapped(task, messages)
        ids = await self._off(size + _around(task) + MESSAGE * len(wrapped), lambda: self.text.encode_chat(wrapped))
        self.limit.check_prompt(len(ids), "messages")
        return ids

    def check_token_ids(self, ids: Sequence[int]) -> list[int]:
        """Ids that the client has made itself, checked. Raises InvalidRequest."""
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
        left: Callable[[], bool] = lambda: False,
    ) -> list[tuple[list[int], int]]:
        """For each label: the ids of prompt, label and end token, and how many of the last are scored.

        The prompt is tokenized with each, so that one which is too long is found out before. `deadline` is of the
        monotonic clock; once the client has `left`, no more labels are looked at. Raises InvalidRequest,
        DeadlineExceeded, and NoCapacity for what could not wait in the queue.
        """
        self._check_characters(len(prompt), "prompt")
        text, format = self.text, task.format if task else "raw"
        template, system = (task.prompt, task.system) if task else (INPUT, None)
        pieces = await self._off(
            len(prompt) + _around(task), lambda: text.render_task(template, format, system, prompt)
        )
        whole = "".join(piece for piece in pieces if isinstance(piece, str))
        await self._check_beginning(whole, self.limit.context)
        self._check_together(len(whole), len(labels), USUAL * self._most_tokens)
        ids = await self._off(len(whole), lambda: text.encode_segments(pieces))
        self._check_together(len(ids) - SEAM, len(labels), self._most_tokens)

        def in_time() -> Iterator[str]:
            for label in labels:
                if left():
                    return
                if time.monotonic() > deadline:
                    raise DeadlineExceeded("the deadline passed before the prompt and all labels were tokenized")
                yield label

        size = (len(whole) + sum(map(len, labels))) * len(labels)
        scored = await self._off(size, lambda: text.encode_continuations(pieces, ids, in_time(), format))
        longest = max((len(ids) for ids, _ in scored), default=0)
        if longest > self.limit.context:
            raise self.limit.exceeded(f"; prompt and label have {longest}: shorten them", "prompt")
        if any(len(ids) <= count for ids, count in scored):
            raise InvalidRequest(
                "the prompt and a label are one token together; end the prompt with a space or a line"
                if prompt
                else "the prompt is empty",
                "prompt",
            )
        return scored

    async def is_longer(self, text: str, tokens: int) -> bool:
        """Whether a text, by itself, is more than so many tokens."""
        if len(text) > tokens * self._longest_token:
            return True
        return len(await self._off(len(text), lambda: self.text.encode(text, add_bos=False))) > tokens

    async def _check_beginning(self, text: str, over: int, param: str = "prompt") -> None:
        """Of a text of more than `over` characters: raises InvalidRequest if a beginning of it has too many tokens."""
        if len(text) <= over:
            return
        some = text[: USUAL * self.limit.context]
        if len(await self._off(len(some), lambda: self.text.encode(some, add_bos=False))) > self.limit.context + SEAM:
            why = f"has {len(text)} characters, of which the first {len(some)} alone are more tokens"
            raise self.limit.exceeded(f"; {param} {why}: shorten it", param)

    async def _off(self, size: int, call: Callable[[], T]) -> T:
        """What `call` answers; on a thread where it would hold the event loop up."""
        return (
            call()
            if size <= FAST_ENCODE_CHARS
            else await asyncio.get_running_loop().run_in_executor(self._threads, call)
        )

    def _check_together(self, size: int, count: int, most: int) -> None:
        """Raises NoCapacity for a prompt of this size, in tokens or characters, that `count` labels follow each, if all
        of them could not wait together, or take too long to be tokenized.
        """
        if count > 1 and size * count > most:
            raise NoCapacity(
                f"the prompt is read with each of {count} labels, and all of it together is over {self._most_tokens} "
                f"tokens (--max-queue-tokens) or {USUAL} times as many characters; send fewer labels at a time, or a "
                "shorter prompt"
            )

    def _check_characters(self, size: int, param: str) -> None:
        if size > self._characters:
            why = f"has {size} characters, of which it holds {self._characters} at the very most"
            raise self.limit.exceeded(f"; {param} {why}: shorten it", param)


def _around(task: Task | None) -> int:
    """Characters that a task may put around what it is asked."""
    return 0 if task is None else len(task.prompt) + len(task.system or "")


def _only_message(task: Task, messages: Sequence[Message]) -> str:
    if len(messages) != 1 or messages[0]["role"] != "user":
        raise InvalidRequest(
            f"the task {task.name!r} has a raw template, which has no place for a conversation; send one user message",
            "messages",
        )
    return str(messages[0]["content"])


def _wrapped(task: Task, messages: Sequence[Message]) -> list[Message]:
    last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None:
        raise InvalidRequest(f"the task {task.name!r} needs a user message", "messages")
    wrapped = list(messages)
    wrapped[last] = {**messages[last], "content": task.prompt.replace(INPUT, messages[last]["content"], 1)}
    if task.system is not None and messages[0]["role"] != "system":
        wrapped.insert(0, {"role": "system", "content": task.system})
    return wrapped
