"""Packs matrices into the layout of the C++ kernels (tiles of 16 rows; see `Matrix` in kernels.h) and back."""

from __future__ import annotations

import math

import torch

from server.kernels.cpu import bindings
from server.kernels.packed_format import NF4, apply_scales, dequantize_stored, group_values, unpack_nibbles
from server.kernels.weight import Weight

LAYOUT = "vnni-9"
TILE = 16
GROUP = 32
"""Inputs that share an int32 accumulator. Groups of weights are multiples of it."""
SPAN = 64
"""Inputs that are scaled together."""
MAX_INT_SCALE = 16383
"""Largest integer scale, so that two products of 16-bit numbers fit in 32 bits."""
MAX_ROUNDING_LOSS = 0.015
"""Largest relative error of rounding int4 rows to 8 bits per row for AMX. It is 0.008 for normally distributed weights;
quantization to 4 bits loses 0.09. int8 and nf4 lose 1/256 of it, since they keep 16 bits."""
MAX_INPUTS = 40_000
"""Longest row for AMX, so that 32 bits hold the accumulators."""
AMX_TENSORS = ("inverse_scale", "nonnegative_scales")
"""Tensors that only AMX kernels read."""
CHUNK = 2**22
"""Weights that are dequantized at a time."""
_SCHEMES = {"int4": bindings.INT4, "nf4": bindings.NF4, "int8": bindings.INT8, "none": bindings.NONE}


def pack(stored: Weight) -> Weight:
    """Pack a stored matrix. Raises ValueError unless the group is a multiple of 32 that divides the inputs."""
    if stored.scheme == "none":
        return _packed(stored, {"codes": _pack_values(stored.tensors["codes"])})
    if stored.group % GROUP or stored.shape[1] % stored.group:
        raise ValueError(
            f"the native kernels need a group size that is a multiple of {GROUP} and divides the inputs, "
            f"not {stored.group} for {stored.shape[1]} inputs"
        )
    codes = stored.tensors["codes"]
    tensors = {"codes": _pack_bytes(codes) if stored.scheme == "int8" else _pack_nibbles(codes)}
    if stored.double_quantized:
        for name in ("scale", "zero") if stored.scheme == "int4" else ("scale",):
            tensors[f"{name}_codes"] = _tiled(stored.tensors[f"{name}_codes"])
            tensors[f"{name}_step"] = stored.tensors[f"{name}_step"].contiguous()
            tensors[f"{name}_base"] = stored.tensors[f"{name}_base"].contiguous()
    elif stored.scheme == "int4":
        tensors |= _span_scales(stored)
    else:
        tensors["scale"] = _tiled(stored.tensors["scale"])
    if stored.shape[1] <= MAX_INPUTS and _fits_row_scales(stored, inverse := _inverse_scale(stored)):
        tensors["inverse_scale"] = torch.cat((inverse, inverse.new_ones(-len(inverse) % TILE)))
        if stored.scheme == "int4" and _scales(stored).amin() >= 0:
            tensors["nonnegative_scales"] = torch.ones(1, dtype=torch.uint8)
    return _packed(stored, tensors)


