"""LoRA updates of a step, without padding to the largest rank.

All adapters lie in one tensor. A lane is a (slot, rank) pair: one row of A [rank, in] and of B^T [rank, out]. A tile is
a set of adjacent rows and the lanes that they are multiplied with. Tiles of several rows use tensor cores with the
lanes of all adapters that any of their rows uses; weights are zero where a row does not. Tiles of one row use only
their own lanes, without tensor cores. int8 adapters have a scale per rank, which is applied to the result of A.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import options, wait_for_previous_kernel

LANES = 16
"""Lanes whose A's are read together; the lanes of a tile are padded to it."""
LANE_BLOCK = tl.constexpr(LANES)
ROUND = tl.constexpr(64)
"""Lanes whose B's are read together in tiles of several rows."""
SPLITS = 16
"""Most splits of the inputs."""
SPLITS_MOST = tl.constexpr(SPLITS)
ROW_INPUTS = 512
"""Inputs per split in tiles of one row."""


@dataclass(frozen=True)
class Lanes:
    """The tiles and lanes of a step, on the device, for T rows, S sequences and P active adapters.

    Attributes:
        tiles: First row, rows (0 for an unused tile), first lane, lanes; int32 [tiles, 4].
        slot: Slot of each lane, int32 [lanes].
        index: Rank index of each lane, int32 [lanes].
        adapter: Column of each lane's adapter in `weights`, int32 [lanes].
        sequence: Sequence of each row, int32 [T].
        weights: Adapter weights of each sequence, float32 [S, P].
        width: Most lanes of a tile, padded.
        tile_rows: Rows per tile.
    """

    tiles: torch.Tensor
    slot: torch.Tensor
    index: torch.Tensor
    adapter: torch.Tensor
    sequence: torch.Tensor
    weights: torch.Tensor
    width: int
    tile_rows: int


@dataclass(frozen=True)
class DeviceAdapters:
    """The adapters on the device.

    Attributes:
        values: All matrices.
        offsets: Offsets of A and B^T in `values` and of the rank scales in `units`, int64 [slots, modules, 3].
        ranks: int32 [slots, modules], 0 for a missing module.
        scales: float32 [slots, modules].
        dtype: Dtype of the rows that int8 matrices are multiplied with.
    """

    values: torch.Tensor
    offsets: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def units(self) -> torch.Tensor:
        """The memory of `values` as float32."""
        return self.values.view(torch.float32)

    @property
    def modules(self) -> int:
        return self.ranks.shape[1]


