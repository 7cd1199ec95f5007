"""What is known is written down, whatever fails after it; and what is counted is what is there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton

from benchmarks import gpu, gpu_answers, gpu_ceilings, gpu_kernels, gpu_load, gpu_peers, gpu_products
from benchmarks.gpu_base import Kind, _linear, random_adapters
from server.kernels.cuda import Cuda, matmul, packing
from server.kernels.lora import TARGET_MODULES
from server.model.config import from_hf

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CARD = gpu._machine(DEVICE)["card"]
"""What the table is of; a GPU multiplies in bf16."""
ERROR = gpu_products.BOUND if DEVICE.type == "cuda" else 1e-5


def test_a_model_that_cannot_be_made_leaves_the_ceilings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And everything else is told to have failed, not left out; the table and the JSON say why."""

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("the card is too small")

    monkeypatch.setattr(gpu, "CudaRunner", fails)
    target = tmp_path / "told.json"
    assert gpu.main(["--check", "--json", str(target), "--only", "decode", "load"]) == 1
    told = {row["name"]: row for row in json.loads(target.read_text())["results"]}
    assert told["bandwidth, GB/s"]["value"] > 0 and told["bandwidth, GB/s"]["copied"] > 0
    assert told["model"]["value"] == "failed: OutOfMemoryError"
    assert told["decode"]["value"] == told["load"]["value"] == "failed: RuntimeError"
    assert told["model"]["reason"].startswith("Traceback")
    assert told["model"]["reason"].endswith("the card is too small\n")
    assert told["decode"]["reason"] == "there is no model to measure"
    lines = capsys.readouterr().out.partition("what ")[2].splitlines()
    after = {line.split()[0]: following for line, following in zip(lines, lines[1:], strict=False)}
    assert after["model"].endswith("the card is too small") and len(after["model"]) <= 4 + gpu.REASON
    assert after["decode"].strip() == "there is no model to measure"


def test_adapters_are_timed_between_two_of_the_base() -> None:
    base, mixed, told = iter([1.0, 10.0, 14.0, 6.0]), iter([18.0, 12.0]), dict[str, Any]()

    def running(*_: object) -> float:
        return next(base)

    bench = SimpleNamespace(
        kinds=(Kind(16), Kind(16, TARGET_MODULES[:4])), rows=32, bandwidth=1.0, running_seconds=running,
        step_seconds=lambda *_: 1.0, step_bytes=lambda *_: 1,
        mixed_step_seconds=lambda seconds, kind: next(mixed) if seconds is running else 1.0,
        tell=lambda name, value, *_, **more: told.update({name: value}),
    )  # fmt: skip
    gpu.decode(bench)  # type: ignore[arg-type]
    assert [told[name] for name in gpu.CLAIMS["decode"] if "step time" in name] == [1.5, 1.2]


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


def test_what_is_cut_off_leaves_the_rows_that_it_had_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SIGTERM raises SystemExit wherever the run is. They are written as they are told: it may be killed at once."""

    def cut_off(bench: gpu.Bench) -> None:
        bench.tell("first", 1)
        assert rows()[-1] == ("first", 1)
        sys.exit(1)

    def rows() -> list[tuple[str, Any]]:
        return [(row["name"], row["value"]) for row in json.loads(target.read_text())["results"]]

    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS | {"model": cut_off})
    target = tmp_path / "told.json"
    with pytest.raises(SystemExit):
        gpu.main(["--check", "--json", str(target), "--only", "memory"])
    assert rows()[-2:] == [("first", 1), ("model", "cut off")]


def test_a_device_that_hangs_does_not_take_the_table_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No handler of a signal runs while the first thread waits in the driver; another thread ends the process."""
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    bench = gpu.Bench(True, tmp_path / "told.json")
    bench.section = "load"
    bench.tell("first", 1)
    gpu._give_up(bench, ["load"])
    told = json.loads((tmp_path / "told.json").read_text())["results"]
    assert [(row["name"], row["value"]) for row in told] == [("first", 1), ("load", "hung")]
    assert ended == [1] and "hung" in capsys.readouterr().out.partition("what ")[2]
    assert gpu.CUT_OFF_SECONDS + 10 < gpu.HUNG_SECONDS < 600


