"""The kernels compile for a GPU that need not be here. Behind their other tests, which the compiler works beside."""

from __future__ import annotations

import importlib.util
import os

import pytest

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.server.kernels.conftest import Compiled

KERNELS = (
    "product", "tiled", "shrink", "finish", "swiglu", "decode", "combine", "prefill", "rotate", "draw", "recall",
)  # fmt: skip


def test_every_kernel_compiles_for_a_gpu(compiled: Compiled) -> None:
    """What steps of a model launch, in bf16, down to machine code for capability 9.0."""
    status, out, err = compiled()
    assert status == 0, out[-3000:] + err[-2000:]
    for kernel in KERNELS:
        assert f"{kernel}_kernel" in out
    [draw] = [line for line in out.splitlines() if line.startswith("draw_kernel")]
    assert "'num_warps': 16" in draw, "one program goes over all logits of a row, many times"
