"""`CudaRunner`: runs steps with Triton kernels on one GPU, with a CUDA graph per bucket of decode steps.

Logits and samples stay on the device; the next batch may refer to samples before they are read. Without a GPU the same
code runs in Triton's interpreter, without graphs.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from adapters.weights import LoraWeights
from server.engine.adapter_slots import AdapterMemory
from server.engine.backends.cuda.adapter_pool import AdapterPool
from server.engine.backends.cuda.batch import (
    LANE_BUCKETS,
    MAX_REPEATED_LANES,
    ROW_LANE_BUCKETS,
    DeviceBatch,
    GraphShape,
    batch_buckets,
    build_batch,
    device_step,
)
from server.engine.backends.cuda.device_model import DeviceModel, DeviceStep
from server.engine.backends.cuda.memory import (
    MAX_GRAPH_BYTES,
    MemoryShares,
    divide_memory,
    is_out_of_memory,
    training_memory,
)
from server.engine.batch import Batch, Logits, step_logit_limit, step_token_limit
from server.errors import NoCapacity
from server.kernels.cuda import sampling
from server.kernels.cuda.launch import disable_dependent_launch
from server.kernels.cuda.matmul import DENSE_ROWS, FEW_ROWS
from server.model.decoder import Source

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOTS = 4096
"""Number of adapter slots."""

RETRY_SECONDS = 60.0
"""Seconds until a failed graph capture is tried again."""
GRAPHS = 128
"""Most graphs that are kept, least recently used first out."""

SHARE = 0.9
"""Default share of the free memory to use."""


def gpu_memory(wanted: int | float | None) -> int:
    """Bytes of GPU memory to use: `wanted` bytes or that share of the free memory, but no more than is free."""
    free, total = torch.cuda.mem_get_info(0)
    if isinstance(wanted, int):
        if wanted > free:
            log.warning(
                "only %.2f GB of the GPU's %.2f GB are free: using these instead of --gpu-memory %.2f GB",
                free / 1e9, total / 1e9, wanted / 1e9,
            )  # fmt: skip
        return min(wanted, free)
    return int(free * (SHARE if wanted is None else wanted))


class PendingSamples:
    """Sampled tokens on their way to the host; see `DeviceSamples`."""

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


class StepMemory:
    """Pinned host memory for step arrays, in `PIECES` buffers used in turn, since the last copy may still run."""

    PIECES = 3
    """More than the number of steps in flight."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._pieces = [self._fresh(elements) for _ in range(self.PIECES)]
        self._copied: list[torch.cuda.Event | None] = [None] * self.PIECES
        """Event of each buffer's last copy."""
        self._turn = 0

    def send(self, arrays: DeviceBatch, shape: GraphShape, target: torch.Tensor) -> None:
        """Copy a step's arrays, in the layout of `shape`, to int32 `target` [shape.elements] without waiting."""
        turn = self._turn = (self._turn + 1) % self.PIECES
        copied = self._copied[turn]
        if copied is not None:
            copied.synchronize()
        host = self._pieces[turn][: shape.elements]
        if len(host) < shape.elements:  # a step with more prefills or adapters than a bucket
            host = self._fresh(shape.elements)
        arrays.write(shape, host.numpy())
        target.copy_(host, non_blocking=True)
        if self._pinned:
            copied = self._copied[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()

    def _fresh(self, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=torch.int32, pin_memory=self._pinned)


class CudaRunner:
    """Runs one model on one GPU. Not thread-safe: only the engine's thread calls it.

    Args:
        base: The base model, packed for the CUDA kernels.
        max_batch: Most sequences of a decode step.
        memory: Bytes of GPU memory for everything.
        device: The GPU.
        max_step_tokens: Most tokens of a step with prefills.
        kv_cache: Bytes of the KV cache, None for a share.
        adapters: Bytes for adapters, None for a share.
        context: Most tokens of a sequence, None for the model's limit.

    Raises:
        BadModel: The model's shapes are not supported.
        NoCapacity: The memory is too small, or other processes have taken it.
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
        # Threads that load adapters must not compete for processors with the engine's thread.
        torch.set_num_threads(1)
        self._config, self._device = base.config, device
        self._context = min(context or base.config.context_length, base.config.context_length)
        self._dtype = base.backend.dtype
        needed = sum(weight.nbytes for weight in base.weights.values())
        self.shares: MemoryShares = divide_memory(
            base.config, needed, max_step_tokens, max_batch, memory, kv_cache, adapters
        )
        """Bytes for each kind of memory."""
        coded = any(base.weights[path].scheme != "none" for path in base.config.linear_shapes())
        with _startup_allocations(self.shares.total):
            self._model = DeviceModel(base, device, self._dtype)
            self._pool = AdapterPool(base.config, self.shares.adapters, SLOTS, device, self._dtype, coded)
        if device.type == "cuda":
            _empty_cache()  # temporary memory of concatenation
        self._buckets = batch_buckets(max_batch)
        self._storage = torch.empty(0)
        with _startup_allocations(self.shares.total):
            self._results = torch.empty(max_batch, base.config.vocab_size, device=device)
            self._samples = torch.zeros(max_batch, dtype=torch.int32, device=device)
        """The last samples, for tokens below 0 in the next batch."""
        self._graphs: dict[GraphShape, torch.cuda.CUDAGraph] = {}
        """Least recently used first."""
        self._retry_at: dict[GraphShape, float] = {}
        """Time until which steps of a bucket run without a graph, because a capture failed."""
        self._broken = 0
        """Number of captures that broke."""
        self._graph_memory: Any = None
        self._graph_bytes = 0
        """Driver memory of graphs, outside torch's allocator."""
        # One stream for all captures, because graphs only share memory that was freed on the same stream.
        self._capture_stream: Any = None
        if device.type == "cuda":
            self._capture_stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrays = torch.zeros(1, dtype=torch.int32, device=device)
        self._step_memory = StepMemory(1, device)
        self._max_step_tokens = step_token_limit(max_step_tokens, max_batch)
        self._max_logits = step_logit_limit(max_batch)
        self._zeros = torch.zeros(4 * self._max_logits, dtype=torch.int32, device=device)
        """Sampling parameters of greedy rows."""
        self._block_size = self._width = 0
        self._allocated: tuple[int, int] | None = None
        """Blocks and block size of a complete `allocate`."""

    @property
    def room(self) -> AdapterMemory:
        """Capacity for adapters and the size of one."""
        return self._pool.room

    def allocate(self, blocks: int, block_size: int) -> None:
        """Allocate the KV cache, compile the kernels and capture common graphs; others are captured on demand.

        The same sizes again change nothing. Raises NoCapacity if other processes have taken the memory.
        """
        if self._allocated == (blocks, block_size):
            return
        self._allocated = None
        with _startup_allocations(self.shares.total):
            self._allocate(blocks, block_size)
        self._allocated = blocks, block_size

    def _allocate(self, blocks: int, block_size: int) -> None:
        config = self._config
        shape = (config.num_hidden_layers, blocks, config.num_key_value_heads, 2, block_size, config.head_dim)
        self._storage = torch.empty(0)
        self._storage = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._block_size = block_size
        self._width = -(-min(blocks * block_size, self._context) // block_size)
        self._model.make_rotary_tables(self._width * block_size)
        self._graphs.clear()
        self._retry_at.clear()
        self._graph_memory, self._graph_bytes = None, 0
        largest = max(
            GraphShape.single_rows(size, self._width, width, each).elements
            for size in self._buckets
            for width, each in ((LANE_BUCKETS[-1], False), (ROW_LANE_BUCKETS[-1], True))
        )
        self._arrays = torch.zeros(largest, dtype=torch.int32, device=self._device)
        self._step_memory = StepMemory(largest, self._device)
        if self._device.type == "cuda":
            self._warm_up()
            for bucket in self._first_graphs():
                if self._graphs_are_full:
                    break
                self._graph(bucket)
            if self._broken:
                self._warm_up()  # a failed capture may have changed the launch options
            log.info("compiled the kernels and captured graphs of %d batch sizes", len(self._buckets))

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        self._pool.load_adapter(slot, weights)

    def unload_adapter(self, slot: int) -> None:
        self._pool.unload_adapter(slot)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        """Submit a step. The logits stay on the device and are valid until the next step.

        A token -1 - r stands for the sample of row r. Raises NoCapacity if the device has too little memory for the
        step.
        """
        arrays = build_batch(batch, self._pool.ranks)
        self._check(batch)
        slots = {slot for mix in batch.mixes for slot, _ in mix}
        self._pool.wait_for_copies(slots)
        logits = _retry_out_of_memory(lambda: self._run_step(arrays))
        self._pool.record_use(slots)
        return logits

    def _run_step(self, arrays: DeviceBatch) -> Logits:
        shape = arrays.shape.bucket(self._buckets, self._width)
        if shape is None:
            return Logits(self._logits(self._device_step(arrays)))
        graph = self._graph(shape) if self._device.type == "cuda" else None
        self._step_memory.send(arrays, shape, self._arrays[: shape.elements])
        if graph is None:
            self._compute(shape)
        else:
            graph.replay()
        return Logits(self._results[: arrays.shape.rows])

    @torch.inference_mode()
    def draw(self, logits: Logits, params: np.ndarray, top_k: np.ndarray) -> PendingSamples:
        """Sample a token per row of a step's logits, without waiting for the device; see kernels/cuda/sampling.py.

        `params` float32 [L, 4] has temperature, top_p, min_p and noise. Raises NoCapacity like `run`.
        """
        return _retry_out_of_memory(lambda: self._sample(logits, params, top_k))

    def _sample(self, logits: Logits, params: np.ndarray, top_k: np.ndarray) -> PendingSamples:
        rows = logits.rows.shape[0]
        tokens = self._samples[:rows]
        if rows > len(tokens):  # rows of scored prompts, which no batch continues
            tokens = torch.empty(rows, dtype=torch.int32, device=self._device)
        if rows:
            sampling.sample(logits.rows, *self._sampling_params(params, top_k), tokens)
        return PendingSamples(tokens)

    def _sampling_params(self, params: np.ndarray, top_k: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Both on the device. Greedy rows need no copy, which would wait for adapter copies."""
        rows, end = len(params), params.size
        if not params[:, 0].any() and end <= len(self._zeros):
            return self._zeros[:end].view(torch.float32).view(rows, -1), self._zeros[:rows]
        both = np.concatenate([params.reshape(-1).view(np.int32), top_k])
        packed = self._to_device(torch.from_numpy(both))
        return packed[:end].view(torch.float32).view(rows, -1), packed[end:]

    def wait_until_nearly_done(self) -> None:
        """Returns at once: progress on the device is unknown, and an idle device costs more than planning early."""

    def wait(self) -> None:
        """Wait for all submitted work.

        Raises:
            RuntimeError: The device failed. After a fault every later call fails too.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def block_bytes(self, block_size: int) -> int:
        return block_size * self._config.kv_values * self._dtype.itemsize

    def nbytes(self) -> dict[str, int]:
        """Device bytes by kind.

        `activations` includes graph memory in torch's allocator; `graphs` is the driver's. `device_budget` is the total
        that may be used; `device_allocated` and `device_reserved` are torch's statistics.
        """
        known = {"base": self._model.nbytes, "kv_cache": self._storage.nbytes, "slots": self._pool.nbytes}
        work = self._results.nbytes + self._arrays.nbytes
        stats = {"device_budget": self.shares.total}
        if self._device.type == "cuda":
            stats["device_allocated"] = torch.cuda.memory_allocated(self._device)
            stats["device_reserved"] = torch.cuda.memory_reserved(self._device)
            work = max(work, stats["device_reserved"] - sum(known.values()))
        return {**known, **stats, "activations": work, "graphs": self._graph_bytes}

    def training_share(self) -> dict[str, Any]:
        """What a training process may use of the device, as JSON: `memory` bytes, and `base`, the shared matrices.

        `base` is None if the driver cannot share them. Thread-safe.
        """
        free, _ = torch.cuda.mem_get_info(self._device)
        taken = torch.cuda.memory_reserved(self._device) + self._graph_bytes
        try:
            base = self._model.export()
        except OSError as error:
            log.warning("cannot share the base with training processes: %s", error)
            base = None
        return {"memory": training_memory(free, self.shares.total, taken), "base": base}

    def _first_graphs(self) -> list[GraphShape]:
        """The graphs to capture at startup, largest first, so that the others reuse their memory.

        If there are more sizes than graphs, common kinds come first.
        """
        kinds = ((0, False), *((width, True) for width in ROW_LANE_BUCKETS[:2]), (LANE_BUCKETS[0], False))
        wanted = [
            (size, width, each)
            for width, each in kinds
            for size in reversed(self._buckets)
            if each or width == 0 or size * width > MAX_REPEATED_LANES  # where many share few lanes
        ]
        first = sorted(wanted[:GRAPHS], reverse=True)
        return [GraphShape.single_rows(size, self._width, width, each) for size, width, each in first]

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run prefills of every kernel variant, with and without an adapter, so that no request waits for compilation.

        Those without an adapter have as many logits as possible, since the head has variants by rows.
        """
        most, longest = self._max_step_tokens, min(self._width * self._block_size, self._context)
        kinds = (2, 9, 17, FEW_ROWS + 1, 2 * FEW_ROWS + 1, DENSE_ROWS, most)
        for rows in sorted({min(rows, most) for rows in kinds}):
            starts = np.array([*range(0, rows, longest), rows], np.int32)  # several prompts if one is too short
            table = np.arange(-(-min(rows, longest) // self._block_size), dtype=np.int32)
            for mix in ((), ((0, 1.0),)):
                wanted = 1 if mix else min(rows, self._max_logits)
                batch = Batch(
                    tokens=np.zeros(rows, np.int64),
                    positions=np.arange(rows) % longest,
                    row_start=starts,
                    context=np.diff(starts),
                    blocks=np.tile(table, (len(starts) - 1, 1)),  # shared, since the values are not read
                    logit_rows=np.arange(rows - wanted, rows),
                    mixes=(mix,) * (len(starts) - 1),
                )
                self._check(batch)
                logits = self._logits(self._device_step(build_batch(batch, [1])))
        params = np.array([[1.0, 0.9, 0.1, 0.5]], np.float32)
        self.draw(Logits(logits), params, np.array([3], np.int32)).read()

    # -- graphs

    def _graph(self, shape: GraphShape) -> torch.cuda.CUDAGraph | None:
        """The graph of a bucket, captured at the first use; None if the capture fails.

        A capture overwrites the step's arrays. Raises RuntimeError if the device failed.
        """
        if shape in self._graphs:
            self._graphs[shape] = found = self._graphs.pop(shape)  # most recently used last
            return found
        if self._gave_up or self._retry_at.get(shape, -math.inf) > time.monotonic():
            return None
        while self._graphs_are_full:
            self._drop_graph()
        before, later = self._outside_torch(), time.monotonic() + RETRY_SECONDS
        made = self._try_capture(shape)
        if made is None:
            self._retry_at[shape] = later
            _empty_cache()  # after the error is gone, which holds allocations
            return None
        self._retry_at.pop(shape, None)
        self._graph_memory = made.pool()
        self._graph_bytes += min(max(0, self._outside_torch() - before), MAX_GRAPH_BYTES)
        self._graphs[shape] = made
        return made

    @property
    def _graphs_are_full(self) -> bool:
        """Whether one more graph of average size would exceed the limit."""
        count = len(self._graphs)
        return count >= GRAPHS or (count > 0 and self._graph_bytes * (count + 1) > self.shares.graphs * count)

    @property
    def _gave_up(self) -> bool:
        """Whether captures broke twice. Broken captures leak memory in torch, so there is no third attempt."""
        return self._broken > 1

    def _try_capture(self, shape: GraphShape) -> torch.cuda.CUDAGraph | None:
        """Capture a graph, or return None.

        At startup, the first capture that breaks for a reason other than memory is repeated without dependent launch,
        which not all drivers can capture. Later this would recompile all kernels within a step.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            self._capture(shape, graph)
            return graph
        except RuntimeError as error:
            log.warning(
                "cannot capture a graph of %d sequences; these steps run without one: %s", shape.rows, str(error)
            )
            if is_out_of_memory(error):
                return None
        self._abandon(graph)
        self.wait()
        if self._gave_up or self._allocated is not None or not disable_dependent_launch():
            return None
        log.warning("capturing again without dependent launch")
        return self._try_capture(shape)

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Keep a broken capture alive, and stop sharing its memory pool."""
        if graph not in _BROKEN:
            _BROKEN.append(graph)
            self._broken += 1
        self._graph_memory = None
        if self._gave_up:
            log.warning("no more graphs are captured: steps of new sizes run without one, more slowly")

    def _drop_graph(self) -> None:
        """Drop the least recently used graph."""
        torch.cuda.current_stream().synchronize()  # it may still run
        self._graph_bytes -= self._graph_bytes // len(self._graphs)
        del self._graphs[next(iter(self._graphs))]

    def _outside_torch(self) -> int:
        """Device bytes in use outside torch's allocator, by any process."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def _capture(self, shape: GraphShape, graph: torch.cuda.CUDAGraph) -> None:
        stream = self._capture_stream
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.inference_mode(), torch.cuda.stream(stream):
                self._arrays.zero_()  # tiles without rows, rows without positions
                self._step(shape).positions.fill_(-1)
                self._compute(shape)  # compiles kernels, which must not be captured
                self._record(shape, graph)
                graph.replay()  # the driver allocates at the first launch
        finally:
            torch.cuda.current_stream().wait_stream(stream)

    def _record(self, shape: GraphShape, graph: torch.cuda.CUDAGraph) -> None:
        """Capture a step. `torch.cuda.graph` would also empty the caches, which fails after a broken capture."""
        self.wait()
        _empty_cache()
        try:
            # Other threads may pin memory meanwhile.
            graph.capture_begin(self._graph_memory, capture_error_mode="thread_local")
            try:
                self._compute(shape)
            finally:
                graph.capture_end()
        except RuntimeError:
            if not _has_ended(graph):
                self._abandon(graph)
            raise

    def _compute(self, shape: GraphShape) -> None:
        """Run a bucket's step from the arrays to the results."""
        self._results[: shape.logits].copy_(self._logits(self._step(shape)))

    def _logits(self, step: DeviceStep) -> torch.Tensor:
        sampling.resolve_placeholders(step.tokens, self._samples)
        return self._model.logits(step, self._storage, self._pool.pool)

    def _step(self, shape: GraphShape) -> DeviceStep:
        return device_step(shape, self._arrays[: shape.elements])

    # -- step arrays

    def _device_step(self, arrays: DeviceBatch) -> DeviceStep:
        """A step in its own shape, on the device."""
        memory = torch.empty(arrays.shape.elements, dtype=torch.int32, device=self._device)
        self._step_memory.send(arrays, arrays.shape, memory)
        return device_step(arrays.shape, memory)

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _check(self, batch: Batch) -> None:
        """Check the engine's invariants, which the kernels rely on."""
        assert self._storage.numel(), "allocate comes before run"
        tokens, last = batch.tokens, int(batch.positions.max())
        assert -len(self._samples) <= tokens.min() and tokens.max() < self._config.vocab_size
        assert last < self._width * self._block_size, "a position is beyond the cache or the model's context"
        assert last < batch.blocks.shape[1] * self._block_size
        assert int(batch.blocks.max()) < self._storage.shape[1]
        assert all(math.isfinite(weight) for mix in batch.mixes for _, weight in mix)


_BROKEN: list[torch.cuda.CUDAGraph] = []
"""Broken captures of any runner, kept because torch may still refer to them."""


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a capture ended. Otherwise torch does not know its memory pool."""
    with suppress(RuntimeError):
        graph.pool()
        return True
    return False


def _empty_cache() -> None:
    """Free torch's cached memory; a broken capture prevents it."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def _retry_out_of_memory(launch: Callable[[], T]) -> T:
    """Call `launch`, and once more after freeing cached memory if the device is out of memory.

    Raises:
        NoCapacity: Memory is still lacking. The error holds no allocations.
    """
    for _ in range(2):
        try:
            return launch()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            log.warning("the GPU is out of memory in a step: %s", str(error))
        _empty_cache()  # after the error is gone, which holds allocations
    raise NoCapacity(
        "the GPU has too little memory for a step, because other processes use it too; lower --gpu-memory or "
        "--max-step-tokens"
    )


@contextmanager
def _startup_allocations(total: int) -> Iterator[None]:
    """Turn a lack of memory at startup into NoCapacity."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise NoCapacity(
            f"the GPU no longer has the {total / 1e9:.2f} GB that were free before; lower --gpu-memory, or start the "
            f"server when other processes have ended ({error})"
        ) from None
