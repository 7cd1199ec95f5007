"""`checkpointed`: what a part of the forward pass makes is not saved for the way back, but made once more there.

Owns how autograd is told. Does not know what the parts are: cheap ones, whose results are large, pay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Part = Callable[..., torch.Tensor]


@contextmanager
def checkpointed(part: Part, *inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """What `part`, which has no trainable parameters and always makes the same, makes of its inputs.

    The inputs are saved in its place, also by whoever uses it within the context and would keep it; on the way back it
    is made once for all of these, with the graph that its own gradient then goes through.
    """
    again = _Again(part)
    made: torch.Tensor = _Made.apply(again, *inputs)  # type: ignore[no-untyped-call]
    if not made.requires_grad:  # its inputs were not saved
        yield made
        return
    place, shape = made.data_ptr(), made.shape  # no other's while `made` is held here

    def pack(tensor: torch.Tensor) -> Any:
        return again if tensor.data_ptr() == place and tensor.shape == shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield made


@contextmanager
def saved(part: Part, *inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """What `part` makes, saved by whoever uses it: within a checkpoint, which sees to memory by itself and would not
    hear of what is saved within `checkpointed`."""
    yield part(*inputs)


def _unpack(packed: Any) -> torch.Tensor:
    return packed.value().detach() if isinstance(packed, _Again) else packed


class _Again:
    """A part of one forward pass, and on the way back its inputs and what it makes of them."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.node: Callable[[], Any] = lambda: None
        """The step of the graph that has the inputs, as long as that is there: a cycle would keep them for longer."""
        self._made: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def value(self) -> torch.Tensor:
        """What the part makes, with its graph; saved until `send_back`."""
        if self._made is None:
            node = self.node()
            given = zip(node.saved_tensors, node.needs_input_grad[1:], strict=True)
            inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in given]
            with torch.enable_grad():
                self._made = inputs, self.part(*inputs)
        return self._made[1]

    def send_back(self, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of the inputs, None for one that needs none."""
        made = self.value()
        assert self._made is not None
        inputs = self._made[0]
        self._made = None
        found = iter(torch.autograd.grad(made, [x for x in inputs if x.requires_grad], gradient))
        return [next(found) if x.requires_grad else None for x in inputs]


class _Made(torch.autograd.Function):
    """The part as one step of the graph that keeps its inputs alone."""

    @staticmethod
    def forward(ctx: Any, again: _Again, *inputs: torch.Tensor) -> torch.Tensor:
        again.node = weakref.ref(ctx)
        ctx.again = again
        ctx.save_for_backward(*inputs)
        return again.part(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.again.send_back(grads[0])
