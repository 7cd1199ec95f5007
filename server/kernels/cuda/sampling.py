"""Sampling on the device: greedy, or temperature, top_k, top_p and min_p, without a copy of the logits to the host.

A program samples one row with one given noise value, so samples do not depend on the batch. Filters apply in the order
of the engine's sampler. Among equal logits at a limit all are kept, while the engine's sampler keeps the lower ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import options, wait_for_previous_kernel

PIECE = 4096
"""Logits that a program reads at a time."""
DRAW_WARPS = 16
"""Warps of the sampling kernel, which may read all logits 16 times."""
LOWEST = tl.constexpr(-2147483647)
NONE = tl.constexpr(2147483647)


@triton.jit
def argmax_kernel(logits, best, token, V, BV: tl.constexpr):
    """best, token [L, chunks]: maximum of each chunk of a row's logits, and its first id (-1 if one is not finite)."""
    wait_for_previous_kernel()
    row, piece = tl.program_id(0), tl.program_id(1)
    v = piece * BV + tl.arange(0, BV)
    values = tl.load(logits + row.to(tl.int64) * V + v, mask=v < V, other=float("-inf"))
    top = tl.max(values, 0)
    first = tl.min(tl.where(values == top, v, NONE), 0)
    odd = tl.sum(((v < V) & ((tl.abs(values) == float("inf")) | (values != values))).to(tl.int32), 0)
    place = row * tl.num_programs(1) + piece
    tl.store(best + place, top)
    tl.store(token + place, tl.where(odd > 0, -1, first))


@triton.jit
def ordered(values):
    """float32 as int32 with the same order."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def probabilities(values, top, temperature):
    """Probabilities relative to the largest."""
    return tl.exp((values - top) / temperature)


@triton.jit
def mass_above(logits, V, key, top, temperature, BV: tl.constexpr):
    """Sum of the probabilities of a row's logits whose key is at least `key`."""
    sums = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        values = tl.load(logits + v, mask=v < V, other=float("-inf"))
        kept = (v < V) & (ordered(values) >= key)
        sums += tl.where(kept, probabilities(values, top, temperature), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def highest_key(logits, V, goal, floor, top, temperature, COUNT: tl.constexpr, BV: tl.constexpr):
    """The highest key such that the mass at or above it is at least `goal` (with COUNT: the number of logits); at least
    `floor`.

    Each pass over the logits tries three keys, because it is bound by memory.
    """
    low = floor.to(tl.int64)
    high = ordered(top).to(tl.int64)
    while low < high:
        span = high - low
        first, second, third = low + (span + 3) // 4, low + (2 * span + 3) // 4, low + (3 * span + 3) // 4
        above_first = tl.zeros((BV,), tl.float32)
        above_second = tl.zeros((BV,), tl.float32)
        above_third = tl.zeros((BV,), tl.float32)
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            values = tl.load(logits + v, mask=v < V, other=float("-inf"))
            key, weight = ordered(values), (v < V).to(tl.float32)
            if not COUNT:
                weight = tl.where(v < V, probabilities(values, top, temperature), 0.0)
            above_first += tl.where(key >= first.to(tl.int32), weight, 0.0)
            above_second += tl.where(key >= second.to(tl.int32), weight, 0.0)
            above_third += tl.where(key >= third.to(tl.int32), weight, 0.0)
        if tl.sum(above_third, 0) >= goal:
            low = third
        elif tl.sum(above_second, 0) >= goal:
            low, high = second, third - 1
        elif tl.sum(above_first, 0) >= goal:
            low, high = first, second - 1
        else:
            high = first - 1
    return low.to(tl.int32)


@triton.jit
def sample_kernel(logits, best, chunk_token, params, top_k, out, V, chunks, BP: tl.constexpr, BV: tl.constexpr):
    """out int32 [L]: the token of a row, -1 if a logit is not finite. how [L, 4]: temperature, top_p, min_p, noise."""
    wait_for_previous_kernel()
    row = tl.program_id(0)
    p = tl.arange(0, BP)
    tops = tl.load(best + row * chunks + p, mask=p < chunks, other=float("-inf"))
    tokens = tl.load(chunk_token + row * chunks + p, mask=p < chunks, other=NONE)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, tokens, NONE), 0)
    fine = tl.min(tokens, 0) >= 0
    temperature = tl.load(params + row * 4)
    if fine and temperature > 0.0:
        mine = logits + row.to(tl.int64) * V
        top_p, min_p = tl.load(params + row * 4 + 1), tl.load(params + row * 4 + 2)
        k = tl.load(top_k + row)
        key = tl.full((), LOWEST, tl.int32)
        if k > 0 and k < V:
            key = highest_key(mine, V, k.to(tl.float32), key, top, temperature, True, BV)
        if top_p < 1.0:
            goal = top_p * mass_above(mine, V, key, top, temperature, BV)
            key = highest_key(mine, V, goal, key, top, temperature, False, BV)
        if min_p > 0.0:
            key = tl.maximum(key, ordered(top + temperature * tl.log(min_p)))
        goal = tl.load(params + row * 4 + 3) * mass_above(mine, V, key, top, temperature, BV)
        before = 0.0
        found = tl.full((), NONE, tl.int32)
        last = token
        for start in range(0, V, BV):
            v = start + tl.arange(0, BV)
            values = tl.load(mine + v, mask=v < V, other=float("-inf"))
            kept = (v < V) & (ordered(values) >= key)
            weight = tl.where(kept, probabilities(values, top, temperature), 0.0)
            passed = kept & (weight > 0.0) & (before + tl.cumsum(weight, 0) > goal)
            found = tl.minimum(found, tl.min(tl.where(passed, v, NONE), 0))
            last = tl.maximum(last, tl.max(tl.where(kept & (weight > 0.0), v, 0), 0))
            before += tl.sum(weight, 0)
        token = tl.where(found == NONE, last, found)
    tl.store(out + row, tl.where(fine, token, -1))


@triton.jit(do_not_specialize=["T"])
def resolve_kernel(tokens, sampled, T, BT: tl.constexpr):
    """Replace each token -1 - r in tokens [T] by the sample of row r."""
    wait_for_previous_kernel()
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    token = tl.load(tokens + t, mask=t < T, other=0)
    tl.store(tokens + t, tl.load(sampled - 1 - token, mask=token < 0, other=0), mask=token < 0)


def sample(logits: torch.Tensor, params: torch.Tensor, top_k: torch.Tensor, out: torch.Tensor) -> None:
    """Sample a token per row of float32 logits [L, vocab] into int32 out [L], -1 if a logit is not finite.

    how float32 [L, 4] has temperature (0 is greedy), top_p, min_p and noise in [0, 1); top_k int32 [L], 0 for no limit.
    """
    rows, vocab = logits.shape
    chunks = -(-vocab // PIECE)
    best = torch.empty(rows, chunks, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, chunks, dtype=torch.int32, device=logits.device)
    argmax_kernel[(rows, chunks)](logits, best, token, vocab, BV=PIECE, **options())
    sample_kernel[(rows,)](
        logits, best, token, params, top_k, out, vocab, chunks, BP=triton.next_power_of_2(chunks), BV=PIECE,
        num_warps=DRAW_WARPS, **options(),
    )  # fmt: skip


def resolve_placeholders(tokens: torch.Tensor, sampled: torch.Tensor) -> None:
    """Replace tokens -1 - r in tokens int32 [T] by the sample of row r in sampled int32 [L], in place."""
    resolve_kernel[(-(-tokens.shape[0] // 256),)](tokens, sampled, tokens.shape[0], BT=256, num_warps=1, **options())
