"""Chat templates: the sandbox, its limits, and what Transformers renders."""

from __future__ import annotations

from typing import Any

import pytest

from server.errors import BadModel, InvalidRequest
from server.model.chat_template import ChatTemplate, template_time
from tests.server.model.tokenizers_for_tests import bpe

LINES = """{% if tools is not none or documents is not none %}
tools
{% endif %}
{% for m in messages %}
    {% if m['role'] == 'user' %}
<|im_start|>{{ m | tojson }}{{ m['content'] | tojson(indent=1) }}{% generation %}{{ m.content }}{% endgeneration %}
    {% else %}{% continue %}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("generation_prompt", [True, False])
def test_rendering_equals_that_of_transformers(generation_prompt: bool) -> None:
    from transformers import PreTrainedTokenizerFast

    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "<it's> é & 日"}]
    oracle = PreTrainedTokenizerFast(tokenizer_object=bpe(["<|im_start|>", "<|im_end|>"]))
    options: dict[str, Any] = {"chat_template": LINES, "add_generation_prompt": generation_prompt}
    expected = oracle.apply_chat_template(messages, tokenize=False, **options)
    assert "é & 日" in expected and ChatTemplate(LINES, {}).render(messages, generation_prompt) == expected


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "wrote too much"),
        ("{{ ''.__class__.__mro__ }}", "'__class__' .* is unsafe"),
        ("{{ messages.append(1) }}", "'append' .* is unsafe"),
        ("{{ messages[0]['content'] / 0 }}", "division by zero"),
        ("{{ undefined_function() }}", "'undefined_function' is undefined"),
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{{ 'x' * 10**15 }}", "too much memory"),
        ("{{ '\\ud800' }}", "surrogates not allowed"),
    ],
)
def test_unsafe_or_failing_templates_are_invalid_requests(source: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        ChatTemplate(source, {}).render([{"role": "user", "content": 1}], True)


@pytest.mark.parametrize("source", ["{% for %}", "{% break %}", "{% if 1 %}" * 5000 + "{% endif %}" * 5000])
def test_a_template_that_does_not_parse(source: str) -> None:
    with pytest.raises(BadModel, match="does not parse"):
        ChatTemplate(source, {})


def test_the_time_can_be_fixed() -> None:
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}", {})
    with template_time(1_900_000_000):
        assert template.render([], True) == "17 Mar 2030"
    assert template.render([], True) != "17 Mar 2030"
