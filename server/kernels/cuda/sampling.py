"""From logits on the device to tokens on the device: the largest, or a draw with temperature, top_k, top_p and min_p;
and from the tokens of one step to the next, without the host.

A row is a program's alone and its noise is the one number it is given, so what is drawn does not depend on the batch.
The order is the engine's sampler's: temperature -> top_k -> top_p -> min_p -> one uniform number against the sums over
ids, ascending. Of equals at the limit of top_k or top_p all stay, where the engine's sampler keeps the lower ids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from server.kernels.cuda.launch import begin, options

PIECE = 4096
"""Logits that a program reads at a time."""
DRAW_WARPS = 16
"""A row is one program's, which for top_k or top_p goes over all logits up to 16 times: the more warps, the more of
them are on their way at once."""
LOWEST = tl.constexpr(-2147483647)
NONE = tl.constexpr(2147483647)


@triton.jit
def best_kernel(logits, best, token, V, BV: tl.constexpr):
    """best and token [L, pieces]: the largest logit of a row's pieces and its first id, -1 if one is not finite."""
    begin()
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
    """float32 as int32 of the same order."""
    bits = values.to(tl.int32, bitcast=True)
    return tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)


@triton.jit
def probabilities(values, top, temperature):
    """Of logits, the largest one's being 1."""
    return tl.exp((values - top) / temperature)


@triton.jit
def mass_above(logits, V, key, top, temperature, BV: tl.constexpr):
    """The sum of the probabilities of a row's logits that have at least the order `key`."""
    sums = tl.zeros((BV,), tl.float32)
    for start in range(0, V, BV):
        v = start + tl.arange(0, BV)
        values = tl.load(logits + v, mask=v < V, other=float("-inf"))
        kept = (v < V) & (ordered(values) >= key)
        sums += tl.where(kept, probabilities(values, top, temperature), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def highest_key(logits, V, goal, floor, top, temperature, COUNT: tl.constexpr, BV: tl.constexpr):
    """The highest order at or above which the mass is at least `goal`, or with COUNT there are so many; `floor` if none
    above it is.

    Three orders are tried at a time: what a pass costs is reading.
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
def draw_kernel(logits, best, piece_token, how, top_k, out, V, pieces, BP: tl.constexpr, BV: tl.constexpr):
    """out int32 [L]: the token of a row, -1 if a logit is not finite. how [L, 4]: temperature, top_p, min_p, noise."""
    begin()
    row = tl.program_id(0)
    p = tl.arange(0, BP)
    tops = tl.load(best + row * pieces + p, mask=p < pieces, other=float("-inf"))
    tokens = tl.load(piece_token + row * pieces + p, mask=p < pieces, other=NONE)
    top = tl.max(tops, 0)
    token = tl.min(tl.where(tops == top, tokens, NONE), 0)
    fine = tl.min(tokens, 0) >= 0
    temperature = tl.load(how + row * 4)
    if fine and temperature > 0.0:
        mine = logits + row.to(tl.int64) * V
        top_p, min_p = tl.load(how + row * 4 + 1), tl.load(how + row * 4 + 2)
        k = tl.load(top_k + row)
        key = tl.full((), LOWEST, tl.int32)
        if k > 0 and k < V:
            key = highest_key(mine, V, k.to(tl.float32), key, top, temperature, True, BV)
        if top_p < 1.0:
            goal = top_p * mass_above(mine, V, key, top, temperature, BV)
            key = highest_key(mine, V, goal, key, top, temperature, False, BV)
        if min_p > 0.0:
            key = tl.maximum(key, ordered(top + temperature * tl.log(min_p)))
        goal = tl.load(how + row * 4 + 3) * mass_above(mine, V, key, top, temperature, BV)
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
def recall_kernel(tokens, drawn, T, BT: tl.constexpr):
    """Each of tokens [T] that is below 0 becomes the one drawn in row -1 - token."""
    begin()
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    token = tl.load(tokens + t, mask=t < T, other=0)
    tl.store(tokens + t, tl.load(drawn - 1 - token, mask=token < 0, other=0), mask=token < 0)


def draw(logits: torch.Tensor, how: torch.Tensor, top_k: torch.Tensor, out: torch.Tensor) -> None:
    """A token of each row of float32 logits [L, vocab] into int32 out [L], -1 where a logit is not finite.

    how float32 [L, 4] is temperature (0: the largest), top_p, min_p and the row's noise in [0, 1); top_k int32 [L],
    0 for no limit.
    """
    rows, vocab = logits.shape
    pieces = -(-vocab // PIECE)
    best = torch.empty(rows, pieces, dtype=torch.float32, device=logits.device)
    token = torch.empty(rows, pieces, dtype=torch.int32, device=logits.device)
    best_kernel[(rows, pieces)](logits, best, token, vocab, BV=PIECE, **options())
    draw_kernel[(rows,)](
        logits, best, token, how, top_k, out, vocab, pieces, BP=triton.next_power_of_2(pieces), BV=PIECE,
        num_warps=DRAW_WARPS, **options(),
    )  # fmt: skip


def recall(tokens: torch.Tensor, drawn: torch.Tensor) -> None:
    """In tokens int32 [T], in place: -1 - r becomes what was drawn in row r, of drawn int32 [L]."""
    recall_kernel[(-(-tokens.shape[0] // 256),)](tokens, drawn, tokens.shape[0], BT=256, num_warps=1, **options())
