"""What the prefix cache holds, under which names, and what it forgets first."""

from __future__ import annotations

from adapters.weights import Mix
from server.engine.kv_cache import KVCache, root_hash

ONE, OTHER = Mix(((("1" * 64), 1.0),)), Mix((("2" * 64, 1.0),))


def test_roots_tell_base_tenant_and_mix_apart() -> None:
    assert root_hash("ab", (), "c") != root_hash("a", (), "bc")


def cached(cache: KVCache, mix: Mix, *keys: bytes) -> list[int]:
    """The blocks of a sequence that was computed and has ended, with their names."""
    blocks = cache.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        cache.register(block, key, mix)
    cache.free(blocks)
    return blocks


def test_the_end_of_a_sequence_is_forgotten_before_its_beginning() -> None:
    cache = KVCache(3, 2, max_share=1.0)
    blocks = cached(cache, ONE, b"a", b"b", b"c")
    assert cache.allocate(1) == blocks[2:]
    assert cache.match_prefix([b"a", b"b", b"c"]) == blocks[:2]


def test_what_one_mix_has_cached_takes_nothing_from_another_s_share() -> None:
    cache = KVCache(8, 2, max_share=0.25)
    cached(cache, ONE, b"a", b"b")
    cached(cache, OTHER, b"c")
    assert cache.counts["cached"] == 3 and cache.match_prefix([b"c"]) and len(cache.match_prefix([b"a", b"b"])) == 2
    cached(cache, OTHER, b"d", b"e")
    assert cache.counts["cached"] == 2, "of one mix there are no more than two"
