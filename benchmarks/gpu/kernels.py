"""Times each kernel of a step separately, for tuning."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.bench import Bench, device_seconds
from server.engine.backends.cuda.batch import build_batch
from server.engine.backends.cuda.device_model import GATE_UP, QKV
from server.kernels.cuda import attention, epilogue, lora, matmul, sampling
from server.kernels.cuda.matmul import FEW_ROWS, Matrix, Tiling

Call = tuple[str, Callable[[], None], int]
"""Name, launch function, and bytes to read."""


def kernels(bench: Bench) -> None:
    """Time the kernels around the products, then each matrix at several numbers of rows."""
    cold = torch.zeros(1 << (8 if bench.check else 27), device=bench.device)
    _record_others(bench, cold)
    few, many = ((1, 17), (65,)) if bench.check else ((1, 8, 16, 32, 64), (128, 256, 512, 1024, 2048))
    for name, matrix in _matrices(bench).items():
        for m in few:
            _record_product(bench, name, matrix, m, cold)
        for m in many:
            with _dequantize_from(m + 1):
                tiled = _record_product(bench, f"{name}, tiles of codes", matrix, m, cold)
            with _dequantize_from(m):
                dense = _record_product(bench, f"{name}, dequantized", matrix, m, cold)
            bench.record(f"{name}, {m} rows: tiles of codes over dequantized, time", round(tiled / dense, 3))


def _matrices(bench: Bench) -> dict[str, Matrix]:
    """The matrices of the first layer, and the head."""
    model, layer = bench.runner._model, bench.runner._model._layers[0]
    return {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down, "head": model._head}


def _operands(bench: Bench, matrix: Matrix, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Tiling]:
    """Arguments of `matrix.multiply` for `m` random rows."""
    x = torch.randn(m, matrix.width, device=bench.device).to(bench.backend.dtype)
    sums = torch.empty(m, matrix.width // matrix.group, device=bench.device)
    matmul.group_sums(x, matrix.group, sums)
    tiling = matrix.tiling(m)
    return x, sums, torch.full((tiling.splits, m, matrix.rows), math.nan, device=bench.device), tiling


@contextmanager
def _dequantize_from(rows: int) -> Iterator[None]:
    """Dequantize the matrix in products with at least this many rows."""
    before = matmul.DENSE_ROWS
    matmul.DENSE_ROWS = rows
    try:
        yield
    finally:
        matmul.DENSE_ROWS = before


def _record_product(bench: Bench, name: str, matrix: Matrix, m: int, cold: torch.Tensor) -> float:
    """Seconds of the product with `m` rows."""
    x, sums, out, tiling = _operands(bench, matrix, m)
    seconds = _cold_seconds(bench, lambda: matrix.multiply(x, sums, out, tiling), cold)
    minimum = max(matrix.nbytes / bench.bandwidth, 2 * m * matrix.rows * matrix.width / bench.peak)
    bench.record(f"{name} {matrix.rows}x{matrix.width}, {m} rows: of the roofline", round(minimum / seconds, 3),
                 microseconds=seconds * 1e6, tiling=str(tiling) if m <= FEW_ROWS else "")  # fmt: skip
    return seconds


def _record_others(bench: Bench, cold: torch.Tensor) -> None:
    """Adapter kernels, epilogues, attention and sampling of a step with a different adapter per row."""
    runner, model, n = bench.runner, bench.runner._model, bench.rows
    kind = bench.kinds[0]
    for slot, weights in enumerate(bench.adapters(kind)):
        runner.load_adapter(slot, weights)
    runner._pool.wait_for_copies(range(n))
    try:
        batch = bench.batch(n, tuple(((slot, 1.0),) for slot in range(n)))
        step = runner._device_step(build_batch(batch, runner._pool.ranks))
        calls = [*_adapter_calls(model, step, runner._pool.pool, n, kind.rank), *_other_calls(bench, step, n)]
        for name, call, size in calls:
            seconds = _cold_seconds(bench, call, cold)
            bench.record(f"{name}, {n} rows: of the bandwidth", round(size / bench.bandwidth / seconds, 3),
                         microseconds=seconds * 1e6)  # fmt: skip
    finally:
        for slot in range(n):
            runner.unload_adapter(slot)


def _adapter_calls(model: Any, step: Any, pool: lora.DeviceAdapters, n: int, rank: int) -> Iterator[Call]:
    """Shrink kernels and epilogues of the fused projections; the epilogue includes the adapters' B."""
    layer = model._layers[0]
    for name, matrix, site, slices in (
        ("qkv", layer.qkv, QKV, model._qkv_slices()),
        ("gate and up", layer.gate_up, GATE_UP, (layer.gate_up.rows // 2,) * 2),
    ):
        x = model._new(n, matrix.width, dtype=model.dtype).normal_()
        splits = lora.shrink_splits(step.lanes.tile_rows, step.lanes.width, matrix.width)
        shrunk = model._new(splits, len(slices), n, step.lanes.width)
        inputs = n * len(slices) * rank * matrix.width * pool.values.itemsize
        shrinking = (x, pool, step.lanes, site, len(slices), shrunk)
        yield f"shrink of {name}", lambda a=shrinking: lora.shrink(*a), inputs
        sums = model._new(matrix.tiling(n).splits, n, matrix.rows).zero_()
        outputs = n * rank * matrix.rows * pool.values.itemsize + sums.nbytes
        if site == QKV:
            out = model._new(n, matrix.rows, dtype=model.dtype)
            whole = (sums, layer.biases[0], out, slices, step.lanes, pool, site, shrunk)
            yield f"epilogue of {name}", lambda a=whole: epilogue.finish(*a), outputs
        else:
            hidden, group = model._new(n, matrix.rows // 2, dtype=model.dtype), layer.down.group
            group_sums = model._new(n, matrix.rows // 2 // group)
            gated = (sums, layer.biases[2], hidden, group_sums, group, step.lanes, pool, site, shrunk)
            yield f"SwiGLU of {name}", lambda a=gated: epilogue.finish_swiglu(*a), outputs


def _other_calls(bench: Bench, step: Any, n: int) -> Iterator[Call]:
    """Decode attention, and sampling with and without limits."""
    model, config, device = bench.runner._model, bench.config, bench.device
    heads, d = config.num_attention_heads, config.head_dim
    qkv = model._new(n, model._layers[0].qkv.rows, dtype=model.dtype).normal_()
    out = model._new(n, heads * d, dtype=model.dtype)
    scratch = model._new(n, heads, attention.SPLITS, d), model._new(n, heads, attention.SPLITS)
    arguments = (qkv, bench.runner._storage, 0, step.blocks, step.context, *step.singles, scratch, out, out, 0)
    context = n * (bench.context + 1) * bench.runner.block_bytes(1) // config.num_hidden_layers
    yield f"attention over {bench.context} tokens", lambda: attention.decode(*arguments), context
    logits = 3 * torch.randn(n, config.vocab_size, device=device)
    tokens = torch.empty(n, dtype=torch.int32, device=device)
    for name, how, top_k in (
        ("greedy sampling", [0.0, 1.0, 0.0, 0.5], 0),
        ("sampling with temperature", [1.0, 1.0, 0.0, 0.5], 0),
        ("sampling with top_p 0.9", [1.0, 0.9, 0.0, 0.5], 0),
        ("sampling with top_k 50", [1.0, 1.0, 0.0, 0.5], 50),
    ):
        given = torch.tensor([how] * n, device=device), torch.full((n,), top_k, dtype=torch.int32, device=device)
        yield name, lambda given=given: sampling.sample(logits, *given, tokens), logits.nbytes


def _cold_seconds(bench: Bench, call: Callable[[], None], cold: torch.Tensor) -> float:
    """Median device time of `call` without launch time, with none of its operands in the cache."""
    if bench.device.type != "cuda":
        return bench.seconds(call)
    call()
    times = []
    for _ in range(10):
        cold.sum()  # a read, because dirty cache lines would be written back during `call`
        times.append(device_seconds(call))
    return statistics.median(times)
