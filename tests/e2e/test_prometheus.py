"""Prometheus with the config of deploy/ on a server under load: every query returns data, and faults fire alerts."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import promql_parser
import pytest

from tests.deploy.queries import DEPLOY, RULES, expressions, filled
from tests.e2e.conftest import Live, serving

pytestmark = [pytest.mark.e2e, pytest.mark.part("prometheus")]


@dataclass
class World:
    """An overloaded server and the Prometheus that scrapes it."""

    server: Live
    url: str
    folder: Path
    errors: list[Exception]

    def ask(self, expr: str) -> list[float]:
        """The values of an instant query, without those that are not numbers."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expr}, timeout=10).json()
        assert answer["status"] == "success", answer
        result = answer["data"]["result"]
        assert answer["data"]["resultType"] == "vector"
        return [v for v in (float(sample["value"][1]) for sample in result) if not math.isnan(v)]

    def firing(self) -> set[str]:
        alerts = httpx.get(f"{self.url}/api/v1/alerts", timeout=10).json()["data"]["alerts"]
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}


def wait(what: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():
            return True
        time.sleep(0.25)
    return False


def served(server: Live) -> set[str]:
    return {adapter["name"] for adapter in server.get("/adapters")["adapters"]}


def train(server: Live) -> None:
    """Start a training job that outlasts the tests, and wait for its first step."""
    lines = "".join(json.dumps({"input": f"word {i}", "output": "yes"}) + "\n" for i in range(8))
    sent = {"file": ("words.jsonl", lines.encode())}
    file = server.client.post("/v1/files", files=sent, data={"purpose": "fine-tune"}).json()["id"]
    hyper = {"n_epochs": 1000, "batch_size": 1}
    body = {"model": "smollm2-135m", "training_file": file, "hyperparameters": hyper, "lora": {"r": 1}}
    job = server.post("/v1/fine_tuning/jobs", body)["id"]
    assert wait(lambda: server.get(f"/jobs/{job}")["step"] > 0, 240), server.get(f"/jobs/{job}")


def break_a_stored_version(server: Live) -> None:
    """Truncate a stored adapter, so that its next load fails."""
    digest = server.get("/adapters/r3")["versions"][0]["digest"]
    file = server.state / "store" / "versions" / digest / "adapter_model.safetensors"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-64])


def send_requests(server: Live, number: int, stop: threading.Event, errors: list[Exception]) -> None:
    """Send tasks, single adapters, mixes, the base, mixes that do not fit, and feedback, until `stop` is set."""
    names = ["r0", "r1", "r2", "r3"]
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/generate?task=sentiment", {}),
        *(("/generate", {"adapters": [{"name": n}]}) for n in names),
        ("/generate?task=sentiment", {"adapters": [{"name": "sentiment"}, {"name": "r0", "weight": 0.5}]}),
        ("/generate", {}),
        ("/generate", {"adapters": [{"name": n} for n in (*names, "sentiment")]}),
    ]
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for i in itertools.count(number):
            if stop.is_set():
                return
            path, body = bodies[i % len(bodies)]
            try:
                answer = client.post(path, json={"prompt": f"Once {i}", "max_tokens": 3, "ignore_eos": True, **body})
                if answer.status_code == 200 and "task" in path:
                    sent = {"id": answer.json()["id"], "score": 1.0}
                    client.post("/tasks/sentiment/feedback", json=sent).raise_for_status()
                if answer.status_code == 429:
                    stop.wait(0.2)
            except httpx.HTTPError as error:
                if not stop.is_set():
                    errors.append(error)
                    return


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, embedded: Path, write_random: Callable[..., Path]
) -> Iterator[World]:
    root = tmp_path_factory.mktemp("watched")
    folder = root / "adapters"
    for i in range(4):
        write_random(folder / f"r{i}", rank=16, seed=i)
    (root / "metrics").write_text("prometheus:for-a-test-only\n")
    (root / "credentials").write_text("for-a-test-only")
    flags = ["--adapter-dir", str(folder), "--adapter-ram", "7MiB", "--max-batch", "4", "--max-queue", "2"]
    errors: list[Exception] = []
    with serving(root / "state", *flags, "--metrics-key-file", str(root / "metrics")) as server:
        assert server.client.get("/metrics").status_code == 401, "/metrics needs the metrics key"
        assert wait(lambda: served(server) >= {"r0", "r1", "r2", "r3", "sentiment"}, 30)
        break_a_stored_version(server)
        train(server)
        stop = threading.Event()
        clients = [threading.Thread(target=send_requests, args=(server, i, stop, errors)) for i in range(9)]
        with prometheus(root, server) as url:
            for client in clients:
                client.start()
            yield World(server, url, folder, errors)
            stop.set()
            for client in clients:
                client.join(30)


