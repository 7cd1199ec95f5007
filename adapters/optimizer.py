"""AdamW on flat float32 buffers, gradient clipping, and the learning-rate schedule.

Parameters become views of one buffer, so a step, a clip and a checkpoint are a few operations on whole buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

BETAS, EPSILON = (0.9, 0.999), 1e-8


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019) in float32, over views of flat buffers."""

    def __init__(self, parameters: Sequence[torch.Tensor], *, weight_decay: float = 0.0) -> None:
        total = sum(p.numel() for p in parameters)
        self.values = torch.empty(total)
        self.gradients = torch.zeros(total)
        self.first = torch.zeros(total)
        self.second = torch.zeros(total)
        self.steps = 0
        self.weight_decay = weight_decay
        start = 0
        for p in parameters:
            view = self.values[start : start + p.numel()].view_as(p)
            with torch.no_grad():
                view.copy_(p)
            p.data = view
            p.grad = self.gradients[start : start + p.numel()].view_as(p)
            start += p.numel()

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: adapters, gradients, optimizer."""
        return {
            "adapters": self.values.nbytes,
            "gradients": self.gradients.nbytes,
            "optimizer": self.first.nbytes + self.second.nbytes,
        }

    def clip(self, limit: float) -> float:
        """Scale gradients down to norm `limit` (0: never). Returns the norm before."""
        norm = float(self.gradients.norm())
        if limit > 0.0 and norm > limit:
            self.gradients.mul_(limit / norm)
        return norm

    def step(self, learning_rate: float) -> None:
        """Update the parameters and zero the gradients."""
        self.steps += 1
        b1, b2 = BETAS
        self.first.lerp_(self.gradients, 1.0 - b1)
        self.second.mul_(b2).addcmul_(self.gradients, self.gradients, value=1.0 - b2)
        root = (self.second / (1.0 - b2**self.steps)).sqrt_().add_(EPSILON)
        with torch.no_grad():
            if self.weight_decay:
                self.values.mul_(1.0 - learning_rate * self.weight_decay)
            self.values.addcdiv_(self.first, root, value=-learning_rate / (1.0 - b1**self.steps))
        self.gradients.zero_()

    def state(self) -> dict[str, torch.Tensor]:
        """The state for a checkpoint. The tensors are not copied."""
        return {
            "values": self.values,
            "first": self.first,
            "second": self.second,
            "steps": torch.tensor(self.steps),
        }

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load a `state`."""
        with torch.no_grad():
            for name in ("values", "first", "second"):
                getattr(self, name).copy_(state[name])
        self.steps = int(state["steps"])
        self.gradients.zero_()


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """The rate of step `step` (from 0): linear warm-up to `peak`, then cosine decay to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
