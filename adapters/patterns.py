"""Regular expressions that strangers wrote, matched against module names in bounded time.

Owns the bound. Python's `re` backtracks and holds the interpreter lock while it does: one hostile pattern in an
adapter's config would stop every request. So a pattern that is cheap by its form is matched here, any other in a
short-lived child process that is killed when its time is over; both give exactly what `re` gives.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence

from adapters.errors import InvalidAdapter

MAX_PATTERN = 4096
MAX_NAME = 256
CHEAP_STEPS = 2e9
CHILD_SECONDS = 5.0

_PLAIN = re.compile(r"[\w.\-]+")
_REPEATED_GROUP = re.compile(r"\)[*+?{]")
_CHILD = """
import json, re, sys
patterns, names, whole = json.load(sys.stdin)
match = re.fullmatch if whole else re.match
found = [[match(p, n) for n in names] for p in patterns]
json.dump([[None if m is None else m.groupdict().get("idx") or "" for m in row] for row in found], sys.stdout)
"""


def full_matches(pattern: str, names: Sequence[str], key: str) -> list[bool]:
    """Whether `pattern` matches the whole of each name. Raises InvalidAdapter, naming the config `key`."""
    return [found is not None for found in _matches([pattern], names, key, whole=True)[0]]


def first_suffix_match(patterns: Sequence[str], names: Sequence[str], key: str) -> list[int | None]:
    """For each name the index of the first pattern that matches it, or what follows one of its dots; else None.

    This is PEFT's rule for the keys of rank_pattern and alpha_pattern. Raises InvalidAdapter, naming the config `key`.
    """
    rows = _matches([rf"(.*\.)?({pattern})$" for pattern in patterns], names, key, whole=False, inner=patterns)
    return [next((i for i, row in enumerate(rows) if row[n] is not None), None) for n in range(len(names))]


def layer_numbers(patterns: Sequence[str], names: Sequence[str], key: str) -> list[int | None]:
    """For each name the first number that follows a part which one of PEFT's layers_pattern fits; else None."""
    formed = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    rows = _matches(formed, names, key, whole=False, inner=patterns)
    first = [next((row[n] for row in rows if row[n] is not None), None) for n in range(len(names))]
    return [int(found) if found else None for found in first]


def steps(pattern: str, length: int) -> float:
    """An upper bound on the steps that matching a name of `length` can take; infinite if its form gives none."""
    if _PLAIN.fullmatch(pattern):
        return float(length * length)
    if _REPEATED_GROUP.search(pattern):
        return float("inf")
    repeats = sum(pattern.count(c) for c in "*+?{")
    bars = pattern.count("|")
    groups = min(pattern.count("(") + 1, bars)
    ways = (bars / groups + 1.0) ** groups if groups else 1.0
    return float(length) ** (repeats + 1) * ways


def _check_length(pattern: str, key: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise InvalidAdapter(f"{key}: a pattern of {len(pattern)} characters is over the limit of {MAX_PATTERN}", key)


def _matches(
    patterns: Sequence[str], names: Sequence[str], key: str, *, whole: bool, inner: Sequence[str] | None = None
) -> list[list[str | None]]:
    """One row per pattern: None where it does not match, else what its group `idx` has found ("" if nothing).

    `inner` are the parts that strangers wrote, whose form bounds the steps.
    """
    compiled = []
    for pattern, shown in zip(patterns, inner or patterns, strict=True):
        _check_length(shown, key)
        try:
            compiled.append(re.compile(pattern))
        except (re.error, RecursionError, OverflowError) as error:
            raise InvalidAdapter(f"{key}: {shown[:80]!r} is no valid pattern ({error})", key) from error
    for name in names:
        if len(name) > MAX_NAME or "\n" in name:
            raise InvalidAdapter(f"the module name {name[:80]!r} is too long or has a line break", key)
    length = max(map(len, names), default=0)
    cost = len(names) * sum(steps(p, length) for p in inner or patterns)
    if cost > CHEAP_STEPS:
        return _in_a_child(patterns, names, key, whole)
    found = [[c.fullmatch(n) if whole else c.match(n) for n in names] for c in compiled]
    return [[None if m is None else m.groupdict().get("idx") or "" for m in row] for row in found]


def _in_a_child(patterns: Sequence[str], names: Sequence[str], key: str, whole: bool) -> list[list[str | None]]:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _CHILD],
            input=json.dumps([list(patterns), list(names), whole]),
            capture_output=True,
            text=True,
            timeout=CHILD_SECONDS,
            check=True,
        )
    except subprocess.TimeoutExpired as error:
        raise InvalidAdapter(
            f"{key}: its patterns did not finish on {len(names)} module names in {CHILD_SECONDS:g} s; "
            "write them without nested repetition",
            key,
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        raise InvalidAdapter(f"{key}: its patterns could not be matched ({error})", key) from error
    answers: list[list[str | None]] = json.loads(done.stdout)
    return answers
