"""Matches untrusted regular expressions against module names in bounded time.

`re` backtracks while it holds the GIL, so a hostile pattern in an adapter's config would stop every request. A pattern
with a low step bound is matched in this process; any other in a child process with a time limit. Results equal `re`'s.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import InvalidAdapter, StoreFailed, error_text

MAX_PATTERN = 4096
MAX_NAME = 256
MAX_GROUPS = 64
"""Most groups of a pattern that is matched in this process: `re` copies them at each branch."""
CHEAP_MATCH = 1e6
"""Steps of one match, during which the GIL is held: about 20 ms."""
CHEAP_STEPS = 1e8
"""Steps of all matches of one call; other threads can run between matches."""
CHILD_SECONDS = 5.0
BRANCH_STEPS = 8.0
"""Cost of entering a branch, in steps."""

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
"""The constructs whose steps can be counted. Flags, references, comments, conditions and repeated groups are not."""

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
    """Return whether `pattern` matches each whole name.

    Raises InvalidAdapter for an invalid or slow pattern, naming the config `key`; StoreFailed if no process can start.
    """
    return [found is not None for found in _matches([pattern], names, key, whole=True)[0]]


def first_suffix_match(patterns: Sequence[str], names: Sequence[str], key: str) -> list[int | None]:
    """Return for each name the index of the first pattern that matches it or a suffix after a dot; else None.

    This is PEFT's rule for the keys of rank_pattern and alpha_pattern. Raises as `full_matches`.
    """
    rows = _matches([rf"(.*\.)?({pattern})$" for pattern in patterns], names, key, whole=False, inner=patterns)
    return [next((i for i, row in enumerate(rows) if row[n] is not None), None) for n in range(len(names))]


def layer_numbers(patterns: Sequence[str], names: Sequence[str], key: str) -> list[int | None]:
    """Return for each name the first number after a part that one of PEFT's layers_pattern matches; else None.

    Raises as `full_matches`.
    """
    formed = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    rows = _matches(formed, names, key, whole=False, inner=patterns)
    first = [next((row[n] for row in rows if row[n] is not None), None) for n in range(len(names))]
    return [int(found) if found else None for found in first]


@dataclass
class _Count:
    """Upper bounds for a group at one position: the ways it can match, and the steps to try them all.

    `ways` and `steps` are for the current branch, the others for the branches before it.
    """

    ways: float = 1.0
    steps: float = BRANCH_STEPS
    other_ways: float = 0.0
    other_steps: float = 0.0

    def then(self, ways: float, steps: float) -> None:
        """Append a part, which is tried once for each way in which the parts before it match."""
        self.steps += self.ways * steps
        self.ways *= ways

    def branch(self) -> None:
        self.other_ways += self.ways
        self.other_steps += self.steps
        self.ways, self.steps = 1.0, BRANCH_STEPS


def steps(pattern: str, length: int) -> float:
    """Return an upper bound on the steps to match `pattern` at the start of a name of `length`.

    Infinite for unknown constructs and repeated groups.
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
    """Return how many different repetition counts a character can have in a name of `length`."""
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
    """Return one row per pattern: the text of its group `idx` per name ("" if none), or None for no match.

    `inner` are the untrusted parts of the patterns, for messages.
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
        return _in_child_process(patterns, names, key, whole, shown)
    rows = []
    for pattern, part in zip(patterns, shown, strict=True):
        try:
            compiled = re.compile(pattern)
        except (ValueError, re.error, RecursionError, OverflowError) as error:
            raise _invalid_pattern(part, str(error), key) from error
        found = map(compiled.fullmatch if whole else compiled.match, names)
        rows.append([None if m is None else m.groupdict().get("idx") or "" for m in found])
    return rows


def _invalid_pattern(pattern: str, reason: str, key: str) -> InvalidAdapter:
    return InvalidAdapter(f"{key}: {pattern[:80]!r} is not a valid pattern ({reason})", key)


def _in_child_process(
    patterns: Sequence[str], names: Sequence[str], key: str, whole: bool, shown: Sequence[str]
) -> list[list[str | None]]:
    """Match in a child process with a time limit. Compiling a pattern can be slow, too."""
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
            f"{key}: matching {len(names)} module names took longer than {CHILD_SECONDS:g} s; "
            "write the patterns without nested repetition",
            key,
        ) from error
    except (OSError, subprocess.CalledProcessError) as error:
        why = error_text(error) if isinstance(error, OSError) else f"the process exited with {error.returncode}"
        raise StoreFailed(f"{key}: the patterns cannot be matched now: {why}", key) from error
    answer = json.loads(done.stdout)
    if "bad" in answer:
        raise _invalid_pattern(shown[answer["bad"]], answer["why"], key)
    rows: list[list[str | None]] = answer["rows"]
    return rows
