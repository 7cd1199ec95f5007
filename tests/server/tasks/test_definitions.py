"""Task bodies, whatever they are: a task or a named complaint. And how the layers of settings meet."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidChoice
from server.engine.request import Sampling
from server.errors import InvalidRequest
from server.tasks import sampling
from server.tasks.definitions import BestRoute, FixedRoute, parse, parse_choice
from server.tasks.sampling import ContextLimit

ROOM = ContextLimit(context=100, vocabulary=1000)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
KEYS = ("prompt", "format", "system", "labels", "defaults", "route", "task", "surplus")


@given(st.dictionaries(st.sampled_from(KEYS), JSON | st.just("x {input}"), max_size=6))
def test_any_body_is_a_task_or_a_named_complaint(body: dict[str, Any]) -> None:
    try:
        task = parse("name", body, default_route=FixedRoute(), source="api")
    except (InvalidRequest, InvalidChoice) as error:
        assert error.message and error.param
        return
    again = parse("name", json.loads(json.dumps(task.body())), default_route=FixedRoute(), source="api")
    assert again == task


@given(st.dictionaries(st.sampled_from([*sampling.NUMBERS, "stop", "stop_token_ids", "ignore_eos", "other"]), JSON))
def test_any_defaults_make_a_sampling_or_a_complaint(defaults: dict[str, Any]) -> None:
    try:
        checked = sampling.check_defaults(defaults)
        made = sampling.build({}, checked, sampling.OWN_DEFAULTS, ROOM, 10)
    except InvalidRequest as error:
        assert error.message
        return
    assert 1 <= made.max_tokens <= 90 and made.min_tokens <= made.max_tokens


def build(asked: dict[str, Any], task: dict[str, Any] | None = None, server: Any = sampling.OWN_DEFAULTS) -> Sampling:
    return sampling.build(asked, task or {}, server, ROOM, 10)


def test_request_over_task_over_server() -> None:
    assert build({}) == Sampling(max_tokens=64, temperature=0.0)
    assert build({}, {"max_tokens": 4, "temperature": 0.5}).max_tokens == 4
    both = build({"max_tokens": 8}, {"max_tokens": 4, "temperature": 0.5})
    assert (both.max_tokens, both.temperature) == (8, 0.5)
    assert build({}, server=sampling.CHAT_DEFAULTS) == Sampling(max_tokens=90, temperature=1.0)
    assert build({}, server=sampling.COMPLETION_DEFAULTS).max_tokens == 16
    assert build({"temperature": None}).temperature == 0.0


def test_lengths_against_the_context() -> None:
    assert build({}, {"max_tokens": 5000}).max_tokens == 90, "a task's length is clipped"
    with pytest.raises(InvalidRequest, match=r"91.*90"):
        build({"max_tokens": 91})
    with pytest.raises(InvalidRequest, match="min_tokens"):
        build({"max_tokens": 5, "min_tokens": 6})
    assert build({"max_tokens": 5}, {"min_tokens": 6}).min_tokens == 5
    with pytest.raises(InvalidRequest, match="to 1,000,000"):
        sampling.NUMBERS["max_tokens"].check("max_tokens", 0)
    with pytest.raises(InvalidRequest, match=r"from 0\.01 to 10$"):
        sampling.NUMBERS["repetition_penalty"].check("repetition_penalty", 0)
    with pytest.raises(InvalidRequest, match=r"100 tokens.*100"):
        ROOM.check_prompt(100)


def test_seeds_are_taken_modulo_63_bits() -> None:
    assert build({"seed": -1}).seed == 2**63 - 1 and build({"seed": 5}).seed == 5


def test_feedback_decides_accuracy_and_evaluation_everything() -> None:
    def route(**given: object) -> object:
        body = {"prompt": "{input}", "route": {"best": ["a", "b"], **given}}
        return parse("t", body, default_route=FixedRoute(), source="api").route

    assert route() == BestRoute(("a", "b"), "accuracy", "feedback", 200)
    assert route(metric="rougeL") == BestRoute(("a", "b"), "rougeL", "evaluation", 200)
    assert route(source="evaluation", min_samples=9) == BestRoute(("a", "b"), "accuracy", "evaluation", 9)
    with pytest.raises(InvalidRequest, match="set source to evaluation"):
        route(metric="chrf", source="feedback")


def test_a_route_knows_the_choices_that_it_leads_to() -> None:
    fixed, best = FixedRoute((("a@123456", 0.7), ("b", -0.3), ("c", 0.0))), BestRoute(("a", "b@123456"))
    assert fixed.allows([("b", float(np.float32(-0.3))), ("a", 0.7)])
    assert not fixed.allows([("b", -0.3), ("a", 0.71)])
    assert FixedRoute().allows([]) and not fixed.allows([])
    assert best.allows([("b", 1.0)]) and not best.allows([("b", 0.5)]) and not best.allows([("c", 1.0)])


@pytest.mark.parametrize("weight", [17, -16.5, 10**400, float("nan"), float("inf")])
def test_a_weight_that_is_no_finite_number_up_to_16_is_refused(weight: float) -> None:
    with pytest.raises(InvalidChoice, match="from -16 to 16"):
        parse_choice([{"name": "a", "weight": weight}], "route")


def test_a_task_tells_which_versions_it_names() -> None:
    best = ["a@C2A7A51E", "a@123456", "b@123456", "a"]
    task = parse("t", {"prompt": "{input}", "route": {"best": best}}, default_route=FixedRoute(), source="file")
    assert task.versions("a") == {"c2a7a51e", "123456"} and task.versions("c") == set()
