"""Packs matrices into 32-bit words that the kernels read with 16-byte loads (layout `words-2`).

A block of inputs has `parts * run` inputs, with 4 parts for 4-bit codes and 2 for 8-bit codes. Word i of a row holds
the codes of inputs p * run + 2 i and p * run + 2 i + 1 in its two halves, for parts p from the lowest bits up. So a
shift of a tile of words gives `run` adjacent inputs of each row, in pairs of 16-bit values, as tensor cores read them:

    words   int32 [blocks, out, run / 2], blocks = ceil(in / (parts * run)), zero-padded
    scale, zero     float16 [in / group, out] (zero for int4 only), or double-quantized, for each (here s):
    s_codes         int32 [ceil(in / group / 4), out], four groups per word, lowest bits first
    s_step, s_base  float32 [ceil(in / group / 16), ceil(out / 16)]

Outputs are on axis 1 of all tensors (tiles of 16 in s_step and s_base), so matrices can be concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch

from server.errors import BadModel
from server.kernels.packed_format import NF4, TILE, apply_scales, decode_tiles, unpack_nibbles
from server.kernels.weight import Weight

LAYOUT = "words-2"
RUNS = (128, 64, 32, 16)
"""Adjacent inputs of a part: the depth of a tensor core product."""
LONGEST = {"int4": 64, "int8": 64, "nf4": 32}
"""The preferred longest run, limited by registers."""
GROUPS = (32, 64, 128, 256)
"""Group sizes that the kernels support."""


def parts_of(scheme: str) -> int:
    """Codes per half of a word."""
    return 2 if scheme == "int8" else 4


def run_length(scheme: str, width: int, group: int) -> int:
    """The run that pads the inputs least, the longest among equals; the shortest if all are too long."""
    parts = parts_of(scheme)
    fitting = [run for run in RUNS if group % run == 0 and parts * run % group == 0]
    return min(fitting, key=lambda run: (max(run, LONGEST[scheme]), -width % (parts * run), -run))


def pack(stored: Weight) -> Weight:
    """Pack a stored matrix on its device. Raises BadModel for an unsupported group size."""
    if stored.scheme == "none":
        values = stored.tensors["codes"]
        kept = values if values.dtype in (torch.bfloat16, torch.float32) else values.bfloat16()
        return Weight("none", LAYOUT, stored.shape, stored.group, {"values": kept.contiguous()})
    if stored.group not in GROUPS or stored.shape[1] % stored.group:
        raise BadModel(
            f"the CUDA kernels need groups of {', '.join(map(str, GROUPS))} that divide the inputs, not {stored.group} "
            f"for {stored.shape[1]} inputs",
            "group_size",
        )
    codes = stored.tensors["codes"]
    codes = codes.view(torch.uint8) if stored.scheme == "int8" else unpack_nibbles(codes)
    tensors = {"words": _words(codes, stored.scheme, run_length(stored.scheme, stored.shape[1], stored.group))}
    for name, tensor in stored.tensors.items():
        if name.endswith("_codes"):
            tensors[name] = _quads(tensor)
        elif name != "codes":
            tensors[name] = tensor.t().contiguous()
    return Weight(stored.scheme, LAYOUT, stored.shape, stored.group, tensors)


def dequantize(weight: Weight, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Dequantize rows `start` to `stop` to float32 [rows, in], exactly as the stored form does."""
    rows, width = weight.shape
    stop = rows if stop is None else min(stop, rows)
    if weight.scheme == "none":
        return weight.tensors["values"][start:stop].float()
    codes = _codes(weight.tensors["words"][:, start:stop], weight.scheme, width)
    if weight.scheme == "int8":
        values = codes.view(torch.int8).float()
    elif weight.scheme == "nf4":
        values = NF4.to(codes.device)[codes.int()]
    else:
        values = codes.float()
    scale = _group_values(weight, "scale", start, stop)
    zero = _group_values(weight, "zero", start, stop) if weight.scheme == "int4" else None
    return apply_scales(values, weight.group, scale, zero)


def gather_rows(table: Weight, ids: torch.Tensor) -> torch.Tensor:
    """Rows `ids` (int64 [n]) of a packed table as float32 [n, in]. Its scales must not be double-quantized."""
    axis = 0 if table.scheme == "none" else 1
    found = {name: tensor.index_select(axis, ids) for name, tensor in table.tensors.items()}
    return dequantize(Weight(table.scheme, LAYOUT, (len(ids), table.shape[1]), table.group, found))


