"""`prepared`: a JSON schema as it can be held to, before it is compiled; what cannot be is refused by name.

Owns what the compiler (`llguidance`) takes too long for, or would let through although the schema forbids it. Does not
know whether a schema is one: the compiler says that.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from server.errors import InvalidRequest, UnsupportedParameter

PARAM = "response_format"
MAX_BOUNDS = 256
"""Bounds of numbers in a schema: each range becomes a pattern of its own, which takes milliseconds."""
MAX_STEP = 10_000
"""The least common multiple of all `multipleOf` of a schema, without decimal points: a state for each number below."""
MAX_LITERALS = 10_000
"""Characters that a schema's patterns give, repeated ones as often: where the text is forced, a mask walks over all of
them, 1.6 s for a million."""
MAX_JOINED = 12
"""Different patterns and formats of a schema of which several may be about one text: each more doubles the compiler's
time and memory."""
MAX_NAMED = 64
"""Patterns of names in a schema: the compiler compares each with each."""
MAX_EXACT = 1 << 53
"""Whole numbers from here on are read as the nearest number of 64 bits, which may be another one."""
MOST_LOWER = 1 << 63
"""A lower bound from here on becomes the greatest whole number of 64 bits, which is below it."""
LEAST_UPPER = -(1 << 63) + 2048
"""An upper bound below it becomes the least whole number of 64 bits: the compiler crashes if the lower one does too."""
LEAST_WHOLE, GREATEST_WHOLE = -(1 << 63), (1 << 63) - 1
"""Whole numbers of 64 bits: the compiler holds to the greatest one as a bound of integers, and fails at the least."""
_LOWER = ("minimum", "exclusiveMinimum")
_BOUNDS = (*_LOWER, "maximum", "exclusiveMaximum")
_EXCLUDED = ("exclusiveMinimum", "exclusiveMaximum")
_OPTIONS = "x-guidance"
"""A key by which the compiler is told to pass over what it cannot hold to."""
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"))
"""Keys under which there are schemas by names, which may be those of any key."""
_DIALECT = re.compile(
    r"http://json-schema\.org/draft-0[467]/schema#?|https://json-schema\.org/draft/20(19-09|20-12)/schema#?"
)
"""Values of `$schema` that the compiler knows."""
_REFERENCE = re.compile(r"[\w.~:/?#\[\]@!$&'()*+,;=%-]*", re.ASCII)
"""What RFC 3986 lets a URI reference consist of."""
_DATA = frozenset(("const", "enum", "default", "example", "examples"))
"""Keys under which there is no schema, as there is none under those that begin with `x-`."""
_JOINING = ("allOf", "anyOf", "oneOf", "$ref")
"""Keys whose schemas are about the same value as the one that they are in."""
_TEXTS = frozenset(
    ("pattern", "format", "properties", "patternProperties", "additionalProperties", "items", "prefixItems",
     "additionalItems")
)  # fmt: skip
"""Keys beside those by which a schema says something of texts, or of what texts are in."""
_CONTROLS = r"\x00-\x1f"
_NEXT = 1e-9
"""How far from a bound that is excluded the first number is that may be written, at the least: the compiler may read a
number as the one beside it."""
_WHOLE = float(1 << 51)
"""Up to here there are numbers of 64 bits, and more than one, between two whole ones."""
_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Those that the compiler holds to."""
_KEPT = frozenset(
    ("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer",
     "relative-json-pointer", "regex")
)  # fmt: skip
"""Those that JSON Schema knows as well, which nobody writes as a note."""
_HINTS = frozenset(("password", "binary", "path", "file-path", "directory-path"))
"""Formats that no text lacks."""
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)"
_DATE = (
    "(?:[0-9]{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_CLOCK = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_DATES = {
    "date": f"^{_DATE}$",
    "date-time": rf"^{_DATE}[tT]{_CLOCK}:(?:[0-5][0-9]|60)(?:\.[0-9]+)?(?:[zZ]|[+-]{_CLOCK})$",
}
"""Patterns of formats, in which the compiler has a 29 February every year."""
_UUID = re.compile("uuid([1-8])")
_EVERY_NAME: tuple[Any, ...] = ({}, {"type": "string"})
"""What every name of a property is, as it is `true`."""
_TOKEN = re.compile(
    r"\\[xu]\{(?P<braced>[0-9a-fA-F]{1,6})\}|\\x(?P<x>[0-9a-fA-F]{2})|\\u(?P<u>[0-9a-fA-F]{4})|\\U(?P<U>[0-9a-fA-F]{8})"
    r"|\\[pP]\{[^}]*\}|\\.|.",
    re.DOTALL,
)
"""One character of a pattern, or one escape."""
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_GROUP = re.compile(r"\((\?(P?<[^>]*>|[a-zA-Z-]*(:|(?=\)))))?")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]?", re.DOTALL)
"""A class in brackets."""
_SEVERAL = re.compile(r"\\[a-zA-Z].*", re.DOTALL)
"""Escapes of several characters, or of places; that of a new line is taken for one, as it costs nothing."""


