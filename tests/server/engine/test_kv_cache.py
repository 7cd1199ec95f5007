"""The prefix cache: hashes and the order of eviction."""

from __future__ import annotations

from adapters.weights import Mix
from server.engine.kv_cache import KVCache, root_hash

ONE, OTHER = Mix(((("1" * 64), 1.0),)), Mix((("2" * 64, 1.0),))


def test_root_hashes_separate_base_and_tenant() -> None:
    assert root_hash("ab", (), "c") != root_hash("a", (), "bc")


def cached(cache: KVCache, mix: Mix, *keys: bytes) -> list[int]:
    """The registered blocks of a sequence that has ended."""
    blocks = cache.allocate(len(keys))
    assert blocks is not None
    for block, key in zip(blocks, keys, strict=True):
        cache.register(block, key, mix)
    cache.free(blocks)
    return blocks


def test_the_end_of_a_sequence_is_evicted_before_its_beginning() -> None:
    cache = KVCache(3, 2, max_share=1.0)
    blocks = cached(cache, ONE, b"a", b"b", b"c")
    assert cache.allocate(1) == blocks[2:]
    assert cache.match_prefix([b"a", b"b", b"c"]) == blocks[:2]


def test_each_mix_has_a_share_of_cached_blocks() -> None:
    cache = KVCache(8, 2, max_share=0.25)
    cached(cache, ONE, b"a", b"b")
    cached(cache, OTHER, b"c")
    assert cache.counts["cached"] == 3 and cache.match_prefix([b"c"]) and len(cache.match_prefix([b"a", b"b"])) == 2
    cached(cache, OTHER, b"d", b"e")
    assert cache.counts["cached"] == 2
