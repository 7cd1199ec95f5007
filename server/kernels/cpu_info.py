"""What the processor says of itself. Knows no kernel, and nothing where the system has no /proc/cpuinfo."""

from __future__ import annotations

from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

BF16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""Features of which each multiplies in bfloat16: AVX-512's, Intel's matrix unit's, ARM's."""


def told(*names: str) -> str:
    """What /proc/cpuinfo says first under one of `names`, as "model name"; empty where it says nothing."""
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
    """Instructions beyond the first processor's of its kind, as the system's kernel names them."""
    return frozenset(told("flags", "Features").split())


def multiplies_bf16() -> bool:
    """Whether products in bfloat16 are instructions of the processor, and not several for each."""
    return not BF16.isdisjoint(features())
