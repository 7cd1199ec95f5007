"""`Runner`: what the engine calls once a step. `TorchRunner` runs the Python decoder, on reference or torch's kernels.

Owns the KV storage and the slot table. Does not know requests or scheduling.
"""

from __future__ import annotations

import math
import threading
from typing import Protocol

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.engine.batch import Batch, Logits
from server.engine.sampler import DeviceSampler
from server.kernels.lora import Segment, Segments, SlotTable
from server.kernels.threads import take
from server.model.attention import Context, PagedAttention
from server.model.decoder import Decoder, Source


class Runner(Protocol):
    """One model on one device. Not thread-safe: the engine's thread alone calls it."""

    @property
    def draw(self) -> DeviceSampler | None:
        """Picks tokens where the logits are; None if it does not."""

    def allocate(self, blocks: int, block_size: int) -> None:
        """Make room for the keys and values of that many blocks; whatever was in them is gone."""

    def place(self, slot: int, weights: LoraWeights) -> None:
        """Put an adapter, prepared by the backend, into a slot; it is not copied where memory is shared."""

    def clear(self, slot: int) -> None:
        """Empty a slot and keep no reference to what was in it."""

    def run(self, batch: Batch) -> Logits:
        """Compute the step: keys and values are in their blocks after it."""

    def block_bytes(self, block_size: int) -> int:
        """Bytes of one block of keys and values."""

    def nbytes(self) -> dict[str, int]:
        """Bytes held, by kind: `base`, `kv_cache` (blocks that were ever used), `activations` (work buffers, copies of
        active adapters); on a GPU `slots` too, the room of adapters there."""


class HostRunner(Runner, Protocol):
    """A runner in the memory that all else has too, which nothing but the system shares out."""

    def work_bytes(self, tokens: int) -> int:
        """Bytes beside the cache that steps may take for sequences of up to so many tokens, roughly."""


class TorchRunner:
    """The Python decoder over paged KV, on a CPU. For the backends `reference` and `aten`."""

    draw: DeviceSampler | None = None

    def __init__(self, base: Source, max_slots: int, threads: int) -> None:
        """`threads` is the number of torch's threads for the thread that runs. Raises ValueError if not positive."""
        if threads < 1:
            raise ValueError(f"a runner needs at least one thread, not {threads}")
        torch.set_num_threads(1)  # here and in the threads to come; the one that runs takes its own
        self._threads = threads
        self._owner: int | None = None
        self._base = base
        self._decoder = Decoder(base)
        self._table = SlotTable(max_slots)
        self._storage = torch.empty(0)
        self._block_size = self._touched = self._work = 0

    def allocate(self, blocks: int, block_size: int) -> None:
        config = self._base.config
        shape = (config.num_hidden_layers, blocks + 1, block_size, 2, config.num_key_value_heads, config.head_dim)
        self._storage = torch.empty(0)
        # Zeroed pages come from the system when they are first written, so an unused cache takes no memory.
        halves = math.prod(shape) * self._base.backend.dtype.itemsize // 2
        self._storage = torch.from_numpy(np.zeros(halves, np.int16)).view(self._base.backend.dtype).view(shape)
        self._block_size, self._touched = block_size, 0

    def place(self, slot: int, weights: LoraWeights) -> None:
        self._table.place(slot, weights)

    def clear(self, slot: int) -> None:
        self._table.clear(slot)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        if self._owner != threading.get_ident():
            take(self._threads)
            self._owner = threading.get_ident()
        tokens, positions, rows = map(torch.from_numpy, (batch.tokens, batch.positions, batch.logit_rows))
        places = map(torch.from_numpy, (batch.row_start, batch.context, batch.blocks))
        attention = PagedAttention(self._storage, positions, *places)
        starts = batch.row_start.tolist()
        segments = Segments(self._table, (Segment(starts[s], starts[s + 1], mix) for s, mix in enumerate(batch.mixes)))
        context = Context(positions, attention, segments)
        hidden = self._decoder(self._decoder.embed(tokens), context)
        logits = self._decoder.logits(hidden[rows])
        self._work = max(self._work, self._step_bytes(batch))
        self._touched = max(self._touched, int(batch.blocks.max()) + 1)
        return Logits(logits)

    def block_bytes(self, block_size: int) -> int:
        return block_size * self._base.config.kv_values * self._base.backend.dtype.itemsize

    def work_bytes(self, tokens: int) -> int:
        """The keys and values of a sequence in one layer, in one piece, float32 where attention is."""
        config = self._base.config
        return min(tokens, config.context_length) * config.kv_values // config.num_hidden_layers * 4

    def nbytes(self) -> dict[str, int]:
        kv_cache = self._touched * self.block_bytes(self._block_size)
        work = self._work + self._table.nbytes
        return {"base": self._base.nbytes, "kv_cache": kv_cache, "activations": work}

    def _step_bytes(self, batch: Batch) -> int:
        """The tensors of a step that live at once, roughly: the stream, an MLP's insides, the logits."""
        config = self._base.config
        row = 8 * config.hidden_size + 3 * self._base.backend.dtype.itemsize * config.intermediate_size
        return batch.rows * row + 4 * config.vocab_size * len(batch.logit_rows)


def make_runner(base: Source, max_slots: int, threads: int) -> HostRunner:
    """The runner of the base's backend, on a CPU."""
    if base.backend.name == "native":
        from server.engine.backends.cpu.runner import NativeRunner

        runner: HostRunner = NativeRunner(base, max_slots, threads)
        return runner
    return TorchRunner(base, max_slots, threads)
