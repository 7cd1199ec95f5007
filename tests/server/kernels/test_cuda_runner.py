"""The CUDA runner on tiny random models, compared with the reference runner: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import importlib.util
import os
import threading
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from adapters.weights import LoraWeights, LowRank
from benchmarks.gpu import answers as gpu_answers
from benchmarks.shapes import QWEN_7B
from server.engine.backends.cuda import batch as batch_module
from server.engine.backends.cuda.batch import batch_buckets, build_batch
from server.engine.backends.cuda.device_model import DeviceModel, DeviceStep
from server.engine.backends.cuda.memory import DENSE_ROWS, GRAPH_BYTES, divide_memory, work_bytes
from server.engine.backends.cuda.runner import CudaRunner, StepMemory, gpu_memory
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
from tests.server.kernels.tiny import BLOCK, Sequence, Tiny, adapter, batch_of, error, llama, random_tokens

# Padding rows of a bucket are computed from uninitialized memory.
pytestmark = pytest.mark.filterwarnings("ignore:.*(overflow|invalid value):RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
TOLERANCE = 4e-2 if DEVICE.type == "cuda" else 1e-4
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


@lru_cache
def bases(family: str) -> tuple[Tiny, Tiny]:
    """The same weights, packed for the kernels and for the reference."""
    changes, scheme, group, double = FAMILIES[family]
    return tiny.bases(llama(**{**WIDTHS, **changes}), scheme, group, double, "int8", Cuda(FLOAT), Reference())


def cuda_runner(base: Tiny, max_batch: int = 4, adapters: int = 1 << 20) -> CudaRunner:
    memory = work_bytes(base.config, 64, max_batch) + GRAPH_BYTES + (4 << 20) + adapters
    runner = CudaRunner(
        base, max_batch, memory=memory, device=DEVICE, max_step_tokens=64, kv_cache=1 << 20, adapters=adapters
    )
    runner.allocate(40, BLOCK)
    return runner


def llama_runner(max_batch: int = 4) -> CudaRunner:
    return cuda_runner(bases("llama-int4")[0], max_batch)


def reference_runner(base: Tiny) -> Runner:
    runner = TorchRunner(base, 8, 1)
    runner.allocate(40, BLOCK)
    return runner


def step(runner: Runner, new: list[tuple[Sequence, int]], every_row: bool = False) -> torch.Tensor:
    """Run `count` more tokens of each sequence: the logits of the last row of each, or of all rows."""
    return runner.run(batch_of(new, every_row)).rows.float().cpu().clone()


def dequantized(weights: LoraWeights) -> LoraWeights:
    """A prepared adapter as floats, for the reference."""
    modules = {
        path: m if m.units is None else LowRank(m.A.float() * m.units[:, None], m.B.float(), m.scale)
        for path, m in weights.modules.items()
    }
    return replace(weights, modules=modules)


def sequences(lengths: list[int], mixes: list[SlotWeights]) -> list[Sequence]:
    return [
        Sequence(random_tokens(llama(**WIDTHS), i, n), list(range(6 * i, 6 * i + 6)), mix)
        for i, (n, mix) in enumerate(zip(lengths, mixes, strict=True))
    ]


def runners(family: str) -> list[tuple[Runner, Any]]:
    """(runner, function that prepares an adapter for it): ours, and the reference."""
    ours, exact = bases(family)
    return [
        (cuda_runner(ours), ours.prepare),
        (reference_runner(exact), lambda w: exact.prepare(dequantized(ours.prepare(w)))),
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("watched")
def test_logits_are_close_to_the_reference(family: str) -> None:
    """Chunked prefills beside decodes, then decodes, with adapters of several ranks, mixes and none."""
    config = bases(family)[0].config
    adapters = {0: adapter(config, 1, 3, ("q_proj", "v_proj", "down_proj")), 5: adapter(config, 2, 20)}
    mixes: list[SlotWeights] = [((0, 1.0),), (), ((5, -0.5), (0, 2.0))]
    results = []
    for runner, prepare in runners(family):
        for slot, weights in adapters.items():
            runner.load_adapter(slot, prepare(weights))
        first, second, third = sequences([18, 3, 4], mixes)
        logits = [step(runner, [(second, 1), (first, 9)], every_row=True)]
        logits.append(step(runner, [(second, 1), (first, 8), (third, 3)]))
        logits.append(step(runner, [(second, 1), (first, 1), (third, 1)]))
        results.append(logits)
    for a, b in zip(*results, strict=True):
        assert error(a, b) < TOLERANCE


def test_greedy_tokens_equal_the_reference() -> None:
    """In padded buckets, sampled on the device, with a slot reloaded. On a GPU bf16 noise may change a token."""
    config = bases("llama-int4")[0].config
    mixes: list[SlotWeights] = [((1, 1.0),), (), ((2, 1.5),)]
    answers = []
    for runner, prepare in runners("llama-int4"):
        for slot, seed in ((1, 1), (2, 2)):
            runner.load_adapter(slot, prepare(adapter(config, seed, 4 * slot)))
        batch = sequences([5, 1, 2], mixes)
        logits, seen = step(runner, [(s, len(s.tokens)) for s in batch]), []
        for turn in range(2):
            seen.append(logits)
            if isinstance(runner, CudaRunner):
                params = np.tile(np.array([0.0, 1.0, 0.0, 0.0], np.float32), (3, 1))
                tokens = runner.draw(Logits(logits.to(DEVICE)), params, np.zeros(3, np.int32)).read().tolist()
                assert tokens == logits.argmax(1).tolist()
            for sequence, row in zip(batch, logits, strict=True):
                sequence.tokens.append(int(row.argmax()))
            if turn == 0:
                runner.unload_adapter(2)
                runner.load_adapter(2, prepare(adapter(config, 3, 2)))
            logits = step(runner, [(s, 1) for s in batch])
        answers.append((torch.tensor([s.tokens[-2:] for s in batch]), torch.stack(seen, 1)))
    (tokens, logits), (expected, exact_logits) = answers
    assert DEVICE.type == "cuda" or torch.equal(tokens, expected)
    for each in zip(tokens.tolist(), logits, exact_logits, strict=True):
        margin = gpu_answers._compared(*each).margin
        assert margin is None or margin <= gpu_answers.NOISE_MARGIN


def test_decode_steps_need_no_kernel_for_group_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, group_sums = [], matmul.group_sums
    runner = cuda_runner(bases("qwen3-int4")[0])
    monkeypatch.setattr(matmul, "group_sums", lambda x, *rest: rows.append(x.shape[0]) or group_sums(x, *rest))
    first, second = sequences([4, 4], [(), ()])
    for new in ([(first, 2), (second, 1)], [(first, 1), (second, 1)]):
        runner._logits(runner._device_step(build_batch(batch_of(new, False), runner._pool.ranks)))
    assert rows == [3]  # of the step with a prefill


def test_steps_continue_from_samples_that_were_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose next token is the last one plus 1, in buckets and beside a prefill."""

    def count(step: DeviceStep, *_: object) -> torch.Tensor:
        following = step.tokens.index_select(0, step.logit_rows)[:, None] + 1
        return (following == torch.arange(61, device=DEVICE)).float()

    monkeypatch.setattr(DeviceModel, "logits", lambda self, *step: count(*step))
    runner, batch = llama_runner(), sequences([5, 1, 4], [(), (), ()])
    for sequence, last in zip(batch, (20, 30, 40), strict=True):
        sequence.tokens[-1] = last
    samples = []
    for new in ([(0, 5), (1, 1)], [(1, 1), (0, 1)], [(2, 4), (1, 1), (0, 1)], [(0, 1), (1, 1), (2, 1)]):
        logits = runner.run(batch_of([(batch[i], n) for i, n in new], False))
        samples.append(runner.draw(logits, np.zeros((len(new), 4), np.float32), np.zeros(len(new), np.int32)))
        for row, (i, _) in enumerate(new):
            batch[i].tokens.append(-1 - row)
    assert [each.read().tolist() for each in samples] == [[21, 31], [32, 22], [41, 33, 23], [24, 34, 42]]
    none = runner.draw(logits.part(0, 0), np.zeros((0, 4), np.float32), np.zeros(0, np.int32))
    assert none.read().tolist() == []


