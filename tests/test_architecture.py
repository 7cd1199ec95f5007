"""The house rules of docs/design.md that a machine can check: who imports whom, sizes, where side effects may be."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("adapters", "server")

RANK = {"kernels": 0, "model": 1, "engine": 2, "tasks": 3, "jobs": 4, "bench": 5, "api": 5, "app": 6, "cli": 7}
"""A part may import those of a lower number; equals do not know one another."""
LEAVES = {"sources", "settings", "metrics", "errors", "database"}
UPWARD = {"sources", "metrics", "database"}
"""Leaves that the engine and what is below it must not import."""
OBSERVERS = {"doctor"}
"""Asks other parts what they would do; only the command line asks it."""
ENGINE_MAY_USE = {"adapters.weights", "adapters.lru", "adapters.errors"}

THIRD_PARTY_OF_ADAPTERS = {"numpy", "torch", "safetensors"}
ONLY_IN = {
    "fastapi": {"server.api", "server.app"},
    "starlette": {"server.api", "server.app"},
    "pydantic": {"server.api", "server.app", "server.settings"},
    "uvicorn": {"server.cli"},
    "typer": {"server.cli", "benchmarks.command", "benchmarks.online", "benchmarks.options"},
    "triton": {"server.kernels.cuda"},
    "huggingface_hub": {"server.sources.hub"},
    "fsspec": {"server.sources.urls"},
    "transformers": {"benchmarks.peers"},
    "peft": {"benchmarks.peers"},
}

MAX_MODULE, MAX_KERNEL, MAX_FUNCTION = 400, 600, 80
LARGER: dict[str, str] = {}
"""Modules over the limit, each with its reason."""
ON_GPUS = ("server.kernels.cuda.", "server.engine.backends.cuda.")
"""Modules over Triton, which are imported where a GPU is used."""
APART = "benchmarks/peers/"
"""Scripts that run inside other servers' environments: not imported by any part, and not importable here."""


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of the two packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((REPO / package).rglob("*.py")):
            name = ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__")
            found[name] = path
    return found


MODULES = modules()
OURS = {
    name: path
    for name, path in MODULES.items()
    if APART not in path.as_posix() and "/migrations/" not in path.as_posix()  # Alembic imports these
}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@cache
def typing_only(path: Path) -> frozenset[int]:
    """Lines below `if TYPE_CHECKING:`, which import nothing when the module runs."""
    lines: set[int] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            lines.update(range(node.body[0].lineno, (node.body[-1].end_lineno or 0) + 1))
    return frozenset(lines)


