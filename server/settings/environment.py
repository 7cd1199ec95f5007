"""Environment variables of this process and its children that are not settings."""

from __future__ import annotations

import os
from pathlib import Path

KERNEL_CACHE_LIMITS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""oneDNN and torch cache a kernel for each of the last 1,024 shapes by default: a gigabyte if shapes change often."""

_FEWER_THREADS = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT")
_BOUND_THREADS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def keep_few_kernels() -> None:
    """Set KERNEL_CACHE_LIMITS in this process, unless they are set. Call it before the first matrix product."""
    for name, value in KERNEL_CACHE_LIMITS.items():
        os.environ.setdefault(name, value)


def training_environment() -> dict[str, str]:
    """Environment of a training process."""
    return {**KERNEL_CACHE_LIMITS, **os.environ}


def fetching_environment(scratch: Path) -> dict[str, str]:
    """Environment of a pip process that writes its temporary files to `scratch`."""
    return {**os.environ, "TMPDIR": str(scratch.resolve())}


def keep_transfers_in(cache: Path) -> None:
    """Let the hub client keep its transfer cache in `cache`, unless HF_XET_CACHE is set. Call it before its import."""
    os.environ.setdefault("HF_XET_CACHE", str(cache.resolve() / "xet"))


def leave_threads_alone() -> list[str]:
    """Remove OpenMP variables that break the thread pool, and return their names. Call it before torch is imported.

    With fewer threads than torch expects, oneDNN leaves parts of a product uncomputed. Bound threads make all threads
    of this process inherit one processor.
    """
    return [name for name in (*_FEWER_THREADS, *_BOUND_THREADS) if os.environ.pop(name, None) is not None]
