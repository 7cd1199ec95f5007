"""The command line on the embedded base: offline generation, adapter commands, and server shutdown."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from server.cli.signals import REPEAT_WINDOW
from tests.e2e.conftest import REPO, STATE, Live, serving
from tests.waiting import until

pytestmark = pytest.mark.e2e


def test_generate(embedded: Path) -> None:
    """Run once as a process, then in this process."""
    task = ["generate", "--task", "sentiment", "A dull, lifeless film.", "--state-dir", str(STATE)]
    run = subprocess.run(
        [sys.executable, "-m", "server.cli", *task], cwd=REPO, capture_output=True, text=True, timeout=120, check=True
    )
    assert run.stdout == "negative\n"

    def run_json(*arguments: str) -> dict[str, Any]:
        adapter = f"{REPO / 'adapters' / 'library' / 'sentiment'}=0.9"
        done = CliRunner().invoke(app, [*arguments, "--json", "--library", "none", "--adapter", adapter])
        assert done.exit_code == 0, (done.output, done.exception)
        answer: dict[str, Any] = json.loads(done.stdout)
        return answer

    assert run_json(*task)["text"] == "negative", "the folder defines the task"
    raw = run_json("generate", "Once", "--max-tokens", "3", "--state-dir", str(STATE))
    assert raw["usage"]["completion_tokens"] == 3 and raw["adapters"][0]["weight"] == pytest.approx(0.9)


def test_adapter_commands_on_a_running_server(
    embedded: Path, write_random: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each command prints the new state, which equals the server's."""
    monkeypatch.chdir(tmp_path)
    for seed, folder in enumerate(("one", "two")):
        write_random(tmp_path / "watched" / folder, rank=2, seed=seed)
    with serving(tmp_path / "state", "--adapter-dir", str(tmp_path / "watched"), "--library", "none") as live:

        def run_json(*command: str) -> dict[str, Any]:
            port = live.url.rpartition(":")[2]
            done = CliRunner().invoke(app, ["adapters", *command, "--port", port, "--json"])
            assert done.exit_code == 0, (done.output, done.exception)
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer

        first = run_json("load", "mine", "one")["version"]
        second = run_json("load", "mine", "two", "--replace")["version"]
        assert second == live.get("/adapters/mine")["version"] != first
        assert run_json("roll-back", first)["version"] == live.get("/adapters/mine")["version"] == first
        assert run_json("pin", "mine")["pinned"] is live.get("/adapters/mine")["pinned"] is True
        assert run_json("unpin", "mine")["pinned"] is live.get("/adapters/mine")["pinned"] is False
        assert run_json("prefetch", "mine")["tier"] == live.get("/adapters/mine")["tier"] == "ram"
        assert run_json("show", "mine") == live.get("/adapters/mine")
        assert "mine" in {adapter["name"] for adapter in run_json("list")["adapters"]}
        assert run_json("retire", "mine")["name"] == "mine"
        assert live.client.get("/adapters/mine").status_code == 404


def _stream(live: Live, tokens: int, begun: threading.Event, lines: list[str]) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": tokens, "stream": True, "ignore_eos": True, "adapters": []}
    try:
        with httpx.stream("POST", f"{live.url}/generate", json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line:
                    lines.append(line)
                    begun.set()
    except httpx.HTTPError:
        lines.append("cut")


def test_sigterm_lets_requests_finish(embedded: Path, tmp_path: Path) -> None:
    """Running requests finish. New requests get 503 with Retry-After."""
    with serving(tmp_path, "--drain", "5m") as live:
        begun, lines = threading.Event(), []
        reader = threading.Thread(target=_stream, args=(live, 500, begun, lines))
        reader.start()
        assert begun.wait(30)
        live.process.send_signal(signal.SIGTERM)
        while (ready := httpx.get(f"{live.url}/health/ready", timeout=60)).status_code == 200:
            time.sleep(0.01)
        late = httpx.post(f"{live.url}/generate", json={"prompt": "x"}, timeout=60)
        assert late.status_code == ready.status_code == 503 and int(late.headers["retry-after"]) >= 1
        assert "shutting down" in late.json()["error"]["message"] and lines[-1] != "data: [DONE]"
        assert httpx.get(f"{live.url}/health/live", timeout=60).status_code == 200
        reader.join(300)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["finish_reason"] == "length"
        assert live.process.wait(30) == 0


def test_requests_that_exceed_the_drain_are_cancelled(embedded: Path, tmp_path: Path) -> None:
    with serving(tmp_path, "--drain", "500ms") as live:
        begun, lines = threading.Event(), []
        reader = threading.Thread(target=_stream, args=(live, 8000, begun, lines))
        reader.start()
        assert begun.wait(30)
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(30) == 0
        reader.join(10)
        assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["finish_reason"] == "cancelled"


def test_a_second_signal_stops_the_server_immediately(embedded: Path, tmp_path: Path) -> None:
    with serving(tmp_path) as live:
        begun, lines = threading.Event(), []
        reader = threading.Thread(target=_stream, args=(live, 4000, begun, lines))
        reader.start()
        assert begun.wait(30)
        live.process.send_signal(signal.SIGTERM)
        until(lambda: httpx.get(f"{live.url}/health/ready", timeout=60).status_code == 503, every=0.01)
        time.sleep(2 * REPEAT_WINDOW)
        assert live.process.poll() is None
        live.process.send_signal(signal.SIGTERM)
        assert live.process.wait(30) == 128 + signal.SIGTERM
        reader.join(10)
        assert lines[-1] != "data: [DONE]"


def test_an_invalid_base_stops_the_server(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    command = [sys.executable, "-m", "server.cli", "serve", "--port", "0", "--model", str(tmp_path / "model")]
    run = subprocess.run(
        [*command, "--state-dir", str(tmp_path / "state")],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: ")
