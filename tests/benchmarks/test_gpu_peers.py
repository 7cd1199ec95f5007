"""The peers are of our shape, all in bf16; one that is not there is told."""

from __future__ import annotations

import importlib.util
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if os.environ.get("REQUIRE_ALL") != "1" and any(
    importlib.util.find_spec(name) is None for name in ("triton", "transformers", "peft")
):
    pytest.skip("Triton, Transformers or PEFT is not installed", allow_module_level=True)

from benchmarks import gpu, gpu_peers
from benchmarks.gpu_base import Kind
from server.model.config import from_hf


def bench_of(told: dict[str, Any]) -> Any:
    return SimpleNamespace(
        rows=2, context=5, shape=gpu.TINY, config=from_hf(gpu.TINY), kinds=(Kind(4),), device=torch.device("cpu"),
        is_late=False, running_seconds=None, mixed_step_seconds=lambda seconds, kind: 1e-6, wait=lambda: None,
        tell=lambda name, value, target=None, met=None, **more: told.update({name: (value, target, met)}),
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_a_peer_decodes_its_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_peers, "KINDS", {"bf16": ("transformers", "peft"), "other": ("no_such_module",)})
    told: dict[str, Any] = {}
    gpu_peers.peers(bench_of(told))
    value, target, met = told["decode of 2 mixed requests over Transformers + PEFT bf16"]
    assert value > 10 == target and met
    assert told["decode of 2 mixed requests over Transformers + PEFT other"] == (
        "not measured: no_such_module cannot be imported (ModuleNotFoundError)", None, None
    )  # fmt: skip
    assert torch.get_default_dtype() == torch.float32
    late = bench_of(told)
    late.is_late = True
    gpu_peers.peers(late)
    assert told["decode of 2 mixed requests over Transformers + PEFT bf16"] == (
        "not measured: the time is over", 10, False
    )  # fmt: skip


def test_a_peer_is_measured_once_where_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """One difference is a figure, and two more would leave no time for what comes after it."""
    asked: list[int] = []

    def seconds(bench: Any, model: Any, prompt: torch.Tensor, count: int) -> float:
        asked.append(count)
        return float(count)

    monkeypatch.setattr(gpu_peers, "_model", lambda bench, weights: None)
    monkeypatch.setattr(gpu_peers, "_seconds", seconds)
    bench = bench_of({})
    for late, differences in ((False, gpu_peers.DIFFERENCES), (True, 1)):
        asked.clear()
        bench.is_late = late
        assert gpu_peers._tokens_a_second(bench, "bf16") == 2
        assert asked == [2] + [2 + gpu_peers.TOKENS, 2] * differences


def test_a_peer_that_fails_does_not_keep_the_next_from_being_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def tokens_a_second(bench: Any, kind: str) -> float:
        if kind == "bf16":
            raise RuntimeError("no kernel image")
        return 10.0

    monkeypatch.setattr(gpu_peers, "_missing", lambda names: None)
    monkeypatch.setattr(gpu_peers, "_tokens_a_second", tokens_a_second)
    told: dict[str, Any] = {}
    bench = bench_of(told)
    bench.tell = lambda name, *values, **more: told.update({name: (*values, more.get("reason", ""))})
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu_peers.peers(bench)
    name = "decode of 2 mixed requests over Transformers + PEFT"
    *failed, reason = told[f"{name} bf16"]
    assert failed == ["failed: RuntimeError", 10, False] and reason.endswith("no kernel image\n")
    assert told[f"{name} bitsandbytes"] == (200_000.0, None, None, "")


@pytest.mark.filterwarnings("ignore")
def test_all_that_a_peer_computes_with_is_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT makes its matrices float32 beside weights that are codes."""

    def as_codes(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.to(torch.uint8), requires_grad=False)

    monkeypatch.setattr(gpu_peers, "_into_four_bits", as_codes)
    for weights in ("bf16", "bitsandbytes"):
        wrapped = gpu_peers._model(bench_of({}), weights)
        adapters = {name: p.dtype for name, p in wrapped.named_parameters() if "lora_" in name}
        assert len(adapters) == 2 * 7 * 2 and set(adapters.values()) == {torch.bfloat16}
