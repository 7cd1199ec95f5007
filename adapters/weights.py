"""`LoraWeights`, `Version` and `Mix`: adapters in memory, their content digests, and the canonical form of a mix."""

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
NAME_RULE = "1 to 64 letters, digits, '.', '_' and '-', starting with a letter or a digit"
RESERVED = frozenset({"base", "other", "none"})
"""Names that no adapter may have."""
MAX_ABS_WEIGHT = 16.0
MAX_TERMS = 64
"""Most adapters in one mix."""
SHORT_DIGEST, MIN_DIGEST = 12, 6
"""Digits of a digest in a label, and the fewest that a request may give."""
DIGEST_SUFFIX = f"@[0-9a-f]{{{MIN_DIGEST},64}}"
"""Pattern of the version part of "name@digest"."""
CHUNK = 1 << 17
"""Values processed at a time: small enough for the cache."""
_BITS = {torch.float32: ("<u4", 0x7F800000), torch.bfloat16: ("<u2", 0x7F80), torch.float16: ("<u2", 0x7C00)}
"""For each dtype, the integer type of its size and the bits of infinity. The bits of NaN are greater."""

Choice = list[tuple[str, float]]
"""The adapters of a request or task: `[(name or name@digest, weight), ...]` in the requested order."""


class LowRank(NamedTuple):
    """The update `scale * B @ A` of one module.

    Attributes:
        A: [rank, in].
        B: [out, rank].
        scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
        units: float32 [rank], if a backend has quantized A and B into its own layout: the scale of each rank's codes.
        coded: (out, in) of a quantized module.
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
        """Return the singular value decomposition of `scale * B @ A`; the module must not be quantized.

        Two QR decompositions and one small SVD: the product of the two triangular factors has the same singular values,
        so the dense update is never built. Computed in float64.
        """
        qb, rb = torch.linalg.qr(self.B.double() * self.scale)
        qa, ra = torch.linalg.qr(self.A.double().T)
        u, s, vh = torch.linalg.svd(rb @ ra.T, full_matrices=False)
        return Spectrum((qb @ u).float(), s.float(), (vh @ qa.T).float())


@dataclass(frozen=True)
class Spectrum:
    """An update as U diag(S) Vh: U is [out, k], S is [k] descending, Vh is [k, in]; float32."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor

    def low_rank(self, rank: int) -> LowRank:
        """Return the best approximation of at most this rank, balanced between A and B, with scale 1."""
        root = self.S[:rank].sqrt()
        return LowRank((root[:, None] * self.Vh[:rank]).contiguous(), (self.U[:, :rank] * root).contiguous(), 1.0)


@dataclass(frozen=True)
class Version:
    """One immutable content of an adapter. `digest` is 64 hex digits."""

    name: str
    digest: str

    @property
    def label(self) -> str:
        """The name and the first 12 digits of the digest: "name@0123456789ab"."""
        return f"{self.name}@{self.digest[:SHORT_DIGEST]}"


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """A LoRA adapter in memory.

    Attributes:
        name: the adapter's name.
        digest: its content digest.
        modules: module path ("model.layers.0.self_attn.q_proj") -> update. Tensors may have any floating dtype and
            strides, or be quantized by a backend.
        metadata: information for users: `honoured`, `harmless`, `notes`, `base`, `card`, `task`, `quantization`, ...
        layout: the backend's description of prepared tensors.
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
        """Return the dense update of one module, [out, in] float32.

        Raises:
            KeyError: no such module.
            ValueError: a backend has quantized the module.
        """
        update = self.modules[module]
        if update.units is not None:
            raise ValueError(f"the update of {module} is quantized; only its backend can read it")
        return (update.B.float() @ update.A.float()) * update.scale


def not_finite(modules: Mapping[str, LowRank]) -> tuple[str, str] | None:
    """Return (path, "A" or "B") of the first matrix with NaN or infinity, or None.

    The matrices are checked in batches first, since an adapter has hundreds of small ones.
    """
    matrices = {(path, part): getattr(m, part) for path, m in modules.items() for part in ("A", "B")}
    by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
    for matrix in matrices.values():
        rows = matrix if matrix.is_contiguous() else matrix.t()
        by_dtype.setdefault(matrix.dtype, []).append(rows.reshape(-1))
    if all(all_finite(torch.cat(batch)) for flat in by_dtype.values() for batch in _batches(flat)):
        return None
    return next((key for key, matrix in matrices.items() if not torch.isfinite(matrix).all()), None)


def _batches(vectors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group vectors into batches of about `CHUNK` values."""
    batch: list[torch.Tensor] = []
    count = 0
    for vector in vectors:
        batch.append(vector)
        count += vector.numel()
        if count >= CHUNK:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    return not values.numel() or bool(torch.stack(torch.aminmax(values)).isfinite().all())


