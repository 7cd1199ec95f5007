"""The choice of kernels and of the native library."""

from __future__ import annotations

import ctypes
import logging
import platform
import shutil
import sys
import sysconfig
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from server.errors import BadSetting
from server.kernels import choose, cpu, cpu_info, cuda
from server.kernels.cpu import bindings
from server.kernels.cpu.source_digest import MACHINES, digest
from tests.conftest import part_missing


def test_auto_prefers_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: None)
    assert choose("auto").name == choose("native").name == "native"


def test_auto_falls_back_to_torch_with_one_message(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu, "unavailable", lambda: "this processor has no AVX2")
    with caplog.at_level(logging.INFO, "server.kernels"):
        assert choose("auto").name == "aten"
    assert [record.getMessage() for record in caplog.records] == [
        "the native kernels cannot run here (this processor has no AVX2); using torch's ops"
    ]
    with pytest.raises(BadSetting, match="cannot run here: this processor has no AVX2"):
        choose("native")


def test_missing_libraries_give_one_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Only one message about missing libraries."""

    def load(name: str) -> ctypes.CDLL:
        raise OSError("it was not built")

    monkeypatch.setattr(bindings, "library", lru_cache(bindings.library.__wrapped__))
    monkeypatch.setattr(bindings, "load", load)
    with caplog.at_level(logging.INFO, "server"):
        assert choose("auto").name == "aten"
        cpu.unavailable()  # a later caller
    assert caplog.messages == ["the native kernels cannot run here (it was not built); using torch's ops"]


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(BadSetting, match="choose one of auto, native, aten, reference"):
        choose("cuda-graphs")


def test_auto_prefers_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_an_old_triton_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    (tmp_path / "triton" / "language").mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert f"older than 3.5, as torch before 2.9 brings it ({sys.executable} -m pip" in (cuda.unavailable() or "")
    (tmp_path / "triton" / "language" / "target_info.py").touch()
    assert "older than 3.5" not in (cuda.unavailable() or "")


def test_a_missing_c_compiler_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton uses CC if it is set, otherwise gcc or clang."""
    pytest.importorskip("triton")
    there: list[str] = []
    monkeypatch.setattr(shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for names, named, lacks in (
        (["cc"], None, True), (["gcc"], None, False), (["clang"], None, False),
        (["cc", "our-cc"], "our-cc", False), (["cc"], "our-cc", True), (["gcc"], "our-cc", True),
    ):  # fmt: skip
        there[:] = names
        monkeypatch.delenv("CC", raising=False)
        if named is not None:
            monkeypatch.setenv("CC", named)
        assert ("C compiler" in (cuda.unavailable() or "")) is lacks, (names, named)


def test_the_fastest_supported_library_is_loaded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Libraries that the processor does not support are skipped silently, missing ones with a message."""

    class Library:
        def __init__(self, missing: bytes | None) -> None:
            self.loramux_unsupported = lambda: missing

    there = {name: Library(None) for name in bindings.LIBRARIES}
    monkeypatch.setattr(bindings, "load", lambda name: there[name])
    assert bindings.library.__wrapped__() is there["_native_amx"]
    there["_native_amx"] = Library(b"the system does not let this process use AMX")
    assert bindings.library.__wrapped__() is there["_native_bf16"]
    there["_native_bf16"] = Library(b"the processor has no AVX512-BF16")
    assert bindings.library.__wrapped__() is there["_native"]
    there["_native"] = Library(b"the processor has no AVX512-VNNI")
    assert bindings.library.__wrapped__() is there["_native_avx2_vnni"]
    there["_native_avx2_vnni"] = Library(b"the processor has no AVX-VNNI")
    assert bindings.library.__wrapped__() is there["_native_avx2"]
    there["_native_avx2"] = Library(b"the processor has no AVX2")
    assert bindings.library.__wrapped__() is there["_native_avx2"]  # its reason is reported

    def unbuilt(name: str) -> Library:
        if name == "_native_bf16":
            raise OSError("the library was not built with this package")
        return there[name]

    monkeypatch.setattr(bindings, "load", unbuilt)
    with caplog.at_level(logging.INFO, "server.kernels.cpu"):
        assert bindings.library.__wrapped__() is there["_native_avx2"]
    assert caplog.messages == ["cannot load the kernels of _native_bf16: the library was not built with this package"]


@pytest.mark.skipif(platform.machine() not in MACHINES, reason="the kernels are not for this kind of processor")
@pytest.mark.parametrize("name", bindings.LIBRARIES)
def test_each_library_reports_what_the_processor_lacks(name: str) -> None:
    try:
        library = bindings.load(name)
    except OSError as e:  # an older compiler builds some of them
        part_missing(f"{name}: {e}")
    needed = {
        "_native_amx": {"amx_int8", "amx_bf16", "avx512_vnni", "avx512_bf16", "avx512_vbmi2"},
        "_native_bf16": {"avx512_vnni", "avx512_bf16"},
        "_native": {"avx512_vnni"},
        "_native_avx2_vnni": {"avx2", "fma", "f16c", "bmi2", "avx_vnni"},
        "_native_avx2": {"avx2", "fma", "f16c", "bmi2"},
    }
    missing, has = library.loramux_unsupported(), needed[name] <= cpu_info.features()
    assert (missing is None) == has or b"the system" in missing, missing


def test_other_architectures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(OSError, match="need an x86-64 processor, and this one is aarch64"):
        bindings.load("_native")


def test_a_library_of_another_python_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout keeps libraries of other Python versions."""
    monkeypatch.setattr(bindings, "__file__", str(tmp_path / "bindings.py"))
    (tmp_path / "_native.cpython-310-x86_64-linux-gnu.so").touch()
    with pytest.raises(OSError, match=r"was not built with this package: install it again .* compiler \(g\+\+"):
        bindings.load("_native")


def test_a_library_of_other_sources_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library from an older checkout may have other struct layouts."""

    (tmp_path / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    built = SimpleNamespace(**{name: lambda: None for name in bindings._SIGNATURES})
    monkeypatch.setattr(bindings, "__file__", str(tmp_path / "bindings.py"))
    monkeypatch.setattr(ctypes, "CDLL", lambda path: built)
    built.loramux_sources = lambda: b"of another"
    assert bindings.load("_native") is built  # installed without sources
    (tmp_path / "model.cpp").write_text("int rows;")
    with pytest.raises(OSError, match="was built from other sources: install the package again"):
        bindings.load("_native")
    word = digest(tmp_path)
    built.loramux_sources = lambda: str(word).encode()
    assert bindings.load("_native") is built
    (tmp_path / "model.h").write_text("int columns;")
    assert digest(tmp_path) not in (None, word)
