"""Content digests, checks for NaN and infinity, and canonical mixes."""

from __future__ import annotations

import hashlib
import itertools
import json
import math

import pytest
import torch

from adapters.errors import InvalidChoice
from adapters.weights import (
    CHUNK,
    LoraWeights,
    LowRank,
    Version,
    all_finite_in,
    canonical_mix,
    content_digest,
    not_finite,
)


def update(dtype: torch.dtype, rank: int = 3) -> LowRank:
    largest = torch.finfo(dtype).max
    a, b = torch.full((rank, 40), largest, dtype=dtype), torch.full((24, rank), -largest, dtype=dtype)
    return LowRank(a, b.t().contiguous().t(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_with_nan_or_infinity_is_found(dtype: torch.dtype) -> None:
    modules = {"p": update(torch.float32), "q": update(dtype), "r": update(dtype, 0), "s": update(dtype)}
    assert not_finite(modules) is None and not_finite({}) is None
    for value in (math.nan, math.inf, -math.inf):
        for path, part in (("p", "A"), ("q", "B"), ("s", "A"), ("s", "B")):
            matrix = getattr(modules[path], part)
            for row, column in ((0, 0), (1, 2), (-1, -1)):
                before = matrix[row, column].item()
                matrix[row, column] = value
                assert not_finite(modules) == (path, part)
                matrix[row, column] = before
    assert not_finite(modules) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", [0, 5, CHUNK - 1, CHUNK, 2 * CHUNK + 6])
def test_a_buffer_with_nan_or_infinity_is_found(dtype: torch.dtype, at: int) -> None:
    limits = torch.finfo(dtype)
    values = torch.tensor([limits.max, limits.min, limits.tiny, -0.0, 0.0, 1.0, -1.0], dtype=dtype)
    values = values.repeat(2 * CHUNK // 7 + 2)[: 2 * CHUNK + 7]
    assert all_finite_in(memory(values), dtype) and all_finite_in(b"", dtype)
    for value in (math.nan, -math.nan, math.inf, -math.inf):
        wrong = values.clone()
        wrong[at] = value
        assert not all_finite_in(memory(wrong), dtype)


def memory(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes()


def test_the_digest_covers_names_dtypes_shapes_and_bytes() -> None:
    """Stored digests depend on it; strides and sizes must not matter."""
    draw = torch.Generator().manual_seed(3)
    large = torch.randn(300, CHUNK // 256, generator=draw)
    tensors = {
        "z": large.half().t(),
        "b": torch.randn(3, 5, generator=draw).bfloat16().requires_grad_(),
        "a": large[:, ::2],
        "none": torch.zeros(0, 4),
        "c": torch.zeros(7, 1),
    }
    config = {"scale": {"ü": 0.5, "a": 2}}
    expected = json.dumps(config, sort_keys=True, separators=(",", ":")).encode()
    for name in sorted(tensors):
        kept = tensors[name].detach().clone(memory_format=torch.contiguous_format)
        expected += f"\n{name}\n{kept.dtype}\n{tuple(kept.shape)}\n".encode() + memory(kept.reshape(-1))
    assert content_digest(config, tensors) == hashlib.sha256(expected).hexdigest()


def test_quantized_weights_have_sizes_and_no_delta() -> None:
    a, b = torch.zeros(8 * 32, dtype=torch.uint8), torch.zeros(1, 1, 16, 4, dtype=torch.uint8)
    weights = LoraWeights("a", "digest", {"p": LowRank(a, b, 0.5, torch.tensor([0.25, 2.0]), (7, 3))})
    assert weights.ranks == [2] and weights.nbytes == 8 * 32 + 64 + 4 * 2 and weights.modules["p"].shape == (7, 3)
    with pytest.raises(ValueError, match="p is quantized"):
        weights.delta("p")


def test_weights_of_equal_content_add_up_in_any_order() -> None:
    digest = "a" * 64
    for weights in itertools.permutations((16.0, 16.0, -16.0)):
        named = [(Version(f"n{i}", digest), weight) for i, weight in enumerate(weights)]
        assert canonical_mix(named, 8).entries == ((digest, 16.0),)
    with pytest.raises(InvalidChoice, match="not 32"):
        canonical_mix([(Version("n0", digest), 16.0), (Version("n1", digest), 16.0)], 8)
