"""The base that benchmarks of this package run on, what they print, what they need, and what they refuse."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import typer
from click.testing import Result
from rich.table import Table
from typer.testing import CliRunner

from adapters.peft_format import read_folder
from benchmarks import command, compare, online, options, results, roofline, steps
from benchmarks.client import NoAnswer, residency, run
from benchmarks.compare import PeerFailed, Rates
from benchmarks.local_engine import LocalEngine
from benchmarks.slora import Client
from benchmarks.synthetic import write_adapter
from server.engine.batch import Batch, Logits
from server.errors import BadSetting
from server.kernels import choose, cpu, cuda
from server.kernels.cpu import packing
from server.model.quantization import quantize
from tests.benchmarks.conftest import Answering, events

if TYPE_CHECKING:
    from server.engine.request import Request
    from server.model.loader import Base


def bench(*arguments: str) -> Result:
    return CliRunner(env={"LORAMUX_API_KEYS": "", "OPENAI_API_KEY": ""}).invoke(command.app, arguments)


def told_of(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file, which has to tell of the machine."""
    told = json.loads((folder / f"{name}.json").read_text())
    machine = told.pop("machine")
    assert machine["cores"] >= 1 and machine["processor"] and machine["date"].startswith("20")
    assert machine["python"] == ".".join(map(str, sys.version_info[:3]))
    return told


def test_the_processor_is_measured_where_there_is_a_gpu_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert command._base(command._settings(str(tiny_folder), tmp_path)).backend.name in ("native", "aten")


