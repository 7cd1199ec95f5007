"""The CUDA runner on tiny random models against the reference runner: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from adapters.weights import LoraWeights, LowRank
from benchmarks.gpu import answers as gpu_answers
from benchmarks.shapes import QWEN_7B
from server.engine.backends.cuda import adapter_pool
from server.engine.backends.cuda import batch as batch_module
from server.engine.backends.cuda import runner as cuda_runner_module
from server.engine.backends.cuda.adapter_pool import AdapterPool
from server.engine.backends.cuda.batch import GraphShape, batch_buckets, build_batch
from server.engine.backends.cuda.device_model import DeviceModel, DeviceStep
from server.engine.backends.cuda.memory import DENSE_ROWS, GRAPH_BYTES, MAX_GRAPH_BYTES, divide_memory, work_bytes
from server.engine.backends.cuda.runner import RETRY_SECONDS, CudaRunner, StepMemory, gpu_memory
from server.engine.backends.protocol import Runner
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch, Logits
from server.errors import BadModel, NoCapacity
from server.kernels.cuda import Cuda, epilogue, lora, matmul, packing, sampling
from server.kernels.lora import SlotWeights
from server.kernels.reference import Reference
from server.model.config import RopeScaling, from_hf
from server.model.quantization import quantize
from tests.server.kernels import tiny
from tests.server.kernels.tiny import (
    BLOCK,
    Sequence,
    Tiny,
    adapter,
    batch_of,
    error,
    lies_in,
    llama,
    random_tokens,
    uncut,
)  # fmt: skip

# Rows of a bucket that a step does not have are computed from whatever memory held, and nobody reads them.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value):RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LOOSE = 4e-2 if DEVICE.type == "cuda" else 1e-4
WIDTHS: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
FAMILIES: dict[str, tuple[dict[str, Any], str, int, bool]] = {
    "llama-int4": ({"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}, "int4", 32, True),
    "qwen2-nf4": (
        {"attention_bias": True, "output_bias": True, "num_hidden_layers": 1, "intermediate_size": 64,
         "tie_word_embeddings": False, "rope_scaling": RopeScaling("yarn", 4.0, 8), "max_position_embeddings": 8},
        "nf4", 64, True,
    ),
    "qwen3-int4": ({"qk_norm": True, "num_hidden_layers": 1}, "int4", 32, False),
    "smollm3-bf16": ({"no_rope_layers": (1, 0)}, "none", 64, False),
}  # fmt: skip


def bases(family: str) -> tuple[Tiny, Tiny]:
    """The same stored weights, packed for the kernels and as the reference has them."""
    changes, scheme, group, double = FAMILIES[family]
    return tiny.bases(llama(**{**WIDTHS, **changes}), scheme, group, double, "int8", Cuda(FLOAT), Reference())


def cuda_runner(base: Tiny, max_batch: int = 4, adapters: int = 1 << 20) -> CudaRunner:
    memory = work_bytes(base.config, 64, max_batch) + GRAPH_BYTES + (4 << 20) + adapters
    runner = CudaRunner(
        base, max_batch, memory=memory, device=DEVICE, max_step_tokens=64, kv_cache=1 << 20, adapters=adapters
    )
    runner.allocate(40, BLOCK)
    return runner


def reference_runner(base: Tiny) -> Runner:
    runner = TorchRunner(base, 8, 1)
    runner.allocate(40, BLOCK)
    return runner


def step(runner: Runner, new: list[tuple[Sequence, int]], every_row: bool = False) -> torch.Tensor:
    """Run `count` more tokens of each sequence: the logits of the last row of each, or of all rows."""
    return runner.run(batch_of(new, every_row)).rows.float().cpu().clone()


def tokens(seed: int, count: int) -> list[int]:
    return random_tokens(llama(**WIDTHS), seed, count)


def decoded(kept: LoraWeights) -> LoraWeights:
    """What a prepared adapter stands for, for the reference."""
    modules = {
        path: m if m.units is None else LowRank(m.A.float() * m.units[:, None], m.B.float(), m.scale)
        for path, m in kept.modules.items()
    }
    return replace(kept, modules=modules)


def fails(*_: object) -> torch.Tensor:
    raise RuntimeError("no memory")


def sequences(lengths: list[int], mixes: list[SlotWeights]) -> list[Sequence]:
    return [
        Sequence(tokens(i, n), list(range(6 * i, 6 * i + 6)), mix)
        for i, (n, mix) in enumerate(zip(lengths, mixes, strict=True))
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("watched")
def test_logits_are_those_of_the_reference(family: str) -> None:
    """Prefills in chunks beside single rows, then answers, with adapters of several ranks, mixes and none."""
    ours, exact = bases(family)
    adapters = {0: adapter(ours.config, 1, 3, ("q_proj", "v_proj", "down_proj")), 5: adapter(ours.config, 2, 20)}
    mixes: list[SlotWeights] = [((0, 1.0),), (), ((5, -0.5), (0, 2.0))]
    results = []
    for runner, prepared in (
        (cuda_runner(ours), ours.prepare),
        (reference_runner(exact), lambda w: exact.prepare(decoded(ours.prepare(w)))),
    ):
        for slot, weights in adapters.items():
            runner.load_adapter(slot, prepared(weights))
        first, second, third = sequences([18, 3, 4], mixes)
        logits = [step(runner, [(second, 1), (first, 9)], every_row=True)]
        logits.append(step(runner, [(second, 1), (first, 8), (third, 3)]))
        logits.append(step(runner, [(second, 1), (first, 1), (third, 1)]))
        results.append(logits)
    for a, b in zip(*results, strict=True):
        assert error(a, b) < LOOSE


def test_greedy_answers_are_those_of_the_reference() -> None:
    """In buckets with rows that are not there, the tokens drawn on the device, slots emptied and filled meanwhile.

    A GPU computes in bf16: there the first token that differs may, by a margin that is noise.
    """
    ours, exact = bases("llama-int4")
    mixes: list[SlotWeights] = [((1, 1.0),), (), ((2, 1.5),)]
    answers = []
    for runner, prepared in (
        (cuda_runner(ours), ours.prepare),
        (reference_runner(exact), lambda w: exact.prepare(decoded(ours.prepare(w)))),
    ):
        for slot, seed in ((1, 1), (2, 2)):
            runner.load_adapter(slot, prepared(adapter(ours.config, seed, 4 * slot)))
        batch = sequences([5, 1, 2], mixes)
        logits, seen = step(runner, [(s, len(s.tokens)) for s in batch]), []
        for turn in range(2):
            seen.append(logits)
            if isinstance(runner, CudaRunner):
                how = np.tile(np.array([0.0, 1.0, 0.0, 0.0], np.float32), (3, 1))
                chosen = runner.draw(Logits(logits.to(DEVICE)), how, np.zeros(3, np.int32)).read().tolist()
                assert chosen == logits.argmax(1).tolist()
            for sequence, row in zip(batch, logits, strict=True):
                sequence.tokens.append(int(row.argmax()))
            if turn == 0:
                runner.unload_adapter(2)
                runner.load_adapter(2, prepared(adapter(ours.config, 3, 2)))
            logits = step(runner, [(s, 1) for s in batch])
        answers.append((torch.tensor([s.tokens[-2:] for s in batch]), torch.stack(seen, 1)))
    (tokens, logits), (expected, exact_logits) = answers
    assert DEVICE.type == "cuda" or torch.equal(tokens, expected)
    for each in zip(tokens.tolist(), logits, exact_logits, strict=True):
        margin = gpu_answers._compared(*each).margin
        assert margin is None or margin <= gpu_answers.NOISE_MARGIN


def test_single_rows_need_no_launch_for_the_sums_of_what_they_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a prompt they do: its rows have no sums yet."""
    made = []

    def noted(x: torch.Tensor, group: int, out: torch.Tensor) -> None:
        made.append(x.shape[0])
        group_sums(x, group, out)

    group_sums = matmul.group_sums
    runner = cuda_runner(bases("qwen3-int4")[0])
    monkeypatch.setattr(matmul, "group_sums", noted)
    first, second = sequences([4, 4], [(), ()])
    for new in ([(first, 2), (second, 1)], [(first, 1), (second, 1)]):
        runner._logits(runner._device_step(build_batch(batch_of(new, False), runner._pool.ranks)))
    assert made == [3]


