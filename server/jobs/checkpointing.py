"""Activation checkpointing of single operations: recompute an output in the backward pass instead of storing it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Operation = Callable[..., torch.Tensor]


@contextmanager
def checkpointed(operation: Operation, *inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield `operation(*inputs)`. Operations within the context save its inputs instead of it.

    The backward pass recomputes the output once for all of them.

    Args:
        operation: A deterministic function without trainable parameters. It pays off for cheap operations with large
            outputs.
    """
    recomputed = _Recomputed(operation)
    output: torch.Tensor = _Checkpointed.apply(recomputed, *inputs)  # type: ignore[no-untyped-call]
    if not output.requires_grad:  # the inputs were not saved
        yield output
        return
    address, shape = output.data_ptr(), output.shape  # unique as long as `output` is alive

    def pack(tensor: torch.Tensor) -> Any:
        return recomputed if tensor.data_ptr() == address and tensor.shape == shape else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield output


@contextmanager
def stored(operation: Operation, *inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield `operation(*inputs)` without checkpointing it. For layers that are checkpointed as a whole."""
    yield operation(*inputs)


def _unpack(packed: Any) -> torch.Tensor:
    return packed.output().detach() if isinstance(packed, _Recomputed) else packed


class _Recomputed:
    """One call of a checkpointed operation, and in the backward pass its inputs and output."""

    def __init__(self, operation: Operation) -> None:
        self.operation = operation
        self.node: Callable[[], Any] = lambda: None
        """Weak reference to the node of the graph that holds the inputs. A strong one would be a cycle."""
        self._graph: tuple[list[torch.Tensor], torch.Tensor] | None = None

    def output(self) -> torch.Tensor:
        """The recomputed output with its own graph. Kept until `backward`."""
        if self._graph is None:
            node = self.node()
            saved = zip(node.saved_tensors, node.needs_input_grad[1:], strict=True)
            inputs = [tensor.detach().requires_grad_(needed) for tensor, needed in saved]
            with torch.enable_grad():
                self._graph = inputs, self.operation(*inputs)
        return self._graph[1]

    def backward(self, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of the inputs; None for inputs without gradient."""
        output = self.output()
        assert self._graph is not None
        inputs = self._graph[0]
        self._graph = None
        found = iter(torch.autograd.grad(output, [x for x in inputs if x.requires_grad], gradient))
        return [next(found) if x.requires_grad else None for x in inputs]


class _Checkpointed(torch.autograd.Function):
    """The operation as one node of the graph, which saves its inputs only."""

    @staticmethod
    def forward(ctx: Any, recomputed: _Recomputed, *inputs: torch.Tensor) -> torch.Tensor:
        recomputed.node = weakref.ref(ctx)
        ctx.recomputed = recomputed
        ctx.save_for_backward(*inputs)
        return recomputed.operation(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, *ctx.recomputed.backward(grads[0])
