"""Creates the model runner and the engine, and divides memory between KV cache, adapters and activations."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from adapters import memory
from adapters.registry import Registry
from server.engine.backends import make_runner
from server.engine.backends.protocol import Runner
from server.engine.engine import Engine
from server.engine.overlap import engine_on
from server.errors import BadSetting
from server.kernels.cpu.crash_report import crash_report
from server.kernels.threads import available_cpus
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from server.settings import Settings

log = logging.getLogger(__name__)

MIN_ADAPTER_RAM = 64 << 20
KV_CACHE_SHARE = 0.25
"""Default share of free memory for the KV cache."""
KV_TOKENS_PER_SEQUENCE = 2048
"""The default KV cache holds at most this many tokens for each sequence of a full batch."""


def build_engine(
    settings: Settings,
    base: Base,
    registry: Registry,
    tokenizer: ModelTokenizer,
    context: int,
    on_step: Callable[[], None],
) -> tuple[Runner, Engine]:
    """Create the runner for the base's kernels and the engine on top of it. Neither is started.

    Args:
        context: longest prompt plus answer, in tokens.
        on_step: called on the engine's thread after the deliveries of a step have been posted.

    Raises:
        BadSetting: the KV cache does not fit into memory.
    """
    if base.backend.name == "cuda":
        runner, limits = _cuda_runner(settings, base, context)
    else:
        runner, limits = _cpu_runner(settings, base, registry, context)
    try:
        engine = engine_on(
            runner,
            fetch=registry.fetch,
            tokenizer=tokenizer,
            eos_ids=base.vocabulary.eos_ids,
            vocab_size=base.config.vocab_size,
            context_length=context,
            base_id=base.id,
            block_size=settings.block_size,
            max_batch=settings.max_batch,
            max_queue=settings.max_queue,
            max_queue_tokens=settings.max_queue_tokens,
            max_step_tokens=settings.max_step_tokens,
            prefix_cache=settings.prefix_cache,
            on_batch_change=crash_report(),
            on_delivered=on_step,
            **limits,
        )
    except MemoryError:
        raise BadSetting("the KV cache cannot be allocated; lower --kv-cache or --max-context", "kv_cache") from None
    return runner, engine


def _cpu_runner(settings: Settings, base: Base, registry: Registry, context: int) -> tuple[Runner, dict[str, Any]]:
    runner = make_runner(base, settings.max_slots, settings.threads or available_cpus())
    block_bytes = runner.block_bytes(settings.block_size)
    blocks = kv_cache_blocks(settings, block_bytes, context)
    warn_if_memory_is_short(
        kv_cache=blocks * block_bytes,
        adapters=registry.memory()["budget"],
        activations=runner.work_bytes(blocks * settings.block_size),
    )
    return runner, {"blocks": blocks, "max_slots": settings.max_slots, "step_limit": settings.step_limit}


def _cuda_runner(settings: Settings, base: Base, context: int) -> tuple[Runner, dict[str, Any]]:
    from server.engine.backends.cuda.runner import SLOTS, CudaRunner, gpu_memory

    runner = CudaRunner(
        base,
        settings.max_batch,
        memory=gpu_memory(settings.gpu_memory),
        device=torch.device("cuda"),
        max_step_tokens=settings.max_step_tokens,
        kv_cache=settings.kv_cache,
        adapters=settings.adapter_device_memory,
        context=context,
    )
    blocks = max(1, runner.shares.kv_cache // runner.block_bytes(settings.block_size))
    # On a GPU adapter memory is the limit. The default of max_slots is for CPUs.
    slots = min(settings.max_slots, SLOTS) if "max_slots" in settings.model_fields_set else SLOTS
    return runner, {"blocks": blocks, "max_slots": slots, "adapter_memory": runner.room}


def adapter_ram_bytes(settings: Settings) -> int:
    """RAM for adapters: `--adapter-ram`, by default at most half of the free memory."""
    available = max(MIN_ADAPTER_RAM, memory.free() // 2)
    if "adapter_ram" in settings.model_fields_set or settings.adapter_ram <= available:
        return settings.adapter_ram
    log.warning("adapters get %d MiB, half of the free memory (--adapter-ram)", available >> 20)
    return available


def kv_cache_blocks(settings: Settings, block_bytes: int, context: int) -> int:
    """Number of KV cache blocks on a CPU.

    `--kv-cache` decides. The default is a share of free memory, at most `KV_TOKENS_PER_SEQUENCE` for each sequence of a
    full batch, and at least one context.

    Raises:
        BadSetting: `--kv-cache` is over the memory limit of this process.
    """
    if settings.kv_cache is not None:
        if settings.kv_cache > (limit := memory.most()):
            raise BadSetting(
                f"kv_cache (--kv-cache) is over the memory limit of this process, {limit:,} bytes", "kv_cache"
            )
        return max(1, settings.kv_cache // block_bytes)
    context_blocks = -(-context // settings.block_size)
    affordable = int(memory.free() * KV_CACHE_SHARE) // block_bytes
    useful = -(-min(context, KV_TOKENS_PER_SEQUENCE) // settings.block_size) * settings.max_batch
    return max(context_blocks, min(affordable, useful))


def warn_if_memory_is_short(*, kv_cache: int, adapters: int, activations: int) -> None:
    """Log a warning if the budgets (bytes) exceed free memory: the system would kill the process when they fill up."""
    if kv_cache + adapters + activations > (free := memory.free()):
        log.warning(
            "memory may run out: the KV cache may take %d MiB, adapters %d MiB and activations %d MiB, but %d MiB are "
            "free; lower --kv-cache, --adapter-ram, --max-context or --threads",
            kv_cache >> 20,
            adapters >> 20,
            activations >> 20,
            free >> 20,
        )
