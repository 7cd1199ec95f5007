"""Strict JSON parsing for files from users."""

from __future__ import annotations

from collections import Counter
from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object and reject duplicate keys; an `object_pairs_hook` of `json.loads`. Raises ValueError."""
    found = dict(pairs)
    if len(found) < len(pairs):
        duplicate = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {duplicate!r} is there twice")
    return found
