"""Memory budgets that startup derives from free memory, and the order of shutdown."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from adapters import memory
from server.api.engine_setup import adapter_ram_bytes, kv_cache_blocks, warn_if_memory_is_short
from server.api.startup import RunningServer, _build_sources
from server.api.state import Services
from server.errors import BadSetting
from server.settings import Settings

MIB = 1 << 20


@pytest.mark.parametrize(
    ("free", "expected"),
    [(80, 20), (2, 8), (1 << 20, 32)],
    ids=["a quarter of free memory", "at least one context", "at most 2,048 tokens a sequence"],
)
def test_default_kv_cache_size(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    monkeypatch.setattr(memory, "free", lambda: free * MIB)
    settings = Settings(model="base", block_size=16, max_batch=4)
    assert kv_cache_blocks(settings, MIB, context=128) == expected


def test_kv_cache_over_the_limit_of_the_control_group_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limit", lambda: 600 * MIB)
    with pytest.raises(BadSetting, match=f"limit of this process, {600 * MIB:,} bytes"):
        kv_cache_blocks(Settings(model="base", kv_cache=601 * MIB), MIB, context=128)
    assert kv_cache_blocks(Settings(model="base", kv_cache=599 * MIB), MIB, context=128) == 599


@pytest.mark.parametrize(("free", "expected"), [(16 << 10, 2 << 10), (1 << 10, 512), (10, 64)])
def test_adapter_ram_is_at_most_half_of_free_memory_unless_set(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, expected: int
) -> None:
    monkeypatch.setattr(memory, "free", lambda: free * MIB)
    assert adapter_ram_bytes(Settings(model="base", adapter_ram=3 << 30)) == 3 << 30 and not caplog.messages
    assert adapter_ram_bytes(Settings(model="base")) == expected * MIB
    assert bool(caplog.messages) == (expected < 2 << 10)


@pytest.mark.parametrize(("activations", "warned"), [(10, False), (11, True)])
def test_budgets_over_free_memory_are_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, activations: int, warned: bool
) -> None:
    monkeypatch.setattr(memory, "free", lambda: 100 * MIB)
    warn_if_memory_is_short(kv_cache=60 * MIB, adapters=30 * MIB, activations=activations * MIB)
    assert bool(caplog.messages) == warned
    assert not warned or "60 MiB, adapters 30 MiB and activations 11 MiB, but 100 MiB" in caplog.messages[0]


def test_hub_transfers_use_the_state_directory_if_the_hub_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_XET_CACHE", "restored at the end")
    monkeypatch.delenv("HF_XET_CACHE")
    _build_sources(Settings(state_dir=tmp_path))
    assert "HF_XET_CACHE" not in os.environ
    _build_sources(Settings(state_dir=tmp_path, hub_allow=("org/*",)))
    assert os.environ["HF_XET_CACHE"] == str(tmp_path / "cache" / "xet")


def test_close_runs_all_closers_in_reverse_order_even_if_one_fails() -> None:
    closed: list[tuple[str, float]] = []

    def failing(drain: float) -> None:
        raise OSError("the disk is gone")

    closers = [lambda drain: closed.append(("first", drain)), failing, lambda drain: closed.append(("last", drain))]
    with pytest.raises(OSError, match="the disk is gone"):
        RunningServer(cast(Services, None), closers).close(2.5)
    assert closed == [("last", 2.5), ("first", 2.5)]
