"""The Triton kernels on small shapes, compared with the reference: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import importlib.util
import math
import mmap
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from benchmarks.shapes import QWEN_7B
from server.errors import BadModel
from server.kernels import cuda, reference
from server.kernels.cuda import attention, epilogue, lora, matmul, packing, rowwise, sampling
from server.kernels.packed_format import stored_parts
from server.kernels.weight import STORED, Weight
from server.model.config import from_hf
from server.model.quantization import quantize
from tests.server.kernels.tiny import BLOCK, error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
FLOAT = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
"""The interpreter cannot multiply bfloat16. float16 is tested too and uses the same code."""
LOOSE = 2e-2 if DEVICE.type == "cuda" else 2e-5
SCHEMES = [("int4", 64, True), ("int4", 32, False), ("nf4", 64, True), ("nf4", 64, False), ("int8", 32, False)]


def stored_matrix(out: int, width: int, scheme: str, group: int, double: bool, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed)
    return quantize(torch.randn(out, width, generator=generator) * width**-0.5, scheme, group, double)


def on_device(stored: Weight, dtype: torch.dtype = FLOAT) -> matmul.Matrix:
    return matmul.Matrix(packing.concatenate([packing.pack(stored)], DEVICE), dtype)


def poisoned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A result tensor of NaN, which a kernel must overwrite completely."""
    return torch.full(shape, math.nan, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("width", "scheme", "group", "double"),
    [(576, *scheme) for scheme in SCHEMES]
    + [(256, "int4", 128, True), (512, "int4", 256, True), (512, "int4", 64, True)],
)
def test_packing_keeps_the_stored_values(width: int, scheme: str, group: int, double: bool) -> None:
    stored = stored_matrix(48, width, scheme, group, double)
    packed = packing.pack(stored)
    exact = reference.Reference().dequantize(stored)
    assert torch.equal(packing.dequantize(packed), exact)
    assert torch.equal(packing.dequantize(packed, 5, 37), exact[5:37])
    if not double:
        assert torch.equal(packing.gather_rows(packed, torch.tensor([40, 3, 3])), exact[[40, 3, 3]])
    assert torch.equal(matmul.dequantized(packing.concatenate([packed], DEVICE), torch.float32).cpu(), exact)
    whole = packing.concatenate([packed, packed], DEVICE)
    for start, stop in ((16, 37), (48, 96)):  # a slice of one matrix, and of two concatenated ones
        part = packing.slice_outputs(whole, start, stop)
        assert torch.equal(packing.dequantize(part).cpu(), torch.cat((exact, exact))[start:stop])
        assert torch.equal(matmul.dequantized(part, torch.float32).cpu(), torch.cat((exact, exact))[start:stop])


def test_production_shapes_need_no_padding() -> None:
    for width in (2048, 2560, 3584, 4096, 8192, 14336, 18944):
        run = packing.run_length("int4", width, 64)
        assert run == 64 and width % (4 * run) == 0
    stored = stored_matrix(64, 1024, "int4", 64, True)
    assert packing.pack(stored).nbytes == stored.nbytes


def test_the_shortest_run_is_used_if_all_are_too_long() -> None:
    """Longer runs would exceed the shared memory of small GPUs."""
    assert packing.run_length("nf4", 3584, 256) == 64
    assert packing.run_length("int8", 3584, 256) == 128


def test_a_7b_base_takes_less_than_4_7_gb() -> None:
    """Computed from the sizes of the packed tensors: int4 with double quantization and 8-bit tables."""
    config = from_hf(QWEN_7B)
    total, known = 0, {}
    kinds = [(shape, "int4", 64, True) for shape in config.linear_shapes().values()]
    for kind in [*kinds, *((shape, "int8", 32, False) for shape in config.table_shapes().values())]:
        if kind not in known:
            shape, scheme, group, double = kind
            parts = stored_parts(scheme, shape, group, double)
            tensors = {name: torch.empty(size, dtype=dtype, device="meta") for name, (dtype, size) in parts.items()}
            known[kind] = packing.pack(Weight(scheme, STORED, shape, group, tensors)).nbytes
        total += known[kind]
    assert total < 4.7e9


