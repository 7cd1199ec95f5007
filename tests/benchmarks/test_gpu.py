"""GPU checklist: sections and results, in Triton's interpreter without a GPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)


from benchmarks.gpu import answers, checklist, load, peers
from benchmarks.gpu.base import Kind, random_adapters
from benchmarks.gpu.bench import TINY, Bench
from server.engine.backends.torch.runner import TorchRunner
from server.kernels.cuda import Cuda
from server.kernels.lora import TARGET_MODULES
from server.kernels.reference import Reference
from server.model.config import from_hf
from server.model.loader import Base
from server.model.quantization import quantize

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Records = dict[str, tuple[Any, ...]]


def rows_of(file: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads(file.read_text())["results"]}


def test_a_failing_section_is_recorded_and_others_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(self: Bench) -> None:
        raise torch.OutOfMemoryError("the card is too small")

    monkeypatch.setattr(Bench, "load_model", fail)
    target = tmp_path / "result.json"
    assert checklist.main(["--check", "--json", str(target), "--only", "decode", "load"]) == 1
    rows = rows_of(target)
    assert rows["bandwidth, GB/s"]["value"] > 0
    assert rows["model"]["value"] == "failed: OutOfMemoryError"
    assert rows["model"]["reason"].endswith("the card is too small\n")
    assert rows["decode"]["value"] == rows["load"]["value"] == "failed: RuntimeError"


def test_results_are_written_before_the_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def cut_off(bench: Bench) -> None:
        bench.record("first", 1)
        sys.exit(1)

    monkeypatch.setattr(checklist, "SECTIONS", checklist.SECTIONS | {"model": cut_off})
    target = tmp_path / "result.json"
    with pytest.raises(SystemExit):
        checklist.main(["--check", "--json", str(target), "--only", "memory"])
    rows = rows_of(target)
    assert rows["first"]["value"] == 1 and rows["model"]["value"] == "cut off"


def test_a_hanging_device_ends_the_process_with_the_table(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []
    monkeypatch.setattr(os, "_exit", statuses.append)
    bench = Bench(True, tmp_path / "result.json")
    bench.section = "load"
    checklist._kill(bench, ["load"])
    assert rows_of(tmp_path / "result.json")["load"]["value"] == "hung"
    assert statuses == [1] and "hung" in capsys.readouterr().out
    assert checklist.DEADLINE + 10 < checklist.HANG_TIMEOUT < 600


def test_every_claim_has_a_row(tmp_path: Path) -> None:
    """Also if its section failed, was cut off, or did not start."""
    bench = Bench(False, tmp_path / "result.json")
    bench.section = "decode"
    one, *_ = checklist.CLAIMS["decode"]
    bench.record(one, 0.6, 0.5, True)
    bench.record("decode", "failed: RuntimeError", met=False, reason="a test")
    bench.section = "load"
    bench.record("load", "cut off", met=False)
    checklist._finish(bench, ["decode", "load", "answers", "kernels"])
    rows = rows_of(tmp_path / "result.json")
    assert rows[one]["met"]
    reasons = {"decode": "decode: failed: RuntimeError", "load": "load: cut off", "answers": "load: cut off"}
    for section, reason in reasons.items():
        for name, target in checklist.CLAIMS[section].items():
            if name != one:
                row = rows[name]
                assert (row["value"], row["met"], row["target"]) == ("not measured", False, target)
                assert row["reason"] == reason


def test_late_sections_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "is_late", True)
    bench = Bench(True, None)
    assert not checklist.measure(bench, ["ceilings", "memory"])
    assert {row["value"] for row in bench.results} == {"failed: TimeoutError"}


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "result.json"
    assert checklist.main(["--json", str(target)]) == 1
    claims = rows_of(target)
    assert {row["value"] for row in claims.values()} == {"not measured"} and "--check" in capsys.readouterr().err
    assert set(claims) == {name for section in checklist.CLAIMS.values() for name in section}


def test_claims_are_what_the_sections_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the sizes of a real run."""
    monkeypatch.setattr(Bench, "seconds", lambda bench, call, rounds=0: 1.0)
    monkeypatch.setattr(load, "run_engine", lambda *_: load.Run(1.0, 0, 0))
    monkeypatch.setattr(peers, "_missing", lambda names: "a test")
    target = tmp_path / "result.json"
    assert checklist.main(["--check", "--json", str(target), "--only", *checklist.CLAIMS]) == 0
    found = set(rows_of(target))
    real = Bench(False, None)
    tiny = Bench(True, None)
    sizes = {f"batch {real.rows}, {real.rows} adapters": f"batch {tiny.rows}, {tiny.rows} adapters"}
    sizes |= {str(a): str(b) for a, b in zip(real.kinds, tiny.kinds, strict=True)}
    sizes |= {"of 32 mixed": "of 2 mixed", "1000 adapters in RAM (copies of 32 buffers) against 5":
              "12 adapters in RAM (copies of 2 buffers) against 3"}  # fmt: skip
    for section in checklist.CLAIMS.values():
        for name in section:
            for a, b in sizes.items():
                name = name.replace(a, b)
            assert name in found


