"""What people type: flags made from settings, one-line errors, JSON for machines, a doctor that does not fetch."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from pydantic import SecretStr
from rich.table import Table
from safetensors.torch import save_file
from typer.testing import CliRunner

from adapters import peft_format
from adapters.weights import LowRank, with_digest
from server.api.state import ServerState
from server.cli import adapters as cli_adapters
from server.cli import app, logs, main, output
from server.cli.doctor import examine
from server.cli.options import EVERYTHING, SECRET
from server.cli.serve import _server, listen
from server.errors import BadSetting
from server.model.config import from_hf
from server.settings import Settings, flag
from tests.conftest import part_missing

runner = CliRunner()


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The exit status of `loramux arguments`."""
    monkeypatch.setattr(sys, "argv", ["loramux", *arguments])
    with pytest.raises(SystemExit) as e:
        main()
    return e.value.code


def test_malloc_maps_large_blocks_whatever_has_been_freed() -> None:
    """In a process of its own, since it is told for good. By itself, glibc cuts it from an arena after one free."""
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        part_missing("this C library is not glibc")
    program = """
import ctypes
from server.cli import malloc
assert malloc.settle()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
class Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks mapped bytes a b c d e".split()]
libc.mallinfo2.restype = Counts
before, size = libc.mallinfo2().mapped, ctypes.c_size_t(2 * malloc.MAPPED)
libc.free(ctypes.c_void_p(libc.malloc(size)))
libc.malloc(size)
print(libc.mallinfo2().mapped - before)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stdout == "1\n", ran.stderr


def test_serve_has_every_setting_but_secrets() -> None:
    shown = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    for name in EVERYTHING:
        assert flag(name) in shown
    for name in SECRET:
        assert f"{flag(name)} " not in shown
    assert set(EVERYTHING) | SECRET == set(Settings.model_fields)
    words = " ".join(shown.split())
    assert "device of the base model (auto, cpu, cuda) [auto]" in words and "tasks are kept [90d]" in words


def options(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every option of every command, with the words that it is called by."""
    for name, below in getattr(command, "commands", {}).items():
        yield from options(below, (*words, name))
    if not hasattr(command, "commands"):
        yield from (((*words, option.name), option) for option in command.params if option.param_type_name == "option")


