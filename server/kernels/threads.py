"""Torch's threads, and whose they are. Owns nothing but the rule; does not know models or engines.

OpenMP gives each thread that computes a pool of its own. As soon as the pools of a process have more threads than
there are processors, idle ones included, libgomp no longer spins at a barrier but sleeps, and every small product
pays for two wake-ups: a decode step of 16 sequences goes from 36 ms to 50, one with sixteen adapters from 50 to 84
(measured on two cores). So one thread, the engine's, has a pool, and no other keeps one.
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


def processors() -> int:
    """How many processors this process may keep busy: those of its affinity, and what its control groups leave of them
    (as `docker run --cpus` and systemd's `CPUQuota` set them), rounded up."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([found, *map(math.ceil, _quotas())]))


def _quotas() -> Iterator[float]:
    """Processors that each group around this process may have: `cpu.max` of cgroup v2, the two files of v1."""
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
                told = " ".join((root / group.relative_to("/") / file).read_text("ascii") for file in files)
                quota, period = map(int, told.split())
            except (OSError, ValueError):  # the root group has no such file, and without a quota v2's says "max"
                continue
            if quota > 0:  # v1's says -1 then
                yield quota / period


def apart(call: Callable[[], T]) -> T:
    """What `call` returns or raises, computed on a thread that ends with it, and with it the pool that it used."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    # A daemon, since whoever interrupts the wait does not want to wait for the rest either.
    thread = threading.Thread(target=run, name="loramux-apart", daemon=True)
    thread.start()
    thread.join()
    return done.result()


def take(count: int) -> None:
    """Give the calling thread a pool of `count`; threads that have not computed yet compute alone."""
    torch.set_num_threads(count)
    torch.get_num_threads()  # a thread takes the process's number when it first asks for its own, and keeps it
    # What a thread starts with is the last number that any thread set.
    others = threading.Thread(target=torch.set_num_threads, args=(1,), name="loramux-alone")
    others.start()
    others.join()
