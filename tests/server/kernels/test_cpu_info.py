"""What the processor says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.kernels import cpu_info


def test_what_is_told_is_the_first_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cpuinfo"
    first, second = "model name\t: One: of two\nflags\t\t: fma avx2\n", "model name\t: Two\nflags\t: bf16\n"
    file.write_text(f"processor\t: 0\n{first}\n{second}")
    monkeypatch.setattr(cpu_info, "CPUINFO", file)
    assert cpu_info.cpuinfo_field("model name") == "One: of two"
    assert cpu_info.cpuinfo_field("Features", "flags") == "fma avx2"
    assert cpu_info.features() == {"fma", "avx2"} and not cpu_info.multiplies_bf16()


def test_nothing_is_known_where_the_system_has_no_such_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_info, "CPUINFO", tmp_path / "none")
    assert cpu_info.cpuinfo_field("model name") == "" and cpu_info.features() == frozenset()
    assert not cpu_info.multiplies_bf16()
