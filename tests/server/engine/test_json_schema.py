"""What a schema may ask for before it is compiled: what takes too long, and what would be let through all the same."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest

from server.engine.grammar import Grammar, Grammars
from server.engine.json_schema import prepared
from server.errors import InvalidRequest, UnsupportedParameter
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary


@pytest.fixture
def tiny_text(tiny_vocabulary: Vocabulary) -> ModelTokenizer:
    return ModelTokenizer(tiny_vocabulary)


@pytest.fixture
def grammars(tiny_text: ModelTokenizer) -> Grammars:
    return Grammars(tiny_text, tiny_text.size)


def takes(grammars: Grammars, text: ModelTokenizer, schema: dict[str, Any], answer: Any) -> bool:
    """Whether the answer, as JSON, may be given, and end there."""
    [grammar] = grammars.ask(schema, 1).result()
    return lets_through(grammar, text, answer)


def lets_through(grammar: Grammar, text: ModelTokenizer, answer: Any) -> bool:
    """The same of a grammar at its beginning."""
    for token in [*text.encode(json.dumps(answer), add_bos=False, prefix_space=False), min(text.vocabulary.eos_ids)]:
        if not np.unpackbits(grammar.mask(), bitorder="little")[token]:
            return False
        grammar.accept(token)
    return True


A_UUID = "0b2e61a4-9c1d-4a6e-8f0a-0123456789ab"


@pytest.mark.parametrize(
    ("schema", "may", "may_not"),
    [
        ({"type": "string", "format": "uuid4"}, A_UUID, A_UUID.replace("-4a6e", "-5a6e")),
        ({"type": "string", "format": "uuid7"}, A_UUID.replace("-4a6e", "-7a6e"), A_UUID),
        ({"type": "string", "format": "ulid", "pattern": "^[0-9A-Z]{3}$"}, "0AZ", "0az"),
        ({"type": "string", "format": "uuid4", "pattern": "^[a-z]{3}$"}, "abc", A_UUID),
        ({"type": "string", "format": "date"}, "2024-02-29", "2023-02-29"),
        ({"type": "string", "format": "date"}, "2000-02-29", "1900-02-29"),
        ({"type": "string", "format": "date-time"}, "1996-02-29T23:59:60.5+01:00", "1997-02-29T00:00:00Z"),
        ({"type": "string", "format": "date", "pattern": "^2"}, "2023-01-31", "1999-01-31"),
        ({"type": "string", "format": "password"}, "any one", 1),
        ({"type": "string", "format": "path", "maxLength": 3}, "/a", "/a/b"),
        ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
         {"a": 1}, {"a": "b"}),
        ({"properties": {"format": {"const": "a"}, "propertyNames": {"const": 1}}, "required": ["format"]},
         {"format": "a", "propertyNames": 1}, {"format": "b"}),
        ({"$schema": "http://json-schema.org/schema#", "enum": [1]}, 1, 2),
        ({"$schema": "https://json-schema.org/draft-07/schema#", "enum": [1]}, 1, 2),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "enum": [1]}, 1, 2),
        ({"$schema": "https://json-schema.org/draft/2020-12/schema", "enum": [1]}, 1, 2),
        ({"$id": "Output Format", "enum": [1]}, 1, 2),
        ({"$defs": {"Item": {"const": 1}},
          "properties": {"a": {"$id": "an Order", "$defs": {"Item": {"const": 2}}, "$ref": "#/$defs/Item"}}},
         {"a": 2}, {"a": 1}),
        ({"properties": {"a": {"$id": "the a", "$schema": "ours", "enum": [1]}, "$id": {"enum": [2]}}},
         {"a": 1, "$id": 2}, {"$id": 1}),
        ({"$id": "https://a.b/c.json", "$defs": {"d": {"$id": "d.json", "enum": [1]}}, "$ref": "d.json"}, 1, 2),
        ({"$ref": "#/$defs/default", "$defs": {"default": {"const": 1}}}, 1, 2),
        ({"$ref": "#/properties/%24defs/anyOf/0", "properties": {"$defs": {"anyOf": [{"const": 1}]}}}, 1, 2),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 1}}}, 1, 2),
        ({"$ref": "#one", "$defs": {"x-a": {"$anchor": "one", "const": 1}}}, 1, 2),
        ({"items": {"$ref": "#"}, "type": "array"}, [[]], [1]),
    ],
)  # fmt: skip
def test_what_clients_write_beside_what_they_ask_for_is_no_reason_to_refuse(
    grammars: Grammars, tiny_text: ModelTokenizer, schema: dict[str, Any], may: Any, may_not: Any
) -> None:
    """Formats that a pattern says in full, or that ask for nothing, names of properties that are texts, and what a
    schema is called."""
    assert takes(grammars, tiny_text, schema, may) and not takes(grammars, tiny_text, schema, may_not)


@pytest.mark.parametrize(
    "schema",
    [
        {"propertyNames": {"enum": ["a"]}},
        {"propertyNames": 1},
        {"type": "string", "format": "iri"},
        {"type": "string", "format": "uri-reference", "pattern": "^.*$"},
    ],
)
def test_what_is_not_held_to_is_an_unsupported_parameter(grammars: Grammars, schema: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter, match="cannot be used: Un") as told:
        grammars.ask({"type": "object", **schema} if "format" not in schema else schema, 1).result()
    assert told.value.param == "response_format"


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"pattern": "^(a{1000}){500}$"}, "patterns give over 10,000"),
        ({"pattern": "^((a{100}){100}){100}$"}, "patterns give over"),
        ({"pattern": "^(ab{2}c{0,900}){0,500}$"}, "patterns give over 10,000"),
        ({"pattern": "^a{99999999999}$"}, "patterns give over 10,000"),
        ({"pattern": r"^(\.{200}){200}$"}, "patterns give over"),
        ({"properties": {"x": {"items": {"pattern": "^[xy]+z(a{1000}){1000}$"}}}}, "patterns give over 10,000"),
        ({"patternProperties": {"^(a{1000}){500}$": {}}}, "patterns give over 10,000"),
        ({"allOf": [{"pattern": f"^{c}{{6000}}$"} for c in "ab"]}, "patterns give over"),
        ({"enum": [1, 1234567890123456789]}, "over 2^53"),
        ({"const": {"a": [{"b": -(10**19)}]}}, "over 2^53"),
        ({"properties": {"enum": {"const": 10**19}}}, "over 2^53"),
        (
            {"$defs": {"const": {"properties": {"default": {"pattern": "^(a{1000}){500}$"}}}}},
            "patterns give over 10,000",
        ),
        ({"minimum": 10**400, "maximum": 0.5}, "minimum is out of range"),
        ({"type": "integer", "minimum": -1e19, "maximum": -1e19}, "maximum is out of range"),
        ({"allOf": [{"minimum": -(2**63)}, {"exclusiveMaximum": -(2**63) + 2}]}, "exclusiveMaximum is out of range"),
        ({"exclusiveMaximum": float("inf")}, "exclusiveMaximum is out of range"),
        ({"items": {"exclusiveMaximum": -(10**400)}}, "exclusiveMaximum is out of range"),
        ({"pattern": "^([a]{1000}){500}$"}, "patterns give over 10,000"),
        ({"pattern": r"^([a\x61]{1000}){500}$"}, "patterns give over 10,000"),
        ({"pattern": "^([a-a]{1000}){500}$"}, "patterns give over 10,000"),
        ({"pattern": r"^(\x{61}{1000}){1000}$"}, "patterns give over 10,000"),
        ({"pattern": r"^((?:\u0061{1000}){100}){10}$"}, "patterns give over 10,000"),
        ({"pattern": r'^[^"&&a]$'}, "cannot be held to; write it in another way"),
        ({"patternProperties": {'^[^"]$': {}}}, "set additionalProperties to false"),
        (
            {"patternProperties": {'^[^"]$': {}, r'^[^\x00-\x1f"]$': {}}, "additionalProperties": False},
            "excludes a character",
        ),
        ({"pattern": "a" + "{1000000}" * 3000}, "patterns give over"),
        ({"minimum": 2**53 + 1}, "over 2^53"),
        ({"minimum": 9.3e18, "maximum": 9.4e18}, "minimum is out of range"),
        ({"exclusiveMinimum": 2.0**63}, "exclusiveMinimum is out of range"),
        ({"type": "integer", "exclusiveMinimum": 2**53}, "cannot be held to"),
        ({"type": "integer", "minimum": 2.0**60, "exclusiveMinimum": True}, "cannot be held to"),
        ({"exclusiveMaximum": -(2.0**60)}, "cannot be held to"),
        ({"items": {"exclusiveMaximum": -(2**60)}}, "over 2^53"),
        ({"x-guidance": {"lenient": True}}, "x-guidance is not served"),
        ({"pattern": r"^[\x00-\x1f]$"}, "holds control characters"),
        ({"pattern": r'^[^]"]$'}, "holds control characters"),
        ({"patternProperties": {f"^a{i}b": {} for i in range(65)}}, "65 patternProperties, over the limit of 64"),
        ({"allOf": [{"pattern": f"a{i}b"} for i in range(13)]}, "13 patterns and formats, over the limit of 12"),
        (
            {"$ref": "#/d/0", "d": {f"{i}": {"$ref": f"#/d/{i + 1}", "pattern": f"a{i}b"} for i in range(13)}},
            "13 patterns and formats",
        ),
        (
            {"anyOf": [{"properties": {"k": {"format": f"f{i}"}}} for i in range(13)], "items": {}},
            "leave out allOf, and what stands beside anyOf, oneOf and $ref",
        ),
        ({"$ref": "#/default", "default": {"minimum": -1e19, "maximum": -1e19}}, "leads into default, which holds no"),
        ({"$ref": "#/x-t", "x-t": {"type": "integer"}}, "leads into x-t, which holds no schema; put that under $defs"),
        ({"$ref": "#/%64efault", "default": {"type": "integer"}}, "leads into default"),
        ({"$ref": "json-schema:///#/enum/0", "enum": [{}]}, "leads into enum"),
        ({"anyOf": [{}, {"$ref": "#/anyOf/0/const"}]}, "leads into const"),
        ({"d": {"x-a": {}}, "items": {"$ref": "#/d/x-a"}}, "leads into x-a"),
        ({"$ref": "#/$defs", "$defs": {"type": "integer"}}, "leads to schemas by names"),
        ({"$ref": "#/$defs/a/%70roperties", "$defs": {"a": {"properties": {"type": {}}}}}, "add its name"),
        (
            {"$defs": {"a": {"dependencies": {"const": {"$id": "u:v", "maximum": -1e19}}}}, "$ref": "u:v"},
            "out of range",
        ),
    ],
)
def test_what_cannot_be_held_to_is_refused(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(said)) as refused:
        prepared(schema)
    assert refused.value.param == "response_format"


@pytest.mark.parametrize(
    ("schema", "may"),
    [
        ({"minProperties": 1}, True),
        ({"minProperties": 2}, False),
        ({"minProperties": 2, "required": ["a"]}, True),
        ({"minProperties": 3, "required": ["a", "a"], "properties": {"a": {}, "b": {}}}, False),
        ({"minProperties": 2, "patternProperties": {"a": {}}, "additionalProperties": False}, False),
        ({"minProperties": 3, "properties": {"a": {}, "b": {}}, "required": ["b"]}, False),
    ],
)
def test_no_more_properties_are_asked_for_than_are_sure_to_be_different(
    grammars: Grammars, tiny_text: ModelTokenizer, schema: dict[str, Any], may: bool
) -> None:
    """A name that comes twice is one property."""
    asked = {"type": "object", **schema}
    if may:
        grammars.ask(asked, 1).result()
        given = ({"a": 1, "b": 2}, {})
        assert [takes(grammars, tiny_text, asked, answer) for answer in given] == [True, False]
    else:
        with pytest.raises(UnsupportedParameter, match="cannot be held to: it may be at most ") as told:
            prepared(asked)
        assert told.value.param == "response_format"


def test_what_is_nested_too_deeply_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(3000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequest, match="nested too deeply"):
        prepared(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": r"^\d{3}-\d{4}$"},
        {"pattern": "^.{0,20000}$"},
        {"pattern": "^[a-z]{1,64}(-[a-z]{1,64}){0,900}$"},
        {"pattern": r"^(\w+\s){0,9000}\w+$"},
        {"pattern": r"^[\w\s]+\\[x\]]$"},
        {"pattern": "^a{2,}b*(c|d)?$", "enum": [2**53, -(2**53), 1.5, True, None, "x"]},
        {"pattern": "^(?:ab|c){3000}$"},
        {"pattern": "^[01]{20000}$"},
        {"exclusiveMinimum": 0.5, "maximum": 1},
        {"minimum": 0, "maximum": 0.5, "exclusiveMaximum": 1},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 0},
        {"exclusiveMinimum": -1, "exclusiveMaximum": 1},
        {"exclusiveMinimum": 2**52, "exclusiveMaximum": 2**53},
        {"type": "integer", "exclusiveMinimum": 10**9},
        {"maximum": 2**63 - 1},
        {"type": "integer", "minimum": -(2**53), "maximum": 2**63 - 1},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"example": {"const": 10**19}, "x-note": {"pattern": '^[^"]$'}},
        {"properties": {"pattern": {"type": "string"}, "enum": {"type": "array"}}},
        {
            "const": {"pattern": '^[^"]$'},
            "enum": [{"exclusiveMinimum": 0, "maximum": 0.5}],
            "default": {"pattern": '[^"]'},
        },
        {"properties": {"x": {"const": {"multipleOf": 99_991}}}},
        {"patternProperties": {f"^a{i}b": {} for i in range(64)}},
        {"allOf": [{"$ref": "#/d"}], "title": "one", "d": {"anyOf": [{"pattern": f"a{i}b"} for i in range(13)]}},
        {"allOf": [{"pattern": f"a{i % 12}b"} for i in range(24)]},
        {"pattern": r"^[\p{L}&&[^a]]$"},  # of another dialect: the compiler's to judge
    ],
)
def test_what_can_be_held_to_stays_as_it_is(schema: dict[str, Any]) -> None:
    assert prepared(schema) == schema


@pytest.mark.parametrize(
    ("pattern", "held"),
    [
        ('^[^"]*$', r'^[^\x00-\x1f"]*$'),
        (r"^[A-Z][^\"\\]{2}$", r"^[A-Z][^\x00-\x1f\"\\]{2}$"),
        (r"^[^\s\"]$", r"^[^\x00-\x1f\s\"]$"),
        (r"^[^\"\[\]]+$", r"^[^\x00-\x1f\"\[\]]+$"),
        (r"^[^\p{L}\"]+$", r"^[^\x00-\x1f\p{L}\"]+$"),
        ('^[^"[a]$', r'^[^\x00-\x1f"[a]$'),
        (r"\[[^!-/-]", r"\[[^\x00-\x1f!-/-]"),
        (r"^[^\x00-\x1f\"]$", r"^[^\x00-\x1f\"]$"),
    ],
)
def test_classes_without_quotation_marks_have_no_control_characters(pattern: str, held: str) -> None:
    closed = {"additionalProperties": False}
    assert prepared({"pattern": pattern, "items": [{"patternProperties": {pattern: {}}, **closed}]}) == {
        "pattern": held,
        "items": [{"patternProperties": {held: {}}, **closed}],
    }


def test_an_answer_has_nothing_that_its_pattern_excludes(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    schema = {"type": "string", "pattern": '^[^"]+$'}
    assert takes(grammars, tiny_text, schema, "good") and takes(grammars, tiny_text, schema, "a\\b")
    assert not takes(grammars, tiny_text, schema, 'He said "yes"')
    schema = {"type": "string", "pattern": r"^[^\\]+$"}
    assert takes(grammars, tiny_text, schema, 'a "b"') and not takes(grammars, tiny_text, schema, "a\\b")


@pytest.mark.parametrize(
    ("schema", "inside", "outside"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, [0.25, 0.5], [0, 0.0, 0.75]),
        ({"exclusiveMinimum": 2, "exclusiveMaximum": 2.5}, [2.25], [2, 2.0, 2.5]),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, [-0.25, -0.5], [0, -0.0]),
        ({"minimum": -1.5, "exclusiveMaximum": -1}, [-1.25], [-1]),
        ({"allOf": [{"exclusiveMinimum": 0}, {"maximum": 0.5}]}, [0.25], [0]),
        ({"$ref": "#/$defs/a", "maximum": 0.5, "$defs": {"a": {"exclusiveMinimum": 0}}}, [0.25], [0]),
        ({"minimum": 0.5, "exclusiveMaximum": 1.0}, [0.5, 0.75], [1, 1.0]),
        ({"exclusiveMinimum": 2000000, "maximum": 2000000.5}, [2000000.25], [2000000, 2000000.0]),
        ({"exclusiveMinimum": 10**9, "maximum": 10**9 + 0.5}, [10**9 + 0.25], [10**9]),
        ({"minimum": -(10**15) - 0.75, "exclusiveMaximum": -(10**15)}, [-(10**15) - 0.5], [-(10**15)]),
        ({"minimum": 0, "exclusiveMinimum": True, "maximum": 0.5}, [0.25, 0.5], [0, 0.0]),
        ({"minimum": -0.5, "maximum": 0, "exclusiveMaximum": True}, [-0.25], [0, -0.0]),
        ({"minimum": 0, "exclusiveMinimum": False, "maximum": 1, "exclusiveMaximum": True}, [0, 0.5], [1]),
        ({"exclusiveMinimum": True, "maximum": 1, "exclusiveMaximum": False}, [-5, 1], [2]),
    ],
)
def test_a_bound_that_is_excluded_is_no_answer(
    grammars: Grammars, tiny_text: ModelTokenizer, schema: dict[str, Any], inside: list[float], outside: list[float]
) -> None:
    asked = {"type": "number", **schema}
    assert all(takes(grammars, tiny_text, asked, value) for value in inside)
    assert not any(takes(grammars, tiny_text, asked, value) for value in outside)
    assert takes(grammars, tiny_text, {"type": "integer", "allOf": [{"exclusiveMinimum": 0}]}, 1)
    assert not takes(grammars, tiny_text, {"type": "integer", "allOf": [{"exclusiveMinimum": 0}]}, 0)


FAR = 2**53


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("kind", ["integer", "number"])
@pytest.mark.parametrize(
    ("low", "high", "excluded", "may"),
    [
        (None, FAR + 4, True, FAR + 2),
        (None, FAR + 3, False, FAR + 2),
        (FAR - 5, FAR + 3, False, FAR + 2),
        (FAR - 5, FAR + 2, False, FAR + 2),
        (None, float(FAR + 2), False, FAR + 2),
        (None, FAR + 1, True, FAR),
        (0, 2**60, True, 2**60 - 256),
        (None, 2**60, False, 2**60 - 256),
        (None, 2**60 + 256, False, 2**60 + 128),
        (None, 10**18, False, 10**18),
        (None, float(10**18), True, 10**18 - 128),
        (0, 2**63 - 1, True, 2**63 - 1024),
        (None, 2**63 - 1024, True, 2**63 - 2048),
    ],
)
def test_no_bound_beyond_2_to_53_lets_through_what_it_excludes(
    grammars: Grammars,
    tiny_text: ModelTokenizer,
    low: int | None,
    high: float,
    excluded: bool,
    may: int,
    kind: str,
    mirrored: bool,
) -> None:
    sign, lower, upper = (-1, "aximum", "inimum") if mirrored else (1, "inimum", "aximum")
    near, far = ("m" + lower, "exclusiveM" + upper if excluded else "m" + upper)
    asked = {"type": kind, far: sign * high} | ({} if low is None else {near: sign * low})
    draft4 = {"type": kind, "m" + upper: sign * high, "exclusiveM" + upper: excluded}
    outside = [int(high) + i for i in (*range(not excluded, 30), 255, 256, 512, 1024, 2048)]
    for schema in (asked, draft4, {"allOf": [{far: sign * high}], "type": kind}):
        assert takes(grammars, tiny_text, schema, sign * may)
        [grammar] = grammars.ask(schema, 1).result()  # to compile it takes longer than to follow it
        copies = {value: Grammar(grammar._matcher.deep_copy(), grammar._ends) for value in outside}
        assert not any(lets_through(copy, tiny_text, sign * value) for value, copy in copies.items())


def test_all_of_64_bits_may_be_asked_for(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    """The greatest whole number as it is, and the least as the next one that is held to."""
    asked = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    assert prepared(asked) == {**asked, "minimum": -(2**63) + 1024}
    assert all(takes(grammars, tiny_text, asked, value) for value in (2**63 - 1, -(2**63) + 1024, 0))
    assert not any(takes(grammars, tiny_text, asked, value) for value in (2**63, -(2**63) - 1))


def test_of_bounds_on_one_side_the_nearer_one_is_kept() -> None:
    assert prepared({"maximum": 2**54, "exclusiveMaximum": 2**60}) == {"maximum": 2**54}
    assert prepared({"maximum": 2**60, "exclusiveMaximum": 2**54}) == {"maximum": 2**54 - 2}
    assert prepared({"maximum": 7, "exclusiveMaximum": 2**60}) == {"maximum": 7}
    assert prepared({"minimum": -7, "exclusiveMinimum": -(2**60)}) == {"minimum": -7}
    assert prepared({"maximum": 2**60, "exclusiveMaximum": 7}) == {"maximum": 2**60 - 128, "exclusiveMaximum": 7}


def test_a_one_of_that_may_overlap_is_refused_without_advice_about_options(grammars: Grammars) -> None:
    said = r"several alternatives of a oneOf may be right at once, .*numbers are not compared.*; write anyOf"
    for one, other in (({"type": "integer"}, {"type": "number"}), ({"const": 1}, {"const": 2})):
        with pytest.raises(InvalidRequest, match=said) as told:
            grammars.ask({"oneOf": [one, other]}, 1).result()
    assert "option" not in told.value.message and not isinstance(told.value, UnsupportedParameter)


@pytest.mark.parametrize(
    ("closed", "most", "said"),
    [
        ({}, 1, "as many as required has names, 1, as properties has others"),
        ({"patternProperties": {"^x": {}}, "additionalProperties": False}, 1, "as many as required has names, 1,"),
        ({"additionalProperties": False}, 2, "one more than required has names, 2"),
    ],
)
def test_a_count_of_properties_that_is_refused_comes_with_one_that_is_not(
    grammars: Grammars, closed: dict[str, Any], most: int, said: str
) -> None:
    """As to how many are required, where others are known that need not be there."""
    schema = {"type": "object", "properties": {"a": {}, "b": {}, "c": {}}, "required": ["a"], **closed}
    with pytest.raises(UnsupportedParameter, match=f"minProperties of 3 cannot be held to: it may be at most {said}"):
        prepared({**schema, "minProperties": 3})
    grammars.ask({**schema, "minProperties": most}, 1).result()
    for count in ({"minProperties": most + 1}, {"maxProperties": 3}):
        with pytest.raises(InvalidRequest):
            grammars.ask({**schema, **count}, 1).result()


def test_what_one_answer_has_used_up_another_does_not_lack(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    """A schema is asked for again and again, and texts of large schemas have many states."""
    names = [f"s{i}" for i in range(1, 6)]
    properties = {name: {"type": "string", "maxLength": 1000 * i} for i, name in enumerate(names, 1)}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    dice = random.Random(0)
    for _ in range(8):
        answer = {name: "".join(dice.choices("abcdefgh ", k=dice.randint(200, 600))) for name in names}
        assert takes(grammars, tiny_text, schema, answer)


def test_a_long_text_is_not_cut_off(grammars: Grammars, tiny_text: ModelTokenizer) -> None:
    assert takes(grammars, tiny_text, {"type": "string", "maxLength": 8000}, "ab " * 2000)


def test_what_asks_for_nothing_is_left_out() -> None:
    assert prepared({"items": {"uniqueItems": False}, "uniqueItems": True}) == {"items": {}, "uniqueItems": True}
