"""The range of random seeds."""

from __future__ import annotations

from adapters.errors import AdapterError

SEEDS = (-(1 << 63), (1 << 64) - 1)
"""The seeds that `torch.Generator` accepts: 64 bits, signed or unsigned."""


def check_seed(seed: int) -> int:
    """Return `seed`. Raises AdapterError if it is out of range."""
    if not SEEDS[0] <= seed <= SEEDS[1]:
        raise AdapterError(f"seed must be an integer from -2**63 to 2**64 - 1, not {seed}", "seed")
    return seed
