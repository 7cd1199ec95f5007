"""ctypes declarations of the C interface in api.cpp and the structs in kernels.h, and the library loader."""

from __future__ import annotations

import ctypes
import logging
import platform
import sysconfig
from ctypes import POINTER, c_bool, c_char_p, c_double, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from pathlib import Path

from server.kernels.cpu.source_digest import MACHINES, digest
from server.kernels.lora import TARGET_MODULES

log = logging.getLogger(__name__)

INT4, NF4, INT8, NONE = range(4)
FLOAT32, BFLOAT16, FLOAT16 = range(3)
PHASES = ("norm", "qkv", "attention", "out", "gate_up", "down", "head", "plan", "draw")
"""The phases of `loramux_model_times`, in the order of `Phase` in layer_runner.h."""
DONE, NO_MEMORY = 0, 1
FAULTS = {
    2: "no KV cache: call allocate before run",
    3: "a token is not in the vocabulary",
    4: "a position is outside the sequence, the cache or the model's context",
    5: "a block is not in the cache",
    6: "a row is not in the step",
    7: "a slot is empty",
}
"""Outcomes of an invalid step, as in `Outcome` in kernels.h."""


class Matrix(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("span_scales", c_void_p),
        ("exponents", c_void_p),
        ("exception_at", c_void_p),
        ("exception_values", c_void_p),
        ("scale_codes", c_void_p),
        ("zero_codes", c_void_p),
        ("scale_step", c_void_p),
        ("scale_base", c_void_p),
        ("zero_step", c_void_p),
        ("zero_base", c_void_p),
        ("inverse_scale", c_void_p),
        ("nonnegative_scales", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("exception_count", c_int64),
        ("scheme", c_int32),
        ("group", c_int32),
        ("as_int8", c_bool),
    ]


class Layer(ctypes.Structure):
    """`module` is in the order of `TARGET_MODULES`."""

    _fields_ = [
        ("module", Matrix * len(TARGET_MODULES)),
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("rope", c_int64),
    ]


class Config(ctypes.Structure):
    _fields_ = [
        ("hidden", c_int64),
        ("intermediate", c_int64),
        ("layers", c_int64),
        ("heads", c_int64),
        ("kv_heads", c_int64),
        ("head_dim", c_int64),
        ("vocab", c_int64),
        ("max_slots", c_int64),
        ("eps", c_double),
    ]


class LoraModule(ctypes.Structure):
    _fields_ = [("rank_scales", c_void_p), ("a", c_void_p), ("b", c_void_p), ("rank", c_int64), ("scale", c_double)]


class LoraFactor(ctypes.Structure):
    _fields_ = [
        ("values", c_void_p),
        ("codes", c_void_p),
        ("width", c_int64),
        ("rank_stride", c_int64),
        ("stride", c_int64),
        ("type", c_int32),
    ]


class LoraSource(ctypes.Structure):
    _fields_ = [("a", LoraFactor), ("b", LoraFactor), ("rank_scales", c_void_p), ("rank", c_int64)]


class Step(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64),
        ("sequences", c_int64),
        ("table_width", c_int64),
        ("logit_count", c_int64),
        ("tokens", c_void_p),
        ("positions", c_void_p),
        ("row_start", c_void_p),
        ("context", c_void_p),
        ("blocks", c_void_p),
        ("logit_rows", c_void_p),
        ("mix_start", c_void_p),
        ("mix_slot", c_void_p),
        ("mix_weight", c_void_p),
        ("logits", c_void_p),
        ("argmax", c_void_p),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "loramux_unsupported": (c_char_p, []),
    "loramux_instructions": (c_char_p, []),
    "loramux_sources": (c_char_p, []),
    "loramux_attention_bytes": (c_int64, []),
    "loramux_block_bytes": (c_int64, [POINTER(Config), c_int64]),
    "loramux_pool_new": (c_void_p, [c_int, c_bool]),
    "loramux_pool_free": (None, [c_void_p]),
    "loramux_linear": (c_bool, [c_void_p, POINTER(Matrix), c_void_p, c_int64, c_void_p]),
    "loramux_eight_row_tiles": (c_bool, [c_bool]),
    "loramux_embed": (None, [POINTER(Matrix), c_void_p, c_int64, c_void_p]),
    "loramux_encode_lora": (c_int64, [c_void_p, c_int64]),
    "loramux_model_new": (
        c_void_p,
        [POINTER(Config), POINTER(Layer), POINTER(Matrix), POINTER(Matrix), c_void_p, c_void_p],
    ),
    "loramux_model_free": (None, [c_void_p]),
    "loramux_model_cache": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64]),
    "loramux_model_row_parallel_steps": (c_int64, [c_void_p]),
    "loramux_model_reduced_prefetch_steps": (c_int64, [c_void_p]),
    "loramux_model_used_blocks": (c_int64, [c_void_p]),
    "loramux_model_set_slot": (c_int64, [c_void_p, c_int64, POINTER(LoraModule), POINTER(c_int32)]),
    "loramux_model_step": (c_int64, [c_void_p, POINTER(Step), POINTER(c_int32)]),
    "loramux_model_sample": (
        c_int64,
        [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, POINTER(c_int32)],
    ),
    "loramux_model_wait": (None, [c_void_p, c_int64]),
    "loramux_model_wait_until_nearly_done": (None, [c_void_p, c_int64, c_int64]),
    "loramux_model_done": (c_int64, [c_void_p]),
    "loramux_model_bytes": (c_int64, [c_void_p]),
    "loramux_model_times": (None, [c_void_p, POINTER(c_int64)]),
    "loramux_crash_report": (None, [c_void_p]),
}


