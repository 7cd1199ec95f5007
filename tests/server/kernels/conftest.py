"""Fixtures: native libraries, the Triton compiler in the background, the Triton interpreter."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from server.kernels import cpu
from server.kernels.cpu import bindings

REPO = Path(__file__).resolve().parents[3]
Compiled = Callable[[], tuple[int, str, str]]


def runs(library: str) -> bool:
    """Whether this library was built and the processor supports it."""
    try:
        return bindings.load(library).loramux_unsupported() is None
    except OSError:  # an older compiler builds some of them
        return False


def same_bits(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> bool:
    """Whether two float32 arrays are equal bit for bit; any NaN equals any NaN."""
    nan = np.isnan(one)
    bits = [np.where(nan, np.int32(0), x.view(np.int32)) for x in (one, other)]
    return np.array_equal(nan, np.isnan(other)) and np.array_equal(*bits)


@pytest.fixture(params=[name for name in bindings.LIBRARIES if runs(name)] or [None])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each native library that runs here, in turn."""
    if request.param is None:
        pytest.skip("no native library runs here")
    loaded = bindings.load(request.param)
    monkeypatch.setattr(bindings, "library", lambda: loaded)
    monkeypatch.setattr(cpu, "_pools", [])
    return str(request.param)


HALVES = ("_native_avx2_vnni", "_native_avx2") if runs("_native") else ()
"""AVX2 libraries, if there is an AVX512 library to compare with."""


@pytest.fixture(params=[name for name in HALVES if runs(name)] or [None])
def both_sizes(request: pytest.FixtureRequest) -> tuple[ctypes.CDLL, ctypes.CDLL]:
    """The AVX512 library and an AVX2 library."""
    if request.param is None:
        pytest.skip("no native library of each size of vectors runs here")
    return bindings.load("_native"), bindings.load(request.param)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiled]:
    """Runs `compile_cuda.py small` in the background. The fixture waits for it and returns exit status, output and
    errors."""
    folder = tmp_path_factory.mktemp("triton")
    out, err = folder / "out", folder / "err"
    with out.open("w") as stdout, err.open("w") as failed:
        process = subprocess.Popen(
            [sys.executable, "tests/server/kernels/compile_cuda.py", "small"],
            cwd=REPO,
            env={**os.environ, "PYTHONPATH": str(REPO), "TRITON_CACHE_DIR": str(folder / "cache")},
            stdout=stdout,
            stderr=failed,
        )

    def wait() -> tuple[int, str, str]:
        return process.wait(1800), out.read_text(), err.read_text()

    yield wait
    process.kill()
    process.wait()


@pytest.fixture(scope="session", autouse=True)
def _begun(request: pytest.FixtureRequest) -> None:
    """Starts the compiler with the first test of this folder, if a selected test needs it."""
    if any("compiled" in getattr(item, "fixturenames", ()) for item in request.session.items):
        request.getfixturevalue("compiled")


@pytest.fixture(scope="session", autouse=True)
def _interpreter() -> Iterator[None]:
    """Speeds up Triton's interpreter.

    It skips overflow checks, which only serve debug assertions, and patches each function's language once instead of at
    every call.
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


class Launch:
    """The memory accesses of a launch."""

    def __init__(self, given: list[torch.Tensor]) -> None:
        spans = [(t.data_ptr(), sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))) for t in given]
        self._starts = np.array([start for start, _ in spans])
        self._ends = np.array([start + (n + 1) * t.itemsize for (start, n), t in zip(spans, given, strict=True)])
        self._touched: list[tuple[npt.NDArray[np.int64], ...]] = []
        self.program = 0

    def touch(self, addresses: Any, mask: Any, size: int, writes: bool) -> None:
        """Raises AssertionError for an address outside the launch's tensors."""
        mine = np.unique(addresses[np.broadcast_to(mask, addresses.shape).astype(bool)].astype(np.int64))
        within = (mine[:, None] >= self._starts) & (mine[:, None] + size <= self._ends)
        assert within.any(1).all(), "a program touches what its launch was not given"
        self._touched.append((mine, np.full(len(mine), self.program), np.full(len(mine), writes)))

    def end(self) -> None:
        """Raises AssertionError if a program accesses what another one writes."""
        if self._touched:
            addresses, programs, written = map(np.concatenate, zip(*self._touched, strict=True))
            several, count = np.unique(np.unique(np.stack((addresses, programs)), axis=1)[0], return_counts=True)
            shared = np.intersect1d(several[count > 1], addresses[written.astype(bool)])
            assert not len(shared), "a program touches what another one writes"


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Watches the memory accesses of interpreted launches. Out-of-bounds accesses and races do not show in the
    interpreter's results. Has no effect on a GPU."""
    launches: list[Launch] = []
    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        return launches
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    load, store, place = builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    call = interpreter.GridExecutor.__call__

    def loaded(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        value = load(self, ptrs, mask, *rest)
        launches[-1].touch(ptrs.data, mask.data, value.data.itemsize, False)
        return value

    def stored(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].touch(ptrs.data, mask.data, value.data.itemsize, True)
        return store(self, ptrs, value, mask, *rest)

    def placed(self: Any, *place_of: int) -> None:
        launches[-1].program += 1
        place(self, *place_of)

    def called(self: Any, *args: Any, **options: Any) -> None:
        launches.append(Launch([a for a in (*args, *options.values()) if isinstance(a, torch.Tensor) and a.numel()]))
        call(self, *args, **options)
        launches[-1].end()

    monkeypatch.setattr(builder, "create_masked_load", loaded)
    monkeypatch.setattr(builder, "create_masked_store", stored)
    monkeypatch.setattr(builder, "set_grid_idx", placed)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", called)
    return launches