def prepared(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema, or one that allows less where the compiler would allow more. Raises InvalidRequest."""
    if _OPTIONS in schema:
        raise _refused(f"{_OPTIONS} is not served; leave it out")
    bounds, steps, literals, named = 0, list[int](), 0, 0
    texts, joined = set[str](), False
    for part in _parts(schema):
        bounds += len(found := _bounds(part))
        for key, bound in found.items():
            _check_size(key, bound)
        if (step := _number(part, "multipleOf")) is not None:
            steps.append(_digits(step))
        _check_reference(part.get("$ref"))
        _check_least(part)
        _check_values([part.get("const"), part.get("enum")])
        literals += sum(_literals(pattern) for pattern in _patterns(part))
        if isinstance(names := part.get("patternProperties"), Mapping):
            named += len(names)
        texts.update(told for key in ("pattern", "format") if isinstance(told := part.get(key), str))
        joined = joined or _joins(part)
    if bounds > MAX_BOUNDS:
        raise _refused(f"the schema has {bounds} bounds of numbers, over the limit of {MAX_BOUNDS}")
    if math.lcm(*steps) > MAX_STEP:
        raise _refused(f"the schema's multipleOf have a least common multiple of over {MAX_STEP}")
    if literals > MAX_LITERALS:
        raise _refused(f"the schema's patterns give over {MAX_LITERALS:,} characters, repeated ones as often")
    if named > MAX_NAMED:
        raise _refused(f"the schema has {named} patternProperties, over the limit of {MAX_NAMED}")
    if joined and len(texts) > MAX_JOINED:
        raise _refused(
            f"the schema has {len(texts)} patterns and formats, over the limit of {MAX_JOINED} where several may be "
            "about one text; leave out allOf, and what stands beside anyOf, oneOf and $ref"
        )
    try:
        written: dict[str, Any] = _rewritten(schema)
    except RecursionError:
        raise _refused("the schema is nested too deeply") from None
    return written


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, PARAM)


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Every schema within a schema, itself among them."""
    left = [(schema, False)]  # and whether it is of schemas by names
    while left:
        part, named = left.pop()
        if isinstance(part, list):
            left += [(value, False) for value in part]
        elif isinstance(part, Mapping):
            if not named:
                yield part
            left += [(v, not named and k in _NAMED) for k, v in part.items() if named or not _is_data(k)]


def _check_reference(reference: Any) -> None:
    """Raises InvalidRequest for a pointer to what `_parts` passes over: the compiler takes that for a schema as well.

    Every place from which a pointer may start is a schema, and no key of interest has a character that `~` stands for.
    """
    place = unquote(reference.partition("#")[2]) if isinstance(reference, str) else ""
    named = False
    for key in place.split("/")[1:]:
        if not named and _is_data(key):
            raise _refused(f"$ref {reference[:80]} leads into {key[:40]}, which holds no schema; put that under $defs")
        named = not named and key in _NAMED
    if named:
        raise _refused(f"$ref {reference[:80]} leads to schemas by names and not to one of them; add its name")


def _check_least(part: Mapping[str, Any]) -> None:
    """Raises UnsupportedParameter for a `minProperties` towards which a name that comes twice would count twice: one
    that the schema does not give may, and the first such is another one than all that are required.
    """
    listed, known = part.get("required"), part.get("properties")
    required = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    if (least := _number(part, "minProperties") or 0) <= len(required) + 1:
        return
    rule = f"it may be at most one more than required has names, {len(required) + 1}"
    is_open = part.get("additionalProperties") is not False or part.get("patternProperties")
    if is_open and isinstance(known, Mapping) and known.keys() - required:  # where the compiler does not count
        rule = f"it may be at most as many as required has names, {len(required)}, as properties has others"
    raise UnsupportedParameter(f"minProperties of {least} cannot be held to: {rule}", PARAM)


def _number(part: Mapping[str, Any], key: str) -> float | None:
    value = part.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _bounds(part: Mapping[str, Any]) -> dict[str, float]:
    """Bounds of numbers by their keys, those that are excluded as numbers: draft 4 and OpenAPI 3.0 only say whether."""
    found = {key: number for key in _BOUNDS if (number := _number(part, key)) is not None}
    for key, bound in zip(_EXCLUDED, ("minimum", "maximum"), strict=True):
        if part.get(key) is True and bound in found:
            found[key] = found.pop(bound)
    return found


def _check_size(key: str, value: float) -> None:
    """Raises InvalidRequest for a bound that no number of 64 bits comes near, or that lets through what it excludes
    when it is read as the nearest one.
    """
    try:
        out = math.isinf(float(value))
    except OverflowError:
        out = True
    if out or (value >= MOST_LOWER if key in _LOWER else value < LEAST_UPPER):
        raise _refused(f"{key} is out of range")
    far = value if key in _LOWER else -value
    if (far > MAX_EXACT and isinstance(value, int)) or (far >= MAX_EXACT and key in _EXCLUDED):
        raise _refused(f"{key} {value} is over 2^53 and cannot be held to")


def _inward(bounds: Mapping[str, float]) -> dict[str, float]:
    """The bounds, with those beyond 2^53 that would be read as ones farther out moved to where they are not."""
    moved = dict(bounds)
    for key, value in bounds.items():
        excluded = key in _EXCLUDED
        if MAX_EXACT < value < GREATEST_WHOLE + excluded and key not in _LOWER:
            del moved[key]
            moved["maximum"] = min(_below(value, excluded), moved.get("maximum", math.inf))
        elif -MAX_EXACT > value >= LEAST_WHOLE and key in _LOWER:
            del moved[key]
            moved["minimum"] = max(-_below(-value, excluded), moved.get("minimum", -math.inf))
    return moved


def _below(value: float, excluded: bool) -> int:
    """The greatest number of 64 bits up to a bound over 2^53, or below one that is excluded."""
    most = min(int(value), _written(value)) - excluded
    number = float(most)
    while number > most or _written(number) > most or number > GREATEST_WHOLE:
        number = math.nextafter(number, 0)
    return int(number)


def _written(number: float) -> int:
    """A number over 2^53 as the compiler writes it among others: by the digits that tell it from its neighbours."""
    return int(Decimal(repr(number)))


def _check_values(values: list[Any]) -> None:
    """Raises InvalidRequest for whole numbers that would be written as other ones."""
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, int) and abs(value) > MAX_EXACT:
            raise _refused(f"the number {str(value)[:40]} is over 2^53 and cannot be held to; ask for it as a text")


