"""Roofline model: the bytes and operations of a step, and the measured memory bandwidth and int8 rate.

A step takes at least bytes / bandwidth and at least operations / rate.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.weights import LoraWeights
from server.kernels import cpu
from server.kernels.huge_pages import zeros
from server.model.loader import Base

KV_BYTES = 2
"""Bytes of one cached number, bfloat16."""
IDLE_SECONDS = 0.01
"""Longer than pool threads spin before they sleep."""


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the machine."""

    bytes_per_second: float
    ops_per_second: float


@dataclass(frozen=True)
class Cost:
    """Bytes that a step must read, and its operations; a multiply-add counts as two."""

    nbytes: float
    ops: float

    def seconds(self, ceilings: Ceilings) -> float:
        """Minimum duration of the step."""
        return max(self.nbytes / ceilings.bytes_per_second, self.ops / ceilings.ops_per_second)


class Meter:
    """Measures the limits with 256 MiB of memory and two int8 matrices, using `threads` threads.

    Each limit is the faster of two methods. Memory is read linearly, and as a matrix-vector product that reads several
    pages at the same time, which some prefetchers serve faster. It uses huge pages where available, like the weights.
    The second int8 matrix is stored by rows or by columns.
    """

    def __init__(self, threads: int) -> None:
        n = 2048
        self._threads = threads
        self._data = zeros(1 << 26, torch.float32).fill_(1.0)
        self._ones = torch.ones(1 << 14)
        self._a = torch.randint(-127, 127, (n, n), dtype=torch.int8)
        self._b = torch.randint(-127, 127, (n, n), dtype=torch.int8)
        self._taken: list[Ceilings] = []

    def take(self) -> Ceilings:
        """Measure once, as the best of three, while the threads of other work sleep."""
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            time.sleep(IDLE_SECONDS)
            read = min(_timed(read) for read in (self._data.sum, self._side_by_side) for _ in range(3))
            multiply = min(_timed(product) for product in (self._by_rows, self._by_columns) for _ in range(3))
            time.sleep(IDLE_SECONDS)
        finally:
            torch.set_num_threads(before)
        self._taken.append(Ceilings(self._data.nbytes / read, 2 * self._a.shape[0] ** 3 / multiply))
        return self._taken[-1]

    def _side_by_side(self) -> torch.Tensor:
        return self._data.view(-1, len(self._ones)) @ self._ones

    def _by_rows(self) -> torch.Tensor:
        return torch._int_mm(self._a, self._b)

    def _by_columns(self) -> torch.Tensor:
        return torch._int_mm(self._a, self._b.t())

    def median(self) -> Ceilings:
        """Of what has been taken: steps that are measured in turn with it are medians too."""
        return Ceilings(
            statistics.median(c.bytes_per_second for c in self._taken),
            statistics.median(c.ops_per_second for c in self._taken),
        )


def decode_cost(base: Base, contexts: Sequence[int], mixes: Sequence[Sequence[LoraWeights]]) -> Cost:
    """One token for each sequence: its context's length in tokens, and the adapters of its mix.

    The base and each distinct adapter are read once, each sequence's keys and values once.
    """
    config = base.config
    linears = [w for path, w in base.weights.items() if path in base.shapes()]
    table = base.weights["model.embed_tokens"] if config.tie_word_embeddings else base.weights["lm_head"]
    distinct = {w.digest: w for mix in mixes for w in mix}
    unread = cpu.unused_tensors() if base.backend.name == "native" else ()
    nbytes = sum(t.nbytes for w in (*linears, table) for name, t in w.tensors.items() if name not in unread)
    nbytes += sum(contexts) * config.kv_values * KV_BYTES + sum(w.nbytes for w in distinct.values())
    per_row = sum(w.shape[0] * w.shape[1] for w in linears) + table.shape[0] * table.shape[1]
    # Of true ranks and widths: what a backend fills its layout up with need not be computed.
    lora = sum(m.rank * sum(m.shape) for mix in mixes for w in mix for m in w.modules.values())
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sum(contexts)
    return Cost(nbytes, 2.0 * (len(contexts) * per_row + lora + attention))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
