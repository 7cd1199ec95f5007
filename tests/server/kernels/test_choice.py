"""Which kernels are picked, and what is said where the native ones cannot run."""

from __future__ import annotations

import logging

import pytest

from server.errors import BadSetting
from server.kernels import choose, cpu, cuda


def test_auto_takes_the_native_kernels_where_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert choose("auto").name == choose("native").name == "native"


def test_auto_falls_back_to_torchs_with_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "this processor has no AVX512-VNNI")
    with caplog.at_level(logging.INFO, "server.kernels"):
        assert choose("auto").name == "aten"
    assert [record.getMessage() for record in caplog.records] == [
        "the native kernels cannot run here (this processor has no AVX512-VNNI); torch's own ops serve"
    ]
    with pytest.raises(BadSetting, match="cannot run here: this processor has no AVX512-VNNI"):
        choose("native")


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(BadSetting, match="known are auto, native, aten, reference"):
        choose("cuda-graphs")


def test_a_gpu_is_taken_where_one_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert choose("auto").name == choose("cuda").name == choose("auto", "cuda").name == "cuda"
    assert choose("auto", "cpu").name != "cuda" and choose("reference").name == "reference"
    for kernels, device in (("reference", "cuda"), ("cuda", "cpu")):
        with pytest.raises(BadSetting, match="leave --kernels or --device out"):
            choose(kernels, device)
    monkeypatch.setattr(cuda, "unavailable", lambda: "triton is not installed")
    for kernels, device in (("auto", "cuda"), ("cuda", "auto")):
        with pytest.raises(BadSetting, match="cannot run here: triton is not installed"):
            choose(kernels, device)
    assert choose("auto").name != "cuda"