def _patterns(part: Mapping[str, Any]) -> list[str]:
    named = part.get("patternProperties")
    found = [part.get("pattern"), *(named if isinstance(named, Mapping) else ())]
    return [pattern for pattern in found if isinstance(pattern, str)]


def _joins(part: Mapping[str, Any]) -> bool:
    """Whether several schemas in it may each have something to say of one text."""
    joining = [key for key in _JOINING if key in part]
    all_of = part.get("allOf")
    several = isinstance(all_of, list) and len(all_of) > 1
    return several or len(joining) > 1 or bool(joining and _TEXTS & part.keys())


def _literals(pattern: str) -> int:
    """Single characters that a pattern gives, repeated ones as often as they may be, groups with all in them."""
    sizes, last, at = [0], 0, 0  # of the groups that are open; and of what a count that follows would repeat
    while at < len(pattern):
        if (characters := _CLASS.match(pattern, at)) is not None:
            last = int(_is_single(characters[0]))
            sizes[-1] += last
            at = characters.end()
        elif (group := _GROUP.match(pattern, at)) is not None:
            sizes.append(0)
            at, last = group.end(), 0
        elif pattern[at] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
            at += 1
        elif (count := _COUNT.match(pattern, at)) is not None:
            most = max(min(int(number[:10]), MAX_LITERALS + 1) if number else 0 for number in count.groups())
            sizes[-1] += last * max(most - 1, 0)
            at, last = count.end(), last * max(most, 1)
        else:
            token = next(_TOKEN.finditer(pattern, at))  # any character is one
            several = token[0] in "|^$.*+?" or (token.lastgroup is None and _SEVERAL.fullmatch(token[0]))
            last = 0 if several else 1
            sizes[-1] += last
            at = token.end()
        sizes[-1], last = min(sizes[-1], MAX_LITERALS + 1), min(last, MAX_LITERALS + 1)
    return min(sum(sizes), MAX_LITERALS + 1)


