"""The fields that Grafana 11 and 12 know of what the boards use, as the schemas of its foundation SDK list them.

Grafana passes over a field that it does not know, so a slip of the pen would show as a panel that looks wrong. What is
allowed here is what was there when each board went through the SDK of 11.6 and came back whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BOARD = {
    *("annotations", "description", "editable", "fiscalYearStartMonth", "graphTooltip", "links", "liveNow", "panels"),
    *("refresh", "schemaVersion", "tags", "templating", "time", "timepicker", "timezone", "title", "uid", "version"),
}
PANEL = {
    *("datasource", "description", "fieldConfig", "gridPos", "id", "interval", "links", "maxDataPoints", "options"),
    *("targets", "title", "transformations", "type"),
}
ROW = {"collapsed", "gridPos", "id", "panels", "targets", "title", "type"}
TARGET = {"datasource", "editorMode", "expr", "format", "instant", "interval", "legendFormat", "range", "refId"}
VARIABLE = {
    *("allValue", "current", "datasource", "definition", "hide", "includeAll", "label", "multi", "name", "options"),
    *("query", "refresh", "regex", "skipUrlSync", "sort", "type"),
}
TRANSFORMATIONS = {"organize": {"excludeByName", "indexByName", "renameByName"}}
LEGEND = {"calcs", "displayMode", "placement", "showLegend"}
OPTIONS: dict[str, dict[str, Any]] = {
    "stat": {
        "colorMode": {"none", "value", "background"},
        "graphMode": {"none", "area"},
        "justifyMode": {"auto", "center"},
        "orientation": {"auto", "horizontal", "vertical"},
        "textMode": {"auto", "value", "value_and_name", "name", "none"},
        "reduceOptions": {"calcs", "fields", "values"},
    },
    "timeseries": {"legend": LEGEND, "tooltip": {"mode", "sort"}},
    "heatmap": {
        "calculate": {False, True},
        "cellGap": range(10),
        "color": {"mode", "scheme", "steps", "exponent", "fill", "reverse"},
        "legend": {"show"},
        "tooltip": {"mode", "yHistogram", "showColorScale"},
        "yAxis": {"unit", "decimals", "min", "max", "axisPlacement", "reverse"},
    },
    "table": {"cellHeight": {"sm", "md", "lg"}, "footer": {"show", "reducer", "fields"}, "showHeader": {False, True}},
}
"""Panel type -> option -> the values it may have, or the fields if it is an object."""
FIELD = {"color", "custom", "decimals", "links", "mappings", "max", "min", "noValue", "thresholds", "unit"}
COLORS = {"thresholds", "palette-classic", "fixed"}
CUSTOM = {
    "drawStyle": {"line", "bars", "points"},
    "fillOpacity": range(101),
    "lineWidth": range(11),
    "showPoints": {"auto", "always", "never"},
    "spanNulls": {False, True},
    "stacking": {"mode", "group"},
}
UNITS = {"reqps", "short", "percentunit", "s", "bytes", "ops", "none"}
"""Ids of `@grafana/data`'s value formats."""


def strangers(board: dict[str, Any]) -> Iterator[str]:
    """What Grafana would pass over in a board, by its place."""
    yield from _fields("board", board, BOARD)
    for variable in board["templating"]["list"]:
        yield from _fields(f"variable {variable['name']}", variable, VARIABLE)
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from _fields(panel["title"], panel, ROW)
        else:
            yield from _panel(panel)


def _panel(panel: dict[str, Any]) -> Iterator[str]:
    where = f"{panel['type']} {panel['title']}"
    yield from _fields(where, panel, PANEL)
    for target in panel["targets"]:
        yield from _fields(f"{where}, target", target, TARGET)
    for step in panel.get("transformations", []):
        yield from _fields(f"{where}, {step['id']}", step["options"], TRANSFORMATIONS[step["id"]])
    yield from _values(f"{where}, options", panel["options"], OPTIONS[panel["type"]])
    defaults = panel["fieldConfig"]["defaults"]
    yield from _fields(f"{where}, field", defaults, FIELD)
    yield from _values(f"{where}, custom", defaults.get("custom", {}), CUSTOM)
    if defaults["color"]["mode"] not in COLORS:
        yield f"{where}: color {defaults['color']['mode']}"
    if defaults["unit"] not in UNITS:
        yield f"{where}: unit {defaults['unit']}"


def _fields(where: str, given: dict[str, Any], known: set[str]) -> Iterator[str]:
    yield from (f"{where}: {name}" for name in given.keys() - known)


def _values(where: str, given: dict[str, Any], known: dict[str, Any]) -> Iterator[str]:
    yield from _fields(where, given, set(known))
    for name in given.keys() & known.keys():
        if isinstance(given[name], dict):
            yield from _fields(f"{where}.{name}", given[name], known[name])
        elif given[name] not in known[name]:
            yield f"{where}.{name}: {given[name]!r}"