def test_every_claim_has_a_row_whatever_ended_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its section failed, was running when the end came, or had not begun."""
    bench = gpu.Bench(False, tmp_path / "told.json")
    bench.section = "decode"
    one, *_ = gpu.CLAIMS["decode"]
    bench.tell(one, 0.6, 0.5, True)
    bench.tell("decode", "failed: RuntimeError", met=False, reason="a test")
    bench.section = "load"
    bench.tell("load", "cut off", met=False)
    gpu._close(bench, ["decode", "load", "answers", "kernels"])
    rows = {row["name"]: row for row in json.loads((tmp_path / "told.json").read_text())["results"]}
    assert rows[one]["value"] == 0.6 and rows[one]["met"]
    left = {name: section for section in ("decode", "load", "answers") for name in gpu.CLAIMS[section] if name != one}
    assert set(rows) == {one, "decode", "load", *left}
    why = {"decode": "decode: failed: RuntimeError", "load": "load: cut off", "answers": "load: cut off"}
    for name, section in left.items():
        row = rows[name]
        assert (row["section"], row["value"], row["met"]) == (section, "not measured", False)
        assert row["target"] == gpu.CLAIMS[section][name] and row["reason"] == why[section]
    assert capsys.readouterr().out.partition("what ")[2].count("not measured") == len(left)


def test_a_device_that_has_gone_does_not_take_the_table_along(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a fault nothing can be asked of it, not even its name."""

    def gone(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def faults(bench: gpu.Bench) -> None:
        monkeypatch.setattr(gpu, "_machine", gone)
        gone()

    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS | {"model": faults})
    target = tmp_path / "told.json"
    assert gpu.main(["--check", "--json", str(target), "--only", "memory"]) == 1
    told = json.loads(target.read_text())
    assert told["card"] == CARD and told["results"][0]["name"] == "bandwidth, GB/s"
    assert f"card {CARD}" in capsys.readouterr().out


def test_what_is_claimed_comes_before_what_explains_it() -> None:
    """An illegal access in a kernel that nothing claims would leave no device for what comes after it."""
    order = list(gpu.SECTIONS)
    assert order[:2] == list(gpu.ALWAYS) and order[-1] == "ceilings-again"
    claims, others = ("memory", "products", "decode", "placing", "load", "peers", "answers"), ("kernels", "cliff")
    assert max(map(order.index, claims)) < min(map(order.index, others))


def test_the_table_says_what_it_is_of_and_what_is_not_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "told.json"
    assert gpu.main(["--check", "--json", str(target), "--only", "answers", "products"]) == 0
    table = capsys.readouterr().out.rpartition(f"card {CARD}")[2]
    assert f"torch {torch.__version__}, triton {triton.__version__}" in table
    told = json.loads(target.read_text())
    assert told["torch"] == torch.__version__ and told["triton"] == triton.__version__
    rows = {row["name"]: row for row in told["results"]}
    assert rows[gpu_answers.CLAIM]["value"].startswith("not measured") and "not measured" in table
    worst = [row for name, row in rows.items() if name.endswith("worst relative error")]
    assert len(worst) == 3 and all(row["value"] < ERROR for row in worst)
    assert {"qkv, 1 rows", "head, 72 rows"} < set(worst[0]["errors"])
    (other,) = (row for name, row in rows.items() if name.endswith("other bits"))
    assert other["value"] == 0 and other["at"] == []


