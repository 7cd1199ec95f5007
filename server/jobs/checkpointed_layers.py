"""The decoder's layers as training runs them: what takes memory and little time is computed again on the way back.

Owns what is saved, and which rows the last layer goes on with. The weights and the order of operations are the
decoder's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.jobs.checkpointing import checkpointed, saved
from server.model.attention import Context
from server.model.decoder import Layer, RMSNorm, Rotary, Source, swiglu


def checkpointed_layers(base: Source, dtype: torch.dtype) -> nn.ModuleList:
    """The layers of a base's decoder, for training."""
    kinds = [CheckpointedLayer] * (base.config.num_hidden_layers - 1) + [Last]
    return nn.ModuleList(kind(base, i, dtype) for i, kind in enumerate(kinds))


@dataclass(frozen=True)
class Asked(Context):
    """A pass of which only some rows' last states are wanted, int64 [L]; None for all."""

    asked: torch.Tensor | None = None


class CheckpointedLayer(Layer):
    """A layer that keeps for the way back what its products make and the stream alone: norms, attention and SwiGLU cost
    little beside these, and are computed once more there. The same values, in less than half of the memory, if there is
    no dropout, whose masks and what they leave are saved.
    """

    def __init__(self, base: Source, layer: int, dtype: torch.dtype) -> None:
        super().__init__(base, layer, dtype)
        self.input_layernorm = Norm.of(self.input_layernorm)
        self.post_attention_layernorm = Norm.of(self.post_attention_layernorm)

    def forward(self, stream: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        return self._go(checkpointed, stream, rotary, context)

    def whole(self, stream: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        """The same for activation checkpointing, which computes all of the layer again."""
        return self._go(saved, stream, rotary, context)

    def _go(
        self,
        made: Callable[..., AbstractContextManager[torch.Tensor]],
        stream: torch.Tensor,
        rotary: Rotary,
        context: Context,
    ) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        with made(self.input_layernorm, stream) as normed:
            heads = attention.projected(normed, rotary, context)
        with made(partial(self.attend, context), *heads) as seen:
            stream = self.wanted(stream, context) + attention.o_proj(seen, context)
        with made(self.post_attention_layernorm, stream) as normed:
            gate, up = mlp.gate_proj(normed, context), mlp.up_proj(normed, context)
        with made(swiglu, gate, up) as hidden:
            return stream + mlp.down_proj(hidden, context)  # type: ignore[no-any-return]

    def attend(self, context: Context, *heads: torch.Tensor) -> torch.Tensor:
        """What the rows see that go on."""
        return self.wanted(context.attention.attend(self.self_attn.layer, *heads), context)

    def wanted(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """The rows of x that go on: all."""
        return x


class Last(CheckpointedLayer):
    """The last layer: rows go on that are asked for, and of the others keys and values are all that is needed."""

    def wanted(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        asked = context.asked if isinstance(context, Asked) else None
        return x if asked is None else x.index_select(0, asked)


class Norm(RMSNorm):
    """The same norm, with its gradient by hand: in a third of the time of the graph of its operations."""

    @classmethod
    def of(cls, norm: RMSNorm) -> Norm:
        """As a norm of the decoder is."""
        return cls(norm.weight, norm.eps, norm.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Normed.apply(x, self.weight, self.eps, self.dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Normed(torch.autograd.Function):
    """x r w with r = 1 / sqrt(mean(x^2) + eps); with g = grad w, the gradient of x is r g - x r^3 mean(g x)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()
        grad = grads[0] * ctx.weight  # float32, as the weight is
        mean = torch.linalg.vecdot(grad, x).unsqueeze_(-1).div_(x.shape[-1])
        return grad.mul_(r).addcmul_(x, mean.mul_(r**3), value=-1.0), None, None, None
