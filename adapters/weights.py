"""The value of an adapter, and what requests ask for: `LoraWeights`, `Version`, `Mix`.

Owns identity (content digests) and the canonical form of a mix. Does not know files, folders or servers.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from adapters.errors import InvalidChoice

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_IN_WORDS = "1 to 64 letters, digits, '.', '_' and '-', the first a letter or a digit"
RESERVED = frozenset({"base", "other", "none"})
MAX_ABS_WEIGHT = 16.0
MAX_TERMS = 64
"""Adapters of one mix."""
SHORT_DIGEST, MIN_DIGEST = 12, 6
"""Digits of a digest that people see, and the fewest that they may give."""
AT_DIGEST = f"@[0-9a-f]{{{MIN_DIGEST},64}}"
"""What makes of a name that of one of its versions."""
PORTION = 1 << 17
"""Values that are looked at together."""
_BITS = {torch.float32: ("<u4", 0x7F800000), torch.bfloat16: ("<u2", 0x7F80), torch.float16: ("<u2", 0x7C00)}
"""Of each type: the integers of its size, and infinity as one of them. NaN is above that, but for the sign."""

Choice = list[tuple[str, float]]
"""What a request or a task asks for: `[(name or name@digest, weight), ...]`, in the order that was asked."""


class LowRank(NamedTuple):
    """One module's update, `scale * B @ A`: A is [rank, in], B is [out, rank], scale is alpha/r or alpha/sqrt(r).

    A backend may keep codes instead, both as it lays them out, of a module that is `coded` (out, in). What the product
    of a rank's two is_nonzero in is in `units` then, float32 [rank].
    """

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    units: torch.Tensor | None = None
    coded: tuple[int, int] = (0, 0)

    @property
    def rank(self) -> int:
        return (self.A if self.units is None else self.units).shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the module."""
        return (self.B.shape[0], self.A.shape[1]) if self.units is None else self.coded

    @property
    def nbytes(self) -> int:
        return self.A.nbytes + self.B.nbytes + (0 if self.units is None else self.units.nbytes)

    def spectrum(self) -> Spectrum:
        """The singular values of `scale * B @ A`, of a module that is not in codes.

        At the cost of the factors, never of the dense update, from two QR decompositions and one small SVD: the product
        of their triangles has the same singular values. Computed in float64.
        """
        qb, rb = torch.linalg.qr(self.B.double() * self.scale)
        qa, ra = torch.linalg.qr(self.A.double().T)
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return Spectrum((qb @ u).float(), s.float(), (vh @ qa.T).float())


@dataclass(frozen=True)
class Spectrum:
    """A module's update as U diag(S) Vh: U is [out, k], S is [k] descending, Vh is [k, in], all float32."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    def low_rank(self, rank: int) -> LowRank:
        """The best update of this rank (or of full rank, if that is less), balanced between its factors; scale 1."""
        root = self.S[:rank].sqrt()
        return LowRank((root[:, None] * self.Vh[:rank]).contiguous(), (self.U[:, :rank] * root).contiguous(), 1.0)


@dataclass(frozen=True)
class Version:
    """One immutable content of an adapter: `digest` is 64 hex digits, `label` is what people see."""

    name: str
    digest: str

    @property
    def label(self) -> str:
        return f"{self.name}@{self.digest[:SHORT_DIGEST]}"


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """A named LoRA in memory. `modules` maps a module path ("model.layers.0.self_attn.q_proj") to its update.

    The tensors may have any floating dtype and any strides, which a backend that prepares them chooses; or they are its
    codes. `metadata` holds what is told to people: `honoured`, `harmless`, `notes`, `base`, `card`, `quantization`.
    `places` is what a backend that prepared the tensors knows of where they lie.
    """

    name: str
    digest: str
    modules: Mapping[str, LowRank]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    layout: object = None

    @property
    def version(self) -> Version:
        return Version(self.name, self.digest)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(m.nbytes for m in self.modules.values())

    @property
    def ranks(self) -> list[int]:
        """The distinct ranks, ascending."""
        return sorted({m.rank for m in self.modules.values()})

    @property
    def targets(self) -> list[str]:
        """The distinct last parts of the module paths, sorted."""
        return sorted({path.rsplit(".", 1)[-1] for path in self.modules})

    def delta(self, module: str) -> torch.Tensor:
        """The dense update of one module, [out, in] float32. Raises KeyError, and ValueError for a backend's codes."""
        update = self.modules[module]
        if update.units is not None:
            raise ValueError(f"the update of {module} is in codes that only its backend reads")
        return (update.B.float() @ update.A.float()) * update.scale