@pytest.mark.parametrize(("beside", "met"), [(1.01e-3, True), (1.9e-3, False)])
def test_visible_share_of_a_copy(beside: float, met: bool) -> None:
    records: Records = {}
    copied: list[int] = []
    runner = SimpleNamespace(unload_adapter=lambda slot: None, load_adapter=lambda slot, weights: copied.append(slot))
    bench: Any = SimpleNamespace(
        rows=2, kinds=[None], adapters=lambda kind: [SimpleNamespace(nbytes=80_000_000)], runner=runner,
        seconds=lambda call, rounds: 2e-3,
        running_seconds=lambda rows, mixes, before=None: 1e-3 if before is None else (before(), beside)[1],
        record=lambda name, *values, **details: records.update({name: values}),
    )  # fmt: skip
    checklist.placing(bench)
    assert copied == [2] and records["the same, GB/s"] == (40.0,)
    share, target, fine = records["a copy before each step: of its time, seen in the steps'"]
    assert share == pytest.approx((beside - 1e-3) / 2e-3) and target == "<= 0.2" and fine == met


def test_random_adapters() -> None:
    config = from_hf(TINY)
    for kind in (Kind(4), Kind(2, TARGET_MODULES[:4])):
        [weights] = random_adapters(config, Cuda(torch.float32), 1, kind)
        assert {path.rpartition(".")[2] for path in weights.modules} == set(kind.linears)
        numbers = sum(update.A.numel() + update.B.numel() for update in weights.modules.values())
        assert numbers == sum(kind.rank * (out + width) for out, width in kind.shapes(config).values())
    assert str(kind) == "rank 2 on q_proj, k_proj, v_proj, o_proj"


def test_distinct_adapters_of_a_batch() -> None:
    assert load._distinct([0, 0, 1, 1], 2) == pytest.approx((1 + 2 + 1) / 3)
    assert load._distinct([0, 1], 9) == 2


