"""`CudaRunner`: the third implementation behind `runner.run`. Triton kernels on one GPU, a graph for each bucket.

Owns the device's memory: the model, the KV cache, the pool of adapters, the graphs. Nothing waits for the device
between a batch and its logits, which stay there, nor between logits and tokens, which the next batch may name before
they are read. Without a GPU, under Triton's interpreter, the same code runs on a CPU's tensors without graphs.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from adapters.weights import LoraWeights
from server.engine.batch import Batch, Logits
from server.engine.cuda_batch import OWN_LANES, ROW_WIDTHS, WIDTHS, Numbers, Shape, batch_buckets, describe, on_device
from server.engine.cuda_memory import Shares, left_for_training, share_out
from server.engine.cuda_pool import AdapterPool
from server.engine.slots import Room
from server.kernels.cuda import sampling
from server.kernels.cuda.products import DENSE_ROWS, FEW_ROWS
from server.model.decoder import Source
from server.model.on_device import DeviceModel, DeviceStep

log = logging.getLogger(__name__)

SLOTS = 4096
"""Adapters that can be resident at most: rows of the pool's tables."""


SHARE = 0.9
"""Of the memory that is free, if nothing is said."""


def gpu_memory(wanted: int | float | None, device: int = 0) -> int:
    """Bytes of the GPU's memory to use in all: `wanted` bytes, or that share of what is free, never more."""
    free, _ = torch.cuda.mem_get_info(device)
    if isinstance(wanted, int):
        return min(wanted, free)
    return int(free * (SHARE if wanted is None else wanted))


class DeviceDrawn:
    """Tokens on their way from the device; see `Drawn`."""

    def __init__(self, tokens: torch.Tensor) -> None:
        self._done = torch.cuda.Event() if tokens.is_cuda else None  # type: ignore[no-untyped-call]
        self._host = torch.empty(tokens.shape, dtype=torch.int32, pin_memory=tokens.is_cuda)
        self._host.copy_(tokens, non_blocking=True)
        if self._done is not None:
            self._done.record()

    def read(self) -> npt.NDArray[np.int32]:
        if self._done is not None:
            self._done.synchronize()
        return self._host.numpy()


