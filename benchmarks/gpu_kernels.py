"""Each kernel of a step by itself on a GPU: where a step's time goes, and what to tune."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import gpu_ceilings, gpu_products
from server.engine.backends.cuda.batch import build_batch
from server.engine.backends.cuda.device_model import GATE_UP, QKV
from server.kernels.cuda import attention, epilogue, lora, matmul, sampling
from server.kernels.cuda.matmul import FEW_ROWS


def kernels(bench: Any) -> None:
    """What is around the products of a step; then each matrix of a layer at several numbers of rows, both ways where
    there are two."""
    cold = torch.zeros(1 << (8 if bench.check else 27), device=bench.device)
    _tell_others(bench, cold)
    few, many = ((1, 17), (65,)) if bench.check else ((1, 8, 16, 32, 64), (128, 256, 512, 1024, 2048))
    for name, matrix in gpu_products.matrices(bench).items():
        for m in few:
            _tell_product(bench, name, matrix, m, cold)
        for m in many:
            with _dense_from(m + 1):
                tiled = _tell_product(bench, f"{name}, tiles of codes", matrix, m, cold)
            with _dense_from(m):
                dense = _tell_product(bench, f"{name}, dequantized", matrix, m, cold)
            bench.tell(f"{name}, {m} rows: tiles of codes over dequantized, time", round(tiled / dense, 3))


@contextmanager
def _dense_from(rows: int) -> Iterator[None]:
    """Products dequantize their matrix from so many rows on."""
    before = matmul.DENSE_ROWS
    matmul.DENSE_ROWS = rows
    try:
        yield
    finally:
        matmul.DENSE_ROWS = before


def _tell_product(bench: Any, name: str, matrix: Any, m: int, cold: torch.Tensor) -> float:
    """Seconds of the product with `m` rows."""
    x, sums, out, how = gpu_products.operands(bench, matrix, m)
    seconds = _cold_seconds(bench, lambda: matrix.multiply(x, sums, out, how), cold)
    floor = max(matrix.nbytes / bench.bandwidth, 2 * m * matrix.rows * matrix.width / bench.peak)
    bench.tell(f"{name} {matrix.rows}x{matrix.width}, {m} rows: of the roofline", round(floor / seconds, 3),
               microseconds=seconds * 1e6, tiling=str(how) if m <= FEW_ROWS else "")  # fmt: skip
    return seconds


def _tell_others(bench: Any, cold: torch.Tensor) -> None:
    """Adapters, endings, attention and draws of a step of `rows` sequences, each on an adapter of its own."""
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
            bench.tell(f"{name}, {n} rows: of the bandwidth", round(size / bench.bandwidth / seconds, 3),
                       microseconds=seconds * 1e6)  # fmt: skip
    finally:
        for slot in range(n):
            runner.unload_adapter(slot)


Call = tuple[str, Callable[[], None], int]
"""What it is, how it is launched, and the bytes that it has to read."""


def _adapter_calls(model: Any, step: Any, pool: lora.DeviceAdapters, n: int, rank: int) -> Iterator[Call]:
    """Shrink and ending of the matrices that join several modules, the adapters' B's in the ending."""
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
            yield f"ending of {name}", lambda a=whole: epilogue.finish(*a), outputs
        else:
            hidden, group = model._new(n, matrix.rows // 2, dtype=model.dtype), layer.down.group
            group_sums = model._new(n, matrix.rows // 2 // group)
            gated = (sums, layer.biases[2], hidden, group_sums, group, step.lanes, pool, site, shrunk)
            yield f"SwiGLU of {name}", lambda a=gated: epilogue.finish_swiglu(*a), outputs


def _other_calls(bench: Any, step: Any, n: int) -> Iterator[Call]:
    """Attention of single rows over their context, and draws with and without a limit."""
    model, config, device = bench.runner._model, bench.config, bench.device
    heads, d = config.num_attention_heads, config.head_dim
    qkv = model._new(n, model._layers[0].qkv.rows, dtype=model.dtype).normal_()
    seen = model._new(n, heads * d, dtype=model.dtype)
    scratch = model._new(n, heads, attention.SPLITS, d), model._new(n, heads, attention.SPLITS)
    whole = (qkv, bench.runner._storage, 0, step.blocks, step.context, *step.singles, scratch, seen, seen, 0)
    context = n * (bench.context + 1) * bench.runner.block_bytes(1) // config.num_hidden_layers
    yield f"attention over {bench.context} tokens", lambda: attention.decode(*whole), context
    logits = 3 * torch.randn(n, config.vocab_size, device=device)
    tokens = torch.empty(n, dtype=torch.int32, device=device)
    for name, how, most in (
        ("greedy draw", [0.0, 1.0, 0.0, 0.5], 0),
        ("draw with temperature", [1.0, 1.0, 0.0, 0.5], 0),
        ("draw with top_p 0.9", [1.0, 0.9, 0.0, 0.5], 0),
        ("draw with top_k 50", [1.0, 1.0, 0.0, 0.5], 50),
    ):
        given = torch.tensor([how] * n, device=device), torch.full((n,), most, dtype=torch.int32, device=device)
        yield name, lambda given=given: sampling.sample(logits, *given, tokens), logits.nbytes


def _cold_seconds(bench: Any, call: Callable[[], None], cold: torch.Tensor) -> float:
    """Median device time of `call` with nothing of its operands in the cache, without the time of launching."""
    if bench.device.type != "cuda":
        seconds: float = bench.seconds(call)
        return seconds
    call()
    times = []
    for _ in range(10):
        cold.sum()  # lines that were written would have to go back to memory while `call` is timed
        times.append(gpu_ceilings.device_seconds(call))
    return statistics.median(times)
