"""Reading /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.kernels import cpu_info


def test_the_first_field_of_a_name_is_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    first, second = "model name\t: One: of two\nflags\t\t: fma avx2\n", "model name\t: Two\nflags\t: bf16\n"
    file.write_text(f"processor\t: 0\n{first}\n{second}")
    monkeypatch.setattr(cpu_info, "CPUINFO", file)
    assert cpu_info.cpuinfo_field("model name") == "One: of two"
    assert cpu_info.cpuinfo_field("Features", "flags") == "fma avx2"
    assert cpu_info.features() == {"fma", "avx2"} and not cpu_info.multiplies_bf16()


def test_a_missing_file_gives_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_info, "CPUINFO", tmp_path / "none")
    assert cpu_info.cpuinfo_field("model name") == "" and cpu_info.features() == frozenset()
    assert not cpu_info.multiplies_bf16()
