"""The adapters of a step: low-rank products over true ranks, added to the base's sums as these are put together.

All adapters lie in one pool; a matrix of one is an integer offset into it, A [rank, in] and B^T [rank, out], ranks
being rows of both. In a pool of int8 they are codes, each rank's in units of its own: what A gives a row is put into
these, and B's codes are multiplied as they are.

A step's lanes are (slot, rank row) pairs. A tile is neighbouring rows of the step and the lanes that they are
multiplied with, in one of two forms. Tiles of several rows go through the matrix units: with the lanes of all adapters
that any of them uses (weights are zero where a row does not), or of its own mix for a prefill. A tile of one row has
its own lanes alone and is summed up by the ordinary units: of an adapter that no other row uses, nothing is read or
multiplied in vain. Nothing is padded to the largest rank, nothing is merged.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import begin, options

LANES = 16
"""Lanes whose A's are read together; a tile's lanes are rounded up to that."""
LANE_BLOCK = tl.constexpr(LANES)
ROUND = tl.constexpr(64)
"""Lanes of a tile of several rows whose B's are read together: each round waits for its addresses and then for them."""
SPLITS = 16
"""Most ranges that inputs are cut into."""
SPLITS_MOST = tl.constexpr(SPLITS)
ROW_INPUTS = 512
"""Inputs of a range, for a tile of one row: as many as are read at once."""


@dataclass(frozen=True)
class Lanes:
    """The adapters of a step, on the device. T rows, S sequences, P places (active adapters), tiles of `tile_rows`.

    tiles     int32 [tiles, 4]   first row, rows (0 for a tile that is not used), first lane, lanes
    slot, index, place   int32 [lanes]   whose rank row a lane is, and the place of its adapter
    sequence  int32 [T]          whose row it is
    weights   float32 [S, P]     of a sequence for the adapter in a place
    `width` is the most lanes that a tile has, rounded up.
    """

    tiles: torch.Tensor
    slot: torch.Tensor
    index: torch.Tensor
    place: torch.Tensor
    sequence: torch.Tensor
    weights: torch.Tensor
    width: int
    tile_rows: int


@dataclass(frozen=True)
class Pool:
    """Where the adapters lie. `offsets` int64 [slots, sites, 3] are those of A and B^T, in elements of `values`, and of
    the units of codes, in elements of `units`; `ranks` int32 and `scales` float32 are [slots, sites], 0 where an
    adapter lacks the site. Rows that meet codes are of `dtype`."""

    values: torch.Tensor
    offsets: torch.Tensor
    ranks: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @property
    def units(self) -> torch.Tensor:
        """The same memory as `values`, as float32."""
        return self.values.view(torch.float32)

    @property
    def sites(self) -> int:
        return self.ranks.shape[1]


