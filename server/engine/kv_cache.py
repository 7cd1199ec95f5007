"""The blocks of the KV cache: who holds them, and which of them can be found again by what is in them.

Owns block numbers, their reference counts and the prefix cache. The bytes are the runner's; requests and the reasons
to reserve or free are the scheduler's. Not thread-safe: the engine's thread has it alone.
"""

from __future__ import annotations

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from adapters.weights import Mix

Key = bytes
"""Names a full block by its content: everything before it, its own tokens, the base, the mix and the tenant."""


def root_key(base_id: str, mix: Mix, tenant: str) -> Key:
    """Where the chain of keys begins for a base, a mix with its weights, and a tenant."""
    h = hashlib.blake2b(digest_size=16)
    for part in (base_id.encode(), tenant.encode(), *(d.encode() + struct.pack("<d", w) for d, w in mix)):
        h.update(struct.pack("<I", len(part)) + part)
    return h.digest()


def next_key(parent: Key, tokens: Sequence[int]) -> Key:
    """The key of a full block of `tokens` after `parent`."""
    return hashlib.blake2b(parent + np.asarray(tokens, np.int32).tobytes(), digest_size=16).digest()


class KVCache:
    """`blocks` blocks of `block_size` tokens each. A block is free, used (by one or more requests) or cached.

    A block whose content has been named by `keep` is not lost when its last user frees it: it stays cached, least
    recently used first to go, until room is needed. One mix has at most `max_share` of all blocks cached; with a
    share of 0 nothing is ever found again.
    """

    def __init__(self, blocks: int, block_size: int, max_share: float = 0.5) -> None:
        self.blocks = blocks
        self.block_size = block_size
        self.queries = 0
        """Tokens that were looked for."""
        self.hits = 0
        """Tokens that were found."""
        self._limit = int(blocks * max_share)
        self._free = list(range(blocks - 1, -1, -1))
        self._users = [0] * blocks
        self._key: list[Key | None] = [None] * blocks
        self._mix: list[Mix | None] = [None] * blocks
        self._block_of: dict[Key, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._cached_of: dict[Mix, OrderedDict[int, None]] = {}

    @property
    def remembers(self) -> bool:
        """Whether what is kept can be found again."""
        return self._limit > 0

    @property
    def available(self) -> int:
        """How many blocks `reserve` could give."""
        return len(self._free) + len(self._cached)

    @property
    def counts(self) -> dict[str, int]:
        free, cached = len(self._free), len(self._cached)
        return {"free": free, "cached": cached, "used": self.blocks - free - cached}

    def blocks_for(self, tokens: int) -> int:
        """How many blocks hold so many tokens."""
        return -(-tokens // self.block_size)

    def reserve(self, count: int) -> list[int] | None:
        """`count` blocks of unknown content for one user, or None and no change."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._forget(next(iter(self._cached)))
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def match(self, keys: Sequence[Key]) -> list[int]:
        """The blocks that hold the longest known beginning of `keys`, each with one more user."""
        found: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            if self._users[block] == 0:
                self._uncache(block)
            self._users[block] += 1
            found.append(block)
        return found

    def count_query(self, tokens: int, found: int) -> None:
        """Count a look-up of `tokens` tokens of which `found` blocks were there."""
        self.queries += tokens
        self.hits += found * self.block_size

    def keep(self, block: int, key: Key, mix: Mix) -> None:
        """Name the content of a used, full block. If another block has that content already, that one remains it."""
        if self._limit and self._key[block] is None and key not in self._block_of:
            self._key[block] = key
            self._mix[block] = mix
            self._block_of[key] = block

    def disown(self, blocks: Iterable[int]) -> None:
        """Used blocks lose their names: what is in them is not to be found again."""
        for block in blocks:
            key = self._key[block]
            if key is not None:
                del self._block_of[key]
                self._key[block] = self._mix[block] = None

    def free(self, blocks: Iterable[int]) -> None:
        """One user less for each block. Of one sequence's blocks the last goes first when room is needed."""
        for block in reversed(list(blocks)):
            assert self._users[block] > 0, f"block {block} is freed more often than it was reserved"
            self._users[block] -= 1
            if self._users[block]:
                continue
            mix = self._mix[block]
            if mix is None:
                self._free.append(block)
                continue
            own = self._cached_of.setdefault(mix, OrderedDict())
            self._cached[block] = own[block] = None
            if len(own) > self._limit:
                self._forget(next(iter(own)))

    def clear(self) -> None:
        """Forget what is cached; blocks in use keep their users and lose their names."""
        for block in list(self._cached):
            self._forget(block)
        self.disown(range(self.blocks))

    def _uncache(self, block: int) -> None:
        mix = self._mix[block]
        assert mix is not None, "a cached block has a name"
        del self._cached[block]
        own = self._cached_of[mix]
        del own[block]
        if not own:
            del self._cached_of[mix]

    def _forget(self, block: int) -> None:
        """A cached block becomes a free one."""
        self._uncache(block)
        key = self._key[block]
        assert key is not None, "a cached block has a name"
        del self._block_of[key]
        self._key[block] = self._mix[block] = None
        self._free.append(block)
