"""`prepare_schema`: checks a JSON schema before the compiler (`llguidance`) sees it, and rewrites it where needed.

It refuses what takes the compiler too long, and what the compiler would ignore although the schema requires it. Whether
the schema is valid is left to the compiler.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote

from server.errors import InvalidRequest, UnsupportedParameter

PARAM = "response_format"

MAX_STEP = 10_000
"""Largest least common multiple of all `multipleOf`, without decimal points. The grammar has a state for each number
below it: 10 million take minutes."""

MAX_PATTERN = 20_000
"""Most characters of all patterns with repetitions expanded. A mask visits all characters of a forced text: half a
million take 0.6 s."""

MAX_JOINED = 12
"""Most patterns and formats if several may apply to one string. Each doubles the compiler's time: 20 take 2 s."""

MAX_NAME_PATTERNS = 64
"""Most patternProperties. The compiler compares all pairs: 200 take 0.4 s."""

MAX_EXACT = 1 << 53
"""Largest absolute value of a whole number. The compiler reads numbers as float64."""

_OPTIONS = "x-guidance"
"""A key with compiler options, such as ignoring unsupported keywords."""

_NAME_MAPS = frozenset(("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies"))
"""Keywords whose values map arbitrary names to schemas."""

_DATA = frozenset(("const", "enum", "default", "example", "examples"))
"""Keywords whose values are data, not schemas. Keys that begin with `x-` hold data, too."""

_JOINING = ("allOf", "anyOf", "oneOf", "$ref")
"""Keywords whose schemas apply to the same value as their siblings."""

_STRING_KEYS = frozenset(
    ("pattern", "format", "properties", "patternProperties", "additionalProperties", "items", "prefixItems",
     "additionalItems")
)  # fmt: skip
"""Siblings of joining keywords that constrain strings, or values that contain strings."""

_BOUNDS = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
_EXCLUSIVE = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}

_MIN_GAP = 1e-9
"""Smallest distance from an excluded bound to the first number that is allowed."""

_HALVES = float(1 << 51)
"""Up to here float64 has numbers between two whole ones."""

_FORMATS = frozenset(
    ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown")
)
"""Formats that the compiler enforces."""

_STANDARD_FORMATS = frozenset(
    ("idn-email", "idn-hostname", "uri-reference", "iri", "iri-reference", "uri-template", "json-pointer",
     "relative-json-pointer", "regex")
)  # fmt: skip
"""Standard formats that the compiler refuses. They are not removed, so the client sees the refusal."""

_HINTS = frozenset(("password", "binary", "path", "file-path", "directory-path"))
"""Formats that every string satisfies."""

_UUID = re.compile("uuid([1-8])")
_DIALECT = re.compile(
    r"http://json-schema\.org/draft-0[467]/schema#?|https://json-schema\.org/draft/20(19-09|20-12)/schema#?"
)
"""Values of `$schema` that the compiler knows."""

_URI = re.compile(r"[\w.~:/?#\[\]@!$&'()*+,;=%-]*", re.ASCII)
_ANY_NAME: tuple[Any, ...] = ({}, {"type": "string"})
"""Values of `propertyNames` that allow every name."""

_CONTROLS = r"\x00-\x1f"
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]?", re.DOTALL)
_ATOM = re.compile(
    rf"(?P<open>\((?:\?(?:P?<[^>]*>|[a-zA-Z-]*(?::|(?=\))))?)?)|(?P<close>\))|\{{(?P<low>\d*)(?:,(?P<high>\d*))?\}}"
    rf"|\\[xu]\{{[0-9a-fA-F]+\}}|\\x..|\\u.{{4}}|\\U.{{8}}|\\[pP]\{{[^}}]*\}}|\\.|{_CLASS.pattern}|.",
    re.DOTALL,
)
"""One group bracket, repetition, escape, class or character of a pattern."""