def slice_outputs(weight: Weight, start: int, stop: int) -> Weight:
    """Outputs `start`, a multiple of 16, to `stop` of a packed matrix, as views."""
    assert start % TILE == 0, "scales are in tiles of 16 outputs"
    if weight.scheme == "none":
        tensors = {name: tensor[start:stop] for name, tensor in weight.tensors.items()}
    else:
        tiles = slice(start // TILE, -(-stop // TILE))
        tensors = {
            name: tensor[:, tiles if name.endswith(("_step", "_base")) else slice(start, stop)]
            for name, tensor in weight.tensors.items()
        }
    return Weight(weight.scheme, LAYOUT, (stop - start, weight.shape[1]), weight.group, tensors)


def concatenate(weights: Sequence[Weight], device: torch.device) -> Weight:
    """Concatenate the outputs of matrices on `device`.

    Raises:
        BadModel: The matrices differ in scheme, group or inputs, or have double-quantized scales and outputs that are
            no multiple of 16.
    """
    first = weights[0]
    same = all((w.scheme, w.group, w.shape[1]) == (first.scheme, first.group, first.shape[1]) for w in weights)
    tiled = all(not w.double_quantized or w.shape[0] % TILE == 0 for w in weights)
    if not same or not tiled:
        shapes = ", ".join(f"{w.shape[0]}x{w.shape[1]} {w.scheme} in groups of {w.group}" for w in weights)
        raise BadModel(f"the CUDA kernels cannot concatenate these matrices of a layer: {shapes}")
    axis = 0 if first.scheme == "none" else 1
    joined = {name: torch.cat([w.tensors[name].to(device) for w in weights], axis) for name in first.tensors}
    shape = (sum(w.shape[0] for w in weights), first.shape[1])
    return Weight(first.scheme, LAYOUT, shape, first.group, joined)


def _words(codes: torch.Tensor, scheme: str, run: int) -> torch.Tensor:
    """uint8 [out, in] -> int32 [blocks, out, run / 2]."""
    rows, width = codes.shape
    parts = parts_of(scheme)
    blocks = -(-width // (parts * run))
    padded = torch.nn.functional.pad(codes, (0, blocks * parts * run - width))
    split = padded.view(rows, blocks, parts, run // 2, 2)
    words = torch.zeros(blocks, rows, run // 2, dtype=torch.int32, device=codes.device)
    for half, part in product(range(2), range(parts)):
        words |= split[:, :, part, :, half].transpose(0, 1).int() << _shift(parts, half, part)
    return words


def _codes(words: torch.Tensor, scheme: str, width: int) -> torch.Tensor:
    """The inverse of `_words`: uint8 [rows, in]."""
    blocks, rows, pairs = words.shape
    parts = parts_of(scheme)
    codes = torch.empty(rows, blocks, parts, pairs, 2, dtype=torch.uint8, device=words.device)
    for half, part in product(range(2), range(parts)):
        found = (words >> _shift(parts, half, part)) & ((1 << 16 // parts) - 1)
        codes[:, :, part, :, half] = found.transpose(0, 1)
    return codes.flatten(1)[:, :width].contiguous()


def _shift(parts: int, half: int, part: int) -> int:
    """Bit position of a code in a word."""
    return 16 * half + 16 // parts * part


def _quads(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [out, groups] -> int32 [ceil(groups / 4), out]."""
    padded = torch.nn.functional.pad(codes, (0, -codes.shape[1] % 4))
    return padded.contiguous().view(torch.int32).t().contiguous()


def _group_values(weight: Weight, name: str, start: int, stop: int) -> torch.Tensor:
    """The `scale` or `zero` of rows start..stop as float16 [rows, in/group]."""
    if not weight.double_quantized:
        return weight.tensors[name][:, start:stop].t()
    turned = weight.tensors[f"{name}_codes"][:, start:stop].t()
    codes = turned.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    codes = codes[:, : weight.shape[1] // weight.group]
    rows = torch.arange(start, start + len(codes), device=codes.device)
    return decode_tiles(codes, weight.tensors[f"{name}_step"].t(), weight.tensors[f"{name}_base"].t(), rows)