def dequantize(weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Dequantize rows `start` to `stop` to float32 [rows, in], exactly as the stored form does."""
    out, width = weight.shape
    stop = out if stop is None else min(stop, out)
    if stop <= start:
        return torch.empty(0, width)
    tiles = slice(start // TILE, -(-stop // TILE))
    rows = slice(start - tiles.start * TILE, stop - tiles.start * TILE)
    codes = weight.tensors["codes"][tiles]
    if weight.scheme == "none":
        return codes.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[rows, :width].float()
    if weight.scheme == "int8":
        values = codes.permute(0, 3, 1, 2, 4).reshape(-1, width)[rows].float().sub_(128)
    else:
        halves = torch.stack((codes & 15, codes >> 4), 2)  # [tiles, groups, 2, 4, 16, 4]
        levels = halves.permute(0, 4, 1, 2, 3, 5).reshape(-1, width)[rows]
        values = NF4[levels.int()] if weight.scheme == "nf4" else levels.float()
    scale = _group_values(weight, "scale", tiles)[rows]
    zero = _group_values(weight, "zero", tiles)[rows] if weight.scheme == "int4" else None
    return apply_scales(values, weight.group, scale, zero)


def matrix(weight: Weight) -> bindings.Matrix:
    """Pointers to a packed matrix, which must outlive them. Raises ValueError for another layout."""
    if weight.layout != LAYOUT:
        raise ValueError(f"a matrix in the layout {weight.layout!r} was not packed for the native kernels")
    pointers = bindings.Matrix(n=weight.shape[0], k=weight.shape[1], scheme=_SCHEMES[weight.scheme])
    pointers.group = weight.group
    pointers.exception_count = len(weight.tensors.get("exception_at", ()))
    for name, tensor in weight.tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"the packed tensor {name} is not contiguous")
        setattr(pointers, name, tensor.data_ptr())
    return pointers


def _packed(stored: Weight, tensors: dict[str, torch.Tensor]) -> Weight:
    return Weight(stored.scheme, LAYOUT, stored.shape, stored.group, tensors)


def _padded_rows(t: torch.Tensor) -> torch.Tensor:
    """[out, n] padded with zero rows to whole tiles."""
    missing = -t.shape[0] % TILE
    return torch.cat((t, t.new_zeros(missing, t.shape[1]))) if missing else t


def _tiled(values: torch.Tensor) -> torch.Tensor:
    """[out, groups] -> [tiles, groups, 16]."""
    return _padded_rows(values).view(-1, TILE, values.shape[1]).transpose(1, 2).contiguous()


def _pack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [out, in/2] -> uint8 [tiles, in/32, 4, 16, 4]."""
    codes = unpack_nibbles(_padded_rows(packed))
    split = codes.view(-1, TILE, codes.shape[1] // GROUP, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
    return (split[0] | (split[1] << 4)).contiguous()


def _pack_bytes(codes: torch.Tensor) -> torch.Tensor:
    """int8 [out, in] -> uint8 [tiles, in/32, 8, 16, 4], 128 added."""
    shifted = _padded_rows(codes).view(torch.uint8) ^ 128
    return shifted.view(-1, TILE, codes.shape[1] // GROUP, 8, 4).permute(0, 2, 3, 1, 4).contiguous()


def _pack_values(values: torch.Tensor) -> torch.Tensor:
    """Floats [out, in] -> bf16 [tiles, padded in / 2, 16, 2]."""
    rows = _padded_rows(values.bfloat16())
    missing = -rows.shape[1] % GROUP
    if missing:
        rows = torch.cat((rows, rows.new_zeros(rows.shape[0], missing)), 1)
    return rows.view(-1, TILE, rows.shape[1] // 2, 2).transpose(1, 2).contiguous()


def _inverse_scale(stored: Weight) -> torch.Tensor:
    """bfloat16 [out]: 1 / the 8-bit scale of each row, rounded down. The scale is about the row's maximum / 127."""
    scale = _scales(stored)
    if stored.scheme == "int4":
        zero = group_values(stored.tensors, "zero", 0, stored.shape[0]).float()
        largest = torch.maximum(zero.abs(), (15 * scale + zero).abs())
        # A sum of two rounded numbers must fit in 8 bits, and 16 times a scale in 1/256 of the unit in 16 bits.
        unit = torch.maximum(largest.amax(1) / 126.9, scale.abs().amax(1) / 15.98)
    else:
        unit = (scale.abs() * (128 if stored.scheme == "int8" else 1)).amax(1) / 127
    inverse = 1 / torch.where(unit > 0, unit, 1.0)
    return (inverse.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def _scales(stored: Weight) -> torch.Tensor:
    """float32 [out, groups]."""
    return group_values(stored.tensors, "scale", 0, stored.shape[0]).float()


def _fits_row_scales(stored: Weight, inverse: torch.Tensor) -> bool:
    """Whether rounding with one scale per row loses little: see MAX_ROUNDING_LOSS."""
    lengths = []
    for start in range(0, stored.shape[0], step := max(1, CHUNK // stored.shape[1])):
        lengths.append(torch.linalg.vector_norm(dequantize_stored(stored, start, start + step), dim=1))
    length = torch.cat(lengths)
    rounding = math.sqrt(stored.shape[1] / 12) / inverse.float()  # uniformly distributed errors
    if stored.scheme != "int4":
        rounding /= 256
    loss = torch.where(length > 0, rounding / length, 0.0)
    return float(loss.square().mean()) <= MAX_ROUNDING_LOSS**2


def _span_scales(stored: Weight) -> dict[str, torch.Tensor]:
    """int4 scales and zeros as integers times a power of two per row. Values far below the
    row's largest, which integers do not represent exactly, are stored as float16 exceptions."""
    scale, zero = (_padded_rows(stored.tensors[name]) for name in ("scale", "zero"))
    ints = torch.stack((scale.double(), zero.double() / 8 + scale.double()), -1)  # [out, groups, 2]
    exponent = torch.frexp(ints.abs().amax((1, 2)) / MAX_INT_SCALE).exponent
    ints = torch.ldexp(ints, -exponent[:, None, None]).round_().to(torch.int16)
    exact = torch.stack((scale, zero), -1)
    exception_at = (_float16(ints, exponent[:, None, None]) != exact).any(-1).flatten().nonzero().flatten()
    tensors = {"exponents": exponent.to(torch.int8)}
    if len(exception_at):
        tensors |= {"exception_at": exception_at, "exception_values": exact.flatten(0, 1)[exception_at]}
    if stored.group % SPAN:
        ints = ints.repeat_interleave(stored.group // GROUP, 1)
        ints = torch.cat((ints, ints.new_zeros(len(ints), ints.shape[1] % 2, 2)), 1)
        ints = ints.view(-1, TILE, ints.shape[1] // 2, 2, 2).permute(0, 2, 4, 1, 3)
    else:
        ints = ints.view(-1, TILE, ints.shape[1], 2).permute(0, 2, 3, 1)
    return tensors | {"span_scales": ints.contiguous()}


def _float16(ints: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """float16 [..., 2]: scales and zeros from their integer form."""
    scale, rest = ints.int().unbind(-1)
    return torch.ldexp(torch.stack((scale, 8 * (rest - scale)), -1).float(), exponent).half()


def _decode_span_scales(weight: Weight, tiles: slice) -> torch.Tensor:
    """float16 [rows of the tiles, groups, 2]: scales and zeros."""
    spans = weight.tensors["span_scales"][tiles]
    groups = weight.shape[1] // weight.group
    if weight.group % SPAN:
        ints = spans.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:, : weight.shape[1] // GROUP]
        ints = ints[:, :: weight.group // GROUP]
    else:
        ints = spans.permute(0, 3, 1, 2).flatten(0, 1)
    values = _float16(ints, weight.tensors["exponents"].view(-1, TILE)[tiles].flatten()[:, None, None])
    if "exception_at" in weight.tensors:
        first = tiles.start * TILE * groups
        begin, end = torch.searchsorted(
            weight.tensors["exception_at"], torch.tensor([first, first + len(values) * groups])
        )
        at = weight.tensors["exception_at"][begin:end] - first
        values.view(-1, 2)[at] = weight.tensors["exception_values"][begin:end]
    return values


def _group_values(weight: Weight, name: str, tiles: slice) -> torch.Tensor:
    """float16 [rows of the tiles, groups]."""
    if "span_scales" in weight.tensors:
        return _decode_span_scales(weight, tiles)[..., 0 if name == "scale" else 1]
    if not weight.double_quantized:
        return weight.tensors["scale"][tiles].transpose(1, 2).flatten(0, 1)
    codes = weight.tensors[f"{name}_codes"][tiles]  # [tiles, groups, 16]
    columns = torch.arange(codes.shape[1]) // TILE
    values = codes.float()
    values *= weight.tensors[f"{name}_step"][tiles][:, columns, None]
    values += weight.tensors[f"{name}_base"][tiles][:, columns, None]
    return values.half().transpose(1, 2).flatten(0, 1)