def test_unsupported_groups_are_refused() -> None:
    stored = stored_matrix(16, 64, "int4", 64, False)
    with pytest.raises(BadModel, match="groups of 32, 64, 128, 256"):
        packing.pack(Weight("int4", "stored", (16, 64), 16, stored.tensors))
    one, other = (packing.pack(stored_matrix(16, 64, "int4", group, False)) for group in (32, 64))
    with pytest.raises(BadModel, match="cannot concatenate"):
        packing.concatenate([one, other], DEVICE)


@pytest.mark.parametrize("dtype", [FLOAT, torch.float16])
@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
@pytest.mark.parametrize(("m", "out", "width"), [(1, 160, 512), (3, 48, 576), (19, 130, 256)])
def test_split_k_products(
    m: int, out: int, width: int, scheme: str, group: int, double: bool, dtype: torch.dtype
) -> None:
    if double and out % 16:
        out = 128
    stored = stored_matrix(out, width, scheme, group, double)
    matrix = on_device(stored, dtype)
    x = torch.randn(m, width, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    sums = poisoned(m, width // group)
    matmul.group_sums(x, group, sums)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 2e-3}[dtype]
    levels = 5e-3 if scheme == "nf4" and dtype != torch.float32 else tolerance
    how = matrix.tiling(m)
    assert how.splits > 1 or matrix.blocks == 1
    result = poisoned(how.splits, m, out)
    matrix.multiply(x, sums, result, how)
    exact = x.float().cpu() @ reference.Reference().dequantize(stored).t()
    assert error(result.sum(0), exact) < levels


@pytest.mark.parametrize("group", [32, 64, 128, 256])
def test_double_quantized_scales_for_every_group_size(group: int) -> None:
    """Blocks of four, two or one groups; four scale codes share a word."""
    stored = stored_matrix(64, 1536, "int4", group, True)
    matrix = on_device(stored)
    assert matrix.blocks == 1536 // min(4 * group, 256)
    x = torch.randn(2, 1536, generator=torch.Generator().manual_seed(3)).to(DEVICE, FLOAT)
    sums = poisoned(2, 1536 // group)
    matmul.group_sums(x, group, sums)
    how = matrix.tiling(2)
    result = poisoned(how.splits, 2, 64)
    matrix.multiply(x, sums, result, how)
    assert error(result.sum(0), x.float().cpu() @ reference.Reference().dequantize(stored).t()) < LOOSE


@pytest.mark.parametrize(("scheme", "group", "double"), [("int4", 64, True), ("nf4", 64, False), ("int8", 32, False)])
def test_tiled_and_dense_products(scheme: str, group: int, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = stored_matrix(144, 320, scheme, group, double)
    matrix = on_device(stored)
    x = torch.randn(70, 320, generator=torch.Generator().manual_seed(2)).to(DEVICE, FLOAT)
    exact = x.float().cpu() @ reference.Reference().dequantize(stored).t()
    for dense_rows in (1000, 70):  # the tiled kernel, and cuBLAS
        monkeypatch.setattr(matmul, "DENSE_ROWS", dense_rows)
        result = poisoned(1, 70, 144)
        matrix.multiply(x, x, result, matrix.tiling(70))
        assert error(result[0], exact) < LOOSE


def test_cublas_writes_float32_without_a_temporary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary result would be as large as all other memory of a step."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "mm", lambda *args, **options: calls.append(options))
    out, x = torch.empty(3, 8), SimpleNamespace(is_cuda=True, dtype=torch.bfloat16)
    matmul._multiply_dense(x, torch.ones(8, 4), out)  # type: ignore[arg-type]
    assert len(calls) == 1 and calls[0]["out_dtype"] == torch.float32 and calls[0]["out"] is out


def test_products_without_quantization() -> None:
    stored = quantize(torch.randn(24, 40), "none")
    matrix = on_device(stored)
    x = torch.randn(3, 40).to(DEVICE, FLOAT)
    result = poisoned(1, 3, 24)
    matrix.multiply(x, x, result, matrix.tiling(3))
    assert error(result[0], x.float().cpu() @ stored.tensors["codes"].float().t()) < LOOSE


def test_int4_code_offsets_are_exact() -> None:
    """For bfloat16, which the interpreter cannot multiply."""
    codes = torch.arange(16, dtype=torch.int16)
    for dtype, bits in ((torch.bfloat16, 0x4300), (torch.float16, 0x6400)):
        assert torch.equal((codes | bits).view(dtype).float(), codes.float() + matmul.offset_of(dtype))


class Adapters:
    """Adapters of several ranks in three slices of one module, float or int8; some lack a slice."""

    def __init__(self, width: int, outputs: tuple[int, ...], ranks: list[list[int]], coded: bool = False) -> None:
        generator = torch.Generator().manual_seed(7)
        self.a, self.b = {}, {}
        kept = torch.int8 if coded else FLOAT
        pieces = [torch.full((64,), 99 if coded else math.nan).to(kept)]
        offsets = torch.zeros(len(ranks), 4, 3, dtype=torch.int64)
        table = torch.zeros(len(ranks), 4, dtype=torch.int32)
        scales = torch.zeros(len(ranks), 4)

        def put(values: torch.Tensor) -> int:
            """Append values, aligned to 64; returns their offset."""
            at = sum(map(len, pieces))
            values = values.flatten().to(kept) if values.dtype != kept else values.flatten()
            pieces.append(torch.cat((values, pieces[0][:1].expand(-len(values) % 64))))
            return at

        for slot, each in enumerate(ranks):
            for piece, rank in enumerate(each):
                a = torch.randn(rank, width, generator=generator)
                b = torch.randn(rank, outputs[piece], generator=generator)
                if coded:
                    a, b = (a * 40).round().clamp(-127, 127), (b * 40).round().clamp(-127, 127)
                    units = torch.rand(rank, generator=generator) * 1e-3
                    offsets[slot, 1 + piece, 2] = put(units.view(torch.int8)) // 4
                    self.a[slot, piece] = a * units[:, None]
                else:
                    self.a[slot, piece] = a
                self.b[slot, piece] = b
                offsets[slot, 1 + piece, 0], offsets[slot, 1 + piece, 1] = put(a), put(b)
                table[slot, 1 + piece] = rank
                scales[slot, 1 + piece] = 0.5 * (slot + 1)
        self.scales = scales
        put(pieces[0])
        values = torch.cat(pieces).to(DEVICE)
        self.pool = lora.DeviceAdapters(values, offsets.to(DEVICE), table.to(DEVICE), scales.to(DEVICE), FLOAT)

    def update(self, x: torch.Tensor, piece: int, mix: dict[int, float]) -> torch.Tensor:
        total = torch.zeros(1)
        for slot, weight in mix.items():
            scale = float(self.scales[slot, 1 + piece])
            total = total + (x @ self.a[slot, piece].t()) @ self.b[slot, piece] * weight * scale
        return total


def lanes_of(
    ranks: list[int],
    mixes: list[dict[int, float]],
    owner: list[int],
    tiles: list[tuple[int, int, list[int]]],
    width: int,
) -> lora.Lanes:
    """Tiles of (first row, rows, slots), and an unused tile at the end."""
    table, pairs = [], []
    for row, count, slots in tiles:
        mine = [(slot, r) for slot in slots for r in range(ranks[slot])]
        table.append([row, count, len(pairs), len(mine)])
        pairs += mine
    slot, index = (torch.tensor([p[i] for p in pairs], dtype=torch.int32, device=DEVICE) for i in (0, 1))
    return lora.Lanes(
        tiles=torch.tensor([*table, [0, 0, 0, 0]], dtype=torch.int32, device=DEVICE),
        slot=slot,
        index=index,
        adapter=slot,
        sequence=torch.tensor(owner, dtype=torch.int32, device=DEVICE),
        weights=torch.tensor([[mix.get(place, 0.0) for place in range(3)] for mix in mixes], device=DEVICE),
        width=width,
        tile_rows=max(count for _, count, _ in tiles) if len(tiles) == len(owner) else 16,
    )


TOGETHER = [(0, 3, [0, 1, 2]), (3, 5, [1, 2])]
EACH = [(0, 1, [0]), (1, 1, []), (2, 1, [1, 2]), *((row, 1, [2]) for row in range(3, 8))]


@pytest.mark.parametrize("coded", [True, False], ids=["codes", "values"])
@pytest.mark.parametrize(("tiles", "width", "most"), [(TOGETHER, 80, 56), (EACH, 32, 20)], ids=["together", "each"])
def test_lora_updates(tiles: list[tuple[int, int, list[int]]], width: int, most: int, coded: bool) -> None:
    """Rows without an adapter, with one and with a mix; decoded rows that share lanes, a prefill with its own lanes,
    and tiles of one row."""
    inputs, outputs = 600, (80, 48, 16)
    adapters = Adapters(inputs, outputs, [[3, 3, 0], [8, 8, 8], [most, 0, most]], coded)
    mixes: list[dict[int, float]] = [{0: 1.0}, {}, {1: -2.0, 2: 0.5}, {2: 1.0}]
    owner = [0, 1, 2, 3, 3, 3, 3, 3]
    lanes = lanes_of([3, 8, most], mixes, owner, tiles, width)
    x = torch.randn(8, inputs, generator=torch.Generator().manual_seed(3))
    x = x.to(FLOAT).float()
    for splits in (1, 2):
        shrunk = poisoned(splits, 3, 8, width)
        lora.shrink(x.to(DEVICE, FLOAT), adapters.pool, lanes, 1, 3, shrunk)
        sums = torch.randn(2, 8, sum(outputs), device=DEVICE)
        bias = torch.randn(sum(outputs), device=DEVICE)
        out = poisoned(8, sum(outputs))
        epilogue.finish(sums, bias, out, outputs, lanes, adapters.pool, 1, shrunk)
        exact = (sums.sum(0) + bias).cpu()
        for row, sequence in enumerate(owner):
            start = 0
            for piece, n in enumerate(outputs):
                exact[row, start : start + n] += adapters.update(x[row], piece, mixes[sequence])
                start += n
        assert error(out, exact) < LOOSE
        added = out.clone()
        epilogue.finish(sums, bias, added, outputs, lanes, adapters.pool, 1, shrunk, add=True)
        assert error(added, 2 * exact) < LOOSE
    # gate and up: two slices of equal width
    pair = Adapters(inputs, (96, 96), [[3, 3], [8, 8], [most, 5]], coded)
    shrunk = poisoned(1, 2, 8, width)
    lora.shrink(x.to(DEVICE, FLOAT), pair.pool, lanes, 1, 2, shrunk)
    sums = torch.randn(1, 8, 192, device=DEVICE)
    hidden, hidden_sums = poisoned(8, 96, dtype=FLOAT), poisoned(8, 3)
    epilogue.finish_swiglu(sums, None, hidden, hidden_sums, 32, lanes, pair.pool, 1, shrunk)
    parts = sums[0].cpu().clone()
    for row, sequence in enumerate(owner):
        parts[row, :96] += pair.update(x[row], 0, mixes[sequence])
        parts[row, 96:] += pair.update(x[row], 1, mixes[sequence])
    assert error(hidden, reference.swiglu(parts[:, :96], parts[:, 96:])) < LOOSE
    assert error(hidden_sums, hidden.float().cpu().view(8, 3, 32).sum(2)) < 1e-5


@pytest.mark.parametrize("tile_rows", [16, 64])
def test_the_epilogue_adds_every_split(tile_rows: int) -> None:
    """Small tiles load several splits at a time, large ones one by one."""
    nothing = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    tiles = torch.tensor([[0, 5, 0, 0]], dtype=torch.int32, device=DEVICE)
    lanes = lora.Lanes(tiles, nothing, nothing, nothing, nothing, nothing, 0, tile_rows)
    pool = Adapters(16, (48,), [[1]]).pool
    for splits in range(1, 9):
        sums, out = torch.randn(splits, 5, 48, device=DEVICE), poisoned(5, 48)
        epilogue.finish(sums, None, out, (48,), lanes, pool, 0, None)
        assert error(out, sums.sum(0).cpu()) < 1e-6


NORESERVE = 0x4000
"""MAP_NORESERVE of Linux, which Python 3.11 does not name."""


def untouched(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Zeros that take memory only where they are touched."""
    if DEVICE.type == "cuda":
        return torch.zeros(shape, dtype=dtype, device=DEVICE)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=flags), dtype=dtype).view(shape)


def test_offsets_beyond_32_bits() -> None:
    """In a long step, for inputs, outputs and lanes."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip("of which 48 GB are touched on a GPU")
    count, inputs, outputs, width, rank = (1 << 27) + 2, 16, 16, 16, 3
    adapters = Adapters(inputs, (outputs,), [[rank]])
    generator = torch.Generator().manual_seed(1)
    x, sums = torch.randn(2, inputs, generator=generator), torch.randn(1, 2, 2 * outputs, generator=generator)
    found = []
    for among in (2, count):  # two rows by themselves, and as the last of very many
        lanes = lora.Lanes(
            tiles=torch.tensor([[among - 2, 2, 0, rank]], dtype=torch.int32, device=DEVICE),
            slot=torch.zeros(rank, dtype=torch.int32, device=DEVICE),
            index=torch.arange(rank, dtype=torch.int32, device=DEVICE),
            adapter=torch.zeros(rank, dtype=torch.int32, device=DEVICE),
            sequence=untouched(among, dtype=torch.int32),
            weights=torch.ones(1, 1, device=DEVICE),
            width=width,
            tile_rows=16,
        )
        given, shrunk = untouched(among, inputs, dtype=FLOAT), untouched(1, 1, among, width)
        given[-2:] = x
        lora.shrink(given, adapters.pool, lanes, 1, 1, shrunk)
        product, out = untouched(1, among, outputs), untouched(among, outputs, dtype=torch.float16)
        product[:, -2:] = sums[:, :, :outputs]
        epilogue.finish(product, None, out, (outputs,), lanes, adapters.pool, 1, shrunk)
        product, hidden = untouched(1, among, 2 * outputs), untouched(among, outputs, dtype=torch.float16)
        product[:, -2:] = sums
        epilogue.finish_swiglu(product, None, hidden, product, 0, lanes, adapters.pool, 1, None)
        found.append((shrunk[0, 0, -2:, :rank].cpu(), out[-2:].cpu(), hidden[-2:].cpu()))
        del given, shrunk, product, out, hidden
    for alone, last in zip(*found, strict=True):
        assert alone.count_nonzero() and torch.equal(alone, last)


def test_offsets_beyond_32_bits_in_kernels_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """For kernels with one program per row. In the interpreter only the last two programs are launched."""
    if DEVICE.type == "cuda" and torch.cuda.mem_get_info()[0] < 44 << 30:
        pytest.skip("of which 41 GB are touched on a GPU")
    count, width, d = (1 << 27) + 2, 32, 16
    generator = torch.Generator().manual_seed(1)
    table, norm = on_device(stored_matrix(50, width, "int8", 32, False)), torch.rand(width, generator=generator)
    made, held = torch.randn(2, 3 * d, generator=generator), torch.randn(1, 3, 1, 2, BLOCK, d, generator=generator)
    angle = torch.rand(3, d // 2, generator=generator).to(DEVICE)
    blocks = torch.arange(3, dtype=torch.int32, device=DEVICE)[:, None]
    context = torch.tensor([0, 3, 3], dtype=torch.int32, device=DEVICE)
    found = []
    for among in (2, count):  # two rows by themselves, and as the last of very many
        launched = among if DEVICE.type == "cuda" else 2
        ids, positions, sequence = (untouched(among, dtype=torch.int32) for _ in range(3))
        ids[-2:], sequence[-2:] = (torch.tensor(pair, dtype=torch.int32, device=DEVICE) for pair in ((7, 3), (1, 2)))
        positions[-2:] = 2
        stream, normed = untouched(among, width), untouched(among, width, dtype=FLOAT)
        sums, again = untouched(among, 1), untouched(among, 1)
        qkv, cache = untouched(among, 3 * d, dtype=FLOAT), held.to(DEVICE, FLOAT, copy=True)
        qkv[-2:] = made
        with monkeypatch.context() as patched:
            if launched < among:
                from triton.runtime.interpreter import InterpreterBuilder

                def set_grid_idx(self: Any, x: int, y: int, z: int, first: int = among - 2) -> None:
                    self.grid_idx = (first + x, y, z)

                patched.setattr(InterpreterBuilder, "set_grid_idx", set_grid_idx)
            rowwise.embed(table, ids[:launched], stream[:launched])
            rowwise.rms_norm(stream[:launched], norm.to(DEVICE), 1e-5, normed[:launched], sums[:launched], width)
            matmul.group_sums(normed[:launched], width, again[:launched])
            turned = qkv[:launched], None, (angle.cos(), angle.sin()), positions[:launched], sequence[:launched]
            rowwise.rotate(*turned, blocks, cache, 0, 1e-5)
        found.append([t[-2:].cpu() for t in (stream, normed, sums, again, qkv)] + [cache[:, 1:].cpu()])
        del stream, normed
        out, prompts = untouched(among, d, dtype=FLOAT), untouched(among, d, dtype=FLOAT)
        last = torch.tensor([among - 2, among - 1], dtype=torch.int32, device=DEVICE)
        scratch = poisoned(2, 1, attention.SPLITS, d), poisoned(2, 1, attention.SPLITS)
        attention.decode(qkv, cache, 0, blocks, context, last, sequence[-2:], scratch, out, sums, d)
        tiles = [[1, among - 2, 1, 2], [2, among - 1, 1, 2]]
        attention.prefill(qkv, cache, 0, blocks, torch.tensor(tiles, dtype=torch.int32, device=DEVICE), prompts)
        found[-1] += [t[-2:].cpu() for t in (out, sums, prompts)]
        del qkv, out, prompts
    for alone, end in zip(*found, strict=True):
        assert alone.count_nonzero() and torch.equal(alone, end)


def test_number_of_splits_of_shrink() -> None:
    assert [lora.shrink_splits(1, 16, inputs) for inputs in (64, 512, 576, 3584, 18944)] == [1, 1, 2, 7, 16]
    assert [lora.shrink_splits(16, width, 3584) for width in (16, 64, 1024)] == [8, 8, 1]


@pytest.mark.filterwarnings("ignore:.*(overflow|invalid value):RuntimeWarning")  # of numpy, in the interpreter
def test_an_overflowing_adapter_does_not_change_other_rows() -> None:
    """An overflow in a neighbour's adapter does not change this row's bits."""
    adapters = Adapters(32, (16,), [[1], [1]])
    tiles = torch.tensor([[0, 2, 0, 2]], dtype=torch.int32, device=DEVICE)
    slot = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    index = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    weights = torch.eye(2, device=DEVICE)
    lanes = lora.Lanes(tiles, slot, index, slot, slot, weights, 16, 16)
    x = torch.randn(2, 32, device=DEVICE).to(FLOAT)
    results = []
    for factor in (1.0, 1e30):
        at = int(adapters.pool.offsets[1, 1, 0])
        adapters.pool.values[at : at + 32] *= factor
        shrunk, out = poisoned(1, 1, 2, 16), poisoned(2, 16)
        lora.shrink(x, adapters.pool, lanes, 1, 1, shrunk)
        epilogue.finish(torch.zeros(1, 2, 16, device=DEVICE), None, out, (16,), lanes, adapters.pool, 1, shrunk)
        results.append(out)
    assert torch.equal(results[0][0], results[1][0])


def test_rms_norm_and_embedding() -> None:
    x, weight = torch.randn(3, 96), torch.randn(96)
    out, sums = poisoned(3, 96, dtype=FLOAT), poisoned(3, 3)
    rowwise.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5, out, sums, 32)
    assert error(out, reference.rms_norm(x, weight, 1e-5)) < LOOSE
    assert error(sums, out.float().cpu().view(3, 3, 32).sum(2)) < 1e-5
    stored = stored_matrix(50, 96, "int8", 32, False)
    for table in (on_device(stored), on_device(quantize(torch.randn(50, 96), "none"))):
        ids = torch.tensor([7, 0, 49, -1], dtype=torch.int32, device=DEVICE)
        found = poisoned(4, 96)
        rowwise.embed(table, ids, found)
        if table.dense:
            assert torch.equal(found[:3].cpu(), table.dense_values[[7, 0, 49]].float().cpu())
        else:
            assert torch.equal(found[:3].cpu(), reference.stored_rows(stored, ids[:3].long().cpu()))
            assert (found[3] == 0).all()


@pytest.mark.parametrize("head_dim", [32, 24, 256])
def test_attention_over_paged_kv(head_dim: int) -> None:
    """Queries are rotated, keys and values written; prefills and decodes over contexts of different lengths."""
    heads, kv_heads, size = 6, 2, 16
    contexts, new = [1, 40, 130, 30], [1, 1, 1, 12]
    generator = torch.Generator().manual_seed(5)
    count = sum(new)
    owner = [s for s, n in enumerate(new) for _ in range(n)]
    place = [contexts[s] - n + i for s, n in enumerate(new) for i in range(n)]
    blocks = torch.tensor(
        [[4 * s + s + b if b < -(-c // size) else -1 for b in range(9)] for s, c in enumerate(contexts)]
    )
    blocks[2, :9] = torch.arange(20, 29)
    cache = torch.randn(2, 32, kv_heads, 2, size, head_dim, generator=generator).to(FLOAT).float()
    qkv = torch.randn(count + 1, (heads + 2 * kv_heads) * head_dim, generator=generator).to(FLOAT).float()
    angle = torch.rand(140, head_dim // 2, generator=generator) * 6
    norms = (torch.rand(head_dim) + 0.5, torch.rand(head_dim) + 0.5)
    q, k, v = qkv[:count].view(count, -1, head_dim).split([heads, kv_heads, kv_heads], 1)
    at = torch.tensor(place)
    q = reference.rope(reference.rms_norm(q, norms[0], 1e-5), angle[at].cos(), angle[at].sin())
    k = reference.rope(reference.rms_norm(k, norms[1], 1e-5), angle[at].cos(), angle[at].sin())

    held, work = cache.to(DEVICE, FLOAT), qkv.to(DEVICE, FLOAT)
    positions = torch.tensor([*place, -1], dtype=torch.int32, device=DEVICE)
    sequence = torch.tensor([*owner, 0], dtype=torch.int32, device=DEVICE)
    table = blocks.int().to(DEVICE)
    rowwise.rotate(
        work, tuple(n.to(DEVICE) for n in norms), (angle.cos().to(DEVICE), angle.sin().to(DEVICE)),
        positions, sequence, table, held, 1, 1e-5,
    )  # fmt: skip
    assert error(work[:count, : heads * head_dim], q.flatten(1)) < LOOSE
    assert torch.equal(work[count].cpu(), qkv[count].to(FLOAT)), "a row that is not there stays as it is"
    layer = cache[1].permute(0, 3, 2, 1, 4)  # [blocks, size, 2, kv_heads, d]
    keys, values = layer[:, :, 0].clone(), layer[:, :, 1].clone()
    for row, (s, p) in enumerate(zip(owner, place, strict=True)):
        block = int(blocks[s, p // size])
        keys[block, p % size], values[block, p % size] = k[row], v[row]
    assert error(held[1].permute(0, 3, 2, 1, 4)[:, :, 0], keys) < LOOSE
    assert torch.equal(held[0].float().cpu(), cache[0])

    out = poisoned(count, heads * head_dim, dtype=FLOAT)
    singles = torch.tensor([0, 1, 2], dtype=torch.int32, device=DEVICE)
    context = torch.tensor(contexts, dtype=torch.int32, device=DEVICE)
    scratch = poisoned(3, heads, attention.SPLITS, head_dim), poisoned(3, heads, attention.SPLITS)
    sums = poisoned(3, heads * head_dim // 8)
    attention.decode(work, held, 1, table, context, singles, singles, scratch, out, sums, 8)
    assert error(sums, out[:3].float().cpu().view(3, -1, 8).sum(2)) < 1e-5
    tiles = torch.tensor([[3, 3, 7, 18], [3, 10, 5, 25]], dtype=torch.int32, device=DEVICE)
    attention.prefill(work, held, 1, table, tiles, out)
    start = 0
    for s, n in enumerate(new):
        exact = reference.attention(q[start : start + n], keys, values, blocks[s], contexts[s]).flatten(1)
        assert error(out[start : start + n], exact) < LOOSE, s
        start += n


def test_decode_attention_does_not_depend_on_the_batch() -> None:
    heads, kv_heads, size, d = 4, 2, 16, 16
    cache = torch.randn(1, 20, kv_heads, 2, size, d, device=DEVICE).to(FLOAT)
    qkv = torch.randn(3, (heads + 2 * kv_heads) * d, device=DEVICE).to(FLOAT)
    table = torch.arange(12, dtype=torch.int32, device=DEVICE)[None].repeat(3, 1)
    context = torch.tensor([90, 170, 3], dtype=torch.int32, device=DEVICE)
    together = poisoned(3, heads * d, dtype=FLOAT)
    everyone = torch.arange(3, dtype=torch.int32, device=DEVICE)
    scratch = poisoned(3, heads, attention.SPLITS, d), poisoned(3, heads, attention.SPLITS)
    attention.decode(qkv, cache, 0, table, context, everyone, everyone, scratch, together, together, 0)
    for i in range(3):
        alone, mine = poisoned(3, heads * d, dtype=FLOAT), everyone[i : i + 1]
        attention.decode(qkv, cache, 0, table, context, mine, mine, scratch, alone, alone, 0)
        assert torch.equal(alone[i], together[i])


@pytest.mark.parametrize(("outputs", "kind"), [(200, ("int8", 32, False)), (208, ("nf4", 64, True))])
def test_linear_dequantizes_one_block_at_a_time(
    outputs: int, kind: tuple[str, int, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last block is incomplete."""
    weight = packing.concatenate([packing.pack(stored_matrix(outputs, 128, *kind))], DEVICE)
    exact = packing.dequantize(weight)
    made = []

    def noted(part: Weight, dtype: torch.dtype) -> torch.Tensor:
        made.append(part.shape[0])
        return dequantized(part, dtype)

    dequantized = matmul.dequantized
    monkeypatch.setattr(matmul, "dequantized", noted)
    monkeypatch.setattr(cuda, "_is_on_gpu", lambda weight: True)
    monkeypatch.setattr(cuda, "BLOCK_BYTES", 4 * 128 * 70)
    x = torch.randn(3, 128, device=DEVICE)
    assert torch.allclose(cuda.Cuda().linear(weight, x), x @ exact.t(), rtol=1e-4, atol=1e-3)
    assert made == [64, 64, 64, outputs - 192]


def choices(logits: torch.Tensor, how: list[list[float]], top_k: list[int]) -> list[int]:
    out = torch.zeros(len(how), dtype=torch.int32, device=DEVICE)
    sampling.sample(
        logits.to(DEVICE), torch.tensor(how, device=DEVICE), torch.tensor(top_k, dtype=torch.int32, device=DEVICE), out
    )
    return out.tolist()


@pytest.mark.usefixtures("watched")
def test_sampling_respects_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy, and samples with noise over the whole distribution."""
    monkeypatch.setattr(sampling, "PIECE", 64)
    generator = np.random.default_rng(0)
    row = torch.from_numpy(generator.normal(size=90).astype(np.float32) * 2)
    noise = (np.arange(4) / 4 + 0.11).tolist()
    for temperature, top_p, min_p, top_k in (
        (0.7, 1.0, 0.0, 0),
        (1.0, 1.0, 0.0, 9),
        (1.3, 0.6, 0.0, 0),
        (0.9, 0.8, 0.1, 20),
    ):
        weights = torch.softmax(row.double() / temperature, 0)
        kept = torch.ones(90, dtype=torch.bool)
        order = weights.argsort(descending=True)
        if top_k:
            kept[order[top_k:]] = False
        masses = torch.where(kept, weights, 0.0)[order].cumsum(0)
        kept[order[int(torch.searchsorted(masses, top_p * masses[-1])) + 1 :]] = False
        kept &= weights >= min_p * weights.max()
        sums = torch.where(kept, weights, 0.0).cumsum(0)
        exact = [int(torch.searchsorted(sums, u * sums[-1], right=True)) for u in noise]
        how = [[temperature, top_p, min_p, u] for u in noise]
        assert choices(row.repeat(4, 1), how, [top_k] * 4) == exact


def test_greedy_rows_and_rows_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PIECE", 64)
    logits = torch.randn(5, 150)
    logits[0, 100] = logits[0, 20] = 50.0
    logits[1, 149] = 60.0
    logits[2, 70], logits[3, 3], logits[4, 140] = math.nan, math.inf, -math.inf
    greedy = [0.0, 1.0, 0.0, 0.0]
    assert choices(logits, [greedy, greedy, greedy, greedy, [1.0, 1.0, 0.0, 0.5]], [0] * 5) == [20, 149, -1, -1, -1]