class prometheus:
    """Prometheus with the config of deploy/, with paths of this test and short intervals."""

    def __init__(self, root: Path, server: Live) -> None:
        quick = recent(re.sub(r"for: \dm", "for: 1s", RULES.read_text()))
        (root / "rules").mkdir()
        (root / "rules" / "loramux.yml").write_text(quick)
        config = (DEPLOY / "prometheus" / "prometheus.yml").read_text()
        for old, new in {
            "_interval: 5s": "_interval: 1s",
            "/run/secrets/prometheus_credentials": str(root / "credentials"),
            "loramux:8000": server.url.removeprefix("http://"),
        }.items():
            assert old in config
            config = config.replace(old, new)
        (root / "prometheus.yml").write_text(config)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{s.getsockname()[1]}"
        self.url, self.log = f"http://{address}", root / "prometheus.log"
        self.command = ["prometheus", f"--config.file={root / 'prometheus.yml'}", f"--web.listen-address={address}"]
        self.command.append(f"--storage.tsdb.path={root / 'tsdb'}")

    def __enter__(self) -> str:
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(self.command, stdout=out, stderr=subprocess.STDOUT)
        if not wait(self.ready, 30):
            self.process.kill()
            pytest.fail(self.log.read_text()[-2000:])
        return self.url

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)


def test_every_query_returns_data(world: World) -> None:
    """Panels and recording rules are queried unchanged, alerts without their comparison."""
    left = {expr.id: data_of(expr.values[0]) for expr in expressions()}

    def ask_all() -> bool:
        for where in [where for where, expr in left.items() if world.ask(expr)]:
            del left[where]
        return not left

    assert wait(ask_all, 60), left
    assert not world.errors


def data_of(expr: str) -> str:
    """An alert expression without its comparison."""
    tree = promql_parser.parse(filled(expr))
    if "$job" in expr or str(getattr(tree, "op", "")) not in (">", "==", "and"):
        return recent(filled(expr))
    while isinstance(tree, promql_parser.BinaryExpr) and str(tree.op) in (">", "==", "and"):
        tree = tree.lhs
    return str(tree.prettify())


def recent(text: str) -> str:
    """Shorten ranges of minutes to 10 seconds, because the test is too short for them."""
    return re.sub(r"\[\dm\]", "[10s]", text)


def test_alerts_fire(world: World) -> None:
    shutil.copytree(world.folder / "r0", world.folder / "broken")
    (world.folder / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    expected = {"LoramuxQueueFull", "LoramuxNoRoom", "LoramuxAdapterRefused", "LoramuxAdapterLoadsFail"}
    assert wait(lambda: world.firing() >= expected, 45), world.firing()

    scrape = max(world.ask("max_over_time(scrape_duration_seconds[1m])"))
    pausing = threading.Event()
    thread = threading.Thread(target=pause, args=(world.server.process, max(0.04, 1.5 * scrape), pausing))
    thread.start()
    try:
        assert wait(lambda: "LoramuxSlowSteps" in world.firing(), 60), world.firing()
    finally:
        pausing.set()
        thread.join()
    shutil.rmtree(world.folder / "broken")
    assert wait(lambda: "LoramuxAdapterRefused" not in world.firing(), 30), "the alert did not end with its cause"


def pause(process: subprocess.Popen[bytes], running: float, stop: threading.Event) -> None:
    """Alternate pauses of 0.8 s with `running` seconds of work, as on an overloaded machine.

    `running` must be longer than a scrape, or Prometheus considers the server down. A pause within a request makes one
    slow step: each request of `send_requests` has two steps after its first token.
    """
    while not stop.is_set():
        process.send_signal(signal.SIGSTOP)
        stop.wait(0.8)
        process.send_signal(signal.SIGCONT)
        stop.wait(running)


def test_a_missing_server_fires_an_alert(world: World) -> None:
    world.server.process.terminate()
    assert wait(lambda: "LoramuxDown" in world.firing(), 60), world.firing()