def test_a_step_goes_on_from_tokens_that_nobody_has_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a bucket and beside a prefill: a token below 0 is the one that the last draw has in that row."""

    def count(step: DeviceStep, *_: object) -> torch.Tensor:
        """A model that counts: after a token comes the next one."""
        following = step.tokens.index_select(0, step.logit_rows)[:, None] + 1
        return (following == torch.arange(61, device=DEVICE)).float()

    monkeypatch.setattr(DeviceModel, "logits", lambda self, *step: count(*step))
    runner, batch = cuda_runner(bases("llama-int4")[0]), sequences([5, 1, 4], [(), (), ()])
    for sequence, last in zip(batch, (20, 30, 40), strict=True):
        sequence.tokens[-1] = last
    reads = []
    for new in ([(0, 5), (1, 1)], [(1, 1), (0, 1)], [(2, 4), (1, 1), (0, 1)], [(0, 1), (1, 1), (2, 1)]):
        logits = runner.run(batch_of([(batch[i], n) for i, n in new], False))
        drawn = runner.draw(logits, np.zeros((len(new), 4), np.float32), np.zeros(len(new), np.int32))
        reads.append(lambda drawn=drawn: drawn.read().tolist())
        for row, (i, _) in enumerate(new):
            batch[i].tokens.append(-1 - row)
    assert [read() for read in reads] == [[21, 31], [32, 22], [41, 33, 23], [24, 34, 42]]
    nothing = runner.draw(logits.part(0, 0), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    assert nothing.read().tolist() == []


class Stream:
    """Stands in for CUDA's."""

    def wait_stream(self, other: object) -> None:
        assert other is not self

    def synchronize(self) -> None:
        pass


class Graph:
    """Stands in for CUDA's; the driver keeps 100 bytes of each that there is."""

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
    """What was captured and computed on the stand-ins, none of whose captures has rows or lanes.

    As in torch, a pool that a capture has not ended in takes no other, and some versions give no memory back then.
    """

    def __init__(self) -> None:
        self.made: list[tuple[Any, ...]] = []
        self.computed: list[DeviceStep] = []
        self.error: Exception | None = None
        """What a capture meets. Torch's own lack of memory lets it end, the driver's does not, as all else."""
        self.underway: set[str] = set()
        """The pools whose captures have not ended."""
        self._stream: Stream | None = None
        self._captures = False

    @contextlib.contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        self._stream = stream
        yield
        self._stream = None

    def begin(self, pool: str | None, mode: str) -> str:
        self.made.append((pool, self._stream, mode, len(self.computed)))
        pool = pool or f"pool {len(self.made)}"
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.underway.add(pool)
        self._captures = True
        return pool

    def end(self, pool: str) -> None:
        self._captures = False
        if self.error is not None and not isinstance(self.error, torch.OutOfMemoryError):
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.underway.remove(pool)

    def empty_cache(self) -> None:
        if self.underway:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")

    def note(self, model: DeviceModel, step: DeviceStep, *_: object) -> torch.Tensor:
        self.computed.append(step)
        assert step.positions.tolist() == [-1] * len(step.positions) and not step.lanes.tiles.any()
        if self.error is not None and self._captures:
            raise type(self.error)(*self.error.args)  # a new one, as it holds the frames that it comes through
        return torch.zeros(step.logit_rows.shape[0], 61)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Captures:
    """A runner's graphs with stand-ins for CUDA's calls."""
    if DEVICE.type == "cuda":
        pytest.skip("the real calls are made there")
    found = Captures()
    monkeypatch.setattr(DeviceModel, "logits", lambda *given: found.note(*given))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(found))
    monkeypatch.setattr(cuda_runner_module, "_BROKEN", [])
    monkeypatch.setattr(torch.cuda, "empty_cache", found.empty_cache)
    monkeypatch.setattr(torch.cuda, "stream", found.on)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((1 << 30) - 100 * Graph.alive, 2 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 20)
    other = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: other)
    return found


