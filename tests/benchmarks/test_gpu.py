"""What is known is written down, whatever fails after it; and what is counted is what is there."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks import gpu, gpu_kernels, gpu_load
from benchmarks.gpu_base import Kind, _linear, random_adapters
from server.kernels.cuda import Cuda, packing, products
from server.kernels.lora import SITES
from server.model.config import from_hf


def test_a_model_that_cannot_be_made_leaves_the_ceilings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And everything else is told to have failed, not left out."""

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("the card is too small")

    monkeypatch.setattr(gpu, "CudaRunner", fails)
    target = tmp_path / "told.json"
    assert gpu.main(["--check", "--json", str(target), "--only", "decode", "load"]) == 1
    told = {row["name"]: row for row in json.loads(target.read_text())["results"]}
    assert told["bandwidth, GB/s"]["value"] > 0 and told["bandwidth, GB/s"]["copied"] > 0
    assert told["model"]["value"] == "failed: OutOfMemoryError"
    assert told["decode"]["value"] == told["load"]["value"] == "failed: RuntimeError"


def test_what_begins_too_late_is_left_out_and_the_rest_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder that is made for it; claims stand below what is told of single kernels."""
    late = iter([False, False, False, True])
    monkeypatch.setattr(gpu.Bench, "is_late", property(lambda bench: next(late)))
    sections = {
        "model": lambda bench: setattr(bench, "made", True),
        "memory": lambda bench: bench.tell("base", 1),
        "kernels": lambda bench: bench.tell("qkv", 2),
    }
    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS | sections)
    target = tmp_path / "new" / "told.json"
    assert gpu.main(["--check", "--json", str(target), "--only", "memory", "kernels"]) == 1
    told = {row["name"]: row for row in json.loads(target.read_text())["results"]}
    assert told["base"]["value"] == 1 and told["kernels"]["value"] == "failed: TimeoutError"
    assert not told["kernels"]["met"]
    table = capsys.readouterr().out.partition("what ")[2]
    assert table.index("kernels") < table.index("bandwidth") < table.index("base")


def test_answers_come_before_what_takes_long() -> None:
    order = list(gpu.SECTIONS)
    assert order[0] == "ceilings" and order.index("answers") < min(map(order.index, ("load", "cliff", "peers")))


def test_a_kind_of_adapters_is_what_is_made_and_counted() -> None:
    config = from_hf(gpu.TINY)
    for kind in (Kind(4), Kind(2, SITES[:4])):
        [weights] = random_adapters(config, Cuda(torch.float32), 1, kind)
        assert {path.rpartition(".")[2] for path in weights.modules} == set(kind.linears)
        assert sum(update.A.numel() + update.B.numel() for update in weights.modules.values()) == kind.values(config)
    assert str(kind) == "rank 2 on q_proj, k_proj, v_proj, o_proj"


def test_a_random_base_has_weights_around_nothing() -> None:
    """Else every product is the sum of its inputs, and all rows are soon the same."""
    torch.manual_seed(0)
    weights = packing.dequantize(_linear((512, 512), torch.device("cpu"))) * 512**0.5
    assert abs(weights.mean()) < 0.02 and 1.3 < weights.std() < 1.6


def test_distinct_adapters_are_those_of_neighbours() -> None:
    assert gpu_load._distinct([0, 0, 1, 2], 2) == pytest.approx((1 + 2 + 2) / 3)
    assert gpu_load._distinct([3, 3], 8) == 1


def test_products_are_timed_both_ways_and_as_they_were_afterwards() -> None:
    before = products.DENSE_ROWS
    with pytest.raises(ValueError), gpu_kernels._dense_from(65):
        assert products.DENSE_ROWS == 65
        raise ValueError
    assert products.DENSE_ROWS == before
