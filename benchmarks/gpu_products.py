"""Whether what is timed is right: a layer's products, an adapter's update and attention beside plain torch on the same
values; and all of it again and again, as kernels whose parts come in a fixed order have the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from adapters.weights import LowRank
from server.engine.backends.cuda.batch import build_batch
from server.engine.backends.cuda.device_model import QKV
from server.engine.batch import Batch
from server.kernels.cuda import attention, epilogue, lora, matmul, packing
from server.kernels.cuda.matmul import Matrix, Tiling
from server.kernels.lora import TARGET_MODULES, SlotWeights

BOUND = 0.005
"""The most that a relative error may be. Rounding one side of a product to bf16 makes 0.0017 of it, and weights of
many rows, or what an adapter's A makes of a row, are rounded beside the inputs, which both have."""
REPEATS = 50
"""How often each is computed again: what reads before something is written mostly finds it written."""
WEIGHT = 0.5
"""Of an adapter in its mix."""


def errors(bench: Any) -> None:
    """The worst of each matrix of a layer and the head, of an adapter's update of q, k and v, and of attention.

    And what of these, or of a step, comes out otherwise when it is computed again.
    """
    counts = (1, bench.rows, 72 if bench.check else 512)
    repeats = 1 if bench.check else REPEATS
    other = [
        *_products(bench, counts, repeats),
        *_updates(bench, counts, repeats),
        *_attention(bench, counts[-1], repeats),
    ]
    bench.tell(f"products, updates, attention and steps, {repeats} times each: other bits", len(other), "<= 0",
               not other, at=sorted(set(other)))  # fmt: skip


def _products(bench: Any, counts: tuple[int, ...], repeats: int) -> list[str]:
    """Tells the worst error of products with so many rows; answers those that have other bits when repeated."""
    found, other = {}, []
    for name, matrix in matrices(bench).items():
        exact = packing.dequantize(matrix._weight)
        for m in counts:
            x, sums, out, how = operands(bench, matrix, m)
            matrix.multiply(x, sums, out, how)
            found[f"{name}, {m} rows"] = _error(out.sum(0), x.float() @ exact.t())
            for _ in range(repeats):
                again = torch.full_like(out, math.nan)
                matrix.multiply(x, sums, again, how)
                if not torch.equal(again, out):
                    other.append(f"{name}, {m} rows")
    _send_tables(bench, f"products at {_listed(counts)} rows against plain ones: worst relative error", found)
    return other


def _updates(bench: Any, counts: tuple[int, ...], repeats: int) -> list[str]:
    """The same of updates, and of steps on the same adapters what has other bits."""
    alone = tuple(((slot, WEIGHT),) for slot in range(bench.rows))
    for slot, each in enumerate(bench.adapters(bench.kinds[0])):
        bench.runner.load_adapter(slot, each)
    bench.runner._pool.wait_for_copies(range(bench.rows))
    found, other = {}, []
    try:
        for m, batch, slots in (
            (1, bench.batch(1, alone[:1]), [0]),
            (bench.rows, bench.batch(bench.rows, alone), [*range(bench.rows)]),
            (counts[-1], bench.prompt(counts[-1], alone[0]), [0] * counts[-1]),
        ):
            update, exact = _update(bench, batch, slots)
            first = update()
            found[f"{m} rows"] = _error(first, exact)
            other += [f"update, {m} rows" for _ in range(repeats) if not torch.equal(update(), first)]
        for n in counts[:2]:
            other += [f"step of {n} rows" for same in _steps(bench, n, alone, repeats) if not same]
    finally:
        for slot in range(bench.rows):
            bench.runner.unload_adapter(slot)
    _send_tables(bench, f"adapters' updates at {_listed(counts)} rows against plain ones: worst relative error", found)
    return other


def _attention(bench: Any, longest: int, repeats: int) -> list[str]:
    """Tells the worst error of attention of single rows, and of a prompt of so many tokens; answers which of them has
    other bits when repeated."""
    found, other = {}, []
    for name, batch in (
        ("single rows", bench.batch(bench.rows, ((),) * bench.rows)),
        ("a prompt", bench.prompt(longest)),
    ):
        attend, exact = _attended(bench, batch)
        first = attend()
        found[f"{name}, {batch.context[0]} tokens"] = _error(first.float(), exact)
        other += [f"attention, {name}" for _ in range(repeats) if not torch.equal(attend(), first)]
    _send_tables(bench, "attention against a plain one: worst relative error", found)
    return other


def _listed(counts: tuple[int, ...]) -> str:
    return ", ".join(map(str, counts))


def matrices(bench: Any) -> dict[str, Matrix]:
    """Those of a layer and the head, by their names here."""
    model, layer = bench.runner._model, bench.runner._model._layers[0]
    return {"qkv": layer.qkv, "out": layer.out, "gate_up": layer.gate_up, "down": layer.down, "head": model._head}


