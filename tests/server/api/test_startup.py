"""What the assembly decides by itself: how much memory adapters, keys and values get when the settings do not say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import pytest

from adapters import memory
from server.api.startup import RunningServer, _sources, adapter_ram, check_room, kv_blocks
from server.api.state import Services
from server.errors import BadSetting
from server.settings import Settings

BLOCK = 1 << 20


@pytest.mark.parametrize(("free", "expected"), [(80, 20), (2, 8), (1 << 20, 32)])
def test_keys_and_values_get_their_share_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, expected: int
) -> None:
    """A quarter of it, but a context always, and never more than a full batch can use."""
    monkeypatch.setattr(memory, "free", lambda: free * BLOCK)
    settings = Settings(model="base", block_size=16, max_batch=4)
    assert kv_blocks(settings, BLOCK, context=128) == expected


@pytest.mark.parametrize(("free", "expected"), [(16 << 10, 2 << 10), (1 << 10, 512), (10, 64)])
def test_adapters_get_half_of_free_memory_at_most(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int, expected: int
) -> None:
    """Unless the settings say how much; and where little is free there is room for some."""
    monkeypatch.setattr(memory, "free", lambda: free * BLOCK)
    assert adapter_ram(Settings(model="base", adapter_ram=3 << 30)) == 3 << 30 and not caplog.messages
    assert adapter_ram(Settings(model="base")) == expected * BLOCK
    assert bool(caplog.messages) == (expected < 2 << 10)


def test_keys_and_values_within_the_limit_of_a_control_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "limit", lambda: 600 * BLOCK)
    with pytest.raises(BadSetting, match=f"over the {600 * BLOCK:,} bytes that this process may have"):
        kv_blocks(Settings(model="base", kv_cache=601 * BLOCK), BLOCK, context=128)
    assert kv_blocks(Settings(model="base", kv_cache=599 * BLOCK), BLOCK, context=128) == 599


@pytest.mark.parametrize(("work", "warned"), [(10, False), (11, True)])
def test_what_steps_take_counts_beside_what_cache_and_adapters_may(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, work: int, warned: bool
) -> None:
    monkeypatch.setattr(memory, "free", lambda: 100 * BLOCK)
    check_room(60 * BLOCK, 30 * BLOCK, work * BLOCK)
    assert bool(caplog.messages) == warned
    assert not warned or "60 MiB, adapters 30 and steps 11, and 100 are free" in caplog.messages[0]


def test_what_the_hubs_client_keeps_is_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where adapters may come from the hub."""
    monkeypatch.setenv("HF_XET_CACHE", "unset again in the end")
    monkeypatch.delenv("HF_XET_CACHE")
    _sources(Settings(state_dir=tmp_path))
    assert "HF_XET_CACHE" not in os.environ
    _sources(Settings(state_dir=tmp_path, hub_allow=("org/*",)))
    assert os.environ["HF_XET_CACHE"] == str(tmp_path / "cache" / "xet")


def test_what_fails_to_stop_keeps_nothing_else_from_stopping() -> None:
    stopped: list[tuple[str, float]] = []

    def failing(drain: float) -> None:
        raise OSError("the disk is gone")

    closing = [lambda drain: stopped.append(("first", drain)), failing, lambda drain: stopped.append(("last", drain))]
    with pytest.raises(OSError, match="the disk is gone"):
        RunningServer(cast(Services, None), closing).close(2.5)
    assert stopped == [("last", 2.5), ("first", 2.5)], "in the reverse order, each with the time that there is"
