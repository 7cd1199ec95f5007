"""The names of what the prefix cache holds; its blocks are tested with the engine."""

from __future__ import annotations

from server.engine.kv_cache import root_key


def test_roots_tell_base_tenant_and_mix_apart() -> None:
    assert root_key("ab", (), "c") != root_key("a", (), "bc")
