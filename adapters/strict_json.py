"""JSON of files that people and tools write: a key that is there twice is one too many. Knows no file."""

from __future__ import annotations

from collections import Counter
from typing import Any


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `json.loads(..., object_pairs_hook=once)`: an object in which no key is twice. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found
