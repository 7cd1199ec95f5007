"""Encoding of prompts: limits before and after tokenizing, templates, and threads for long text."""

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
from server.tasks.prompts import CHARS_PER_TOKEN, PREFIX_SLACK, Prompts
from server.tasks.sampling import ContextLimit

CONTEXT = 128
LABELS = [str(i) for i in range(50)]
LONG = "1 2 " * (CONTEXT * 100 // 4)


def user(content: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "content": content}


class Recording(ModelTokenizer):
    """Records how long each tokenized text is."""

    def __init__(self, vocabulary: Any) -> None:
        self.sizes: list[int] = []
        super().__init__(vocabulary)
        self.sizes.clear()

    def encode_segments(self, pieces: Any) -> list[int]:
        pieces = list(pieces)
        self.sizes.append(sum(len(piece) for piece in pieces if isinstance(piece, str)))
        return super().encode_segments(pieces)


@pytest.fixture
def tokenizer(tiny_base: Base) -> Any:
    return Recording(tiny_base.vocabulary)


@pytest.fixture
def prompts(tiny_base: Base, tokenizer: Any) -> Iterator[Prompts]:
    prompts = Prompts(tokenizer, ContextLimit(CONTEXT, tiny_base.config.vocab_size), 100, 100 * CONTEXT)
    yield prompts
    prompts.close()


async def test_only_a_prefix_of_a_much_too_long_text_is_tokenized(prompts: Prompts, tokenizer: Any) -> None:
    message = f"first {CHARS_PER_TOKEN * CONTEXT} alone are more tokens"
    with pytest.raises(InvalidRequest, match=message):
        await prompts.encode_input(None, LONG)
    with pytest.raises(InvalidRequest, match=message) as chat:
        await prompts.encode_chat(None, [user(LONG[i::2]) for i in range(2)])
    assert chat.value.param == "messages" and max(tokenizer.sizes) == CHARS_PER_TOKEN * CONTEXT


async def test_a_text_whose_prefix_may_fit_is_tokenized(prompts: Prompts, tokenizer: Any) -> None:
    text = "x" * (CHARS_PER_TOKEN * CONTEXT) + " "
    tokenizer.encode_segments = lambda pieces: (
        [1] * (CONTEXT + PREFIX_SLACK if len(pieces[0]) < len(text) else CONTEXT - 1)
    )
    assert len(await prompts.encode_input(None, text)) == CONTEXT - 1


@pytest.mark.parametrize(
    ("task", "prompt"),
    [(None, LONG), (None, "1 2 " * CONTEXT), (Task("shots", "1 2 " * CONTEXT + "{input}", FixedRoute()), "x")],
)
async def test_labels_are_not_tokenized_with_a_prompt_that_is_too_long(
    prompts: Prompts, tokenizer: Any, task: Task | None, prompt: str
) -> None:
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.encode_labels(task, prompt, LABELS)
    assert len(tokenizer.sizes) == 1


async def test_text_with_more_characters_than_the_context_can_have_is_not_tokenized(
    prompts: Prompts, tokenizer: Any
) -> None:
    text = "x" * (CONTEXT * 100 + 1)
    tokenizer.encode_segments = None
    for task in (None, Task("shots", "{input}", FixedRoute())):
        for call, param in (
            (prompts.encode_input(task, text), "prompt"),
            (prompts.encode_labels(task, text, ["a", "b"]), "prompt"),
            (prompts.encode_chat(task, [user(text[i::2]) for i in range(2)]), "messages"),
        ):
            with pytest.raises(InvalidRequest, match=f"has {len(text)} characters, more than {len(text) - 1}") as error:
                await call
            assert error.value.param == param


@pytest.mark.parametrize("length", [0, CONTEXT - 1, CONTEXT])
async def test_a_prompt_must_have_tokens_and_leave_room_for_an_answer(
    prompts: Prompts, tokenizer: Any, length: int
) -> None:
    async def check() -> list[int]:
        return prompts.check_token_ids([1] * length)

    tokenizer.encode_segments = lambda pieces: [1] * length
    for call, param in (
        (prompts.encode_input(None, "x"), "prompt"),
        (prompts.encode_chat(None, [user("x")]), "messages"),
        (check(), "prompt"),
    ):
        if length == CONTEXT - 1:
            assert len(await call) == length
            continue
        with pytest.raises(InvalidRequest) as error:
            await call
        assert error.value.param == param


async def test_token_ids_must_be_in_the_vocabulary(prompts: Prompts) -> None:
    last = prompts.limit.vocabulary - 1
    assert prompts.check_token_ids([last, 0]) == [last, 0]
    for wrong in (last + 1, -1):
        with pytest.raises(InvalidRequest, match=f"within 0 to {last}$"):
            prompts.check_token_ids([0, wrong, 0])


async def test_labels_are_not_tokenized_after_a_disconnect_or_the_deadline(prompts: Prompts, tokenizer: Any) -> None:
    assert len(await prompts.encode_labels(None, "x", LABELS, time.monotonic() + 60)) == 50
    tokenizer.sizes.clear()
    checks: list[None] = []

    def disconnected() -> bool:
        checks.append(None)
        return len(checks) > 3

    await prompts.encode_labels(None, "x", LABELS, disconnected=disconnected)
    assert len(tokenizer.sizes) == 1 + 3, "the prompt alone, and with three labels"
    tokenizer.sizes.clear()
    with pytest.raises(DeadlineExceeded):
        await prompts.encode_labels(None, "x", LABELS, time.monotonic() - 1)
    assert len(tokenizer.sizes) == 1


async def test_prompt_times_labels_must_fit_into_the_queue(prompts: Prompts, tokenizer: Any) -> None:
    """In tokens, and before tokenizing in characters."""
    text = "x" * (CHARS_PER_TOKEN * 100 * CONTEXT // 50 + 1)
    tokenizer.encode_segments = lambda pieces: [1] * (3 * CONTEXT)
    prompts.limit = replace(prompts.limit, context=4 * CONTEXT)
    for prompt in (text, text[:-1]):
        with pytest.raises(NoCapacity, match="50 labels: together over 12800 tokens.*Send fewer labels"):
            await prompts.encode_labels(None, prompt, LABELS)
    assert len(await prompts.encode_labels(None, text[:-1], LABELS[:20])) == 20
    assert len(await prompts.encode_labels(None, text, LABELS[:1])) == 1


async def test_labels_are_tokenized_in_the_task_s_format(prompts: Prompts, tokenizer: Any) -> None:
    for task in (
        Task("mood", "Is {input} good?", FixedRoute(), "chat", system="Judge."),
        Task("mood", "Is {input} good?", FixedRoute()),
    ):
        pieces = tokenizer.render_task(task.prompt, task.format, task.system, "it")
        ids = tokenizer.encode_segments(pieces)
        expected = tokenizer.encode_continuations(pieces, ids, ["yes", "no"], task.format)
        assert await prompts.encode_labels(task, "it", ["yes", "no"]) == expected
    expected = tokenizer.encode_continuations(["it "], tokenizer.encode_segments(["it "]), ["a"], "raw")
    assert await prompts.encode_labels(None, "it ", ["a"]) == expected


@pytest.mark.parametrize(
    ("prompt", "total", "scored", "error"),
    [
        ("x", CONTEXT, 9, None),
        ("x", CONTEXT + 1, 9, f"prompt and label have {CONTEXT + 1}"),
        ("x", 4, 4, "form one token"),
        ("", 4, 4, "the prompt is empty"),
    ],
)
async def test_prompt_and_label_fill_the_context_at_most(
    prompts: Prompts, tokenizer: Any, prompt: str, total: int, scored: int, error: str | None
) -> None:
    tokenizer.encode_continuations = lambda *_: [([1] * 4, 2), ([1] * total, scored)]
    if error is None:
        assert len(await prompts.encode_labels(None, prompt, ["a", "b"])) == 2
        return
    with pytest.raises(InvalidRequest, match=error):
        await prompts.encode_labels(None, prompt, ["a", "b"])


async def test_earlier_answers_do_not_count_as_too_long(prompts: Prompts, tokenizer: Any) -> None:
    """Chat templates may drop parts of them."""
    tokenizer.encode_chat = lambda messages, **_: [1]
    long = "1 2 " * (CONTEXT * 4)
    conversation = [user("a"), user(long, "assistant")]
    assert await prompts.encode_chat(None, [*conversation, user("b")]) == [1] and not tokenizer.sizes
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.encode_chat(None, [user(long, "system"), *conversation])


async def test_a_task_wraps_the_last_user_message_once(prompts: Prompts, tokenizer: Any) -> None:
    rendered: list[Any] = []
    tokenizer.encode_chat = lambda messages, **_: rendered.append(messages) or [1]  # type: ignore[func-returns-value]
    task = Task("mood", "Q: {input}!", FixedRoute(), "chat", system="Be brief.")
    last = user("of {input}?") | {"name": "ada"}
    wrapped = last | {"content": "Q: of {input}?!"}
    before, after = [user("first"), user("yes", "assistant")], user("well", "assistant")
    await prompts.encode_chat(task, [*before, last, after])
    assert rendered.pop() == [user("Be brief.", "system"), *before, wrapped, after]
    await prompts.encode_chat(task, [user("Be long.", "system"), last])
    assert rendered.pop() == [user("Be long.", "system"), wrapped], "the client's system message replaces the task's"
    with pytest.raises(InvalidRequest, match="needs a user message"):
        await prompts.encode_chat(task, [user("Be long.", "system")])


async def test_a_raw_template_takes_one_user_message(prompts: Prompts, tokenizer: Any) -> None:
    task = Task("shots", "Say: {input}", FixedRoute(), "raw")
    expected = tokenizer.encode("Say: x")
    assert await prompts.encode_chat(task, [user("x")]) == await prompts.encode_input(task, "x") == expected
    for messages in ([user("x")] * 2, [user("x", "assistant")], [user("x", "system"), user("x")]):
        with pytest.raises(InvalidRequest, match="no place for a conversation"):
            await prompts.encode_chat(task, messages)


@pytest.mark.parametrize("format", ["raw", "chat"])
async def test_long_templates_are_tokenized_on_threads(prompts: Prompts, tokenizer: Any, format: Any) -> None:
    shots = Task("shots", "y " * 2500 + "{input}", FixedRoute(), format, system=None if format == "raw" else "z " * 10)
    threads: list[threading.Thread] = []

    def encode(pieces: Any) -> list[int]:
        if sum(len(piece) for piece in pieces if isinstance(piece, str)) > 5000:
            threads.append(threading.current_thread())
        return [1] * 20

    tokenizer.encode_segments = encode
    await prompts.encode_input(shots, "x")
    await prompts.encode_chat(shots, [user("x")])
    await prompts.encode_labels(shots, "x", ["a", "b"])
    assert len(threads) == 5 and threading.main_thread() not in threads


@pytest.mark.parametrize(("count", "on_main"), [(1, True), (100, False)])
async def test_many_messages_and_labels_are_encoded_on_threads(
    prompts: Prompts, tokenizer: Any, count: int, on_main: bool
) -> None:
    threads: list[threading.Thread] = []

    def recorded(result: Any) -> Any:
        threads.append(threading.current_thread())
        return result

    tokenizer.encode_chat = lambda messages, **_: recorded([1])
    tokenizer.encode_continuations = lambda *_: recorded([([1, 1], 1)])
    await prompts.encode_chat(None, [user("x")] * count)
    await prompts.encode_labels(None, "x" * 100, ["a"] * count)
    assert [thread is threading.main_thread() for thread in threads] == [on_main] * 2
