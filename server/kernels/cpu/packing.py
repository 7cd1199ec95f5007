"""The layout `vnni-8`: a matrix in tiles of 16 rows, as kernels.h describes it, and back.

Owns the permutations, both ways, and the pointers to a packed matrix. What codes mean is kernels/stored.py's.
"""

from __future__ import annotations

import math

import torch

from server.kernels.cpu import bindings
from server.kernels.packed_format import NF4, dequantize_stored, group_values, unpack_nibbles
from server.kernels.weight import Weight

LAYOUT = "vnni-8"
TILE = 16
GROUP = 32
"""Inputs whose products are added up before they are scaled, so groups of weights are whole multiples of it."""
SPAN = 64
"""Inputs whose products are scaled together."""
LARGEST = 16383
"""Of a scale as a whole number: two of 16 bits times that, twice, leave 32 bits room."""
MOST_LOST = 0.015
"""Of the length of a matrix's rows, were they rounded to whole numbers of a unit: 0.008 where weights are normally
distributed, and lost 0.09 when they became codes of four bits. Those that are never rounded so lose a 256th of it."""
MOST_INPUTS = 40_000
"""Of a row, so that 32 bits hold sums of products of 8 bits, without a sign, and 7."""
OF_UNIT = ("fineness", "rising")
"""Of a packed matrix, what only products of the matrix unit read."""
PIECE = 2**22
"""Weights of a matrix that are looked at at a time."""
_SCHEMES = {"int4": bindings.INT4, "nf4": bindings.NF4, "int8": bindings.INT8, "none": bindings.NONE}