def prepare_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return an equivalent schema that the compiler enforces, or a stricter one.

    Raises:
        InvalidRequest: If the schema is too expensive or cannot be enforced.
    """
    if _OPTIONS in schema:
        raise _refused(f"{_OPTIONS} is not supported; remove it")
    checker = _Checker()
    try:
        prepared: dict[str, Any] = checker.prepare(schema)
    except RecursionError:
        raise _refused("the schema is nested too deeply") from None
    checker.check_totals()
    return prepared


def _refused(message: str) -> InvalidRequest:
    return InvalidRequest(message, PARAM)


@dataclass
class _Checker:
    """Checks and rewrites a schema, and counts over all of its parts what is limited in total."""

    steps: list[int] = field(default_factory=list)
    pattern_size: int = 0
    name_patterns: int = 0
    texts: set[str] = field(default_factory=set)
    is_joined: bool = False

    def prepare(self, part: Any, is_name_map: bool = False) -> Any:
        """Return a prepared copy of a schema, a list of schemas, or a map from names to schemas."""
        if isinstance(part, list):
            return [self.prepare(value) for value in part]
        if not isinstance(part, Mapping):
            return part
        if is_name_map:
            return {name: self.prepare(schema) for name, schema in part.items()}
        self._count(part)
        _check_reference(part.get("$ref"))
        _check_min_properties(part)
        _check_values([part.get("const"), part.get("enum")])
        copy = {key: v if _is_data(key) else self.prepare(v, key in _NAME_MAPS) for key, v in part.items()}
        _prepare_patterns(copy)
        _prepare_keywords(copy)
        _prepare_bounds(copy)
        return copy

    def _count(self, part: Mapping[str, Any]) -> None:
        if (step := _number(part, "multipleOf")) is not None:
            self.steps.append(_digits(step))
        names = part.get("patternProperties")
        patterns = [part.get("pattern"), *(names if isinstance(names, Mapping) else ())]
        self.name_patterns += len(patterns) - 1
        self.pattern_size += sum(_expanded_size(pattern) for pattern in patterns if isinstance(pattern, str))
        self.texts.update(text for key in ("pattern", "format") if isinstance(text := part.get(key), str))
        joining = [key for key in _JOINING if key in part]
        all_of = part.get("allOf")
        has_siblings = len(joining) > 1 or bool(joining and _STRING_KEYS & part.keys())
        if has_siblings or (isinstance(all_of, list) and len(all_of) > 1):
            self.is_joined = True

    def check_totals(self) -> None:
        if math.lcm(*self.steps) > MAX_STEP:
            raise _refused(f"the least common multiple of the schema's multipleOf exceeds {MAX_STEP}")
        if self.pattern_size > MAX_PATTERN:
            raise _refused(f"the schema's patterns exceed {MAX_PATTERN:,} characters with repetitions expanded")
        if self.name_patterns > MAX_NAME_PATTERNS:
            raise _refused(f"the schema has {self.name_patterns} patternProperties; the limit is {MAX_NAME_PATTERNS}")
        if self.is_joined and len(self.texts) > MAX_JOINED:
            raise _refused(
                f"the schema has {len(self.texts)} patterns and formats; the limit is {MAX_JOINED} if several may "
                "apply to one string: remove allOf, and keywords beside anyOf, oneOf and $ref"
            )


def _is_data(key: str) -> bool:
    return key in _DATA or key.startswith("x-")


def _number(part: Mapping[str, Any], key: str) -> float | None:
    value = part.get(key)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _digits(number: float) -> int:
    """A number without its decimal point; 1 if it is not finite or 0."""
    exact = Decimal(str(number + 0))
    if not exact.is_finite() or not exact:
        return 1
    return int(exact) if exact == exact.to_integral_value() else int("".join(map(str, exact.as_tuple().digits)))


def _check_reference(reference: Any) -> None:
    """Refuse a `$ref` to a place that is not checked as a schema, which the compiler would use all the same."""
    if not isinstance(reference, str):
        return
    is_name_map = False
    for key in unquote(reference.partition("#")[2]).split("/")[1:]:
        if not is_name_map and _is_data(key):
            raise _refused(f"$ref {reference[:80]} points into {key[:40]}, which is not a schema; use $defs")
        is_name_map = not is_name_map and key in _NAME_MAPS
    if is_name_map:
        raise _refused(f"$ref {reference[:80]} points to a map of schemas; add the name of one")


def _check_min_properties(part: Mapping[str, Any]) -> None:
    """Refuse a `minProperties` that repeated names could satisfy, because the compiler counts them as different.

    Only names that are not in `properties` can be repeated. The first such name differs from all required ones.
    """
    listed, known = part.get("required"), part.get("properties")
    required = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    is_open = part.get("additionalProperties") is not False or part.get("patternProperties")
    has_optional = is_open and isinstance(known, Mapping) and known.keys() - required  # the compiler refuses these
    limit = len(required) + (0 if has_optional else 1)
    if (least := _number(part, "minProperties") or 0) > len(required) + 1:
        message = f"minProperties of {least} cannot be enforced; with this schema it may be at most {limit}"
        raise UnsupportedParameter(message, PARAM)


def _check_values(values: list[Any]) -> None:
    """Refuse whole numbers that float64 cannot represent."""
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list):
            values += value
        elif isinstance(value, int) and abs(value) > MAX_EXACT:
            raise _refused(f"the number {str(value)[:40]} is over 2^53 and cannot be enforced; use a string")


def _prepare_bounds(part: dict[str, Any]) -> None:
    """Rewrite the bounds of numbers so that the compiler enforces them.

    - Bounds of draft 4, where `exclusiveMinimum` is a boolean, become those of newer drafts.
    - Bounds beyond 2^53 on the far side are moved to 2^53. On the near side they are refused.
    - A whole number that is excluded becomes the next float64, because the compiler may allow it otherwise. It does so
      if the other bound is near, even in another schema of an `allOf`.
    """
    bounds = {key: number for key in _BOUNDS if (number := _number(part, key)) is not None}
    flags = [key for key in _EXCLUSIVE if isinstance(part.get(key), bool)]
    for key in flags:
        if part.pop(key) and _EXCLUSIVE[key] in bounds:
            bounds[key] = bounds.pop(_EXCLUSIVE[key])
    if not bounds:
        return
    for key in [key for key in _BOUNDS if key in bounds]:
        value, sign = bounds[key], 1 if key in ("minimum", "exclusiveMinimum") else -1
        if sign * value > MAX_EXACT - (key in _EXCLUSIVE) or value != value:
            raise _refused(f"{key} {str(value)[:40]} is beyond 2^53 and cannot be enforced")
        if sign * value < -MAX_EXACT:
            del bounds[key]
            near = _EXCLUSIVE.get(key, key)
            other = sign * bounds[near] if near in bounds else -math.inf
            bounds[near] = sign * max(-MAX_EXACT, other)
    if part.get("type") != "integer":
        low, high = bounds.get("exclusiveMinimum"), bounds.get("exclusiveMaximum")
        if low is not None and 0 <= low < _HALVES and low == int(low):
            bounds["exclusiveMinimum"] = low + max(_MIN_GAP, 2 * math.ulp(low))
        if high is not None and -_HALVES < high <= 0 and high == int(high):
            bounds["exclusiveMaximum"] = high - max(_MIN_GAP, 2 * math.ulp(high))
    for key in [key for key in _BOUNDS if _number(part, key) is not None]:
        del part[key]
    part.update(bounds)


def _prepare_keywords(part: dict[str, Any]) -> None:
    """Remove or rewrite keywords that require nothing, but that the compiler refuses."""
    if isinstance(dialect := part.get("$schema"), str) and not _DIALECT.fullmatch(dialect):
        del part["$schema"]
    if isinstance(id := part.get("$id"), str) and not _URI.fullmatch(id):
        part["$id"] = quote(id, safe="")  # kept, because references below it are relative to it
    if part.get("uniqueItems") is False:
        del part["uniqueItems"]
    if (names := part.get("propertyNames")) is True or names in _ANY_NAME:
        del part["propertyNames"]
    format = part.get("format")
    if isinstance(format, str) and format not in _FORMATS | _STANDARD_FORMATS:
        if version := _UUID.fullmatch(format):
            part.setdefault("pattern", _uuid_pattern(version[1]))
        if format in _HINTS or "pattern" in part:  # the pattern says what an unknown format means
            del part["format"]


def _uuid_pattern(version: str) -> str:
    """Return the pattern of a UUID by RFC 9562, section 5."""
    h = "[0-9a-fA-F]"
    return f"^{h}{{8}}-{h}{{4}}-{version}{h}{{3}}-[89abAB]{h}{{3}}-{h}{{12}}$"


def _prepare_patterns(part: dict[str, Any]) -> None:
    if isinstance(part.get("pattern"), str):
        part["pattern"] = _without_controls(part["pattern"])
    if isinstance(patterns := part.get("patternProperties"), dict):
        prepared = {_without_controls(pattern): schema for pattern, schema in patterns.items()}
        if prepared.keys() != patterns.keys() and (
            len(prepared) < len(patterns) or part.get("additionalProperties") is not False
        ):
            raise _refused("a pattern of patternProperties excludes a character; set additionalProperties to false")
        part["patternProperties"] = prepared


def _without_controls(pattern: str) -> str:
    r"""Exclude control characters from classes that exclude the quotation mark or the backslash.

    JSON writes all of these as escapes, and a class with control characters lets the compiler allow any escape. Raises
    InvalidRequest for a class that names control characters.
    """

    def rewrite(found: re.Match[str]) -> str:
        characters = found[0]
        if not characters.startswith("[") or not _allows_escapes(characters):
            return characters
        if not characters.startswith("[^") or characters.startswith("[^]"):
            raise _refused(f"the class {characters[:40]} of a pattern contains control characters; remove them")
        if re.search(r"&&|--|~~", characters):
            raise _refused(f"the class {characters[:40]} of a pattern cannot be enforced; write it differently")
        return f"[^{_CONTROLS}{characters[2:]}"

    return re.sub(rf"\\.|{_CLASS.pattern}", rewrite, pattern, flags=re.DOTALL)


def _allows_escapes(characters: str) -> bool:
    """Whether a class contains control characters but lacks the quotation mark or the backslash.

    A class that Python's `re` reads differently than the compiler is assumed to, if it is negated.
    """
    plain = re.sub(r"\\.", "", characters[1:-1], flags=re.DOTALL)
    if re.search(r"\[|&&|--|~~|\|\|", plain):
        return characters.startswith("[^")
    try:
        matches = re.compile(characters, re.ASCII).fullmatch
    except (re.error, OverflowError):
        return characters.startswith("[^")
    return matches("\0") is not None and (matches('"') is None or matches("\\") is None)


def _expanded_size(pattern: str) -> int:
    """Return the characters of a pattern with all repetitions expanded, up to just over the limit."""
    sizes, last = [0], 0  # of the open groups; of the last atom
    for found in _ATOM.finditer(pattern):
        if found["open"]:
            sizes.append(0)
            last = 0
        elif found["close"] and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif found["low"] is not None:
            counts = (found["low"], found["high"] or "")
            most = max(min(int(count[:10] or 0), MAX_PATTERN + 1) for count in counts)
            sizes[-1] += last * max(most - 1, 0)
            last *= max(most, 1)
        elif found[0] not in "|^$.*+?":
            last = 1
            sizes[-1] += 1
        sizes[-1], last = min(sizes[-1], MAX_PATTERN + 1), min(last, MAX_PATTERN + 1)
    return min(sum(sizes), MAX_PATTERN + 1)
