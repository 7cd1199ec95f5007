"""`Batch`: everything that one step needs, as flat tensors. An argument of `runner.run`, never a global.

Adapters are data here: each sequence names its slots and weights, and a base-only sequence names none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