def answers_bench(records: Records, folders: list[Path]) -> Any:
    def record(name: str, *values: Any, **details: Any) -> None:
        records[name] = values

    backend = Cuda(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    return SimpleNamespace(
        check=True, device=DEVICE, backend=backend, folders=folders, record=record, is_last=False, deadline=math.inf
    )


@pytest.fixture
def four_bits(tiny_base: Base) -> Base:
    tables = tiny_base.config.table_shapes()
    stored = {
        path: quantize(weight.tensors["codes"], "int8" if path in tables else "int4", name=path)
        for path, weight in tiny_base.weights.items()
    }
    return replace(tiny_base, weights=stored, backend=Reference())


def packed(base: Base, backend: Any) -> Base:
    return replace(base, weights={path: backend.pack(w) for path, w in base.weights.items()}, backend=backend)


def test_answers_equal_the_reference(four_bits: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "load_base", lambda folder, name, backend: packed(four_bits, backend))
    monkeypatch.setattr(answers, "FORMS", ("of {}",))
    monkeypatch.setattr(answers, "SUBJECTS", ("rain",))
    records: Records = {}
    answers.answers(answers_bench(records, []))
    assert records[answers.CLAIM][0].startswith("not measured")
    answers.answers(answers_bench(records, [tmp_path]))
    assert records[answers.CLAIM] == (1, 1, True)


def test_reference_logits_in_one_pass(four_bits: Base) -> None:
    runners = [TorchRunner(base, 2, 1) for base in (four_bits, answers._dequantized(four_bits))]
    for runner in runners:
        runner.allocate(8, answers.BLOCK_SIZE)
    prompts = [[5, 6, 7], [9, 8]]
    generated: list[Any] = [list(answers._generated(runner, prompts, 2, 1, 6)) for runner in runners]  # type: ignore[arg-type]
    for (prompt, tokens, logits), (_, same, equal) in zip(*generated, strict=True):
        assert tokens == same and torch.equal(logits, equal)
        exact = answers._reference_logits(runners[1], prompt, tokens, 1)
        torch.testing.assert_close(exact, logits, rtol=1e-4, atol=1e-4)
        assert answers._compared(tokens, logits, exact).margin is None


@pytest.mark.parametrize(
    ("margin", "noise", "fine"), [(0.02, 0.02, True), (0.5, 0.02, False), (0.02, 0.5, False)],
    ids=["noise", "large margin", "large noise"],
)  # fmt: skip
def test_first_difference_is_noise_if_all_differences_are_small(margin: float, noise: float, fine: bool) -> None:
    exact = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 400)).astype(np.float32)) * 2
    logits = exact + noise * torch.from_numpy(np.random.default_rng(2).normal(size=(3, 400)).astype(np.float32))
    best = int(exact[1].argmax())
    other = (best + 1) % 400
    exact[1, other] = exact[1, best] - margin
    logits[1, other] = logits[1, best] + 0.001
    logits[2] = 1e3  # after the first difference
    records: Records = {}
    compared = answers._compared(logits.argmax(1).tolist(), logits, exact)
    answers._record(answers_bench(records, []), [compared], 1)
    assert records[answers.CLAIM] == (int(fine), 1, fine) and records["greedy answers equal"] == (0,)
    answers._record(answers_bench(records, []), [answers.Compared(None, 0.0, 1.0)] * 3, 4)
    assert records[answers.CLAIM] == (3, 4, False)  # too few answers


@pytest.mark.filterwarnings("ignore")
def test_peft_decodes_a_mixed_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "KINDS", {"bf16": ("transformers", "peft"), "other": ("no_such_module",)})
    records: Records = {}
    bench: Any = SimpleNamespace(
        rows=2, context=5, shape=TINY, config=from_hf(TINY), kinds=(Kind(4),), device=torch.device("cpu"),
        is_late=False, running_seconds=None, mixed_step_seconds=lambda seconds, kind: 1e-6, wait=lambda: None,
        record=lambda name, value, target=None, met=None, **details: records.update({name: (value, target, met)}),
    )  # fmt: skip
    peers.peers(bench)
    value, target, met = records["decode of 2 mixed requests over Transformers + PEFT bf16"]
    assert value > 10 == target and met
    other = records["decode of 2 mixed requests over Transformers + PEFT other"]
    assert other == ("not measured: no_such_module cannot be imported (ModuleNotFoundError)", None, None)
    bench.is_late = True
    peers.peers(bench)
    assert records["decode of 2 mixed requests over Transformers + PEFT bf16"][0] == "not measured: the time is over"


class Ended:
    """An engine whose state is `stopped` or not, for `Answers.wait`."""

    def __init__(self, failures: int = 0) -> None:
        self.state, self.failures = "running", failures

    def stats(self) -> dict[str, Any]:
        return {"failures": self.failures}


@pytest.mark.parametrize(
    ("ends", "failures", "error"),
    [
        ([("length", 4)], 0, None),
        ([("length", 3)], 0, "3 of 4 tokens arrived"),
        ([("error", 4)], 0, "an answer ended with 'error'"),
        ([("length", 4)], 2, "2 steps failed"),
        ([], 0, "0 of 1 answers"),
    ],
)
def test_only_complete_answers_count(ends: Sequence[tuple[str, int]], failures: int, error: str | None) -> None:
    collected = load.Answers()
    for reason, tokens in ends:
        collected.deliver(SimpleNamespace(tokens=[1] * tokens, finish_reason=reason, error=None))  # type: ignore[arg-type]
    engine: Any = Ended(failures)
    if error is None:
        assert collected.wait(engine, 1, 4, 0.05) > 0
    else:
        with pytest.raises(RuntimeError, match=error):
            collected.wait(engine, 1, 4, 0.05)