LIBRARIES = ("_native_amx", "_native_bf16", "_native", "_native_avx2_vnni", "_native_avx2")
"""Builds of the same kernels: AMX, AVX512-BF16, AVX512-VNNI, AVX-VNNI, AVX2. The fastest comes first."""

OUTDATED = "the library was built from other sources: install the package again, in a checkout with `make serve`"


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The fastest library that this processor supports; the last one if it supports none.

    Raises:
        OSError: The last library was not built, cannot be loaded, or was built from other sources.
    """
    skipped: dict[str, OSError] = {}
    for name in LIBRARIES[:-1]:
        try:
            loaded = load(name)
        except OSError as e:  # a slower one may work
            skipped[name] = e
            continue
        if loaded.loramux_unsupported() is None:
            break
    else:
        loaded = load(LIBRARIES[-1])
    for name, error in skipped.items():
        log.info("cannot load the kernels of %s: %s", name, error)
    return loaded


def load(name: str) -> ctypes.CDLL:
    """Load one of `LIBRARIES`, whether or not the processor supports it. Raises OSError like `library`."""
    if (machine := platform.machine()) not in MACHINES:
        raise OSError(f"the native kernels need an x86-64 processor, and this one is {machine}")
    # The suffix of this Python: a checkout may keep libraries of others, built from older sources.
    path = Path(__file__).with_name(name + sysconfig.get_config_var("EXT_SUFFIX"))
    if not path.exists():
        raise OSError(
            "the library was not built with this package: install it again on a machine with a C++ compiler (g++ 10 or "
            "later), in a checkout with `make serve`"
        )
    loaded = ctypes.CDLL(str(path))
    for symbol, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, symbol, None)
        if function is None:
            raise OSError(f"{OUTDATED} (it has no {symbol})")
        function.restype = result
        function.argtypes = arguments
    # Equal names do not mean equal struct layouts.
    if digest(path.parent) not in (None, loaded.loramux_sources().decode()):
        raise OSError(OUTDATED)
    return loaded


class ThreadPool:
    """A thread pool of the kernels. Freed with the last reference; callers take turns."""

    def __init__(self, threads: int, *, use_waiting_thread: bool = False) -> None:
        """Start the threads.

        Args:
            threads: Threads that compute, the caller included.
            use_waiting_thread: Count the thread that waits for a model's steps as one of `threads`.

        Raises:
            ValueError: `threads` is not positive.
            OSError: The system cannot start so many threads.
        """
        if threads < 1:
            raise ValueError(f"the kernels need at least one thread, not {threads}")
        self._library = library()
        self.handle: int | None = self._library.loramux_pool_new(threads, use_waiting_thread)
        if not self.handle:
            raise OSError(f"the system cannot start {threads} threads for this process; lower --threads")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.loramux_pool_free(self.handle)
            self.handle = None