def test_a_home_is_meant_by_its_sign_in_options_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell leaves it alone in `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found, context = {}, typer.Context(typer.main.get_command(app))
    for words, option in options(context.command):
        with contextlib.suppress(typer.BadParameter):
            value = option.process_value(context, "~/x")
            if isinstance(value, Path) and words[-1] not in ("config", "state_dir"):  # as settings, which see to it
                found[words] = value
    assert set(found.values()) == {tmp_path / "x"}
    assert found.keys() >= {
        ("train", "data"), ("train", "output"), ("search", "data"), ("search", "output"), ("evaluate", "answers"),
        ("compose", "output"), ("prune", "output"), ("bench", "slora", "out"),
    }  # fmt: skip


@pytest.mark.parametrize("command", ["prune a --output=~nobody-at-all/x", "bench load http://x --out=~nobody-at-all/x"])
def test_a_home_that_nobody_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(monkeypatch, *command.split()) == 1
    said = "error: the home directory in ~nobody-at-all/x is unknown\n"
    assert capsys.readouterr().err == said


def test_every_setting_says_what_it_is() -> None:
    assert not [name for name, field in Settings.model_fields.items() if not field.description]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--host", "0.0.0.0"], "error: host '0.0.0.0' can be reached by others"),
        (["serve", "--kv-cache", "lots"], "error: kv_cache"),
        (["pull", "no-such-model"], "error: the model 'no-such-model'"),
        (["quantize", "no-such-model", "out"], "error: the model 'no-such-model'"),
        (["adapters", "check", "."], "error: "),
        (["adapters", "list", "--port", "9"], "error: no server answers at http://127.0.0.1:9"),
        (["adapters", "list", "--host", "192.0.2.1.invalid"], "error: no server answers at http://192.0.2.1.invalid"),
        (["bench", "load", "http://127.0.0.1:9", "--model", "x", "--requests", "2"], "error: none of 2 requests was"),
    ],
)
def test_errors_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(monkeypatch, *arguments) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith(message) and printed.err.count("\n") == 1
    assert printed.out == ""


def test_the_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"{metadata.version('loramux')}\n"


def test_errors_as_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "pull", "no-such-model", "--json") == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["type"] == "BadModel" and error["param"] == "model"


def test_check_reads_a_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = Settings().library
    assert library is not None
    done = runner.invoke(app, ["adapters", "check", str(library / "sentiment"), "--json"])
    found = json.loads(done.output)
    assert done.exit_code == 0 and found["ranks"] == [8] and found["version"].startswith("sentiment@")
    assert "r" in found["honoured"] and len(found["targets"]) == 7
    file = (library / "sentiment" / "adapter_model.safetensors").stat().st_size
    assert file - 100_000 < found["file_bytes"] < file, "its header is no part"
    refused = runner.invoke(app, ["adapters", "check", str(library / "sentiment"), "--max-rank", "4"])
    assert refused.exit_code == 1 and "rank" in str(refused.exception)


def test_check_says_what_the_server_would_of_another_base(tmp_path: Path) -> None:
    library = Settings().library
    assert library is not None
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 30,
        "num_attention_heads": 2,
        "max_position_embeddings": 8,
        "tie_word_embeddings": True,
    }
    shapes = from_hf(config)
    matrices = {f"{path}.weight": shape for path, shape in (shapes.linear_shapes() | shapes.table_shapes()).items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.zeros(shape) for name, shape in (matrices | shapes.tensor_shapes()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    check = ["adapters", "check", str(library / "sentiment"), "--json"]
    refused = runner.invoke(app, [*check, "--model", str(tmp_path)])
    assert refused.exit_code == 1 and "made for another base" in str(refused.exception)
    one = {"model.layers.0.mlp.up_proj": LowRank(torch.ones(1, 8), torch.ones(8, 1), 1.0)}
    another = with_digest("a", one, {"base": "org/another"})
    peft_format.save(another, tmp_path / "own", shapes=shapes.linear_shapes())
    own = runner.invoke(app, ["adapters", "check", str(tmp_path / "own"), "--json", "--model", str(tmp_path)])
    assert "it names 'org/another' as its base" in json.loads(own.output)["notes"][0]
    unknown = json.loads(runner.invoke(app, [*check, "--state-dir", str(tmp_path)]).output)
    assert unknown["fits"] is None and "smollm2-135m is not known" in unknown["notes"][0]


def test_pull_says_where(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").touch()
    done = runner.invoke(app, ["pull", str(tmp_path / "tiny.gguf"), "--json"])
    assert json.loads(done.output) == {"name": "tiny", "path": str(tmp_path / "tiny.gguf")}


def test_what_does_not_listen_needs_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a server that others can reach, as in the image."""
    monkeypatch.setenv("LORAMUX_HOST", "0.0.0.0")
    (tmp_path / "tiny.gguf").touch()
    assert runner.invoke(app, ["pull", str(tmp_path / "tiny.gguf"), "--json"]).exit_code == 0
    refused = runner.invoke(app, ["doctor", "--json"])
    assert "can be reached by others" in str(refused.exception), "it says what a server would"


def test_no_name_is_no_folder() -> None:
    refused = runner.invoke(app, ["pull", ""])
    assert refused.exit_code == 1 and "the model '' is no name" in str(refused.exception)


def test_the_doctor_finds_what_would_go_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        report = examine(Settings(port=port, model="nothing", state_dir=tmp_path))
    assert any(f"can not listen on 127.0.0.1:{port}" in problem for problem in report.problems)
    assert any("'nothing'" in problem for problem in report.problems)
    assert {"cores", "processor", "memory", "GPU", "kernels", "state"} <= set(report.facts)


def test_the_doctor_fetches_nothing(tmp_path: Path) -> None:
    report = examine(Settings(port=0, state_dir=tmp_path / "new"))
    assert report.problems == []
    assert "not on this machine yet" in report.facts["base"] and any("pull" in r for r in report.remarks)
    assert list(tmp_path.iterdir()) == []


def test_the_doctor_knows_what_the_kernels_run_on(tmp_path: Path) -> None:
    report = examine(Settings(port=0, device="cuda", threads=4096, state_dir=tmp_path))
    assert any("CUDA kernels cannot run here" in problem for problem in report.problems)
    assert any("4096 threads" in remark for remark in report.remarks)


def test_the_doctor_looks_at_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def problems(model: Path | str, **settings: Any) -> str:
        return " ".join(examine(Settings(port=0, model=str(model), state_dir=tmp_path, **settings)).problems)

    folder, text = tmp_path / "model", tmp_path / "notes.txt"
    folder.mkdir()
    text.write_text("no model, though as long as the head of one")
    assert "neither a config.json nor exactly one GGUF file" in problems(folder)
    assert "notes.txt is not a GGUF file" in problems(text)
    (folder / "config.json").write_text(json.dumps({"architectures": ["MambaForCausalLM"]}))
    assert "MambaForCausalLM is not served" in problems(folder)
    assert problems("org/model") == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert f"needs an extra: {sys.executable} -m pip install 'loramux[hub]'" in problems("org/model")


def test_the_doctor_tells_how_a_base_would_be_served(tmp_path: Path, tiny_folder: Path) -> None:
    settings: dict[str, Any] = {"port": 0, "model": str(tiny_folder), "state_dir": tmp_path}
    small = examine(Settings(**settings, group_size=32))
    assert small.problems == [] and small.facts["served as"].startswith("int4 in groups of 32")
    assert any("which groups of 256 do not divide" in p for p in examine(Settings(**settings, group_size=256)).problems)


def _leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), command
        return
    for name, child in children.items():
        yield from _leaves(child, (*path, name))


def test_every_command_that_answers_does_so_in_json_too() -> None:
    commands = dict(_leaves(typer.main.get_command(app)))
    without = {name for name, command in commands.items() if not any("--json" in p.opts for p in command.params)}
    assert without == {"serve", "bench adapters"} and len(commands) > 15


def test_the_key_that_a_command_shows(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("boss:two\n")
    looking = Settings(api_keys=SecretStr("team:one"))
    assert cli_adapters._keys(looking) == {"team": "one"} and cli_adapters._keys(Settings()) == {}
    assert cli_adapters._keys(Settings(api_keys=SecretStr("team:one"), admin_keys_file=file)) == {"boss": "two"}


def test_an_adapter_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    cli_adapters._tell({"name": "a", "bytes": 2048, "notes": [], "card": "[x] and [/y] are text", "tier": "ram"}, False)
    assert capsys.readouterr().out.splitlines() == [
        "name       a",
        "bytes      2.0 KiB",
        "card       [x] and [/y] are text",
        "tier       ram",
    ]


def test_a_list_is_whole_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is folded or cut off, as for a terminal, no `grep` finds."""
    told = {"tier": "ram", "bytes": 2048, "ranks": [8], "targets": ["q_proj"] * 9, "leases": 0, "pinned": True}
    adapter = {"version": f"{'a' * 64}@0123456789ab", **told, "tasks": ["t" * 64]}
    monkeypatch.setattr(cli_adapters, "_call", lambda *_: {"adapters": [adapter], "rejected": []})
    shown = runner.invoke(app, ["adapters", "list"], env={"COLUMNS": "40"}).stdout
    assert shown.splitlines()[1].split() == [adapter["version"], "ram", "2.0", "KiB", "8", *["q,"] * 8, "q", "0", "yes",
                                             "t" * 64]  # fmt: skip


def test_the_doctor_ends_with_a_status(tmp_path: Path) -> None:
    well = runner.invoke(app, ["doctor", "--port", "0", "--json", "--state-dir", str(tmp_path)])
    ill = runner.invoke(app, ["doctor", "--port", "0", "--json", "--model", "nothing"])
    assert (well.exit_code, json.loads(well.output)["ok"]) == (0, True)
    assert (ill.exit_code, json.loads(ill.output)["ok"]) == (1, False)


def test_listening() -> None:
    with listen("127.0.0.1", 0) as s:
        port = s.getsockname()[1]
        assert port > 0
        with pytest.raises(BadSetting, match=f"can not listen on 127.0.0.1:{port}: Address already in use; --port"):
            listen("127.0.0.1", port)
    with pytest.raises(BadSetting, match="can not listen"):
        listen("no such host", 0)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="the machine has no IPv6")
def test_all_addresses_are_also_those_of_ipv4() -> None:
    with listen("::", 0) as s, socket.create_connection(("127.0.0.1", s.getsockname()[1]), timeout=5) as client:
        assert client.getpeername()[0] == "127.0.0.1"


def test_a_connection_is_kept_for_longer_than_a_proxy_keeps_it() -> None:
    """nginx keeps its own for a minute; one that sent a request as the server closed would answer 502."""
    assert _server(Settings(), lambda: None, ServerState(Settings())).config.timeout_keep_alive > 60


@pytest.mark.parametrize("drain", [0.0, 0.5])
def test_a_server_ends_once_it_drains_and_not_before(drain: float) -> None:
    async def ticked() -> list[bool]:
        settings = Settings(drain=drain)
        runtime = ServerState(settings)
        server = _server(settings, lambda: None, runtime)
        server.server_state.tasks.add(asyncio.create_task(asyncio.sleep(60)))
        ended = [await server.on_tick(1)]
        runtime.drain()
        ended.append(await server.on_tick(2))
        await asyncio.sleep(drain)
        return [*ended, await server.on_tick(3)]

    assert asyncio.run(ticked()) == [False, drain == 0.0, True]


def test_what_libraries_ask_for_is_no_line_of_the_log() -> None:
    """URLs may carry signatures."""
    logs.configure("text", "info")
    assert not any(
        logging.getLogger(name).isEnabledFor(logging.INFO) for name in ("httpx", "httpx2", "huggingface_hub")
    )


def test_json_log_lines() -> None:
    record = logging.LogRecord("a.b", logging.WARNING, "f", 1, "%s is late", ("it",), None)
    record.request_id = "gen-1"
    line = json.loads(logs.JsonLines().format(record))
    assert line | {"time": ""} == {
        "time": "",
        "level": "warning",
        "logger": "a.b",
        "message": "it is late",
        "request_id": "gen-1",
    }


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with output.progress("bytes") as bar:
        for done in (0, 5, 10):
            bar("fetching", done, 10)
        bar("loading", 0, 0)
    assert capsys.readouterr().err == "fetching ...\nloading ...\n"
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 0.0)
    with output.progress("bytes") as bar:
        for done in (0, 5, 10):
            bar("fetching", done, 10)
        bar("loading", 0, 0)
        bar("loading", 7, 0)
    assert capsys.readouterr().err == "fetching ...\nfetching 50 %\nfetching 100 %\nloading ...\n"
    with output.progress("bytes", quiet=True) as bar:
        bar("fetching", 1, 2)
    told: list[str] = []
    with output.progress("bytes", tell=told.append) as bar:
        bar("fetching", 0, 2)
        bar("fetching", 1, 2)
    assert told == ["fetching ...", "fetching 50 %"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(("n", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3072.0 GiB")])
def test_sizes_for_people(n: int, text: str) -> None:
    assert output.size(n) == text


def test_a_line_of_the_log_is_one_whatever_strangers_write() -> None:
    lines = logs.TextLines()
    told = logging.LogRecord("x", logging.INFO, "", 0, "%s has %r", ("a\n12:00:00 INFO ready\x1b[2J\u2028", 1), None)
    assert lines.format(told)[9:] == "INFO a\\n12:00:00 INFO ready\\x1b[2J\\u2028 has 1"


def test_no_name_of_a_stranger_steers_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row("a\x1b]0;b\x07")
    output.out().print(table)
    output.out().print("one [x]\r\n\ttwo \u202e\x9b2J\r")
    output.say_error("no \x1b[2J")
    told = capsys.readouterr()
    assert "a\\x1b]0;b\\x07" in told.out and "one [x]\n        two \\u202e\\x9b2J\\r\n" in told.out
    assert "\x1b" not in told.out and told.err == "error: no \\x1b[2J\n"
