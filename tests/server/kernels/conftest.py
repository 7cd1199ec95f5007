"""Triton's compiler, which takes half a minute and works beside the tests before its own, and its interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    """Triton's interpreter without half of its work, of which nothing comes.

    It computes whether sums and products of integers overflow, for an assertion that is made in debugging alone. And
    for each function that a kernel calls it patches its language anew, which the kernel's launch has done; what
    functions of Triton's own see of the language, their first call patches for good.
    """
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        yield
        return
    from triton.runtime import interpreter

    builder, patched, call = interpreter.interpreter_builder, set(), interpreter.InterpretedFunction.__call__
    assert not builder.options.debug

    def call_again(function: Any, *args: Any, **kwargs: Any) -> Any:
        if function.fn in patched:
            return function.rewrite()(*args, **kwargs)
        patched.add(function.fn)
        return call(function, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "options", replace(builder.options, sanitize_overflow=False))
        patch.setattr(interpreter.InterpretedFunction, "__call__", call_again)
        yield
