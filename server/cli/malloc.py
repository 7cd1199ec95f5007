"""glibc malloc settings for a process that allocates and frees adapters for days."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # from malloc.h
ARENAS = 2
MMAP_THRESHOLD = 1 << 20
"""Blocks of this size use mmap: adapters and logits do, allocations of every step do not."""
TRIM_THRESHOLD = 16 << 20
"""Free bytes kept at the top of an arena, so that steps do not fault the same pages in again."""


def configure_malloc() -> bool:
    """Limit arenas and use mmap for large blocks, so that freed adapters return their memory to the system.

    Call it before threads start. Returns False if the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    options = ((M_ARENA_MAX, ARENAS), (M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_TRIM_THRESHOLD, TRIM_THRESHOLD))
    return [mallopt(option, value) for option, value in options] == [1, 1, 1]
