"""A frozen matrix as a module: its product, its gradient, and a LoRA trained over it in a second tree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from adapters.layers import LoraSpec, extract, inject
from server.kernels import choose, cpu
from server.kernels.cuda import Cuda
from server.model import linear
from server.model.attention import Context, PackedAttention
from server.model.decoder import Decoder
from server.model.linear import Linear
from server.model.quantization import quantize

if TYPE_CHECKING:
    from server.engine.backends.torch.runner import TorchRunner
    from server.model.loader import Base


NATIVE = pytest.param("native", marks=pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels"))


@pytest.mark.parametrize("kernels", ["reference", "aten"])
@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8", "none"])
def test_the_input_gradient_uses_the_dequantized_matrix(
    scheme: str, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "BLOCK_BYTES", 1)  # several blocks
    generator = torch.Generator().manual_seed(2)
    backend = choose(kernels)
    matrix, bias = torch.randn(208, 64, generator=generator), torch.randn(208, generator=generator)
    module = Linear("m", backend.pack(quantize(matrix, scheme, 32)), bias, backend)
    dense = backend.dequantize(module.weight)
    x, theirs = (torch.randn(5, 64, generator=generator.manual_seed(3)).requires_grad_() for _ in range(2))
    y, expected = module(x), theirs @ dense.t() + bias
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    for out in (y, expected):
        out.square().sum().backward()
    torch.testing.assert_close(x.grad, theirs.grad, atol=1e-2, rtol=1e-5)
    assert not list(module.parameters())

    update = torch.randn(5, 208, generator=generator).requires_grad_()
    given, theirs = (value.detach().clone().requires_grad_() for value in (x, x))
    y, expected = module.onto(update, given), theirs @ dense.t() + bias + update
    torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    ours, other = (torch.autograd.grad(out.square().sum(), inputs) for out, inputs in
                   ((y, (given, update)), (expected, (theirs, update))))  # fmt: skip
    torch.testing.assert_close(ours, other, atol=1e-2, rtol=1e-5)
    (alone,) = torch.autograd.grad(module.onto(update, x.detach()).square().sum(), (update,))
    torch.testing.assert_close(alone, other[1], atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "aten", NATIVE, "cuda"])
@pytest.mark.parametrize("scheme", ["int4", "nf4", "none"])
@pytest.mark.parametrize("rows", [64, 256])
def test_small_updates_are_not_rounded_away(scheme: str, kernels: str, rows: int) -> None:
    """In bf16, where a product that is rounded before it is added would swallow it."""
    generator = torch.Generator().manual_seed(2)
    backend = Cuda(torch.bfloat16) if kernels == "cuda" else choose(kernels)
    bias = torch.linspace(-1, 1, 256)
    module = Linear("m", backend.pack(quantize(torch.randn(256, 64, generator=generator), scheme, 32)), bias, backend)
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    update = (1e-2 * torch.randn(rows, 256, generator=generator)).bfloat16()
    plain = backend.linear(module.weight, x.float()) + bias
    assert update.abs().mean() < 2**-9 * plain.abs().mean()
    with torch.no_grad():
        y = module.onto(update, x)
    assert y.dtype == x.dtype
    found = y.float() - plain
    assert (found * update).sum() / update.float().square().sum() == pytest.approx(1, abs=0.15)


def test_training_leaves_the_serving_decoder_unchanged(tiny_base: Base, tiny_runner: TorchRunner) -> None:
    serving, tree = Decoder(tiny_base), Decoder(tiny_base)
    layers = inject(tree, LoraSpec(rank=4, alpha=8.0), seed=1)
    assert set(layers) == set(tiny_base.shapes())
    attention = PackedAttention([7, 3])
    ids = torch.arange(10) + 20
    context = Context(attention.positions, attention)
    with torch.no_grad():
        before = serving.logits(serving(serving.embed(ids), context))

    def loss() -> torch.Tensor:
        logits = tree.logits(tree(tree.embed(ids), context))
        return torch.nn.functional.cross_entropy(logits, ids.roll(-1))

    optimizer = torch.optim.AdamW(tree.parameters(), lr=1e-2)
    first = loss()
    torch.testing.assert_close(tree.logits(tree(tree.embed(ids), context)), before)  # B begins at zero
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss() < first - 0.5
    with torch.no_grad():
        assert torch.equal(serving.logits(serving(serving.embed(ids), context)), before)
        trained = tree.logits(tree(tree.embed(ids), context))
    # What was trained is what is served.
    from server.engine.batch import Batch

    tiny_runner.load_adapter(3, tiny_base.prepare(extract(tree, "trained")))
    served = tiny_runner.run(
        Batch(
            tokens=ids.numpy(),
            positions=attention.positions.numpy(),
            row_start=np.array([0, 7, 10], np.int32),
            context=np.array([7, 3], np.int32),
            blocks=np.array([[5], [2]], np.int32),
            logit_rows=np.arange(10),
            mixes=(((3, 1.0),), ((3, 1.0),)),
        )
    ).rows
    torch.testing.assert_close(served, trained, atol=1e-4, rtol=0)
