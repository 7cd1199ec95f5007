"""The memory figures of `/stats` match the operating system's within 10 %, by kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Live, serving
from tests.waiting import until

pytestmark = pytest.mark.e2e

SLACK = 12 << 20
"""Bytes allowed for buffers and allocator overhead of Python and the C library."""


def mapped(live: Live) -> int:
    """Resident bytes of the packed base file."""
    maps = Path(f"/proc/{live.process.pid}/smaps").read_text()
    return sum(1024 * int(kb) for kb in re.findall(r"\.packed\n(?:.*\n)*?Rss:\s+(\d+) kB", maps))


def memory(live: Live) -> dict[str, int]:
    return live.get("/stats")["memory"]


def test_memory_by_kind_adds_up_to_resident_memory(
    tmp_path: Path, embedded: Path, write_random: Callable[..., Path]
) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    with serving(tmp_path / "state", "--adapter-dir", str(folder), "--library", "none") as live:
        live.post("/generate", {"prompt": "a " * 600, "max_tokens": 8})
        before, resident = memory(live), live.resident()
        assert before["process"] == pytest.approx(resident, rel=0.1)
        assert before["base"] == pytest.approx(mapped(live), rel=0.1)
        assert sum(before[kind] for kind in ("base", "kv_cache", "activations", "adapters")) < resident

        live.post_all("/generate", [{"prompt": f"{i} " + "word " * 1500, "max_tokens": 4} for i in range(4)])
        after = memory(live)
        grown = after["kv_cache"] + after["activations"] - before["kv_cache"] - before["activations"]
        assert grown > 80 << 20
        assert live.resident() - resident == pytest.approx(grown, abs=0.1 * grown + SLACK)

        resident = live.resident()
        for i in range(24):
            write_random(folder / f"r{i}", rank=32, seed=i)
        until(lambda: len(live.get("/adapters")["adapters"]) == 24, every=0.1)
        now = live.get("/stats")
        grown = now["memory"]["adapters"]
        assert grown == 24 * now["adapters"]["one_more"] > 80 << 20
        assert live.resident() - resident == pytest.approx(grown, abs=0.1 * grown + SLACK)
        assert now["adapters"]["more_fit"] == (now["adapters"]["budget"] - grown) // now["adapters"]["one_more"]
