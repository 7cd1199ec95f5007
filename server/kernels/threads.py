"""Torch's threads, and whose they are. Owns nothing but the rule; does not know models or engines.

OpenMP gives each thread that computes a pool of its own. As soon as the pools of a process have more threads than
there are processors, idle ones included, libgomp no longer spins at a barrier but sleeps, and every small product
pays for two wake-ups: a decode step of 16 sequences goes from 36 ms to 50, one with sixteen adapters from 50 to 84
(measured on two cores). So one thread, the engine's, has a pool, and no other keeps one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

T = TypeVar("T")


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
