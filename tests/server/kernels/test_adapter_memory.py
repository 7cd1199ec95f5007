"""Adapters in one piece of memory."""

from __future__ import annotations

import math
import weakref
from pathlib import Path

import pytest
import torch

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels.adapter_memory import LINE, in_one_piece
from server.kernels.huge_pages import HUGE

PATH = "model.layers.{}.self_attn.q_proj"


def weights(layers: int, rank: int, width: int) -> LoraWeights:
    draw = torch.Generator().manual_seed(rank)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw).bfloat16()

    modules = {PATH.format(i): LowRank(random(rank, width), random(width, rank), 0.5) for i in range(layers)}
    return LoraWeights("a", "digest", modules, {})


def mapped(address: int) -> bool:
    """Whether an address is mapped in this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            return True
    return False


@pytest.mark.parametrize(("layers", "rank", "width"), [(2, 3, 37), (2, 16, 20_000)])
def test_matrices_are_copied_and_aligned(layers: int, rank: int, width: int) -> None:
    given = weights(layers, rank, width)
    kept = in_one_piece(given)
    first = kept.modules[PATH.format(0)].A
    assert first.untyped_storage().nbytes() < kept.nbytes + 4 * layers * LINE, "no room that is not needed"
    for path, module in given.modules.items():
        assert torch.equal(kept.modules[path].A, module.A) and torch.equal(kept.modules[path].B, module.B)
        assert kept.modules[path].A.data_ptr() % (2 * LINE) == kept.modules[path].B.data_ptr() % (2 * LINE) == 0
    if kept.nbytes >= HUGE:
        assert first.data_ptr() % HUGE == 0, "so that whole huge pages fit"


def test_memory_is_freed_with_the_adapter() -> None:
    kept = in_one_piece(weights(2, 16, 20_000))
    address = kept.modules[PATH.format(1)].B.data_ptr()
    gone = weakref.ref(kept.modules[PATH.format(0)].A)
    assert mapped(address)
    del kept
    assert gone() is None and not mapped(address)


@pytest.mark.parametrize("part", ["A", "B"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_values_that_are_not_finite_are_refused_with_their_module(part: str, value: float) -> None:
    given = weights(3, 3, 37)
    getattr(given.modules[PATH.format(1)], part)[2, 1] = value
    with pytest.raises(InvalidAdapter, match=r"layers\.1\.self_attn\.q_proj.*not finite in torch.bfloat16"):
        in_one_piece(given)


def test_values_that_overflow_bf16_are_refused() -> None:
    a, b = torch.zeros(2, 8), torch.zeros(8, 2)
    b[3, 1] = 3.4e38  # infinite in bf16
    given = LoraWeights("a", "digest", {PATH.format(0): LowRank(a, b, 1.0)}, {})
    with pytest.raises(InvalidAdapter, match="not finite"):
        in_one_piece(given)


def test_strides_and_dtypes_do_not_matter() -> None:
    given = weights(2, 3, 37)
    turned = {
        path: LowRank(m.A.float().t().contiguous().t(), m.B.float(), m.scale) for path, m in given.modules.items()
    }
    kept = in_one_piece(LoraWeights("a", "digest", turned, {}))
    for path, module in given.modules.items():
        assert torch.equal(kept.modules[path].A, module.A) and kept.modules[path].A.is_contiguous()
        assert torch.equal(kept.modules[path].B, module.B) and kept.modules[path].B.t().is_contiguous()
