"""Generated requests, valid and invalid: no status 500, and no response that the OpenAPI document does not describe.

`make fuzz` runs the same test with 20,000 cases and more (hypothesis profile "fuzz").
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
KNOWN = {"name": "a", "task": "mood", "model": "tiny"}
"""Existing names, used in half of the paths."""
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)


SHORT = 5
"""Cases per operation and mode in the default profile."""


@st.composite
def cases(draw: st.DrawFn, operation: Any, mode: GenerationMode, named: dict[str, str]) -> Any:
    """A case of `operation`. Half of them use existing names and short prompts, so that they reach the engine."""
    realistic = draw(st.booleans())
    case = draw(operation.as_strategy(mode, path_parameters=named if realistic and named else None))
    body = case.body
    if realistic and isinstance(body, dict):
        if isinstance(body.get("prompt"), str):
            body["prompt"] = body["prompt"][:8]
        if isinstance(body.get("messages"), list):
            body["messages"] = body["messages"][:1]
        if isinstance(body.get("model"), str):
            body["model"] = draw(st.sampled_from(["tiny", "a", "mood"]))
        if isinstance(body.get("source"), str):
            body["source"] = draw(st.sampled_from(["a", "mood", ".", "../a", "nothing"]))
    return case


def has_inputs(operation: Any) -> bool:
    """Whether the operation has parameters or a body."""
    raw = operation.definition.raw
    return bool(raw.get("parameters") or raw.get("requestBody"))


def test_generated_requests(start, write_adapter) -> None:
    task = {"task": "mood", "prompt": "{input}", "labels": ["good", "bad"], "defaults": {"max_tokens": 3}}
    write_adapter("a", 1)
    write_adapter("mood", 3, task=task)
    live = start(max_context=48, deadline=5.0, max_body=1 << 16, max_upload=1 << 18)
    for name in ("a", "mood"):
        live.http.post("/adapters", json={"name": name, "source": name})
    schema = schemathesis.openapi.from_dict(live.http.get("/openapi.json").json(), config=SchemathesisConfig())
    schema.config.update(base_url=live.url)
    fuzzing = hypothesis.settings.get_current_profile_name() == "fuzz"
    each = hypothesis.settings().max_examples if fuzzing else SHORT
    seen: Counter[int] = Counter()

    def check(case: Any) -> None:
        answer = case.call(timeout=60)
        seen[answer.status_code] += 1
        assert answer.status_code != 500, (case.as_curl_command(), answer.text)
        if answer.status_code >= 400:
            assert set(answer.json()) == {"error"}
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        case.validate_response(answer, checks=CHECKS)

    limits = hypothesis.settings(
        max_examples=each, deadline=None, database=None, derandomize=not fuzzing, print_blob=False,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    for result in schema.get_all_operations():
        operation = result.ok()
        named = {k: v for k, v in KNOWN.items() if f"{{{k}}}" in operation.path}
        for mode in MODES if has_inputs(operation) else MODES[:1]:
            limits(given(cases(operation, mode, named))(check))()
    assert live.http.get("/health/ready").status_code == 200
    assert live.idle(20), "something still runs or is leased"
    assert live.generate(max_tokens=2).status_code == 200
    print(sum(seen.values()), "cases:", dict(sorted(seen.items())))  # noqa: T201  (for make fuzz, which shows it)
    assert sum(seen.values()) > 150 and seen[200]