def _is_single(characters: str) -> bool:
    """Whether a class in brackets may be of one character alone: the compiler makes that character of it."""
    inside = characters[1:-1]
    if inside.startswith("^"):
        return False
    found = list(_TOKEN.finditer(inside))
    if any(token.lastgroup is None and _SEVERAL.fullmatch(token[0]) for token in found):
        return False
    return len({_character(token) for token in found} - {"-"}) <= 1


def _character(token: re.Match[str]) -> str:
    if token.lastgroup is not None:
        return chr(min(int(token[token.lastgroup], 16), 0x10FFFF))
    return token[0][-1]


def _rewritten(part: Any, named: bool = False) -> Any:
    """A copy, in which every pattern is `_held`, without what asks for nothing; `named` if it is of schemas by names.

    A whole number that is excluded as a bound becomes the next number: the compiler lets it through where the other
    bound is near, be that in the same schema or in another one about the same value. Bounds beyond 2^53 are moved
    `_inward`.
    """
    if isinstance(part, list):
        return [_rewritten(value) for value in part]
    if not isinstance(part, Mapping):
        return part
    if named:
        return {name: _rewritten(schema) for name, schema in part.items()}
    copy = {key: value if _is_data(key) else _rewritten(value, key in _NAMED) for key, value in part.items()}
    if isinstance(part.get("pattern"), str):
        copy["pattern"] = _held(part["pattern"])
    if isinstance(patterns := copy.get("patternProperties"), dict):
        held = {_held(pattern): schema for pattern, schema in patterns.items()}
        if held.keys() != patterns.keys() and (
            len(held) < len(patterns) or part.get("additionalProperties") is not False
        ):
            raise _refused("a pattern of patternProperties excludes a character; set additionalProperties to false")
        copy["patternProperties"] = held
    if isinstance(dialect := copy.get("$schema"), str) and not _DIALECT.fullmatch(dialect):
        del copy["$schema"]  # which leaves the newest one; what a name stands for that is none of these, nobody knows
    if isinstance(id := copy.get("$id"), str) and not _REFERENCE.fullmatch(id):
        copy["$id"] = quote(id, safe="")  # a title rather, but what is below refers to its own root all the same
    if isinstance(format := copy.get("format"), str) and format in _DATES and "pattern" not in copy:
        copy["pattern"] = _DATES[format]
        del copy["format"]
    if copy.get("uniqueItems") is False:
        del copy["uniqueItems"]  # which asks for nothing, and would be refused
    if (names := copy.get("propertyNames")) is True or names in _EVERY_NAME:
        del copy["propertyNames"]
    if isinstance(format := copy.get("format"), str) and format not in _FORMATS | _KEPT:
        if version := _UUID.fullmatch(format):
            copy.setdefault("pattern", _uuid(version[1]))
        if format in _HINTS or "pattern" in copy:  # a format that nobody knows is a note, and the pattern says it
            del copy["format"]
    bounds = _inward(found := _bounds(part))
    if bounds != found or any(isinstance(part.get(key), bool) for key in _EXCLUDED):
        copy = {k: v for k, v in copy.items() if k not in _BOUNDS or not isinstance(v, int | float)} | bounds
    if part.get("type") != "integer":
        low, high = bounds.get("exclusiveMinimum"), bounds.get("exclusiveMaximum")
        if low is not None and 0 <= low < _WHOLE and low == int(low):
            copy["exclusiveMinimum"] = low + max(_NEXT, 2 * math.ulp(low))
        if high is not None and -_WHOLE < high <= 0 and high == int(high):
            copy["exclusiveMaximum"] = high - max(_NEXT, 2 * math.ulp(high))
    return copy


