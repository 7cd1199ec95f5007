"""What a generator of torch may begin with."""

from __future__ import annotations

from adapters.errors import AdapterError

SEEDS = (-(1 << 63), (1 << 64) - 1)
"""64 bits, with a sign or without."""


def check_seed(seed: int) -> int:
    """`seed`. Raises AdapterError for one that is out of range."""
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise AdapterError(f"seed must be a whole number of 64 bits, up to 2**64 - 1, not {seed}", "seed")
    return seed
