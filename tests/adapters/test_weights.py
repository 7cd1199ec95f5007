"""Values of adapters."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.weights import LoraWeights, LowRank, not_finite


def update(dtype: torch.dtype, rank: int = 3) -> LowRank:
    largest = torch.finfo(dtype).max
    a, b = torch.full((rank, 40), largest, dtype=dtype), torch.full((24, rank), -largest, dtype=dtype)
    return LowRank(a, b.t().contiguous().t(), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_with_a_value_that_is_not_finite_is_found(dtype: torch.dtype) -> None:
    """Wherever it is, and among the largest values that there are."""
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


def test_codes_are_counted_and_have_no_update_that_others_could_read() -> None:
    a, b = torch.zeros(8 * 32, dtype=torch.uint8), torch.zeros(1, 1, 16, 4, dtype=torch.uint8)
    weights = LoraWeights("a", "digest", {"p": LowRank(a, b, 0.5, torch.tensor([0.25, 2.0]), (7, 3))})
    assert weights.ranks == [2] and weights.nbytes == 8 * 32 + 64 + 4 * 2 and weights.modules["p"].shape == (7, 3)
    with pytest.raises(ValueError, match="p is in codes"):
        weights.delta("p")
