"""Comparison over HTTP: the same requests for all servers, in turn, and failures of single servers."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import servers
from benchmarks.compare import PeerFailed
from benchmarks.servers import Folders, Workload, report, take_turns
from benchmarks.workloads import closed
from server.errors import BadSetting
from server.kernels import choose
from tests.benchmarks.conftest import FakeServer, events
from tests.benchmarks.test_commands import bench, read_result

if TYPE_CHECKING:
    from server.model.loader import Base

OTHER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

log = Path({log!r})
port = int(sys.argv[sys.argv.index("--port") + 1])

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with log.open("a") as file:
            file.write(json.dumps([sys.argv[1:], body]) + "\\n")
        tokens = [json.dumps(dict(choices=[dict(text="x")]))] * body["max_tokens"]
        usage = json.dumps(dict(choices=[], usage=dict(completion_tokens=body["max_tokens"])))
        self.send_response(200)
        self.end_headers()
        self.wfile.write("".join(f"data: {{d}}\\n\\n" for d in [*tokens, usage, "[DONE]"]).encode())

    def log_message(self, *_):
        pass

ThreadingHTTPServer(("127.0.0.1", port), Answer).serve_forever()
"""

CONVERT = """
import sys
from pathlib import Path

base = Path(sys.argv[sys.argv.index("--base") + 1])
assert (base / "model.safetensors").is_file() and Path(sys.argv[3]).joinpath("adapter_model.safetensors").is_file()
Path(sys.argv[sys.argv.index("--outfile") + 1]).write_text(Path(sys.argv[3]).name)
"""


