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

from server.errors import InvalidRequest

PARAM = "response_format"
MAX_BOUNDS = 256
"""Bounds of numbers in a schema: each range becomes a pattern of its own, which takes milliseconds."""
MAX_STEP = 10_000
"""The least common multiple of all `multipleOf` of a schema, without decimal points: a state for each number below."""
MAX_LITERALS = 10_000
"""Characters that a schema's patterns give, repeated ones as often: where the text is forced, a mask walks over all of
them, 1.6 s for a million."""
MAX_EXACT = 1 << 53
"""Whole numbers from here on are read as the nearest number of 64 bits, which may be another one."""
_BOUNDS = frozenset(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"))
_OPTIONS = "x-guidance"
"""A key by which the compiler is told to pass over what it cannot hold to."""
_NAMED = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas"))
"""Keys under which there are schemas by names, which may be those of any key."""
_DATA = frozenset(("const", "enum", "default", "examples"))
"""Keys under which there is no schema."""
_OTHER_DIALECT = re.compile(r"\[|&&|--|~~|\|\|")
"""What a class in brackets may have within: classes, and what is done with them."""
_COUNT = re.compile(r"\{(\d*)(?:,(\d*))?\}")
_CONTROLS = r"\x00-\x1f"


def prepared(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema, or one that allows less where the compiler would allow more. Raises InvalidRequest."""
    if _OPTIONS in schema:
        raise _refused(f"{_OPTIONS} is not served; leave it out")
    bounds, steps, literals = 0, list[int](), 0
    for part in _parts(schema):
        bounds += sum(_number(part, key) is not None for key in _BOUNDS)
        if (step := _number(part, "multipleOf")) is not None:
            steps.append(_digits(step))
        _check_range(part)
        _check_values([part.get("const"), part.get("enum")])
        literals += sum(_literals(pattern) for pattern in _patterns(part))
    if bounds > MAX_BOUNDS:
        raise _refused(f"the schema has {bounds} bounds of numbers, over the limit of {MAX_BOUNDS}")
    if math.lcm(*steps) > MAX_STEP:
        raise _refused(f"the schema's multipleOf have a least common multiple of over {MAX_STEP}")
    if literals > MAX_LITERALS:
        raise _refused(f"the schema's patterns repeat {literals:,} characters, over the limit of {MAX_LITERALS:,}")
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
            left += [(v, not named and k in _NAMED) for k, v in part.items() if named or k not in _DATA]


def _number(part: Mapping[str, Any], key: str) -> float | None:
    value = part.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _check_range(part: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for a bound that is excluded and whole with the other one less than 1 away: it would be let
    through."""
    lows = [value for key in ("minimum", "exclusiveMinimum") if (value := _number(part, key)) is not None]
    highs = [value for key in ("maximum", "exclusiveMaximum") if (value := _number(part, key)) is not None]
    if not lows or not highs or min(highs) - max(lows) >= 1:
        return
    for key in ("exclusiveMinimum", "exclusiveMaximum"):
        value = _number(part, key)
        if value is not None and math.isfinite(value) and value == int(value):
            raise _refused(f"{key} {value} cannot be held to with the other bound less than 1 away")


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


def _literals(pattern: str) -> int:
    """Single characters that a pattern gives, repeated ones as often as they are at least, groups with all in them."""
    sizes, last, at = [0], 0, 0  # of the groups that are open; and of what a count that follows would repeat
    while at < len(pattern):
        character = pattern[at]
        if character == "[":
            at, last = _end_of_class(pattern, at), 0
        elif character == "(":
            sizes.append(0)
            at, last = at + 1, 0
        elif character == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
            at += 1
        elif (count := _COUNT.match(pattern, at)) is not None:
            most = max(int(number) if number and len(number) < 10 else 0 for number in (count[1], count[2] or ""))
            long = any(len(number or "") >= 10 for number in count.groups())
            sizes[-1] += last * (MAX_LITERALS if long else max(most - 1, 0))
            at, last = count.end(), last * max(most, 1)
        else:
            escaped = character == "\\"
            several = pattern[at + 1 : at + 2].isalpha() if escaped else character in "|^$.*+?"
            last = 0 if several else 1
            sizes[-1] += last
            at += 2 if escaped else 1
    return sum(sizes)


def _end_of_class(pattern: str, start: int) -> int:
    """Where a class in brackets that begins at `start` is over."""
    at = start + (2 if pattern[start + 1 : start + 2] == "^" else 1)
    first = at
    while at < len(pattern) and (pattern[at] != "]" or at == first):
        at += 2 if pattern[at] == "\\" else 1
    return min(at + 1, len(pattern))


def _rewritten(part: Any, named: bool = False) -> Any:
    """A copy, in which every pattern is `_held`; `named` if it is of schemas by names."""
    if isinstance(part, list):
        return [_rewritten(value) for value in part]
    if not isinstance(part, Mapping):
        return part
    if named:
        return {name: _rewritten(schema) for name, schema in part.items()}
    copy = {key: value if key in _DATA else _rewritten(value, key in _NAMED) for key, value in part.items()}
    if isinstance(part.get("pattern"), str):
        copy["pattern"] = _held(part["pattern"])
    if isinstance(patterns := copy.get("patternProperties"), dict):
        copy["patternProperties"] = {_held(pattern): schema for pattern, schema in patterns.items()}
    return copy


def _held(pattern: str) -> str:
    r"""The pattern with classes that can be held to. One that has control characters and no quotation mark or no
    backslash would let these through all the same, as both are written in escapes; so one that names what it has not is
    made to have no control characters either. Raises InvalidRequest for one that names what it has.
    """
    out, at = "", 0
    while at < len(pattern):
        if pattern[at] != "[":
            step = 2 if pattern[at] == "\\" else 1
            out, at = out + pattern[at : at + step], at + step
            continue
        end = _end_of_class(pattern, at)
        characters = pattern[at:end]
        if _lets_through(characters):
            if not characters.startswith("[^") or characters.startswith("[^]"):
                raise _refused(f"the class {characters[:40]} of a pattern holds control characters; leave them out")
            characters = f"[^{_CONTROLS}{characters[2:]}"
        out, at = out + characters, end
    return out


def _lets_through(characters: str) -> bool:
    if _OTHER_DIALECT.search(characters, 1):
        return False
    try:
        has = re.compile(characters, re.ASCII).fullmatch
    except (re.error, OverflowError):  # of another dialect
        return False
    return has("\0") is not None and (has('"') is None or has("\\") is None)


def _digits(number: float) -> int:
    """A number without its decimal point; 1 if there is nothing to count with."""
    exact = Decimal(str(number + 0))
    if not exact.is_finite() or not exact:
        return 1
    return int(exact) if exact == exact.to_integral_value() else int("".join(map(str, exact.as_tuple().digits)))
