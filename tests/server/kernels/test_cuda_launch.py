"""Launch options of the Triton kernels."""

from __future__ import annotations

import ast
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from server.kernels.cuda import launch

FOLDER = Path(launch.__file__).parent


@pytest.fixture(autouse=True)
def fresh_options() -> Iterator[None]:
    launch.options.cache_clear()
    yield
    launch.options.cache_clear()


@pytest.mark.parametrize(("capability", "overlaps"), [((9, 0), True), ((10, 3), True), ((8, 9), False), (None, False)])
def test_dependent_launch_is_used_where_it_is_supported(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None, overlaps: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert launch.options().get("launch_pdl", False) is overlaps


def test_dependent_launch_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert launch.options()["launch_pdl"] and launch.disable_dependent_launch()
    assert "launch_pdl" not in launch.options() and not launch.disable_dependent_launch()


def test_every_kernel_waits_for_the_previous_one_first() -> None:
    """Otherwise a later kernel could read memory too early."""
    kernels = [
        function
        for file in FOLDER.glob("*.py")
        for function in ast.walk(ast.parse(file.read_text()))
        if isinstance(function, ast.FunctionDef)
        and function.name.endswith("_kernel")
        and function.name != "wait_for_previous_kernel"
    ]
    assert len(kernels) > 10
    for kernel in kernels:
        statements = [ast.unparse(statement) for statement in kernel.body[1:]]
        before = "".join(statements[: statements.index("wait_for_previous_kernel()")])
        assert "tl.load" not in before and "tl.store" not in before, kernel.name
