"""int8 adapters for the GPU: accuracy, memory layout, refused values."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels.cuda import Cuda, adapter_codes
from tests.server.kernels.tiny import adapter, llama

CONFIG = llama(
    vocab_size=61, hidden_size=40, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=20, max_position_embeddings=64,
)  # fmt: skip


def one(a: torch.Tensor, b: torch.Tensor) -> LoraWeights:
    return LoraWeights("a", "0" * 64, {"model.layers.0.self_attn.q_proj": LowRank(a, b, 0.5)})


def test_codes_are_off_by_half_a_scale_at_most() -> None:
    given = adapter(CONFIG, 3, 5)
    kept = adapter_codes.encoded(given, pinned=False)
    assert kept.modules.keys() == given.modules.keys() and kept.digest == given.digest
    for path, update in given.modules.items():
        found = kept.modules[path]
        assert found.units is not None and found.shape == update.shape and found.scale == update.scale
        assert found.A.dtype == found.B.dtype == torch.int8
        in_a, in_b = update.A.abs().amax(1) / 127, update.B.abs().amax(0) / 127
        torch.testing.assert_close(found.units, in_a * in_b)
        assert ((found.A.float() * in_a[:, None] - update.A).abs() <= in_a[:, None] * 0.501).all()
        assert ((found.B.float() * in_b - update.B).abs() <= in_b * 0.501).all()
        assert found.A.abs().max() == found.B.abs().max() == 127


def test_matrices_are_aligned_in_one_tensor() -> None:
    given = adapter(CONFIG, 3, 5)
    kept = adapter_codes.encoded(given, pinned=False)
    begin = next(iter(kept.modules.values())).A.untyped_storage().data_ptr()
    for update in kept.modules.values():
        assert update.units is not None and update.A.is_contiguous() and update.B.t().is_contiguous()
        for part in (update.A, update.B, update.units):
            assert part.untyped_storage().data_ptr() == begin and (part.data_ptr() - begin) % adapter_codes.LINE == 0
    values = sum(update.A.numel() + update.B.numel() for update in given.modules.values())
    assert values < kept.nbytes < 2 * values, "half of bf16"


def test_truncating_ranks_changes_no_code() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(6, 40, generator=generator), torch.randn(24, 6, generator=generator)
    whole, part = (adapter_codes.encoded(one(a[:n], b[:, :n]), pinned=False) for n in (6, 2))
    (first,), (second,) = whole.modules.values(), part.modules.values()
    assert torch.equal(first.A[:2], second.A) and torch.equal(first.B[:, :2], second.B)
    assert first.units is not None and second.units is not None and torch.equal(first.units[:2], second.units)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_all_float_dtypes_and_a_rank_of_zeros(dtype: torch.dtype) -> None:
    a, b = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=dtype), torch.tensor([[4.0, 1.0]], dtype=dtype)
    (found,) = adapter_codes.encoded(one(a, b), pinned=False).modules.values()
    assert found.A.tolist() == [[64, -127], [0, 0]] and found.B.tolist() == [[127, 127]]
    assert found.units is not None and found.units.tolist() == pytest.approx([2 * 4 / 127**2, 0.0])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
@pytest.mark.parametrize("part", ["A", "B"])
def test_values_that_are_not_finite_or_too_large_are_refused(value: float, part: str) -> None:
    a, b = torch.full((1, 4), 1e5), torch.full((3, 1), 1e5)
    (a if part == "A" else b)[0, 0] = value
    with pytest.raises(InvalidAdapter, match="not finite, or too large"):
        adapter_codes.encoded(one(a, b), pinned=False)


def test_adapters_of_a_bf16_base_are_bf16() -> None:
    given = adapter(CONFIG, 3, 5)
    for scheme, dtype in (("none", torch.bfloat16), ("int4", torch.int8), ("nf4", torch.int8)):
        kept = Cuda().prepare(given, scheme)
        assert {update.A.dtype for update in kept.modules.values()} == {dtype}
