"""What counts as noise: a first difference, where both have the same prefix, beside the differences of that step."""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks import gpu_answers
from server.engine.backends.torch.runner import TorchRunner
from server.kernels.cuda import Cuda
from server.kernels.reference import Reference
from server.model.loader import Base
from server.model.quantization import quantize

Told = dict[str, tuple[Any, ...]]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
LOOSE = gpu_answers.NOISE_RMS if DEVICE.type == "cuda" else 1e-4


def bench_of(told: Told, folders: list[Path]) -> Any:
    def tell(name: str, *values: Any, **more: Any) -> None:
        told[name] = values

    return SimpleNamespace(
        check=True, device=DEVICE, backend=Cuda(FLOAT), folders=folders, tell=tell, is_last=False, cut_off=math.inf
    )


@pytest.fixture
def four_bits(tiny_base: Base) -> Base:
    tables = tiny_base.config.table_shapes()
    stored = {
        path: quantize(weight.tensors["codes"], "int8" if path in tables else "int4", name=path)
        for path, weight in tiny_base.weights.items()
    }
    return replace(tiny_base, weights=stored, backend=Reference())


def packed_for(base: Base, backend: Any) -> Base:
    packed = {path: backend.pack(weight) for path, weight in base.weights.items()}
    return replace(base, weights=packed, backend=backend)


def test_answers_of_the_kernels_are_those_of_the_reference(
    four_bits: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_answers, "load_base", lambda folder, name, backend: packed_for(four_bits, backend))
    monkeypatch.setattr(gpu_answers, "FORMS", ("of {}",))
    monkeypatch.setattr(gpu_answers, "SUBJECTS", ("rain",))
    told: Told = {}
    gpu_answers.answers(bench_of(told, [tmp_path]))
    assert told[gpu_answers.CLAIM] == (1, 1, True)
    assert told["differences of the logits, rms, of their deviation"][0] < LOOSE


def test_without_a_base_the_claim_is_not_measured() -> None:
    told: Told = {}
    gpu_answers.answers(bench_of(told, []))
    assert told[gpu_answers.CLAIM][0].startswith("not measured")


def test_one_pass_finds_what_the_reference_would_have_answered(four_bits: Base) -> None:
    """Its weights dequantized once: the same to the bit."""
    once = gpu_answers._dequantized(four_bits)
    runners = [TorchRunner(base, 2, 1) for base in (four_bits, once)]
    for runner in runners:
        runner.allocate(8, gpu_answers.BLOCK)
    prompts = [[5, 6, 7], [9, 8]]
    said: list[Any] = [list(gpu_answers._generated(runner, prompts, 2, 1, 6)) for runner in runners]  # type: ignore[arg-type]
    for (prompt, tokens, logits), (_, same, equal) in zip(*said, strict=True):
        assert tokens == same and torch.equal(logits, equal)
        exact = gpu_answers._reference_logits(runners[1], prompt, tokens, 1)
        torch.testing.assert_close(exact, logits, rtol=1e-4, atol=1e-4)
        assert gpu_answers._compared(tokens, logits, exact).margin is None


def compared(margin: float, noise: float) -> gpu_answers.Compared:
    """Of three tokens, the second of which differs by that margin; what follows it has another prefix."""
    exact = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 400)).astype(np.float32)) * 2
    logits = exact + noise * torch.from_numpy(np.random.default_rng(2).normal(size=(3, 400)).astype(np.float32))
    best = int(exact[1].argmax())
    other = (best + 1) % 400
    exact[1, other] = exact[1, best] - margin
    logits[1, other] = logits[1, best] + 0.001
    logits[2] = 1e3
    return gpu_answers._compared(logits.argmax(1).tolist(), logits, exact)


@pytest.mark.parametrize(
    ("margin", "noise", "fine"),
    [(0.02, 0.02, True), (0.5, 0.02, False), (0.02, 0.5, False)],
    ids=["noise", "one far token", "all far"],
)
def test_a_difference_is_noise_if_the_others_are_as_large_and_all_are_small(
    margin: float, noise: float, fine: bool
) -> None:
    told: Told = {}
    gpu_answers._send_tables(bench_of(told, []), [compared(margin, noise)], 1)
    assert told[gpu_answers.CLAIM] == (int(fine), 1, fine)
    assert told["greedy answers equal"] == (0,)
    assert told["greedy answers whose first difference is noise"] == (int(fine),)


def test_too_few_answers_meet_nothing() -> None:
    told: Told = {}
    same = gpu_answers.Compared(None, 0.0, 1.0)
    gpu_answers._send_tables(bench_of(told, []), [same] * 3, 4)
    assert told[gpu_answers.CLAIM] == (3, 4, False)


def test_the_clock_is_looked_at_after_each_answer(
    four_bits: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there by then is told, and is not the claim. Where nothing else is to come, it has all the time."""
    monkeypatch.setattr(gpu_answers, "load_base", lambda folder, name, backend: packed_for(four_bits, backend))
    monkeypatch.setattr(gpu_answers, "FORMS", ("of {}",))
    monkeypatch.setattr(gpu_answers, "SUBJECTS", ("rain", "ants"))
    one = torch.eye(4)[:1]
    runner = SimpleNamespace(allocate=lambda blocks, size: None, release=lambda: None)
    monkeypatch.setattr(gpu_answers, "CudaRunner", lambda *_, **options: runner)
    monkeypatch.setattr(gpu_answers, "_generated", lambda runner, prompts, *_: ((ids, [0], one) for ids in prompts))
    monkeypatch.setattr(gpu_answers, "_reference_logits", lambda *_: one)
    for limit, is_last, cut_off, compared_in_time in (
        (0.0, False, math.inf, 1), (1e3, False, math.inf, 2), (1e3, False, 0.0, 1),
        (0.0, True, math.inf, 2), (1e3, True, 0.0, 1),
    ):  # fmt: skip
        monkeypatch.setattr(gpu_answers, "LIMIT_SECONDS", limit)
        told: Told = {}
        bench = bench_of(told, [tmp_path])
        bench.check, bench.is_last, bench.cut_off = False, is_last, cut_off
        gpu_answers.answers(bench)
        assert told["greedy answers compared"] == (compared_in_time,)
        assert told[gpu_answers.CLAIM] == (compared_in_time, 2, compared_in_time == 2)

    left = [one]
    monkeypatch.setattr(gpu_answers, "_reference_logits", lambda *_: left.pop() if left else sys.exit(1))
    told = {}
    bench = bench_of(told, [tmp_path])
    bench.check = False
    with pytest.raises(SystemExit):
        gpu_answers.answers(bench)
    assert told[gpu_answers.CLAIM] == (1, 2, False), "what is cut off has compared some"
