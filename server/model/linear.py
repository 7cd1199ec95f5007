"""`Linear`: a frozen base matrix as a module, with LoRA updates in serving and input gradients in training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from server.kernels import Backend, StepBackend
from server.kernels.weight import Weight

if TYPE_CHECKING:
    from server.model.attention import Context

BLOCK_BYTES = 32 * 2**20
"""Bytes of dequantized float32 rows that the backward pass holds at a time."""


class _Frozen(torch.autograd.Function):
    """x W^T (+ `update`) by the backend's kernel. The gradient of x is grad W, with W dequantized; W has none."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Weight, backend: Backend, update: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight, ctx.backend = weight, backend
        return backend.linear(weight, x, update)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, None, None, torch.Tensor | None]:
        (grad,) = grads
        given = grad if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, given
        out, width = ctx.weight.shape
        step = max(64, BLOCK_BYTES // (4 * width) // 64 * 64)
        total = grad.new_zeros(grad.shape[0], width)
        for start in range(0, out, step):
            rows = ctx.backend.dequantize(ctx.weight, start, min(start + step, out)).to(grad.dtype)
            total.addmm_(grad[:, start : start + step], rows)
        return total, None, None, given


class Linear(nn.Module):
    """A linear of the base: x [T, in] -> [T, out] of x's dtype.

    It has no parameters: the packed matrix is shared and frozen. In serving, adapters of the context's segments are
    added. In training it is the `base_layer` of a LoRALinear, and the context has no segments.
    """

    def __init__(self, path: str, weight: Weight, bias: torch.Tensor | None, backend: Backend) -> None:
        super().__init__()
        self.path = path
        self.weight = weight
        self.bias = bias
        self.backend = backend
        self.out_features, self.in_features = weight.shape
        self._add_lora = backend.add_lora if isinstance(backend, StepBackend) else None

    def forward(self, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        if x.requires_grad and torch.is_grad_enabled():
            y: torch.Tensor = _Frozen.apply(x, self.weight, self.backend, None)  # type: ignore[no-untyped-call]
        else:
            y = self.backend.linear(self.weight, x)
        if self.bias is not None:
            y += self.bias
        if context is not None and context.segments:
            assert self._add_lora is not None, "these kernels do not run the Python decoder's steps"
            self._add_lora(y, x, self.path, context.segments)
        return y

    def onto(self, update: torch.Tensor, x: torch.Tensor, context: Context | None = None) -> torch.Tensor:
        """Add the linear to a LoRA `update`, see `adapters.layers.Onto`."""
        y: torch.Tensor = _Frozen.apply(x, self.weight, self.backend, update)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y += self.bias  # in place, to keep x's dtype
        return y

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, {self.weight.scheme}"