def test_what_is_measured_is_what_would_be_served(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same variables, also those of a server that others can reach."""
    for name, value in (("MODEL", tiny_folder), ("STATE_DIR", tmp_path), ("QUANTIZATION", "none"), ("HOST", "0.0.0.0")):
        monkeypatch.setenv(f"LORAMUX_{name}", str(value))
    base = command._base(command._settings(None, None, "reference"))
    assert base.name == tiny_folder.name and base.quantization["scheme"] == "none"
    monkeypatch.setenv("LORAMUX_KERNELS", "cuda")
    assert command._base(command._settings(None, None)).backend.name in ("native", "aten"), "the processor is measured"
    assert list((tmp_path / "cache").iterdir())


def test_what_is_printed_is_json_whatever_was_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    result: dict[str, Any] = {"rate": float("nan"), "runs": [{"p99": float("inf"), "requests": 3}]}
    results.show(result, Table(), True, tmp_path, "x")
    told = {"rate": None, "runs": [{"p99": None, "requests": 3}]}
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "x.json").read_text()) == told


def test_a_missing_extra_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    options.extra()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadSetting, match=rf"needs: {re.escape(sys.executable)} -m pip install 'loramux\[bench\]'"):
        options.extra()


@pytest.mark.parametrize(
    "arguments",
    [
        ("load", "http://x", "--model", "a", "--concurrency", "0"),
        ("load", "http://x", "--model", "a", "--requests", "0"),
        ("load", "http://x", "--model", "a", "--prompt-tokens", "70000"),
        ("load", "http://x", "--model", "a", "--vocab", "100"),
        ("peers", "peers.toml", "--rounds", "0"),
        ("peers", "peers.toml", "--requests", "0"),
        ("steps", "--repeats", "0"),
        ("slora", "http://x", "--repeats", "0"),
        ("slora", "http://x", "--few", "0"),
    ],
)
def test_numbers_out_of_bounds_are_refused(arguments: tuple[str, ...]) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2 and f"Invalid value for '{arguments[-2]}'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--few", "5", "--many", "3"), "--many"),
        (("--prompt", "8"), "--prompt is LOW:HIGH"),
        (("--output", "8:8"), "--output is LOW:HIGH"),
        (("--output", "0:8"), "--output is LOW:HIGH"),
        (("--prompt", "1:99999"), "--prompt is LOW:HIGH"),
        (("--cv", "0"), "--cv must be above 0"),
        (("--share", "0.5", "--rate", "2"), "not both"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_refused_at_once(
    answering: Answering, arguments: tuple[str, ...], told: str
) -> None:
    result = bench("slora", answering.url, *arguments)
    assert isinstance(result.exception, BadSetting) and told in result.exception.message
    assert answering.asked == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[llama]\ngguf = 'x'", r"\[llama\] is a table of `gguf` and of `bench`, `server` or both"),
        ("[llama]\ngguf = 'x'\nserver = 'true'\nconvrt = 'y'", r"\[llama\] is a table"),
        ("[llama]\ngguf = 'x'\nserver = 'no-such-program'", "is no program that can be run"),
        ("[llama]\ngguf = 'x'\nserver = 'true'\nconvert = 3", r"\[llama\] is a table"),
        ("llama = 'x'", r"\[llama\] is a table"),
        ("[peft]\npython = 'x'", "peft is the path of a Python"),
        ("sglang = 'x'", "'sglang' is no peer"),
        ("peft = '/nowhere/python'", "no program that can be run"),
        ("peft =", "cannot be read"),
    ],
)
def test_a_file_of_peers_that_names_none_is_refused(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "peers.toml").write_text(text)
    with pytest.raises(BadSetting, match=told):
        compare.installed(tmp_path / "peers.toml")


def test_peers_keep_what_was_measured_before_one_failed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "peers.toml").write_text(f"peft = '{sys.executable}'\nvllm = '{sys.executable}'")
    calls: list[str] = []

    def peer(kind: str, python: str, base: Path, threads: int) -> compare.Contestant:
        assert (base / "model.safetensors").is_file()

        def run(job: compare.Job) -> Rates:
            calls.append(kind)
            if calls.count("peft") == 2 and kind == "peft":
                raise PeerFailed("it did not end within 1800 s")
            return Rates(3.0, 2.0)

        return run

    monkeypatch.setattr(compare, "script_peer", peer)
    monkeypatch.setattr(roofline.Meter, "take", lambda meter: roofline.Ceilings(2e9, 1e9))
    result = bench(
        "peers", str(tmp_path / "peers.toml"), "--model", str(tiny_folder), "--state-dir", str(tmp_path / "state"),
        "--threads", "1", "--rounds", "3", "--requests", "2", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 1, result.exception
    assert "the peer peft failed: it did not end" in " ".join(result.stderr.split())
    assert "peft failed" in result.stdout
    told = told_of(tmp_path / "out", "peers-2-2")
    assert [len(told["rates"][name]["rounds"]) for name in ("loramux", "peft", "vllm")] == [3, 1, 3]
    assert told["failed"] == {"peft": "it did not end within 1800 s"} and set(told["ratios"]) == {"peft", "vllm"}
    base = command._base(command._settings(str(tiny_folder), tmp_path / "state"))
    folders = [tmp_path / "state" / "bench" / f"peer{i}" for i in range(2)]
    own = [base.prepare(read_folder(path, name=path.name, shapes=base.shapes())) for path in folders]
    costs = [roofline.decode_cost(base, [context] * 2, [[each] for each in own]) for context in range(129, 192)]
    least = sum(cost.seconds(roofline.Ceilings(2e9, 1e9)) for cost in costs)
    seconds = [2 * 63 / rates["decode"] for rates in told["rates"]["loramux"]["rounds"]]
    assert told["roofline"] == pytest.approx([least / each for each in seconds])
    asked = told["asked"]
    assert told["kernels"] == choose("auto", "cpu").name
    assert (asked["rounds"], asked["threads"], asked["ranks"]) == (3, 1, [8, 16])
    assert asked["base"]["name"] and len(asked["base"]["digest"]) == 64


def test_a_peer_that_is_given_text_finds_the_ids_in_it(tiny_folder: Path, tmp_path: Path) -> None:
    base = command._base(command._settings(str(tiny_folder), tmp_path, "reference"))
    job = compare.drawn(base, [], 3, 128, 64)
    assert [len(prompt) for prompt in job.prompts] == [128] * 3 and job.adapter_of == [-1] * 3
    encode = base.vocabulary.tokenizer.encode
    assert [encode(text, add_special_tokens=False).ids for text in job.texts] == job.prompts


def test_steps_tell_what_is_behind_the_roofline(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roofline.Meter, "median", lambda meter: roofline.Ceilings(2e9, 1e9))
    result = bench(
        "steps", "--model", str(tiny_folder), "--state-dir", str(tmp_path / "state"), "--threads", "1",
        "--repeats", "1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    told = told_of(tmp_path / "out", "steps")
    assert (told["asked"]["threads"], told["asked"]["repeats"], len(told["asked"]["ranks"])) == (1, 1, 21)
    for step in told["steps"]:
        limit = max(step["bytes"] / 2e9, step["operations"] / 1e9)
        assert step["roofline"] == pytest.approx(limit / (step["ms"] / 1e3))


def test_ceilings_are_medians_of_what_was_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = roofline.Meter(1)
    read, multiplied = 2**28, 2 * 2048**3
    linear, beside = ([0.1, 0.2, 0.3], [0.5, 0.4, 0.6], [0.7, 0.7, 0.7]), ([0.4] * 3, [0.7] * 3, [0.3, 0.2, 0.2])
    rows, columns = ([2.0, 3.0, 4.0], [1.0] * 3, [6.0, 5.0, 4.0]), ([3.0] * 3, [2.0] * 3, [7.0, 7.0, 5.0])
    seconds = iter([s for turn in zip(linear, beside, rows, columns, strict=True) for each in turn for s in each])
    assert meter._side_by_side().sum() == read / 4, "all of it"
    assert meter._by_rows().shape == meter._by_columns().shape == (2048, 2048)
    monkeypatch.setattr(roofline, "_timed", lambda run: next(seconds))
    for _ in range(3):
        meter.take()
    assert meter.median() == roofline.Ceilings(read / 0.2, multiplied / 2.0)


def test_what_fills_a_layout_up_is_no_work(tiny_folder: Path, tmp_path: Path) -> None:
    """Three ranks lie in a tile of eight on the native kernels."""
    counted = set()
    for kernels in ("reference", "aten", "auto"):
        base = command._base(command._settings(str(tiny_folder), tmp_path, kernels))
        folder = write_adapter(tmp_path / "adapter", base.shapes(), rank=3, seed=1)
        adapter = base.prepare(read_folder(folder, name="a", shapes=base.shapes()))
        counted.add(roofline.decode_cost(base, [20, 20], [[adapter], []]).ops)
    assert len(counted) == 1


def test_a_step_reads_weights_and_adapters_once_and_computes_them_for_each_row(tiny_base: Base, tmp_path: Path) -> None:
    """By hand, of `tiny_base`: two layers of hidden 64, in between 128, 4 heads of 16 on 2, 272 tokens."""
    shapes = tiny_base.shapes()
    paths = [write_adapter(tmp_path / f"r{rank}", shapes, rank=rank, seed=rank) for rank in (3, 5)]
    a, b = (tiny_base.prepare(read_folder(path, name=path.name, shapes=shapes)) for path in paths)
    cost = roofline.decode_cost(tiny_base, [20, 30, 7], [[a], [a, b], []])
    linears = 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128)
    table = 272 * 64
    each = 2 * (64 + 64 + 64 + 32 + 64 + 32 + 64 + 64)  # numbers of a rank, on q, k, v and o
    keys_and_values = 2 * 2 * 2 * 16  # of a token
    weights = sum(w.nbytes for w in tiny_base.weights.values())
    assert weights >= 2 * (linears + table), "no weight is left out"
    assert cost.nbytes == weights + 4 * each * (3 + 5) + 2 * keys_and_values * (20 + 30 + 7)
    attention = 2 * 2 * 4 * 16 * (20 + 30 + 7)
    assert cost.ops == 2 * (3 * (linears + table) + each * (3 + 3 + 5) + attention)


@pytest.mark.parametrize(("instructions", "read"), [("AMX-INT8, AVX512-VNNI", True), ("AVX512-VNNI", False)])
def test_what_only_the_matrix_unit_reads_is_counted_where_there_is_one(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch, instructions: str, read: bool
) -> None:
    monkeypatch.setattr(cpu, "instructions", lambda: instructions)
    generator = torch.Generator().manual_seed(0)
    stored = {path: torch.randn(w.shape, generator=generator) for path, w in tiny_base.weights.items()}
    weights = {path: packing.pack(quantize(w, "int4", group=32, name=path)) for path, w in stored.items()}
    of_unit = sum(w.tensors[name].nbytes for w in weights.values() for name in ("inverse_scale", "nonnegative_scales"))
    cost = roofline.decode_cost(replace(tiny_base, weights=weights, backend=cpu.Native()), [], [])
    assert cost.nbytes == sum(w.nbytes for w in weights.values()) - (0 if read else of_unit)


def test_all_that_steps_read_of_keys_and_values_has_been_written() -> None:
    shape = steps.Shape("x", ((),) * 3, context=40)
    read = steps.decode_batch(shape, 100)
    written = set()
    for batch in steps.prompt_batches(shape, 100):
        assert len(batch.tokens) == batch.row_start[-1] == batch.context[0] == 40
        written |= {(batch.blocks[0][at // 16], at % 16) for at in batch.positions.tolist()}
    wanted = {(read.blocks[s][at // 16], at % 16) for s in range(3) for at in range(read.context[s])}
    assert written == wanted


def test_each_step_is_compared_with_its_own_base() -> None:
    shapes = steps.standard_shapes((8, 16) * 8, (16, 17, 18, 19), 20)
    used = [{(len(shape.mixes), mix) for mix in shape.mixes} for shape in shapes]
    four = tuple((slot, 0.25) for slot in (16, 17, 18, 19))
    assert used == [
        {(1, ())}, {(1, ((1, 1.0),))}, {(16, ())}, {(16, ((1, 1.0),))}, {(16, ((i, 1.0),)) for i in range(16)},
        {(16, ((20, 1.0),))}, {(16, four)},
    ]  # fmt: skip
    seconds = dict(zip((shape.name for shape in shapes), (2.0, 2.5, 10.0, 11.0, 13.0, 20.0, 21.0), strict=True))
    cost = roofline.Cost(1.0, 1.0)
    ratios = steps.overheads([steps.StepTime(name, taken, 0.5, cost) for name, taken in seconds.items()])
    assert list(ratios.values()) == pytest.approx([1.25, 1.1, 1.3, 1.05])


def test_as_many_requests_as_are_asked_for_decode_together(tiny_base: Base, tmp_path: Path) -> None:
    """More than a server's default, each on an adapter of its own."""
    count, shapes = 70, tiny_base.shapes()
    paths = [write_adapter(tmp_path / f"a{i}", shapes, rank=1, seed=i) for i in range(count)]
    rows: list[int] = []
    asked: list[Request] = []
    all_asked = threading.Event()
    with LocalEngine(tiny_base, paths, threads=1, max_batch=count, max_step_tokens=4 * count) as ours:
        run, submit = ours.runner.run, ours.engine.submit

        def submitted(request: Request) -> None:
            submit(request)
            asked.append(request)
            if len(asked) == count:
                all_asked.set()

        def counted(batch: Batch) -> Logits:
            # The first has three steps, which are done before the last is asked where this thread is held up.
            assert all_asked.wait(60)
            rows.append(len(batch.logit_rows))
            return run(batch)

        ours.engine.submit = submitted  # type: ignore[method-assign]
        ours.runner.run = counted  # type: ignore[method-assign]
        ours.rates([[5, 6, 7, i % 100] for i in range(count)], [ours.mix([(i, 1.0)]) for i in range(count)], 3)
    assert max(rows) == count


def test_a_load_tells_what_was_asked_and_what_failed(answering: Answering, tmp_path: Path) -> None:
    answering.reply = lambda body: (429, ["full"]) if body["model"] == "b" else (200, events(body["max_tokens"]))
    result = bench(
        "load", f"{answering.url}/v1", "--model", "a", "--model", "b", "--requests", "6", "--concurrency", "2",
        "--new-tokens", "3", "--prompt-tokens", "5", "--api-key", "first:one,second:two", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    told = told_of(tmp_path, "load")
    assert told["asked"] == {
        "url": f"{answering.url}/v1", "models": ["a", "b"], "concurrency": 2, "slo": 6.0, "requests": 6,
        "vocab": 40_000, "text": False, "prompt_tokens": 5, "new_tokens": 3, "llama": False,
        "prompt_seed": told["asked"]["prompt_seed"], "chat": False, "ignore_eos": True,
    }  # fmt: skip
    assert {key for _, key, _ in answering.asked} == {"Bearer first:one"}
    prompts = [body["prompt"] for *_, body in answering.asked]
    del answering.asked[:]
    again = (
        "--new-tokens",
        "3",
        "--prompt-tokens",
        "5",
        "--requests",
        "6",
        "--concurrency",
        "2",
        "--out",
        str(tmp_path),
    )
    bench("load", answering.url, "--model", "a", "--model", "b", *again)
    assert not any(body["prompt"] in prompts for *_, body in answering.asked), "what it has read it may have kept"
    del answering.asked[:]
    bench(
        "load",
        answering.url,
        "--model",
        "a",
        "--model",
        "b",
        *again,
        "--prompt-seed",
        str(told["asked"]["prompt_seed"]),
    )
    assert sorted(body["prompt"] for *_, body in answering.asked) == sorted(prompts)
    assert (told["failed"], told["reasons"], told["ttft_p99"]) == (3, ["429: full"], None)
    assert "429: full" in result.stdout
    assert "without end" in result.stdout and " inf" not in result.stdout and " nan" not in result.stdout


def test_a_server_that_takes_no_ids_is_given_words(answering: Answering) -> None:
    """And the tables cut nothing off, however narrow they are; that of a load has units."""
    answering.reply = lambda body: (200, events(2)) if isinstance(body["prompt"], str) else (422, ["no text"])
    for command_line in (("load", answering.url, "--model", "a"), ("load", answering.url, "--model", "0", "--llama")):
        result = CliRunner(env={"COLUMNS": "40"}).invoke(command.app, [*command_line, "--requests", "2", "--text"])
        assert result.exit_code == 0, result.exception
        assert "…" not in result.stdout and re.search(r"ttft_p99 +│ [0-9.]+ s", result.stdout)
    few = ("--few", "1", "--many", "2", "--requests", "3", "--rate", "300", "--alpha", "1")
    shown = CliRunner(env={"COLUMNS": "40"}).invoke(command.app, ["slora", answering.url, *few, "--text"])
    assert shown.exit_code == 0, shown.exception
    assert "…" not in shown.stdout


def test_a_load_at_a_rate_waits_for_no_answer(answering: Answering, tmp_path: Path) -> None:
    waiting = threading.Barrier(4)  # none is answered before all have been asked

    def reply(body: dict[str, Any]) -> tuple[int, list[str]]:
        waiting.wait(timeout=30)
        return 200, events(body["max_tokens"])

    answering.reply = reply
    result = bench(
        "load", answering.url, "--model", "a", "--requests", "4", "--rate", "40", "--cv", "0.5", "--slo", "25",
        "--new-tokens", "3", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    told = told_of(tmp_path, "load")
    assert {k: told["asked"][k] for k in ("rate", "cv", "slo")} == {"rate": 40, "cv": 0.5, "slo": 25}
    assert "concurrency" not in told["asked"] and "40 a second" in result.stdout
    assert (told["finished"], told["slo_attainment"]) == (4, 1.0)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rate", "0"), ("cv", "0"), ("slo", "0"), ("rate", "1e-300"), ("cv", "1e200"), ("requests", "100000000000")],
)
def test_a_load_of_no_rate_is_refused_at_once(answering: Answering, option: str, value: str) -> None:
    result = bench("load", answering.url, "--model", "a", f"--{option}", value)
    assert isinstance(result.exception, BadSetting) and f"--{option} must be above 0" in result.exception.message
    assert answering.asked == []


@pytest.mark.parametrize(
    ("variables", "sent"),
    [
        ({"LORAMUX_API_KEYS": "a:b", "OPENAI_API_KEY": "sk"}, "Bearer a:b"),
        ({"LORAMUX_ADMIN_KEYS": "c:d\ne:f"}, "Bearer c:d"),
        ({"OPENAI_API_KEY": "sk-1"}, "Bearer sk-1"),
        ({}, None),
    ],
)
def test_the_key_is_that_of_other_clients(
    answering: Answering, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], sent: str | None
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(command.app, ["load", answering.url, "--model", "a", "--requests", "1"])
    assert result.exit_code == 0, result.exception
    assert [key for _, key, _ in answering.asked] == [sent]


def test_the_keys_of_this_machine_are_shown_to_no_other() -> None:
    asked: list[str] = []

    @command.app.command()
    def shown(context: typer.Context, url: str, api_key: online.ApiKey = "", own_key: online.OwnKey = "") -> None:
        asked.append(online._key(context, api_key, own_key, url))

    try:
        for url in (
            "http://localhost:1",
            "127.0.0.1:80/v1",
            "http://[::1]:8",
            "https://example.org/v1",
            "example.org",
            "http://[::1",
        ):
            for more in ([], ["--api-key", "mine"]):
                variables = {"LORAMUX_ADMIN_KEYS": "own", "OPENAI_API_KEY": "sk"}
                CliRunner(env=variables).invoke(command.app, ["shown", url, *more], catch_exceptions=False)
    finally:
        command.app.registered_commands.pop()
    assert asked == ["own", "mine"] * 3 + ["sk", "mine"] * 3


def test_a_place_that_cannot_be_written_is_told_before_anything_is_measured(
    answering: Answering, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    result = bench("load", answering.url, "--model", "a", "--requests", "1", "--out", str(tmp_path / "file"))
    assert isinstance(result.exception, OSError) and not answering.asked


def test_where_nothing_is_answered_the_reason_is_told(answering: Answering) -> None:
    answering.reply = lambda body: (401, ["no key"])
    result = bench("load", answering.url, "--model", "a", "--requests", "2")
    assert isinstance(result.exception, NoAnswer) and "--api-key" in result.exception.message


def test_failures_of_the_comparison_are_named_and_no_ratio_is_told(answering: Answering, tmp_path: Path) -> None:
    def reply(body: dict[str, Any]) -> tuple[int, list[str]]:
        warming = len(answering.asked) <= 9
        return (200, events(body["max_tokens"])) if warming or body["model"] == "s0" else (503, ["restarting"])

    answering.reply = reply
    result = bench(
        "slora", answering.url, "--few", "1", "--many", "9", "--requests", "20", "--rate", "400", "--alpha", "1",
        "--prompt", "3:6", "--output", "2:4", "--cv", "0.5", "--seed", "9", "--slo", "2", "--repeats", "2",
        "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.exception
    told = told_of(tmp_path, "slora")
    [row] = told["ratios"]
    assert (row["throughput"], row["ttft_p99"], told["capacity"], row["share"]) == (None, None, None, None)
    assert row["failed"]["few"] == 0 and row["failed"]["many"] > 0
    assert [run["adapters"] for run in told["runs"]] == [1, 9, 9, 1]
    assert {tuple(run["summary"]["reasons"]) for run in told["runs"]} == {(), ("503: restarting",)}
    asked = told["asked"]
    assert (asked["cv"], asked["seed"], asked["slo"], asked["repeats"]) == (0.5, 9, 2.0, 2)
    assert (asked["prompt"], asked["output"], asked["rates"], asked["shares"]) == ([3, 6], [2, 4], [400.0], [])
    assert "none" in result.stdout and f"{row['failed']['many']} with" in result.stdout
    assert "failed: 503: restarting" in result.stderr and " inf" not in result.stderr


def test_a_server_of_chats_alone_that_knows_no_field_of_ours_is_driven(answering: Answering, tmp_path: Path) -> None:
    """Its first event opens the answer, and is no token."""

    def chat(body: dict[str, Any]) -> tuple[int, list[str]]:
        if "ignore_eos" in body or "prompt" in body:
            return 400, ["unknown field"]
        deltas = [{"role": "assistant", "content": ""}, {"content": "x"}, {"content": "y"}]
        return 200, [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas] + ["[DONE]"]

    answering.reply = chat
    asked = ("--model", "a", "--requests", "3", "--chat", "--no-ignore-eos", "--new-tokens", "4")
    result = bench("load", answering.url, *asked, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    told = told_of(tmp_path, "load")
    assert (told["finished"], told["failed"], told["tokens"]) == (3, 0, 6)
    assert {route for route, *_ in answering.asked} == {"/v1/chat/completions"}
    assert all(len(body["messages"][0]["content"].split()) == 128 for *_, body in answering.asked)


@pytest.mark.parametrize(
    ("versions", "found", "said"),
    [(2, 0, ()), (1, 7, ("1 of 2; the others are read again", "7 prompt tokens were found in it"))],
)
def test_a_server_that_departs_from_the_workload_is_told(
    answering: Answering, tmp_path: Path, versions: int, found: int, said: tuple[str, ...]
) -> None:
    answering.stats = {"adapters": {"versions": versions}, "engine": {"prefix_cache": {"found_tokens": found}}}
    few = ("--few", "1", "--many", "2", "--requests", "2", "--rate", "100", "--repeats", "1", "--output", "2:4")
    result = bench("slora", answering.url, *few, "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    told = told_of(tmp_path, "slora")["server"]
    assert told == {"adapters_in_ram": versions, "prefix_tokens_found": found}
    assert all(each in result.output for each in said) and ("prefix cache" in result.output) == bool(said)


def test_another_server_tells_nothing_of_what_it_keeps(answering: Answering) -> None:
    for told in (None, {}, {"adapters": 3}, ["x"]):
        answering.stats = told
        assert run(residency(answering.url)) is None
    assert run(residency("http://127.0.0.1:1")) is None


def test_defaults_of_the_comparison_are_those_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []

    def compared(client: Client, plan: Any, heard: Any) -> None:
        plans.append((client, plan))
        raise NoAnswer("enough")

    monkeypatch.setattr("benchmarks.slora.compare", compared)
    bench("slora", "http://x")
    [(client, plan)] = plans
    assert (plan.few, plan.many, plan.requests, plan.alphas, plan.shares) == (5, 1000, 1000, (1.0, 0.3), (0.7, 1.2))
    assert (plan.cv, plan.prompt, plan.output, plan.seed, plan.slo, plan.repeats) == (
        1.0,
        (8, 128),
        (8, 128),
        42,
        6.0,
        2,
    )
    assert client.key == ""
