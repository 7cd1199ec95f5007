"""Decoder layers for training, with selective activation checkpointing and an RMSNorm with its own gradient."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from server.jobs.checkpointing import checkpointed, stored
from server.model.attention import Context
from server.model.decoder import Layer, RMSNorm, Rotary, Source, swiglu


def checkpointed_layers(base: Source, dtype: torch.dtype) -> nn.ModuleList:
    """The layers of a base's decoder, for training."""
    kinds = [CheckpointedLayer] * (base.config.num_hidden_layers - 1) + [LastLayer]
    return nn.ModuleList(kind(base, i, dtype) for i, kind in enumerate(kinds))


@dataclass(frozen=True)
class SelectedContext(Context):
    """The context of a forward pass of which only some hidden states are needed.

    `selected` holds their rows, int64 [L]; None for all.
    """

    selected: torch.Tensor | None = None


class CheckpointedLayer(Layer):
    """A layer that stores the outputs of its GEMMs and the residual stream only.

    Norms, attention and SwiGLU are recomputed in the backward pass, because they are cheap and their outputs are large.
    Results are the same, and activations take less than half of the memory (without dropout, whose masks are stored).
    """

    def __init__(self, base: Source, layer: int, dtype: torch.dtype) -> None:
        super().__init__(base, layer, dtype)
        self.input_layernorm = TrainingNorm.of(self.input_layernorm)
        self.post_attention_layernorm = TrainingNorm.of(self.post_attention_layernorm)

    def forward(self, stream: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        return self._forward(checkpointed, stream, rotary, context)

    def plain_forward(self, stream: torch.Tensor, rotary: Rotary, context: Context) -> torch.Tensor:
        """The forward pass for activation checkpointing of the whole layer."""
        return self._forward(stored, stream, rotary, context)

    def _forward(
        self,
        compute: Callable[..., AbstractContextManager[torch.Tensor]],
        stream: torch.Tensor,
        rotary: Rotary,
        context: Context,
    ) -> torch.Tensor:
        attention, mlp = self.self_attn, self.mlp
        with compute(self.input_layernorm, stream) as normed:
            heads = attention.projected(normed, rotary, context)
        with compute(partial(self.attend, context), *heads) as attended:
            stream = self.select(stream, context) + attention.o_proj(attended, context)
        with compute(self.post_attention_layernorm, stream) as normed:
            gate, up = mlp.gate_proj(normed, context), mlp.up_proj(normed, context)
        with compute(swiglu, gate, up) as hidden:
            return stream + mlp.down_proj(hidden, context)  # type: ignore[no-any-return]

    def attend(self, context: Context, *heads: torch.Tensor) -> torch.Tensor:
        """The attention output of the selected rows."""
        return self.select(context.attention.attend(self.self_attn.layer, *heads), context)

    def select(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        """The rows of x that the rest of the layer computes: all."""
        return x


class LastLayer(CheckpointedLayer):
    """The last layer. After attention it computes the selected rows only."""

    def select(self, x: torch.Tensor, context: Context) -> torch.Tensor:
        selected = context.selected if isinstance(context, SelectedContext) else None
        return x if selected is None else x.index_select(0, selected)


class TrainingNorm(RMSNorm):
    """RMSNorm with an explicit gradient, which takes a third of the time of autograd's."""

    @classmethod
    def of(cls, norm: RMSNorm) -> TrainingNorm:
        """The same norm for training."""
        return cls(norm.weight, norm.eps, norm.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Norm.apply(x, self.weight, self.eps, self.dtype)  # type: ignore[no-any-return, no-untyped-call]


class _Norm(torch.autograd.Function):
    """x r w with r = 1 / sqrt(mean(x^2) + eps). With g = grad w, the gradient of x is r g - x r^3 mean(g x)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()
        grad = grads[0] * ctx.weight  # float32 like the weight
        mean = torch.linalg.vecdot(grad, x).unsqueeze_(-1).div_(x.shape[-1])
        return grad.mul_(r).addcmul_(x, mean.mul_(r**3), value=-1.0), None, None, None
