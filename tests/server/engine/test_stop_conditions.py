"""When answers end, and what text is delivered until then."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.request import Request, Sampling
from server.engine.sampler import SampledToken
from server.engine.stop_conditions import append_token
from server.model.detokenizer import Detokenizer
from server.model.tokenizer import ModelTokenizer


def answered(text: ModelTokenizer, tokens: list[int], **sampling: Any) -> tuple[str, str | None, int]:
    """The delivered text of these tokens, the finish reason, and the number of tokens."""
    request = Request("r", (3,), Sampling(**sampling), lambda delivery: None)
    request.detokenizer = Detokenizer(text, request.sampling.stop)
    shown = ""
    for token in tokens:
        delivery = append_token(request, SampledToken(token), text.vocabulary.eos_ids)
        shown += delivery.text
        if delivery.finish_reason is not None:
            return shown, delivery.finish_reason, len(request.output)
    return shown, None, len(request.output)


@pytest.mark.parametrize("least, told", [(0, ("a", "stop", 2)), (1, ("a", "stop", 2)), (2, ("aba", "stop", 4))])
def test_a_stop_string_has_no_effect_before_min_tokens(
    text: ModelTokenizer, least: int, told: tuple[str, str, int]
) -> None:
    assert answered(text, text.encode("abab"), max_tokens=9, min_tokens=least, stop=("b",)) == told


@pytest.mark.parametrize("end, most, told", [([2], 9, "stop"), ([], 3, "length")])
def test_text_held_back_for_a_stop_string_is_delivered_at_the_end(
    text: ModelTokenizer, end: list[int], most: int, told: str
) -> None:
    tokens = text.encode("abc") + end
    assert answered(text, tokens, max_tokens=most, stop=("bcd",)) == ("abc", told, len(tokens))


def test_a_stop_string_in_the_last_token_is_the_finish_reason(text: ModelTokenizer) -> None:
    assert answered(text, text.encode("abc"), max_tokens=3, stop=("c",)) == ("ab", "stop", 3)
