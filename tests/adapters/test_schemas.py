"""`base_notes`: whether an adapter names another base."""

from __future__ import annotations

import pytest

from adapters.schemas import base_notes

EMBEDDED = ("smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct")


@pytest.mark.parametrize(
    ("trained_on", "bases", "other"),
    [
        ("smollm2-135m", EMBEDDED, False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", EMBEDDED, False),
        ("mirror/smollm2-135m-instruct", EMBEDDED, False),
        ("SmolLM2-135M-Instruct", EMBEDDED, False),
        ("HuggingFaceTB/SmolLM2-135M", EMBEDDED, True),  # it was not trained to follow instructions
        ("meta-llama/Llama-3-8B", EMBEDDED, True),
        ("Qwen/Qwen2.5-7B", ("qwen2.5-7b",), False),
        ("/models/Qwen2.5-7B/", ("qwen2.5-7b",), False),
        ("Qwen/Qwen2.5-7B-Instruct", ("qwen2.5-7b",), True),
        (None, EMBEDDED, False),
        ("anything", (), False),
    ],
)
def test_an_adapter_that_names_another_base_gets_a_note(
    trained_on: str | None, bases: tuple[str, ...], other: bool
) -> None:
    notes = base_notes(trained_on, bases)
    assert bool(notes) == other
    assert not notes or (repr(trained_on) in notes[0] and repr(bases[0]) in notes[0])
