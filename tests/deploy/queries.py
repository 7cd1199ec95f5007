"""The PromQL queries of the dashboards and rules in deploy/."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from server.metrics import Metrics

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "deploy"
BOARDS = {p.stem: json.loads(p.read_text()) for p in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))}
RULES = DEPLOY / "prometheus" / "rules" / "loramux.yml"
OPERATIONS = REPO / "docs" / "operations.md"


def panels(board: dict[str, Any]) -> list[dict[str, Any]]:
    return [p for p in board["panels"] if p["type"] != "row"]


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> list[Any]:
    """All queries as pytest parameters."""
    found = [
        (f"{name}: {panel['title']} {target['refId']}", target["expr"])
        for name, board in BOARDS.items()
        for panel in panels(board)
        for target in panel["targets"]
    ]
    found += [(rule.get("record") or rule["alert"], rule["expr"]) for rule in rules()]
    return [pytest.param(expr, id=where) for where, expr in found]


def filled(expr: str, interval: str = "15s") -> str:
    expr = expr.replace("$job", "loramux").replace("$__rate_interval", interval)
    return re.sub(r"\$(instance|task|adapter)\b", ".*", expr)


def selectors(expr: str) -> list[promql_parser.VectorSelector]:
    """All vector selectors of an expression."""
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


def known_names() -> set[str]:
    """All metric names that the server exports."""
    names = set()
    for line in Metrics().render().decode().splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            names |= {f"{name}_{part}" for part in ("bucket", "count", "sum")} if kind == "histogram" else {name}
    return names