def program(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_all_servers_get_the_same_requests(tiny_folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    other = program(tmp_path / "llama-server", OTHER.format(python=sys.executable, log=str(log)))
    convert = program(tmp_path / "convert.py", CONVERT)
    (tmp_path / "peers.toml").write_text(
        f"vllm = '{sys.executable}'\n[llama]\ngguf = 'q4.gguf'\nserver = '{other}'\nconvert = '{convert}'\n"
    )
    result = bench(
        "servers", str(tmp_path / "peers.toml"), "--model", str(tiny_folder), "--state-dir", str(tmp_path / "state"),
        "--threads", "1", "--rounds", "2", "--requests", "2", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert result.exit_code == 1, result.exception
    assert "the peer vllm failed" in result.stderr and "No module named 'vllm'" in result.stderr
    found = read_result(tmp_path / "out", "servers-2-2")
    assert {name: len(rows) for name, rows in found["rounds"].items()} == {
        "in process": 2,
        "loramux": 2,
        "llama-server": 2,
    }
    assert set(found["ratios"]) == {"in process", "llama-server"} and list(found["failed"]) == ["vllm"]
    assert set(found["ratios"]["llama-server"]) == {"steady decode", "decode", "whole"}
    assert found["ratios"]["in process"] == {
        "whole": pytest.approx(found["medians"]["loramux"]["whole"] / found["medians"]["in process"]["whole"])
    }
    assert found["asked"]["ranks"] == [8, 16] and found["adapters"] == found["requests"] == 2
    assert found["kernels"] == choose("auto", "cpu").name
    assert (tmp_path / "out" / "servers-2-2.png").stat().st_size > 1000
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(requests) == 3 * 2  # with the warm-up
    command = requests[0][0]
    assert [command[command.index(flag) + 1] for flag in ("-m", "-t", "-tb", "--parallel", "-c")] == [
        "q4.gguf", "1", "1", "2", "2048",
    ]  # fmt: skip
    files = [Path(command[i + 1]) for i, word in enumerate(command) if word == "--lora"]
    assert [file.read_text() for file in files] == ["s0", "s1"]
    bodies = [body for _, body in requests]
    assert all(len(body["prompt"]) == 128 and body["max_tokens"] == 64 and body["ignore_eos"] for body in bodies)
    assert {tuple(lora["scale"] for lora in body["lora"]) for body in bodies} == {(1.0, 0.0), (0.0, 1.0)}


@pytest.fixture
def fast_engine(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replaces the in-process engine; records its options."""
    made: list[dict[str, Any]] = []

    def engine(base: Any, adapters: Any, **options: Any) -> Any:
        made.append(options)
        return contextlib.nullcontext()

    monkeypatch.setattr(servers, "LocalEngine", engine)
    monkeypatch.setattr(servers, "in_process", lambda *_: lambda: {"whole": 2.0})
    return made


def crash() -> Any:
    raise PeerFailed("crashed")


def test_adapters_for_llama_server_need_a_conversion_script(tiny_base: Base, tmp_path: Path) -> None:
    workload = Workload(tiny_base, [tmp_path / "s0"], 1, 8, 2, 1)
    with pytest.raises(BadSetting, match="needs `convert` for adapters"):
        servers.compare({"llama": {"server": "x", "gguf": "y"}}, workload, Folders("m", tmp_path, tmp_path), 1, print)


@pytest.mark.parametrize(("requests", "batch"), [(1, 32), (40, 40)])
def test_comparison_without_adapters(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_engine: list[Any], requests: int, batch: int
) -> None:
    for name in ("our_server", "llama_server"):
        monkeypatch.setattr(servers, name, lambda *_: contextlib.nullcontext(lambda: {"whole": 1.0}))
    workload, folders = Workload(tiny_base, [], requests, 8, 2, 3), Folders("m", tmp_path, tmp_path)
    found = servers.compare({"llama": {"server": "x", "gguf": "y"}}, workload, folders, 2, lambda line: None)
    assert list(found.rounds) == ["in process", "loramux", "llama-server"] and not found.failed
    assert found.ratios == {"in process": {"whole": 0.5}, "llama-server": {"whole": 1.0}}
    assert fast_engine == [{"threads": 3, "max_batch": batch}] and workload.batch == batch


def test_wave_in_process(tiny_base: Base) -> None:
    runs: list[Any] = []

    class Engine:
        def mix(self, choice: Any) -> Any:
            return choice

        def run(self, *arguments: Any) -> float:
            runs.append(arguments)
            return 2.0

    workload = Workload(tiny_base, [Path("s0"), Path("s1")], 3, 8, 5, 1)
    assert servers.in_process(Engine(), workload)() == {"whole": 3 * 5 / 2.0}  # type: ignore[arg-type]
    ((prompts, mixes, new_tokens),) = runs
    assert prompts == [workload.body(arrival, i)["prompt"] for i, arrival in enumerate(workload.arrivals)]
    assert mixes == [[(0, 1.0)], [(1, 1.0)], [(0, 1.0)]] and new_tokens == 5


@pytest.mark.parametrize(
    ("status", "data", "error"), [(500, "out of memory", "500: out of memory"), (200, events(3), "shorter than")]
)
def test_wave_over_http(fake_server: FakeServer, tiny_base: Base, status: int, data: Any, error: str) -> None:
    workload = Workload(tiny_base, [], 2, 8, 4, 1)
    wave = servers.over_http(fake_server.url, workload.body, workload, key="k")
    assert set(wave()) == {"whole", "decode", "steady decode", "ttft_p50"}
    assert {key for _, key, _ in fake_server.requests} == {"Bearer k"}
    assert workload.arrivals == closed(2, [0], 8, 4) and fake_server.requests[0][2]["model"] == tiny_base.name
    fake_server.reply = lambda body: (status, data)
    with pytest.raises(PeerFailed, match=error):
        wave()


def test_commands_of_the_servers(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[Any, ...]] = []
    keys: list[str] = []

    @contextlib.contextmanager
    def running(*arguments: Any) -> Iterator[Any]:
        started.append(arguments)
        yield SimpleNamespace(url="http://x")

    def over_http(url: str, body: Any, workload: Workload, key: str = "") -> servers.Wave:
        keys.append(key)
        return lambda: {}

    monkeypatch.setattr(servers, "running", running)
    monkeypatch.setattr(servers, "over_http", over_http)
    monkeypatch.setattr(servers, "run_program", lambda command, _: Path(command[-1]).touch())
    for path in (tmp_path / "a" / "s0", tmp_path / "state" / "models", tmp_path / "scratch"):
        path.mkdir(parents=True)
    (tmp_path / "a" / "s0" / "adapter_model.safetensors").touch()
    workload = Workload(tiny_base, [tmp_path / "a" / "s0"], 40, 8, 2, 3)
    folders = Folders("m", tmp_path / "state", tmp_path / "scratch")
    llama = {"server": "l", "gguf": "g", "convert": "c"}
    with (
        servers.our_server(workload, folders),
        servers.llama_server(llama, workload, folders),
        servers.vllm_server("v", workload, folders),
    ):
        (ours, *_), (theirs, *_), (vllm, *_) = started
    expected = {"--model": "m", "--library": "none", "--threads": "3", "--max-batch": "40", "--device": "cpu"}
    expected |= {"--adapter-dir": str(tmp_path / "a"), "--api-keys-file": str(tmp_path / "scratch" / "keys")}
    expected |= {"--kernels": "reference", "--max-step-tokens": "512"}
    assert {flag: ours[ours.index(flag) + 1] for flag in expected} == expected and "--no-prefix-cache" in ours
    assert (tmp_path / "scratch" / "keys").read_text() == f"bench:{keys[0]}" and keys[0] and keys[1:] == ["", ""]
    assert (tmp_path / "scratch" / "state" / "models").resolve() == tmp_path / "state" / "models"
    assert "--lora-init-without-apply" in theirs and theirs[theirs.index("-c") + 1] == f"{40 * 1024}"
    job = json.loads(vllm[-1])
    assert (job["requests"], job["threads"]) == (40, 3) and job["adapters"] == {"s0": str(tmp_path / "a" / "s0")}


def test_converted_adapters_are_cached(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By base and content. An interrupted conversion leaves nothing."""
    bases: list[str] = []
    failures = iter([True])

    def convert(command: list[str], _: str) -> str:
        bases.append(Path(command[command.index("--base") + 1]).name)
        Path(command[-1]).touch()
        if next(failures, False):
            raise PeerFailed("interrupted")
        return ""

    monkeypatch.setattr(servers, "run_program", convert)
    peer = {"server": str(tmp_path / "missing"), "gguf": "x", "convert": "y"}
    other = replace(tiny_base, id="f" * 64)
    tensors = tmp_path / "s0" / "adapter_model.safetensors"
    tensors.parent.mkdir()
    for base, content in ((tiny_base, "a"), (tiny_base, "a"), (other, "a"), (other, "a"), (other, "b")):
        tensors.write_text(content)
        workload = Workload(base, [tmp_path / "s0"], 1, 8, 2, 1)
        with (
            pytest.raises(servers.ServerError, match=r"interrupted|cannot be run"),
            servers.llama_server(peer, workload, Folders("m", tmp_path, tmp_path)),
        ):
            raise AssertionError("the server does not exist")
    assert bases == [tiny_base.id[:32], tiny_base.id[:32], "f" * 32, "f" * 32]


def test_waves_alternate_and_medians_are_compared() -> None:
    order: list[str] = []
    rates = {
        "in process": iter([9.0, 40.0, 50.0, 45.0]),
        "loramux": iter([9.0, 30.0, 36.0, 90.0]),
        "llama-server": iter([9.0, 4.0, 3.0, 2.0]),
        "vllm": iter([9.0, 6.0]),
    }

    def wave(name: str) -> servers.Wave:
        def run() -> dict[str, float]:
            order.append(name)
            rate = next(rates[name], None)
            if rate is None:
                raise PeerFailed("crashed")
            over_http = {} if name == "in process" else {"decode": 2 * rate, "steady decode": 3 * rate, "ttft_p50": 1.0}
            return {"whole": rate, **over_http}

        return run

    stopped: list[str] = []
    found, failed = take_turns({name: wave(name) for name in rates}, 3, lambda line: None, stopped.append)
    names = list(rates)
    assert order == [*names, *names, *names[::-1], *names[:-1]] and stopped == ["vllm"]
    measured = report(found, failed)
    assert measured.failed == {"vllm": "crashed"}
    assert measured.ratios == {
        "in process": {"whole": 36 / 45},
        "llama-server": dict.fromkeys(("steady decode", "decode", "whole"), 36 / 3),
        "vllm": dict.fromkeys(("steady decode", "decode", "whole"), 36 / 6),
    }
    only_vllm = report({"loramux": [], "vllm": [{"whole": 1.0}]}, {"loramux": "crashed"})
    assert only_vllm.ratios == {} and list(only_vllm.medians) == ["vllm"]


@pytest.mark.usefixtures("fast_engine")
def test_a_failed_server_is_stopped_at_once(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    @contextlib.contextmanager
    def failing(*_: Any) -> Iterator[servers.Wave]:
        yield crash
        log.append("vllm stopped")

    def wave() -> dict[str, float]:
        log.append("wave")
        return {"whole": 1.0}

    monkeypatch.setattr(servers, "our_server", lambda *_: contextlib.nullcontext(wave))
    monkeypatch.setattr(servers, "vllm_server", failing)
    folders = Folders("m", tmp_path, tmp_path)
    found = servers.compare({"vllm": "v"}, Workload(tiny_base, [], 1, 8, 2, 1), folders, 2, lambda line: None)
    assert log == ["wave", "vllm stopped", "wave", "wave"] and found.failed == {"vllm": "crashed"}
