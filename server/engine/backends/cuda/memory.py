"""A GPU's memory, shared out once: what the base leaves goes to work buffers and graphs first, then to adapters and the
KV cache.

Owns the arithmetic, and what tells that there is too little; nothing is allocated here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.engine.batch import step_logit_limit, step_token_limit
from server.errors import NoCapacity
from server.model.config import ModelConfig

RESERVE = 256 << 20
"""Bytes for what the driver keeps of a context's kernels, and for a library's workspaces."""
FOR_GRAPHS = 512 << 20
"""Bytes for what the driver keeps of graphs. What one takes is not measured yet; it is counted as they are made."""
MOST_OF_A_GRAPH = 64 << 20
"""Bytes that one is taken to have at most: what the device has less of after a capture may have gone to others."""
KEYS_SPLIT = 16
"""Parts that a sequence's keys are cut into at most: see kernels/cuda/attention.py."""
DENSE_ROWS = 1024
"""Rows from which a product's matrix is dequantized: see kernels/cuda/products.py."""
CONTEXT = 640 << 20
"""Bytes that the driver takes for one more process, before it has allocated anything."""
ADAPTER_SHARE = 0.25
"""Of what base and work buffers leave, for adapters, if nothing is said."""


@dataclass(frozen=True)
class MemoryShares:
    """Bytes of each kind, whose sum is `total` or less."""

    total: int
    base: int
    work: int
    graphs: int
    adapters: int
    kv_cache: int


def share_out(
    config: ModelConfig,
    base: int,
    max_step_tokens: int,
    max_batch: int,
    total: int,
    kv_cache: int | None = None,
    adapters: int | None = None,
) -> MemoryShares:
    """What each may take of `total` bytes. `kv_cache` and `adapters` are what is wanted, None for a share.

    Raises NoCapacity, which says what is short, if it is more than there is or leaves no keys and values for 16 tokens.
    """
    work = work_bytes(config, max_step_tokens, max_batch)
    left = total - base - work - FOR_GRAPHS
    for_adapters = int(left * ADAPTER_SHARE) if adapters is None else adapters
    for_cache = left - for_adapters if kv_cache is None else kv_cache
    token = config.kv_values * 2
    if left <= 0 or for_adapters < 0 or for_cache < 16 * token or for_adapters + for_cache > left:
        raise NoCapacity(
            f"{_gb(total)} of GPU memory are too little: the base takes {_gb(base)}, work buffers {_gb(work)}, "
            f"graphs {_gb(FOR_GRAPHS)}, adapters {_gb(max(for_adapters, 0))} "
            f"and keys and values {_gb(max(for_cache, 0))}; "
            "raise --gpu-memory if more is free, or lower --kv-cache, --adapter-device-memory or --max-step-tokens"
        )
    return MemoryShares(total, base, work, FOR_GRAPHS, for_adapters, for_cache)


def left_for_training(free: int, total: int, taken: int) -> int:
    """Bytes that a training process may take of the `free` ones: what serving has not `taken` yet of its `total` stays.

    The process's own context is not in them.
    """
    return max(0, free - max(0, total - taken) - CONTEXT)


def work_bytes(config: ModelConfig, max_step_tokens: int, max_batch: int) -> int:
    """What a step's tensors take at most, about, and the reserve."""
    heads = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    row = 4 * 3 * config.hidden_size + 6 * (heads + keys) + (4 * 2 + 2) * config.intermediate_size
    # The largest matrix that is dequantized for many rows; once more for graphs of as many, whose memory is their own.
    outputs = 2 * config.intermediate_size
    if min(step_token_limit(max_step_tokens, max_batch), step_logit_limit(max_batch)) >= DENSE_ROWS:
        outputs = max(outputs, config.vocab_size)
    dense = 2 * outputs * config.hidden_size * (2 if max_batch >= DENSE_ROWS else 1)
    # Logits: kept ones, those of the graphs, and of a step without a graph, whose scored rows may be twice as many.
    logits = 4 * config.vocab_size * 2 * (max_batch + step_logit_limit(max_batch))
    parts = 4 * max_batch * config.num_attention_heads * KEYS_SPLIT * (config.head_dim + 1)  # of attention's split keys
    return RESERVE + max_step_tokens * row + logits + parts + dense


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


def lacks_memory(error: BaseException) -> bool:
    """Whether torch, or the driver behind it, had too little of the device's memory, also if something else failed at
    the end of a capture that was left for that."""
    # cuBLAS makes a handle and its room at the first product of a stream, and has words of its own for it.
    if isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    ):
        return True
    return error.__context__ is not None and lacks_memory(error.__context__)
