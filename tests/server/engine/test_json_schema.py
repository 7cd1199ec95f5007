"""Schemas that are refused or rewritten before the compiler sees them."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pytest

from server.engine.grammar import Grammar, Grammars
from server.engine.json_schema import prepare_schema
from server.errors import InvalidRequest, UnsupportedParameter
from server.model.tokenizer import ModelTokenizer

A_UUID = "0b2e61a4-9c1d-4a6e-8f0a-0123456789ab"
FAR = 2**53
HUGE = "patterns exceed 20,000"


@pytest.fixture(scope="module")
def grammars(tools: Any) -> Grammars:
    text = tools.make_text()
    return Grammars(text, text.size)


def allows(grammars: Grammars, schema: dict[str, Any], answer: Any) -> bool:
    """Whether the schema allows the answer, as JSON, to be generated and to end there."""
    text: ModelTokenizer = grammars._text
    grammar = Grammar(grammars._compile(json.dumps(prepare_schema(schema))), grammars._ends)
    for token in [*text.encode(json.dumps(answer), add_bos=False, prefix_space=False), min(text.vocabulary.eos_ids)]:
        if not np.unpackbits(grammar.mask(), bitorder="little")[token]:
            return False
        grammar.accept(token)
    return True


@pytest.mark.parametrize(
    ("schema", "allowed", "forbidden"),
    [
        ({"type": "string", "format": "uuid4"}, A_UUID, A_UUID.replace("-4a6e", "-5a6e")),
        ({"type": "string", "format": "ulid", "pattern": "^[0-9A-Z]{3}$"}, "0AZ", "0az"),
        ({"type": "string", "format": "uuid4", "pattern": "^[a-z]{3}$"}, "abc", A_UUID),
        ({"type": "string", "format": "date"}, "2024-02-29", "2024-13-01"),
        ({"type": "string", "format": "password"}, "any one", 1),
        ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
         {"a": 1}, {"a": "b"}),
        ({"properties": {"format": {"const": "a"}, "propertyNames": {"const": 1}}, "required": ["format"]},
         {"format": "a", "propertyNames": 1}, {"format": "b"}),
        ({"$schema": "http://json-schema.org/schema#", "enum": [1]}, 1, 2),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "enum": [1]}, 1, 2),
        ({"$id": "Output Format", "enum": [1]}, 1, 2),
        ({"$id": "https://a.b/c.json", "$defs": {"d": {"$id": "d.json", "enum": [1]}}, "$ref": "d.json"}, 1, 2),
        ({"$ref": "#/$defs/default", "$defs": {"default": {"const": 1}}}, 1, 2),
        ({"$ref": "#/properties/%24defs/anyOf/0", "properties": {"$defs": {"anyOf": [{"const": 1}]}}}, 1, 2),
        ({"items": {"$ref": "#"}, "type": "array", "uniqueItems": False}, [[]], [1]),
        ({"type": "string", "pattern": '^[^"]+$'}, "a\\b", 'He said "yes"'),
        ({"type": "string", "pattern": r"^[^\\]+$"}, 'a "b"', "a\\b"),
    ],
)  # fmt: skip
def test_keywords_that_the_compiler_alone_would_refuse_are_handled(
    grammars: Grammars, schema: dict[str, Any], allowed: Any, forbidden: Any
) -> None:
    assert allows(grammars, schema, allowed) and not allows(grammars, schema, forbidden)


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"propertyNames": {"enum": ["a"]}}, "Unimplemented keys"),
        ({"propertyNames": 1}, "Unimplemented keys"),
        ({"uniqueItems": True, "type": "array"}, "Unimplemented keys"),
        ({"type": "string", "format": "iri"}, "Unknown format"),
        ({"type": "string", "format": "uri-reference", "pattern": "^.*$"}, "Unknown format"),
    ],
)
def test_keywords_that_are_not_enforced_are_an_unsupported_parameter(
    grammars: Grammars, schema: dict[str, Any], error: str
) -> None:
    with pytest.raises(UnsupportedParameter, match=error) as refused:
        grammars.ask({"type": "object", **schema}, 1).result()
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("schema", "error"),
    [
        ({"pattern": "^(a{1000}){500}$"}, HUGE),
        ({"pattern": "^((a{100}){100}){100}$"}, HUGE),
        ({"pattern": "^a{99999999999}$"}, HUGE),
        ({"pattern": r"^(\x{61}{1000}){1000}$"}, HUGE),
        ({"pattern": r"^((?:\u0061{1000}){100}){10}$"}, HUGE),
        ({"pattern": r"^(?:[a]{1000}|x){500}$"}, HUGE),
        ({"pattern": "a" + "{1000000}" * 3000}, HUGE),
        ({"properties": {"x": {"items": {"pattern": "^[xy]+z(a{1000}){1000}$"}}}}, HUGE),
        ({"patternProperties": {"^(a{1000}){500}$": {}}}, HUGE),
        ({"$defs": {"const": {"properties": {"default": {"pattern": "^(a{1000}){500}$"}}}}}, HUGE),
        ({"allOf": [{"pattern": f"^{c}{{12000}}$"} for c in "ab"]}, HUGE),
        ({"type": "number", "multipleOf": 99_991}, "least common multiple"),
        ({"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 0.991}]}, "least common multiple"),
        ({"enum": [1, 1234567890123456789]}, "over 2^53"),
        ({"const": {"a": [{"b": -(10**19)}]}}, "over 2^53"),
        ({"minimum": 10**400, "maximum": 0.5}, "minimum 1000"),
        ({"minimum": FAR + 1}, "beyond 2^53"),
        ({"type": "integer", "minimum": -1e19, "maximum": -1e19}, "maximum -1e+19 is beyond 2^53"),
        ({"type": "integer", "exclusiveMinimum": FAR}, "beyond 2^53"),
        ({"type": "integer", "minimum": 2.0**60, "exclusiveMinimum": True}, "beyond 2^53"),
        ({"items": {"exclusiveMaximum": -(10**400)}}, "beyond 2^53"),
        ({"maximum": float("nan")}, "beyond 2^53"),
        ({"x-guidance": {"lenient": True}}, "x-guidance is not supported"),
        ({"pattern": r"^[\x00-\x1f]$"}, "contains control characters"),
        ({"pattern": r'^[^]"]$'}, "contains control characters"),
        ({"pattern": r'^[^"&&a]$'}, "cannot be enforced; write it differently"),
        ({"patternProperties": {'^[^"]$': {}}}, "set additionalProperties to false"),
        ({"patternProperties": {f"^a{i}b": {} for i in range(65)}}, "65 patternProperties; the limit is 64"),
        ({"allOf": [{"pattern": f"a{i}b"} for i in range(13)]}, "13 patterns and formats; the limit is 12"),
        (
            {"$ref": "#/d/0", "d": {f"{i}": {"$ref": f"#/d/{i + 1}", "pattern": f"a{i}b"} for i in range(13)}},
            "13 patterns and formats",
        ),
        ({"anyOf": [{"properties": {"k": {"format": f"f{i}"}}} for i in range(13)], "items": {}}, "remove allOf"),
        ({"$ref": "#/default", "default": {"minimum": -1e19, "maximum": -1e19}}, "points into default"),
        ({"$ref": "#/%64efault", "default": {"type": "integer"}}, "points into default"),
        ({"$ref": "json-schema:///#/enum/0", "enum": [{}]}, "points into enum"),
        ({"d": {"x-a": {}}, "items": {"$ref": "#/d/x-a"}}, "points into x-a"),
        ({"$ref": "#/$defs", "$defs": {"type": "integer"}}, "points to a map of schemas"),
        ({"$defs": {"a": {"dependencies": {"const": {"$id": "u:v", "maximum": -1e19}}}}, "$ref": "u:v"}, "beyond"),
    ],
)
def test_schemas_that_are_expensive_or_not_enforced_are_refused(schema: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(error)) as refused:
        prepare_schema(schema)
    assert refused.value.param == "response_format"


def test_deeply_nested_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        prepare_schema(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": r"^\d{3}-\d{4}$"},
        {"pattern": "^.{0,20000}$"},
        {"pattern": r"^[\w\s]+\\[x\]]$"},
        {"pattern": r"^[\p{L}&&[^a]]$"},
        {"pattern": "^a{2,}b*(c|d)?$", "enum": [FAR, -FAR, 1.5, True, None, "x"]},
        {"exclusiveMinimum": 0.5, "maximum": 1},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 0},
        {"exclusiveMinimum": -1, "exclusiveMaximum": 1},
        {"type": "integer", "minimum": -FAR, "maximum": FAR},
        {"properties": {"minimum": {"type": "boolean"}, "multipleOf": {"type": "string"}}},
        {"example": {"const": 10**19}, "x-note": {"pattern": '^[^"]$'}},
        {"const": {"pattern": '^[^"]$'}, "enum": [{"exclusiveMinimum": 0}], "default": {"pattern": '[^"]'}},
        {"properties": {"x": {"const": {"multipleOf": 99_991}}}},
        {"patternProperties": {f"^a{i}b": {} for i in range(64)}},
        {"allOf": [{"$ref": "#/d"}], "title": "one", "d": {"anyOf": [{"pattern": f"a{i}b"} for i in range(13)]}},
        {"allOf": [{"pattern": f"a{i % 12}b"} for i in range(24)]},
        {"allOf": [{"multipleOf": 3600}, {"multipleOf": 0.5}]},
    ],
)
def test_enforceable_schemas_and_data_are_unchanged(schema: dict[str, Any]) -> None:
    assert prepare_schema(schema) == schema


@pytest.mark.parametrize(
    ("pattern", "prepared"),
    [
        ('^[^"]*$', r'^[^\x00-\x1f"]*$'),
        (r"^[A-Z][^\"\\]{2}$", r"^[A-Z][^\x00-\x1f\"\\]{2}$"),
        (r"^[^\p{L}\"]+$", r"^[^\x00-\x1f\p{L}\"]+$"),
        ('^[^"[a]$', r'^[^\x00-\x1f"[a]$'),
        (r"\[[^!-/-]", r"\[[^\x00-\x1f!-/-]"),
    ],
)
def test_classes_without_the_quotation_mark_exclude_control_characters(pattern: str, prepared: str) -> None:
    closed = {"additionalProperties": False}
    assert prepare_schema({"pattern": pattern, "items": [{"patternProperties": {pattern: {}}, **closed}]}) == {
        "pattern": prepared,
        "items": [{"patternProperties": {prepared: {}}, **closed}],
    }


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, [0.25, 0.5], [0, 0.0, 0.75]),
        ({"exclusiveMinimum": 2, "exclusiveMaximum": 2.5}, [2.25], [2, 2.0, 2.5]),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, [-0.25, -0.5], [0, -0.0]),
        ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}, [0.25], [0]),
        ({"$ref": "#/$defs/a", "maximum": 0.5, "$defs": {"a": {"exclusiveMinimum": 0}}}, [0.25], [0]),
        ({"exclusiveMinimum": 10**9, "maximum": 10**9 + 0.5}, [10**9 + 0.25], [10**9]),
        ({"minimum": -(10**15) - 0.75, "exclusiveMaximum": -(10**15)}, [-(10**15) - 0.5], [-(10**15)]),
        ({"minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}, [0.25, 0.5], [0, 0.0]),
        ({"minimum": 0, "exclusiveMinimum": False, "maximum": 1, "exclusiveMaximum": True}, [0, 0.5], [1]),
        ({"exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": False}, [-5, 1], [2]),
        ({"type": "integer", "allOf": [{"exclusiveMinimum": 0}]}, [1], [0]),
        ({"maximum": 2**63 - 1, "type": "integer"}, [0, FAR], [FAR + 2, 2**63]),
        ({"exclusiveMaximum": 2**60, "minimum": -(2**63)}, [0, FAR, -FAR], [2**60, -(2**60)]),
        ({"maximum": 7, "exclusiveMaximum": 2**60}, [7], [8]),
        ({"exclusiveMinimum": float("-inf"), "maximum": 7}, [7, -FAR], [8]),
    ],
)
def test_bounds_are_enforced(
    grammars: Grammars, schema: dict[str, Any], inside: list[float], outside: list[float]
) -> None:
    schema = {"type": "number", **schema}
    assert all(allows(grammars, schema, value) for value in inside)
    assert not any(allows(grammars, schema, value) for value in outside)


@pytest.mark.parametrize(
    ("schema", "limit"),
    [
        ({}, 1),
        ({"required": ["a"]}, 2),
        ({"required": ["a", "a"], "properties": {"a": {}, "b": {}}}, 1),
        ({"patternProperties": {"a": {}}, "additionalProperties": False}, 1),
        ({"required": ["a"], "properties": {"a": {}, "b": {}}, "additionalProperties": False}, 2),
    ],
)
def test_min_properties_is_refused_where_repeated_names_could_satisfy_it(
    grammars: Grammars, schema: dict[str, Any], limit: int
) -> None:
    schema = {"type": "object", **schema}
    grammars.ask({**schema, "minProperties": limit}, 1).result()
    with pytest.raises(UnsupportedParameter, match=f"it may be at most {limit}"):
        prepare_schema({**schema, "minProperties": 3})


def test_an_overlapping_one_of_is_refused_with_advice(grammars: Grammars) -> None:
    with pytest.raises(InvalidRequest, match=r"alternatives of a oneOf may match .*; use anyOf") as refused:
        grammars.ask({"oneOf": [{"type": "integer"}, {"type": "number"}]}, 1).result()
    assert not isinstance(refused.value, UnsupportedParameter)
