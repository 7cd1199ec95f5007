"""Checkpointed operations against the same operations with stored outputs."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F

from server.jobs.checkpointing import checkpointed


def tensors() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(5, 5, generator=draw).requires_grad_() for _ in range(3)]


def test_values_and_gradients_are_equal_and_the_output_is_recomputed_once() -> None:
    calls = []

    def operation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        return F.silu(x) * y

    x, y, w = tensors()
    once = operation(x, y)
    plain = once @ w + F.linear(once, w)
    expected = torch.autograd.grad(plain.sin().sum(), (x, y, w))
    calls.clear()
    with checkpointed(operation, x, y) as output:
        found = output @ w + F.linear(output, w)
    assert torch.equal(found, plain)
    gradients = torch.autograd.grad(found.sin().sum(), (x, y, w))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    assert calls == [False, True]


def test_the_output_is_not_stored() -> None:
    x, _, w = tensors()
    stored = []
    for checkpoint in (False, True):
        if checkpoint:
            with checkpointed(torch.sin, x) as output:
                y = output @ w
        else:
            output = torch.sin(x)
            y = output @ w
        reference = weakref.ref(output)
        del output
        stored.append(reference() is not None)
        y.sum().backward()
    assert stored == [True, False]


def test_an_input_without_a_gradient_gets_none() -> None:
    x, y, w = tensors()
    fixed = y.detach()
    with checkpointed(torch.mul, x, fixed) as output:
        result = output @ w
    result.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, (torch.ones(5, 5) @ w.T) * fixed)
    assert fixed.grad is None
    with checkpointed(torch.mul, fixed, fixed) as output:
        result = output @ w
    result.sum().backward()
    assert not output.requires_grad


def test_nothing_is_recorded_without_gradients() -> None:
    x, _, w = tensors()
    with torch.no_grad(), checkpointed(torch.sin, x) as output:
        assert torch.equal(output @ w, torch.sin(x) @ w)
        assert output.grad_fn is None