class CudaRunner:
    """One model on one GPU. Not thread-safe: the engine's thread alone calls it.

    Steps of up to `max_batch` single rows run as graphs, and a prompt has up to `max_step_tokens` in one. `memory` is
    what there is for all in bytes; `kv_cache` and `adapters` are what is wanted of it, None for a share; no sequence is
    longer than `context`. Raises BadModel, and NoCapacity if the base leaves too little.
    """

    def __init__(
        self,
        base: Source,
        max_batch: int,
        *,
        memory: int,
        device: torch.device,
        max_step_tokens: int = 512,
        kv_cache: int | None = None,
        adapters: int | None = None,
        context: int | None = None,
    ) -> None:
        self._config, self._device = base.config, device
        self._context = min(context or base.config.max_position_embeddings, base.config.max_position_embeddings)
        self._dtype = base.backend.dtype
        needed = sum(weight.nbytes for weight in base.weights.values())
        self.shares: Shares = share_out(base.config, needed, max_step_tokens, max_batch, memory, kv_cache, adapters)
        """What each kind of memory may take."""
        self._model = DeviceModel(base, device, self._dtype)
        self._pool = AdapterPool(base.config, self.shares.adapters, SLOTS, device, self._dtype)
        self._buckets = batch_buckets(max_batch)
        self._storage = torch.empty(0)
        self._results = torch.empty(max_batch, base.config.vocab_size, device=device)
        self._drawn = torch.zeros(max_batch, dtype=torch.int32, device=device)
        """What was drawn last: the tokens that the next batch means by those below 0."""
        self._graphs: dict[Shape, torch.cuda.CUDAGraph] = {}
        self._graph_memory: Any = None
        # One stream for all captures: what one graph has let go of is taken again by another on the same stream alone.
        self._capturing: Any = None
        if device.type == "cuda":
            self._capturing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._numbers = torch.zeros(1, dtype=torch.int32, device=device)
        self._max_step_tokens = max_step_tokens
        self._max_logits = max(64, 2 * max_batch)  # that the engine asks for in a step
        self._block_size = self._width = 0

    @property
    def room(self) -> Room:
        """What adapters in slots may take together, and what one takes."""
        return self._pool.room

    def allocate(self, blocks: int, block_size: int) -> None:
        """Also compiles the kernels, and makes the graphs of steps with no adapters and few: other graphs are made when
        they are first needed."""
        config = self._config
        shape = (config.num_hidden_layers, blocks, config.num_key_value_heads, 2, block_size, config.head_dim)
        self._storage = torch.empty(0)
        self._storage = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._block_size = block_size
        self._width = -(-min(blocks * block_size, self._context) // block_size)
        self._model.turn_up_to(self._width * block_size)
        self._graphs.clear()
        self._graph_memory = None
        largest = max(
            Shape.single_rows(size, self._width, width, each).elements
            for size in self._buckets
            for width, each in ((WIDTHS[-1], False), (ROW_WIDTHS[-1], True))
        )
        self._numbers = torch.zeros(largest, dtype=torch.int32, device=self._device)
        if self._device.type == "cuda":
            self._warm_up()
            for size in reversed(self._buckets):
                together = [(WIDTHS[0], False)] if size * WIDTHS[0] > OWN_LANES else []  # where many share few lanes
                for width, each in ((0, False), (ROW_WIDTHS[0], True), *together):
                    self._graph(Shape.single_rows(size, self._width, width, each))
            log.info("the kernels are compiled, the graphs of %d batch sizes are made", len(self._buckets))

    def place(self, slot: int, weights: LoraWeights) -> None:
        self._pool.place(slot, weights)

    def clear(self, slot: int) -> None:
        self._pool.clear(slot)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        """See `Runner`. The logits are the device's, and good until the next step.

        A token of the batch below 0 is the one that was drawn last in row -1 - token.
        """
        numbers = describe(batch, self._pool.ranks)
        self._check(batch)
        self._pool.ready({slot for mix in batch.mixes for slot, _ in mix})
        shape = numbers.shape.bucket(self._buckets, self._width)
        if shape is None:
            memory = self._host(numbers, numbers.shape).to(self._device, non_blocking=True)
            return Logits(self._logits(on_device(numbers.shape, memory)))
        self._numbers[: shape.elements].copy_(self._host(numbers, shape), non_blocking=True)
        if self._device.type == "cuda":
            self._graph(shape).replay()
        else:
            self._compute(shape)
        return Logits(self._results[: batch.rows])

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor, how: np.ndarray, top_k: np.ndarray) -> DeviceDrawn:
        """A token of each row of a step's logits; see kernels/cuda/sampling.py. Does not wait for the device.

        how float32 [L, 4] is temperature, top_p, min_p and noise.
        """
        rows = logits.shape[0]
        tokens = self._drawn[:rows]
        if rows > len(tokens):  # of prompts that are scored, which no batch goes on from
            tokens = torch.empty(rows, dtype=torch.int32, device=self._device)
        if rows:
            sampling.draw(logits, self._sent(torch.from_numpy(how)), self._sent(torch.from_numpy(top_k)), tokens)
        return DeviceDrawn(tokens)

    def block_bytes(self, block_size: int) -> int:
        config = self._config
        row = 2 * config.num_key_value_heads * config.head_dim * self._dtype.itemsize
        return config.num_hidden_layers * block_size * row

    def nbytes(self) -> dict[str, int]:
        """All of it is the device's: `base`, `kv_cache`, `slots`, and `activations` with graphs and work buffers.

        `device_budget` is what they may take together; `device_allocated` and `device_reserved` are torch's account.
        """
        known = {"base": self._model.nbytes, "kv_cache": self._storage.nbytes, "slots": self._pool.nbytes}
        work = self._results.nbytes + self._numbers.nbytes
        told = {"device_budget": self.shares.total}
        if self._device.type == "cuda":
            told["device_allocated"] = torch.cuda.memory_allocated(self._device)
            told["device_reserved"] = torch.cuda.memory_reserved(self._device)
            work = max(work, told["device_reserved"] - sum(known.values()))
        return {**known, **told, "activations": work}

    def loan(self) -> dict[str, Any]:
        """What a training process may have of the device beside this runner, as JSON. From any thread.

        `memory` bytes, and `base`, its matrices; None where the driver does not share them.
        """
        free, _ = torch.cuda.mem_get_info(self._device)
        reserved = torch.cuda.memory_reserved(self._device)
        try:
            base = self._model.told()
        except OSError as error:
            log.warning("the base is not shared with training processes: %s", error)
            base = None
        return {"memory": left_for_training(free, self.shares.total, reserved), "base": base}

    def release(self) -> None:
        """Give the device's memory back. Nothing else may be called after it."""
        self._graphs.clear()
        del self._model, self._pool, self._storage, self._results, self._numbers, self._drawn
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run prompts of every kind that the kernels tell apart, with and without an adapter (an empty slot's).

        A kernel takes seconds to compile, all of them take longer than a step may that is not taken for stuck. Those
        without an adapter want as many logits as a step may, since the output table's kernels differ by their number.
        """
        most = min(self._max_step_tokens, self._width * self._block_size)
        for rows in sorted({min(rows, most) for rows in (2, 17, FEW_ROWS + 1, 2 * FEW_ROWS + 1, DENSE_ROWS, most)}):
            for mix in ((), ((0, 1.0),)):
                wanted = 1 if mix else min(rows, self._max_logits)
                batch = Batch(
                    tokens=torch.zeros(rows, dtype=torch.int64),
                    positions=torch.arange(rows),
                    row_start=torch.tensor([0, rows], dtype=torch.int32),
                    context=torch.tensor([rows], dtype=torch.int32),
                    blocks=torch.arange(-(-rows // self._block_size), dtype=torch.int32)[None],
                    logit_rows=torch.arange(rows - wanted, rows),
                    mixes=(mix,),
                    block_size=self._block_size,
                )
                self._check(batch)
                numbers = describe(batch, [1])
                memory = self._host(numbers, numbers.shape).to(self._device)
                logits = self._logits(on_device(numbers.shape, memory))
        self.draw(logits, np.array([[1.0, 0.9, 0.1, 0.5]], np.float32), np.array([3], np.int32)).read()

    # -- graphs

    def _graph(self, shape: Shape) -> torch.cuda.CUDAGraph:
        """The graph of a bucket's steps, captured when it is first asked for."""
        found = self._graphs.get(shape)
        if found is not None:
            return found
        waiting, stream = self._numbers.clone(), self._capturing
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.stream(stream):
            self._numbers.zero_()  # no tile has rows then, and no row a position below the cache's end
            self._step(shape).positions.fill_(-1)
            self._compute(shape)  # compiles whatever has not run yet, which must not be captured
            # Other threads may pin memory meanwhile, which is none of this graph's business.
            with torch.cuda.graph(graph, self._graph_memory, stream, capture_error_mode="thread_local"):
                self._compute(shape)
            self._numbers.copy_(waiting)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph_memory = graph.pool()
        self._graphs[shape] = graph
        return graph

    def _compute(self, shape: Shape) -> None:
        """A bucket's step, from the numbers in their place to the results in theirs."""
        self._results[: shape.logits].copy_(self._logits(self._step(shape)))

    def _logits(self, step: DeviceStep) -> torch.Tensor:
        sampling.recall(step.tokens, self._drawn)
        return self._model.logits(step, self._storage, self._pool.pool)

    def _step(self, shape: Shape) -> DeviceStep:
        return on_device(shape, self._numbers[: shape.elements])

    # -- a step's numbers

    def _host(self, numbers: Numbers, shape: Shape) -> torch.Tensor:
        """A step's numbers, int32 [shape.elements], where the device copies from by itself."""
        host = torch.empty(shape.elements, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        numbers.write(shape, host.numpy())
        return host

    def _sent(self, host: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _check(self, batch: Batch) -> None:
        """The kernels trust what they are given; these are the engine's own invariants."""
        assert self._storage.numel(), "allocate comes before run"
        tokens, last = batch.tokens.numpy(), int(batch.positions.max())
        assert -len(self._drawn) <= tokens.min() and tokens.max() < self._config.vocab_size
        assert last < self._width * self._block_size, "a position is beyond the cache or the model's context"
        assert last < batch.blocks.shape[1] * self._block_size
        assert int(batch.blocks.max()) < self._storage.shape[1]
        assert all(math.isfinite(weight) for mix in batch.mixes for _, weight in mix)
