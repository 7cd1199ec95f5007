"""Allocation of KV blocks with reference counts, and the prefix cache over full blocks."""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from adapters.weights import Mix

BlockHash = bytes
"""Identifies a full block by its tokens and everything before them, the base model, the mix and the tenant."""


def root_hash(base_id: str, mix: Mix, tenant: str) -> BlockHash:
    """Return the hash before the first block. It salts the prefix cache by base, mix with weights, and tenant."""
    h = hashlib.blake2b(digest_size=16)
    for part in (base_id.encode(), tenant.encode(), *(d.encode() + struct.pack("<d", w) for d, w in mix)):
        h.update(struct.pack("<I", len(part)) + part)
    return h.digest()


def next_hash(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Return the hash of a full block of `tokens` that follows the block `parent`."""
    return hashlib.blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class KVCache:
    """Allocates KV blocks. A block is free, used (by one or more requests) or cached. Not thread-safe.

    A full block registered with `register` stays cached after its last user frees it, until its room is needed. The
    least recently used block is evicted first.

    Args:
        blocks: Number of blocks.
        block_size: Tokens per block.
        has_prefix_cache: Whether full blocks can be found by their contents.
    """

    def __init__(self, blocks: int, block_size: int, has_prefix_cache: bool = True) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.has_prefix_cache = has_prefix_cache
        self.queries = 0
        """Prompt tokens looked up in the prefix cache."""
        self.hits = 0
        """Prompt tokens found there."""
        self._free = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._hash: list[BlockHash | None] = [None] * blocks
        self._block_of: dict[BlockHash, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        """Blocks without users that have a hash, least recently used first."""

    @property
    def available(self) -> int:
        """Number of blocks that can be allocated: the free and the cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> dict[str, int]:
        free, cached = len(self._free), len(self._cached)
        return {"free": free, "cached": cached, "used": self.blocks - free - cached}

    def blocks_for(self, tokens: int) -> int:
        """Return the number of blocks for a number of tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """Allocate `count` blocks, evicting cached blocks if needed. Returns None, and changes nothing, if too few."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._evict(next(iter(self._cached)))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def match_prefix(self, hashes: Sequence[BlockHash]) -> list[int]:
        """Return the blocks of the longest known prefix of `hashes`, and add a user to each."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._users[block] == 0:
                del self._cached[block]
            self._users[block] += 1
            found.append(block)
        return found

    def count_query(self, tokens: int, found: int) -> None:
        """Count a look-up of `tokens` tokens that found `found` blocks."""
        self.queries += tokens
        self.hits += found * self.block_size

    def register(self, block: int, key: BlockHash) -> None:
        """Make a used, full block findable by its hash. Does nothing if another block has that hash."""
        if self.has_prefix_cache and self._hash[block] is None and key not in self._block_of:
            self._hash[block] = key
            self._block_of[key] = block

    def unregister(self, blocks: Iterable[int]) -> None:
        """Make used blocks unfindable, because their contents may be wrong."""
        for block in blocks:
            key = self._hash[block]
            if key is not None:
                del self._block_of[key]
                self._hash[block] = None

    def free(self, blocks: Iterable[int]) -> None:
        """Remove one user from each block. The last block of a sequence becomes the first to be evicted."""
        for block in reversed(list(blocks)):
            assert self._users[block] > 0, f"block {block} is freed more often than it was allocated"
            self._users[block] -= 1
            if self._users[block]:
                continue
            if self._hash[block] is None:
                self._free.append(block)
            else:
                self._cached[block] = None

    def clear(self) -> None:
        """Evict all cached blocks and unregister the used ones."""
        for block in list(self._cached):
            self._evict(block)
        self.unregister(range(self.blocks))

    def _evict(self, block: int) -> None:
        del self._cached[block]
        self.unregister((block,))
        self._free.append(block)
