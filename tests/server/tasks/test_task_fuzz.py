"""Made-up task files: parsed, or refused as InvalidRequest; nothing else ever comes out."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from server.errors import InvalidRequest
from server.tasks.definitions import FixedRoute, parse

GOOD: dict[str, Any] = {"prompt": "Is it?\n{input}", "format": "chat", "labels": ["yes", "no"]}
KEYS = ("task", "prompt", "format", "system", "labels", "defaults", "route", "made up")
WORDS = (
    "{input}", "{input}{input}", "raw", "chat", "choice", "best", "name", "weight", "metric", "accuracy", "source",
    "min_samples", "max_tokens", "temperature", "stop", "seed", "top_p", "a@123456", "a", "\ud800", "top_k", "n",
)  # fmt: skip
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=20)
    | st.sampled_from([10**400, -(2**63), 1e308])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(), v, max_size=4)
)
ROUTES = st.fixed_dictionaries(
    {},
    optional={
        "choice": VALUES | st.lists(st.fixed_dictionaries({"name": VALUES}, optional={"weight": VALUES}), max_size=3),
        "best": VALUES | st.just(["a", "b"]),
        "metric": VALUES,
        "source": VALUES,
        "min_samples": VALUES,
    },
)
DEFAULTS = st.dictionaries(st.sampled_from(WORDS), VALUES, max_size=3)


@given(
    st.sampled_from(["t", "", "a b", "x" * 65]),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4),
    st.none() | st.fixed_dictionaries({"route": ROUTES}) | st.fixed_dictionaries({"defaults": DEFAULTS}),
)
def test_any_body(name: str, changed: dict, more: dict | None) -> None:
    try:
        task = parse(name, {**GOOD, **changed, **(more or {})}, default_route=FixedRoute(()), source="file")
    except InvalidRequest as error:
        assert len(error.message) < 2000
        return
    again = json.loads(json.dumps(task.body(), allow_nan=False))
    assert parse(name, again, default_route=FixedRoute(()), source="file") == task
