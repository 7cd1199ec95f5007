"""In-process comparison: jobs, rounds, peers' programs, the export for peers, and the file of peers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import compare, hf_export
from benchmarks.compare import (
    Contestant,
    Job,
    PeerFailed,
    Rates,
    llama_peer,
    make_job,
    measure_rounds,
    ratios,
    run_program,
    script_peer,
)
from benchmarks.hf_export import export_base
from server.errors import BadSetting
from server.model.config import RopeScaling, from_hf
from tests.benchmarks.conftest import runs
from tests.waiting import until

if TYPE_CHECKING:
    from server.model.loader import Base

JOB = Job([[1, 2, 3]] * 2, ["a"] * 2, [], [-1, -1], 5)


def failing(after: int) -> Contestant:
    """A contestant that fails after this many rounds."""
    left = iter(range(after))

    def measure(job: Job) -> Rates:
        if next(left, None) is None:
            raise PeerFailed("crashed")
        return Rates(2.0, 2.0)

    return measure


def test_results_before_a_failure_are_kept() -> None:
    lines: list[str] = []
    contestants = {"loramux": lambda job: Rates(6.0, 8.0), "one": failing(2), "two": failing(0)}
    measured = measure_rounds(JOB, contestants, 4, lines.append)
    assert [len(row.rounds) for row in measured.rows.values()] == [4, 2, 0]
    assert measured.failed == {"one": "crashed", "two": "crashed"} and list(measured.table) == ["loramux", "one"]
    assert ratios(measured.table) == {"one": {"prefill": 3.0, "decode": 4.0}}
    assert sum("failed" in line for line in lines) == 2
    json.dumps(compare.as_json(measured.table), allow_nan=False)


def test_rounds_alternate_and_medians_are_reported() -> None:
    order: list[str] = []
    values = iter(Rates(prefill, 100 * prefill) for prefill in (1.0, 2.0, 30.0, 4.0, 7.0, 8.0))

    def contestant(name: str) -> Contestant:
        def measure(job: Job) -> Rates:
            order.append(name)
            return next(values)

        return measure

    measured = measure_rounds(JOB, {name: contestant(name) for name in ("loramux", "one")}, 3, lambda line: None)
    assert order == ["loramux", "one", "one", "loramux", "loramux", "one"]
    result = compare.as_json(measured.table)
    assert (result["loramux"]["prefill"], result["loramux"]["decode"]) == (4.0, 400.0)
    assert [r["prefill"] for r in result["one"]["rounds"]] == [2.0, 30.0, 8.0]


def test_no_ratios_without_our_own_result() -> None:
    measured = measure_rounds(JOB, {"loramux": failing(0), "one": failing(9)}, 2, lambda line: None)
    assert ratios(measured.table) == {} and list(measured.table) == ["one"]


def test_text_of_a_prompt_has_the_same_ids(tiny_base: Base) -> None:
    job = make_job(tiny_base, [], 3, 20, 64)
    assert [len(prompt) for prompt in job.prompts] == [20] * 3 and job.adapter_of == [-1] * 3
    encode = tiny_base.vocabulary.tokenizer.encode
    assert [encode(text, add_special_tokens=False).ids for text in job.texts] == job.prompts


def test_padded_vocabulary(tiny_base: Base) -> None:
    """Prompts use no ids that only the embedding table has."""
    padded = replace(tiny_base, config=replace(tiny_base.config, vocab_size=100_000))
    job = make_job(padded, [], 3, 20, 64)
    assert [len(prompt) for prompt in job.prompts] == [20] * 3
    assert max(map(max, job.prompts)) < tiny_base.vocabulary.tokenizer.get_vocab_size()
    assert job.prompts == make_job(tiny_base, [], 3, 20, 64).prompts


def test_program_of_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def program(command: list[str], stdin: str) -> str:
        commands.append(command)
        return 'a line\n{"speed_pp": 9, "speed_tg": 9}\n{"speed_pp": 2, "speed_tg": 1}\n'

    monkeypatch.setattr(compare, "run_program", program)
    job = Job([[1, 2, 3]] * 2100, ["a"] * 2100, [], [-1] * 2100, 5)
    assert llama_peer(Path("bench"), Path("x.gguf"), 7)(job) == Rates(2.0, 1.0)
    expected = {"-m": "x.gguf", "-c": "16800", "-npp": "3", "-ntg": "5", "-npl": "2100", "-t": "7", "-tb": "7"}
    assert {flag: commands[0][commands[0].index(flag) + 1] for flag in expected} == expected
    peers = {"llama": {"bench": "b", "gguf": "g"}, "peft": "python"}
    assert list(compare.contestants(peers, Path("base"), 1, with_adapters=False)) == ["llama.cpp", "peft"]
    assert list(compare.contestants(peers, Path("base"), 1, with_adapters=True)) == ["peft"]


@pytest.mark.parametrize(
    ("output", "rates"),
    [
        ('{"first": [1.0], "all": [2.0]}', Rates(6.0, 12.0)),
        ('noise\n{"first": [1.0], "all": [2.0], "prompt_tokens": [8], "new_tokens": [10]}', Rates(8.0, 7.0)),
        ('{"first": [2.0], "all": [1.0]}', None),
        ('{"first": [1.0]}', None),
        ("", None),
    ],
)
def test_scripts_of_peers(monkeypatch: pytest.MonkeyPatch, output: str, rates: Rates | None) -> None:
    jobs: list[dict[str, Any]] = []

    def program(command: list[str], stdin: str) -> str:
        jobs.append(json.loads(stdin))
        return output

    monkeypatch.setattr(compare, "run_program", program)
    job = Job([[1, 2], [3, 4], [5, 6]], ["a", "b", "c"], [Path("x"), Path("y")], [1, 0, -1], 5)
    peer = script_peer("vllm", "python", Path("base"), 7)
    if rates is None:
        with pytest.raises(PeerFailed, match="cannot be parsed"):
            peer(job)
    else:
        assert peer(job) == rates
    assert jobs[0]["adapters"] == ["x", "y"] and jobs[0]["adapter_of"] == [1, 0, -1] and jobs[0]["threads"] == 7


def test_failing_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PeerFailed, match="cannot be run"):
        run_program([str(tmp_path / "missing")], "")
    with pytest.raises(PeerFailed, match="exited with status 1:\nout of memory"):
        run_program([sys.executable, "-c", "raise SystemExit('out of memory')"], "")
    monkeypatch.setattr(compare, "TIMEOUT", 1.0)
    script = "import subprocess, sys, time; p = subprocess.Popen(['sleep', '1000'])"
    script += "; open(sys.argv[1], 'w').write(str(p.pid))"
    with pytest.raises(PeerFailed, match="did not finish within 1 s"):
        run_program([sys.executable, "-c", f"{script}; time.sleep(1000)", str(tmp_path / "pid")], "")
    until(lambda: not runs(int((tmp_path / "pid").read_text())))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("[llama]\ngguf = 'x'", r"\[llama\] needs `gguf`, and `bench`, `server` or both"),
        ("[llama]\ngguf = 'x'\nserver = 'true'\nconvrt = 'y'", r"\[llama\] needs"),
        ("[llama]\ngguf = 'x'\nserver = 'no-such-program'", "is not an executable program"),
        ("[llama]\ngguf = 'x'\nserver = 'true'\nconvert = 3", r"\[llama\] needs"),
        ("llama = 'x'", r"\[llama\] needs"),
        ("[peft]\npython = 'x'", "peft must be the path of a Python"),
        ("sglang = 'x'", "unknown peer 'sglang'"),
        ("peft = '/nowhere/python'", "is not an executable program"),
        ("peft =", "cannot be read"),
    ],
)
def test_invalid_files_of_peers(tmp_path: Path, text: str, error: str) -> None:
    (tmp_path / "peers.toml").write_text(text)
    with pytest.raises(BadSetting, match=error):
        compare.read_peers(tmp_path / "peers.toml")


def test_export_for_peers(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = RopeScaling("llama3", 8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)
    config = replace(tiny_base.config, rope_scaling=scaling, rope_theta=5e5)
    base = replace(tiny_base, config=config, id="f" * 64)
    folder = export_base(base, tmp_path)
    written = json.loads((folder / "config.json").read_text())
    old_names = {name: value for name, value in written.items() if name != "rope_parameters"}
    assert from_hf(written) == from_hf(old_names) == config
    assert written["eos_token_id"] == sorted(tiny_base.vocabulary.eos_ids)
    name, tensor = next(iter(tiny_base.tensors.items()))
    assert torch.equal(load_file(folder / "model.safetensors")[name], tensor.bfloat16())

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(hf_export, "save_file", full)
    assert export_base(base, tmp_path) == folder  # not written again
    with pytest.raises(OSError, match="no space"):
        export_base(tiny_base, tmp_path)
    assert list(tmp_path.iterdir()) == [folder]
    with pytest.raises(BadSetting, match="Qwen2ForCausalLM"):
        export_base(replace(base, config=replace(config, architecture="Qwen2ForCausalLM")), tmp_path)