def imports(name: str, path: Path) -> Iterator[tuple[str, int]]:
    """What a module imports, anywhere in it, as the most exact module or package known, with its line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno} imports relatively"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else node.module), node.lineno


def part(name: str) -> str:
    """The part of the server that a module belongs to: `server.engine.adapter_slots` -> `engine`."""
    return name.split(".")[1] if "." in name else ""


def within(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def test_every_part_has_its_level() -> None:
    known = set(RANK) | LEAVES | OBSERVERS | {"web", ""}
    assert {part(name) for name in MODULES if name.startswith("server")} <= known


def test_arrows_point_down() -> None:
    wrong = []
    for name, path in OURS.items():
        if not name.startswith("server"):
            continue
        here = part(name)
        for target, line in imports(name, path):
            there = part(target)
            if not target.startswith("server.") or here == there or there in LEAVES - UPWARD:
                continue
            allowed = (
                here in OBSERVERS
                or (here not in LEAVES and there in LEAVES)
                or (there in OBSERVERS and here == "cli")
                or (here in RANK and there in RANK and RANK[there] < RANK[here])
            )
            if not allowed:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_adapters_know_no_server() -> None:
    wrong = []
    for name, path in OURS.items():
        if not name.startswith("adapters"):
            continue
        for target, line in imports(name, path):
            top = target.partition(".")[0]
            if top not in THIRD_PARTY_OF_ADAPTERS | {"adapters"} and top not in sys.stdlib_module_names:
                wrong.append(f"{name}:{line} imports {target}")
    assert not wrong, "\n".join(wrong)


def test_the_engine_knows_little_of_adapters() -> None:
    wrong = [
        f"{name}:{line} imports {target}"
        for name, path in OURS.items()
        if part(name) in {"engine", "kernels", "model"}
        for target, line in imports(name, path)
        if target.startswith("adapters") and target not in ENGINE_MAY_USE
    ]
    assert not wrong, "\n".join(wrong)


def test_libraries_stay_in_their_rooms() -> None:
    wrong = [
        f"{name}:{line} imports {target}"
        for name, path in OURS.items()
        for target, line in imports(name, path)
        if (rooms := ONLY_IN.get(target.partition(".")[0])) is not None
        and not within(name, rooms)
        and line not in typing_only(path)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_environment_is_read_in_settings_alone() -> None:
    wrong = []
    for name, path in OURS.items():
        if name == "server.settings":
            continue
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.keyword) and node.arg == "envvar" and name != "benchmarks.online":
                wrong.append(f"{name}:{node.value.lineno}")
            reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}
            if reads and ast.unparse(node.value) == "os":  # type: ignore[attr-defined]
                wrong.append(f"{name}:{node.lineno}")
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                wrong += [f"{name}:{node.lineno}" for a in node.names if a.name in {"environ", "getenv"}]
    assert not wrong, "\n".join(wrong)


def code_lines(path: Path) -> set[int]:
    """Numbers of the lines with code: docstrings, comments and blanks not counted."""
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    skip |= {tokenize.ENCODING, tokenize.ENDMARKER}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
        if token.type not in skip:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or 0) + 1))
    return lines


def test_sizes() -> None:
    wrong = []
    for name, path in MODULES.items():
        lines = code_lines(path)
        limit = MAX_KERNEL if name.startswith("server.kernels") else MAX_MODULE
        if len(lines) > limit and name not in LARGER:
            wrong.append(f"{name} has {len(lines)} lines of code, over {limit}")
        if name in LARGER and len(lines) <= limit:
            wrong.append(f"{name} is no longer large: take it off the list")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = len(lines & set(range(node.lineno, (node.end_lineno or 0) + 1)))
                if size > MAX_FUNCTION:
                    wrong.append(f"{name}:{node.lineno} {node.name} has {size} lines of code, over {MAX_FUNCTION}")
    assert not wrong, "\n".join(wrong)


def test_names_say_what_things_are() -> None:
    empty = {"utils", "util", "helpers", "helper", "handler", "handlers", "manager", "common", "misc"}
    assert not [name for name in MODULES if set(name.split(".")) & empty]
    wrong = [
        f"{name}:{node.lineno} {node.name}"
        for name, path in OURS.items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Manager", "Helper", "Handler", "Utils"))
    ]
    assert not wrong, "\n".join(wrong)


def test_every_module_says_what_it_owns() -> None:
    silent = [name for name, path in MODULES.items() if tree(path).body and not ast.get_docstring(tree(path))]
    assert not silent


PROBE = """
import importlib, json, os, sys, threading
import torch
def state():
    return {
        "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(),
        "interop": torch.get_num_interop_threads(), "dtype": str(torch.get_default_dtype()),
        "matmul": torch.get_float32_matmul_precision(), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cwd": os.getcwd(), "environment": dict(os.environ), "running": len(threading.enumerate()),
        "signals": [str(__import__("signal").getsignal(s)) for s in (2, 15)],
        "level": __import__("logging").getLogger().level, "handlers": len(__import__("logging").getLogger().handlers),
        "seed": torch.initial_seed(),
    }
failed, before = {}, state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    after = state()
    if after != before:
        failed[name] = {k: [before[k], after[k]] for k in before if before[k] != after[k]}
        before = after
heavy = sorted(m for m in ("transformers", "triton", "peft", "huggingface_hub") if m in sys.modules)
print(json.dumps({"failed": failed, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """Imports every module in one fresh process and tells what that changed."""
    names = [n for n in OURS if not n.endswith("__main__") and not n.startswith(ON_GPUS)]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, json.dumps(names)],
        cwd=REPO,
        env={**os.environ, "OMP_NUM_THREADS": "3"},  # a number that no module would set
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stderr == ""
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def test_importing_has_no_side_effect(imported: dict[str, object]) -> None:
    assert imported["failed"] == {}


def test_importing_brings_nothing_that_the_embedded_path_does_without(imported: dict[str, object]) -> None:
    assert imported["heavy"] == []


def test_the_command_line_starts_light() -> None:
    """`loramux --help` does not load torch."""
    code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60, check=False).returncode == 0
