"""Regular expressions that strangers wrote, matched against module names in bounded time.

Owns the bound. Python's `re` backtracks and holds the interpreter lock while it does: one hostile pattern in an
adapter's config would stop every request. So a pattern that is cheap by its form is matched here, any other in a
short-lived child process that is killed when its time is over; both give exactly what `re` gives. Where this machine
has no child to give, StoreFailed says so: that tells nothing of the pattern.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import InvalidAdapter, StoreFailed, reason

MAX_PATTERN = 4096
MAX_NAME = 256
MAX_GROUPS = 64
"""Groups of a pattern that is matched here: what `re` copies at a branch grows with them."""
CHEAP_MATCH = 1e6
"""Steps of one match, through which the lock is held: some 20 ms."""
CHEAP_STEPS = 1e8
"""Steps of all matches of one call; other threads get their turns between them."""
CHILD_SECONDS = 5.0
BRANCH_STEPS = 8.0
"""What `re` takes for entering a branch of a group, in steps over one character."""

_TOKEN = re.compile(
    r"""
    (?P<open> \( (?: \?: | \?= | \?! | \?P<\w+> | (?!\?) ) )
  | (?P<close> \) ) (?P<optional> \?\?? )? (?![*+?{])
  | (?P<bar> \| )
  | (?P<one> [^\\\[\](){}*+?|] | \\[dDwWsSbBAZ] | \\[^\w\s]
      | \[\^? (?: \w-\w | [\w./:] | \\[dDwWsS.\-] )+ -?\] )
    (?: (?P<times> [*+?] | \{ (?=[0-9,]) (?P<least> [0-9]{0,4} ) (?P<range> , (?P<most> [0-9]{0,4} ) )? \} ) \?? )?
    (?![*+?{])
    """,
    re.VERBOSE,
)
"""All that a pattern may consist of if its steps are to be counted; a flag, which can change what the rest means, a
reference, a comment, a condition and a repeated group are none of it."""

_CHILD = """
import json, re, sys
patterns, names, whole = json.load(sys.stdin)
rows = []
for at, pattern in enumerate(patterns):
    try:
        compiled = re.compile(pattern)
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        json.dump({"bad": at, "why": str(error)}, sys.stdout)
        sys.exit()
    match = compiled.fullmatch if whole else compiled.match
    found = map(match, names)
    rows.append([None if m is None else m.groupdict().get("idx") or "" for m in found])
json.dump({"rows": rows}, sys.stdout)
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
    """For each name the first number that follows a part which one of PEFT's layers_pattern fits; else None. Raises
    InvalidAdapter as the other functions do."""
    formed = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    rows = _matches(formed, names, key, whole=False, inner=patterns)
    first = [next((row[n] for row in rows if row[n] is not None), None) for n in range(len(names))]
    return [int(found) if found else None for found in first]


@dataclass
class _Count:
    """Bounds for a part of a pattern from one place in a name: `ways` in which it can match, `steps` to try them all.

    The first two are of the branch that is being read, the others of the branches before it.
    """

    ways: float = 1.0
    steps: float = BRANCH_STEPS
    other_ways: float = 0.0
    other_steps: float = 0.0

    def then(self, ways: float, steps: float) -> None:
        """What follows is tried once for each way in which what is before it matches."""
        self.steps += self.ways * steps
        self.ways *= ways

    def branch(self) -> None:
        self.other_ways += self.ways
        self.other_steps += self.steps
        self.ways, self.steps = 1.0, BRANCH_STEPS


def steps(pattern: str, length: int) -> float:
    """An upper bound on the steps of matching `pattern` at the start of a name of `length`; infinite if there is none.

    A pattern is bounded if it consists of known constructs alone and repeats single characters only, never a group.
    """
    if pattern.count("(") > MAX_GROUPS:
        return math.inf
    counts, at = [_Count()], 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return math.inf
        at = token.end()
        if token["open"]:
            counts.append(_Count())
        elif token["bar"]:
            counts[-1].branch()
        elif token["close"]:
            inner = counts.pop()
            if not counts:
                return math.inf
            inner.branch()
            skipped = 1.0 if token["optional"] else 0.0
            counts[-1].then(inner.other_ways + skipped, inner.other_steps + skipped)
        else:
            ways = _repetitions(token, length)
            work = float(len(token["one"]))
            counts[-1].then(ways, work if token["times"] is None else work * length + ways)
    if len(counts) > 1:
        return math.inf
    counts[0].branch()
    return counts[0].other_steps


def _repetitions(token: re.Match[str], length: int) -> float:
    """How many counts of its repetitions one character of a pattern may have in a name of `length`."""
    if token["times"] is None:
        return 1.0
    if token["times"] in "*+":
        return length + 1.0
    if token["times"] == "?":
        return 2.0
    least = int(token["least"] or 0)
    most = least if token["range"] is None else int(token["most"] or length)
    return max(min(most, length) - least, 0) + 1.0


def _check_length(pattern: str, key: str) -> None:
    if len(pattern) > MAX_PATTERN:
        raise InvalidAdapter(f"{key}: a pattern of {len(pattern)} characters is over the limit of {MAX_PATTERN}", key)


def _matches(
    patterns: Sequence[str], names: Sequence[str], key: str, *, whole: bool, inner: Sequence[str] | None = None
) -> list[list[str | None]]:
    """One row per pattern: None where it does not match, else what its group `idx` has found ("" if nothing).

    `inner` are the parts that strangers wrote, for messages.
    """
    shown = inner or patterns
    for part in shown:
        _check_length(part, key)
    for name in names:
        if len(name) > MAX_NAME or "\n" in name:
            raise InvalidAdapter(f"the module name {name[:80]!r} is too long or has a line break", key)
    length = max(map(len, names), default=0)
    costs = [steps(pattern, length) for pattern in patterns]
    if max(costs, default=0.0) > CHEAP_MATCH or len(names) * sum(costs) > CHEAP_STEPS:
        return _in_a_child(patterns, names, key, whole, shown)
    rows = []
    for pattern, part in zip(patterns, shown, strict=True):
        try:
            compiled = re.compile(pattern)
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise _no_pattern(part, str(error), key) from error
        found = map(compiled.fullmatch if whole else compiled.match, names)
        rows.append([None if m is None else m.groupdict().get("idx") or "" for m in found])
    return rows


def _no_pattern(pattern: str, reason: str, key: str) -> InvalidAdapter:
    return InvalidAdapter(f"{key}: {pattern[:80]!r} is no valid pattern ({reason})", key)


def _in_a_child(
    patterns: Sequence[str], names: Sequence[str], key: str, whole: bool, shown: Sequence[str]
) -> list[list[str | None]]:
    """The same in a process that is killed when its time is over. Compiling a pattern can take long as well."""
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
        why = reason(error) if isinstance(error, OSError) else f"the process for it ended with {error.returncode}"
        raise StoreFailed(f"{key}: its patterns cannot be matched now: {why}", key) from error
    answer = json.loads(done.stdout)
    if "bad" in answer:
        raise _no_pattern(shown[answer["bad"]], answer["why"], key)
    rows: list[list[str | None]] = answer["rows"]
    return rows
