"""Rules that import-linter cannot check: where the environment is read, and side effects of imports."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(REPO).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("adapters", "server")
    for path in sorted((REPO / package).rglob("*.py"))
    if "migrations" not in path.parts
}
NEEDS_TRITON = ("server.kernels.cuda.", "server.engine.backends.cuda")


def test_only_settings_reads_the_environment() -> None:
    wrong = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "environb", "getenv", "putenv"}
            imports = isinstance(node, ast.ImportFrom) and node.module == "os"
            named = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            if (reads or (imports and named & {"environ", "getenv"})) and not name.startswith("server.settings"):
                wrong.append(f"{name}:{node.lineno}")
    assert not wrong, "\n".join(wrong)


PROBE = """
import importlib, json, logging, os, signal, sys, threading
import torch
def state():
    return {
        "grad": torch.is_grad_enabled(), "threads": torch.get_num_threads(), "dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(), "seed": torch.initial_seed(),
        "cwd": os.getcwd(), "environment": dict(os.environ), "running": len(threading.enumerate()),
        "signals": [str(signal.getsignal(s)) for s in (2, 15)], "handlers": len(logging.getLogger().handlers),
    }
changed, before = {}, state()
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
    after = state()
    if after != before:
        changed[name] = {k: [before[k], after[k]] for k in before if before[k] != after[k]}
        before = after
heavy = sorted(m for m in ("transformers", "triton", "peft", "huggingface_hub") if m in sys.modules)
print(json.dumps({"changed": changed, "heavy": heavy}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, object]:
    """Import every module in one process; report changes of global state, and slow libraries that were loaded."""
    names = [n for n in MODULES if not n.endswith("__main__") and not n.startswith(NEEDS_TRITON)]
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, json.dumps(names)],
        cwd=REPO, env={**os.environ, "OMP_NUM_THREADS": "3"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)  # type: ignore[no-any-return]


def test_imports_do_not_change_global_state(imported: dict[str, object]) -> None:
    assert imported["changed"] == {}


def test_imports_do_not_load_slow_libraries(imported: dict[str, object]) -> None:
    assert imported["heavy"] == []


def test_help_does_not_load_torch() -> None:
    code = "import sys, server.cli; sys.exit('torch' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPO, timeout=60).returncode == 0
