"""Products with a quantized matrix in the layout `words-2`: one kernel from a single row to a prefill.

Codes go into the matrix units as they are, whole numbers that both 16-bit floats hold exactly; a group's scale and zero
meet the float32 sums. So nothing is rounded but the activations, and two codes cost a shift and one logical operation.
The levels of nf4 are no whole numbers: they are looked up, rounded to the activations' dtype, as the matrix units want.
K is cut into `splits` ranges, whose sums are written side by side and added in order by whoever reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import ask_for, begin, options
from server.kernels.cuda.packing import parts_of
from server.kernels.packed_format import NF4, TILE
from server.kernels.weight import Weight

INT4, FOUR_BIT_FLOAT, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCHEMES = {"int4": 0, "nf4": 1, "int8": 2}
TILE_ROWS = tl.constexpr(TILE)
LINE = tl.constexpr(32)
"""Words of a cache line."""

PROCESSORS = 132
"""Multiprocessors of an H100, which splits are chosen for."""
DENSE_ROWS = 1024
"""Rows from which the matrix is dequantized for cuBLAS instead. Not measured yet."""
FEW_ROWS = 64
"""Most rows of the split product; its tiles have 32 at most, since accumulators are scaled where they lie."""


@dataclass(frozen=True)
class Tiling:
    """How a product is cut: rows and outputs of a tile, ranges of K; warps of its program, and how many blocks of it
    are on their way or in use at once."""

    rows: int
    outputs: int
    splits: int
    warps: int = 4
    stages: int = 3


TILES = {8: (64, 4, 3, 4), 16: (64, 4, 3, 3), 32: (128, 8, 4, 1)}
"""Of the split product, by rows of a tile: outputs, warps, stages, and how many programs a processor takes at once, as
their registers let it. While a program works on a block it has one or, with four stages, two more on their way, and
memory wants 20 KB on their way to each processor."""
WORD_BYTES = 32 * 4
"""What such a product reads of a block of inputs for an output: 32 words."""
SUM_BYTES = 8
"""What each range of K costs for an output: its sum is written and read."""
ROUND_BYTES = 1_500_000
"""What memory gives while whoever reads the sums waits for those of `SUMS_TOGETHER` ranges."""
SUMS_TOGETHER = 3
"""Sums of splits, behind the first, that are on their way at once."""


def tiling(rows: int, outputs: int, blocks: int) -> Tiling:
    """The tiling of a product with `rows` rows, K cut into at most 16 ranges.

    Each warp has 16 outputs, so that the scales lie as the sums do. With more they would go through shared memory one
    group after the other, each waited for by all warps. Of 32 rows a tile has more of them, since its inputs are read
    again by each program.

    Programs come in waves, each waits for its first block, and each range has sums of its own: the least bytes that
    could pass while all places read, and then the sums. The last wave has memory for fewer, and is through as much
    sooner, down to two programs a processor: a block takes those as long as one alone.
    """
    if rows > FEW_ROWS:
        return Tiling(128 if rows > 128 else 64, 128, 1, warps=8 if rows > 128 else 4)
    tile = next((most for most in TILES if rows <= most), max(TILES))
    each, warps, stages, taken = TILES[tile]
    programs, places = -(-outputs // each) * -(-rows // tile), PROCESSORS * taken
    shortest = min(1.0, 2 / taken)

    def cost(splits: int) -> float:
        full, rest = divmod(programs * splits, places)
        last = max(rest / places, shortest) if rest else 0.0
        waves = max(1.0, full + last) * (-(-blocks // splits) + 1)
        sums = splits * rows * outputs * SUM_BYTES + -(-(splits - 1) // SUMS_TOGETHER) * ROUND_BYTES
        return waves * places * each * WORD_BYTES + sums

    return Tiling(tile, each, min(range(1, min(16, blocks) + 1), key=cost), warps, stages)


@triton.jit
def spread(step, base, g, n, N):
    """The step and base of the codes of group g for outputs n, float32."""
    tile = (g // TILE_ROWS) * ((N + TILE_ROWS - 1) // TILE_ROWS) + n // TILE_ROWS
    return tl.load(step + tile, mask=n < N, other=0.0), tl.load(base + tile, mask=n < N, other=0.0)


@triton.jit
def decoded(quads, g, step, base):
    """The scale or zero of group g whose code is in `quads`: rounded as it is stored.

    A code becomes a float32 as the last bits of one whose last bit is worth 1: there are fewer units for conversions.
    """
    code = ((quads >> (8 * (g % 4))) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return (code * step + base).to(tl.float16).to(tl.float32)


@triton.jit
def quads_of(block, stop, codes, step, base, n, N, groups: tl.constexpr):
    """The codes of a block's groups, four of a quad, with their step and base; of the block before `stop` at most."""
    block = tl.minimum(block, stop - 1)
    its_step, its_base = spread(step, base, block * groups, n, N)
    return tl.load(codes + block * groups // 4 * N + n, mask=n < N, other=0), its_step, its_base


@triton.jit
def part_values(words, levels, part, SCHEME: tl.constexpr, dtype: tl.constexpr):
    """What a part of words [..., n] stands for, in `dtype` [..., 2 n]; int4 codes come with the offset of `offset_of`
    added, and levels of nf4 as `levels` has them.

    A 16-bit float whose exponent makes the last bit of its mantissa worth 1 takes a code by a bitwise or, and two are
    made at once, where they lie. They are put side by side as integers: floats that were looked up are laid out wrongly
    for the matrix units of capability 10.0 by Triton 3.6.
    """
    if SCHEME == INT8:
        low = ((words << (24 - 8 * part)) >> 24).to(tl.float32).to(dtype)
        high = ((words << (8 - 8 * part)) >> 24).to(tl.float32).to(dtype)
        return paired(low, high)
    elif SCHEME == FOUR_BIT_FLOAT:
        low = tl.load(levels + ((words >> (4 * part)) & 15))
        high = tl.load(levels + ((words >> (16 + 4 * part)) & 15))
        if dtype == tl.float32:
            return paired(low, high)
        else:
            return paired(low.to(tl.int16, bitcast=True), high.to(tl.int16, bitcast=True)).to(dtype, bitcast=True)
    elif dtype == tl.float32:
        low = ((words >> (4 * part)) & 15).to(dtype)
        high = ((words >> (16 + 4 * part)) & 15).to(dtype)
        return paired(low, high)
    else:
        both = (words >> (4 * part)) & 0x000F000F | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)
        return paired(both.to(tl.int16), (both >> 16).to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def paired(low, high):
    """Two of [..., n] in turn, [..., 2 n]."""
    return tl.reshape(tl.join(low, high), low.shape[:-1] + [2 * low.shape[-1]])


def offset_of(dtype: torch.dtype) -> int:
    """What `part_values` adds to the codes of int4 in that dtype."""
    return {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0)


@triton.jit(do_not_specialize=["M", "splits"])
def product_kernel(
    x, group_sums, words, levels, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base,
    out, M, N, K, blocks, splits,
    BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SCHEME: tl.constexpr, DOUBLE: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out float32 [splits, M, N] = x [M, K] times the transposed matrix, over one range of K each.

    group_sums float32 [M, K / GROUP] are x's own sums, which meet the zeros of int4. The matrix units have the outputs
    as rows: they take these many at a time, and x's as few as there are.
    """
    split = tl.program_id(2)
    n0 = tl.program_id(1) * BN
    # What the first block reads of the matrix is on its way while the kernel before makes x.
    line = tl.minimum(tl.arange(0, BN * RUN // 2 // LINE) * LINE, (N - n0) * RUN // 2 - 1)
    ask_for(words + (split * blocks // splits * N + n0) * (RUN // 2) + line)
    begin()
    dtype: tl.constexpr = x.dtype.element_ty
    groups: tl.constexpr = PARTS * RUN // GROUP  # of a block; their codes are in one quad
    n = n0 + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i, pair = tl.arange(0, RUN), tl.arange(0, RUN // 2)
    there, here = n < N, m < M
    total = tl.zeros((BN, BM), tl.float32)
    start, stop = split * blocks // splits, (split + 1) * blocks // splits
    if DOUBLE:  # a block ahead, as nothing else keeps these loads from being waited for where they are
        s_quad, s_step, s_base = quads_of(start, stop, scale_codes, scale_step, scale_base, n, N, groups)
        if SCHEME == INT4:
            z_quad, z_step, z_base = quads_of(start, stop, zero_codes, zero_step, zero_base, n, N, groups)
    for block in range(start, stop):
        if DOUBLE:
            next_s, next_s_step, next_s_base = quads_of(
                block + 1, stop, scale_codes, scale_step, scale_base, n, N, groups
            )
            if SCHEME == INT4:
                next_z, next_z_step, next_z_base = quads_of(
                    block + 1, stop, zero_codes, zero_step, zero_base, n, N, groups
                )
        tile = tl.load(
            words + (block * N + n)[:, None] * (RUN // 2) + pair[None, :],
            mask=there[:, None],
            other=0,
            eviction_policy="evict_first",
        )
        sums = tl.zeros((BN, BM), tl.float32)
        for part in tl.static_range(PARTS):
            k = (block * PARTS + part) * RUN
            inside = here[None, :] & ((i < RUN) if WHOLE else (k + i < K))[:, None]
            rows = tl.load(x + m[None, :] * K + (k + i)[:, None], mask=inside, other=0.0)
            sums = tl.dot(part_values(tile, levels, part, SCHEME, dtype), rows, sums)
            if (part + 1) * RUN % GROUP == 0:
                # Groups that only pad the inputs have products of zeros, whatever scale they read.
                g = block * groups + part * RUN // GROUP
                of_quad = g if groups < 4 else part * RUN // GROUP
                if not WHOLE:
                    g = tl.minimum(g, K // GROUP - 1)
                if DOUBLE:
                    s = decoded(s_quad, of_quad, s_step, s_base)
                else:
                    s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)
                total = tl.fma(sums, tl.broadcast_to(s[:, None], (BN, BM)), total)
                if SCHEME == INT4:
                    if DOUBLE:
                        z = decoded(z_quad, of_quad, z_step, z_base)
                    else:
                        z = tl.load(zero + g * N + n, mask=there, other=0.0).to(tl.float32)
                    mine = here if WHOLE else here & (k + 0 * m < K)
                    inputs = tl.load(group_sums + m * (K // GROUP) + g, mask=mine, other=0.0)
                    z = tl.broadcast_to(tl.fma(s, -1.0 * OFFSET, z)[:, None], (BN, BM))
                    total = tl.fma(tl.broadcast_to(inputs[None, :], (BN, BM)), z, total)
                sums = tl.zeros((BN, BM), tl.float32)
        if DOUBLE:
            s_quad, s_step, s_base = next_s, next_s_step, next_s_base
            if SCHEME == INT4:
                z_quad, z_step, z_base = next_z, next_z_step, next_z_base
    tl.store(out + (split * M + m)[None, :] * N + n[:, None], total, mask=here[None, :] & there[:, None])


@triton.jit
def group_values(
    g, n, N, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base,
    SCHEME: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """Scale and zero of group g for outputs n, float32. Without a zero the scale stands for it."""
    there = n < N
    if DOUBLE:
        step, base = spread(scale_step, scale_base, g, n, N)
        s = decoded(tl.load(scale_codes + g // 4 * N + n, mask=there, other=0), g, step, base)
    else:
        s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)
    z = s
    if SCHEME == INT4:
        if DOUBLE:
            step, base = spread(zero_step, zero_base, g, n, N)
            z = decoded(tl.load(zero_codes + g // 4 * N + n, mask=there, other=0), g, step, base)
        else:
            z = tl.load(zero + g * N + n, mask=there, other=0.0).to(tl.float32)
    return s, z


@triton.jit(do_not_specialize=["M"])
def tiled_kernel(
    x, words, levels, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base,
    out, M, N, K, blocks,
    BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SCHEME: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """out float32 [M, N] = x [M, K] times the transposed matrix, for many rows: weights are rounded to x's dtype, those
    of nf4 once more than by `dequantized`, as their levels are in it before they are scaled."""
    begin()
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i, pair = tl.arange(0, RUN), tl.arange(0, RUN // 2)
    here, there = m < M, n < N
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(0, blocks):
        place = (block * N + n)[:, None] * (RUN // 2) + pair[None, :]
        tile = tl.load(words + place, mask=there[:, None], other=0)
        for part in range(PARTS):  # not unrolled: each would have its own stages
            k = (block * PARTS + part) * RUN
            g = tl.minimum(k // GROUP, K // GROUP - 1)
            s, z = group_values(
                g, n, N, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base,
                SCHEME, DOUBLE,
            )  # fmt: skip
            values = part_values(tile, levels, part, SCHEME, tl.float32) * s[:, None]
            if SCHEME == INT4:
                values += z[:, None]
            inside = here[:, None] & ((k + i) < K)[None, :]
            rows = tl.load(x + m[:, None] * K + (k + i)[None, :], mask=inside, other=0.0)
            total = tl.dot(rows, tl.trans(values.to(dtype)), total)
    tl.store(out + m[:, None] * N + n[None, :], total, mask=here[:, None] & there[None, :])


@triton.jit
def dequantize_kernel(
    words, levels, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base, out,
    rows, N, K,
    BN: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SCHEME: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """out [rows, K] = outputs of a matrix of N in out's dtype, a block of the inputs a program; the tensors begin at
    the first of them. For products with very many rows, and for training."""
    begin()
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    n = tl.minimum(row, rows - 1)
    block = tl.program_id(1)
    i, pair = tl.arange(0, RUN), tl.arange(0, RUN // 2)
    tile = tl.load(words + (block * N + n)[:, None] * (RUN // 2) + pair[None, :])
    for part in tl.static_range(PARTS):
        k = (block * PARTS + part) * RUN
        g = tl.minimum(k // GROUP, K // GROUP - 1)
        s, z = group_values(
            g, n, N, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base, SCHEME, DOUBLE
        )
        values = part_values(tile, levels, part, SCHEME, tl.float32) * s[:, None]
        if SCHEME == INT4:
            values += z[:, None]
        place = out + row[:, None].to(tl.int64) * K + (k + i)[None, :]
        tl.store(place, values.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (k + i < K)[None, :])


@triton.jit
def group_sums_kernel(x, out, K, GROUP: tl.constexpr, BG: tl.constexpr):
    """out float32 [M, K / GROUP] = the sums of x's groups."""
    begin()
    row = tl.program_id(0).to(tl.int64)  # times K past 2^31 in a long step
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    place = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + row * K + place, mask=place < K, other=0.0).to(tl.float32)
    tl.store(out + row * (K // GROUP) + g, tl.sum(values, 1), mask=g < K // GROUP)


class Matrix:
    """A packed matrix on a device, ready to be multiplied with: its tensors and the constants of the kernels."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.rows, self.width = weight.shape
        self.group = weight.group
        self.dense = weight.scheme == "none"
        """Whether it is not quantized: then it is kept in `dtype`, and cuBLAS multiplies."""
        self.dense_values = weight.tensors["values"].to(dtype) if self.dense else torch.empty(0)
        self.wants_sums = weight.scheme == "int4"
        """Whether products need the sums of the rows' groups."""
        self.blocks = 1
        self.nbytes = self.dense_values.nbytes if self.dense else weight.nbytes
        if self.dense:
            return
        self._weight = weight
        self.blocks = weight.tensors["words"].shape[0]
        self.arguments = arguments(weight, dtype)
        self.constants = constants(weight)
        self._whole = self.width == self.blocks * self.constants["PARTS"] * self.constants["RUN"]

    def tiling(self, rows: int) -> Tiling:
        """How a product with that many rows is cut."""
        return Tiling(16, 128, 1) if self.dense else tiling(rows, self.rows, self.blocks)

    def multiply(self, x: torch.Tensor, sums: torch.Tensor, out: torch.Tensor, how: Tiling) -> None:
        """x [M, in], contiguous, times the transposed matrix, into float32 out [splits, M, rows].

        `sums` float32 [M, in / group] are those of x's groups, read if `wants_sums` and M is at most FEW_ROWS.
        """
        m = x.shape[0]
        if self.dense or m >= DENSE_ROWS:
            _multiply_dense(x, self.dense_values if self.dense else dequantized(self._weight, x.dtype), out[0])
            return
        grid = (-(-m // how.rows), -(-self.rows // how.outputs), how.splits)
        sizes = (m, self.rows, self.width, self.blocks)
        launch = {"num_warps": how.warps, "num_stages": how.stages, **options()}
        if m > FEW_ROWS:
            tiled_kernel[grid](x, *self.arguments, out, *sizes, BM=how.rows, BN=how.outputs, **self.constants, **launch)
            return
        product_kernel[grid](
            x, sums, *self.arguments, out, *sizes, how.splits,
            BM=how.rows, BN=how.outputs, OFFSET=offset_of(x.dtype), WHOLE=self._whole, **self.constants, **launch,
        )  # fmt: skip


def _multiply_dense(x: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """x times the transposed values into float32 out. Where the library can leave its sums so, of 16 bits on a GPU, it
    puts them there itself: a result of its own would be a gigabyte in a long step, which nothing accounts for."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, values.t(), out_dtype=torch.float32, out=out)
    else:
        out.copy_(x @ values.t())


def arguments(weight: Weight, dtype: torch.dtype) -> list[torch.Tensor]:
    """A quantized matrix as the kernels take it. What a scheme lacks is never read: the words stand for it."""
    words = weight.tensors["words"]
    names = [f"{name}{suffix}" for name in ("scale", "zero") for suffix in ("", "_codes", "_step", "_base")]
    return [words, nf4(words.device, dtype), *(weight.tensors.get(name, words) for name in names)]


def constants(weight: Weight) -> dict[str, Any]:
    """What the kernels are compiled for."""
    return {
        "RUN": 2 * weight.tensors["words"].shape[2],
        "PARTS": parts_of(weight.scheme),
        "GROUP": weight.group,
        "SCHEME": SCHEMES[weight.scheme],
        "DOUBLE": weight.double_quantized,
    }


@lru_cache
def nf4(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The levels of nf4 on a device, rounded to `dtype`."""
    return NF4.to(device, dtype)


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A quantized matrix [rows, in] in a floating dtype, on its device: a whole one, or a `packing.part`."""
    rows, width = weight.shape
    words = weight.tensors["words"]
    blocks, _, pairs = words.shape
    out = torch.empty(rows, width, dtype=dtype, device=words.device)
    dequantize_kernel[(-(-rows // 32), blocks)](
        *arguments(weight, torch.float32), out, rows, words.stride(0) // pairs, width, BN=32, **constants(weight),
        **options(),
    )  # fmt: skip
    return out


def group_sums(x: torch.Tensor, group: int, out: torch.Tensor) -> None:
    """The sums of each group of the rows of x [M, K], into float32 out [M, K / group]."""
    rows, width = x.shape
    group_sums_kernel[(rows, -(-width // (16 * group)))](x, out, width, GROUP=group, BG=16, **options())
