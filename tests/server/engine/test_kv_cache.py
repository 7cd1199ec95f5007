"""The prefix cache: hashes, counts and the order of eviction."""

from __future__ import annotations

import itertools

from adapters.weights import Mix
from server.engine.kv_cache import KVCache, next_hash, root_hash

ONE, TWO = "1" * 64, "2" * 64


def test_root_hashes_separate_base_tenant_mix_and_weights() -> None:
    mixes = [(), ((ONE, 1.0),), ((ONE, 0.5),), ((TWO, 1.0),), ((ONE, 1.0), (TWO, 1.0))]
    roots = [
        root_hash(base, Mix(mix), tenant)
        for (base, tenant), mix in itertools.product((("ab", "c"), ("a", "bc"), ("a", "b")), mixes)
    ]
    assert len(set(roots)) == 15
    assert next_hash(roots[0], [1, 2]) not in (next_hash(roots[0], [2, 1]), next_hash(roots[1], [1, 2]))


def cached(cache: KVCache, *hashes: bytes) -> list[int]:
    """The registered blocks of a sequence that has ended."""
    blocks = cache.allocate(len(hashes))
    assert blocks is not None
    for block, key in zip(blocks, hashes, strict=True):
        cache.register(block, key)
    cache.free(blocks)
    return blocks


def test_the_least_recently_used_sequence_is_evicted_first_and_its_end_before_its_beginning() -> None:
    cache = KVCache(6, 2)
    first, second = cached(cache, b"a", b"b", b"c"), cached(cache, b"x", b"y")
    cache.free(cache.match_prefix([b"a", b"b"]))  # used again
    assert cache.counts == {"free": 1, "cached": 5, "used": 0} and cache.available == 6
    assert cache.allocate(7) is None and cache.counts["cached"] == 5
    taken = [block for _ in range(4) for block in cache.allocate(1) or ()]
    assert taken[1:] == [first[2], second[1], second[0]], "after the free one"
    assert cache.match_prefix([b"a", b"b", b"c"]) == first[:2]


def test_a_cache_that_is_off_finds_nothing() -> None:
    cache = KVCache(2, 2, has_prefix_cache=False)
    cached(cache, b"a")
    assert cache.match_prefix([b"a"]) == [] and cache.counts["free"] == 2


def test_counts_of_queries_are_tokens() -> None:
    cache = KVCache(2, 4)
    cache.count_query(10, 2)
    cache.count_query(3, 0)
    assert (cache.queries, cache.hits) == (13, 8)
    assert [cache.blocks_for(tokens) for tokens in (0, 1, 4, 5)] == [0, 1, 1, 2]