def _uuid(version: str) -> str:
    """The pattern of RFC 9562, 5."""
    h = "[0-9a-fA-F]"
    return f"^{h}{{8}}-{h}{{4}}-{version}{h}{{3}}-[89abAB]{h}{{3}}-{h}{{12}}$"


def _is_data(key: str) -> bool:
    return key in _DATA or key.startswith("x-")


def _held(pattern: str) -> str:
    r"""The pattern with classes that can be held to. One that has control characters and no quotation mark or no
    backslash would let these through all the same, as both are written in escapes; so one that names what it has not is
    made to have no control characters either. Raises InvalidRequest for one that names what it has.
    """

    def held(found: re.Match[str]) -> str:
        characters = found[0]
        if not characters.startswith("[") or not _lets_through(characters):
            return characters
        if not characters.startswith("[^") or characters.startswith("[^]"):
            raise _refused(f"the class {characters[:40]} of a pattern holds control characters; leave them out")
        if re.search(r"&&|--|~~", characters):
            raise _refused(f"the class {characters[:40]} of a pattern cannot be held to; write it in another way")
        return f"[^{_CONTROLS}{characters[2:]}"

    return re.sub(rf"\\.|{_CLASS.pattern}", held, pattern, flags=re.DOTALL)


def _lets_through(characters: str) -> bool:
    """Whether a class has what is written in escapes alone, and lacks a quotation mark or a backslash. Of one in
    another dialect than Python's that is taken to be so if it begins with ^.
    """
    plain = re.sub(r"\\.", "", characters[1:-1], flags=re.DOTALL)
    if re.search(r"\[|&&|--|~~|\|\|", plain):
        return characters.startswith("[^")
    try:
        has = re.compile(characters, re.ASCII).fullmatch
    except (re.error, OverflowError):
        return characters.startswith("[^")
    return has("\0") is not None and (has('"') is None or has("\\") is None)


def _digits(number: float) -> int:
    """A number without its decimal point; 1 if there is nothing to count with."""
    exact = Decimal(str(number + 0))
    if not exact.is_finite() or not exact:
        return 1
    return int(exact) if exact == exact.to_integral_value() else int("".join(map(str, exact.as_tuple().digits)))
