"""Reads the `stored` layout of `Weight`: exact dequantization, and packing of 4-bit codes."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from server.kernels.weight import Weight

TILE = 16
"""Rows, and groups, that share the step and base of double-quantized scales."""

NF4 = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)
"""The sixteen quantiles of NormalFloat4 (QLoRA, Dettmers et al. 2023, appendix E)."""


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, n] of values 0..15 -> uint8 [rows, n/2], column 2i in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 [rows, n/2] -> uint8 [rows, n]."""
    codes = torch.empty((*packed.shape, 2), dtype=torch.uint8, device=packed.device)
    torch.bitwise_and(packed, 15, out=codes[..., 0])
    torch.bitwise_right_shift(packed, 4, out=codes[..., 1])
    return codes.flatten(1)


def stored_parts(
    scheme: str, shape: tuple[int, int], group: int, double_quant: bool
) -> dict[str, tuple[torch.dtype, tuple[int, int]]]:
    """Name -> (dtype, shape) of the tensors of a quantized matrix in the stored layout."""
    rows, columns = shape
    groups = columns // group
    parts = {"codes": (torch.int8, shape) if scheme == "int8" else (torch.uint8, (rows, columns // 2))}
    for name in ("scale", "zero") if scheme == "int4" else ("scale",):
        if double_quant:
            tiles = (-(-rows // TILE), -(-groups // TILE))
            parts[f"{name}_codes"] = (torch.uint8, (rows, groups))
            parts[f"{name}_step"] = parts[f"{name}_base"] = (torch.float32, tiles)
        else:
            parts[name] = (torch.float16, (rows, groups))
    return parts


def group_values(tensors: Mapping[str, torch.Tensor], name: str, start: int, stop: int) -> torch.Tensor:
    """The `scale` or `zero` of rows start..stop as float16 [rows, in/group], double-quantized or not."""
    if name in tensors:
        return tensors[name][start:stop]
    codes = tensors[f"{name}_codes"][start:stop]
    rows = torch.arange(start, start + len(codes), device=codes.device)
    return decode_tiles(codes, tensors[f"{name}_step"], tensors[f"{name}_base"], rows)


def decode_tiles(codes: torch.Tensor, step: torch.Tensor, base: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Decode double-quantized scales: float16(codes * step + base), [n, groups].

    Args:
        codes: uint8 [n, groups] of the rows `rows`.
        step: float32, one per tile of 16 rows by 16 groups of the whole matrix.
        base: Like `step`.
        rows: Row numbers in the matrix, int64 [n].

    Product and sum are rounded to float32 separately, so that all backends get the same bits.
    """
    tiles = rows // TILE
    columns = torch.arange(codes.shape[1], device=codes.device) // TILE
    values = codes.float()
    values *= step[tiles][:, columns]
    values += base[tiles][:, columns]
    return values.half()


def dequantize_stored(
    weight: Weight, start: int = 0, stop: int | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Dequantize rows `start` to `stop` of a stored matrix to float32 [rows, in]. int8 can be written to `out`."""
    rows = weight.shape[0]
    stop = rows if stop is None else min(stop, rows)
    codes = weight.tensors["codes"][start:stop]
    if weight.scheme == "none":
        return codes.float()
    if weight.scheme == "int8":
        values = codes.float() if out is None else out.copy_(codes)
    elif weight.scheme == "nf4":
        values = _levels(codes, NF4)
    else:
        values = _levels(codes, torch.arange(16.0))
    scale = group_values(weight.tensors, "scale", start, stop)
    zero = group_values(weight.tensors, "zero", start, stop) if weight.scheme == "int4" else None
    return apply_scales(values, weight.group, scale, zero)


def apply_scales(
    values: torch.Tensor, group: int, scale: torch.Tensor, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """values * scale + zero by groups of columns, in place. values float32 [rows, in], others [rows, in/group]."""
    grouped = values.view(len(values), values.shape[1] // group, group)
    grouped *= scale.float()[:, :, None]
    if zero is not None:
        grouped += zero.float()[:, :, None]
    return values


def _levels(packed: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """table[code] of each nibble: uint8 [rows, n/2] -> float32 [rows, n]. One lookup per byte gives two values."""
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), 1).view(torch.int64).view(-1)
    found = torch.index_select(pairs.to(packed.device), 0, packed.reshape(-1).int())
    return found.view(torch.float32).view(packed.shape[0], 2 * packed.shape[1])
