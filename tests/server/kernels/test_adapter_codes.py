"""int8 adapters of the native kernels: accuracy, independence of ranks, refused values."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels.cpu import unavailable
from tests.server.kernels.tiny import codes_of

pytestmark = pytest.mark.skipif(unavailable() is not None, reason=f"no native kernels: {unavailable()}")

PATH = "model.layers.{}.self_attn.q_proj"


def encoded(*modules: LowRank) -> list[LowRank]:
    from server.kernels.cpu.adapter_codes import encoded

    made = encoded(LoraWeights("a", "digest", {PATH.format(i): m for i, m in enumerate(modules)}))
    return list(made.modules.values())


def random(rank: int, width: int, out: int, seed: int = 0) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, width, generator=draw), torch.randn(out, rank, generator=draw), 0.5)


def peaks(update: LowRank) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest magnitude of each rank, [rank, 1] of A and [1, rank] of B, float64."""
    return update.A.double().abs().amax(1, keepdim=True), update.B.double().abs().amax(0, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("rank", "width", "out"), [(1, 37, 5), (3, 64, 576), (12, 40, 16), (17, 100, 33), (64, 31, 1)])
def test_codes_are_off_by_half_a_scale_at_most(dtype: torch.dtype, rank: int, width: int, out: int) -> None:
    values = random(rank, width, out)
    given = LowRank(values.A.to(dtype), values.B.to(dtype), values.scale)
    (kept,) = encoded(given)
    assert kept.A.dtype == kept.B.dtype == torch.uint8 and kept.scale == 0.5 and kept.shape == (out, width)
    assert kept.units is not None and kept.units.shape == (rank,)
    of_a, of_b = peaks(given)
    a, b = codes_of(kept)
    for codes, exact, peak in ((a, given.A, of_a), (b, given.B, of_b)):
        assert ((codes.double() * peak / 127 - exact.double()).abs() <= peak / 254 * 1.0001).all()
        assert int(codes.min()) >= -127
    assert (a.abs().amax(1) == 127).all() and (b.abs().amax(0) == 127).all()
    assert int((kept.B.long() - 128).abs().sum()) == int(b.abs().sum()), "what fills the tiles is zero"
    torch.testing.assert_close(
        kept.units.double(), (of_a.flatten() / 127) * (of_b.flatten() / 127), rtol=1e-6, atol=0.0
    )


def test_strides_do_not_matter() -> None:
    given = random(5, 40, 24)
    turned = LowRank(given.A.t().contiguous().t(), given.B.t().contiguous().t(), given.scale)
    plain, other = encoded(given, turned)
    assert torch.equal(plain.A, other.A) and torch.equal(plain.B, other.B)
    assert plain.units is not None and other.units is not None and torch.equal(plain.units, other.units)


def test_encoding_is_idempotent() -> None:
    given = random(8, 96, 48)
    (once,) = encoded(given)
    of_a, of_b = peaks(given)
    a, b = codes_of(once)
    (twice,) = encoded(LowRank((a * of_a / 127).float(), (b * of_b / 127).float(), 0.5))
    assert torch.equal(once.A, twice.A) and torch.equal(once.B, twice.B)


def test_codes_of_a_rank_do_not_depend_on_other_ranks() -> None:
    """So a mix and the composed adapter have the same codes."""
    small, large = random(3, 64, 40, seed=1), random(5, 64, 40, seed=2)
    large = LowRank(large.A * 1000, large.B * 1000, 0.5)
    beside = LowRank(torch.cat([small.A, large.A]), torch.cat([small.B, large.B], 1), 0.5)
    first, second, both = (codes_of(kept) for kept in encoded(small, large, beside))
    assert torch.equal(both[0], torch.cat([first[0], second[0]]))
    assert torch.equal(both[1], torch.cat([first[1], second[1]], 1))


def test_tiny_ranks_are_zero() -> None:
    given = random(4, 48, 32)
    given.A[1] = 0.0
    given.B[:, 2] = 0.0
    given.A[3] *= 1e-37
    (kept,) = encoded(given)
    assert kept.units is not None
    assert kept.units[0] > 0 and not kept.units[1:].any()
    a, b = codes_of(kept)
    assert not a[1].any() and not b[:, 2].any() and not a[3].any()


def test_a_module_of_rank_0_is_int8() -> None:
    from server.kernels.cpu.adapter_layout import adapter_layout

    given = random(3, 16, 16), LowRank(torch.zeros(0, 16), torch.zeros(16, 0), 1.0)
    made = dict(enumerate(encoded(*given)))
    kept = adapter_layout(LoraWeights("a", "digest", {PATH.format(i): m for i, m in made.items()}))
    assert kept.modules["rank"].tolist() == [3, 0] and kept.formats == {True}


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused_with_their_module(part: str, value: float) -> None:
    given = [random(3, 37, 20, seed=i) for i in range(3)]
    getattr(given[1], part)[2, 1] = value
    with pytest.raises(InvalidAdapter, match=r"layers\.1\.self_attn\.q_proj.*not finite"):
        encoded(*given)


def test_factors_of_different_ranks_are_refused() -> None:
    few, many = random(2, 16, 24), random(5, 16, 24)
    for a, b in ((few.A, many.B), (many.A, few.B)):
        with pytest.raises(ValueError, match=r"the update of model\.layers\.0\.self_attn\.q_proj is"):
            encoded(LowRank(a, b, 1.0))


def test_scales_that_overflow_are_refused() -> None:
    given = random(2, 16, 16)
    with pytest.raises(InvalidAdapter, match="too large"):
        encoded(LowRank(given.A * 1e25, given.B * 1e25, 1.0))
