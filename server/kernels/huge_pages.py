"""`pages`: memory that steps walk from end to end, on huge pages as far as the system has them.

Owns how such memory is asked for. A step reads all weights and each adapter of its batch once; small pages that lie
apart are looked up one by one, and the processor's own prefetching ends with each.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path

import torch

HUGE = 2 << 20
"""Bytes of a huge page, which begins at a multiple of them."""

HUGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
"""Whether the system knows huge pages: Linux does."""

_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14, which the mmap module does not name."""


def zeros(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros [size], on huge pages as far as whole ones fit. The memory goes back to the system with the tensor."""
    nbytes = size * dtype.itemsize
    if nbytes < HUGE or not HUGE_PAGES:
        return torch.zeros(size, dtype=dtype)
    room = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(room)) % HUGE
    # A kernel that was built without them says so, and has small pages.
    with contextlib.suppress(OSError):
        room.madvise(mmap.MADV_HUGEPAGE, start, nbytes)
    return torch.frombuffer(room, dtype=dtype, count=size, offset=start)


def mapped(path: Path) -> torch.Tensor:
    """The bytes of a file, uint8 [size], in its own pages, which all who map it share. Raises OSError, and ValueError
    for an empty file.

    What is written to them stays in this process. All of the file is read now, if it is not in memory, into huge pages
    where its file system has them. What is in memory stays in pages of the size that they have. They count as this
    process's once it touches them.
    """
    with path.open("rb") as file:
        room = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    # Asking for the pages fills this process's page tables too: the last advice empties those, and the pages stay.
    for advice in (mmap.MADV_HUGEPAGE, _POPULATE_READ, mmap.MADV_DONTNEED) if HUGE_PAGES else ():
        # A kernel that lacks one of them says so; a disk that fails does when the bytes are read.
        with contextlib.suppress(OSError):
            room.madvise(advice)
    return torch.frombuffer(room, dtype=torch.uint8)