def test_a_machine_that_cannot_build_kernels_is_told_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured, whether there is a GPU or none."""
    monkeypatch.setattr(gpu, "unavailable", lambda: "there is no C compiler")
    assert gpu.main([]) == 1
    said = capsys.readouterr()
    assert "there is no C compiler" in said.err and "bandwidth" not in said.out


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU is measured")
def test_without_a_gpu_every_claim_is_told_to_be_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those that the sections tell of: only sizes differ where a tiny model is checked."""
    target = tmp_path / "told.json"
    assert gpu.main(["--json", str(target)]) == 1
    said = capsys.readouterr()
    told = json.loads(target.read_text())["results"]
    assert {row["value"] for row in told} == {"not measured"} and {row["met"] for row in told} == {None}
    assert said.out.count("not measured") == 2 * len(told) and "--check" in said.err

    monkeypatch.setattr(gpu.Bench, "seconds", lambda bench, call, rounds=0: 1.0)
    monkeypatch.setattr(gpu_load, "_run", lambda *_: gpu_load.Run(1.0, 0, 0))
    monkeypatch.setattr(gpu_peers, "_missing", lambda names: "a test")
    assert gpu.main(["--check", "--json", str(target), "--only", *gpu.CLAIMS]) == 0

    def form(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(re.sub(r"[0-9]+", "1", str(row[key])) for key in ("section", "name", "target"))

    assert set(map(form, told)) <= set(map(form, json.loads(target.read_text())["results"]))
    real = gpu.Bench(False, None)
    sizes = {
        number for row in told for number in re.findall(r"(?:batch|of|,) ([0-9]+) (?:adapters|buffers)", row["name"])
    }
    assert sizes == {str(real.rows)} and {str(kind) in str(told) for kind in real.kinds} == {True}


def test_the_cliff_is_drawn_where_it_is() -> None:
    points = [(16, 900.0), (64, 1000.0), (128, 250.0)]
    root = ElementTree.fromstring(gpu_load.picture(points, 64))
    found = {tag: root.findall("{http://www.w3.org/2000/svg}" + tag) for tag in ("circle", "line", "text", "polyline")}
    centres = [(float(circle.attrib["cx"]), float(circle.attrib["cy"])) for circle in found["circle"]]
    assert [x for x, _ in centres] == sorted(x for x, _ in centres)
    (_, low), (full, high), (_, lowest) = centres
    assert high < low < lowest and float(found["line"][0].attrib["x1"]) == full
    assert {text.text for text in found["text"]} > {"16", "64", "128"}
    assert len(found["polyline"][0].attrib["points"].split()) == 3


@pytest.mark.parametrize("wrong", [None, 1, 2, "kernel by kernel"])
def test_a_step_that_comes_out_otherwise_is_told(wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time or the third as its graph, or where kernels that are launched one by one leave a row out."""
    rows, count = torch.ones(2, 3), iter(range(9))

    def run(batch: Any) -> Any:
        return SimpleNamespace(rows=rows + (next(count) == wrong))

    def compute(shape: Any) -> None:
        runner._results[: 1 if wrong == "kernel by kernel" else 2] = rows[0]

    pool = SimpleNamespace(ranks=[])
    runner = SimpleNamespace(_results=torch.ones(4, 3), _pool=pool, _buckets=[], _width=1, run=run, _compute=compute)
    shape = SimpleNamespace(bucket=lambda buckets, width: None)
    monkeypatch.setattr(gpu_products, "build_batch", lambda batch, ranks: SimpleNamespace(shape=shape))
    bench: Any = SimpleNamespace(runner=runner, batch=lambda n, mixes: None)
    same = list(gpu_products._steps(bench, 2, ((), ()), 2))
    assert same == [wrong != 1, wrong != 2, wrong != "kernel by kernel"]


def test_an_error_that_is_no_number_is_over_every_bound() -> None:
    one = torch.ones(2)
    assert gpu_products._error(one, one) == 0
    assert gpu_products._error(torch.tensor([1.0, torch.nan]), one) == torch.inf


class Card:
    """A bench whose card is faster at the end."""

    check, device, backend, bandwidth, peak = True, torch.device("cpu"), Cuda(torch.float32), 1.0, 1.0

    def __init__(self) -> None:
        self.told: dict[str, tuple[float, str]] = {}
        self.took = 2.0

    def seconds(self, call: Any) -> float:
        return self.took

    def tell(self, name: str, value: float, note: str = "", **more: Any) -> None:
        self.told[name] = (value, note)


def test_a_ceiling_that_is_higher_at_the_end_is_told() -> None:
    card: Any = Card()
    gpu_ceilings.ceilings(card)
    card.took = 1.0
    gpu_ceilings.again(card)
    value, note = card.told["bandwidth at the end, of that at first"]
    assert value == 2.0 and note.startswith("higher")
    card.took = 2.0
    gpu_ceilings.again(card)
    assert card.told["bf16 products at the end, of that at first"] == (1.0, "not higher")


@pytest.mark.parametrize(("beside", "met"), [(1.01e-3, True), (1.9e-3, False)])
def test_a_copy_that_is_seen_in_the_steps_is_not_hidden(beside: float, met: bool) -> None:
    told: dict[str, tuple[Any, ...]] = {}
    copied: list[int] = []
    bench: Any = SimpleNamespace(
        rows=2, kinds=[None], adapters=lambda kind: [SimpleNamespace(nbytes=80_000_000)],
        runner=SimpleNamespace(
            unload_adapter=lambda slot: None, load_adapter=lambda slot, weights: copied.append(slot)
        ),
        seconds=lambda call, rounds: 2e-3,
        running_seconds=lambda rows, mixes, before=None: 1e-3 if before is None else (before(), beside)[1],
        tell=lambda name, *values, **more: told.update({name: values}),
    )  # fmt: skip
    gpu.placing(bench)
    assert copied == [2], "in a slot that no row uses"
    assert told["the same, GB/s"] == (40.0,)
    value, limit, fine = told["a copy before each step: of its time, seen in the steps'"]
    assert value == pytest.approx((beside - 1e-3) / 2e-3) and limit == "<= 0.2" and fine == met


def test_a_kind_of_adapters_is_what_is_made_and_counted() -> None:
    config = from_hf(gpu.TINY)
    for kind in (Kind(4), Kind(2, TARGET_MODULES[:4])):
        [weights] = random_adapters(config, Cuda(torch.float32), 1, kind)
        assert {path.rpartition(".")[2] for path in weights.modules} == set(kind.linears)
        assert sum(update.A.numel() + update.B.numel() for update in weights.modules.values()) == sum(
            kind.rank * (out + width) for out, width in kind.shapes(config).values()
        )
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
    before = matmul.DENSE_ROWS
    with pytest.raises(ValueError), gpu_kernels._dense_from(65):
        assert matmul.DENSE_ROWS == 65
        raise ValueError
    assert matmul.DENSE_ROWS == before


def test_the_ten_minutes_begin_before_what_takes_seconds_to_import() -> None:
    told = subprocess.run(
        [sys.executable, "-c", "import time; a = time.monotonic(); from benchmarks import gpu; "
                               "print(gpu.BEGAN - a, time.monotonic() - gpu.BEGAN)"],
        stdout=subprocess.PIPE, text=True, check=True, timeout=300,
    )  # fmt: skip
    before, after = map(float, told.stdout.split())
    assert 0 <= before < after


def test_it_runs_as_a_file_from_any_folder(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    told = subprocess.run(
        [sys.executable, str(Path(gpu.__file__)), "--help"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert told.returncode == 0 and "--answers" in told.stdout, told.stderr[-2000:]
