"""What is made again on the way back, against the same parts whose results are kept."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F

from adapters import layers, training
from adapters.data import Example, Tokens
from adapters.layers import LoraSpec
from adapters.training import TrainingConfig
from server.jobs import trainable
from server.jobs.again import made_again
from server.jobs.trainable import Trainable
from server.model.decoder import Layer


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
    with made_again(part, x, y) as made:
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
            with made_again(torch.sin, x) as made:
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
    with made_again(torch.mul, x, fixed) as made:
        result = made @ w
    result.sum().backward()
    assert torch.equal(x.grad, (torch.ones(5, 5) @ w.T) * fixed)
    assert fixed.grad is None
    with made_again(torch.mul, fixed, fixed) as made:  # of which nothing is on the way back
        result = made @ w
    result.sum().backward()
    assert not made.requires_grad


def test_nothing_is_kept_where_no_gradient_is_wanted():
    x, _, w = products()
    with torch.no_grad(), made_again(torch.sin, x) as made:
        assert torch.equal(made @ w, torch.sin(x) @ w)
        assert made.grad_fn is None


def gradients(model: Trainable, dropout: float) -> list[torch.Tensor]:
    ids = torch.tensor([3, 4, 5, 6, 7, 3, 4, 8, 3, 4, 9, 10])
    torch.manual_seed(5)
    found = layers.inject(model.tree, LoraSpec(rank=3, dropout=dropout), seed=1)
    for layer in found.values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.2)
    model.tree.train()
    states = model.hidden(ids, [5, 3, 4])
    states.pow(2).sum().backward()
    return [states.detach(), *(p.grad for p in model.tree.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kept", [0, trainable.KEPT_VALUES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_frugal_decoder_has_the_states_and_gradients_of_a_plain_one(tiny_base, monkeypatch, kept, dtype, dropout):
    frugal = gradients(Trainable(tiny_base, dtype, kept=kept), dropout)
    monkeypatch.setattr(trainable, "_Frugal", Layer)
    plain = gradients(Trainable(tiny_base, dtype, kept=kept), dropout)
    assert len(plain) == len(frugal) > 1
    assert torch.equal(frugal[0], plain[0])
    for a, b in zip(frugal[1:], plain[1:], strict=True):  # the stream's are added up in another order
        assert (a - b).abs().max() <= (1e-5 if dtype == "float32" else 1e-2) * b.abs().max()


def test_layers_that_are_computed_again_whole_train_the_same(tiny_base):
    examples = [Example((3, 4, 5 + i, 6, 7), (False, False, True, True, True)) for i in range(6)]
    results = []
    for whole in (False, True):
        config = TrainingConfig(lora_rank=2, batch_size=3, max_steps=4, activation_checkpointing=whole, seed=3)
        results.append(training.train(Trainable(tiny_base, "float32"), Tokens(tuple(examples)), config).digest)
    assert results[0] == results[1]
