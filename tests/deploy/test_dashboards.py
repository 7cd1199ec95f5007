"""Dashboards, rules and alerts: by the linter's rules, against a live server's names, and on a real Prometheus.

The live part runs Prometheus from deploy/prometheus over a server under load, asks it every query of every panel and
rule, and breaks the server until the alerts fire.
"""

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
import yaml

from server.metrics import Metrics
from tests.e2e.conftest import Live, serving

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
BOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))}
RULES = DEPLOY / "prometheus" / "rules" / "loramux.yml"
OPERATIONS = REPO / "docs" / "operations.md"
UNITS = {"reqps", "short", "percentunit", "s", "bytes", "ops", "none"}
JOBS = "loramux_training_"
"""Series that only training jobs make."""


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in board["panels"] if p["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[Any]:
    """Every query, as (where, expression); a variable stands as Grafana would put it in when all is chosen."""
    found = [
        (f"{name}: {panel['title']} {target['refId']}", target["expr"])
        for name, board in BOARDS.items()
        for panel in panels(board)
        for target in panel["targets"]
    ]
    found += [(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]
    return [pytest.param(expr, id=where) for where, expr in found]


def filled(expr: str, interval: str = "15s") -> str:
    return re.sub(r"\$(job|instance|task|adapter)\b", ".*", expr.replace("$__rate_interval", interval))


def selectors(expr: str) -> list[promql_parser.VectorSelector]:
    """Every vector that an expression reads."""
    found: list[promql_parser.VectorSelector] = []

    def walk(node: Any) -> None:
        match node:
            case promql_parser.VectorSelector():
                found.append(node)
            case promql_parser.MatrixSelector():
                walk(node.vector_selector)
            case promql_parser.Call():
                for arg in node.args:
                    walk(arg)
            case promql_parser.BinaryExpr():
                walk(node.lhs)
                walk(node.rhs)
            case promql_parser.AggregateExpr() | promql_parser.ParenExpr() | promql_parser.UnaryExpr():
                walk(node.expr)

    walk(promql_parser.parse(filled(expr)))
    return found


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_whole(name: str) -> None:
    board = BOARDS[name]
    assert board["schemaVersion"] >= 39 and board["uid"].startswith("loramux-") and board["editable"] is False
    assert board["title"] and board["description"] and board["refresh"]
    variables = {v["name"]: v for v in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource" and variables["datasource"]["query"] == "prometheus"
    assert variables.keys() >= {"job", "instance"}
    for variable in variables.values():
        if variable["type"] == "query":
            assert variable["multi"] and variable["includeAll"] and variable["refresh"] == 2
            assert variable["datasource"]["uid"] == "${datasource}"
            assert "label_values(" in variable["query"]["query"]
    everything = board["panels"]
    assert len({p["id"] for p in everything}) == len(everything)
    cells = [
        (x, y)
        for p in everything
        for x in range(p["gridPos"]["x"], p["gridPos"]["x"] + p["gridPos"]["w"])
        for y in range(p["gridPos"]["y"], p["gridPos"]["y"] + p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "no two panels overlap"
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_says_what_it_shows(name: str) -> None:
    titles = [p["title"] for p in panels(BOARDS[name])]
    assert len(set(titles)) == len(titles)
    for panel in panels(BOARDS[name]):
        title = panel["title"]
        assert title and panel["description"].endswith("."), title
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        assert panel["targets"], title
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] and target["legendFormat"], title


@pytest.mark.parametrize("expr", expressions())
def test_an_expression_reads_what_exists_the_right_way(expr: str) -> None:
    """It parses, its counters are only read as rates over the scrape interval, and its names are the server's own."""
    board = "$job" in expr
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    for vector in selectors(expr):
        assert vector.name in known_names() | recorded | {"up"}
        labels = {matcher.name for matcher in vector.matchers.matchers}
        if board:
            assert labels >= {"job", "instance"}, vector.name
    plain = filled(expr)
    for counter in re.finditer(r"\w+_(?:total|bucket|count|sum)\b(?!\()", plain):
        if counter[0] in known_names():
            assert re.search(r"(rate|increase)\($", plain[: counter.start()]), counter[0]
    if board:
        assert set(re.findall(r"\}\[([^\]]+)\]", expr)) <= {"$__rate_interval"}


def known_names() -> set[str]:
    """Every name that the server exposes, samples or not."""
    names = set()
    for line in Metrics().render().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "histogram" else {name}
    return names


def test_every_series_has_a_panel_or_is_the_gateways() -> None:
    shown = {vector.name for expr in expressions() for vector in selectors(expr.values[0])}
    unseen = {re.sub("_(bucket|count|sum)$", "", n) for n in known_names() - shown} - {
        re.sub("_(bucket|count|sum)$", "", n) for n in shown
    }
    assert unseen == {"vllm:cache_config_info", "vllm:lora_requests_info"}


def test_alerts_say_what_and_operators_are_told_what_to_do() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}
            assert f"### {rule['alert']}" in text
    for name in {re.sub("_(bucket|count|sum)$", "", n) for n in known_names()}:
        assert f"`{name}" in text, name
    for board in BOARDS.values():
        assert board["title"] in text
        for panel in panels(board):
            assert re.sub(r", p\d\d$", "", panel["title"]) in text, panel["title"]


def test_provisioning_and_compose_agree() -> None:
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/loramux.yml").read_text())["providers"][0]
    grafana = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]["grafana"]
    assert source["uid"] == "prometheus" and source["url"] == "http://prometheus:9090"
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert provider["allowUiUpdates"] is False
    for board in BOARDS.values():
        assert board["templating"]["list"][0]["current"]["value"] == source["uid"]


@pytest.mark.part("promtool")
def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    for command in (
        ["check", "config", "--syntax-only", "deploy/prometheus/prometheus.yml"],
        ["check", "rules", str(RULES)],
        ["test", "rules", "deploy/prometheus/tests/loramux.yml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=REPO, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr


# ---- on a real Prometheus


@dataclass
class World:
    """A server under load that has less room than is asked of it, and the Prometheus that watches it."""

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


def press(server: Live, number: int, stop: threading.Event, errors: list[Exception]) -> None:
    """One client of many: tasks, single adapters, mixes, the base, what does not fit, and thumbs."""
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
                answer = client.post(path, json={"prompt": f"Once {i}", "max_tokens": 6, "ignore_eos": True, **body})
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
    flags = ["--adapter-dir", str(folder), "--adapter-ram", "14MiB", "--max-batch", "4", "--max-queue", "2"]
    errors: list[Exception] = []
    with serving(root / "state", *flags, "--metrics-key-file", str(root / "metrics")) as server:
        assert server.client.get("/metrics").status_code == 401, "Prometheus's key is asked for"
        assert wait(lambda: len(server.get("/adapters")["adapters"]) == 5, 30)
        stop = threading.Event()
        clients = [threading.Thread(target=press, args=(server, i, stop, errors)) for i in range(9)]
        with prometheus(root, server) as url:
            for client in clients:
                client.start()
            yield World(server, url, folder, errors)
            stop.set()
            for client in clients:
                client.join(30)


class prometheus:
    """Prometheus from deploy/, every path and pace of it made this machine's and a test's."""

    def __init__(self, root: Path, server: Live) -> None:
        quick = re.sub(r"\[\dm\]", "[10s]", re.sub(r"for: \dm", "for: 1s", RULES.read_text()))
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
        if shutil.which("prometheus") is None:
            pytest.skip("prometheus is not on the path")
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


@pytest.mark.e2e
@pytest.mark.part("prometheus")
def test_every_query_returns_data(world: World) -> None:
    """Of panels and recorded rules as they are; of alerts what they compare, once their faults have been induced."""
    break_a_stored_version(world)
    left = {expr.id: data_of(expr.values[0]) for expr in expressions() if JOBS not in expr.values[0]}

    def ask_all() -> bool:
        for where in [where for where, expr in left.items() if world.ask(expr)]:
            del left[where]
        return not left

    assert wait(ask_all, 60), left
    assert not world.errors


def data_of(expr: str) -> str:
    """An expression without the comparison that makes it an alert."""
    tree = promql_parser.parse(filled(expr))
    if "$job" not in expr and isinstance(tree, promql_parser.BinaryExpr) and ">" in str(tree.op):
        return tree.lhs.prettify()
    return filled(expr)


def break_a_stored_version(world: World) -> None:
    """Damage what the store holds of an adapter, so that its next load fails."""
    digest = world.server.get("/adapters/r3")["versions"][0]["digest"]
    file = world.server.state / "store" / "versions" / digest / "adapter_model.safetensors"
    file.chmod(0o600)
    file.write_bytes(file.read_bytes()[:-64])


@pytest.mark.e2e
@pytest.mark.part("prometheus")
def test_faults_fire_their_alerts(world: World) -> None:
    shutil.copytree(world.folder / "r0", world.folder / "broken")
    (world.folder / "broken" / "adapter_model.safetensors").write_bytes(b"no tensors")
    expected = {"LoramuxQueueFull", "LoramuxNoRoom", "LoramuxAdapterRefused", "LoramuxAdapterLoadsFail"}
    assert wait(lambda: world.firing() >= expected, 45), world.firing()

    pausing = threading.Event()
    thread = threading.Thread(target=pause, args=(world.server.process, pausing))
    thread.start()
    try:
        assert wait(lambda: "LoramuxSlowSteps" in world.firing(), 60), world.firing()
    finally:
        pausing.set()
        thread.join()
    shutil.rmtree(world.folder / "broken")
    assert wait(lambda: "LoramuxAdapterRefused" not in world.firing(), 30), "it ends with its fault"


def pause(process: subprocess.Popen[bytes], stop: threading.Event) -> None:
    """Let the server run for a twentieth of the time, as on a machine that others have taken over."""
    while not stop.is_set():
        process.send_signal(signal.SIGSTOP)
        stop.wait(0.8)
        process.send_signal(signal.SIGCONT)
        stop.wait(0.04)


@pytest.mark.e2e
@pytest.mark.part("prometheus")
def test_a_server_that_is_gone_is_told(world: World) -> None:
    world.server.process.terminate()
    assert wait(lambda: "LoramuxDown" in world.firing(), 60), world.firing()
