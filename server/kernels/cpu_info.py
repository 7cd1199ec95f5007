"""Reads processor features from /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Feature flags for bfloat16 multiplication: AVX-512, AMX, ARM."""


def cpuinfo_field(*names: str) -> str:
    """The first value of any of these fields, such as "model name"; empty if there is none."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def features() -> frozenset[str]:
    """Instruction set extensions of the processor, as Linux names them."""
    return frozenset(cpuinfo_field("flags", "Features").split())


def multiplies_bf16() -> bool:
    """Whether the processor has instructions that multiply bfloat16."""
    return not BF16.isdisjoint(features())