def test_sampling_parameters_are_sent_in_one_copy_and_for_greedy_rows_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner, sizes, calls = llama_runner(), [], []
    send = CudaRunner._to_device
    monkeypatch.setattr(CudaRunner, "_to_device", lambda self, host: sizes.append(host.numel()) or send(self, host))
    monkeypatch.setattr(sampling, "sample", lambda logits, params, top_k, out: calls.append((params, top_k)))
    greedy, limits = np.zeros((3, 4), np.float32), np.array([7, 0, 50], np.int32)
    greedy[:, 1] = 0.9
    random = np.random.default_rng(5).random((3, 4), np.float32)
    for params in (greedy, random):
        runner.draw(Logits(torch.zeros(3, 61, device=DEVICE)), params, limits)
    assert sizes == [15]
    (none, no_limit), (sent, top_k) = calls
    for params, limit in calls:
        assert params.dtype == torch.float32 and limit.dtype == torch.int32
        assert params.is_contiguous() and limit.is_contiguous()
    assert none.tolist() == [[0.0] * 4] * 3 and no_limit.tolist() == [0] * 3
    assert sent.tolist() == random.tolist() and top_k.tolist() == [7, 0, 50]
    many = runner._max_logits + 1  # more rows than there are zeros
    runner.draw(Logits(torch.zeros(many, 61, device=DEVICE)), np.zeros((many, 4), np.float32), np.zeros(many, np.int32))
    assert sizes == [15, 5 * many] and not calls[2][0].any() and calls[2][1].shape == (many,)