def all_finite_in(memory: bytes | memoryview, dtype: torch.dtype) -> bool:
    """Return whether a buffer of float32, bfloat16 or float16 values has no NaN or infinity."""
    kind, infinity = _BITS[dtype]
    bits = np.frombuffer(memory, kind)
    magnitude = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)
    chunks = (bits[at : at + CHUNK] for at in range(0, len(bits), CHUNK))
    return all((chunk & magnitude).max() < infinity for chunk in chunks)


def content_digest(config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """Return SHA-256 over the canonical JSON of `config`, then name, dtype, shape and bytes of each tensor by name."""
    h = hashlib.sha256()
    h.update(json.dumps(config, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode())
    buffer = bytearray()  # batched: each large update releases the GIL and waits to get it back
    for name in sorted(tensors):
        t = tensors[name]
        if t.device.type != "cpu" or not t.is_contiguous():
            t = t.cpu().contiguous()
        buffer += f"\n{name}\n{t.dtype}\n{tuple(t.shape)}\n".encode()
        if t.numel():
            buffer += (ctypes.c_char * t.nbytes).from_address(t.data_ptr())
        if len(buffer) >= 2 * CHUNK:
            h.update(buffer)
            buffer.clear()
    h.update(buffer)
    return h.hexdigest()


def digest_of(modules: Mapping[str, LowRank]) -> str:
    """Return the content digest of an adapter: each module's scale (as float32) and its tensors.

    Folders that describe the same update differently (a pattern or a list, another key prefix) have one digest.
    """
    tensors = {f"{path}.lora_A": m.A for path, m in modules.items()}
    tensors |= {f"{path}.lora_B": m.B for path, m in modules.items()}
    return content_digest({"scale": {path: float(np.float32(m.scale)) for path, m in modules.items()}}, tensors)


def with_digest(name: str, modules: Mapping[str, LowRank], metadata: Mapping[str, Any] | None = None) -> LoraWeights:
    """Build `LoraWeights` with the modules sorted by path and the digest computed."""
    ordered = dict(sorted(modules.items()))
    return LoraWeights(name, digest_of(ordered), ordered, dict(metadata or {}))


@dataclass(frozen=True)
class Mix:
    """A weighted sum of versions in canonical form: `((digest, weight), ...)` sorted by digest.

    Weights are finite, non-zero and exact in float32. The empty mix is the base model. Requests with equal mixes can
    share cached keys and values.
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
    """Return `weight` rounded to float32. Raises InvalidChoice if it is not finite or exceeds MAX_ABS_WEIGHT."""
    if not abs(weight) <= MAX_ABS_WEIGHT:  # true for NaN
        bounds = f"from {-MAX_ABS_WEIGHT:g} to {MAX_ABS_WEIGHT:g}"
        raise InvalidChoice(f"an adapter's weight must be a finite number {bounds}, not {weight!r}", param)
    return float(np.float32(weight))


def is_nonzero(weight: float) -> bool:
    """Return whether a weight is non-zero in float32."""
    return bool(np.float32(weight))


def canonical_mix(pairs: Iterable[tuple[Version, float]], max_mix: int) -> Mix:
    """Return the canonical mix of `(version, weight)` pairs.

    Weights of one digest under several names are added; zero weights are dropped.

    Raises:
        InvalidChoice: a name is repeated, a weight is invalid, or the mix has more than `max_mix` adapters.
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
