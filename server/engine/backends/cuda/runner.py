"""`CudaRunner`: the third implementation behind `runner.run`. Triton kernels on one GPU, a graph for each bucket.

Owns the device's memory: the model, the KV cache, the pool of adapters, the graphs. Nothing waits for the device
between a batch and its logits, which stay there, nor between logits and tokens, which the next batch may name before
they are read. Without a GPU, under Triton's interpreter, the same code runs on a CPU's tensors without graphs.
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
    OWN_LANES,
    ROW_WIDTHS,
    WIDTHS,
    DeviceBatch,
    GraphShape,
    batch_buckets,
    describe,
    on_device,
)
from server.engine.backends.cuda.device_model import DeviceModel, DeviceStep
from server.engine.backends.cuda.memory import MOST_OF_A_GRAPH, MemoryShares, lacks_memory, left_for_training, share_out
from server.engine.batch import Batch, Logits, step_logit_limit, step_token_limit
from server.errors import NoCapacity
from server.kernels.cuda import sampling
from server.kernels.cuda.launch import keep_apart
from server.kernels.cuda.matmul import DENSE_ROWS, FEW_ROWS
from server.model.decoder import Source

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOTS = 4096
"""Adapters that can be resident at most: rows of the pool's tables."""

RETRY_SECONDS = 60.0
"""After which memory that lacked for a graph may be there."""
GRAPHS = 128
"""Graphs that are kept at most, those that were used last, and no more than have room in their share of the memory."""

SHARE = 0.9
"""Of the memory that is free, if nothing is said."""


def gpu_memory(wanted: int | float | None) -> int:
    """Bytes of the GPU's memory to use in all: `wanted` bytes, or that share of what is free, never more."""
    free, total = torch.cuda.mem_get_info(0)
    if isinstance(wanted, int):
        if wanted > free:
            log.warning(
                "of the GPU's %.2f GB %.2f GB are free and others hold the rest: --gpu-memory is lowered to them from "
                "%.2f GB", total / 1e9, free / 1e9, wanted / 1e9,
            )  # fmt: skip
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


