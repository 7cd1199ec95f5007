"""`PrefixAttention`: causal attention over training sequences that share their first tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server.model.attention import PackedAttention, grouped_attention

MAX_BATCHED = 160
"""Longest tail, in tokens, that is batched with others. Longer ones use the fused kernel."""
MAX_PADDING = 1.5
"""A batch of tails has at most this factor times its rows after padding. Beyond that, another call is cheaper."""


class PrefixAttention:
    """Causal attention. Rows are the shared prefix, then the rest (the tail) of each sequence.

    Consecutive tails of similar length are padded and computed in one call. A tail of more than `MAX_BATCHED` tokens is
    alone, and uses the fused kernel if there is no prefix.

    Args:
        shared: Length of the prefix, in tokens.
        tails: Lengths of the tails.
        padding: Rows after the last tail. They attend to nothing.
    """

    def __init__(self, shared: int, tails: Sequence[int], padding: int = 0) -> None:
        positions = [torch.arange(shared), *(torch.arange(shared, shared + n) for n in tails), torch.arange(padding)]
        self.positions = torch.cat(positions)
        groups = group_by_length(tails)
        self._sizes = [shared, *map(sum, groups), padding]
        self._groups: list[PackedAttention | _Tails] = [
            PackedAttention(group) if not shared and group[0] > MAX_BATCHED else _Tails(shared, group)
            for group in groups
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `server.model.attention.Attention`."""
        split = zip(*(x.split_with_sizes(self._sizes) for x in (q, k, v)), strict=True)
        (prefix_q, prefix_k, prefix_v), *rest, _ = split
        parts = [grouped_attention(prefix_q, prefix_k, prefix_v, causal=True)] if self._sizes[0] else []
        for group, (own_q, own_k, own_v) in zip(self._groups, rest, strict=True):
            if isinstance(group, PackedAttention):
                parts.append(group.attend(layer, own_q, own_k, own_v))
            else:
                parts.append(_TailAttention.apply(group, own_q, own_k, own_v, prefix_k, prefix_v))  # type: ignore[no-untyped-call]
        return torch.cat((*parts, q.new_zeros(self._sizes[-1], q.shape[1] * q.shape[2])))


def group_by_length(tails: Sequence[int]) -> list[list[int]]:
    """Split the lengths into runs that need little padding. A tail of more than `MAX_BATCHED` tokens is alone."""
    groups: list[list[int]] = []
    for length in tails:
        last = [*groups[-1], length] if groups else []
        if last and max(last) <= MAX_BATCHED and max(last) * len(last) <= MAX_PADDING * sum(last):
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


class _Tails:
    """Index tables of tails that are computed in one call, padded to the longest.

    Each KV head of each tail is one batch entry, [kv_heads * count, ...]. The query heads of its group are rows.
    """

    def __init__(self, shared: int, tails: Sequence[int]) -> None:
        self.shared, self.count, self.width = shared, len(tails), max(tails)
        lengths = torch.tensor(tails)[:, None]
        column = torch.arange(self.width)
        own = column < lengths
        self.real = own.flatten().nonzero().flatten()
        self.padded = (~own).flatten().nonzero().flatten()
        """Positions of [count * width] that are rows, and those that are padding."""
        first = lengths.cumsum(0) - lengths
        rows = first + torch.where(own, column, 0)
        self.rows = rows.flatten()
        """The row of each position. Padding reads the tail's first row, and its result is not used."""
        self.whole = torch.cat((torch.arange(shared).expand(self.count, -1), rows + shared), 1).flatten()
        """The row, in prefix and tails together, of each position of [count * (shared + width)]."""
        mask = torch.zeros(self.width, shared + self.width)
        self.mask = mask.masked_fill_(torch.arange(-shared, self.width) > column[:, None], float("-inf"))

    def queries(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[T, heads, d] -> [kv_heads * count, width * group, d]."""
        by_head = x.reshape(len(x), kv_heads, -1).transpose(0, 1)
        return by_head.index_select(1, self.rows).view(kv_heads * self.count, -1, x.shape[-1])

    def keys(self, prefix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[shared, kv_heads, d] and [T, kv_heads, d] -> [kv_heads * count, shared + width, d]. Also for values."""
        by_head = torch.cat((prefix, x)).transpose(0, 1)
        return by_head.index_select(1, self.whole).view(x.shape[1] * self.count, -1, x.shape[-1])

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Softmax of the masked scores, [kv_heads * count, width * group, shared + width]."""
        mask = self.mask.repeat_interleave(queries.shape[1] // self.width, 0).to(queries.dtype)
        return torch.baddbmm(mask, queries, keys.mT, alpha=queries.shape[-1] ** -0.5).softmax(-1)

    def tails(self, attended: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[kv_heads * count, width * group, d] -> [T, heads * d]: the inverse of `queries`."""
        return (
            attended.view(kv_heads, self.count * self.width, -1).transpose(0, 1).index_select(0, self.real).flatten(1)
        )

    def split_gradient(self, grad: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of `keys` for the prefix, summed over all tails, and for the tails."""
        by_head = grad.view(kv_heads, self.count, self.shared + self.width, -1)
        prefix = by_head[:, :, : self.shared].sum(1).transpose(0, 1)
        own = by_head[:, :, self.shared :].reshape(kv_heads, self.count * self.width, -1)
        return prefix, own.transpose(0, 1).index_select(0, self.real)


class _TailAttention(torch.autograd.Function):
    """Attention of tails q [T, heads, d] over keys and values [T, kv_heads, d] and the prefix's [shared, kv_heads, d].

    Returns [T, heads * d]. For many short sequences, plain GEMMs are several times faster than the fused kernel. The
    explicit gradient reads the scores, the largest tensor, half as often as autograd.
    """

    @staticmethod
    def forward(ctx: Any, group: _Tails, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        k, v, prefix_k, prefix_v = others
        kv_heads = k.shape[1]
        queries, keys, values = group.queries(q, kv_heads), group.keys(prefix_k, k), group.keys(prefix_v, v)
        scores = group.scores(queries, keys)
        ctx.group, ctx.heads = group, (q.shape[1], kv_heads)
        ctx.save_for_backward(queries, keys, values, scores)
        return group.tails(torch.bmm(scores, values), kv_heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group, (heads, kv_heads) = ctx.group, ctx.heads
        queries, keys, values, scores = ctx.saved_tensors
        grad = group.queries(grads[0].view(-1, heads, queries.shape[-1]), kv_heads)
        # Padding has the gradient of a tail's first row, which must count once.
        grad.view(kv_heads, group.count * group.width, -1).index_fill_(1, group.padded, 0.0)
        prefix_v, own_v = group.split_gradient(torch.bmm(scores.mT, grad), kv_heads)
        inner = torch._softmax_backward_data(torch.bmm(grad, values.mT), scores, -1, scores.dtype)
        inner.mul_(queries.shape[-1] ** -0.5)
        own_q = group.tails(torch.bmm(inner, keys), kv_heads).unflatten(1, (heads, -1))
        prefix_k, own_k = group.split_gradient(torch.bmm(inner.mT, queries), kv_heads)
        return None, own_q, own_k, own_v, prefix_k, prefix_v
