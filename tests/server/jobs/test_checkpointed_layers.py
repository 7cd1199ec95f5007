"""The decoder layers for training, against the decoder's own."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from adapters import layers, training
from adapters.data import Example, Tokens
from adapters.layers import LoraSpec
from adapters.training import TrainingConfig
from server.jobs import checkpointed_layers, trainable_model
from server.jobs.checkpointed_layers import TrainingNorm
from server.jobs.trainable_model import TrainableModel
from server.model.decoder import Layer, RMSNorm


def gradients(model: TrainableModel, dropout: float) -> list[torch.Tensor]:
    ids = torch.tensor([3, 4, 5, 6, 7, 3, 4, 8, 3, 4, 9, 10])
    torch.manual_seed(5)
    found = layers.inject(model.tree, LoraSpec(rank=3, dropout=dropout), seed=1)
    for layer in found.values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.2)
    model.tree.train()
    states = model.hidden(ids, [5, 3, 4])
    states.pow(2).sum().backward()
    return [states.detach(), *(p.grad for p in model.tree.parameters() if p.requires_grad)]


@pytest.mark.parametrize("max_dense", [0, trainable_model.MAX_DENSE_VALUES])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_states_and_gradients_are_those_of_the_plain_decoder(tiny_base, monkeypatch, max_dense, dtype, dropout):
    lean = gradients(TrainableModel(tiny_base, dtype, max_dense=max_dense), dropout)
    monkeypatch.setattr(checkpointed_layers, "CheckpointedLayer", Layer)
    monkeypatch.setattr(checkpointed_layers, "LastLayer", Layer)
    plain = gradients(TrainableModel(tiny_base, dtype, max_dense=max_dense), dropout)
    assert len(plain) == len(lean) > 1
    assert torch.equal(lean[0], plain[0])
    for a, b in zip(lean[1:], plain[1:], strict=True):  # the residual stream's are added in another order
        assert (a - b).abs().max() <= (1e-5 if dtype == "float32" else 1e-2) * b.abs().max()


def test_checkpointing_whole_layers_gives_the_same_adapter(tiny_base):
    examples = [Example((3, 4, 5 + i, 6, 7), (False, False, True, True, True)) for i in range(6)]
    results = []
    for whole in (False, True):
        config = TrainingConfig(lora_rank=2, batch_size=3, max_steps=4, activation_checkpointing=whole, seed=3)
        results.append(training.train(TrainableModel(tiny_base, "float32"), Tokens(tuple(examples)), config).digest)
    assert results[0] == results[1]


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_layer_that_is_checkpointed_as_a_whole_stores_its_input_only(tiny_base, monkeypatch, dropout):
    """And what it recomputes is freed after the backward pass, without garbage collection."""
    kept, of = [], F.linear

    def watched(x, *others):
        y = of(x, *others)
        kept.append(weakref.ref(y))
        return y

    model = TrainableModel(tiny_base, "float32")
    layers.inject(model.tree, LoraSpec(rank=3, dropout=dropout), seed=1)
    model.tree.train()
    monkeypatch.setattr(F, "linear", watched)
    gc.collect()
    gc.disable()
    try:
        with training._checkpointed(model.blocks):
            states = model.hidden(torch.tensor([3, 4, 5, 6, 7, 3, 4, 8]), [5, 3])
            monkeypatch.setattr(F, "linear", of)
            assert (len(kept) > 0) == (dropout > 0)  # without dropout the two GEMMs are one function
            assert not [one for one in kept if one() is not None]
            before = len(nodes())
            states.sum().backward()
            del states
        assert len(nodes()) == before == 0
    finally:
        gc.enable()


def nodes() -> list[object]:
    return [one for one in gc.get_objects() if type(one).__name__ == "_Recomputed"]


@pytest.mark.parametrize("whole", [False, True])
def test_everything_is_freed_after_the_backward_pass(tiny_base, whole):
    model = TrainableModel(tiny_base, "float32")
    layers.inject(model.tree, LoraSpec(rank=3), seed=1)
    gc.collect()
    gc.disable()
    try:
        with training._checkpointed(model.blocks) if whole else nullcontext():
            states = model.hidden(torch.tensor([3, 4, 5, 6, 7, 3, 4, 8]), [5, 3])
            assert (len(nodes()) > 0) != whole
            states.sum().backward()
            del states
        assert not nodes()
    finally:
        gc.enable()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_the_norm(dtype):
    draw = torch.Generator().manual_seed(0)
    x, grad = torch.randn(7, 24, generator=draw) * 3, torch.randn(7, 24, generator=draw).to(dtype)
    weight = torch.randn(24, generator=draw)
    exact = x.double().requires_grad_()
    F.rms_norm(exact, (24,), weight.double(), 1e-3).backward(grad.double())
    y = TrainingNorm.of(RMSNorm(weight, 1e-3, dtype))(x.requires_grad_())
    assert torch.equal(y, RMSNorm(weight, 1e-3, dtype)(x))
    y.backward(grad)
    assert (x.grad - exact.grad).abs().max() < 1e-6 * exact.grad.abs().max()


@pytest.mark.parametrize("prefix", [0, 4])
@pytest.mark.parametrize("rows", [[5], [7, 2, 2, 15], list(range(17)) * 2])
def test_selected_states_are_those_of_the_whole_pass(prefix, rows, tiny_base):
    """A few rows, one row twice, and more rows than are computed."""
    own = torch.arange(20, 20 + 17 - 2 * prefix)
    head = torch.arange(3, 3 + prefix)
    ids = torch.cat((head, own[:6], head, own[6:]))
    lengths, asked = [prefix + 6, 17 - prefix - 6], torch.tensor(rows)
    model = TrainableModel(tiny_base, "float32")
    found = layers.inject(model.tree, LoraSpec(rank=3), seed=1)
    for layer in found.values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.2)
    results = []
    for states in (model.hidden(ids, lengths)[asked], model.hidden(ids, lengths, asked)):
        model.tree.zero_grad()
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.tree.parameters() if p.requires_grad])
        results.append((states.detach(), gradient))
    (whole, wanted), (few, found_) = results
    assert torch.allclose(few, whole, atol=2e-5)
    assert (found_ - wanted).abs().max() < 1e-4 * wanted.abs().max()
