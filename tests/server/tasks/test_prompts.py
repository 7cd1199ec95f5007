"""A client's words on their way to ids: what is refused before it costs anything."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from server.engine.text import Text
from server.errors import DeadlineExceeded, InvalidRequest
from server.model.loader import Base
from server.tasks.definitions import Fixed, Task
from server.tasks.prompts import SEAM, USUAL, Prompts
from server.tasks.sampling import Room

CONTEXT = 128


class Counting(Text):
    """Notes how long the texts are that it is asked to tokenize."""

    def __init__(self, vocabulary: Any) -> None:
        self.sizes: list[int] = []
        super().__init__(vocabulary)
        del self.sizes[:]

    def encode_pieces(self, pieces: Any) -> list[int]:
        pieces = list(pieces)
        self.sizes.append(sum(len(piece) for piece in pieces if isinstance(piece, str)))
        return super().encode_pieces(pieces)


@pytest.fixture
def prompts(tiny_base: Base) -> Prompts:
    return Prompts(Counting(tiny_base.vocabulary), Room(CONTEXT, tiny_base.config.vocab_size), 100)


LONG = "1 2 " * (CONTEXT * 100 // 4)


async def test_of_a_text_far_too_long_a_beginning_is_looked_at(prompts: Prompts) -> None:
    refused = f"first {USUAL * CONTEXT} alone are more tokens"
    with pytest.raises(InvalidRequest, match=refused):
        await prompts.of_input(None, LONG)
    with pytest.raises(InvalidRequest, match=refused) as messages:
        await prompts.of_chat(None, [{"role": "user", "content": LONG[i::2]} for i in range(2)])
    assert messages.value.param == "messages"
    with pytest.raises(InvalidRequest, match=refused):
        await prompts.of_labels(None, LONG, ["a", "b"])
    assert max(prompts.text.sizes) == USUAL * CONTEXT


async def test_a_beginning_says_nothing_of_what_may_fit(prompts: Prompts) -> None:
    few = "x" * (USUAL * CONTEXT) + " "
    prompts.text.encode_pieces = lambda pieces: [1] * (CONTEXT + SEAM if len(pieces[0]) < len(few) else CONTEXT - 1)  # type: ignore[method-assign]
    assert len(await prompts.of_input(None, few)) == CONTEXT - 1


async def test_labels_are_not_tokenized_with_a_prompt_that_is_too_long(prompts: Prompts) -> None:
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.of_labels(None, "1 2 " * CONTEXT, [str(i) for i in range(50)])
    assert len(prompts.text.sizes) == 1


@pytest.mark.parametrize("format", ["raw", "chat"])
async def test_a_long_template_is_tokenized_on_a_thread(prompts: Prompts, format: Any) -> None:
    """The event loop would answer nobody meanwhile, however short the prompt is."""
    shots = Task("shots", "y " * 2500 + "{input}", Fixed(), format, system=None if format == "raw" else "z " * 10)
    whole: list[bool] = []

    def encode(pieces: Any) -> list[int]:
        if sum(len(piece) for piece in pieces if isinstance(piece, str)) > 5000:
            whole.append(threading.current_thread() is threading.main_thread())
        return [1] * 20

    prompts.text.encode_pieces = encode  # type: ignore[method-assign]
    await prompts.of_input(shots, "x")
    await prompts.of_chat(shots, [{"role": "user", "content": "x"}])
    await prompts.of_labels(shots, "x", ["a", "b"])
    assert len(whole) == 5 and not any(whole)


async def test_labels_are_not_tokenized_with_a_template_that_is_too_long(prompts: Prompts) -> None:
    shots = Task("shots", "1 2 " * CONTEXT + "{input}", Fixed())
    with pytest.raises(InvalidRequest, match="alone are more tokens"):
        await prompts.of_labels(shots, "x", [str(i) for i in range(50)])
    assert len(prompts.text.sizes) == 1


async def test_a_deadline_ends_the_tokenizing_of_labels(prompts: Prompts) -> None:
    labels = [str(i) for i in range(50)]
    assert len(await prompts.of_labels(None, "x", labels, time.monotonic() + 60)) == 50
    del prompts.text.sizes[:]
    with pytest.raises(DeadlineExceeded):
        await prompts.of_labels(None, "x", labels, time.monotonic() - 1)
    assert len(prompts.text.sizes) == 1, "the prompt's own"
