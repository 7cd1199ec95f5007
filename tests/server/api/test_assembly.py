"""What the assembly decides by itself: how much memory keys and values get when the settings do not say."""

from __future__ import annotations

import pytest

from adapters import memory
from server.api.assembly import kv_blocks
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
