"""`Batch`: everything that one step needs, as flat arrays. An argument of `runner.run`, never a global.

Adapters are data here: each sequence names its slots and weights, and a base-only sequence names none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from server.engine.request import Request
from server.kernels.lora import SlotWeights

Ids = npt.NDArray[np.int64]
Counts = npt.NDArray[np.int32]


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

    tokens: Ids
    positions: Ids
    row_start: Counts
    context: Counts
    blocks: Counts
    logit_rows: Ids
    mixes: tuple[SlotWeights, ...]

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def sequences(self) -> int:
        return len(self.context)


def _already() -> None:
    """What is there need not be waited for."""


class Logits:
    """What a step computes: `rows`, float32 [L, vocab] of a batch's `logit_rows`, where the runner has them.

    `largest` is the first largest of each row, int64 [L], -1 for a row that has a number that is not finite. A runner
    that does not give it has it found when it is first asked for. Either is waited for, by `wait`, when it is read;
    `unread` are the rows as they may not be yet, for the runner's own thread or device.
    """

    def __init__(
        self,
        rows: torch.Tensor | npt.NDArray[np.float32],
        largest: Ids | None = None,
        wait: Callable[[], None] = _already,
    ) -> None:
        self._rows = rows
        self._largest = largest
        self._wait = wait

    def wait(self) -> None:
        """Returns once they are there. Raises what the step has failed at."""
        self._wait()

    @property
    def unread(self) -> torch.Tensor:
        return torch.as_tensor(self._rows)

    @property
    def rows(self) -> torch.Tensor:
        self.wait()
        return self.unread

    @property
    def knows_largest(self) -> bool:
        """Whether `largest` costs nothing."""
        return self._largest is not None

    def part(self, start: int, stop: int) -> Logits:
        """Some of the rows, in the host's memory."""
        return Logits(self.rows[start:stop].cpu(), None if self._largest is None else self._largest[start:stop])

    @property
    def largest(self) -> Ids:
        self.wait()
        if self._largest is None:
            values = self.unread.numpy(force=True)
            found = values.argmax(1)
            # argmax finds a NaN or +inf if there is one, and the minimum a -inf
            fine = np.isfinite(values[np.arange(len(values)), found]) & np.isfinite(values.min(1))
            self._largest = np.where(fine, found, -1)
        return self._largest


_NO_BLOCK = b"\xff"
"""Four of it are -1, which stands in a block table beyond a sequence's last block."""


def most_tokens(max_step_tokens: int, max_batch: int) -> int:
    """Rows that a step may have: those of `max_batch` requests and one of a prompt at least."""
    return max(max_step_tokens, max_batch + 1)


def most_logits(max_batch: int) -> int:
    """Rows of a step that may have logits: those of requests that generate, and of prompts that are scored."""
    return max(64, 2 * max_batch)


class ScheduledRequest(NamedTuple):
    """A request's part of a step: its next `tokens` tokens, of whose rows the last `logits` are wanted as logits."""

    request: Request
    tokens: int
    logits: int


def build_batch(work: Sequence[ScheduledRequest]) -> Batch:
    """The flat arrays of a step. The work must not be empty."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, ends = [0], []
    rows: list[int] = []
    tables: list[bytes] = []
    for request, count, logits in work:
        start = request.computed
        if count == 1 and start >= len(request.prompt):  # nearly every row of nearly every step
            tokens.append(request.output[start - len(request.prompt)])
            positions.append(start)
        else:
            tokens.extend(request.slice(start, start + count))
            positions.extend(range(start, start + count))
        starts.append(len(tokens))
        ends.append(start + count)
        rows.extend(range(len(tokens) - logits, len(tokens)))
        tables.append(request.blocks.tobytes())
    width = max(map(len, tables))
    blocks = bytearray().join([table.ljust(width, _NO_BLOCK) for table in tables])
    return Batch(
        tokens=np.array(tokens, np.int64),
        positions=np.array(positions, np.int64),
        row_start=np.array(starts, np.int32),
        context=np.array(ends, np.int32),
        blocks=np.frombuffer(blocks, np.int32).reshape(len(work), -1),
        logit_rows=np.array(rows, np.int64),
        mixes=tuple([item.request.slots for item in work]),
    )
