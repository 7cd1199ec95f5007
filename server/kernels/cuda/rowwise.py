"""Kernels on single rows: embedding, RMSNorm, rotary positions with KV cache writes.

Row offsets are 64-bit, since they exceed 2^31 in long steps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import options, wait_for_previous_kernel
from server.kernels.cuda.matmul import INT8, Matrix, part_values


@triton.jit
def embed_kernel(
    ids, words, scale, out, N, K,
    RUN: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out float32 [T, K] = rows `ids` of an 8-bit table, one block of inputs per program. Ids below 0 give zeros."""
    wait_for_previous_kernel()
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.load(ids + row)
    n = tl.maximum(token, 0)
    i = tl.arange(0, RUN)
    word = tl.load(words + (block * N + n).to(tl.int64) * (RUN // 2) + tl.arange(0, RUN // 2))
    last_group = K // GROUP - 1
    for part in tl.static_range(PARTS):
        k = block * PARTS * RUN + part * RUN
        s = tl.load(scale + tl.minimum(k // GROUP, last_group) * N + n).to(tl.float32)
        values = part_values(word, word, part, INT8, tl.float32) * s
        tl.store(out + row * K + k + i, tl.where(token >= 0, values, 0.0), mask=k + i < K)


@triton.jit
def rms_norm_kernel(x, weight, out, sums, N, eps, BN: tl.constexpr, GROUP: tl.constexpr):
    """out [T, N] = x / sqrt(mean(x^2) + eps) * weight. Unless GROUP is 0, also the sums of out's groups."""
    wait_for_previous_kernel()
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BN)
    values = tl.load(x + row * N + n, mask=n < N, other=0.0)
    by = tl.load(weight + n, mask=n < N, other=0.0)  # loaded early, in parallel with the sum
    scaled = values * (1.0 / tl.sqrt(tl.sum(values * values, 0) / N + eps))
    scaled = (scaled * by).to(out.dtype.element_ty)
    tl.store(out + row * N + n, scaled, mask=n < N)
    if GROUP > 0:
        g = tl.arange(0, BN // GROUP)
        totals = tl.sum(tl.reshape(scaled.to(tl.float32), (BN // GROUP, GROUP)), 1)
        tl.store(sums + row * (N // GROUP) + g, totals, mask=g < N // GROUP)


@triton.jit(do_not_specialize=["layer", "table_width", "block_count"])
def rotate_kernel(
    qkv, q_norm, k_norm, cosine, sine, positions, sequence, blocks, cache,
    layer, table_width, block_count, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SIZE: tl.constexpr,
    NORM: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One head of a row: norm and rotate q in place, write k and v to the cache.

    The cache is [layers, blocks, kv_heads, 2, SIZE, D]. Rows with a position below 0 are padding.
    """
    wait_for_previous_kernel()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + row)
    if position >= 0:
        i = tl.arange(0, HALF)
        half = D // 2
        inside = i < half
        source = qkv + (row * (HEADS + 2 * KV_HEADS) + head) * D
        first = tl.load(source + i, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(source + half + i, mask=inside, other=0.0).to(tl.float32)
        turned = head < HEADS + KV_HEADS
        if NORM:
            if turned:
                power = (tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D
                factor = 1.0 / tl.sqrt(power + eps)
                of_q = inside & (head + 0 * i < HEADS)
                of_k = inside & (head + 0 * i >= HEADS)
                low = tl.load(q_norm + i, mask=of_q, other=0.0) + tl.load(k_norm + i, mask=of_k, other=0.0)
                high = tl.load(q_norm + half + i, mask=of_q, other=0.0)
                high += tl.load(k_norm + half + i, mask=of_k, other=0.0)
                first = first * factor * low
                second = second * factor * high
        if ROPE:
            if turned:
                c = tl.load(cosine + position * half + i, mask=inside, other=0.0)
                s = tl.load(sine + position * half + i, mask=inside, other=0.0)
                first, second = first * c - second * s, second * c + first * s
        dtype: tl.constexpr = cache.dtype.element_ty
        if head < HEADS:
            tl.store(source + i, first.to(dtype), mask=inside)
            tl.store(source + half + i, second.to(dtype), mask=inside)
        else:
            is_value = (head >= HEADS + KV_HEADS).to(tl.int32)
            kv_head = head - HEADS - is_value * KV_HEADS
            block = tl.load(blocks + tl.load(sequence + row) * table_width + position // SIZE).to(tl.int64)
            place = ((layer * block_count + block) * KV_HEADS + kv_head) * 2 + is_value
            target = cache + (place * SIZE + position % SIZE) * D
            tl.store(target + i, first.to(dtype), mask=inside)
            tl.store(target + half + i, second.to(dtype), mask=inside)


def embed(table: Matrix, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Rows `ids` (int32 [T], below 0 for padding) of a table into float32 out [T, in]."""
    if table.dense:
        out.copy_(table.dense_values[ids.clamp(min=0).long()])
        return
    words, _, scale = table.arguments[:3]
    names = ("RUN", "PARTS", "GROUP")
    embed_kernel[(ids.shape[0], table.blocks)](
        ids,
        words,
        scale,
        out,
        table.rows,
        table.width,
        **{name: table.constants[name] for name in names},
        **options(),
    )


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, sums: torch.Tensor, group: int
) -> None:
    """RMSNorm of x float32 [T, n] with weight float32 [n] into out [T, n].

    Unless `group` is 0, the sums of out's groups go into float32 sums [T, n / group].
    """
    n = x.shape[1]
    size = triton.next_power_of_2(n)
    warps = min(8, max(1, size // 512))
    rms_norm_kernel[(x.shape[0],)](x, weight, out, sums, n, eps, BN=size, GROUP=group, num_warps=warps, **options())


def rotate(
    qkv: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    positions: torch.Tensor,
    sequence: torch.Tensor,
    blocks: torch.Tensor,
    cache: torch.Tensor,
    layer: int,
    eps: float,
) -> None:
    """Norm and rotate the queries of qkv [T, (heads + 2 kv_heads) * d] in place; write keys and values to the cache.

    `norms` are the float32 weights [d] of q and k; `angles` are cos and sin, float32 [positions, d / 2]; each is None
    if the layer has none. positions and sequence are int32 [T], blocks int32 [S, B], cache [layers, blocks, kv_heads,
    2, size, d].
    """
    kv_heads, size, d = cache.shape[2], cache.shape[4], cache.shape[5]
    heads = qkv.shape[1] // d - 2 * kv_heads
    q_norm, k_norm = norms or (qkv, qkv)
    cosine, sine = angles or (qkv, qkv)
    rotate_kernel[(qkv.shape[0], heads + 2 * kv_heads)](
        qkv, q_norm, k_norm, cosine, sine, positions, sequence, blocks, cache,
        layer, blocks.shape[1], cache.shape[1], eps,
        HEADS=heads, KV_HEADS=kv_heads, D=d, HALF=triton.next_power_of_2(d // 2), SIZE=size,
        NORM=norms is not None, ROPE=angles is not None, num_warps=1, **options(),
    )  # fmt: skip