def capturing_runner() -> CudaRunner:
    runner = cuda_runner(bases("llama-int4")[0])
    runner._capture_stream = Stream()
    runner._arrays[:] = torch.arange(len(runner._arrays))
    return runner


def bucket(runner: CudaRunner, size: int, width: int = 0) -> GraphShape:
    return GraphShape.single_rows(size, runner._width, width, width > 0)


def test_graphs_share_their_memory(captures: Captures) -> None:
    """Captured once each, on one stream into one pool, without rows or lanes; with stand-ins for CUDA's calls."""
    runner = capturing_runner()
    for size, width in ((2, 0), (4, 64), (2, 0)):
        assert isinstance(runner._graph(bucket(runner, size, width)), Graph)
    stream = runner._capture_stream
    assert captures.made == [(None, stream, "thread_local", 1), ("pool 1", stream, "thread_local", 3)]
    assert len(captures.computed) == 4, "each has run once before it was captured"
    assert runner.nbytes()["graphs"] == 200


def test_as_many_blocks_again_leave_the_graphs(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine after another on the same runner has nothing to compile or to capture; unless not all was made."""
    runner = capturing_runner()
    storage, graph = runner._storage, runner._graph(bucket(runner, 2))
    runner.allocate(40, BLOCK)
    assert runner._storage is storage and runner._graph(bucket(runner, 2)) is graph
    runner.allocate(20, BLOCK)
    assert runner._storage.shape[1] == 20 and not runner._graphs
    monkeypatch.setattr(cuda_runner_module, "StepMemory", fails)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            runner.allocate(40, BLOCK)


def test_what_others_take_meanwhile_costs_no_graphs(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that trains grows by gigabytes while a graph is made."""
    runner = capturing_runner()
    one, two, four = (bucket(runner, size) for size in (1, 2, 4))
    others = iter([0, 4 << 30, 4 << 30, 4 << 30, 4 << 30, 4 << 30])
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: ((8 << 30) - 100 * Graph.alive - next(others), 8 << 30)
    )
    for shape in (one, two, four):
        runner._graph(shape)
    assert list(runner._graphs) == [one, two, four]
    assert runner.nbytes()["graphs"] == MAX_GRAPH_BYTES + 200 < runner.shares.graphs


