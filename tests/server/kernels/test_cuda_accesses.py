"""Tests of the `watched` fixture, which finds invalid memory accesses of interpreted kernels."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl

from tests.server.kernels.conftest import Launch

if torch.cuda.is_available():
    pytest.skip("programs are not watched on a GPU", allow_module_level=True)


@triton.jit
def copy(source, target, n, ahead, BN: tl.constexpr):
    """target [n] = source [ahead:], BN elements per program."""
    i = tl.program_id(0) * BN + tl.arange(0, BN)
    tl.store(target + i, tl.load(source + ahead + i, mask=i < n, other=0.0), mask=i < n)


def test_valid_accesses_pass(watched: list[Launch]) -> None:
    numbers = torch.arange(10.0)
    copy[(3,)](numbers, numbers, 10, 0, BN=4)
    copy[(3,)](numbers[2:], target := torch.empty(7), 7, 1, BN=4)
    assert target.tolist() == [3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0] and len(watched) == 2


def test_accesses_outside_the_arguments_are_detected(watched: list[Launch]) -> None:
    """Also within the same allocation."""
    numbers, target = torch.arange(10.0), torch.empty(4)
    with pytest.raises(Exception, match="was not given"):
        copy[(1,)](numbers[:4], target, 4, 1, BN=4)
    with pytest.raises(Exception, match="was not given"):
        copy[(1,)](numbers, target[:3], 4, 0, BN=4)


def test_races_between_programs_are_detected(watched: list[Launch]) -> None:
    """Reads before or after the write, and two writes."""
    numbers = torch.arange(10.0)
    for grid, ahead in (((2,), 1), ((2, 2), 0)):
        with pytest.raises(AssertionError, match="another one writes"):
            copy[grid](numbers, numbers, 8, ahead, BN=4)
