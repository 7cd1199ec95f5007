"""Adapters whose ranks cancel each other: the same update, of ranks that are rounded like any other's."""

from __future__ import annotations

import pytest
import torch

from adapters.weights import LoraWeights, LowRank
from server.kernels import choose
from server.kernels.cpu import unavailable
from server.kernels.recompress import BATCH, recompress
from tests.server.kernels.tiny import codes_of

PATH = "model.layers.{}.self_attn.q_proj"


def adapter(*modules: LowRank) -> LoraWeights:
    return LoraWeights("a", "f" * 64, {PATH.format(i): module for i, module in enumerate(modules)}, {})


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(rank: int = 4, width: int = 64, out: int = 48, seed: int = 0) -> LowRank:
    return LowRank(random(rank, width, seed=seed), random(out, rank, seed=seed + 1) * 0.01, 0.5)


def converted(rank: int = 4, width: int = 64, out: int = 48, seed: int = 0, step: float = 1e-3) -> LowRank:
    """As PEFT writes what began as a matrix's largest singular values: what was trained less what that was."""
    u, s, vh = torch.linalg.svd(random(out, width, seed=seed), full_matrices=False)
    a, b = s[:rank, None].sqrt() * vh[:rank], u[:, :rank] * s[:rank].sqrt()
    trained = a + step * random(rank, width, seed=seed + 1), b + step * random(out, rank, seed=seed + 2)
    return LowRank(torch.cat([trained[0], a]), torch.cat([trained[1], -b], 1), 2.0)


def update(module: LowRank) -> torch.Tensor:
    return module.B.double() @ module.A.double() * module.scale


def test_what_does_not_cancel_is_the_same_adapter() -> None:
    twice = LowRank(plain().A, plain().B, 1.0)
    zero = LowRank(torch.zeros(4, 64), torch.zeros(48, 4), 1.0)
    one = LowRank(torch.ones(1, 64), torch.ones(48, 1), 1.0)
    given = adapter(plain(), plain(8), twice, zero, one)
    assert recompress(given) is given


def test_only_modules_whose_ranks_cancel_are_written_anew() -> None:
    given = adapter(plain(8), converted(4, seed=5), plain(8, seed=3), converted(4, 80, seed=9))
    made = recompress(given)
    assert list(made.modules) == list(given.modules) and (made.name, made.digest) == (given.name, given.digest)
    for i, (path, before) in enumerate(given.modules.items()):
        after = made.modules[path]
        assert (after is before) == (i % 2 == 0)
        assert after.rank == before.rank and after.shape == before.shape
        assert torch.dist(update(after), update(before)) < 1e-3 * update(before).norm()


@pytest.mark.parametrize("scheme", ["int4", "none"])
@pytest.mark.parametrize("kernels", ["native", "aten"])
def test_what_is_rounded_is_as_exact_as_of_a_plain_adapter(kernels: str, scheme: str) -> None:
    if kernels == "native" and unavailable() is not None:
        pytest.skip(f"no native kernels: {unavailable()}")
    given = adapter(converted(), plain())
    prepared = choose(kernels, "cpu").prepare(given, scheme)
    for before, kept in zip(given.modules.values(), prepared.modules.values(), strict=True):
        exact, got = update(before), update(kept) if kept.units is None else of_codes(kept)
        assert torch.dist(got, exact) < 0.02 * exact.norm()


def of_codes(kept: LowRank) -> torch.Tensor:
    a, b = codes_of(kept)
    assert kept.units is not None
    return b.double() @ (kept.units.double()[:, None] * a.double()) * kept.scale


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_refused_is_left_to_who_refuses_it(value: float) -> None:
    broken = plain()
    broken.A[0, 0] = value
    given = adapter(broken, LowRank(torch.ones(3, 64), torch.ones(48, 2), 1.0))
    assert recompress(given) is given


def test_of_many_modules_of_one_shape_all_are_looked_at() -> None:
    """More than are looked at together, and the one that cancels is the last."""
    given = adapter(*(plain(8, seed=2 * i) for i in range(BATCH + 1)), converted(seed=99))
    made = recompress(given)
    changed = [path for path, module in given.modules.items() if made.modules[path] is not module]
    assert changed == [PATH.format(BATCH + 1)]


def test_two_ranks_may_cancel() -> None:
    given = adapter(converted(1))
    (module,) = recompress(given).modules.values()
    assert module is not given.modules[PATH.format(0)] and module.rank == 2


def test_ranks_that_cancel_are_found_in_float16() -> None:
    """Where their products are over what float16 holds."""
    module = converted(6, step=0.02)
    half = LowRank((module.A * 100).half(), (module.B * 100).half(), module.scale)
    after, untouched = recompress(adapter(half, plain())).modules.values()
    assert after.A.dtype == torch.float32 and after.rank == half.rank and untouched.rank == 4
    assert torch.dist(update(after), update(half)) < 1e-3 * update(half).norm()


@pytest.mark.parametrize(("share", "anew"), [(1 / 20, True), (1 / 13, False)])
def test_ranks_cancel_below_a_sixteenth(share: float, anew: bool) -> None:
    """Two of one direction, of which one is taken from the other: what is left is (1 - t)^2 of 1 + t^2."""
    t = next(t / 1000 for t in range(1000) if (1 - t / 1000) ** 2 / (1 + (t / 1000) ** 2) < share)
    a, b = random(1, 64, seed=0), random(48, 1, seed=1)
    given = adapter(LowRank(torch.cat([a, a]), torch.cat([b, -t * b], 1), 1.0))
    assert (recompress(given) is not given) == anew
