"""Adapters whose ranks cancel are recompressed without changing the update."""

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
    """The form in which PEFT writes a PiSSA adapter: trained factors minus initial ones."""
    u, s, vh = torch.linalg.svd(random(out, width, seed=seed), full_matrices=False)
    a, b = s[:rank, None].sqrt() * vh[:rank], u[:, :rank] * s[:rank].sqrt()
    trained = a + step * random(rank, width, seed=seed + 1), b + step * random(out, rank, seed=seed + 2)
    return LowRank(torch.cat([trained[0], a]), torch.cat([trained[1], -b], 1), 2.0)


def update(module: LowRank) -> torch.Tensor:
    return module.B.double() @ module.A.double() * module.scale


def test_adapters_that_do_not_cancel_are_unchanged() -> None:
    twice = LowRank(plain().A, plain().B, 1.0)
    zero = LowRank(torch.zeros(4, 64), torch.zeros(48, 4), 1.0)
    one = LowRank(torch.ones(1, 64), torch.ones(48, 1), 1.0)
    given = adapter(plain(), plain(8), twice, zero, one)
    assert recompress(given) is given


def test_only_cancelling_modules_are_recompressed() -> None:
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
def test_a_recompressed_adapter_is_as_accurate_as_others(kernels: str, scheme: str) -> None:
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
def test_invalid_adapters_are_left_unchanged(value: float) -> None:
    broken = plain()
    broken.A[0, 0] = value
    given = adapter(broken, LowRank(torch.ones(3, 64), torch.ones(48, 2), 1.0))
    assert recompress(given) is given


def test_all_modules_of_one_shape_are_checked() -> None:
    """More modules than fit in a batch; the last one cancels."""
    given = adapter(*(plain(8, seed=2 * i) for i in range(BATCH + 1)), converted(seed=99))
    made = recompress(given)
    changed = [path for path, module in given.modules.items() if made.modules[path] is not module]
    assert changed == [PATH.format(BATCH + 1)]


def test_two_ranks_can_cancel() -> None:
    given = adapter(converted(1))
    (module,) = recompress(given).modules.values()
    assert module is not given.modules[PATH.format(0)] and module.rank == 2


def test_cancelling_ranks_are_found_in_float16() -> None:
    """With products that overflow float16."""
    module = converted(6, step=0.02)
    half = LowRank((module.A * 100).half(), (module.B * 100).half(), module.scale)
    after, untouched = recompress(adapter(half, plain())).modules.values()
    assert after.A.dtype == torch.float32 and after.rank == half.rank and untouched.rank == 4
    assert torch.dist(update(after), update(half)) < 1e-3 * update(half).norm()


@pytest.mark.parametrize(("share", "recompressed"), [(1 / 20, True), (1 / 13, False)])
def test_the_threshold_is_one_sixteenth(share: float, recompressed: bool) -> None:
    """Two ranks of one direction, subtracted from each other."""
    t = next(t / 1000 for t in range(1000) if (1 - t / 1000) ** 2 / (1 + (t / 1000) ** 2) < share)
    a, b = random(1, 64, seed=0), random(48, 1, seed=1)
    given = adapter(LowRank(torch.cat([a, a]), torch.cat([b, -t * b], 1), 1.0))
    assert (recompress(given) is not given) == recompressed
