"""Server against server: all are asked the same by one client, in turn, and who fails takes nothing from the others."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import servers
from benchmarks.compare import PeerFailed
from benchmarks.servers import Place, Served, report, take_turns
from benchmarks.workloads import closed
from server.errors import BadSetting
from server.kernels import choose
from tests.benchmarks.conftest import Answering, events
from tests.benchmarks.test_command import bench, told_of

if TYPE_CHECKING:
    from server.model.loader import Base

OTHER = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

noted = Path({noted!r})
port = int(sys.argv[sys.argv.index("--port") + 1])

class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with noted.open("a") as file:
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


def test_all_are_asked_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    noted = tmp_path / "noted.jsonl"
    other = program(tmp_path / "llama-server", OTHER.format(python=sys.executable, noted=str(noted)))
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
    told = told_of(tmp_path / "out", "servers-2-2")
    assert {name: len(rows) for name, rows in told["rounds"].items()} == {
        "in process": 2,
        "loramux": 2,
        "llama-server": 2,
    }
    assert set(told["ratios"]) == {"in process", "llama-server"} and list(told["failed"]) == ["vllm"]
    assert set(told["ratios"]["llama-server"]) == {"steady decode", "decode", "whole"}
    assert told["ratios"]["in process"] == {
        "whole": pytest.approx(told["medians"]["loramux"]["whole"] / told["medians"]["in process"]["whole"])
    }
    assert told["asked"]["ranks"] == [8, 16] and told["adapters"] == told["requests"] == 2
    assert told["kernels"] == choose("auto", "cpu").name
    assert (tmp_path / "out" / "servers-2-2.png").stat().st_size > 1000
    asked = [json.loads(line) for line in noted.read_text().splitlines()]
    assert len(asked) == 3 * 2, "one wave to warm up, and two"
    command = asked[0][0]
    assert [command[command.index(flag) + 1] for flag in ("-m", "-t", "-tb", "--parallel", "-c")] == [
        "q4.gguf", "1", "1", "2", "2048",
    ]  # fmt: skip
    files = [Path(command[i + 1]) for i, word in enumerate(command) if word == "--lora"]
    assert [file.read_text() for file in files] == ["s0", "s1"], "the file of each number is that of its adapter"
    bodies = [body for _, body in asked]
    assert all(len(body["prompt"]) == 128 and body["max_tokens"] == 64 and body["ignore_eos"] for body in bodies)
    assert {tuple(lora["scale"] for lora in body["lora"]) for body in bodies} == {(1.0, 0.0), (0.0, 1.0)}


def test_a_server_whose_adapters_nothing_converts_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    served = Served(tiny_base, [tmp_path / "s0"], 1, 8, 2, 1)
    with pytest.raises(BadSetting, match="needs `convert` beside its `server`, or give --no-adapters"):
        servers.compare({"llama": {"server": "x", "gguf": "y"}}, served, Place("m", tmp_path, tmp_path), 1, print)


def test_without_adapters_nothing_has_to_be_converted(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def serving(*_: Any) -> Iterator[servers.Wave]:
        yield lambda: {"whole": 1.0}

    monkeypatch.setattr(servers, "LocalEngine", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(servers, "in_process", lambda *_: lambda: {"whole": 2.0})
    for name in ("our_server", "llama_server"):
        monkeypatch.setattr(servers, name, serving)
    served, place = Served(tiny_base, [], 1, 8, 2, 1), Place("m", tmp_path, tmp_path)
    told = servers.compare({"llama": {"server": "x", "gguf": "y"}}, served, place, 2, lambda line: None)
    assert list(told.rounds) == ["in process", "loramux", "llama-server"] and not told.failed
    assert told.ratios == {"in process": {"whole": 0.5}, "llama-server": {"whole": 1.0}}


@pytest.mark.parametrize(("requests", "batch"), [(2, 32), (40, 40)])
def test_our_batch_is_that_of_the_server_or_holds_all_requests(tiny_base: Base, requests: int, batch: int) -> None:
    assert Served(tiny_base, [], requests, 8, 2, 1).batch == batch


def test_each_rate_of_a_wave_is_what_its_name_says(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = SimpleNamespace(
        tokens_per_second=1.0, decode_tokens_per_second=2.0, steady_tokens_per_second=3.0, ttft_p50=4.0
    )
    for name, told in (("closed_loop", None), ("timed", None), ("run", ([], summary))):
        monkeypatch.setattr(servers, name, lambda *_, told=told, **__: told)
    served = Served(tiny_base, [], 2, 8, 4, 1)
    wave = servers.over_http("http://x", served.body, served)
    assert wave() == {"whole": 1.0, "decode": 2.0, "steady decode": 3.0, "ttft_p50": 4.0}


@pytest.mark.parametrize("adapters", [["s0", "s1"], []])
def test_in_process_the_same_is_asked_of_the_same_adapters(tiny_base: Base, adapters: list[str]) -> None:
    asked: list[Any] = []

    class Engine:
        def mix(self, choice: Any) -> Any:
            return choice

        def run(self, *told: Any) -> float:
            asked.append(told)
            return 2.0

    served = Served(tiny_base, [Path(name) for name in adapters], 3, 8, 5, 1)
    wave = servers.in_process(Engine(), served)  # type: ignore[arg-type]
    assert wave() == {"whole": 3 * 5 / 2.0}
    ((prompts, mixes, new_tokens),) = asked
    assert prompts == [served.body(arrival, i)["prompt"] for i, arrival in enumerate(served.arrivals)]
    assert mixes == ([[(0, 1.0)], [(1, 1.0)], [(0, 1.0)]] if adapters else [[], [], []]) and new_tokens == 5


def test_each_server_is_started_for_what_it_is_asked(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, ...]] = []
    keys: list[str] = []

    @contextlib.contextmanager
    def running(*told: Any) -> Iterator[Any]:
        started.append(told)
        yield SimpleNamespace(url="http://x")

    def over_http(url: str, body: Any, served: Served, key: str = "") -> servers.Wave:
        keys.append(key)
        return lambda: {}

    monkeypatch.setattr(servers, "running", running)
    monkeypatch.setattr(servers, "over_http", over_http)
    monkeypatch.setattr(servers, "output", lambda command, _: Path(command[-1]).touch())
    for path in (tmp_path / "a" / "s0", tmp_path / "kept" / "models", tmp_path / "fresh"):
        path.mkdir(parents=True)
    (tmp_path / "a" / "s0" / "adapter_model.safetensors").touch()
    served = Served(tiny_base, [tmp_path / "a" / "s0"], 40, 8, 2, 3)
    place = Place("m", tmp_path / "kept", tmp_path / "fresh")
    llama = {"server": "l", "gguf": "g", "convert": "c"}
    with (
        servers.our_server(served, place),
        servers.llama_server(llama, served, place),
        servers.vllm_server("v", served, place),
    ):
        (ours, *_), (theirs, *_), (vllm, *_) = started
    wanted = {"--model": "m", "--library": "none", "--threads": "3", "--max-batch": "40"}
    wanted |= {"--adapter-dir": str(tmp_path / "a"), "--api-keys-file": str(tmp_path / "fresh" / "keys")}
    wanted |= {"--device": "cpu", "--kernels": "reference", "--max-step-tokens": "512"}
    assert {flag: ours[ours.index(flag) + 1] for flag in wanted} == wanted and "--no-prefix-cache" in ours
    assert (tmp_path / "fresh" / "keys").read_text() == f"bench:{keys[0]}" and keys[0] and keys[1:] == ["", ""]
    state = tmp_path / "fresh" / "state"
    assert [path.name for path in state.iterdir()] == ["models"]
    assert (state / "models").resolve() == tmp_path / "kept" / "models"
    assert "--lora-init-without-apply" in theirs and theirs[theirs.index("-c") + 1] == f"{40 * 1024}"
    job = json.loads(vllm[-1])
    assert (job["requests"], job["threads"]) == (40, 3) and job["adapters"] == {"s0": str(tmp_path / "a" / "s0")}
    assert [told[-1] for told in started[1:]] == [servers.PATIENCE] * 2, "they compile, or load all adapters"


def test_converted_adapters_are_kept_for_their_base_and_content_alone(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted: list[str] = []

    def output(command: list[str], _: str) -> str:
        converted.append(command[command.index("--base") + 1])
        Path(command[-1]).touch()
        return ""

    monkeypatch.setattr(servers, "output", output)
    named = {"server": str(tmp_path / "none"), "gguf": "x", "convert": "y"}
    other = replace(tiny_base, id="f" * 64)
    tensors = tmp_path / "s0" / "adapter_model.safetensors"
    tensors.parent.mkdir()
    for base, content in ((tiny_base, "a"), (other, "a"), (other, "a"), (other, "b")):
        tensors.write_text(content)
        served = Served(base, [tmp_path / "s0"], 1, 8, 2, 1)
        with (
            pytest.raises(servers.ServerError, match="cannot be run"),
            servers.llama_server(named, served, Place("m", tmp_path, tmp_path)),
        ):
            raise AssertionError("it is not there")
    assert [Path(path).name for path in converted] == [tiny_base.id[:32], "f" * 32, "f" * 32], "and for their content"


def test_waves_take_turns_and_medians_are_compared() -> None:
    asked: list[str] = []
    rates = {
        "in process": iter([9.0, 40.0, 50.0, 45.0]),
        "loramux": iter([9.0, 30.0, 36.0, 90.0]),
        "llama-server": iter([9.0, 4.0, 3.0, 2.0]),
        "vllm": iter([9.0, 6.0]),
    }

    def wave(name: str) -> servers.Wave:
        def run() -> dict[str, float]:
            asked.append(name)
            rate = next(rates[name], None)
            if rate is None:
                raise PeerFailed("it fell over")
            over_http = {} if name == "in process" else {"decode": 2 * rate, "steady decode": 3 * rate, "ttft_p50": 1.0}
            return {"whole": rate, **over_http}

        return run

    heard: list[str] = []
    found, failed = take_turns({name: wave(name) for name in rates}, 3, heard.append, lambda name: None)
    names = list(rates)
    assert asked == [*names, *names, *names[::-1], *names[:-1]], "the first of each warms up; who fails is left out"
    told = report(found, failed)
    assert told.failed == {"vllm": "it fell over"} and heard.count("vllm failed: it fell over") == 1
    assert told.ratios == {
        "in process": {"whole": 36 / 45},
        "llama-server": dict.fromkeys(("steady decode", "decode", "whole"), 36 / 3),
        "vllm": dict.fromkeys(("steady decode", "decode", "whole"), 36 / 6),
    }
    assert len(told.rounds["loramux"]) == 3 and told.medians["vllm"]["whole"] == 6.0


def test_without_our_own_there_are_no_ratios() -> None:
    told = report({"loramux": [], "vllm": [{"whole": 1.0}]}, {"loramux": "it fell over"})
    assert told.ratios == {} and list(told.medians) == ["vllm"]


@pytest.mark.parametrize(
    ("status", "data", "why"), [(500, "out of memory", "500: out of memory"), (200, events(3), "shorter than asked")]
)
def test_a_wave_of_which_one_fails_is_none(
    answering: Answering, tiny_base: Base, status: int, data: Any, why: str
) -> None:
    served = Served(tiny_base, [], 2, 8, 4, 1)
    wave = servers.over_http(answering.url, served.body, served, key="k")
    assert wave()["whole"] > 0
    assert {key for _, key, _ in answering.asked} == {"Bearer k"}
    assert served.arrivals == closed(2, [0], 8, 4) and answering.asked[0][2]["model"] == tiny_base.name
    answering.reply = lambda body: (status, data)
    with pytest.raises(PeerFailed, match=why):
        wave()


def test_our_engine_in_process_is_as_large_as_our_server(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []

    @contextlib.contextmanager
    def serving(*_: Any) -> Iterator[servers.Wave]:
        yield lambda: {"whole": 1.0}

    def inside(base: Any, adapters: Any, **how: Any) -> Any:
        made.append((base, adapters, how))
        return contextlib.nullcontext()

    monkeypatch.setattr(servers, "LocalEngine", inside)
    monkeypatch.setattr(servers, "in_process", lambda *_: lambda: {"whole": 2.0})
    monkeypatch.setattr(servers, "our_server", serving)
    served = Served(tiny_base, [tmp_path / "s0"], 40, 8, 2, 3)
    servers.compare({}, served, Place("m", tmp_path, tmp_path), 1, lambda line: None)
    assert made == [(tiny_base, served.adapters, {"threads": 3, "max_batch": 40})]


def fall_over() -> Any:
    raise PeerFailed("it fell over")


@pytest.fixture
def quick_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our engine in process answers without one."""
    monkeypatch.setattr(servers, "LocalEngine", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(servers, "in_process", lambda *_: lambda: {"whole": 2.0})


@pytest.mark.usefixtures("quick_inside")
def test_who_fails_in_a_wave_is_told_by_name(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "our_server", lambda *_: contextlib.nullcontext(fall_over))
    served = Served(tiny_base, [], 1, 8, 2, 1)
    told = servers.compare({}, served, Place("m", tmp_path, tmp_path), 1, lambda line: None)
    assert told.failed == {"loramux": "it fell over"}


@pytest.mark.usefixtures("quick_inside")
def test_who_fails_is_stopped_before_the_others_are_asked_again(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    @contextlib.contextmanager
    def failing(*_: Any) -> Iterator[servers.Wave]:
        yield fall_over
        told.append("vllm is stopped")

    @contextlib.contextmanager
    def serving(*_: Any) -> Iterator[servers.Wave]:
        def wave() -> dict[str, float]:
            told.append("a wave")
            return {"whole": 1.0}

        yield wave
        told.append("ours is stopped")

    monkeypatch.setattr(servers, "our_server", serving)
    monkeypatch.setattr(servers, "vllm_server", failing)
    served = Served(tiny_base, [], 1, 8, 2, 1)
    servers.compare({"vllm": "v"}, served, Place("m", tmp_path, tmp_path), 2, lambda line: None)
    assert told == ["a wave", "vllm is stopped", "a wave", "a wave", "ours is stopped"]


def test_all_requests_of_a_wave_are_there_at_once(answering: Answering, tiny_base: Base) -> None:
    """Each is answered once all have come."""
    together = threading.Barrier(3)

    def reply(body: dict[str, Any]) -> Any:
        together.wait(timeout=60)
        return 200, events(body["max_tokens"])

    answering.reply = reply
    served = Served(tiny_base, [], 3, 8, 4, 1)
    assert servers.over_http(answering.url, served.body, served)()["whole"] > 0


def test_our_server_finds_the_packed_bases_of_before(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "running", lambda *_: contextlib.nullcontext(SimpleNamespace(url="http://x")))
    for name in ("models", "cache", "other"):
        (tmp_path / "kept" / name).mkdir(parents=True)
    (tmp_path / "fresh").mkdir()
    monkeypatch.chdir(tmp_path)
    place = Place("m", Path("kept"), Path("fresh"))
    with servers.our_server(Served(tiny_base, [], 1, 8, 2, 1), place):
        found = {path.name: path.resolve(strict=True) for path in (tmp_path / "fresh" / "state").iterdir()}
    assert found == {name: tmp_path / "kept" / name for name in ("models", "cache")}


def test_what_is_converted_halfway_is_no_adapter(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def output(command: list[str], _: str) -> str:
        Path(command[-1]).write_text("half")
        raise PeerFailed("it was interrupted")

    monkeypatch.setattr(servers, "output", output)
    (tmp_path / "s0").mkdir()
    (tmp_path / "s0" / "adapter_model.safetensors").touch()
    served = Served(tiny_base, [tmp_path / "s0"], 1, 8, 2, 1)
    named = {"server": "l", "gguf": "g", "convert": "c"}
    with (
        pytest.raises(PeerFailed, match="interrupted"),
        servers.llama_server(named, served, Place("m", tmp_path, tmp_path)),
    ):
        raise AssertionError("it is not there")
    assert not list((tmp_path / "bench").rglob("*.gguf")), "the next run converts it anew"


def test_vllm_listens_where_it_is_asked_and_serves_the_base_by_its_name(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[Any, ...]] = []

    @contextlib.contextmanager
    def running(*told: Any) -> Iterator[Any]:
        started.append(told)
        yield SimpleNamespace(url="http://x")

    monkeypatch.setattr(servers, "running", running)
    served = Served(tiny_base, [], 1, 8, 2, 1)
    with servers.vllm_server("v", served, Place("m", tmp_path, tmp_path)):
        ((command, port, *_),) = started
    job = json.loads(command[-1])
    assert job["port"] == port and job["name"] == served.body(served.arrivals[0], 0)["model"]
    assert (Path(job["base"]) / "model.safetensors").is_file()