def pack(stored: Weight) -> Weight:
    """The stored matrix in this layout. Raises ValueError for a group that is no multiple of 32."""
    if stored.scheme == "none":
        return _packed(stored, {"codes": _pack_values(stored.tensors["codes"])})
    if stored.group % GROUP or stored.shape[1] % stored.group:
        raise ValueError(
            f"the native kernels take groups that are a multiple of {GROUP} and divide the inputs, "
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
    if stored.shape[1] <= MOST_INPUTS and _even(stored, fineness := _fineness(stored)):
        tensors["fineness"] = torch.cat((fineness, fineness.new_ones(-len(fineness) % TILE)))
        if stored.scheme == "int4" and _scales(stored).amin() >= 0:
            tensors["rising"] = torch.ones(1, dtype=torch.uint8)
    return _packed(stored, tensors)


def dequantize(weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows `start` to `stop` of a packed matrix as float32 [rows, in], those of the stored form bit for bit."""
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
    grouped = values.view(stop - start, width // weight.group, weight.group)
    grouped *= _group_values(weight, "scale", tiles)[rows].float()[:, :, None]
    if weight.scheme == "int4":
        grouped += _group_values(weight, "zero", tiles)[rows].float()[:, :, None]
    return values


def matrix(weight: Weight) -> bindings.Matrix:
    """Pointers to a packed matrix, which must outlive whatever uses them. Raises ValueError for another layout."""
    if weight.layout != LAYOUT:
        raise ValueError(f"a matrix in the layout {weight.layout!r} was not packed for the native kernels")
    described = bindings.Matrix(n=weight.shape[0], k=weight.shape[1], scheme=_SCHEMES[weight.scheme])
    described.group = weight.group
    described.odd_count = len(weight.tensors.get("odd_at", ()))
    for name, tensor in weight.tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"the packed tensor {name} is not contiguous")
        setattr(described, name, tensor.data_ptr())
    return described


def _packed(stored: Weight, tensors: dict[str, torch.Tensor]) -> Weight:
    return Weight(stored.scheme, LAYOUT, stored.shape, stored.group, tensors)


def _padded_rows(t: torch.Tensor) -> torch.Tensor:
    """[out, n] with zeros below, to a whole number of tiles."""
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


def _fineness(stored: Weight) -> torch.Tensor:
    """bfloat16 [out]: how many units of each row 1 is, some number for a row of zeros. A unit is about a 127th of what
    the row's weights are at most, and by up to a 127th more: what bfloat16 has no bits for is cut off."""
    scale = _scales(stored)
    if stored.scheme == "int4":
        zero = group_values(stored.tensors, "zero", 0, stored.shape[0]).float()
        most = torch.maximum(zero.abs(), (15 * scale + zero).abs())
        # So that a byte, the sum of two that are rounded, fits, and 16 times a scale's 256ths fit 16 bits.
        unit = torch.maximum(most.amax(1) / 126.9, scale.abs().amax(1) / 15.98)
    else:
        unit = (scale.abs() * (128 if stored.scheme == "int8" else 1)).amax(1) / 127
    fineness = 1 / torch.where(unit > 0, unit, 1.0)
    return (fineness.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def _scales(stored: Weight) -> torch.Tensor:
    """float32 [out, groups]."""
    return group_values(stored.tensors, "scale", 0, stored.shape[0]).float()


def _even(stored: Weight, fineness: torch.Tensor) -> bool:
    """Whether whole numbers of their row's unit, or of its 256ths, are as good as the weights."""
    lengths = []
    for start in range(0, stored.shape[0], step := max(1, PIECE // stored.shape[1])):
        lengths.append(torch.linalg.vector_norm(dequantize_stored(stored, start, start + step), dim=1))
    length = torch.cat(lengths)
    rounded = math.sqrt(stored.shape[1] / 12) / fineness.float()  # errors are even
    if stored.scheme != "int4":
        rounded /= 256
    lost = torch.where(length > 0, rounded / length, 0.0)
    return float(lost.square().mean()) <= MOST_LOST**2


def _span_scales(stored: Weight) -> dict[str, torch.Tensor]:
    """int4's scales and zeros as whole numbers in units of a power of two for each row; see kernels.h. Those that do
    not come back from that as the float16 that they are, far smaller than the row's largest, are told apart."""
    scale, zero = (_padded_rows(stored.tensors[name]) for name in ("scale", "zero"))
    whole = torch.stack((scale.double(), zero.double() / 8 + scale.double()), -1)  # [out, groups, 2]
    exponent = torch.frexp(whole.abs().amax((1, 2)) / LARGEST).exponent
    whole = torch.ldexp(whole, -exponent[:, None, None]).round_().to(torch.int16)
    odd = torch.stack((scale, zero), -1)
    odd_at = (_float16(whole, exponent[:, None, None]) != odd).any(-1).flatten().nonzero().flatten()
    tensors = {"exponents": exponent.to(torch.int8)}
    if len(odd_at):
        tensors |= {"odd_at": odd_at, "odd": odd.flatten(0, 1)[odd_at]}
    if stored.group % SPAN:
        whole = whole.repeat_interleave(stored.group // GROUP, 1)
        whole = torch.cat((whole, whole.new_zeros(len(whole), whole.shape[1] % 2, 2)), 1)
        whole = whole.view(-1, TILE, whole.shape[1] // 2, 2, 2).permute(0, 2, 4, 1, 3)
    else:
        whole = whole.view(-1, TILE, whole.shape[1], 2).permute(0, 2, 3, 1)
    return tensors | {"span_scales": whole.contiguous()}


def _float16(whole: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """float16 [..., 2]: the scales and zeros that two whole numbers each stand for."""
    scale, rest = whole.int().unbind(-1)
    return torch.ldexp(torch.stack((scale, 8 * (rest - scale)), -1).float(), exponent).half()


def _of_spans(weight: Weight, tiles: slice) -> torch.Tensor:
    """float16 [rows of the tiles, groups, 2]: scales and zeros."""
    spans = weight.tensors["span_scales"][tiles]
    groups = weight.shape[1] // weight.group
    if weight.group % SPAN:
        whole = spans.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:, : weight.shape[1] // GROUP]
        whole = whole[:, :: weight.group // GROUP]
    else:
        whole = spans.permute(0, 3, 1, 2).flatten(0, 1)
    values = _float16(whole, weight.tensors["exponents"].view(-1, TILE)[tiles].flatten()[:, None, None])
    if "odd_at" in weight.tensors:
        first = tiles.start * TILE * groups
        begin, end = torch.searchsorted(weight.tensors["odd_at"], torch.tensor([first, first + len(values) * groups]))
        at = weight.tensors["odd_at"][begin:end] - first
        values.view(-1, 2)[at] = weight.tensors["odd"][begin:end]
    return values


def _group_values(weight: Weight, name: str, tiles: slice) -> torch.Tensor:
    """float16 [rows of the tiles, groups]."""
    if "span_scales" in weight.tensors:
        return _of_spans(weight, tiles)[..., 0 if name == "scale" else 1]
    if not weight.double_quantized:
        return weight.tensors["scale"][tiles].transpose(1, 2).flatten(0, 1)
    codes = weight.tensors[f"{name}_codes"][tiles]  # [tiles, groups, 16]
    columns = torch.arange(codes.shape[1]) // TILE
    values = codes.float()
    values *= weight.tensors[f"{name}_step"][tiles][:, columns, None]
    values += weight.tensors[f"{name}_base"][tiles][:, columns, None]
    return values.half().transpose(1, 2).flatten(0, 1)
