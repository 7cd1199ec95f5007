"""`Batch`: the input of one step as flat arrays, and `Logits`, its result."""

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
    """S sequences with T new tokens in total. L of the rows need logits.

    tokens      int64 [T]     new token ids, sequence after sequence
    positions   int64 [T]     position of each token in its sequence
    row_start   int32 [S+1]   sequence s has the rows row_start[s] to row_start[s+1]
    context     int32 [S]     tokens in the KV cache after this step
    blocks      int32 [S, B]  block table, padded with -1
    logit_rows  int64 [L]     rows that need logits, ascending
    mixes       S tuples of (slot, weight), empty for the base alone
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


def _no_wait() -> None:
    """The results are available already."""


class Logits:
    """The result of a step. Reading `rows` or `largest` waits for it.

    Args:
        rows: float32 [L, vocab] logits of the batch's `logit_rows`, where the runner has them.
        largest: int64 [L] index of the first maximum of each row, or -1 if the row has a value that is not finite.
            Computed on demand if None.
        wait: Waits until both are available. Raises the step's error.
    """

    def __init__(
        self,
        rows: torch.Tensor | npt.NDArray[np.float32],
        largest: Ids | None = None,
        wait: Callable[[], None] = _no_wait,
    ) -> None:
        self._rows = rows
        self._largest = largest
        self._wait = wait

    def wait(self) -> None:
        """Wait until the results are available. Raises the step's error."""
        self._wait()

    @property
    def unread(self) -> torch.Tensor:
        """The rows without waiting, for the runner's own thread or device."""
        return torch.as_tensor(self._rows)

    @property
    def rows(self) -> torch.Tensor:
        self.wait()
        return self.unread

    @property
    def has_largest(self) -> bool:
        """Whether `largest` is known without computing it."""
        return self._largest is not None

    def part(self, start: int, stop: int) -> Logits:
        """Return some of the rows in the host's memory."""
        return Logits(self.rows[start:stop].cpu(), None if self._largest is None else self._largest[start:stop])

    @property
    def largest(self) -> Ids:
        self.wait()
        if self._largest is None:
            values = self.unread.numpy(force=True)
            found = values.argmax(1)
            # argmax finds NaN or +inf, min finds -inf
            is_finite = np.isfinite(values[np.arange(len(values)), found]) & np.isfinite(values.min(1))
            self._largest = np.where(is_finite, found, -1)
        return self._largest


_NO_BLOCK = b"\xff"
"""Four of these bytes are the int32 -1, the padding of a block table."""


def step_token_limit(max_step_tokens: int, max_batch: int) -> int:
    """Return the most tokens of a step: at least those of `max_batch` decodes and one prefill token."""
    return max(max_step_tokens, max_batch + 1)


def step_logit_limit(max_batch: int) -> int:
    """Return the most rows of a step with logits: those of decodes and of scored prompts."""
    return max(64, 2 * max_batch)


class ScheduledRequest(NamedTuple):
    """A request's part of a step: its next `tokens` tokens, of which the last `logits` rows need logits."""

    request: Request
    tokens: int
    logits: int


def build_batch(scheduled: Sequence[ScheduledRequest]) -> Batch:
    """Build the flat arrays of a step from at least one scheduled request."""
    tokens: list[int] = []
    positions: list[int] = []
    starts, ends = [0], []
    rows: list[int] = []
    tables: list[bytes] = []
    for request, count, logits in scheduled:
        start = request.computed
        if count == 1 and start >= len(request.prompt):  # decode: the most frequent case
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
        blocks=np.frombuffer(blocks, np.int32).reshape(len(scheduled), -1),
        logit_rows=np.array(rows, np.int64),
        mixes=tuple([item.request.slots for item in scheduled]),
    )
