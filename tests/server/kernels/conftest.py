"""The compiler of the GPU's kernels takes half a minute by itself, and works beside the tests before its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[3]
Compiled = Callable[[], tuple[int, str, str]]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Starts `compile_cuda.py small`; what it gives waits for the end: exit status, standard output and error."""
    folder = tmp_path_factory.mktemp("triton")
    out, err = folder / "out", folder / "err"
    with out.open("w") as told, err.open("w") as failed:
        process = subprocess.Popen(
            [sys.executable, "tests/server/kernels/compile_cuda.py", "small"],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), "TRITON_CACHE_DIR": str(folder / "cache")},
            stdout=told,
            stderr=failed,
        )

    def wait() -> tuple[int, str, str]:
        return process.wait(1800), out.read_text(), err.read_text()

    yield wait
    process.kill()
    process.wait()


@pytest.fixture(scope="session", autouse=True)
def _begun(request: pytest.FixtureRequest) -> None:
    """It is started by the first test of this folder, if one of those that run asks for it."""
    if any("compiled" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("compiled")
