"""How near to the machine's limit a step comes: bytes and operations counted from the batch, over measured ceilings.

Owns the count and the two ceilings. The formulas are those of any roofline: a step can not be faster than the bytes
that it must read over the memory's speed, nor than its operations over the arithmetic's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from adapters.weights import LoraWeights
from server.model.loader import Base

KV_BYTES = 2
"""Bytes of one cached number, bfloat16."""


@dataclass(frozen=True)
class Ceilings:
    """What this machine reached, in this run: bytes read a second, int8 operations a second."""

    bytes_per_second: float
    ops_per_second: float


@dataclass(frozen=True)
class Cost:
    """What one step can not avoid: bytes to read from memory, and multiply-adds counted as two operations."""

    nbytes: float
    ops: float

    def seconds(self, ceilings: Ceilings) -> float:
        """The shortest time that the step could take."""
        return max(self.nbytes / ceilings.bytes_per_second, self.ops / ceilings.ops_per_second)


def measure(threads: int, repeats: int = 5) -> Ceilings:
    """Read a gigabyte and multiply int8 matrices with `threads` threads; the best of `repeats`."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        data = torch.ones(1 << 28)
        n = 2048
        a = torch.randint(-127, 127, (n, n), dtype=torch.int8)
        b = torch.randint(-127, 127, (n, n), dtype=torch.int8).t()
        read = min(_timed(data.sum) for _ in range(repeats))
        multiply = min(_timed(lambda: torch._int_mm(a, b)) for _ in range(repeats))
        return Ceilings(data.nbytes / read, 2 * n**3 / multiply)
    finally:
        torch.set_num_threads(before)


def decode_cost(base: Base, contexts: Sequence[int], mixes: Sequence[Sequence[LoraWeights]]) -> Cost:
    """One token for each sequence: its context's length in tokens, and the adapters of its mix.

    The base and each distinct adapter are read once, each sequence's keys and values once.
    """
    config = base.config
    linears = [w for path, w in base.weights.items() if path in base.shapes()]
    table = base.weights["model.embed_tokens"] if config.tie_word_embeddings else base.weights["lm_head"]
    kv_row = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    distinct = {w.digest: w for mix in mixes for w in mix}
    nbytes = sum(w.nbytes for w in linears) + table.nbytes
    nbytes += sum(contexts) * kv_row * KV_BYTES + sum(w.nbytes for w in distinct.values())
    per_row = sum(w.shape[0] * w.shape[1] for w in linears) + table.shape[0] * table.shape[1]
    # Of true ranks and widths: what a backend fills its layout up with need not be computed.
    lora = sum(m.rank * sum(m.shape) for mix in mixes for w in mix for m in w.modules.values())
    attention = 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * sum(contexts)
    return Cost(nbytes, 2.0 * (len(contexts) * per_row + lora + attention))


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
