"""Epilogues of linears: add the split-K sums, the bias and the LoRA updates, then store, add to the residual, or
SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import options, wait_for_previous_kernel
from server.kernels.cuda.lora import DeviceAdapters, Lanes, add_expanded
from server.kernels.cuda.matmul import PROCESSORS, SUMS_TOGETHER

OUTPUTS = (128, 64, 32)
"""Outputs per tile; the largest that gives each multiprocessor a tile."""
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
TOGETHER = tl.constexpr(SUMS_TOGETHER)
SMALL = tl.constexpr(1024)
"""Accumulators per tile up to which several splits are loaded at a time."""
MANY = 64
"""Rows per tile from which the number of tiles doubles in `_tile`."""


@triton.jit
def sum_splits(sums, bias, row0, rows, column, stop, N, T, splits, BM: tl.constexpr, BIAS: tl.constexpr):
    """Sum of the splits plus bias, float32, for a tile of rows and the outputs `column` below `stop`."""
    i = tl.arange(0, BM)
    inside = (i[:, None] < rows) & (column[None, :] < stop)
    row = (row0 + i).to(tl.int64)  # 64-bit, since offsets exceed 2^31 in long steps
    acc = tl.load(sums + row[:, None] * N + column[None, :], mask=inside, other=0.0)
    together: tl.constexpr = TOGETHER if BM * column.shape[0] <= SMALL else 1
    for first in range(1, splits, together):
        for j in tl.static_range(together):
            split = first + j
            source = sums + (split * T + row)[:, None] * N + column[None, :]
            acc += tl.load(source, mask=inside & (split + 0 * i[:, None] < splits), other=0.0)
    if BIAS:
        acc += tl.load(bias + column, mask=column < stop, other=0.0)[None, :]
    return acc


@triton.jit(do_not_specialize=["module", "modules", "T", "splits", "v_splits"])
def finish_kernel(
    sums, bias, out, matrices, offsets, ranks, tiles, lane_slot, lane_index, v, module, modules, N, T, width,
    splits, v_splits,
    N0, N1, N2,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, SLICES: tl.constexpr,
    ADD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out [T, N] = the finished product; with ADD, out += it. Up to three slices of N0, N1 and N2 outputs."""
    wait_for_previous_kernel()
    row0, rows = tl.load(tiles + tl.program_id(1) * 4), tl.load(tiles + tl.program_id(1) * 4 + 1)
    if rows > 0:
        block = tl.program_id(0)
        before1, before2 = tl.cdiv(N0, BN), tl.cdiv(N0, BN) + tl.cdiv(N1, BN)
        piece = (block >= before1).to(tl.int32) + (block >= before2).to(tl.int32)
        first = tl.where(piece == 0, 0, tl.where(piece == 1, before1, before2))
        base = tl.where(piece == 0, 0, tl.where(piece == 1, N0, N0 + N1))
        outputs = tl.where(piece == 0, N0, tl.where(piece == 1, N1, N2))
        column = (block - first) * BN + tl.arange(0, BN)
        i = tl.arange(0, BM)
        target = out + (row0 + i).to(tl.int64)[:, None] * N + (base + column)[None, :]
        inside = (i[:, None] < rows) & (column[None, :] < outputs)
        if ADD:
            before = tl.load(target, mask=inside, other=0.0)  # loaded early, in parallel with the sums
        acc = sum_splits(sums, bias, row0, rows, base + column, base + outputs, N, T, splits, BM, BIAS)
        if LORA:
            lane0, lanes = tl.load(tiles + tl.program_id(1) * 4 + 2), tl.load(tiles + tl.program_id(1) * 4 + 3)
            acc = add_expanded(
                acc, matrices, offsets, ranks, lane_slot, lane_index, lane0, lanes, v, module, modules, piece, row0,
                rows, column, outputs, T, width, v_splits, BM, SLICES, DTYPE,
            )  # fmt: skip
        if ADD:
            acc += before
        tl.store(target, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["module", "modules", "T", "splits", "v_splits"])