def test_step_arrays_reach_the_device_from_alternating_buffers() -> None:
    """Also a step that is larger than the buffers."""
    runner = llama_runner()
    first, second, third = sequences([18, 3, 4], [(), (), ()])
    small = build_batch(batch_of([(second, 1)], False), runner._pool.ranks)
    large = build_batch(batch_of([(first, 18), (second, 2), (third, 4)], True), runner._pool.ranks)
    memory = StepMemory(small.shape.elements, DEVICE)
    addresses = [piece.data_ptr() for piece in memory._pieces]
    assert len(set(addresses)) == StepMemory.PIECES > 2
    for arrays in (small, large, small, small, small):
        expected = np.full(arrays.shape.elements, 7, np.int32)
        arrays.write(arrays.shape, expected)
        target = torch.full((arrays.shape.elements,), 7, dtype=torch.int32, device=DEVICE)
        memory.send(arrays, arrays.shape, target)
        for _, start, size in arrays.shape.parts():
            stop = start + int(np.prod(size))
            assert target[start:stop].tolist() == expected[start:stop].tolist()
    assert [piece.data_ptr() for piece in memory._pieces] == addresses


def test_warm_up_runs_every_kernel_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a prompt cannot be as long as a step."""
    steps = []

    def logits(self: DeviceModel, step: DeviceStep, *_: object) -> torch.Tensor:
        steps.append((step.tokens.shape[0], step.adapters, step.logit_rows.shape[0]))
        assert step.prefills is not None and torch.is_inference_mode_enabled()
        return torch.zeros(step.logit_rows.shape[0], 61, device=DEVICE)

    runner, full = llama_runner(), llama_runner(70)
    monkeypatch.setattr(DeviceModel, "logits", logits)
    kinds = [(rows, adapters, 1 if adapters else rows) for rows in (2, 9, 17, 64) for adapters in (False, True)]
    for width in (runner._width, 2):
        runner._width = width
        steps.clear()
        runner._warm_up()
        assert steps == kinds
    tilings = {rows: replace(matmul.tiling(rows, 64, 4), splits=1) for rows in range(1, matmul.FEW_ROWS + 1)}
    assert {tilings[rows] for rows, _, _ in steps} == set(tilings.values())
    assert {tilings[count] for _, _, count in steps} == set(tilings.values())
    full._warm_up()
    assert steps[-1][0] == 71  # all decodes and one prefill token

    positions: list[int] = []

    def check(batch: Batch) -> None:
        positions.append(int(batch.positions.max()))
        raise StopIteration

    monkeypatch.setattr(runner, "_context", 20)
    monkeypatch.setattr(runner, "_check", check)
    with pytest.raises(StopIteration):
        runner._warm_up()
    assert positions[0] < 20


def test_decode_steps_are_padded_to_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of one row, and of several."""
    assert batch_buckets(4) == [1, 2, 4] and batch_buckets(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    ones, rows = np.ones(3, np.int64), np.arange(3)
    starts, context = np.arange(4, dtype=np.int32), np.array([1, 2, 3], np.int32)
    mixes: tuple[SlotWeights, ...] = (((7, 1.0),), (), ((3, 0.5), (7, -1.0)))
    batch = Batch(ones, ones, starts, context, np.zeros((3, 2), np.int32), rows, mixes)
    ranks: Any = {3: 12, 7: 5}

    def padded() -> dict[str, np.ndarray]:
        batch_module._lanes.cache_clear()
        arrays = build_batch(batch, ranks)
        assert arrays.shape.width == 32 and arrays.shape.adapter_count == 2
        shape = arrays.shape.bucket([1, 2, 4], 6)
        assert shape is not None and (shape.rows, shape.blocks, shape.width) == (4, 6, 64)
        assert arrays.shape.bucket([1, 2], 6) is None and arrays.shape.bucket([4], 1) is None
        memory = np.full(shape.elements, 99, np.int32)
        arrays.write(shape, memory)
        views = {name: memory[at : at + int(np.prod(size))].reshape(size) for name, at, size in shape.parts()}
        assert views["positions"].tolist() == [1, 1, 1, -1] and views["context"].tolist() == [1, 2, 3, 0]
        assert views["weights"].view(np.float32)[:3, :2].tolist() == [[0.0, 1.0], [0.0, 0.0], [0.5, -1.0]]
        return views

    views = padded()
    assert views["tiles"].tolist() == [[0, 1, 0, 5], [1, 1, 64, 0], [2, 1, 128, 17], [0, 0, 0, 0]]
    assert views["slot"][:5].tolist() == [7] * 5 and views["adapter"][:5].tolist() == [1] * 5
    assert views["slot"][128:145].tolist() == [3] * 12 + [7] * 5
    assert views["index"][128:145].tolist() == [*range(12), *range(5)]
    monkeypatch.setattr(batch_module, "_one_row_tiles", lambda *_: False)
    views = padded()
    assert views["tiles"].tolist() == [[0, 3, 0, 17]]
    assert views["slot"][:17].tolist() == [3] * 12 + [7] * 5
    assert views["index"][:17].tolist() == [*range(12), *range(5)]
    batch_module._lanes.cache_clear()


@pytest.mark.parametrize(
    ("rows", "adapters", "rank", "longest", "expected"),
    [
        (1, 1, 64, 1, True),
        (32, 32, 16, 1, True),
        (32, 32, 64, 1, True),
        (32, 1, 16, 1, True),
        (32, 1, 64, 1, False),  # shared and large
        (64, 4, 16, 1, False),
        (2, 2, 2000, 1, False),  # larger than any bucket
        (4, 4, 8, 3, False),  # with a prefill
        (2, 0, 8, 1, False),  # no adapters
    ],
)
def test_tiles_have_one_row_unless_large_adapters_are_shared(
    rows: int, adapters: int, rank: int, longest: int, expected: bool
) -> None:
    mixes: tuple[SlotWeights, ...] = tuple(((row % adapters, 1.0),) if adapters else () for row in range(rows))
    ranks = tuple((slot, rank) for slot in range(adapters))
    assert batch_module._one_row_tiles(mixes, (longest,) * rows, ranks) is expected


@pytest.mark.parametrize("outputs", [576, 1536, 3584, 18944])
def test_epilogue_tiles_do_not_depend_on_the_number_of_row_tiles(outputs: int) -> None:
    """So that warm-up compiles every variant."""
    empty = torch.empty(0)
    for rows in (16, 32, epilogue.MANY):
        lanes = [
            lora.Lanes(torch.zeros(n, 4), empty, empty, empty, empty, empty, 0, rows) for n in (1, 2, 3, 8, 21, 49)
        ]
        assert len({epilogue._tile(outputs, each) for each in lanes}) == 1


# -- memory


def test_memory_is_divided_and_too_little_is_refused() -> None:
    config = llama(**WIDTHS)
    shares = divide_memory(config, 1 << 30, 512, 32, 8 << 30)
    assert shares.base + shares.work + shares.graphs + shares.adapters + shares.kv_cache <= shares.total
    assert shares.kv_cache > shares.adapters > 0
    shares = divide_memory(config, 1 << 30, 512, 32, 8 << 30, kv_cache=1 << 30, adapters=2 << 30)
    assert (shares.kv_cache, shares.adapters) == (1 << 30, 2 << 30)
    for options in ({"total": 1 << 30}, {"total": 8 << 30, "adapters": 8 << 30}, {"total": 8 << 30, "kv_cache": 10}):
        with pytest.raises(NoCapacity, match="raise --gpu-memory"):
            divide_memory(config, 1 << 30, 512, 32, **options)


def test_work_bytes_include_a_dequantized_head_for_many_logits() -> None:
    """Twice if graphs have as many."""
    config = from_hf(QWEN_7B)
    head, linear = (2 * rows * config.hidden_size for rows in (config.vocab_size, 2 * config.intermediate_size))
    few, many = (work_bytes(config, rows, matmul.DENSE_ROWS // 2) for rows in (1023, 1024))
    assert DENSE_ROWS == matmul.DENSE_ROWS and 0 <= many - few - (head - linear) < 1 << 20
    few, many = (work_bytes(config, 2048, max_batch) for max_batch in (1023, 1024))
    assert many - few > head


def test_gpu_memory_is_limited_to_what_is_free(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * 10**9, 80 * 10**9))
    assert gpu_memory(10**10) == 10**10 and gpu_memory(0.5) == 10**10 and gpu_memory(None) == 18 * 10**9
    assert not caplog.messages
    assert gpu_memory(70 * 10**9) == 20 * 10**9
    (message,) = caplog.messages
    assert "80.00 GB" in message and "20.00 GB" in message and "70.00 GB" in message


def test_threads_that_load_adapters_compute_with_one_thread() -> None:
    before, counts = torch.get_num_threads(), list[int]()
    torch.set_num_threads(before + 2)
    try:
        llama_runner()
        loader = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        loader.start()
        loader.join()
    finally:
        torch.set_num_threads(before)
    assert counts == [1]


def test_nbytes_counts_all_device_memory() -> None:
    ours, _ = bases("llama-int4")
    runner = cuda_runner(ours)
    sizes = runner.nbytes()
    assert sizes["base"] >= sum(weight.nbytes for weight in ours.weights.values())
    assert sizes["kv_cache"] == 40 * runner.block_bytes(BLOCK) and sizes["slots"] >= runner.room.nbytes
    device = {"device_allocated", "device_reserved"} if torch.cuda.is_available() else set()
    kinds = {"base", "kv_cache", "slots", "activations", "graphs"}
    assert set(sizes) == {*kinds, "device_budget", *device}
    assert sum(sizes[kind] for kind in kinds) <= sizes["device_budget"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_quantized_matrix_lies_in_the_shared_buffer(family: str) -> None:
    ours, _ = bases(family)
    model = DeviceModel(ours, DEVICE, FLOAT)
    quantized = {path: weight for path, weight in ours.weights.items() if weight.scheme != "none"}
    assert set(model._parts) == set(quantized)
    storage = model._buffer.memory.untyped_storage()
    for path, part in model._parts.items():
        assert torch.equal(packing.dequantize(part).cpu(), packing.dequantize(quantized[path]))
        assert all(t.untyped_storage().data_ptr() == storage.data_ptr() for t in part.tensors.values())


def test_unsupported_shapes_and_tables_are_refused() -> None:
    ours, _ = bases("llama-int4")
    config = llama(**{**WIDTHS, "intermediate_size": 100})
    with pytest.raises(BadModel, match="multiple of 16"):
        cuda_runner(Tiny(config, ours.weights, ours.tensors, ours.backend))
    ((path, shape),) = ours.config.table_shapes().items()
    for scheme, group, double in (("nf4", 64, False), ("int4", 32, False), ("int8", 64, True)):
        table = ours.backend.pack(quantize(torch.randn(shape), scheme, group, double))
        with pytest.raises(BadModel, match=rf"model\.embed_tokens .* in {scheme}"):
            cuda_runner(Tiny(ours.config, {**ours.weights, path: table}, ours.tensors, ours.backend))