def operands(bench: Any, matrix: Matrix, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Tiling]:
    """What `matrix.multiply` takes for `m` random rows."""
    x = torch.randn(m, matrix.width, device=bench.device).to(bench.backend.dtype)
    sums = torch.empty(m, matrix.width // matrix.group, device=bench.device)
    matmul.group_sums(x, matrix.group, sums)
    how = matrix.tiling(m)
    return x, sums, torch.full((how.splits, m, matrix.rows), math.nan, device=bench.device), how


def _steps(bench: Any, n: int, mixes: tuple[SlotWeights, ...], repeats: int) -> Iterator[bool]:
    """Whether a step of `n` rows, each on an adapter of its own, has the same logits again: as its graph, if there is
    one, and launched kernel by kernel."""
    runner, batch = bench.runner, bench.batch(n, mixes[:n])
    first = runner.run(batch).rows.clone()
    for _ in range(repeats):
        yield torch.equal(runner.run(batch).rows, first)
    shape = build_batch(batch, runner._pool.ranks).shape.bucket(runner._buckets, runner._width)
    with torch.inference_mode():
        runner._results.fill_(math.nan)
        runner._compute(shape)
    yield torch.equal(runner._results[:n], first)


def _update(bench: Any, batch: Batch, slots: list[int]) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """What computes that which the adapters in `slots`, one a row, add to q, k and v of the first layer; and what that
    is."""
    runner, model, pool = bench.runner, bench.runner._model, bench.runner._pool.pool
    step = runner._device_step(build_batch(batch, runner._pool.ranks))
    slices, matrix = model._qkv_slices(), model._layers[0].qkv
    x = torch.randn(len(slots), matrix.width, device=bench.device).to(bench.backend.dtype)
    splits = lora.shrink_splits(step.lanes.tile_rows, step.lanes.width, matrix.width)
    sums = model._new(1, len(slots), matrix.rows).zero_()

    def update() -> torch.Tensor:
        shrunk = model._new(splits, len(slices), len(slots), step.lanes.width)
        lora.shrink(x, pool, step.lanes, QKV, len(slices), shrunk)
        out: torch.Tensor = model._new(len(slots), matrix.rows).fill_(math.nan)
        epilogue.finish(sums, None, out, slices, step.lanes, pool, QKV, shrunk)
        return out

    exact = torch.zeros(len(slots), matrix.rows, device=bench.device)
    for slot in set(slots):
        rows = [i for i, each in enumerate(slots) if each == slot]
        updates = [
            bench.adapters(bench.kinds[0])[slot].modules[f"model.layers.0.self_attn.{q}"] for q in TARGET_MODULES[:3]
        ]
        parts = [
            WEIGHT * update.scale * (x[rows].float() @ _plain(update).to(x.device).t())
            @ update.B.to(x.device).float().t()
            for update in updates
        ]  # fmt: skip
        exact[rows] = torch.cat(parts, 1)
    return update, exact


def _attended(bench: Any, batch: Batch) -> tuple[Callable[[], torch.Tensor], torch.Tensor]:
    """What computes attention of the last rows of sequences, or of all rows of one prompt, over random keys and values
    in the first layer; and what that is."""
    runner, model, config = bench.runner, bench.runner._model, bench.config
    heads, shared, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    step, cache = runner._device_step(build_batch(batch, runner._pool.ranks)), runner._storage
    cache[0].normal_()
    n = len(batch.tokens)
    qkv = model._new(n, model._layers[0].qkv.rows, dtype=model.dtype).normal_()

    def attend() -> torch.Tensor:
        out: torch.Tensor = model._new(n, heads * d, dtype=model.dtype).fill_(math.nan)
        if step.singles is None:
            attention.prefill(qkv, cache, 0, step.blocks, step.prefills, out)
        else:
            scratch = model._new(n, heads, attention.SPLITS, d), model._new(n, heads, attention.SPLITS)
            attention.decode(qkv, cache, 0, step.blocks, step.context, *step.singles, scratch, out, out, 0)
        return out

    size = cache.shape[4]
    exact = torch.empty(n, heads * d, device=bench.device)
    for s, (first, last) in enumerate(zip(batch.row_start, batch.row_start[1:], strict=False)):
        tokens = torch.arange(batch.context[s], device=bench.device)
        blocks = torch.from_numpy(batch.blocks[s]).to(bench.device).long()
        keys, values = (
            cache[0, blocks[tokens // size], :, :, tokens % size]
            .float()
            .repeat_interleave(heads // shared, 1)
            .unbind(2)
        )
        queries = qkv[first:last, : heads * d].float().view(-1, heads, d)
        scores = torch.einsum("rhd,thd->hrt", queries, keys) * d**-0.5
        unseen = tokens > torch.from_numpy(batch.positions[first:last]).to(bench.device)[:, None]
        weights = scores.masked_fill(unseen, -math.inf).softmax(-1)
        exact[first:last] = torch.einsum("hrt,thd->rhd", weights, values).reshape(-1, heads * d)
    return attend, exact


def _plain(update: LowRank) -> torch.Tensor:
    """A [rank, in], float32, in the units of B where both are codes."""
    return update.A.float() if update.units is None else update.A.float() * update.units[:, None]


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The relative error, infinite where a number is not finite."""
    error = float((found - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def _send_tables(bench: Any, name: str, found: dict[str, float]) -> None:
    worst = max(found, key=lambda at: found[at])
    bench.tell(name, round(found[worst], 6), f"<= {BOUND}", found[worst] <= BOUND, at=worst, errors=found)