def not_finite(modules: Mapping[str, LowRank]) -> tuple[str, str] | None:
    """(path, "A" or "B") of a matrix with a value that is NaN or infinite; None if all are finite.

    An adapter has hundreds of small matrices: they are looked at many at a time, and one by one if any is at fault.
    """
    parts = {(path, part): getattr(m, part) for path, m in modules.items() for part in ("A", "B")}
    together: dict[torch.dtype, list[torch.Tensor]] = {}
    for matrix in parts.values():
        rows = matrix if matrix.is_contiguous() else matrix.t()  # as it lies in memory, mostly
        together.setdefault(matrix.dtype, []).append(rows.reshape(-1))
    if all(all_finite(torch.cat(some)) for each in together.values() for some in _portions(each)):
        return None
    return next((key for key, matrix in parts.items() if not torch.isfinite(matrix).all()), None)


def _portions(flat: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """The vectors in turn, some at a time: what is copied stays in a core's cache, and takes no fresh memory."""
    some: list[torch.Tensor] = []
    count = 0
    for each in flat:
        some.append(each)
        count += each.numel()
        if count >= PORTION:
            yield some
            some, count = [], 0
    if some:
        yield some


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def all_finite_in(memory: bytes | memoryview, dtype: torch.dtype) -> bool:
    """Whether memory that is full of values of such a type, one of three, holds none that is NaN or infinite."""
    kind, infinity = _BITS[dtype]
    bits = np.frombuffer(memory, kind)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    portions = (bits[at : at + PORTION] for at in range(0, len(bits), PORTION))
    return all((some & magnitude).max() < infinity for some in portions)


def content_digest(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over the canonical JSON of `config`, then name, dtype, shape and bytes of each tensor by name."""
    h = hashlib.sha256()
    h.update(json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    some = bytearray()  # many small tensors at a time: each update gives other threads a turn, and waits for its own
    for name in sorted(tensors):
        t = tensors[name]
        if t.device.type != "cpu" or not t.is_contiguous():
            t = t.cpu().contiguous()
        some += f"\n{name}\n{t.dtype}\n{tuple(t.shape)}\n".encode()
        if t.numel():
            some += (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
        if len(some) >= 2 * PORTION:
            h.update(some)
            some.clear()
    h.update(some)
    return h.hexdigest()


def digest_of(modules: Mapping[str, LowRank]) -> str:
    """The content digest of an adapter: the honoured config as it is resolved, each module's scale, and its tensors.

    Two folders that say the same in other words (a pattern or a list, another key prefix) are one version. Scales are
    taken in float32, as they are computed with: alpha / rank need not be exact in the last bit of a double.
    """
    tensors = {f"{path}.lora_A": m.A for path, m in modules.items()}
    tensors |= {f"{path}.lora_B": m.B for path, m in modules.items()}
    return content_digest({"scale": {path: float(np.float32(m.scale)) for path, m in modules.items()}}, tensors)


def with_digest(name: str, modules: Mapping[str, LowRank], metadata: Mapping[str, Any] | None = None) -> LoraWeights:
    """`LoraWeights` of new content: the digest is computed, the modules are sorted by path."""
    ordered = dict(sorted(modules.items()))
    return LoraWeights(name, digest_of(ordered), ordered, dict(metadata or {}))


@dataclass(frozen=True)
class Mix:
    """A choice with its versions fixed, in canonical form: `((digest, weight), ...)` sorted by digest.

    Weights are finite, non-zero and exactly representable in float32. Empty is the base alone. Two requests with
    equal mixes may share cached keys and values.
    """

    entries: tuple[tuple[str, float], ...] = ()

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return iter(self.entries)

    @cached_property
    def digests(self) -> tuple[str, ...]:
        return tuple(digest for digest, _ in self.entries)


BASE_MIX = Mix()


def check_weight(weight: float, param: str = "adapters") -> float:
    """`weight` rounded to float32. Raises InvalidChoice if it is not finite or over MAX_ABS_WEIGHT in size."""
    if not abs(weight) <= MAX_ABS_WEIGHT:  # nor is NaN
        sizes = f"from {-MAX_ABS_WEIGHT:g} to {MAX_ABS_WEIGHT:g}"
        raise InvalidChoice(f"an adapter's weight must be a finite number {sizes}, not {weight!r}", param)
    return float(np.float32(weight))


def is_nonzero(weight: float) -> bool:
    """Whether a weight is another one than zero once it is rounded to float32."""
    return bool(np.float32(weight))


def canonical_mix(pairs: Iterable[tuple[Version, float]], max_mix: int) -> Mix:
    """The canonical mix of `(version, weight)` pairs.

    One name twice is an error, one digest under two names adds its weights, zero weights are dropped. Raises
    InvalidChoice.
    """
    weights: dict[str, float] = {}
    names: set[str] = set()
    for version, weight in pairs:
        if version.name in names:
            raise InvalidChoice(f"the adapter {version.name!r} is named twice; give it one weight", "adapters")
        names.add(version.name)
        weights[version.digest] = weights.get(version.digest, 0.0) + check_weight(weight)
    totals = ((digest, check_weight(total)) for digest, total in weights.items())
    entries = tuple(sorted((digest, w) for digest, w in totals if w != 0.0))
    if len(entries) > max_mix:
        raise InvalidChoice(f"a mix of {len(entries)} adapters is over the limit of {max_mix} (--max-mix)", "adapters")
    return Mix(entries)
