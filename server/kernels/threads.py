"""Torch's thread pools.

OpenMP gives each computing thread a pool of its own. If the pools of a process have more threads than there are
processors together, libgomp sleeps at barriers instead of spinning, and a decode step slows down from 36 ms to 50 ms.
So only the engine's thread has a pool.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path, PurePosixPath
from typing import TypeVar

import torch

T = TypeVar("T")

CGROUP, CGROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_cpus() -> int:
    """Processors that this process may use: its CPU affinity, limited by cgroup quotas (`docker run --cpus`)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """CPU quotas of the cgroups of this process: `cpu.max` of cgroup v2, two files of v1."""
    try:
        lines = CGROUP.read_text("utf-8").splitlines()
    except OSError:
        return
    for _, controllers, own in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if not controllers:
            root, files = CGROUPS, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, files = CGROUPS / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        for group in (PurePosixPath(own), *PurePosixPath(own).parents):
            try:
                text = " ".join((root / group.relative_to("/") / file).read_text("ascii") for file in files)
                quota, period = map(int, text.split())
            except (OSError, ValueError):  # the root group has no such file; v2 writes "max" for no quota
                continue
            if quota > 0:  # v1 writes -1 for no quota
                yield quota / period


def run_in_thread(call: Callable[[], T]) -> T:
    """Run `call` on a temporary thread, whose OpenMP pool ends with it. Returns its result or raises its exception."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    # A daemon, so that an interrupted wait does not block the exit.
    thread = threading.Thread(target=run, name="loramux-temporary", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def own_thread_pool(count: int) -> None:
    """Give the calling thread a pool of `count` threads. Threads that have not computed yet get none."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread keeps the number that is set when it first asks
    # New threads start with the number that was set last by any thread.
    other = threading.Thread(target=torch.set_num_threads, args=(1,), name="loramux-single")
    other.start()
    other.join()
