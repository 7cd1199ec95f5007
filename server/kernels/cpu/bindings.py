"""The C interface of the kernels: structs mirrored from kernels.h, and the library itself.

Owns loading and the signatures. Does not know what a tensor or an adapter is; pointers are plain integers.
"""

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
"""What `loramux_model_times` tells apart, in the order of `Phase` in team.h."""
DONE, NO_MEMORY = 0, 1
"""The outcome of a job that was done, and of one that lacked memory for its work buffers."""
FAULTS = {
    2: "there is no cache: allocate comes before run",
    3: "a token is not of the vocabulary",
    4: "a position is beyond the sequence, the cache or the model's context",
    5: "a block is not of the cache",
    6: "a row is not of the step",
    7: "a slot is empty",
}
"""The outcome of a step that is wrong, in the order of `Outcome`."""


class Matrix(ctypes.Structure):
    _fields_ = [
        ("codes", c_void_p),
        ("scale", c_void_p),
        ("span_scales", c_void_p),
        ("exponents", c_void_p),
        ("odd_at", c_void_p),
        ("odd", c_void_p),
        ("scale_codes", c_void_p),
        ("zero_codes", c_void_p),
        ("scale_step", c_void_p),
        ("scale_base", c_void_p),
        ("zero_step", c_void_p),
        ("zero_base", c_void_p),
        ("fineness", c_void_p),
        ("rising", c_void_p),
        ("bias", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("odd_count", c_int64),
        ("scheme", c_int32),
        ("group", c_int32),
        ("coarse", c_bool),
    ]


class Layer(ctypes.Structure):
    """`site` is in the order of `TARGET_MODULES`, as `SiteIndex` has it."""

    _fields_ = [
        ("site", Matrix * len(TARGET_MODULES)),
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


class LoraSite(ctypes.Structure):
    _fields_ = [("units", c_void_p), ("a", c_void_p), ("b", c_void_p), ("rank", c_int64), ("scale", c_double)]


class Factor(ctypes.Structure):
    _fields_ = [
        ("values", c_void_p),
        ("codes", c_void_p),
        ("width", c_int64),
        ("rank_stride", c_int64),
        ("stride", c_int64),
        ("type", c_int32),
    ]


class LoraSource(ctypes.Structure):
    _fields_ = [("a", Factor), ("b", Factor), ("units", c_void_p), ("rank", c_int64)]


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
        ("largest", c_void_p),
    ]


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "loramux_missing": (c_char_p, []),
    "loramux_instructions": (c_char_p, []),
    "loramux_attending": (c_int64, []),
    "loramux_sources": (c_char_p, []),
    "loramux_pool_new": (c_void_p, [c_int, c_bool]),
    "loramux_pool_free": (None, [c_void_p]),
    "loramux_linear": (c_bool, [c_void_p, POINTER(Matrix), c_void_p, c_int64, c_void_p]),
    "loramux_by_eight": (c_bool, [c_bool]),
    "loramux_rows": (None, [POINTER(Matrix), c_void_p, c_int64, c_void_p]),
    "loramux_codes": (c_int64, [c_void_p, c_int64]),
    "loramux_model_new": (
        c_void_p,
        [POINTER(Config), POINTER(Layer), POINTER(Matrix), POINTER(Matrix), c_void_p, c_void_p],
    ),
    "loramux_model_free": (None, [c_void_p]),
    "loramux_model_cache": (None, [c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int64]),
    "loramux_model_apart": (c_int64, [c_void_p]),
    "loramux_model_sparing": (c_int64, [c_void_p]),
    "loramux_model_touched": (c_int64, [c_void_p]),
    "loramux_block_bytes": (c_int64, [POINTER(Config), c_int64]),
    "loramux_model_slot": (c_int64, [c_void_p, c_int64, POINTER(LoraSite), POINTER(c_int32)]),
    "loramux_model_step": (c_int64, [c_void_p, POINTER(Step), POINTER(c_int32)]),
    "loramux_model_draw": (
        c_int64,
        [c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_void_p, POINTER(c_int32)],
    ),
    "loramux_model_wait": (None, [c_void_p, c_int64]),
    "loramux_model_linger": (None, [c_void_p, c_int64, c_int64]),
    "loramux_model_done": (c_int64, [c_void_p]),
    "loramux_model_bytes": (c_int64, [c_void_p]),
    "loramux_model_times": (None, [c_void_p, POINTER(c_int64)]),
    "loramux_crash_report": (None, [c_void_p]),
}


LIBRARIES = ("_native_amx", "_native_bf16", "_native", "_native_avx2_vnni", "_native_avx2")
"""The same kernels for processors with a matrix unit, with instructions for bf16 and without, and for those that have
vectors of 256 bits, with instructions for products of bytes and without, the faster ones first."""

OUTDATED = "the library was built from other sources: install the package again, in a checkout with `make serve`"
"""What is said of one that an older checkout has left."""


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The fastest library that runs here, the last one if none does.

    Raises OSError where that was not built, cannot be loaded or is not of this source.
    """
    left_out: dict[str, OSError] = {}
    for name in LIBRARIES[:-1]:
        try:
            loaded = load(name)
        except OSError as e:  # the next one serves as well, more slowly
            left_out[name] = e
            continue
        if loaded.loramux_missing() is None:
            break
    else:
        loaded = load(LIBRARIES[-1])
    for name, error in left_out.items():  # where none can be loaded, whoever chooses other kernels says so
        log.info("the kernels of %s are left out: %s", name, error)
    return loaded


def load(name: str) -> ctypes.CDLL:
    """One of `LIBRARIES`, whether it runs here or not. Raises OSError as `library` does."""
    if (machine := platform.machine()) not in MACHINES:
        raise OSError(f"the processor is of the kind {machine}, and the native kernels are written for x86-64")
    # By its whole name: a checkout keeps what it built for another Python, and that may be of older sources.
    built = Path(__file__).with_name(name + sysconfig.get_config_var("EXT_SUFFIX"))
    if not built.exists():
        raise OSError(
            "the library was not built with this package: install that again where there is a C++ compiler (g++ 10 or "
            "later), in a checkout with `make serve`"
        )
    loaded = ctypes.CDLL(str(built))
    for symbol, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, symbol, None)
        if function is None:
            raise OSError(f"{OUTDATED} (it has no {symbol})")
        function.restype = result
        function.argtypes = arguments
    # The same names may take other layouts: such a step fails, or computes something else.
    if digest(built.parent) not in (None, loaded.loramux_sources().decode()):
        raise OSError(OUTDATED)
    return loaded


class Pool:
    """Threads of the kernels' own. Freed with the last reference; calls on one pool take turns."""

    def __init__(self, threads: int, *, guest: bool = False) -> None:
        """With a `guest`, whoever waits for a model's steps is one of the `threads`.

        Raises ValueError if `threads` is not positive, and OSError if the system does not start so many.
        """
        if threads < 1:
            raise ValueError(f"the kernels need at least one thread, not {threads}")
        self._library = library()
        self.handle: int | None = self._library.loramux_pool_new(threads, guest)
        if not self.handle:
            raise OSError(f"the system does not start {threads} threads for this process; --threads asks for fewer")

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._library.loramux_pool_free(self.handle)
            self.handle = None
