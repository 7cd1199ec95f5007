"""`Batch`: everything that one step needs, as flat tensors. An argument of `runner.run`, never a global.

Adapters are data here: each sequence names its slots and weights, and a base-only sequence names none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from server.engine.request import Request

SlotWeights = tuple[tuple[int, float], ...]
"""The (slot, weight) pairs of one sequence's mix, in the order of its mix."""


@dataclass(frozen=True)
class Batch:
    """S sequences with T new tokens in all; L of the rows have their logits computed.

    tokens      int64 [T]     new token ids, sequence after sequence
    positions   int64 [T]     each token's position in its sequence
    row_start   int32 [S+1]   sequence s has the rows row_start[s] to row_start[s+1]
    context     int32 [S]     tokens in the cache after this step (so its new ones are the last)
    blocks      int32 [S, B]  block table, -1 beyond a sequence's last block
    logit_rows  int64 [L]     rows whose logits are wanted, ascending
    mixes       S tuples of (slot, weight)
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    row_start: torch.Tensor
    context: torch.Tensor
    blocks: torch.Tensor
    logit_rows: torch.Tensor
    mixes: tuple[SlotWeights, ...]
    block_size: int

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def sequences(self) -> int:
        return self.context.shape[0]


class Logits:
    """What a step computes: `rows`, float32 [L, vocab] of a batch's `logit_rows`, where the runner has them.

    `largest` is the first largest of each row, int64 [L], -1 for a row that has a number that is not finite. A runner
    that does not give it has it found when it is first asked for.
    """

    def __init__(self, rows: torch.Tensor, largest: npt.NDArray[np.int64] | None = None) -> None:
        self.rows = rows
        self._largest = largest

    @property
    def largest(self) -> npt.NDArray[np.int64]:
        if self._largest is None:
            values = self.rows.numpy(force=True)
            found = values.argmax(1)
            # argmax finds a NaN or +inf if there is one, and the minimum a -inf
            fine = np.isfinite(values[np.arange(len(values)), found]) & np.isfinite(values.min(1))
            self._largest = np.where(fine, found, -1)
        return self._largest


class Work(NamedTuple):
    """A request's part of a step: its next `tokens` tokens, of whose rows the last `logits` are wanted as logits."""

    request: Request
    tokens: int
    logits: int


def build_batch(work: Sequence[Work], block_size: int) -> Batch:
    """The flat tensors of a step. The work must not be empty."""
    counts = np.array([item.tokens for item in work], np.int64)
    starts = np.zeros(len(work) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    ends = np.array([item.request.computed for item in work], np.int64) + counts
    tokens = np.empty(int(starts[-1]), np.int64)
    blocks = np.full((len(work), max(len(item.request.blocks) for item in work)), -1, np.int32)
    for i, (request, count, _) in enumerate(work):
        blocks[i, : len(request.blocks)] = request.blocks
        if count == 1 and request.computed >= len(request.prompt):  # nearly every row of nearly every step
            tokens[starts[i]] = request.output[request.computed - len(request.prompt)]
        else:
            tokens[starts[i] : starts[i + 1]] = request.slice(request.computed, request.computed + count)
    positions = np.arange(len(tokens)) + np.repeat(ends - starts[1:], counts)
    wanted = np.array([item.logits for item in work], np.int64)
    rows = np.arange(int(wanted.sum())) + np.repeat(starts[1:] - np.cumsum(wanted), wanted)
    return Batch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy(positions),
        row_start=torch.from_numpy(starts),
        context=torch.from_numpy(ends.astype(np.int32)),
        blocks=torch.from_numpy(blocks),
        logit_rows=torch.from_numpy(rows),
        mixes=tuple(item.request.slots for item in work),
        block_size=block_size,
    )
