"""Products with quantized matrices in the layout of `packing`, from a single row to a prefill.

Codes enter the tensor cores as integers, which 16-bit floats hold exactly; scales and zeros are applied to the float32
sums. Only activations are rounded. nf4 levels are rounded to the dtype of the activations. K is divided into `splits`,
whose sums are written separately and added by the epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import options, prefetch_l2, wait_for_previous_kernel
from server.kernels.cuda.packing import parts_of
from server.kernels.packed_format import NF4, TILE
from server.kernels.weight import Weight

INT4, FOUR_BIT_FLOAT, INT8 = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SCHEMES = {"int4": 0, "nf4": 1, "int8": 2}
TILE_ROWS = tl.constexpr(TILE)
LINE = tl.constexpr(32)
"""32-bit words per cache line."""

PROCESSORS = 132
"""Multiprocessors of an H100, for which splits are chosen."""
DENSE_ROWS = 1024
"""Rows from which the matrix is dequantized for cuBLAS instead. Not tuned yet."""
FEW_ROWS = 64
"""Most rows of the split-K kernel. Its tiles have at most 32 rows, because accumulators are scaled in registers."""


@dataclass(frozen=True)
class Tiling:
    """How a product is divided: rows and outputs per tile, splits of K, warps per program, pipeline stages."""

    rows: int
    outputs: int
    splits: int
    warps: int = 4
    stages: int = 3


TILES = {8: (64, 4, 3, 4), 16: (64, 4, 3, 3), 32: (128, 8, 4, 1)}
"""Split-K kernel, by rows per tile: outputs, warps, stages, programs per multiprocessor (limited by registers)."""
WORD_BYTES = 32 * 4
"""Bytes that a product reads per block of inputs and output."""
SUM_BYTES = 8
"""Bytes per output of writing and reading the sum of a split."""
ROUND_BYTES = 1_500_000
"""Cost in bytes of the latency of loading `SUMS_TOGETHER` sums."""
SUMS_TOGETHER = 3
"""Sums of splits, beyond the first, that are loaded at a time."""


def tiling(rows: int, outputs: int, blocks: int) -> Tiling:
    """The tiling of a product with at most 16 splits of K.

    Each warp has 16 outputs, so that scales have the register layout of the accumulators. Tiles of 32 rows have more
    outputs, since each program reads the inputs again.

    The number of splits minimizes the memory traffic: programs run in waves, each waits for its first block, and each
    split adds sums. A partial last wave is faster, down to two programs per multiprocessor.
    """
    if rows > FEW_ROWS:
        return Tiling(128 if rows > 128 else 64, 128, 1, warps=8 if rows > 128 else 4)
    tile = next((most for most in TILES if rows <= most), max(TILES))
    each, warps, stages, taken = TILES[tile]
    programs, adapter_count = -(-outputs // each) * -(-rows // tile), PROCESSORS * taken
    shortest = min(1.0, 2 / taken)

    def cost(splits: int) -> float:
        full, rest = divmod(programs * splits, adapter_count)
        last = max(rest / adapter_count, shortest) if rest else 0.0
        waves = max(1.0, full + last) * (-(-blocks // splits) + 1)
        sums = splits * rows * outputs * SUM_BYTES + -(-(splits - 1) // SUMS_TOGETHER) * ROUND_BYTES
        return waves * adapter_count * each * WORD_BYTES + sums

    return Tiling(tile, each, min(range(1, min(16, blocks) + 1), key=cost), warps, stages)


@triton.jit
def scale_step_base(step, base, g, n, N):
    """Step and base of the scale codes of group g for outputs n, float32."""
    tile = (g // TILE_ROWS) * ((N + TILE_ROWS - 1) // TILE_ROWS) + n // TILE_ROWS
    return tl.load(step + tile, mask=n < N, other=0.0), tl.load(base + tile, mask=n < N, other=0.0)


@triton.jit
def decode_scale(quads, g, step, base):
    """Decode the scale or zero of group g from `quads`, rounded as in the stored form.

    The code becomes the mantissa of a float32 with exponent 23, because conversion instructions are slower.
    """
    code = ((quads >> (8 * (g % 4))) & 255 | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
    return (code * step + base).to(tl.float16).to(tl.float32)


@triton.jit
def load_quads(block, stop, codes, step, base, n, N, groups: tl.constexpr):
    """Scale codes of a block's groups (four per word) with step and base; clamped to the block before `stop`."""
    block = tl.minimum(block, stop - 1)
    its_step, its_base = scale_step_base(step, base, block * groups, n, N)
    return tl.load(codes + block * groups // 4 * N + n, mask=n < N, other=0), its_step, its_base


@triton.jit
def part_values(words, levels, part, SCHEME: tl.constexpr, dtype: tl.constexpr):
    """Decode a part of words [..., n] to `dtype` [..., 2 n].

    int4 codes have `offset_of` added: a bitwise or puts a code into the mantissa of a 16-bit float, two at a time. nf4
    values come from `levels`, joined as integers, because Triton 3.6 lays out joined floats wrongly on capability 10.0.
    """
    if SCHEME == INT8:
        low = ((words << (24 - 8 * part)) >> 24).to(tl.float32).to(dtype)
        high = ((words << (8 - 8 * part)) >> 24).to(tl.float32).to(dtype)
        return interleave(low, high)
    elif SCHEME == FOUR_BIT_FLOAT:
        low = tl.load(levels + ((words >> (4 * part)) & 15))
        high = tl.load(levels + ((words >> (16 + 4 * part)) & 15))
        if dtype == tl.float32:
            return interleave(low, high)
        else:
            return interleave(low.to(tl.int16, bitcast=True), high.to(tl.int16, bitcast=True)).to(dtype, bitcast=True)
    elif dtype == tl.float32:
        low = ((words >> (4 * part)) & 15).to(dtype)
        high = ((words >> (16 + 4 * part)) & 15).to(dtype)
        return interleave(low, high)
    else:
        both = (words >> (4 * part)) & 0x000F000F | (0x43004300 if dtype == tl.bfloat16 else 0x64006400)
        return interleave(both.to(tl.int16), (both >> 16).to(tl.int16)).to(dtype, bitcast=True)


@triton.jit
def interleave(low, high):
    """Interleave two tensors [..., n] to [..., 2 n]."""
    return tl.reshape(tl.join(low, high), low.shape[:-1] + [2 * low.shape[-1]])


def offset_of(dtype: torch.dtype) -> int:
    """The offset that `part_values` adds to int4 codes in that dtype."""
    return {torch.bfloat16: 128, torch.float16: 1024}.get(dtype, 0)


@triton.jit(do_not_specialize=["M", "splits"])
def split_k_kernel(
    x, group_sums, words, levels, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base,
    out, M, N, K, blocks, splits,
    BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SCHEME: tl.constexpr, DOUBLE: tl.constexpr, OFFSET: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """out float32 [splits, M, N] = x [M, K] times the transposed matrix, one split of K per program.

    group_sums float32 [M, K / GROUP] are the sums of x's groups, multiplied by the zeros of int4. Outputs are the rows
    of the tensor core tiles.
    """
    split = tl.program_id(2)
    n0 = tl.program_id(1) * BN
    # Prefetch the first block while the previous kernel computes x.
    line = tl.minimum(tl.arange(0, BN * RUN // 2 // LINE) * LINE, (N - n0) * RUN // 2 - 1)
    prefetch_l2(words + (split * blocks // splits * N + n0) * (RUN // 2) + line)
    wait_for_previous_kernel()
    dtype: tl.constexpr = x.dtype.element_ty
    groups: tl.constexpr = PARTS * RUN // GROUP  # of a block; their codes share a word
    n = n0 + tl.arange(0, BN)
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    i, pair = tl.arange(0, RUN), tl.arange(0, RUN // 2)
    there, here = n < N, m < M
    total = tl.zeros((BN, BM), tl.float32)
    start, stop = split * blocks // splits, (split + 1) * blocks // splits
    if DOUBLE:  # loaded one block ahead, to hide the latency
        s_quad, s_step, s_base = load_quads(start, stop, scale_codes, scale_step, scale_base, n, N, groups)
        if SCHEME == INT4:
            z_quad, z_step, z_base = load_quads(start, stop, zero_codes, zero_step, zero_base, n, N, groups)
    for block in range(start, stop):
        if DOUBLE:
            next_s, next_s_step, next_s_base = load_quads(
                block + 1, stop, scale_codes, scale_step, scale_base, n, N, groups
            )
            if SCHEME == INT4:
                next_z, next_z_step, next_z_base = load_quads(
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
                # Groups of padding multiply zeros, whatever scale they read.
                g = block * groups + part * RUN // GROUP
                of_quad = g if groups < 4 else part * RUN // GROUP
                if not WHOLE:
                    g = tl.minimum(g, K // GROUP - 1)
                if DOUBLE:
                    s = decode_scale(s_quad, of_quad, s_step, s_base)
                else:
                    s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)
                total = tl.fma(sums, tl.broadcast_to(s[:, None], (BN, BM)), total)
                if SCHEME == INT4:
                    if DOUBLE:
                        z = decode_scale(z_quad, of_quad, z_step, z_base)
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
    """Scale and zero of group g for outputs n, float32. Without a zero it returns the scale twice."""
    there = n < N
    if DOUBLE:
        step, base = scale_step_base(scale_step, scale_base, g, n, N)
        s = decode_scale(tl.load(scale_codes + g // 4 * N + n, mask=there, other=0), g, step, base)
    else:
        s = tl.load(scale + g * N + n, mask=there, other=0.0).to(tl.float32)
    z = s
    if SCHEME == INT4:
        if DOUBLE:
            step, base = scale_step_base(zero_step, zero_base, g, n, N)
            z = decode_scale(tl.load(zero_codes + g // 4 * N + n, mask=there, other=0), g, step, base)
        else:
            z = tl.load(zero + g * N + n, mask=there, other=0.0).to(tl.float32)
    return s, z


@triton.jit(do_not_specialize=["M"])
def gemm_kernel(
    x, words, levels, scale, scale_codes, scale_step, scale_base, zero, zero_codes, zero_step, zero_base,
    out, M, N, K, blocks,
    BM: tl.constexpr, BN: tl.constexpr, RUN: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
    SCHEME: tl.constexpr, DOUBLE: tl.constexpr,
):  # fmt: skip
    """out float32 [M, N] = x [M, K] times the transposed matrix, for many rows.

    Weights are dequantized to the dtype of x; nf4 levels are rounded before scaling too.
    """
    wait_for_previous_kernel()
    dtype: tl.constexpr = x.dtype.element_ty
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    i, pair = tl.arange(0, RUN), tl.arange(0, RUN // 2)
    here, there = m < M, n < N
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(0, blocks):
        place = (block * N + n)[:, None] * (RUN // 2) + pair[None, :]
        tile = tl.load(words + place, mask=there[:, None], other=0)
        for part in range(PARTS):  # not unrolled, since each part would have its own pipeline stages
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
    """Dequantize a block of inputs of some outputs into out [rows, K]. The tensors start at the first output."""
    wait_for_previous_kernel()
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
    """out float32 [M, K / GROUP] = sums of x's groups."""
    wait_for_previous_kernel()
    row = tl.program_id(0).to(tl.int64)  # 64-bit, since offsets exceed 2^31 in long steps
    g = tl.program_id(1) * BG + tl.arange(0, BG)
    place = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    values = tl.load(x + row * K + place, mask=place < K, other=0.0).to(tl.float32)
    tl.store(out + row * (K // GROUP) + g, tl.sum(values, 1), mask=g < K // GROUP)


class Matrix:
    """A packed matrix on a device, with the arguments of the kernels."""

    def __init__(self, weight: Weight, dtype: torch.dtype) -> None:
        self.rows, self.width = weight.shape
        self.group = weight.group
        self.dense = weight.scheme == "none"
        """Whether the matrix is not quantized. It is kept in `dtype` and multiplied by cuBLAS."""
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
        """The tiling of a product with that many rows."""
        return Tiling(16, 128, 1) if self.dense else tiling(rows, self.rows, self.blocks)

    def multiply(self, x: torch.Tensor, sums: torch.Tensor, out: torch.Tensor, tiling: Tiling) -> None:
        """Multiply x [M, in], contiguous, with the transposed matrix into float32 out [splits, M, rows].

        `sums` float32 [M, in / group] are the sums of x's groups, read if `wants_sums` and M is at most FEW_ROWS.
        """
        m = x.shape[0]
        if self.dense or m >= DENSE_ROWS:
            _multiply_dense(x, self.dense_values if self.dense else dequantized(self._weight, x.dtype), out[0])
            return
        grid = (-(-m // tiling.rows), -(-self.rows // tiling.outputs), tiling.splits)
        sizes = (m, self.rows, self.width, self.blocks)
        launch = {"num_warps": tiling.warps, "num_stages": tiling.stages, **options()}
        if m > FEW_ROWS:
            gemm_kernel[grid](
                x, *self.arguments, out, *sizes, BM=tiling.rows, BN=tiling.outputs, **self.constants, **launch
            )
            return
        split_k_kernel[grid](
            x, sums, *self.arguments, out, *sizes, tiling.splits,
            BM=tiling.rows, BN=tiling.outputs, OFFSET=offset_of(x.dtype), WHOLE=self._whole, **self.constants, **launch,
        )  # fmt: skip


def _multiply_dense(x: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> None:
    """x times the transposed values into float32 out. On a GPU cuBLAS writes float32 directly, without a temporary
    result."""
    if x.is_cuda and x.dtype != torch.float32:
        torch.mm(x, values.t(), out_dtype=torch.float32, out=out)
    else:
        out.copy_(x @ values.t())


def arguments(weight: Weight, dtype: torch.dtype) -> list[torch.Tensor]:
    """The tensors of a quantized matrix as kernel arguments. `words` stands for missing ones, which are never read."""
    words = weight.tensors["words"]
    names = [f"{name}{suffix}" for name in ("scale", "zero") for suffix in ("", "_codes", "_step", "_base")]
    return [words, nf4(words.device, dtype), *(weight.tensors.get(name, words) for name in names)]


def constants(weight: Weight) -> dict[str, Any]:
    """Compile-time constants of the kernels."""
    return {
        "RUN": 2 * weight.tensors["words"].shape[2],
        "PARTS": parts_of(weight.scheme),
        "GROUP": weight.group,
        "SCHEME": SCHEMES[weight.scheme],
        "DOUBLE": weight.double_quantized,
    }


@lru_cache
def nf4(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The nf4 levels on a device, rounded to `dtype`."""
    return NF4.to(device, dtype)


def dequantized(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """Dequantize a matrix, or a slice of one, to [rows, in] on its device."""
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
    """Sums of the groups of the rows of x [M, K], into float32 out [M, K / group]."""
    rows, width = x.shape
    group_sums_kernel[(rows, -(-width // (16 * group)))](x, out, width, GROUP=group, BG=16, **options())