def swiglu_kernel(
    sums, bias, out, out_sums, matrices, offsets, ranks, tiles, lane_slot, lane_index, v, module, modules, N, T, width,
    splits, v_splits,
    BM: tl.constexpr, BN: tl.constexpr, BIAS: tl.constexpr, LORA: tl.constexpr, GROUP: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """out [T, N] = silu(gate) * up of a product [T, 2 N] with the gates first. With GROUP also the sums of out's
    groups."""
    wait_for_previous_kernel()
    row0, rows = tl.load(tiles + tl.program_id(1) * 4), tl.load(tiles + tl.program_id(1) * 4 + 1)
    if rows > 0:
        column = tl.program_id(0) * BN + tl.arange(0, BN)
        i = tl.arange(0, BM)
        gate = sum_splits(sums, bias, row0, rows, column, N, 2 * N, T, splits, BM, BIAS)
        # Separate pointers for the second half keep the loads vectorized.
        up = sum_splits(sums + N, bias + N, row0, rows, column, N, 2 * N, T, splits, BM, BIAS)
        if LORA:
            lane0, lanes = tl.load(tiles + tl.program_id(1) * 4 + 2), tl.load(tiles + tl.program_id(1) * 4 + 3)
            gate = add_expanded(
                gate, matrices, offsets, ranks, lane_slot, lane_index, lane0, lanes, v, module, modules, 0, row0, rows,
                column, N, T, width, v_splits, BM, 2, DTYPE,
            )  # fmt: skip
            up = add_expanded(
                up, matrices, offsets, ranks, lane_slot, lane_index, lane0, lanes, v, module, modules, 1, row0, rows,
                column, N, T, width, v_splits, BM, 2, DTYPE,
            )  # fmt: skip
        small = tl.exp(-tl.abs(gate))  # at most 1
        hidden = (gate * tl.where(gate >= 0.0, 1.0, small) / (1.0 + small) * up).to(out.dtype.element_ty)
        inside = (i[:, None] < rows) & (column[None, :] < N)
        tl.store(out + (row0 + i).to(tl.int64)[:, None] * N + column[None, :], hidden, mask=inside)
        if GROUP > 0:
            kept = tl.where(inside, hidden.to(tl.float32), 0.0)
            totals = tl.sum(tl.reshape(kept, (BM, BN // GROUP, GROUP)), 2)
            g = tl.program_id(0) * (BN // GROUP) + tl.arange(0, BN // GROUP)
            adapter = out_sums + (row0 + i)[:, None] * (N // GROUP) + g[None, :]
            tl.store(adapter, totals, mask=(i[:, None] < rows) & (g[None, :] < N // GROUP))


def finish(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    slices: Sequence[int],
    lanes: Lanes,
    adapters: DeviceAdapters,
    module: int,
    shrunk: torch.Tensor | None,
    add: bool = False,
) -> None:
    """Finish a product into out [T, N].

    Args:
        sums: Split-K sums, float32 [splits, T, N].
        bias: float32 [N] or None.
        out: Receives the result.
        slices: Outputs of each module that the matrix concatenates, three at most.
        lanes: Tiles of rows and their adapters.
        adapters: The adapters on the device.
        module: Index of the first module.
        shrunk: Result of `shrink`, None without adapters.
        add: Add to `out` instead of overwriting it.
    """
    widths = [*slices, 0, 0][:3]
    rows, n = out.shape
    v_splits = 1 if shrunk is None else shrunk.shape[0]
    tile = _tile(n, lanes)
    grid = (sum(-(-width // tile) for width in slices), lanes.tiles.shape[0])
    finish_kernel[grid](
        sums, sums if bias is None else bias, out, *_adapter_arguments(adapters, lanes, shrunk, sums),
        module, adapters.modules, n, rows, lanes.width, sums.shape[0], v_splits, *widths,
        BM=lanes.tile_rows, BN=tile, BIAS=bias is not None, LORA=shrunk is not None, SLICES=len(slices), ADD=add,
        DTYPE=TYPES[adapters.dtype], **options(),
    )  # fmt: skip


def finish_swiglu(
    sums: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    out_sums: torch.Tensor,
    group: int,
    lanes: Lanes,
    adapters: DeviceAdapters,
    module: int,
    shrunk: torch.Tensor | None,
) -> None:
    """Finish the product of gate and up, [splits, T, 2 N], into out [T, N] through SwiGLU. See `finish`.

    Unless `group` is 0, the sums of out's groups go into float32 out_sums [T, N / group].
    """
    rows, n = out.shape
    v_splits = 1 if shrunk is None else shrunk.shape[0]
    tile = max(group, _tile(n, lanes))
    grid = (-(-n // tile), lanes.tiles.shape[0])
    swiglu_kernel[grid](
        sums, sums if bias is None else bias, out, out_sums, *_adapter_arguments(adapters, lanes, shrunk, sums),
        module, adapters.modules, n, rows, lanes.width, sums.shape[0], v_splits,
        BM=lanes.tile_rows, BN=tile, BIAS=bias is not None, LORA=shrunk is not None, GROUP=group,
        DTYPE=TYPES[adapters.dtype], **options(),
    )  # fmt: skip


def _tile(outputs: int, lanes: Lanes) -> int:
    """Outputs per tile. It does not depend on the number of row tiles, so that warm-up compiles every variant."""
    if lanes.tile_rows == 1:
        return OUTPUTS[0]
    tiles = 2 if lanes.tile_rows >= MANY else 1
    return next((t for t in OUTPUTS if -(-outputs // t) * tiles >= PROCESSORS), OUTPUTS[-1])


def _adapter_arguments(
    adapters: DeviceAdapters, lanes: Lanes, shrunk: torch.Tensor | None, unused: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The kernels' arguments for the adapters. `unused` stands for arguments that are never read."""
    if shrunk is None:
        return unused, unused, unused, lanes.tiles, unused, unused, unused
    return adapters.values, adapters.offsets, adapters.ranks, lanes.tiles, lanes.slot, lanes.index, shrunk
