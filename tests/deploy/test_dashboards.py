"""Grafana dashboards and Prometheus rules: structure, and queries against the metrics that the server exports.

tests/e2e/test_prometheus.py runs the same queries on a real Prometheus.
"""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml

from tests.deploy.queries import (
    BOARDS,
    DEPLOY,
    OPERATIONS,
    REPO,
    RULES,
    expressions,
    filled,
    known_names,
    panels,
    selectors,
)
from tests.deploy.queries import rules as every_rule


@pytest.mark.parametrize("name", BOARDS)
def test_dashboard_structure(name: str) -> None:
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
            assert variable.get("allValue") == (None if variable["name"] == "job" else ".*")
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
def test_panels_have_description_and_datasource(name: str) -> None:
    titles = [p["title"] for p in panels(BOARDS[name])]
    assert len(set(titles)) == len(titles)
    for panel in panels(BOARDS[name]):
        title = panel["title"]
        assert title and panel["description"].endswith("."), title
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, title
        assert panel["targets"], title
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] and target["legendFormat"], title


@pytest.mark.parametrize("expr", expressions())
def test_queries_use_exported_metrics_and_rate_counters(expr: str) -> None:
    board = "$job" in expr
    recorded = {rule["record"] for rule in every_rule() if "record" in rule}
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


def test_every_metric_has_a_panel() -> None:
    shown = {vector.name for expr in expressions() for vector in selectors(expr.values[0])}
    unseen = {re.sub("_(bucket|count|sum)$", "", n) for n in known_names() - shown} - {
        re.sub("_(bucket|count|sum)$", "", n) for n in shown
    }
    assert unseen == {"vllm:cache_config_info", "vllm:lora_requests_info"}


def test_alerts_and_metrics_are_documented() -> None:
    text = OPERATIONS.read_text(encoding="utf-8")
    for rule in every_rule():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert set(rule["annotations"]) == {"summary", "description"}
            assert f"### {rule['alert']}" in text
    for name in {re.sub("_(bucket|count|sum)$", "", n) for n in known_names()}:
        assert f"`{name}" in text, name


def test_provisioning_matches_compose() -> None:
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/loramux.yml").read_text())["providers"][0]
    grafana = yaml.safe_load((REPO / "docker-compose.yml").read_text())["services"]["grafana"]
    assert source["uid"] == "prometheus" and source["url"] == "http://prometheus:9090"
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert provider["allowUiUpdates"] is False
    for board in BOARDS.values():
        assert board["templating"]["list"][0]["current"]["value"] == source["uid"]


@pytest.mark.part("promtool")
def test_promtool_rule_tests_pass() -> None:
    for command in (
        ["check", "config", "--syntax-only", "deploy/prometheus/prometheus.yml"],
        ["check", "rules", str(RULES)],
        ["test", "rules", "deploy/prometheus/tests/loramux.yml"],
    ):
        done = subprocess.run(["promtool", *command], cwd=REPO, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