def test_warming_up_records_nothing_and_stays_within_the_angles(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, seen = cuda_runner(bases("llama-int4")[0]), []
    monkeypatch.setattr(runner, "_context", 20)

    def check(batch: Batch) -> None:
        seen.append((torch.is_inference_mode_enabled(), int(batch.positions.max())))
        raise StopIteration

    monkeypatch.setattr(runner, "_check", check)
    with pytest.raises(StopIteration):
        runner._warm_up()
    assert seen[0][0] and seen[0][1] < 20


def test_each_size_has_its_usual_graphs_before_any_has_rarer_ones() -> None:
    runner = capturing_runner()
    few = runner._first_graphs()
    assert {shape.rows for shape in few} == set(runner._buckets)
    runner._buckets = [1, 2, 4, *range(8, 513, 8)]
    made = runner._first_graphs()
    assert len(made) == cuda_runner_module.GRAPHS and [s.rows for s in made] == sorted(
        (s.rows for s in made), reverse=True
    )
    assert {shape.rows for shape in made if shape.width == 0} == set(runner._buckets)
    assert 512 in {shape.rows for shape in made if shape.width > 0}


def test_graphs_that_were_not_used_for_long_make_room(captures: Captures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_runner_module, "GRAPHS", 2)
    runner = capturing_runner()
    one, two, four = (bucket(runner, size) for size in (1, 2, 4))
    before = Graph.alive
    first = runner._graph(one)
    for shape in (two, one, four):
        runner._graph(shape)
    assert list(runner._graphs) == [one, four] and runner._graphs[one] is first
    assert Graph.alive - before == 2 and runner.nbytes()["graphs"] == 200


def test_graphs_take_no_more_than_their_share(captures: Captures) -> None:
    """Each takes 100 bytes of the driver here."""
    runner = capturing_runner()
    runner.shares = replace(runner.shares, graphs=250)
    one, two, four = (bucket(runner, size) for size in (1, 2, 4))
    for shape in (one, two, four):
        runner._graph(shape)
    assert list(runner._graphs) == [two, four] and runner.nbytes()["graphs"] == 200
    runner.shares = replace(runner.shares, graphs=50)
    runner._graph(one)
    assert list(runner._graphs) == [one], (
        "one there is, whatever it takes: without it steps are launched kernel by kernel"
    )


@pytest.mark.parametrize("count", [9, 1], ids=["prompt", "single row without a graph"])
def test_a_step_that_finds_memory_in_pieces_is_run_again(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once nothing of it is held any more; what still finds none is refused, and holds nothing either."""
    (one,) = sequences([count], [()])
    runner, tokens, held = cuda_runner(bases("llama-int4")[0]), [], []

    def lacking(self: DeviceModel, given: DeviceStep, *_: object) -> torch.Tensor:
        tokens.append(given.tokens[:count].tolist())
        part = torch.zeros(1)
        if len(tokens) in (1, 3, 4):
            held.append(weakref.ref(part))
            raise torch.OutOfMemoryError("no block of 2 MiB")
        return torch.full((given.logit_rows.shape[0], 61), 7.0, device=DEVICE)

    emptied: list[list[object]] = []
    monkeypatch.setattr(DeviceModel, "logits", lacking)
    monkeypatch.setattr(CudaRunner, "_graph", lambda self, shape: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append([part() for part in held]))
    assert step(runner, [(one, count)]).tolist() == [[7.0] * 61]
    assert tokens == [one.tokens, one.tokens] and emptied == [[None]]
    one.done = 0
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        step(runner, [(one, count)])
    assert emptied[1:] == [[None] * 2, [None] * 3]


def test_a_step_that_finds_no_memory_is_refused_though_torch_gives_none_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a broken capture in some versions."""
    (one,), runner = sequences([9], [()]), cuda_runner(bases("llama-int4")[0])

    def lacking(*_: object) -> None:
        raise torch.OutOfMemoryError("no block of 2 MiB")

    monkeypatch.setattr(DeviceModel, "logits", lacking)
    monkeypatch.setattr(torch.cuda, "empty_cache", fails)
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        step(runner, [(one, 9)])


@pytest.mark.parametrize(
    "what", [(cuda_runner_module, "DeviceModel"), (cuda_runner_module, "AdapterPool"), (torch, "zeros")]
)
def test_a_start_that_finds_less_than_it_counted_on_says_so(what: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others may take of the memory after the server has asked how much there is."""
    (base, _), zeros = bases("llama-int4"), torch.zeros

    def lacking(*size: Any, **options: Any) -> torch.Tensor:
        if what[0] is torch and len(size[0] if isinstance(size[0], tuple) else size) < 6:  # the cache's have six axes
            return zeros(*size, **options)
        raise torch.OutOfMemoryError("no block of 20 GiB")

    monkeypatch.setattr(*what, lacking)
    with pytest.raises(NoCapacity, match="others have taken .* lower --gpu-memory"):
        cuda_runner(base)


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_a_start_whose_first_steps_find_no_room_says_so(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What warms up is the largest step, and what a library takes beside is not torch's to refuse."""

    def lacking(*_: Any) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(DeviceModel, "make_rotary_tables", lacking)
    with pytest.raises(NoCapacity, match="others have taken .* lower --gpu-memory"):
        cuda_runner(bases("llama-int4")[0])
    monkeypatch.setattr(DeviceModel, "make_rotary_tables", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cuda_runner(bases("llama-int4")[0])


def test_greedy_rows_are_told_nothing_and_others_all_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, sent, told = cuda_runner(bases("llama-int4")[0]), [], []
    send = CudaRunner._to_device
    monkeypatch.setattr(CudaRunner, "_to_device", lambda self, host: sent.append(host.numel()) or send(self, host))
    monkeypatch.setattr(sampling, "sample", lambda logits, how, top_k, out: told.append((how, top_k)))
    greedy, numbers = np.zeros((3, 4), np.float32), np.array([7, 0, 50], np.int32)
    greedy[:, 1] = 0.9
    drawing = np.random.default_rng(5).random((3, 4), np.float32)
    for how in (greedy, drawing):
        runner.draw(Logits(torch.zeros(3, 61, device=DEVICE)), how, numbers)
    assert sent == [15]
    (none, no_limit), (how, top_k) = told
    assert none.dtype == how.dtype == torch.float32 and no_limit.dtype == top_k.dtype == torch.int32
    assert none.is_contiguous() and how.is_contiguous() and top_k.is_contiguous()
    assert none.tolist() == [[0.0] * 4] * 3 and no_limit.tolist() == [0] * 3
    assert how.tolist() == drawing.tolist() and top_k.tolist() == [7, 0, 50]
    many = runner._max_logits + 1
    runner.draw(Logits(torch.zeros(many, 61, device=DEVICE)), np.zeros((many, 4), np.float32), np.zeros(many, np.int32))
    assert sent == [15, 5 * many], "more than there are zeros for"
    assert told[2][0].shape == (many, 4) and not told[2][0].any() and told[2][1].shape == (many,)


def test_tokens_that_find_no_memory_are_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, tries = cuda_runner(bases("llama-int4")[0]), []

    def lacking(*_: object) -> None:
        tries.append(0)
        raise torch.OutOfMemoryError("no block of 2 MiB")

    monkeypatch.setattr(sampling, "sample", lacking)
    with pytest.raises(NoCapacity, match="lower --gpu-memory"):
        runner.draw(Logits(torch.zeros(1, 61, device=DEVICE)), np.zeros((1, 4), np.float32), np.zeros(1, np.int32))
    assert len(tries) == 2


@pytest.mark.parametrize("graph", [True, False])
def test_a_capture_does_not_touch_the_step_that_it_is_for(graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers come to their place after the capture, which uses it."""
    runner = cuda_runner(bases("llama-int4")[0])
    one = sequences([5, 3], [(), ()])
    for s in one:
        s.done = len(s.tokens)
    seen: list[list[int]] = []

    def note(shape: GraphShape) -> None:
        seen.append(runner._step(shape).positions.tolist())

    def capture(shape: GraphShape) -> object:
        runner._arrays.zero_()
        return SimpleNamespace(replay=lambda: note(shape)) if graph else None

    monkeypatch.setattr(runner, "_graph", capture)
    monkeypatch.setattr(runner, "_compute", note)
    monkeypatch.setattr(runner, "_device", SimpleNamespace(type="cuda"))
    for s in one:
        s.tokens.append(7)
    runner.run(batch_of([(s, 1) for s in one], False))
    assert seen == [[5, 3]]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no block of 2 MiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
    ],
)
def test_a_step_runs_without_a_graph_where_there_can_be_none(
    captures: Captures, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tried once in a while, not at every step, and others are made as before."""
    runner, emptied = capturing_runner(), captures.empty_cache
    one, two, four = (bucket(runner, size) for size in (1, 2, 4))
    runner._graph(one)
    captures.error, before, alive = error, Graph.alive, list[int]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(Graph.alive - before) or emptied())
    for _ in range(3):
        assert runner._graph(two) is None
    assert len(captures.made) == 2 and runner.nbytes()["graphs"] == 100
    assert alive == [1, len(captures.underway)], "memory is given back when nothing is left but what torch still asks"
    assert len(captures.underway) == (not isinstance(error, torch.OutOfMemoryError))
    captures.error = None
    assert isinstance(runner._graph(four), Graph) and runner._graph(two) is None
    later = time.monotonic() + RETRY_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert isinstance(runner._graph(two), Graph) and runner._graph(one) is not None


@pytest.mark.parametrize("apart", [True, False])
def test_a_capture_that_breaks_at_the_start_is_tried_with_kernels_that_do_not_overlap(
    captures: Captures, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that does not help there are no graphs, and torch's own account of captures is in no further danger."""
    runner, captures.error = capturing_runner(), RuntimeError("CUDA error: invalid resource handle")
    runner._allocated = None
    asked: list[int] = []

    def disable_dependent_launch() -> bool:
        asked.append(len(captures.made))
        if apart:
            captures.error = None
        return len(asked) == 1

    monkeypatch.setattr(cuda_runner_module, "disable_dependent_launch", disable_dependent_launch)
    assert isinstance(runner._graph(bucket(runner, 2)), Graph) is apart
    assert isinstance(runner._graph(bucket(runner, 4)), Graph) is apart
    assert asked == [1] and len(captures.made) == (3 if apart else 2)
    later = time.monotonic() + RETRY_SECONDS
    monkeypatch.setattr(time, "monotonic", lambda: later)
    assert isinstance(runner._graph(bucket(runner, 2)), Graph) is apart and len(captures.made) == (3 if apart else 2)


def test_a_capture_that_breaks_later_has_no_kernels_compiled_anew(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them would be, within steps, which may not take that long."""
    runner, captures.error = capturing_runner(), RuntimeError("CUDA error: invalid resource handle")
    monkeypatch.setattr(
        cuda_runner_module, "disable_dependent_launch", lambda: pytest.fail("kernels are launched otherwise")
    )
    assert runner._graph(bucket(runner, 2)) is None
    captures.error = None
    assert isinstance(runner._graph(bucket(runner, 4)), Graph)
    captures.error = RuntimeError("CUDA error: invalid resource handle")
    assert runner._graph(bucket(runner, 1)) is None
    captures.error = None
    assert runner._graph(bucket(runner, 1, 64)) is None and isinstance(runner._graph(bucket(runner, 4)), Graph)


def test_a_graph_is_launched_once_where_it_is_made(captures: Captures) -> None:
    """So that what the driver takes for that is there, or lacks, before a step needs it."""
    runner = capturing_runner()
    graph = runner._graph(bucket(runner, 2))
    assert isinstance(graph, Graph) and graph.replays == 1


def test_a_step_that_the_driver_finds_no_memory_for_is_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = cuda_runner(bases("llama-int4")[0])
    (one,) = sequences([3], [()])
    errors = [RuntimeError("CUDA error: out of memory"), RuntimeError("CUDA error: misaligned address")]

    def failing(self: DeviceModel, step: DeviceStep, *_: object) -> torch.Tensor:
        if errors:
            raise errors.pop(0)
        return torch.zeros(step.logit_rows.shape[0], 61, device=DEVICE)

    monkeypatch.setattr(DeviceModel, "logits", failing)
    monkeypatch.setattr(CudaRunner, "_graph", lambda self, shape: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.raises(RuntimeError, match="misaligned"):  # the second of the two tries
        step(runner, [(one, 3)])
    one.done = 0
    assert step(runner, [(one, 3)]).shape == (1, 61)


def test_a_capture_after_which_the_device_answers_no_more_fails_its_step(
    captures: Captures, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner, captures.error = capturing_runner(), RuntimeError("CUDA error: an illegal memory access was encountered")

    def fault() -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(runner, "wait", fault)
    with pytest.raises(RuntimeError, match="the device is gone"):
        runner._graph(bucket(runner, 2))


def test_steps_take_turns_in_the_memory_that_they_are_sent_from() -> None:
    """What a step was given is what reaches the device, also one that is larger than what was set aside."""
    ours, _ = bases("llama-int4")
    runner = cuda_runner(ours)
    first, second, third = sequences([18, 3, 4], [(), (), ()])
    small = build_batch(batch_of([(second, 1)], False), runner._pool.ranks)
    large = build_batch(batch_of([(first, 18), (second, 2), (third, 4)], True), runner._pool.ranks)
    memory = StepMemory(small.shape.elements, DEVICE)
    pieces = [piece.data_ptr() for piece in memory._pieces]
    assert len(set(pieces)) == StepMemory.PIECES > 2
    for numbers in (small, large, small, small, small):
        expected = np.full(numbers.shape.elements, 7, np.int32)
        numbers.write(numbers.shape, expected)
        target = torch.full((numbers.shape.elements,), 7, dtype=torch.int32, device=DEVICE)
        memory.send(numbers, numbers.shape, target)
        for _, start, size in numbers.shape.parts():
            stop = start + int(np.prod(size))
            assert target[start:stop].tolist() == expected[start:stop].tolist()
    assert [piece.data_ptr() for piece in memory._pieces] == pieces


def test_every_kind_of_prompt_is_run_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no step waits for a compiler. What they do is the model's own matter. Where no prompt may be as long as a
    step, several make one."""
    seen = []

    def note(self: DeviceModel, step: DeviceStep, *_: object) -> torch.Tensor:
        seen.append((step.tokens.shape[0], step.adapters, step.logit_rows.shape[0]))
        assert step.prefills is not None
        return torch.zeros(step.logit_rows.shape[0], 61, device=DEVICE)

    runner, full = (cuda_runner(bases("llama-int4")[0], most) for most in (4, 70))  # graphs' steps have no prompt
    monkeypatch.setattr(DeviceModel, "logits", note)
    kinds = [(rows, adapters, 1 if adapters else rows) for rows in (2, 9, 17, 64) for adapters in (False, True)]
    for width in (runner._width, 2):
        runner._width = width
        seen.clear()
        runner._warm_up()
        assert seen == kinds
    cuts = {rows: replace(matmul.tiling(rows, 64, 4), splits=1) for rows in range(1, matmul.FEW_ROWS + 1)}
    assert {cuts[rows] for rows, _, _ in seen} == {cuts[logits] for _, _, logits in seen} == set(cuts.values())
    full._warm_up()
    assert seen[-1][0] == 71, "all that answer, and a prompt's next token"


def test_steps_of_single_rows_are_padded_to_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of one row, and of several where too many share their adapters."""
    assert batch_buckets(4) == [1, 2, 4] and batch_buckets(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    one = np.ones(3, np.int64)
    starts, context = np.arange(4, dtype=np.int32), np.array([1, 2, 3], np.int32)
    blocks, rows = np.zeros((3, 2), np.int32), np.arange(3)
    mixes: tuple[SlotWeights, ...] = (((7, 1.0),), (), ((3, 0.5), (7, -1.0)))
    batch = Batch(one, one, starts, context, blocks, rows, mixes)
    ranks: Any = {3: 12, 7: 5}

    def padded(width: int, lanes: int) -> dict[str, np.ndarray]:
        numbers = build_batch(batch, ranks)
        assert numbers.shape.width == width and numbers.shape.adapter_count == 2
        shape = numbers.shape.bucket([1, 2, 4], 6)
        assert shape is not None and (shape.rows, shape.blocks, shape.width) == (4, 6, lanes)
        assert numbers.shape.bucket([1, 2], 6) is None and numbers.shape.bucket([4], 1) is None
        memory = np.full(shape.elements, 99, np.int32)
        numbers.write(shape, memory)
        found = {name: memory[at : at + int(np.prod(size))].reshape(size) for name, at, size in shape.parts()}
        assert found["positions"].tolist() == [1, 1, 1, -1] and found["context"].tolist() == [1, 2, 3, 0]
        assert found["weights"].view(np.float32)[:3, :2].tolist() == [[0.0, 1.0], [0.0, 0.0], [0.5, -1.0]]
        return found

    found = padded(32, 64)
    assert found["tiles"].tolist() == [[0, 1, 0, 5], [1, 1, 64, 0], [2, 1, 128, 17], [0, 0, 0, 0]]
    assert found["slot"][:5].tolist() == [7] * 5 and found["adapter"][:5].tolist() == [1] * 5
    assert found["slot"][128:145].tolist() == [3] * 12 + [7] * 5
    assert found["index"][128:145].tolist() == [*range(12), *range(5)]
    monkeypatch.setattr(batch_module, "_one_row_tiles", lambda *_: False)
    batch_module._lanes.cache_clear()
    found = padded(32, 64)
    assert found["tiles"].tolist() == [[0, 3, 0, 17]]
    assert found["slot"][:17].tolist() == [3] * 12 + [7] * 5
    assert found["index"][:17].tolist() == [*range(12), *range(5)]
    batch_module._lanes.cache_clear()


def test_rows_that_share_large_adapters_are_multiplied_together() -> None:
    def by_itself(rows: int, adapters: int, rank: int, longest: int = 1) -> bool:
        mixes = tuple(((row % adapters, 1.0),) for row in range(rows))
        ranks = tuple((slot, rank) for slot in range(adapters))
        return batch_module._one_row_tiles(mixes, (longest,) * rows, ranks)

    assert by_itself(1, 1, 64) and by_itself(32, 32, 16) and by_itself(32, 32, 64) and by_itself(32, 1, 16)
    assert not by_itself(32, 1, 64) and not by_itself(64, 4, 16)
    assert not by_itself(2, 2, 2000), "wider than any bucket"
    assert not by_itself(4, 4, 8, longest=3), "a prompt is among them"
    assert not batch_module._one_row_tiles(((), ()), (1, 1), ()), "nothing to add"


def counted_moves(pool: AdapterPool, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Grows by one whenever adapters are moved together."""
    moves: list[None] = []
    move = pool._compact
    monkeypatch.setattr(pool, "_compact", lambda: moves.append(None) or move())
    return moves


@pytest.mark.parametrize(("scheme", "piece"), [("int4", 8 << 20), ("int4", 100), ("none", 8 << 20)])
def test_the_pool_holds_what_fits_to_the_byte_and_moves_it_together(
    scheme: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapters of different sizes come and go until what is free lies in pieces; their bytes stay what they were."""
    monkeypatch.setattr(adapter_pool, "PIECE", piece)
    config, backend = llama(**WIDTHS), Cuda(FLOAT)
    made = {rank: uncut(backend.prepare(adapter(config, rank, rank, ("q_proj",)), scheme)) for rank in (1, 2, 3, 4)}
    sizes = {
        rank: weights.modules["model.layers.0.self_attn.q_proj"].A.untyped_storage().nbytes()
        for rank, weights in made.items()
    }
    pool = AdapterPool(config, sizes[1] + sizes[2] + sizes[3], 6, DEVICE, FLOAT, scheme != "none")
    moves = counted_moves(pool, monkeypatch)
    for slot, rank in ((0, 1), (1, 2), (2, 3)):
        pool.load_adapter(slot, made[rank])
    with pytest.raises(NoCapacity, match="adapter-device-memory"):
        pool.load_adapter(3, made[1])
    pool.unload_adapter(0)
    pool.unload_adapter(2)
    assert sizes[4] <= sizes[1] + sizes[3]
    with monkeypatch.context() as lacking:
        lacking.setattr(pool, "_pinned", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            pool.load_adapter(4, made[4])
    pool.load_adapter(4, made[4])  # in no single gap, but in both together
    assert len(moves) == 2, "and at the first try no memory was there for it"
    pool.wait_for_copies(range(6))
    for slot, rank in ((1, 2), (4, 4)):
        for layer in range(2):
            path = f"model.layers.{layer}.self_attn.q_proj"
            site = layer * 7
            a, b, units = pool.pool.offsets[slot, site].tolist()
            update = made[rank].modules[path]
            assert pool.pool.ranks[slot, site] == rank
            assert torch.equal(pool.pool.values[a : a + update.A.numel()].cpu(), update.A.flatten())
            assert torch.equal(pool.pool.values[b : b + update.B.numel()].cpu(), update.B.t().flatten())
            if update.units is not None:
                assert torch.equal(pool.pool.units[units : units + update.rank].cpu(), update.units)
    with pytest.raises(ValueError, match="was not prepared"):
        pool.load_adapter(5, adapter(config, 9, 1))


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("scheme", ["int4", "none"])
def test_adapters_of_all_sizes_come_and_go_and_none_is_harmed(
    scheme: str, cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parted where they may be cut, and moved together where they may not: the room is used up to the byte."""
    config, backend, draw = llama(**WIDTHS), Cuda(FLOAT), random.Random(7)
    made = [backend.prepare(adapter(config, rank, rank), scheme) for rank in (1, 2, 3, 5, 8, 13)]
    if not cut:
        made = [uncut(weights) for weights in made]
    sizes = [w.layout.flat.numel() for w in made]
    pool = AdapterPool(config, 3 * sizes[-1] * made[0].layout.flat.element_size(), 16, DEVICE, FLOAT, scheme != "none")
    moves = counted_moves(pool, monkeypatch)
    held: dict[int, int] = {}
    parts, refused = 0, 0
    for _ in range(300):
        slot, kind = draw.randrange(16), draw.randrange(len(made))
        held.pop(slot, None)
        if sum(sizes[k] for k in held.values()) + sizes[kind] > 3 * sizes[-1]:
            refused += 1
            with pytest.raises(NoCapacity, match="adapter-device-memory"):
                pool.load_adapter(slot, made[kind])
        else:
            pool.load_adapter(slot, made[kind])
            held[slot] = kind
            parts = max(parts, len(pool._parts[slot]))
        pool.wait_for_copies(range(16))
        assert sorted(pool._parts) == sorted(held)
        taken = sorted([*pool._free, *((p.start, p.length) for each in pool._parts.values() for p in each)])
        assert [start for start, _ in taken] == [0, *accumulate(length for _, length in taken)][:-1], (
            "no gap, no overlap"
        )
        assert sum(taken[-1]) == pool._size and all(length for _, length in taken)
        assert all(lies_in(pool, slot, made[kind]) for slot, kind in held.items())
    assert refused and (parts > 1) == cut and (moves or cut)


def test_only_who_is_moved_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    config, backend = llama(**WIDTHS), Cuda(FLOAT)
    one, two = (backend.prepare(adapter(config, rank, rank), "int4") for rank in (2, 4))
    size = one.layout.flat.numel()
    pool = AdapterPool(config, 3 * size + two.layout.flat.numel(), 8, DEVICE, FLOAT, True)
    for slot in range(4):
        pool.load_adapter(slot, one)
    pool.unload_adapter(1)
    pool.wait_for_copies(range(8))  # what is copied from here on is not: on a GPU it would run beside those copies
    waiting: list[tuple[int, ...]] = []

    @contextlib.contextmanager
    def copying(*slots: int) -> Iterator[None]:
        waiting.append(slots)
        yield

    monkeypatch.setattr(pool, "_copying", copying)
    free = sum(length for _, length in pool._free)
    assert free >= two.layout.flat.numel() > max(length for _, length in pool._free)
    pool.load_adapter(1, uncut(two))
    assert [sorted(slots) for slots in waiting] == [[2, 3], [1]]
    assert all(lies_in(pool, slot, one) for slot in (0, 2, 3)) and lies_in(pool, 1, two)


def test_a_part_of_the_pool_stays_free() -> None:
    config, backend = llama(**WIDTHS), Cuda(FLOAT)
    pool = AdapterPool(config, 1 << 20, 8, DEVICE, FLOAT, True)
    assert pool.room.nbytes == (1 << 20) - (1 << 20) // adapter_pool.SPARE
    one = backend.prepare(adapter(config, 1, 3), "int4")
    assert pool.cost(one) == one.layout.flat.numel()


def test_a_copy_waits_for_the_steps_that_read_what_it_overwrites_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's calls: of a slot's numbers, and of the adapters whose memory it takes."""
    waited: list[object] = []

    class Event:
        over = False

        def record(self) -> None:
            recorded.append(self)

        def query(self) -> bool:
            return self.over

    recorded: list[Event] = []
    config, backend = llama(**WIDTHS), Cuda(FLOAT)
    one, *others = [backend.prepare(adapter(config, seed, 2, ("q_proj",)), "int4") for seed in range(5)]
    size = one.modules["model.layers.0.self_attn.q_proj"].A.untyped_storage().nbytes()
    pool = AdapterPool(config, 3 * size, 6, DEVICE, FLOAT, True)
    monkeypatch.setattr(pool, "_stream", SimpleNamespace(wait_event=waited.append, wait_stream=waited.append))
    monkeypatch.setattr(pool, "_pinned", torch.clone)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    for slot, weights in enumerate([one, *others[:2]]):
        pool.load_adapter(slot, weights)
    assert waited == [], "nobody has read anything"
    recorded.clear()
    for slots in ([0], [1, 2], []):
        pool.record_use(slots)
    first, second = recorded
    pool.unload_adapter(0)
    pool.load_adapter(3, others[2])  # where the first one was
    assert waited == [first]
    waited.clear()
    pool.unload_adapter(3)
    pool.load_adapter(0, others[3])  # there again, and the numbers of the slot are those that were read
    assert waited == [first]
    waited.clear()
    pool.unload_adapter(2)
    second.over = True
    pool.load_adapter(4, others[2])
    assert waited == [], "that step is over"


def test_parts_wait_for_all_who_read_what_lay_there_and_moves_for_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[object] = []
    now = "the steps of now"

    class Event:
        def record(self) -> None:
            recorded.append(self)

        def query(self) -> bool:
            return False

    recorded: list[Event] = []
    config, backend = llama(**WIDTHS), Cuda(FLOAT)
    small, large = (backend.prepare(adapter(config, rank, rank), "int4") for rank in (2, 4))
    pool = AdapterPool(config, 6 * small.layout.flat.numel(), 8, DEVICE, FLOAT, True)
    monkeypatch.setattr(pool, "_stream", SimpleNamespace(wait_event=waited.append, wait_stream=waited.append))
    monkeypatch.setattr(pool, "_pinned", torch.clone)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: now)
    for slot in range(6):
        pool.load_adapter(slot, small)
    recorded.clear()
    for slot in range(6):
        pool.record_use([slot])
    events = list(recorded)
    for slot in (0, 2, 4):
        pool.unload_adapter(slot)
    pool.load_adapter(7, large)
    parts = [part.start // small.layout.flat.numel() for part in pool._parts[7]]
    assert parts == [0, 2, 4][: len(parts)] and len(parts) > 1 and lies_in(pool, 7, large)
    assert set(waited) == {events[at] for at in parts}

    waited.clear()
    recorded.clear()
    pool.record_use([7])
    (read,) = recorded
    pool.unload_adapter(7)
    for slot in (0, 2):
        waited.clear()
        pool.load_adapter(slot, small)
        assert set(waited) == {events[slot], read}, "of each part who has read it"
    waited.clear()
    pool.unload_adapter(0)
    pool.load_adapter(0, uncut(large))
    assert waited[0] == now and all(lies_in(pool, slot, small) for slot in (1, 2, 3, 5))


def test_memory_is_shared_out_and_what_does_not_fit_is_refused() -> None:
    config = llama(**WIDTHS)
    shares = divide_memory(config, 1 << 30, 512, 32, 8 << 30)
    assert shares.base + shares.work + shares.graphs + shares.adapters + shares.kv_cache <= shares.total
    assert shares.kv_cache > shares.adapters > 0
    wanted = divide_memory(config, 1 << 30, 512, 32, 8 << 30, kv_cache=1 << 30, adapters=2 << 30)
    assert (wanted.kv_cache, wanted.adapters) == (1 << 30, 2 << 30)
    for options in ({"total": 1 << 30}, {"total": 8 << 30, "adapters": 8 << 30}, {"total": 8 << 30, "kv_cache": 10}):
        with pytest.raises(NoCapacity, match="raise --gpu-memory"):
            divide_memory(config, 1 << 30, 512, 32, **options)


def test_the_head_is_counted_where_it_may_be_dequantized() -> None:
    """From so many rows with logits on; and twice where graphs have so many too."""
    config = from_hf(QWEN_7B)
    head, linear = (2 * rows * config.hidden_size for rows in (config.vocab_size, 2 * config.intermediate_size))
    few, many = (work_bytes(config, rows, matmul.DENSE_ROWS // 2) for rows in (1023, 1024))
    assert DENSE_ROWS == matmul.DENSE_ROWS and 0 <= many - few - (head - linear) < 1 << 20
    few, many = (work_bytes(config, 2048, batch) for batch in (1023, 1024))
    assert many - few > head


def test_memory_that_others_hold_is_not_counted_on_and_that_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 80 * 10**9))
    assert gpu_memory(10**10) == 10**10 and gpu_memory(0.5) == 10**10 and gpu_memory(None) == 18 * 10**9
    assert not caplog.messages
    assert gpu_memory(70 * 10**9) == 20 * 10**9
    (told,) = caplog.messages
    assert "of the GPU's 80.00 GB 20.00 GB are free and others hold the rest" in told and told.endswith("70.00 GB")


def test_who_loads_adapters_beside_the_engine_computes_alone() -> None:
    """A pool of threads for each would take the processors that the engine launches steps from."""
    ours, _ = bases("llama-int4")
    before, counts = torch.get_num_threads(), list[int]()
    torch.set_num_threads(before + 2)
    try:
        cuda_runner(ours)
        loader = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        loader.start()
        loader.join()
    finally:
        torch.set_num_threads(before)
    assert counts == [1]


def test_nothing_is_left_out_of_the_account() -> None:
    ours, _ = bases("llama-int4")
    runner = cuda_runner(ours)
    kinds = runner.nbytes()
    assert kinds["base"] >= sum(weight.nbytes for weight in ours.weights.values())
    assert kinds["kv_cache"] == 40 * runner.block_bytes(BLOCK) and kinds["slots"] >= runner.room.nbytes
    device = {"device_allocated", "device_reserved"} if torch.cuda.is_available() else set()
    ours_alone = {"base", "kv_cache", "slots", "activations", "graphs"}
    assert set(kinds) == {*ours_alone, "device_budget", *device}
    assert sum(kinds[kind] for kind in ours_alone) <= kinds["device_budget"]


def test_every_quantized_matrix_can_be_lent_as_it_is() -> None:
    """Joined or not, from the one piece of memory that all lie in."""
    for family in FAMILIES:
        ours, _ = bases(family)
        model = DeviceModel(ours, DEVICE, FLOAT)
        quantized = {path: weight for path, weight in ours.weights.items() if weight.scheme != "none"}
        assert set(model._parts) == set(quantized)
        for path, part in model._parts.items():
            assert torch.equal(packing.dequantize(part).cpu(), packing.dequantize(quantized[path]))
            storage = model._buffer.memory.untyped_storage()
            assert all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in part.tensors.values())


def test_shapes_that_the_kernels_do_not_take_are_refused() -> None:
    ours, _ = bases("llama-int4")
    odd = Tiny(llama(**{**WIDTHS, "intermediate_size": 100}), ours.weights, ours.tensors, ours.backend)
    with pytest.raises(BadModel, match="multiple of 16"):
        cuda_runner(odd)


@pytest.mark.parametrize(("scheme", "group", "double"), [("nf4", 64, False), ("int4", 32, False), ("int8", 64, True)])
def test_a_table_that_the_kernels_cannot_look_up_is_refused(scheme: str, group: int, double: bool) -> None:
    """Which no folder has that `loramux quantize` wrote; but a manifest may say so, and other kernels serve it."""
    ours, _ = bases("llama-int4")
    (path,) = ours.config.table_shapes()
    table = ours.backend.pack(quantize(torch.randn(ours.config.table_shapes()[path]), scheme, group, double))
    odd = Tiny(ours.config, {**ours.weights, path: table}, ours.tensors, ours.backend)
    with pytest.raises(BadModel, match=rf"model\.embed_tokens .* in {scheme}"):
        cuda_runner(odd)


@pytest.mark.parametrize("outputs", [576, 896, 1536, 2048, 3584, 18944])
def test_no_step_is_the_first_to_need_a_kernel(outputs: int) -> None:
    """Of rows in few and in many tiles alike; the warm-up has two."""

    def tile(tiles: int, rows: int) -> int:
        nothing = torch.empty(0)
        lanes = lora.Lanes(torch.zeros(tiles, 4), nothing, nothing, nothing, nothing, nothing, 0, rows)
        return epilogue._tile(outputs, lanes)

    for rows in (16, 32, epilogue.MANY):
        assert len({tile(tiles, rows) for tiles in range(1, 50)}) == 1