def shrink_splits(tile_rows: int, width: int, inputs: int) -> int:
    """Number of splits of the inputs.

    Tiles of one row: as many as can be loaded at once, since adding the splits is cheap. Others: about 64 programs with
    at least 256 inputs each.
    """
    if tile_rows == 1:
        return min(SPLITS, -(-inputs // ROW_INPUTS))
    splits = 1
    while splits < SPLITS and splits * 2 * (width // LANES) <= 64 and inputs >= 512 * splits:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["module", "modules", "T", "adapter_count", "splits"])
def shrink_kernel(
    x, matrices, units, offsets, ranks, scales, tiles, lane_slot, lane_index, lane_adapter, sequence, weights, out,
    module, modules, K, T, adapter_count, width, splits,
    BM: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """out float32 [splits, SLICES, T, width] = weight * scale * x A^T for a tile's rows and lanes, by splits of K."""
    wait_for_previous_kernel()
    tile, first = tl.program_id(0), tl.program_id(1) * LANE_BLOCK
    piece = tl.program_id(2) // splits
    split = tl.program_id(2) % splits
    row0, rows = tl.load(tiles + tile * 4), tl.load(tiles + tile * 4 + 1)
    lane0, lanes = tl.load(tiles + tile * 4 + 2), tl.load(tiles + tile * 4 + 3)
    if rows > 0 and first < lanes:
        j = first + tl.arange(0, LANE_BLOCK)
        used = j < lanes
        slot = tl.load(lane_slot + lane0 + j, mask=used, other=0)
        index = tl.load(lane_index + lane0 + j, mask=used, other=0)
        adapter = tl.load(lane_adapter + lane0 + j, mask=used, other=0)
        at = slot * modules + module + piece
        used &= index < tl.load(ranks + at)
        # Matrices are aligned to 32 elements; stating it allows 16-byte loads where K is a multiple of 16.
        a = tl.multiple_of(tl.load(offsets + 3 * at), 16) + index.to(tl.int64) * K
        i = tl.arange(0, BM)
        m = row0 + i
        # Loaded before the products, to hide the latency of these dependent loads.
        owner = tl.load(sequence + m, mask=i < rows, other=0)
        weight = tl.load(weights + owner[:, None] * adapter_count + adapter[None, :], mask=used[None, :], other=0.0)
        weight = weight * tl.load(scales + at)[None, :]
        if matrices.dtype.element_ty == tl.int8:
            weight = weight * tl.load(units + tl.load(offsets + 3 * at + 2) + index, mask=used, other=0.0)[None, :]
        acc = tl.zeros((BM, LANE_BLOCK), tl.float32)
        chunk = tl.cdiv(tl.cdiv(K, BK), splits) * BK
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, K), BK):
            k = start + tl.arange(0, BK)
            inside = k < K
            if BM == 1:
                row_x = tl.load(x + row0 * K + k, mask=inside, other=0.0).to(tl.float32)
                rows_a = tl.load(matrices + a[:, None] + k[None, :], mask=used[:, None] & inside[None, :], other=0)
                acc += tl.sum(rows_a.to(tl.float32) * row_x[None, :], 1)[None, :]
            else:
                place_x = x + m.to(tl.int64)[:, None] * K + k[None, :]
                rows_x = tl.load(place_x, mask=(i[:, None] < rows) & inside[None, :], other=0.0)
                rows_a = tl.load(matrices + a[None, :] + k[:, None], mask=used[None, :] & inside[:, None], other=0)
                acc = tl.dot(rows_x, rows_a.to(x.dtype.element_ty), acc)
        acc = tl.where(weight == 0.0, 0.0, acc * weight)  # values of lanes that a row does not use may be infinite
        target = out + ((split * SLICES + piece) * T + m).to(tl.int64)[:, None] * width + j[None, :]
        tl.store(target, acc, mask=i[:, None] < rows)


@triton.jit
def add_expanded(
    acc, matrices, offsets, ranks, lane_slot, lane_index, lane0, lanes, v, module, modules, piece, row0, rows,
    column, N, T, width, splits,
    BM: tl.constexpr, SLICES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`acc` [BM, outputs] plus v B^T of the lanes, for the outputs `column` (below N) of a slice."""
    together: tl.constexpr = LANE_BLOCK if BM == 1 else ROUND
    i = tl.arange(0, BM)
    for first in range(0, lanes, together):
        j = first + tl.arange(0, together)
        used = j < lanes
        slot = tl.load(lane_slot + lane0 + j, mask=used, other=0)
        index = tl.load(lane_index + lane0 + j, mask=used, other=0)
        at = slot * modules + module + piece
        used &= index < tl.load(ranks + at)
        b = tl.multiple_of(tl.load(offsets + 3 * at + 1), 16) + index.to(tl.int64) * N
        rows_b = tl.load(matrices + b[:, None] + column[None, :], mask=used[:, None] & (column[None, :] < N), other=0)
        if BM == 1:
            split = tl.arange(0, SPLITS_MOST)
            source = v + ((split * SLICES + piece) * T + row0)[:, None] * width + j[None, :]
            shrunk = tl.sum(tl.load(source, mask=(split[:, None] < splits) & used[None, :], other=0.0), 0)
            acc += tl.sum(shrunk[:, None] * rows_b.to(tl.float32), 0)[None, :]
        else:
            shrunk = tl.zeros((BM, together), tl.float32)
            for split in range(0, splits):
                row = ((split * SLICES + piece) * T + row0 + i).to(tl.int64)  # 64-bit, since offsets exceed 2^31
                source = v + row[:, None] * width + j[None, :]
                shrunk += tl.load(source, mask=(i[:, None] < rows) & used[None, :], other=0.0)
            acc = tl.dot(shrunk.to(DTYPE), rows_b.to(DTYPE), acc)
    return acc


def shrink(
    x: torch.Tensor, adapters: DeviceAdapters, lanes: Lanes, module: int, slices: int, out: torch.Tensor
) -> None:
    """Multiply x with the A's of `slices` adjacent modules, into float32 out [splits, slices, T, width].

    The number of splits is `shrink_splits`.
    """
    splits = out.shape[0]
    grid = (lanes.tiles.shape[0], lanes.width // LANES, slices * splits)
    shrink_kernel[grid](
        x, adapters.values, adapters.units, adapters.offsets, adapters.ranks, adapters.scales,
        lanes.tiles, lanes.slot, lanes.index, lanes.adapter, lanes.sequence, lanes.weights, out,
        module, adapters.modules, x.shape[1], x.shape[0], lanes.weights.shape[1], lanes.width, splits,
        BM=lanes.tile_rows, BK=ROW_INPUTS if lanes.tile_rows == 1 else 128, SLICES=slices, **options(),
    )  # fmt: skip
