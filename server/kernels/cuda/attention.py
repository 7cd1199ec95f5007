"""Attention over the paged KV cache: decode with split contexts, and prefill.

The split of a sequence depends on its context length alone, and parts are combined in a fixed order, so a row's result
does not depend on its batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import options, wait_for_previous_kernel

SPLITS = 16
"""Most programs per decoded row. Each takes whole tiles of the context."""
TILE = 64
"""Tokens per tile of the context."""
QUERIES = 64
"""Rows of a prefill per program."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["layer", "block_count", "table_width"])
def decode_kernel(
    q, cache, blocks, context, row_of, sequence_of, out, weight,
    layer, block_count, table_width, row_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BG: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, SIZE: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """One split of a decoded row's attention for the query heads of one KV head.

    Writes out [n, HEADS, SPLITS, D] and weight, the log2 of the sum of exponentials.
    """
    wait_for_previous_kernel()
    item, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(sequence_of + item)
    length = tl.load(context + sequence)
    tiles = tl.cdiv(length, BT)
    each = tl.cdiv(tiles, SPLITS)
    first = split * each
    last = tl.minimum(first + each, tiles)
    if first < last:
        g, d, t = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BT)
        head = kv_head * GROUP + g
        mine = (g[:, None] < GROUP) & (d[None, :] < D)
        row = tl.load(row_of + item).to(tl.int64)  # 64-bit, since offsets exceed 2^31 in long steps
        queries = tl.load(q + row * row_stride + head[:, None] * D + d[None, :], mask=mine, other=0.0)
        best = tl.full((BG,), float("-inf"), tl.float32)
        total = tl.zeros((BG,), tl.float32)
        acc = tl.zeros((BG, BD), tl.float32)
        for tile in range(first, last):
            token = tile * BT + t
            there = token < length
            block = tl.load(blocks + sequence * table_width + token // SIZE, mask=there, other=0).to(tl.int64)
            place = (((layer * block_count + block) * KV_HEADS + kv_head) * 2 * SIZE + token % SIZE) * D
            inside = there[:, None] & (d[None, :] < D)
            keys = tl.load(cache + place[:, None] + d[None, :], mask=inside, other=0.0)
            scores = tl.dot(queries, tl.trans(keys)) * (scale * LOG2E)
            scores = tl.where(there[None, :], scores, float("-inf"))
            higher = tl.maximum(best, tl.max(scores, 1))
            shift = tl.exp2(best - higher)
            powers = tl.exp2(scores - higher[:, None])
            values = tl.load(cache + (place + SIZE * D)[:, None] + d[None, :], mask=inside, other=0.0)
            acc = tl.dot(powers.to(values.dtype), values, acc * shift[:, None])
            total = total * shift + tl.sum(powers, 1)
            best = higher
        target = (item * HEADS + head) * SPLITS + split
        tl.store(out + target[:, None] * D + d[None, :], acc / total[:, None], mask=mine)
        tl.store(weight + target, best + tl.log2(total), mask=g < GROUP)


@triton.jit
def combine_kernel(
    parts, weight, context, row_of, sequence_of, out, sums,
    HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr, BT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Combine the splits of a row and head into out [T, HEADS * D]; zeros for a row without a context.

    Unless GROUP is 0, also write the sums of out's groups.
    """
    wait_for_previous_kernel()
    item, head = tl.program_id(0), tl.program_id(1)
    row, length = tl.load(row_of + item).to(tl.int64), tl.load(context + tl.load(sequence_of + item))
    tiles = tl.cdiv(length, BT)
    used = tl.cdiv(tiles, tl.maximum(tl.cdiv(tiles, SPLITS), 1))
    split, d = tl.arange(0, SPLITS), tl.arange(0, BD)
    source = (item * HEADS + head) * SPLITS + split
    powers = tl.load(weight + source, mask=split < used, other=float("-inf"))
    inside = (split[:, None] < used) & (d[None, :] < D)
    values = tl.load(parts + source[:, None] * D + d[None, :], mask=inside, other=0.0)
    share = tl.exp2(powers - tl.maximum(tl.max(powers, 0), -1e30))  # without a context all are -inf
    total = tl.sum(share, 0)
    joined = tl.sum(share[:, None] * values, 0) / tl.where(total == 0.0, 1.0, total)
    joined = joined.to(out.dtype.element_ty)
    tl.store(out + (row * HEADS + head) * D + d, joined, mask=d < D)
    if GROUP > 0:
        g = tl.arange(0, BD // GROUP)
        totals = tl.sum(tl.reshape(joined.to(tl.float32), (BD // GROUP, GROUP)), 1)
        tl.store(sums + (row * HEADS + head) * (D // GROUP) + g, totals, mask=g < D // GROUP)


@triton.jit(do_not_specialize=["layer", "block_count", "table_width"])
def prefill_kernel(
    q, cache, blocks, tiles, out, layer, block_count, table_width, row_stride, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    SIZE: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Causal attention of up to BM adjacent rows of one sequence, for one head.

    tiles [n, 4]: sequence, first row, rows, position of the first row.
    """
    wait_for_previous_kernel()
    item, head = tl.program_id(0), tl.program_id(1)
    sequence, row0 = tl.load(tiles + item * 4), tl.load(tiles + item * 4 + 1).to(tl.int64)
    rows, position0 = tl.load(tiles + item * 4 + 2), tl.load(tiles + item * 4 + 3)
    kv_head = head // (HEADS // KV_HEADS)
    i, d, t = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BT)
    mine = (i[:, None] < rows) & (d[None, :] < D)
    queries = tl.load(q + (row0 + i)[:, None] * row_stride + head * D + d[None, :], mask=mine, other=0.0)
    best = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BD), tl.float32)
    length = position0 + rows
    for start in range(0, length, BT):
        token = start + t
        there = token < length
        block = tl.load(blocks + sequence * table_width + token // SIZE, mask=there, other=0).to(tl.int64)
        place = (((layer * block_count + block) * KV_HEADS + kv_head) * 2 * SIZE + token % SIZE) * D
        inside = there[:, None] & (d[None, :] < D)
        keys = tl.load(cache + place[:, None] + d[None, :], mask=inside, other=0.0)
        scores = tl.dot(queries, tl.trans(keys)) * (scale * LOG2E)
        scores = tl.where(token[None, :] <= (position0 + i)[:, None], scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 1))
        shift = tl.exp2(best - higher)
        powers = tl.exp2(scores - higher[:, None])
        values = tl.load(cache + (place + SIZE * D)[:, None] + d[None, :], mask=inside, other=0.0)
        acc = tl.dot(powers.to(values.dtype), values, acc * shift[:, None])
        total = total * shift + tl.sum(powers, 1)
        best = higher
    target = out + ((row0 + i)[:, None] * HEADS + head) * D + d[None, :]
    tl.store(target, (acc / total[:, None]).to(out.dtype.element_ty), mask=mine)


