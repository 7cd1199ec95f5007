"""CUDA graph capture, memory limits and errors of the CUDA runner, with stand-ins for CUDA's calls."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from server.engine.backends.cuda import runner as cuda_runner_module
from server.engine.backends.cuda.batch import GraphShape
from server.engine.backends.cuda.device_model import DeviceModel, DeviceStep
from server.engine.backends.cuda.memory import MAX_GRAPH_BYTES
from server.engine.backends.cuda.runner import RETRY_SECONDS, CudaRunner
from server.engine.batch import Logits
from server.errors import NoCapacity
from server.kernels.cuda import sampling
from tests.server.kernels.test_cuda_runner import DEVICE, bases, cuda_runner, sequences, step
from tests.server.kernels.tiny import BLOCK, batch_of

OOM = torch.OutOfMemoryError("no block of 2 MiB")


class Stream:
    def wait_stream(self, other: object) -> None:
        assert other is not self

    def synchronize(self) -> None:
        pass


class Graph:
    """Replaces torch.cuda.CUDAGraph. The driver keeps 100 bytes for each."""

    alive = 0

    def __init__(self, captures: Captures) -> None:
        Graph.alive += 1
        self.replays = 0
        self._captures, self._pool, self._ended = captures, "", False

    def __del__(self) -> None:
        Graph.alive -= 1

    def capture_begin(self, pool: str | None = None, capture_error_mode: str = "global") -> None:
        self._pool = self._captures.begin(pool, capture_error_mode)

    def capture_end(self) -> None:
        self._captures.end(self._pool)
        self._ended = True

    def pool(self) -> str:
        if not self._ended:
            raise RuntimeError("Called CUDAGraph::pool() without a preceding successful capture.")
        return self._pool

    def replay(self) -> None:
        self.replays += 1


class Captures:
    """Records captures and computed steps. As in torch, a broken capture blocks its pool and empty_cache.

    Attributes:
        error: Raised within captures. Captures end after torch's own OutOfMemoryError only.
        unfinished: Pools of captures that have not ended.
    """

    def __init__(self) -> None:
        self.captures: list[tuple[Any, ...]] = []
        self.steps: list[DeviceStep] = []
        self.error: Exception | None = None
        self.unfinished: set[str] = set()
        self._stream: Stream | None = None
        self._capturing = False

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self._stream = stream
        yield
        self._stream = None

    def begin(self, pool: str | None, mode: str) -> str:
        self.captures.append((pool, self._stream, mode, len(self.steps)))
        pool = pool or f"pool {len(self.captures)}"
        if pool in self.unfinished:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.unfinished.add(pool)
        self._capturing = True
        return pool

    def end(self, pool: str) -> None:
        self._capturing = False
        if self.error is not None and not isinstance(self.error, torch.OutOfMemoryError):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.unfinished.remove(pool)

    def empty_cache(self) -> None:
        if self.unfinished:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def logits(self, model: DeviceModel, step: DeviceStep, *_: object) -> torch.Tensor:
        self.steps.append(step)
        assert step.positions.tolist() == [-1] * len(step.positions) and not step.lanes.tiles.any()
        if self.error is not None and self._capturing:
            raise type(self.error)(*self.error.args)  # a new object, since errors keep their frames alive
        return torch.zeros(step.logit_rows.shape[0], 61)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    if DEVICE.type == "cuda":
        pytest.skip("uses stand-ins for CUDA")
    fake, current = Captures(), Stream()
    monkeypatch.setattr(DeviceModel, "logits", lambda *args: fake.logits(*args))
    monkeypatch.setattr(cuda_runner_module, "_BROKEN", [])
    for name, value in (
        ("CUDAGraph", lambda: Graph(fake)),
        ("empty_cache", fake.empty_cache),
        ("stream", fake.stream),
        ("mem_get_info", lambda device: ((1 << 30) - 100 * Graph.alive, 2 << 30)),
        ("memory_reserved", lambda device: 1 << 20),
        ("current_stream", lambda: current),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    return fake


def capturing_runner() -> CudaRunner:
    runner = cuda_runner(bases("llama-int4")[0])
    runner._capture_stream = Stream()
    runner._arrays[:] = torch.arange(len(runner._arrays))
    return runner


def bucket(runner: CudaRunner, size: int, width: int = 0) -> GraphShape:
    return GraphShape.single_rows(size, runner._width, width, width > 0)


def out_of_memory(*_: object, **__: object) -> Any:
    raise OOM


def test_graphs_are_captured_once_and_share_memory(captures: Captures) -> None:
    runner = capturing_runner()
    for size, width in ((2, 0), (4, 64), (2, 0)):
        graph = runner._graph(bucket(runner, size, width))
        assert isinstance(graph, Graph) and graph.replays == 1  # the driver allocates at the first launch
    stream = runner._capture_stream
    assert captures.captures == [(None, stream, "thread_local", 1), ("pool 1", stream, "thread_local", 3)]
    assert len(captures.steps) == 4  # each also ran once before its capture
    assert runner.nbytes()["graphs"] == 200


def test_allocating_the_same_cache_again_keeps_the_graphs(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the last allocation failed halfway."""
    runner = capturing_runner()
    storage, graph = runner._storage, runner._graph(bucket(runner, 2))
    runner.allocate(40, BLOCK)
    assert runner._storage is storage and runner._graph(bucket(runner, 2)) is graph
    runner.allocate(20, BLOCK)
    assert runner._storage.shape[1] == 20 and not runner._graphs

    def fails(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(cuda_runner_module, "StepMemory", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            runner.allocate(40, BLOCK)


def test_memory_of_other_processes_is_not_attributed_to_graphs(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = capturing_runner()
    shapes = [bucket(runner, size) for size in (1, 2, 4)]
    others = iter([0, *[4 << 30] * 5])
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: ((8 << 30) - 100 * Graph.alive - next(others), 8 << 30)
    )
    for shape in shapes:
        runner._graph(shape)
    assert list(runner._graphs) == shapes
    assert runner.nbytes()["graphs"] == MAX_GRAPH_BYTES + 200 < runner.shares.graphs


def test_the_least_recently_used_graphs_are_dropped(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number and by memory, but one graph always stays."""
    monkeypatch.setattr(cuda_runner_module, "GRAPHS", 2)
    runner = capturing_runner()
    one, two, four = (bucket(runner, size) for size in (1, 2, 4))
    before = Graph.alive
    first = runner._graph(one)
    for shape in (two, one, four):
        runner._graph(shape)
    assert list(runner._graphs) == [one, four] and runner._graphs[one] is first
    assert Graph.alive - before == 2 and runner.nbytes()["graphs"] == 200

    monkeypatch.setattr(cuda_runner_module, "GRAPHS", 100)
    runner.shares = replace(runner.shares, graphs=250)
    runner._graph(two)
    assert list(runner._graphs) == [four, two] and runner.nbytes()["graphs"] == 200
    runner.shares = replace(runner.shares, graphs=50)
    runner._graph(one)
    assert list(runner._graphs) == [one]


def test_common_graphs_of_every_size_come_before_rare_ones() -> None:
    runner = capturing_runner()
    assert {shape.rows for shape in runner._first_graphs()} == set(runner._buckets)
    runner._buckets = [1, 2, 4, *range(8, 513, 8)]
    shapes = runner._first_graphs()
    assert len(shapes) == cuda_runner_module.GRAPHS
    assert [s.rows for s in shapes] == sorted((s.rows for s in shapes), reverse=True)
    assert {shape.rows for shape in shapes if shape.width == 0} == set(runner._buckets)
    assert 512 in {shape.rows for shape in shapes if shape.width > 0}


# -- captures that fail


@pytest.mark.parametrize(
    "error",
    [
        OOM,
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_a_failed_capture_is_retried_after_a_while(
    captures: Captures, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other buckets are captured meanwhile. Cached memory is freed while the error holds nothing."""
    runner, empty_cache = capturing_runner(), captures.empty_cache
    one, two, four = (bucket(runner, size) for size in (1, 2, 4))
    runner._graph(one)
    captures.error, before, alive = error, Graph.alive, list[int]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(Graph.alive - before) or empty_cache())
    for _ in range(3):
        assert runner._graph(two) is None
    assert len(captures.captures) == 2 and runner.nbytes()["graphs"] == 100
    assert alive == [1, len(captures.unfinished)]
    assert len(captures.unfinished) == (not isinstance(error, torch.OutOfMemoryError))
    captures.error = None
    assert isinstance(runner._graph(four), Graph) and runner._graph(two) is None
    later = time.monotonic() + RETRY_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert isinstance(runner._graph(two), Graph) and runner._graph(one) is not None


@pytest.mark.parametrize("helps", [True, False])
def test_a_broken_capture_at_startup_is_retried_without_dependent_launch(
    captures: Captures, helps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that breaks too, there are no more captures."""
    runner, captures.error = capturing_runner(), RuntimeError("CUDA error: invalid resource handle")
    runner._allocated = None
    calls: list[int] = []

    def disable() -> bool:
        calls.append(len(captures.captures))
        if helps:
            captures.error = None
        return len(calls) == 1

    monkeypatch.setattr(cuda_runner_module, "disable_dependent_launch", disable)
    for size in (2, 4):
        assert isinstance(runner._graph(bucket(runner, size)), Graph) is helps
    assert calls == [1] and len(captures.captures) == (3 if helps else 2)
    later = time.monotonic() + RETRY_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert isinstance(runner._graph(bucket(runner, 2)), Graph) is helps
    assert len(captures.captures) == (3 if helps else 2)


def test_a_broken_capture_later_does_not_recompile_kernels(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the second one there are no more captures, but existing graphs stay."""
    runner, error = capturing_runner(), RuntimeError("CUDA error: invalid resource handle")
    monkeypatch.setattr(cuda_runner_module, "disable_dependent_launch", lambda: pytest.fail("kernels are recompiled"))
    captures.error = error
    assert runner._graph(bucket(runner, 2)) is None
    captures.error = None
    assert isinstance(runner._graph(bucket(runner, 4)), Graph)
    captures.error = error
    assert runner._graph(bucket(runner, 1)) is None
    captures.error = None
    assert runner._graph(bucket(runner, 1, 64)) is None and isinstance(runner._graph(bucket(runner, 4)), Graph)


def test_a_failed_device_fails_the_step(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, captures.error = capturing_runner(), RuntimeError("CUDA error: an illegal memory access was encountered")

    def fault() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(runner, "wait", fault)
    with pytest.raises(RuntimeError, match="the device is gone"):
        runner._graph(bucket(runner, 2))


@pytest.mark.parametrize("graph", [True, False])
def test_step_arrays_are_sent_after_the_capture(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture overwrites them."""
    runner = cuda_runner(bases("llama-int4")[0])
    batch = sequences([5, 3], [(), ()])
    for sequence in batch:
        sequence.done = len(sequence.tokens)
        sequence.tokens.append(7)
    positions: list[list[int]] = []

    def compute(shape: GraphShape) -> None:
        positions.append(runner._step(shape).positions.tolist())

    def capture(shape: GraphShape) -> object:
        runner._arrays.zero_()
        return SimpleNamespace(replay=lambda: compute(shape)) if graph else None

    monkeypatch.setattr(runner, "_graph", capture)
    monkeypatch.setattr(runner, "_compute", compute)
    monkeypatch.setattr(runner, "_device", SimpleNamespace(type="cuda"))
    runner.run(batch_of([(sequence, 1) for sequence in batch], False))
    assert positions == [[5, 3]]


# -- out of memory


@pytest.mark.parametrize("count", [9, 1], ids=["prefill", "decode"])
def test_a_step_is_retried_once_after_freeing_cached_memory(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the failed attempt stays allocated. The second failure is NoCapacity."""
    (one,) = sequences([count], [()])
    runner, tokens, allocated = cuda_runner(bases("llama-int4")[0]), [], []

    def logits(self: DeviceModel, given: DeviceStep, *_: object) -> torch.Tensor:
        tokens.append(given.tokens[:count].tolist())
        part = torch.zeros(1)
        if len(tokens) in (1, 3, 4):
            allocated.append(weakref.ref(part))
            raise torch.OutOfMemoryError("no block of 2 MiB")
        return torch.full((given.logit_rows.shape[0], 61), 7.0, device=DEVICE)

    emptied: list[list[object]] = []
    monkeypatch.setattr(DeviceModel, "logits", logits)
    monkeypatch.setattr(CudaRunner, "_graph", lambda self, shape: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append([part() for part in allocated]))
    assert step(runner, [(one, count)]).tolist() == [[7.0] * 61]
    assert tokens == [one.tokens, one.tokens] and emptied == [[None]]
    one.done = 0
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        step(runner, [(one, count)])
    assert emptied[1:] == [[None] * 2, [None] * 3]


def test_other_errors_of_a_step_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """And emptying the cache may fail, as after a broken capture."""
    runner, (one,) = cuda_runner(bases("llama-int4")[0]), sequences([3], [()])
    errors = [RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: misaligned address")]

    def logits(*_: object) -> torch.Tensor:
        raise errors.pop(0)

    def broken() -> None:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    monkeypatch.setattr(DeviceModel, "logits", logits)
    monkeypatch.setattr(CudaRunner, "_graph", lambda self, shape: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", broken)
    with pytest.raises(RuntimeError, match="misaligned"):
        step(runner, [(one, 3)])


def test_sampling_is_retried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, calls = cuda_runner(bases("llama-int4")[0]), []
    monkeypatch.setattr(sampling, "sample", lambda *_: calls.append(0) or out_of_memory())
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        runner.draw(Logits(torch.zeros(1, 61, device=DEVICE)), np.zeros((1, 4), np.float32), np.zeros(1, np.int32))
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["DeviceModel", "AdapterPool", "zeros"])
def test_too_little_memory_at_startup_is_no_capacity(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (base, _), zeros = bases("llama-int4"), torch.zeros

    def no_cache(*size: Any, **options: Any) -> torch.Tensor:
        shape = size[0] if isinstance(size[0], tuple) else size
        return out_of_memory() if len(shape) == 6 else zeros(*size, **options)  # the cache has six dimensions

    if name == "zeros":
        monkeypatch.setattr(torch, "zeros", no_cache)
    else:
        monkeypatch.setattr(cuda_runner_module, name, out_of_memory)
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        cuda_runner(base)


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_a_library_without_memory_at_startup_is_no_capacity(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(DeviceModel, "make_rotary_tables", fails)
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        cuda_runner(bases("llama-int4")[0])
    monkeypatch.setattr(DeviceModel, "make_rotary_tables", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cuda_runner(bases("llama-int4")[0])