class StepMemory:
    """Pinned memory for steps' numbers, in `PIECES` that take turns: what was sent last may still be on its way.

    Fresh memory for each step is one that the driver pins, and frees, whenever torch does not keep pieces of its size.
    """

    PIECES = 3
    """More than there are steps under way, so that nobody waits."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._pieces = [self._fresh(elements) for _ in range(self.PIECES)]
        self._sent: list[torch.cuda.Event | None] = [None] * self.PIECES
        """What tells that the piece's numbers have reached the device."""
        self._turn = 0

    def send(self, numbers: DeviceBatch, shape: GraphShape, target: torch.Tensor) -> None:
        """DeviceBatch as `shape` lays them out, to int32 `target` [shape.elements] on the device, without waiting."""
        turn = self._turn = (self._turn + 1) % self.PIECES
        sent = self._sent[turn]
        if sent is not None:
            sent.synchronize()
        host = self._pieces[turn][: shape.elements]
        if len(host) < shape.elements:  # more prompts or adapters than steps of single rows can have
            host = self._fresh(shape.elements)
        numbers.write(shape, host.numpy())
        target.copy_(host, non_blocking=True)
        if self._pinned:
            sent = self._sent[turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            sent.record()

    def _fresh(self, elements: int) -> torch.Tensor:
        return torch.empty(elements, dtype=torch.int32, pin_memory=self._pinned)


class CudaRunner:
    """One model on one GPU. Not thread-safe: the engine's thread alone calls it.

    Steps of up to `max_batch` single rows run as graphs, and a prompt has up to `max_step_tokens` in one. `memory` is
    what there is for all in bytes; `kv_cache` and `adapters` are what is wanted of it, None for a share; no sequence is
    longer than `context`. Raises BadModel, and NoCapacity if the base leaves too little, or others do.
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
        # Here and in the threads to come: an adapter's matrices are small, and a pool for each thread that loads one
        # would wait on the processors that the engine launches steps from.
        torch.set_num_threads(1)
        self._config, self._device = base.config, device
        self._context = min(context or base.config.context_length, base.config.context_length)
        self._dtype = base.backend.dtype
        needed = sum(weight.nbytes for weight in base.weights.values())
        self.shares: MemoryShares = share_out(
            base.config, needed, max_step_tokens, max_batch, memory, kv_cache, adapters
        )
        """What each kind of memory may take."""
        coded = any(base.weights[path].scheme != "none" for path in base.config.linear_shapes())
        with _counted_on(self.shares.total):
            self._model = DeviceModel(base, device, self._dtype)
            self._pool = AdapterPool(base.config, self.shares.adapters, SLOTS, device, self._dtype, coded)
        if device.type == "cuda":
            _empty_cache()  # what laying matrices side by side took is no work of steps
        self._buckets = batch_buckets(max_batch)
        self._storage = torch.empty(0)
        with _counted_on(self.shares.total):
            self._results = torch.empty(max_batch, base.config.vocab_size, device=device)
            self._drawn = torch.zeros(max_batch, dtype=torch.int32, device=device)
        """What was drawn last: the tokens that the next batch means by those below 0."""
        self._graphs: dict[GraphShape, torch.cuda.CUDAGraph] = {}
        """The one that was used last is at the end."""
        self._without: dict[GraphShape, float] = {}
        """Until when the steps of a bucket run without a graph, as there could be none; if `_hopeless`, for good."""
        self._broken = 0
        """Captures that did not end as they should."""
        self._graph_memory: Any = None
        self._graph_bytes = 0
        """What the driver has taken for graphs, beside the memory that torch has of it."""
        # One stream for all captures: what one graph has let go of is taken again by another on the same stream alone.
        self._capturing: Any = None
        if device.type == "cuda":
            self._capturing = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._numbers = torch.zeros(1, dtype=torch.int32, device=device)
        self._step_memory = StepMemory(1, device)
        self._max_step_tokens = step_token_limit(max_step_tokens, max_batch)
        self._max_logits = step_logit_limit(max_batch)
        self._zeros = torch.zeros(4 * self._max_logits, dtype=torch.int32, device=device)
        """What greedy rows are told."""
        self._block_size = self._width = 0
        self._allocated: tuple[int, int] | None = None
        """Blocks and their size, once all is made for them."""

    @property
    def room(self) -> AdapterMemory:
        """What adapters in slots may take together, and what one takes."""
        return self._pool.room

    def allocate(self, blocks: int, block_size: int) -> None:
        """Also compiles the kernels, and makes the graphs of steps without adapters and with up to 64 ranks a sequence:
        others are made when they are first needed. As many blocks as there are stay as they are, and their graphs: what
        comes next never reads what it has not written. Raises NoCapacity if others have taken the memory."""
        if self._allocated == (blocks, block_size):
            return
        self._allocated = None
        with _counted_on(self.shares.total):
            self._allocate(blocks, block_size)
        self._allocated = blocks, block_size

    def _allocate(self, blocks: int, block_size: int) -> None:
        config = self._config
        shape = (config.num_hidden_layers, blocks, config.num_key_value_heads, 2, block_size, config.head_dim)
        self._storage = torch.empty(0)
        self._storage = torch.zeros(shape, dtype=self._dtype, device=self._device)
        self._block_size = block_size
        self._width = -(-min(blocks * block_size, self._context) // block_size)
        self._model.turn_up_to(self._width * block_size)
        self._graphs.clear()
        self._without.clear()
        self._graph_memory, self._graph_bytes = None, 0
        largest = max(
            GraphShape.single_rows(size, self._width, width, each).elements
            for size in self._buckets
            for width, each in ((WIDTHS[-1], False), (ROW_WIDTHS[-1], True))
        )
        self._numbers = torch.zeros(largest, dtype=torch.int32, device=self._device)
        self._step_memory = StepMemory(largest, self._device)
        if self._device.type == "cuda":
            self._warm_up()
            for bucket in self._first_graphs():
                if self._graphs_are_full:
                    break
                self._graph(bucket)
            if self._broken:
                self._warm_up()  # kernels may be launched otherwise since: see `_tried`
            log.info("the kernels are compiled, the graphs of %d batch sizes are made", len(self._buckets))

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        self._pool.load_adapter(slot, weights)

    def unload_adapter(self, slot: int) -> None:
        self._pool.unload_adapter(slot)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Logits:
        """See `Runner`. The logits are the device's, and good until the next step.

        A token of the batch below 0 is the one that was drawn last in row -1 - token. Raises NoCapacity if the device
        has no memory for the step.
        """
        numbers = describe(batch, self._pool.ranks)
        self._check(batch)
        slots = {slot for mix in batch.mixes for slot, _ in mix}
        self._pool.ready(slots)
        logits = _in_room(lambda: self._launched(numbers))
        self._pool.used(slots)
        return logits

    def _launched(self, numbers: DeviceBatch) -> Logits:
        shape = numbers.shape.bucket(self._buckets, self._width)
        if shape is None:
            return Logits(self._logits(self._step_of(numbers)))
        graph = self._graph(shape) if self._device.type == "cuda" else None
        self._step_memory.send(numbers, shape, self._numbers[: shape.elements])
        if graph is None:
            self._compute(shape)
        else:
            graph.replay()
        return Logits(self._results[: numbers.shape.rows])

    @torch.inference_mode()
    def draw(self, logits: Logits, how: np.ndarray, top_k: np.ndarray) -> DeviceDrawn:
        """A token of each row of a step's logits; see kernels/cuda/sampling.py. Does not wait for the device.

        how float32 [L, 4] is temperature, top_p, min_p and noise. Raises NoCapacity like `run`.
        """
        return _in_room(lambda: self._drawn_from(logits, how, top_k))

    def _drawn_from(self, logits: Logits, how: np.ndarray, top_k: np.ndarray) -> DeviceDrawn:
        rows = logits.rows.shape[0]
        tokens = self._drawn[:rows]
        if rows > len(tokens):  # of prompts that are scored, which no batch goes on from
            tokens = torch.empty(rows, dtype=torch.int32, device=self._device)
        if rows:
            sampling.draw(logits.rows, *self._told(how, top_k), tokens)
        return DeviceDrawn(tokens)

    def _told(self, how: np.ndarray, top_k: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Both on the device. What is sent behind a step waits for adapters that are copied beside it: so greedy rows,
        of which there is nothing to tell, have zeros that are there, and others come in one piece."""
        rows, end = len(how), how.size
        if not how[:, 0].any() and end <= len(self._zeros):
            return self._zeros[:end].view(torch.float32).view(rows, -1), self._zeros[:rows]
        both = np.concatenate([how.reshape(-1).view(np.int32), top_k])
        told = self._sent(torch.from_numpy(both))
        return told[:end].view(torch.float32).view(rows, -1), told[end:]

    def wait_until_nearly_done(self) -> None:
        """Nothing is waited for: how far a step is cannot be told, and an idle device costs more than what arrives and
        waits for one step more."""

    def wait(self) -> None:
        """Wait for all that the device was given. Raises what it has failed at: RuntimeError, each time from then on,
        after a fault that leaves this process nothing of the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def block_bytes(self, block_size: int) -> int:
        return block_size * self._config.kv_values * self._dtype.itemsize

    def nbytes(self) -> dict[str, int]:
        """All of it is the device's: `base`, `kv_cache`, `slots`, `activations` with work buffers and what graphs
        compute in, and `graphs`, what the driver keeps of them.

        `device_budget` is what they may take together; `device_allocated` and `device_reserved` are torch's account,
        which `graphs` is no part of.
        """
        known = {"base": self._model.nbytes, "kv_cache": self._storage.nbytes, "slots": self._pool.nbytes}
        work = self._results.nbytes + self._numbers.nbytes
        told = {"device_budget": self.shares.total}
        if self._device.type == "cuda":
            told["device_allocated"] = torch.cuda.memory_allocated(self._device)
            told["device_reserved"] = torch.cuda.memory_reserved(self._device)
            work = max(work, told["device_reserved"] - sum(known.values()))
        return {**known, **told, "activations": work, "graphs": self._graph_bytes}

    def loan(self) -> dict[str, Any]:
        """What a training process may have of the device beside this runner, as JSON. From any thread.

        `memory` bytes, and `base`, its matrices; None where the driver does not share them.
        """
        free, _ = torch.cuda.mem_get_info(self._device)
        taken = torch.cuda.memory_reserved(self._device) + self._graph_bytes
        try:
            base = self._model.told()
        except OSError as error:
            log.warning("the base is not shared with training processes: %s", error)
            base = None
        return {"memory": left_for_training(free, self.shares.total, taken), "base": base}

    def _first_graphs(self) -> list[GraphShape]:
        """The graphs to be made before any request comes, the largest first, whose memory the others use again.

        Of more sizes than there may be graphs, each has the usual kinds before any has the rarer ones.
        """
        kinds = ((0, False), *((width, True) for width in ROW_WIDTHS[:2]), (WIDTHS[0], False))
        wanted = [
            (size, width, each)
            for width, each in kinds
            for size in reversed(self._buckets)
            if each or width == 0 or size * width > OWN_LANES  # where many share few lanes
        ]
        first = sorted(wanted[:GRAPHS], reverse=True)
        return [GraphShape.single_rows(size, self._width, width, each) for size, width, each in first]

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Run prompts of every kind that the kernels tell apart, with and without an adapter (an empty slot's).

        A kernel takes seconds to compile, all of them take longer than a step may that is not taken for stuck. Those
        without an adapter want as many logits as a step may, since the output table's kernels differ by their number.
        """
        most, longest = self._max_step_tokens, min(self._width * self._block_size, self._context)
        kinds = (2, 9, 17, FEW_ROWS + 1, 2 * FEW_ROWS + 1, DENSE_ROWS, most)
        for rows in sorted({min(rows, most) for rows in kinds}):
            starts = np.array([*range(0, rows, longest), rows], np.int32)  # of several prompts where one is not enough
            table = np.arange(-(-min(rows, longest) // self._block_size), dtype=np.int32)
            for mix in ((), ((0, 1.0),)):
                wanted = 1 if mix else min(rows, self._max_logits)
                batch = Batch(
                    tokens=np.zeros(rows, np.int64),
                    positions=np.arange(rows) % longest,
                    row_start=starts,
                    context=np.diff(starts),
                    blocks=np.tile(table, (len(starts) - 1, 1)),  # all have the same, whose values nobody reads
                    logit_rows=np.arange(rows - wanted, rows),
                    mixes=(mix,) * (len(starts) - 1),
                )
                self._check(batch)
                logits = self._logits(self._step_of(describe(batch, [1])))
        how = np.array([[1.0, 0.9, 0.1, 0.5]], np.float32)
        self.draw(Logits(logits), how, np.array([3], np.int32)).read()

    # -- graphs

    def _graph(self, shape: GraphShape) -> torch.cuda.CUDAGraph | None:
        """The graph of a bucket's steps, captured when it is first asked for, which leaves no numbers in their place;
        None if there can be none, mostly as memory lacks for it. Raises RuntimeError if the device answers no more."""
        if shape in self._graphs:
            self._graphs[shape] = found = self._graphs.pop(shape)  # to the end
            return found
        if self._hopeless or self._without.get(shape, -math.inf) > time.monotonic():
            return None
        while self._graphs_are_full:
            self._drop_graph()
        before, later = self._outside_torch(), time.monotonic() + RETRY_SECONDS
        made = self._tried(shape)
        if made is None:
            self._without[shape] = later
            _empty_cache()  # not while the error holds what was allocated until it came
            return None
        self._without.pop(shape, None)
        self._graph_memory = made.pool()
        self._graph_bytes += min(max(0, self._outside_torch() - before), MOST_OF_A_GRAPH)
        self._graphs[shape] = made
        return made

    @property
    def _graphs_are_full(self) -> bool:
        """Whether one more graph, as large as the others are in the mean, would take more than graphs may."""
        count = len(self._graphs)
        return count >= GRAPHS or (count > 0 and self._graph_bytes * (count + 1) > self.shares.graphs * count)

    @property
    def _hopeless(self) -> bool:
        """Whether captures have broken twice: each leaves torch's account of its memory in worse order, and what it has
        taken of it is never given back, so there is no third."""
        return self._broken > 1

    def _tried(self, shape: GraphShape) -> torch.cuda.CUDAGraph | None:
        """A graph, or None if there can be none. At the start the first capture that breaks for another reason than
        memory is tried again with kernels that are launched one after the other, as not every driver captures them
        otherwise. Later all kernels would be compiled anew for that, within steps."""
        graph = torch.cuda.CUDAGraph()
        try:
            self._capture(shape, graph)
            return graph
        except RuntimeError as error:
            log.warning("no graph of %d sequences, whose steps run without for a while: %s", shape.rows, str(error))
            if lacks_memory(error):
                return None
        self._leave(graph)
        self.wait()
        if self._hopeless or self._allocated is not None or not keep_apart():
            return None
        log.warning("trying again with kernels that do not overlap")
        return self._tried(shape)

    def _leave(self, graph: torch.cuda.CUDAGraph) -> None:
        """A broken capture to itself, with the memory that others went into, as it may hold that."""
        if graph not in _BROKEN:
            _BROKEN.append(graph)
            self._broken += 1
        self._graph_memory = None
        if self._hopeless:
            log.warning("there will be no more graphs: steps of other sizes than before run without, and slower")

    def _drop_graph(self) -> None:
        """Let go of the graph that was used the longest ago."""
        torch.cuda.current_stream().synchronize()  # it may still run
        self._graph_bytes -= self._graph_bytes // len(self._graphs)
        del self._graphs[next(iter(self._graphs))]

    def _outside_torch(self) -> int:
        """Bytes of the device that are taken and are not torch's, whoever has them."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free - torch.cuda.memory_reserved(self._device)

    def _capture(self, shape: GraphShape, graph: torch.cuda.CUDAGraph) -> None:
        stream = self._capturing
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.inference_mode(), torch.cuda.stream(stream):
                self._numbers.zero_()  # no tile has rows then, and no row a position below the cache's end
                self._step(shape).positions.fill_(-1)
                self._compute(shape)  # compiles whatever has not run yet, which must not be captured
                self._record(shape, graph)
                graph.replay()  # the driver takes a graph's memory when it is first launched
        finally:
            torch.cuda.current_stream().wait_stream(stream)

    def _record(self, shape: GraphShape, graph: torch.cuda.CUDAGraph) -> None:
        """What a step launches, into a graph. `torch.cuda.graph` would empty the device's cache too, and so fail each
        time after a capture that broke, and that of pinned memory, which the next steps would pin anew."""
        self.wait()
        _empty_cache()
        try:
            # Other threads may pin memory meanwhile, which is none of this graph's business.
            graph.capture_begin(self._graph_memory, capture_error_mode="thread_local")
            try:
                self._compute(shape)
            finally:
                graph.capture_end()
        except RuntimeError:
            if not _has_ended(graph):
                self._leave(graph)
            raise

    def _compute(self, shape: GraphShape) -> None:
        """A bucket's step, from the numbers in their place to the results in theirs."""
        self._results[: shape.logits].copy_(self._logits(self._step(shape)))

    def _logits(self, step: DeviceStep) -> torch.Tensor:
        sampling.recall(step.tokens, self._drawn)
        return self._model.logits(step, self._storage, self._pool.pool)

    def _step(self, shape: GraphShape) -> DeviceStep:
        return on_device(shape, self._numbers[: shape.elements])

    # -- a step's numbers

    def _step_of(self, numbers: DeviceBatch) -> DeviceStep:
        """A step at its own sizes, on the device."""
        memory = torch.empty(numbers.shape.elements, dtype=torch.int32, device=self._device)
        self._step_memory.send(numbers, numbers.shape, memory)
        return on_device(numbers.shape, memory)

    def _sent(self, host: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            host = host.pin_memory()
        return host.to(self._device, non_blocking=True)

    def _check(self, batch: Batch) -> None:
        """The kernels trust what they are given; these are the engine's own invariants."""
        assert self._storage.numel(), "allocate comes before run"
        tokens, last = batch.tokens, int(batch.positions.max())
        assert -len(self._drawn) <= tokens.min() and tokens.max() < self._config.vocab_size
        assert last < self._width * self._block_size, "a position is beyond the cache or the model's context"
        assert last < batch.blocks.shape[1] * self._block_size
        assert int(batch.blocks.max()) < self._storage.shape[1]
        assert all(math.isfinite(weight) for mix in batch.mixes for _, weight in mix)


_BROKEN: list[torch.cuda.CUDAGraph] = []
"""Those whose capture did not end as it should, of any runner: torch may go on asking them whose an allocation is."""


def _has_ended(graph: torch.cuda.CUDAGraph) -> bool:
    """Whether a capture has: else torch does not tell which memory it went into."""
    with suppress(RuntimeError):
        graph.pool()
        return True
    return False


def _empty_cache() -> None:
    """Give back what torch keeps for later, unless a broken capture keeps it from that."""
    with suppress(RuntimeError):
        torch.cuda.empty_cache()


def _in_room(launch: Callable[[], T]) -> T:
    """What `launch` answers; if memory lacks for it once more, as enough may be free in pieces that are each too small.

    Raises NoCapacity, which holds nothing of what was allocated until then.
    """
    for _ in range(2):
        try:
            return launch()
        except RuntimeError as error:
            if not lacks_memory(error):
                raise
            log.warning("memory of the GPU lacks for a step: %s", str(error))
        _empty_cache()  # not while the error holds what was allocated until it came
    raise NoCapacity(
        "the GPU lacks the memory for a step: others take of what the server counts on; lower --gpu-memory, so that it "
        "counts on less, or --max-step-tokens, so that steps need less"
    )


@contextmanager
def _counted_on(total: int) -> Iterator[None]:
    """What of a budget of so many bytes is taken at the start. Raises NoCapacity if it is not there."""
    try:
        yield
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        raise NoCapacity(
            f"the GPU lacks what the server counts on, {total / 1e9:.2f} GB in all: others have taken of it since "
            f"it looked; lower --gpu-memory, or start it when they have ended ({error})"
        ) from None