def decode(
    qkv: torch.Tensor,
    cache: torch.Tensor,
    layer: int,
    blocks: torch.Tensor,
    context: torch.Tensor,
    row_of: torch.Tensor,
    sequence_of: torch.Tensor,
    scratch: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    sums: torch.Tensor,
    group: int,
) -> None:
    """Attention of n decoded rows.

    Args:
        qkv: [T, (heads + 2 kv_heads) * d] with rotated queries.
        cache: [layers, blocks, kv_heads, 2, size, d].
        layer: Layer of the cache.
        blocks: Block tables, int32 [S, B].
        context: Context lengths, int32 [S].
        row_of: Rows, int32 [n].
        sequence_of: Sequences of the rows, int32 [n].
        scratch: float32 [n, heads, SPLITS, d] and [n, heads, SPLITS].
        out: Receives [T, heads * d].
        sums: Receives the sums of out's groups, float32 [T, heads * d / group].
        group: Size of these groups, a divisor of d; 0 for no sums.
    """
    kv_heads, size, d = cache.shape[2], cache.shape[4], cache.shape[5]
    heads = out.shape[1] // d
    n = row_of.shape[0]
    parts, weight = scratch
    width = triton.next_power_of_2(max(16, d))
    queries = triton.next_power_of_2(max(16, heads // kv_heads))
    decode_kernel[(n, kv_heads, SPLITS)](
        qkv, cache, blocks, context, row_of, sequence_of, parts, weight,
        layer, cache.shape[1], blocks.shape[1], qkv.shape[1], d**-0.5,
        HEADS=heads, KV_HEADS=kv_heads, GROUP=heads // kv_heads, BG=queries,
        D=d, BD=width, SIZE=size, SPLITS=SPLITS, BT=TILE, **options(),
    )  # fmt: skip
    combine_kernel[(n, heads)](
        parts, weight, context, row_of, sequence_of, out, sums, HEADS=heads, D=d, BD=width, SPLITS=SPLITS, BT=TILE,
        GROUP=group, num_warps=1, **options(),
    )  # fmt: skip


def prefill(
    qkv: torch.Tensor, cache: torch.Tensor, layer: int, blocks: torch.Tensor, tiles: torch.Tensor, out: torch.Tensor
) -> None:
    """Causal attention of the rows of `tiles` over the cache, which already contains their keys and values.

    `tiles` is int32 [n, 4]: sequence, first row, rows up to QUERIES, position of the first row. `out` is [T, heads *
    d].
    """
    kv_heads, size, d = cache.shape[2], cache.shape[4], cache.shape[5]
    heads, width = out.shape[1] // d, triton.next_power_of_2(max(16, d))
    tile = TILE if width < 256 else TILE // 2  # larger tiles exceed the shared memory of small GPUs
    prefill_kernel[(tiles.shape[0], heads)](
        qkv, cache, blocks, tiles, out, layer, cache.shape[1], blocks.shape[1], qkv.shape[1], d**-0.5,
        HEADS=heads, KV_HEADS=kv_heads, D=d, BD=width, SIZE=size, BM=QUERIES, BT=tile, **options(),
    )  # fmt: skip
