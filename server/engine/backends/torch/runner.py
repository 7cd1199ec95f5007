"""`TorchRunner`: the Python decoder over a paged KV cache, for the `reference` and `aten` kernels."""

from __future__ import annotations

import math
import threading

import numpy as np
import torch

from adapters.weights import LoraWeights
from server.engine.batch import Batch, Logits
from server.engine.sampler import DeviceSampler
from server.kernels.lora import Segment, Segments, SlotTable
from server.kernels.threads import own_thread_pool
from server.model.attention import Context, PagedAttention
from server.model.decoder import Decoder, Source


class TorchRunner:
    """Runs the decoder on the CPU.

    Args:
        base: The base model.
        max_slots: Number of adapter slots.
        threads: Number of PyTorch threads for the engine's thread.

    Raises:
        ValueError: If `threads` is less than 1.
    """

    draw: DeviceSampler | None = None

    def __init__(self, base: Source, max_slots: int, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a runner needs at least one thread, not {threads}")
        torch.set_num_threads(1)  # for all other threads; the engine's thread sets its own number in `run`
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
        # The system provides zeroed pages on the first write, so an unused cache takes no memory.
        halves = math.prod(shape) * self._base.backend.dtype.itemsize // 2
        self._storage = torch.from_numpy(np.zeros(halves, np.int16)).view(self._base.backend.dtype).view(shape)
        self._block_size, self._touched = block_size, 0

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        self._table.load_adapter(slot, weights)

    def unload_adapter(self, slot: int) -> None:
        self._table.unload_adapter(slot)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        if self._owner != threading.get_ident():
            own_thread_pool(self._threads)
            self._owner = threading.get_ident()
        tokens, positions, rows = map(torch.from_numpy, (batch.tokens, batch.positions, batch.logit_rows))
        layout = map(torch.from_numpy, (batch.row_start, batch.context, batch.blocks))
        attention = PagedAttention(self._storage, positions, *layout)
        starts = batch.row_start.tolist()
        segments = Segments(self._table, (Segment(starts[s], starts[s + 1], mix) for s, mix in enumerate(batch.mixes)))
        hidden = self._decoder(self._decoder.embed(tokens), Context(positions, attention, segments))
        logits = self._decoder.logits(hidden[rows])
        self._work = max(self._work, self._activation_bytes(batch))
        self._touched = max(self._touched, int(batch.blocks.max()) + 1)
        return Logits(logits)

    def block_bytes(self, block_size: int) -> int:
        return block_size * self._base.config.kv_values * self._base.backend.dtype.itemsize

    def work_bytes(self, tokens: int) -> int:
        """Bytes of one sequence's keys and values in one layer as float32, which attention gathers."""
        config = self._base.config
        return min(tokens, config.context_length) * config.kv_values // config.num_hidden_layers * 4

    def nbytes(self) -> dict[str, int]:
        kv_cache = self._touched * self.block_bytes(self._block_size)
        work = self._work + self._table.nbytes
        return {"base": self._base.nbytes, "kv_cache": kv_cache, "activations": work}

    def _activation_bytes(self, batch: Batch) -> int:
        """Estimate the activations alive at once: the residual stream, one MLP and the logits."""
        config = self._base.config
        row = 8 * config.hidden_size + 3 * self._base.backend.dtype.itemsize * config.intermediate_size
        return batch.rows * row + 4 * config.vocab_size * len(batch.logit_rows)
