"""The Triton kernels compile to machine code for a GPU that is not here."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.server.kernels.conftest import Compiled

KERNELS = (
    "split_k", "gemm", "shrink", "finish", "swiglu", "decode", "combine", "prefill", "rotate", "sample", "resolve",
)  # fmt: skip


def test_every_kernel_compiles_for_a_gpu(compiled: Compiled) -> None:
    """In bf16, for capability 9.0."""
    status, out, err = compiled()
    assert status == 0, out[-3000:] + err[-2000:]
    for kernel in KERNELS:
        assert f"{kernel}_kernel" in out
    [sample] = [line for line in out.splitlines() if line.startswith("sample_kernel")]
    assert "'num_warps': 16" in sample
