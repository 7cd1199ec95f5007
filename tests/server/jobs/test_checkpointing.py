"""What is made again on the way back, against the same parts whose results are kept."""

from __future__ import annotations

import weakref

import torch
import torch.nn.functional as F

from server.jobs.checkpointing import checkpointed


def products() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 5, generator=draw).requires_grad_() for _ in range(3))  # type: ignore[return-value]


def test_values_and_gradients_are_those_of_the_part_alone():
    calls = []

    def part(x, y):
        calls.append(torch.is_grad_enabled())
        return F.silu(x) * y

    x, y, w = products()
    once = part(x, y)
    plain = once @ w + F.linear(once, w)
    wanted = torch.autograd.grad(plain.sin().sum(), (x, y, w))
    calls.clear()
    with checkpointed(part, x, y) as made:
        found = made @ w + F.linear(made, w)
    assert torch.equal(found, plain)
    gradients = torch.autograd.grad(found.sin().sum(), (x, y, w))
    assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
    assert calls == [False, True]  # once more for all that keep it, and its own gradient


def test_what_is_made_is_not_kept():
    x, _, w = products()
    kept = []
    for context in (False, True):
        if context:
            with checkpointed(torch.sin, x) as made:
                y = made @ w
        else:
            made = torch.sin(x)
            y = made @ w
        there = weakref.ref(made)
        del made
        kept.append(there() is not None)
        y.sum().backward()
    assert kept == [True, False]


def test_an_input_without_a_gradient_gets_none():
    x, y, w = products()
    fixed = y.detach()
    with checkpointed(torch.mul, x, fixed) as made:
        result = made @ w
    result.sum().backward()
    assert torch.equal(x.grad, (torch.ones(5, 5) @ w.T) * fixed)
    assert fixed.grad is None
    with checkpointed(torch.mul, fixed, fixed) as made:  # of which nothing is on the way back
        result = made @ w
    result.sum().backward()
    assert not made.requires_grad


def test_nothing_is_kept_where_no_gradient_is_wanted():
    x, _, w = products()
    with torch.no_grad(), checkpointed(torch.sin, x) as made:
        assert torch.equal(made @ w, torch.sin(x) @ w)
        assert made.grad_fn is None
