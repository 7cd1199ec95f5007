"""`settle`: glibc's malloc, told once how a server uses memory that it takes and gives back for days.

By itself it gives every thread an arena of its own and lets the size from which a block is mapped grow to that of the
largest that was freed. Adapters, of megabytes, are then cut from the arenas of whichever threads read them, between
small things that stay, and what they leave behind is not given back.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
ARENAS = 2
MAPPED = 1 << 20
"""Bytes from which a block is mapped: adapters and logits are above it, what is used in every step below."""
SLACK = 16 << 20
"""Free bytes at the top of an arena that are kept: given back at each free, they would be faulted in at each step."""


def settle() -> bool:
    """Call it before there are threads. Answers whether there was a malloc that could be told."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    told = ((M_ARENA_MAX, ARENAS), (M_MMAP_THRESHOLD, MAPPED), (M_TRIM_THRESHOLD, SLACK))
    taken = [mallopt(option, value) for option, value in told]
    return taken == [1, 1, 1]