def shrink_splits(tile_rows: int, width: int, inputs: int) -> int:
    """Ranges that the inputs are cut into.

    For tiles of one row, whose sums are cheap to put together, as many as can be read at once. For others about 64
    programs, each with at least 256 inputs.
    """
    if tile_rows == 1:
        return min(SPLITS, -(-inputs // ROW_INPUTS))
    splits = 1
    while splits < SPLITS and splits * 2 * (width // LANES) <= 64 and inputs >= 512 * splits:
        splits *= 2
    return splits


@triton.jit(do_not_specialize=["site", "sites", "T", "places", "splits"])
def shrink_kernel(
    x, pool, units, offsets, ranks, scales, tiles, lane_slot, lane_index, lane_place, sequence, weights, out,
    site, sites, K, T, places, width, splits,
    BM: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    """out float32 [splits, SLICES, T, width] = weight * scale * x A^T of a tile's rows and lanes, a range of K each."""
    begin()
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
        place = tl.load(lane_place + lane0 + j, mask=used, other=0)
        at = slot * sites + site + piece
        used &= index < tl.load(ranks + at)
        # Matrices begin at multiples of 32: known to be so, a load is of 16 bytes where K is a multiple of 16 too.
        a = tl.multiple_of(tl.load(offsets + 3 * at), 16) + index.to(tl.int64) * K
        i = tl.arange(0, BM)
        m = row0 + i
        # Before the products, whose values come meanwhile: each of these waits for the address of the next.
        owner = tl.load(sequence + m, mask=i < rows, other=0)
        weight = tl.load(weights + owner[:, None] * places + place[None, :], mask=used[None, :], other=0.0)
        weight = weight * tl.load(scales + at)[None, :]
        if pool.dtype.element_ty == tl.int8:
            weight = weight * tl.load(units + tl.load(offsets + 3 * at + 2) + index, mask=used, other=0.0)[None, :]
        acc = tl.zeros((BM, LANE_BLOCK), tl.float32)
        chunk = tl.cdiv(tl.cdiv(K, BK), splits) * BK
        for start in range(split * chunk, tl.minimum((split + 1) * chunk, K), BK):
            k = start + tl.arange(0, BK)
            inside = k < K
            if BM == 1:
                row_x = tl.load(x + row0 * K + k, mask=inside, other=0.0).to(tl.float32)
                rows_a = tl.load(pool + a[:, None] + k[None, :], mask=used[:, None] & inside[None, :], other=0)
                acc += tl.sum(rows_a.to(tl.float32) * row_x[None, :], 1)[None, :]
            else:
                place_x = x + m.to(tl.int64)[:, None] * K + k[None, :]
                rows_x = tl.load(place_x, mask=(i[:, None] < rows) & inside[None, :], other=0.0)
                rows_a = tl.load(pool + a[None, :] + k[:, None], mask=used[None, :] & inside[:, None], other=0)
                acc = tl.dot(rows_x, rows_a.to(x.dtype.element_ty), acc)
        acc = tl.where(weight == 0.0, 0.0, acc * weight)  # what a row does not use may be anything, even infinite
        target = out + ((split * SLICES + piece) * T + m).to(tl.int64)[:, None] * width + j[None, :]
        tl.store(target, acc, mask=i[:, None] < rows)


@triton.jit
def expanded(
    acc, pool, offsets, ranks, lane_slot, lane_index, lane0, lanes, v, site, sites, piece, row0, rows,
    column, N, T, width, splits,
    BM: tl.constexpr, SLICES: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """`acc` [BM, outputs] with the lanes' v B^T added, for the outputs `column` (below N) of a slice's module."""
    together: tl.constexpr = LANE_BLOCK if BM == 1 else ROUND
    i = tl.arange(0, BM)
    for first in range(0, lanes, together):
        j = first + tl.arange(0, together)
        used = j < lanes
        slot = tl.load(lane_slot + lane0 + j, mask=used, other=0)
        index = tl.load(lane_index + lane0 + j, mask=used, other=0)
        at = slot * sites + site + piece
        used &= index < tl.load(ranks + at)
        b = tl.multiple_of(tl.load(offsets + 3 * at + 1), 16) + index.to(tl.int64) * N
        rows_b = tl.load(pool + b[:, None] + column[None, :], mask=used[:, None] & (column[None, :] < N), other=0)
        if BM == 1:
            split = tl.arange(0, SPLITS_MOST)
            source = v + ((split * SLICES + piece) * T + row0)[:, None] * width + j[None, :]
            shrunk = tl.sum(tl.load(source, mask=(split[:, None] < splits) & used[None, :], other=0.0), 0)
            acc += tl.sum(shrunk[:, None] * rows_b.to(tl.float32), 0)[None, :]
        else:
            shrunk = tl.zeros((BM, together), tl.float32)
            for split in range(0, splits):
                row = ((split * SLICES + piece) * T + row0 + i).to(tl.int64)  # times lanes past 2^31, as in `summed`
                source = v + row[:, None] * width + j[None, :]
                shrunk += tl.load(source, mask=(i[:, None] < rows) & used[None, :], other=0.0)
            acc = tl.dot(shrunk.to(DTYPE), rows_b.to(DTYPE), acc)
    return acc


def shrink(x: torch.Tensor, pool: Pool, lanes: Lanes, site: int, slices: int, out: torch.Tensor) -> None:
    """The products with the A's of `slices` neighbouring sites, into float32 out [splits, slices, T, width].

    The number of splits is `shrink_splits` of the tiles' rows, their width and x's inputs.
    """
    splits = out.shape[0]
    grid = (lanes.tiles.shape[0], lanes.width // LANES, slices * splits)
    shrink_kernel[grid](
        x, pool.values, pool.units, pool.offsets, pool.ranks, pool.scales,
        lanes.tiles, lanes.slot, lanes.index, lanes.place, lanes.sequence, lanes.weights, out,
        site, pool.sites, x.shape[1], x.shape[0], lanes.weights.shape[1], lanes.width, splits,
        BM=lanes.tile_rows, BK=ROW_INPUTS if lanes.tile_rows == 1 else 128, SLICES=slices, **options(),
    )  # fmt: skip
