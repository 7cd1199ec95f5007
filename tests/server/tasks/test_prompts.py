"""A client's words on their way to ids: what is refused before it costs anything."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from server.errors import DeadlineExceeded, InvalidRequest, NoCapacity
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from server.tasks.definitions import FixedRoute, Task
from server.tasks.prompts import SEAM, USUAL, Prompts
from server.tasks.sampling import ContextLimit

CONTEXT = 128


class Counting(ModelTokenizer):
    """Notes how long the texts are that it is asked to tokenize."""

    def __init__(self, vocabulary: Any) -> None:
        self.sizes: list[int] = []
        super().__init__(vocabulary)
        del self.sizes[:]

    def encode_segments(self, pieces: Any) -> list[int]:
        pieces = list(pieces)
        self.sizes.append(sum(len(piece) for piece in pieces if isinstance(piece, str)))
        return super().encode_segments(pieces)


@pytest.fixture
def prompts(tiny_base: Base) -> Iterator[Prompts]:
    text, room = Counting(tiny_base.vocabulary), ContextLimit(CONTEXT, tiny_base.config.vocab_size)
    prompts = Prompts(text, room, 100, 100 * CONTEXT)
    yield prompts
    prompts.close()


LONG = "1 2 " * (CONTEXT * 100 // 4)


async def test_of_a_text_far_too_long_a_beginning_is_looked_at(prompts: Prompts) -> None:
    refused = f"first {USUAL * CONTEXT} alone are more tokens"
    with pytest.raises(InvalidRequest, match=refused):
        await prompts.encode_input(None, LONG)
    with pytest.raises(InvalidRequest, match=refused) as messages:
        await prompts.encode_chat(None, [{"role": "user", "content": LONG[i::2]} for i in range(2)])
    assert messages.value.param == "messages"
    with pytest.raises(InvalidRequest, match=refused):
        await prompts.encode_labels(None, LONG, ["a", "b"])
    assert max(prompts.text.sizes) == USUAL * CONTEXT


async def test_a_beginning_says_nothing_of_what_may_fit(prompts: Prompts) -> None:
    few = "x" * (USUAL * CONTEXT) + " "
    prompts.text.encode_segments = lambda pieces: [1] * (CONTEXT + SEAM if len(pieces[0]) < len(few) else CONTEXT - 1)  # type: ignore[method-assign]
    assert len(await prompts.encode_input(None, few)) == CONTEXT - 1


async def test_labels_are_not_tokenized_with_a_prompt_that_is_too_long(prompts: Prompts) -> None:
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.encode_labels(None, "1 2 " * CONTEXT, [str(i) for i in range(50)])
    assert len(prompts.text.sizes) == 1


@pytest.mark.parametrize("format", ["raw", "chat"])
async def test_a_long_template_is_tokenized_on_a_thread(prompts: Prompts, format: Any) -> None:
    """The event loop would answer nobody meanwhile, however short the prompt is."""
    shots = Task("shots", "y " * 2500 + "{input}", FixedRoute(), format, system=None if format == "raw" else "z " * 10)
    whole: list[bool] = []

    def encode(pieces: Any) -> list[int]:
        if sum(len(piece) for piece in pieces if isinstance(piece, str)) > 5000:
            whole.append(threading.current_thread() is threading.main_thread())
        return [1] * 20

    prompts.text.encode_segments = encode  # type: ignore[method-assign]
    await prompts.encode_input(shots, "x")
    await prompts.encode_chat(shots, [{"role": "user", "content": "x"}])
    await prompts.encode_labels(shots, "x", ["a", "b"])
    assert len(whole) == 5 and not any(whole)


async def test_labels_are_not_tokenized_with_a_template_that_is_too_long(prompts: Prompts) -> None:
    shots = Task("shots", "1 2 " * CONTEXT + "{input}", FixedRoute())
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.encode_labels(shots, "x", [str(i) for i in range(50)])
    assert len(prompts.text.sizes) == 1


async def test_no_label_is_tokenized_for_who_has_left(prompts: Prompts) -> None:
    labels, asked = [str(i) for i in range(50)], list[None]()
    await prompts.encode_labels(None, "x", labels, left=lambda: len(asked) == 3 or asked.append(None))  # type: ignore[arg-type, func-returns-value]
    assert len(prompts.text.sizes) == 1 + 3, "the prompt's own, and three"


async def test_what_cannot_wait_together_is_not_tokenized_with_its_labels(prompts: Prompts) -> None:
    """A prompt of few tokens for its length takes as long with each label as one of many."""
    most = prompts._most_tokens
    assert most == 100 * CONTEXT
    labels = [str(i) for i in range(50)]
    few = "x" * (USUAL * most // 50 + 1)
    prompts._characters = len(few)
    prompts.text.encode_segments = lambda pieces: [1] * (3 * CONTEXT)  # type: ignore[method-assign]
    prompts.limit = replace(prompts.limit, context=4 * CONTEXT)
    with pytest.raises(NoCapacity, match="50 labels, and all of it together is over 12800 tokens"):
        await prompts.encode_labels(None, few, labels)
    with pytest.raises(NoCapacity, match="send fewer labels at a time"):
        await prompts.encode_labels(None, few[:-1], labels)
    assert len(await prompts.encode_labels(None, few[:-1], labels[:20])) == 20
    assert len(await prompts.encode_labels(None, few, labels[:1])) == 1


async def test_a_deadline_ends_the_tokenizing_of_labels(prompts: Prompts) -> None:
    labels = [str(i) for i in range(50)]
    assert len(await prompts.encode_labels(None, "x", labels, time.monotonic() + 60)) == 50
    del prompts.text.sizes[:]
    with pytest.raises(DeadlineExceeded):
        await prompts.encode_labels(None, "x", labels, time.monotonic() - 1)
    assert len(prompts.text.sizes) == 1, "the prompt's own"


async def test_a_prompt_that_leaves_no_place_for_an_answer_is_refused_by_its_tokens(prompts: Prompts) -> None:
    length = CONTEXT
    prompts.text.encode_segments = lambda pieces: [1] * length  # type: ignore[method-assign]
    chat: Any = [{"role": "user", "content": "x"}]
    for _ in range(2):
        with pytest.raises(InvalidRequest) as prompt:
            await prompts.encode_input(None, "x")
        with pytest.raises(InvalidRequest) as messages:
            await prompts.encode_chat(None, chat)
        with pytest.raises(InvalidRequest) as ids:
            prompts.check_token_ids([1] * length)
        assert [e.value.param for e in (prompt, messages, ids)] == ["prompt", "messages", "prompt"]
        length = 0
    length = CONTEXT - 1
    assert len(await prompts.encode_input(None, "x")) == len(await prompts.encode_chat(None, chat)) == CONTEXT - 1
    last = prompts.limit.vocabulary - 1
    assert prompts.check_token_ids([last, 0] * (CONTEXT // 2 - 1)) == [last, 0] * (CONTEXT // 2 - 1)
    for wrong in (last + 1, -1):
        with pytest.raises(InvalidRequest, match=f"within 0 to {last}$"):
            prompts.check_token_ids([0, wrong, 0])


async def test_more_characters_than_any_text_of_the_context_has_are_not_tokenized(prompts: Prompts) -> None:
    shots = Task("shots", "{input}", FixedRoute())
    text = "x" * (CONTEXT * 100 + 1)
    prompts.text.encode_segments = None  # type: ignore[assignment]
    for task in (None, shots):
        with pytest.raises(InvalidRequest, match="at the very most") as prompt:
            await prompts.encode_input(task, text)
        with pytest.raises(InvalidRequest, match="at the very most") as labels:
            await prompts.encode_labels(task, text, ["a", "b"])
        with pytest.raises(InvalidRequest, match="at the very most") as messages:
            await prompts.encode_chat(task, [{"role": "user", "content": text[i::2]} for i in range(2)])
        assert [e.value.param for e in (prompt, labels, messages)] == ["prompt", "prompt", "messages"]


async def test_an_earlier_answer_is_no_beginning_to_look_at(prompts: Prompts) -> None:
    """Templates leave parts of them out, as what a model thought; what a system message says is all there."""
    looked: list[str] = []
    encode = prompts.text.encode
    prompts.text.encode = lambda text, **more: looked.append(text) or encode(text, **more)  # type: ignore[func-returns-value]
    prompts.text.encode_chat = lambda messages, **_: [1]  # type: ignore[method-assign]
    long = "1 2 " * (CONTEXT * 4)
    said: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": long}]
    assert await prompts.encode_chat(None, [*said, {"role": "user", "content": "b"}]) == [1] and not looked
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.encode_chat(None, [{"role": "system", "content": long}, *said])


async def test_a_task_wraps_the_last_of_the_users_words_once(prompts: Prompts) -> None:
    rendered: list[Any] = []
    prompts.text.encode_chat = lambda messages, **_: rendered.append(messages) or [1]  # type: ignore[method-assign, func-returns-value]
    task = Task("mood", "Q: {input}!", FixedRoute(), "chat", system="Be brief.")
    user = {"role": "user", "content": "of {input}?", "name": "ada"}
    told: Any = [{"role": "user", "content": "first"}, {"role": "assistant", "content": "yes"}, user]
    wrapped = {**user, "content": "Q: of {input}?!"}
    await prompts.encode_chat(task, [*told, {"role": "assistant", "content": "well"}])
    system = {"role": "system", "content": "Be brief."}
    assert rendered.pop() == [system, *told[:2], wrapped, {"role": "assistant", "content": "well"}]
    own = {"role": "system", "content": "Be long."}
    await prompts.encode_chat(task, [own, user])
    assert rendered.pop() == [own, wrapped], "a client's own system message stands in the task's place"
    with pytest.raises(InvalidRequest, match="needs a user message"):
        await prompts.encode_chat(task, [own])


async def test_a_raw_template_takes_one_message_of_the_users(prompts: Prompts) -> None:
    task = Task("shots", "Say: {input}", FixedRoute(), "raw")
    user: Any = {"role": "user", "content": "x"}
    assert (
        await prompts.encode_chat(task, [user])
        == await prompts.encode_input(task, "x")
        == prompts.text.encode("Say: x")
    )
    for those in ([user, user], [{**user, "role": "assistant"}], [{**user, "role": "system"}, user]):
        with pytest.raises(InvalidRequest, match="no place for a conversation"):
            await prompts.encode_chat(task, those)


async def test_labels_are_tokenized_in_the_tasks_format_and_may_fill_the_context(prompts: Prompts) -> None:
    text = prompts.text
    for task in (
        Task("mood", "Is {input} good?", FixedRoute(), "chat", system="Judge."),
        Task("mood", "Is {input} good?", FixedRoute()),
    ):
        pieces = text.render_task(task.prompt, task.format, task.system, "it")
        expected = text.encode_continuations(pieces, text.encode_segments(pieces), ["yes", "no"], task.format)
        assert await prompts.encode_labels(task, "it", ["yes", "no"]) == expected
    alone = text.encode_segments(["it "])
    assert await prompts.encode_labels(None, "it ", ["a"]) == text.encode_continuations(["it "], alone, ["a"], "raw")
    text.encode_continuations = lambda *_: [([1] * 4, 2), ([1] * CONTEXT, 9)]  # type: ignore[method-assign]
    assert len(await prompts.encode_labels(None, "x", ["a", "b"])) == 2
    text.encode_continuations = lambda *_: [([1] * 4, 2), ([1] * (CONTEXT + 1), 9)]  # type: ignore[method-assign]
    with pytest.raises(InvalidRequest, match=f"prompt and label have {CONTEXT + 1}"):
        await prompts.encode_labels(None, "x", ["a", "b"])
    text.encode_continuations = lambda *_: [([1] * 4, 2), ([1] * 4, 4)]  # type: ignore[method-assign]
    for prompt, why in (("x", "one token together"), ("", "the prompt is empty")):
        with pytest.raises(InvalidRequest, match=why):
            await prompts.encode_labels(None, prompt, ["a", "b"])


async def test_many_messages_and_many_labels_are_work_for_a_thread(prompts: Prompts) -> None:
    """However short they are: the template runs for each message, and the prompt is tokenized with each label."""
    threads: list[threading.Thread] = []

    def worked(answer: Any) -> Any:
        threads.append(threading.current_thread())
        return answer

    prompts.text.encode_chat = lambda messages, **_: worked([1])  # type: ignore[method-assign]
    prompts.text.encode_continuations = lambda *_: worked([([1, 1], 1)])  # type: ignore[method-assign]
    await prompts.encode_chat(None, [{"role": "user", "content": "x"}])
    await prompts.encode_labels(None, "x" * 100, ["a"])
    assert [thread is threading.main_thread() for thread in threads] == [True, True]
    await prompts.encode_chat(None, [{"role": "user", "content": "x"}] * 100)
    await prompts.encode_labels(None, "x" * 100, ["a"] * 100)
    assert [thread is threading.main_thread() for thread in threads[2:]] == [False, False]
