"""`PrefixAttention`: causal attention of training's sequences, which may all begin with the same tokens.

Owns which sequences are attended to in one call, and how their gradient goes back. Does not know the decoder, nor how
long the common beginning is: it is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from server.model.attention import PackedAttention, grouped_attention

SHORT = 160
"""Own tokens of a sequence up to which it is attended to in one call with others, all of whose scores are made; longer
ones go through the fused kernel one by one, which makes a few at a time."""
PADDING = 1.5
"""Rows that sequences in one call may have, padded, over their own: more cost more than a further call."""


class PrefixAttention:
    """Causal attention of sequences that share their first tokens: rows are the prefix, then each one's own tail.

    Tails of like length that follow each other are attended to in one call. One of over `SHORT` tokens is alone, and
    goes through the fused kernel where there is no prefix. `more` rows behind them see nothing.
    """

    def __init__(self, shared: int, tails: Sequence[int], more: int = 0) -> None:
        known = [torch.arange(shared), *(torch.arange(shared, shared + n) for n in tails), torch.arange(more)]
        self.positions = torch.cat(known)
        groups = alike(tails)
        self._sizes = [shared, *map(sum, groups), more]
        self._groups: list[PackedAttention | _Tails] = [
            PackedAttention(group) if not shared and group[0] > SHORT else _Tails(shared, group) for group in groups
        ]

    def attend(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See `server.model.attention.Attention`."""
        split = zip(*(x.split_with_sizes(self._sizes) for x in (q, k, v)), strict=True)
        (first_q, first_k, first_v), *rest, _ = split
        parts = [grouped_attention(first_q, first_k, first_v, causal=True)] if self._sizes[0] else []
        for group, (own_q, own_k, own_v) in zip(self._groups, rest, strict=True):
            if isinstance(group, PackedAttention):
                parts.append(group.attend(layer, own_q, own_k, own_v))
            else:
                parts.append(_Attended.apply(group, own_q, own_k, own_v, first_k, first_v))  # type: ignore[no-untyped-call]
        return torch.cat((*parts, q.new_zeros(self._sizes[-1], q.shape[1] * q.shape[2])))


def alike(tails: Sequence[int]) -> list[list[int]]:
    """Lengths in runs that lose little by being padded to their longest; one over `SHORT` is alone."""
    groups: list[list[int]] = []
    for length in tails:
        last = [*groups[-1], length] if groups else []
        if last and max(last) <= SHORT and max(last) * len(last) <= PADDING * sum(last):
            groups[-1].append(length)
        else:
            groups.append([length])
    return groups


class _Tails:
    """Where the rows of tails that are attended to in one call, padded to the longest, come from and go to.

    A head of keys is a batch of its own: [kv_heads * count, ...], in which the queries that it answers are rows.
    """

    def __init__(self, shared: int, tails: Sequence[int]) -> None:
        self.shared, self.count, self.width = shared, len(tails), max(tails)
        lengths = torch.tensor(tails)[:, None]
        column = torch.arange(self.width)
        own = column < lengths
        self.real = own.flatten().nonzero().flatten()
        self.filled = (~own).flatten().nonzero().flatten()
        """Of the padded places [count * width], those that are rows and those that are not."""
        first = lengths.cumsum(0) - lengths
        rows = first + torch.where(own, column, 0)
        self.rows = rows.flatten()
        """The row of each padded place; what is behind a tail's end reads its first, and is read by nobody."""
        self.whole = torch.cat((torch.arange(shared).expand(self.count, -1), rows + shared), 1).flatten()
        """The same with the prefix before each tail, [count * (shared + width)], of the prefix and the tails."""
        mask = torch.zeros(self.width, shared + self.width)
        self.mask = mask.masked_fill_(torch.arange(-shared, self.width) > column[:, None], float("-inf"))

    def queries(self, x: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[T, heads, d] -> [kv_heads * count, width * group, d]."""
        by_head = x.reshape(len(x), kv_heads, -1).transpose(0, 1)
        return by_head.index_select(1, self.rows).view(kv_heads * self.count, -1, x.shape[-1])

    def keys(self, first: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """[shared, kv_heads, d] and [T, kv_heads, d] -> [kv_heads * count, shared + width, d]; values alike."""
        by_head = torch.cat((first, x)).transpose(0, 1)
        return by_head.index_select(1, self.whole).view(x.shape[1] * self.count, -1, x.shape[-1])

    def scores(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """The softmax of each query over what it sees, [kv_heads * count, width * group, shared + width]."""
        mask = self.mask.repeat_interleave(queries.shape[1] // self.width, 0).to(queries.dtype)
        return torch.baddbmm(mask, queries, keys.mT, alpha=queries.shape[-1] ** -0.5).softmax(-1)

    def tails(self, seen: torch.Tensor, kv_heads: int) -> torch.Tensor:
        """[kv_heads * count, width * group, d] -> [T, heads * d]: `queries` undone."""
        return seen.view(kv_heads, self.count * self.width, -1).transpose(0, 1).index_select(0, self.real).flatten(1)

    def back(self, grad: torch.Tensor, kv_heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of `keys`, sent back to the prefix, which every tail sees, and to the tails."""
        by_head = grad.view(kv_heads, self.count, self.shared + self.width, -1)
        first = by_head[:, :, : self.shared].sum(1).transpose(0, 1)
        own = by_head[:, :, self.shared :].reshape(kv_heads, self.count * self.width, -1)
        return first, own.transpose(0, 1).index_select(0, self.real)


class _Attended(torch.autograd.Function):
    """q [T, heads, d] of tails over k and v [T, kv_heads, d] of their own and of the prefix [shared, kv_heads, d]:
    [T, heads * d].

    Plain products: for many short sequences these are several times faster, both ways, than the fused kernel, and by
    hand they pass over the scores, the largest of all, half as often as the graph of the same operations.
    """

    @staticmethod
    def forward(ctx: Any, group: _Tails, q: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        k, v, first_k, first_v = others
        kv_heads = k.shape[1]
        queries, keys, values = group.queries(q, kv_heads), group.keys(first_k, k), group.keys(first_v, v)
        scores = group.scores(queries, keys)
        ctx.group, ctx.heads = group, (q.shape[1], kv_heads)
        ctx.save_for_backward(queries, keys, values, scores)
        return group.tails(torch.bmm(scores, values), kv_heads)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        group, (heads, kv_heads) = ctx.group, ctx.heads
        queries, keys, values, scores = ctx.saved_tensors
        grad = group.queries(grads[0].view(-1, heads, queries.shape[-1]), kv_heads)
        # What stands at the places behind a tail's end is another row's gradient, which counts once.
        grad.view(kv_heads, group.count * group.width, -1).index_fill_(1, group.filled, 0.0)
        first_v, own_v = group.back(torch.bmm(scores.mT, grad), kv_heads)
        inner = torch._softmax_backward_data(torch.bmm(grad, values.mT), scores, -1, scores.dtype)
        inner.mul_(queries.shape[-1] ** -0.5)
        own_q = group.tails(torch.bmm(inner, keys), kv_heads).unflatten(1, (heads, -1))
        first_k, own_k = group.back(torch.bmm(inner.mT, queries), kv_heads)
        return None, own_q, own_k, own_v, first_k, first_v
