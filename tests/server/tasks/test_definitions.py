"""Task definitions and generation fields: any JSON is valid or refused, defaults, limits and routes."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.errors import InvalidChoice
from server.engine.request import Sampling
from server.errors import ContextExceeded, InvalidRequest
from server.tasks import sampling
from server.tasks.definitions import BestRoute, FixedRoute, Task, check_consistency, from_folder, parse, parse_choice
from server.tasks.sampling import ContextLimit

LIMIT = ContextLimit(context=100, vocabulary=1000)
WORDS = (
    "{input}", "{input}{input}", "raw", "chat", "choice", "best", "name", "weight", "metric", "accuracy", "source",
    "min_samples", "max_tokens", "temperature", "stop", "seed", "top_p", "a@123456", "a", "\ud800", "top_k", "n",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=20)
    | st.sampled_from([10**400, -(2**63), 1e308])
)  # fmt: skip
JSON = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(), v, max_size=4)
)
FIELDS = ("task", "prompt", "format", "system", "labels", "defaults", "route", "unknown")
ROUTES = st.fixed_dictionaries(
    {},
    optional={
        "choice": JSON | st.lists(st.fixed_dictionaries({"name": JSON}, optional={"weight": JSON}), max_size=3),
        "best": JSON | st.just(["a", "b"]),
        "metric": JSON,
        "source": JSON,
        "min_samples": JSON,
    },
)
DEFAULTS = st.dictionaries(st.sampled_from([*sampling.NUMBERS, "stop", "stop_token_ids", "ignore_eos", "x"]), JSON)


def parsed(**body: Any) -> Task:
    return parse("t", {"prompt": "{input}", **body}, default_route=FixedRoute(), source="api")


@given(
    st.sampled_from(["t", "", "a b", "x" * 65]),
    st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4),
    st.none() | st.fixed_dictionaries({"route": ROUTES}) | st.fixed_dictionaries({"defaults": DEFAULTS}),
)
def test_any_body_is_a_task_or_an_error_that_names_the_field(name: str, changed: Any, more: Any) -> None:
    body = {"prompt": "Is it?\n{input}", "format": "chat", "labels": ["yes", "no"], **changed, **(more or {})}
    try:
        task = parse(name, body, default_route=FixedRoute(), source="file")
    except (InvalidRequest, InvalidChoice) as error:
        assert error.message and error.param and len(error.message) < 2000
        return
    again = json.loads(json.dumps(task.body(), allow_nan=False))
    assert parse(name, again, default_route=FixedRoute(), source="file") == task


@given(DEFAULTS)
def test_any_defaults_are_a_sampling_or_an_error(defaults: dict[str, Any]) -> None:
    try:
        built = sampling.build({}, sampling.check_defaults(defaults), sampling.OWN_DEFAULTS, LIMIT, 10)
    except InvalidRequest as error:
        assert error.message
        return
    assert 1 <= built.max_tokens <= 90 and built.min_tokens <= built.max_tokens


@pytest.mark.parametrize(
    ("request_", "task", "server", "expected"),
    [
        ({}, {}, sampling.OWN_DEFAULTS, Sampling(max_tokens=64, temperature=0.0)),
        (
            {},
            {"max_tokens": 4, "top_p": 0.5},
            sampling.OWN_DEFAULTS,
            Sampling(max_tokens=4, temperature=0.0, top_p=0.5),
        ),
        ({"max_tokens": 8}, {"max_tokens": 4, "top_k": 2}, {"temperature": 0.0}, Sampling(8, temperature=0.0, top_k=2)),
        ({"temperature": None}, {}, sampling.OWN_DEFAULTS, Sampling(max_tokens=64, temperature=0.0)),
        ({}, {}, sampling.CHAT_DEFAULTS, Sampling(max_tokens=90, temperature=1.0)),
        ({}, {}, sampling.COMPLETION_DEFAULTS, Sampling(max_tokens=16, temperature=1.0)),
        ({}, {"max_tokens": 5000}, {}, Sampling(max_tokens=90)),
        ({"max_tokens": 5}, {"min_tokens": 6}, {}, Sampling(max_tokens=5, min_tokens=5)),
        ({"seed": -1}, {}, {"max_tokens": 1}, Sampling(max_tokens=1, seed=2**63 - 1)),
        ({"stop": "."}, {}, {"max_tokens": 1}, Sampling(max_tokens=1, stop=(".",))),
    ],
)
def test_the_request_wins_over_the_task_and_the_task_over_the_server(
    request_: Any, task: Any, server: Any, expected: Sampling
) -> None:
    assert sampling.build(request_, task, server, LIMIT, 10) == expected


@pytest.mark.parametrize(
    ("request_", "longest_prompt", "error", "message"),
    [
        ({"max_tokens": 91}, 10, ContextExceeded, "max_tokens is 91, but the prompt's 10 tokens leave 90 .*at most 90"),
        ({"max_tokens": 101}, 0, ContextExceeded, "prompt and answer share a context of 100; ask for less"),
        ({"max_tokens": 5, "min_tokens": 6}, 10, InvalidRequest, "min_tokens is over the 5 tokens"),
        ({"stop_token_ids": [1000]}, 10, InvalidRequest, "1000 is no token id; the vocabulary has 1000"),
    ],
)
def test_fields_that_do_not_fit_are_refused(request_: Any, longest_prompt: int, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        sampling.build(request_, {}, {}, LIMIT, longest_prompt)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_tokens", 0, "must be a whole number from 1 to 1,000,000$"),
        ("max_tokens", 1.0, "whole number"),
        ("repetition_penalty", 0, r"must be a number from 0\.01 to 10$"),
        ("top_p", 0, "over 0 to 1$"),
        ("temperature", True, "must be a number"),
    ],
)
def test_numbers_out_of_bounds_are_refused(field: str, value: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        sampling.NUMBERS[field].check(field, value)


def test_a_prompt_must_leave_room_for_an_answer() -> None:
    LIMIT.check_prompt(99)
    for tokens, message in ((100, "maximum context length is 100 tokens.*the prompt has 100"), (0, "prompt is empty")):
        with pytest.raises(InvalidRequest, match=message):
            LIMIT.check_prompt(tokens)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ({}, BestRoute(("a", "b"), "accuracy", "feedback", 200)),
        ({"metric": "rougeL"}, BestRoute(("a", "b"), "rougeL", "evaluation", 200)),
        ({"source": "evaluation", "min_samples": 9}, BestRoute(("a", "b"), "accuracy", "evaluation", 9)),
    ],
)
def test_feedback_is_the_default_source_of_accuracy_only(route: Any, expected: BestRoute) -> None:
    assert parsed(route={"best": ["a", "b"], **route}).route == expected
    with pytest.raises(InvalidRequest, match="set source to evaluation"):
        parsed(route={"best": ["a", "b"], "metric": "chrf", "source": "feedback"})


def test_a_route_allows_its_own_choices_in_any_version() -> None:
    fixed, best = FixedRoute((("a@123456", 0.7), ("b", -0.3), ("c", 0.0))), BestRoute(("a", "b@123456"))
    assert fixed.allows([("b", float(np.float32(-0.3))), ("a", 0.7)])
    assert not fixed.allows([("b", -0.3), ("a", 0.71)])
    assert FixedRoute().allows([]) and not fixed.allows([])
    assert best.allows([("b", 1.0)]) and not best.allows([("b", 0.5)]) and not best.allows([("c", 1.0)])


@pytest.mark.parametrize("weight", [17, -16.5, 10**400, float("nan"), float("inf")])
def test_weights_must_be_finite_and_at_most_16(weight: float) -> None:
    with pytest.raises(InvalidChoice, match="from -16 to 16"):
        parse_choice([{"name": "a", "weight": weight}], "route")


def test_versions_of_a_route_are_listed_by_adapter() -> None:
    task = parsed(route={"best": ["a@C2A7A51E", "a@123456", "b@123456", "a"]})
    assert task.adapters == ("a", "b") and task.versions("a") == {"c2a7a51e", "123456"} and task.versions("c") == set()


def test_a_folder_task_has_the_name_and_the_route_of_its_adapter() -> None:
    task = from_folder("a", {"prompt": "{input}"})
    assert (task.name, task.route, task.source) == ("a", FixedRoute((("a", 1.0),)), "file")
    for body in ({"task": "none"}, {"task": "tiny"}, {"task": 3}, []):
        with pytest.raises(InvalidRequest, match="must be an object" if body == [] else "cannot be the name of a task"):
            from_folder("a", body if body == [] else {"prompt": "{input}", **body}, reserved=("tiny",))  # type: ignore[dict-item]


@pytest.mark.parametrize("defaults", [{"min_tokens": 5, "max_tokens": 4}, {"stop_token_ids": [10]}])
def test_defaults_must_be_consistent_with_each_other_and_the_vocabulary(defaults: Any) -> None:
    with pytest.raises(InvalidRequest, match="more than max_tokens|no token id"):
        check_consistency(parsed(defaults=defaults), 10)
