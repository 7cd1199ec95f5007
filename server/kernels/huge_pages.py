"""Memory on huge pages, which reduces TLB misses when a step reads all weights and adapters."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path

import torch

HUGE = 2 << 20
"""Bytes of a huge page, and its alignment."""

HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
"""Whether the system supports huge pages (Linux)."""

_POPULATE_READ = 22
"""MADV_POPULATE_READ (Linux 5.14), which the mmap module lacks."""


def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [size], on huge pages where whole ones fit. The memory is freed with the tensor."""
    nbytes = size * dtype.itemsize
    if nbytes < HUGE or not HUGE_PAGES:
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % HUGE
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE, start, nbytes)
    return torch.frombuffer(memory, dtype=dtype, count=size, offset=start)


def mapped(path: Path) -> torch.Tensor:
    """Map a file as uint8 [size], copy-on-write, and read it into the page cache now.

    The page cache uses huge pages if the file system supports them. All processes that map the file share the pages.
    A page counts as this process's memory once it is touched.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is empty.
    """
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Populating fills this process's page tables too; MADV_DONTNEED empties them, and the page cache stays.
    for advice in (mmap.MADV_HUGEPAGE, _POPULATE_READ, mmap.MADV_DONTNEED) if HUGE_PAGES else ():
        with contextlib.suppress(OSError):  # advice only; an unreadable disk fails at the first access
            memory.madvise(advice)
    return torch.frombuffer(memory, dtype=torch.uint8)
