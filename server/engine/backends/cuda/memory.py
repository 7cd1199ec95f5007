"""Divides a GPU's memory: after the base come work buffers and graphs, then adapters and the KV cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from server.engine.batch import step_logit_limit, step_token_limit
from server.errors import NoCapacity
from server.model.config import ModelConfig

RESERVE = 256 << 20
"""Bytes reserved for kernel images and library workspaces."""
GRAPH_BYTES = 512 << 20
"""Bytes for CUDA graphs. Their real size is counted when they are captured."""
MAX_GRAPH_BYTES = 64 << 20
"""Most bytes that are attributed to one graph; other processes may allocate during a capture."""
KEYS_SPLIT = 16
"""Most splits of a context: see kernels/cuda/attention.py."""
DENSE_ROWS = 1024
"""Rows from which a matrix is dequantized: see kernels/cuda/matmul.py."""
CONTEXT = 640 << 20
"""Bytes of the CUDA context of another process."""
ADAPTER_SHARE = 0.25
"""Default share of adapters in the memory that the base and work buffers leave."""


@dataclass(frozen=True)
class MemoryShares:
    """Bytes of each kind, at most `total` together."""

    total: int
    base: int
    work: int
    graphs: int
    adapters: int
    kv_cache: int


def divide_memory(
    config: ModelConfig,
    base: int,
    max_step_tokens: int,
    max_batch: int,
    total: int,
    kv_cache: int | None = None,
    adapters: int | None = None,
) -> MemoryShares:
    """Divide `total` bytes.

    Args:
        config: The base model's configuration.
        base: Bytes of the base's weights.
        max_step_tokens: Most tokens of a step.
        max_batch: Most sequences of a step.
        total: Bytes for everything.
        kv_cache: Bytes wanted for the KV cache, None for a share.
        adapters: Bytes wanted for adapters, None for a share.

    Raises:
        NoCapacity: The memory is too small. The message lists all parts.
    """
    work = work_bytes(config, max_step_tokens, max_batch)
    left = total - base - work - GRAPH_BYTES
    for_adapters = int(left * ADAPTER_SHARE) if adapters is None else adapters
    for_cache = left - for_adapters if kv_cache is None else kv_cache
    token = config.kv_values * 2
    if left <= 0 or for_adapters < 0 or for_cache < 16 * token or for_adapters + for_cache > left:
        raise NoCapacity(
            f"{_gb(total)} of GPU memory is too little: the base needs {_gb(base)}, work buffers {_gb(work)}, "
            f"graphs {_gb(GRAPH_BYTES)}, adapters {_gb(max(for_adapters, 0))} "
            f"and the KV cache {_gb(max(for_cache, 0))}; "
            "raise --gpu-memory if more is free, or lower --kv-cache, --adapter-device-memory or --max-step-tokens"
        )
    return MemoryShares(total, base, work, GRAPH_BYTES, for_adapters, for_cache)


def training_memory(free: int, total: int, taken: int) -> int:
    """Bytes that a training process may use, without its CUDA context.

    Of the `free` bytes, those that serving has not `taken` yet of its `total` stay reserved.
    """
    return max(0, free - max(0, total - taken) - CONTEXT)


def work_bytes(config: ModelConfig, max_step_tokens: int, max_batch: int) -> int:
    """Estimated bytes of a step's tensors, and the reserve."""
    heads = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    row = 4 * 3 * config.hidden_size + 6 * (heads + keys) + (4 * 2 + 2) * config.intermediate_size
    # The largest matrix that is dequantized for many rows; twice if graphs have as many rows.
    outputs = 2 * config.intermediate_size
    if min(step_token_limit(max_step_tokens, max_batch), step_logit_limit(max_batch)) >= DENSE_ROWS:
        outputs = max(outputs, config.vocab_size)
    dense = 2 * outputs * config.hidden_size * (2 if max_batch >= DENSE_ROWS else 1)
    # Logits: kept ones, those of graphs, and those of a step without a graph, which may score twice as many rows.
    logits = 4 * config.vocab_size * 2 * (max_batch + step_logit_limit(max_batch))
    parts = 4 * max_batch * config.num_attention_heads * KEYS_SPLIT * (config.head_dim + 1)  # attention splits
    return RESERVE + max_step_tokens * row + logits + parts + dense


def _gb(n: int) -> str:
    return f"{n / 1e9:.2f} GB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or the driver ran out of device memory, directly or as the cause of another error."""
    # cuBLAS allocates a workspace at the first product of a stream, and has an error message of its own.
    if isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    ):
        return True
    return error.__context__ is not None and is_out_of_memory(error.__context__)
