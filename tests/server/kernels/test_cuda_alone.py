"""The GPU engine imports only a few libraries."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

REPO = Path(__file__).resolve().parents[3]
ALONE = """
import sys
from importlib.metadata import distributions, requires
from re import match
allowed, wanted = set(), ["torch", "triton", "safetensors", "tokenizers", "prometheus-client", "numpy"]
def canonical(name): return name.lower().replace("_", "-").replace(".", "-")
known = {canonical(d.metadata["Name"]): d for d in distributions()}
while wanted:
    name = canonical(wanted.pop())
    if name in allowed or name not in known:
        continue
    allowed.add(name)
    needs = known[name].requires or []
    if name != "tokenizers":  # its own one is the hub's client, which it asks for only when it is told to fetch
        wanted += [match(r"[A-Za-z0-9._-]+", need)[0] for need in needs if "extra ==" not in need]
from importlib.metadata import packages_distributions
owners = packages_distributions()
class Blocked:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        theirs = {canonical(d) for d in owners.get(top, [])} - {"loramux"}
        if theirs and not theirs & allowed:
            raise ModuleNotFoundError(f"{name} is not there", name=name)
        return None
sys.meta_path.insert(0, Blocked())
import server.engine.overlap, server.engine.backends.cuda.runner, server.model.loader, server.kernels.cuda.sampling
import server.metrics, adapters.weights, benchmarks.gpu.checklist
try:
    import fastapi
except ModuleNotFoundError:
    print("alone")
"""


def test_the_engine_imports_with_few_libraries() -> None:
    """torch, numpy, triton, safetensors, tokenizers, prometheus-client and their own requirements."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", ALONE],
        cwd=REPO,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "alone\n"), done.stderr[-2000:]
