"""Torch's ops compared with the reference."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from adapters.weights import LoraWeights, LowRank
from server.kernels import lora, torch_ops
from server.kernels.lora import SHARED_ROWS, ConcatenatedAdapters, Segment, Segments, SlotTable, SlotWeights
from server.kernels.packed_format import dequantize_stored
from server.kernels.reference import Reference
from server.kernels.torch_ops import INT4PACK, PACKED_ROWS, SCALAR_ROWS, TorchOps
from server.kernels.weight import STORED, Weight
from server.model.quantization import quantize

BF16 = 2.0**-8


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(12)


@pytest.fixture(params=["as here", "AVX2", "neither"])
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a processor without bf16 instructions in oneDNN."""
    if request.param == "as here":
        return
    few = SCALAR_ROWS if request.param == "neither" else PACKED_ROWS
    monkeypatch.setattr(torch_ops, "_capability", lambda: "DEFAULT" if request.param == "neither" else "AVX2")
    packed_product = torch.ops.aten._weight_int4pack_mm_for_cpu

    def of_few_rows(x: torch.Tensor, *more: Any) -> torch.Tensor:
        assert len(x) <= few, "a product that blocks do sooner"
        return packed_product(x, *more)

    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", of_few_rows)
    monkeypatch.setattr(lora, "has_bf16_products", lambda: False)

    def checked(product: Any) -> Any:
        def call(x: torch.Tensor, *more: Any, **named: Any) -> torch.Tensor:
            assert x.dtype != torch.bfloat16, "a product in bf16"
            return product(x, *more, **named)

        return call

    monkeypatch.setattr(torch_ops, "_rows_times", checked(torch_ops._rows_times))
    monkeypatch.setattr(torch, "mm", checked(torch.mm))
    monkeypatch.setattr(torch.nn.functional, "linear", checked(torch.nn.functional.linear))


def rounded(stored: Weight) -> torch.Tensor:
    """The meaning of torch's 4-bit product: codes around 8, scale and offset in bf16."""
    exact = dequantize_stored(stored)
    grouped = exact.view(stored.shape[0], -1, stored.group)
    plain = {k: t for k, t in stored.tensors.items() if k != "codes"}
    zeroes = Weight(
        "int4", STORED, stored.shape, stored.group, plain | {"codes": torch.zeros_like(stored.tensors["codes"])}
    )
    ones = Weight(
        "int4", STORED, stored.shape, stored.group, plain | {"codes": torch.full_like(stored.tensors["codes"], 0x11)}
    )
    zero = dequantize_stored(zeroes).view_as(grouped)[..., :1]
    scale = dequantize_stored(ones).view_as(grouped)[..., :1] - zero
    codes = ((grouped - zero) / scale).round()
    return ((codes - 8) * scale.bfloat16().float() + (zero + 8 * scale).bfloat16().float()).view_as(exact)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("rows", "group"), [(64, 32), (192, 64), (80, 64), (112, 128), (16, 32)])
def test_int4_is_exact_up_to_the_rounding_of_scales(rows: int, group: int, double_quant: bool) -> None:
    backend = TorchOps()
    stored = quantize(torch.randn(rows, 256) * 0.05, "int4", group, double_quant)
    packed = backend.pack(stored)
    assert packed.layout == INT4PACK
    dense = backend.dequantize(packed)
    torch.testing.assert_close(dense, rounded(stored), atol=1e-6, rtol=0)
    for start, stop in [(0, rows), (1, 3), (rows - 5, rows), (rows // 2, rows // 2 + 7)]:
        assert torch.equal(backend.dequantize(packed, start, stop), dense[start:stop])
    error = (dense - dequantize_stored(stored)).norm() / dequantize_stored(stored).norm()
    assert error < BF16


@pytest.mark.parametrize(("rows", "columns", "group"), [(40, 128, 64), (64, 48, 16)])
def test_shapes_that_torch_does_not_support_stay_stored(rows: int, columns: int, group: int) -> None:
    stored = quantize(torch.randn(rows, columns), "int4", group)
    packed = TorchOps().pack(stored)
    assert packed is stored
    x = torch.randn(3, columns).bfloat16()
    torch.testing.assert_close(
        TorchOps().linear(packed, x).float(), x.float() @ dequantize_stored(stored).t(), atol=0.1, rtol=0.02
    )


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [1, SCALAR_ROWS, SCALAR_ROWS + 1, PACKED_ROWS, PACKED_ROWS + 1])
@pytest.mark.parametrize(
    ("scheme", "double_quant"), [("int4", False), ("int4", True), ("nf4", True), ("int8", False), ("none", False)]
)
def test_products_equal_those_of_dequantized_weights(
    scheme: str, double_quant: bool, count: int, dtype: torch.dtype
) -> None:
    backend = TorchOps()
    matrix = torch.randn(208, 256) * 0.05
    packed = backend.pack(quantize(matrix if scheme != "none" else matrix.bfloat16(), scheme, 64, double_quant))
    x = torch.randn(count, 256).to(dtype)
    y = backend.linear(packed, x)
    assert y.dtype == dtype
    expected = x.double() @ backend.dequantize(packed).double().t()
    error = (y.double() - expected).norm() / expected.norm()
    assert error < (1e-6 if dtype == torch.float32 else BF16)


def test_the_block_size_does_not_change_products(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = TorchOps().pack(quantize(torch.randn(336, 64), "int4", 32))
    x = torch.randn(PACKED_ROWS + 8, 64).bfloat16()
    whole = TorchOps().linear(packed, x)
    monkeypatch.setattr(torch_ops, "BLOCK_BYTES", 1)
    torch.testing.assert_close(TorchOps().linear(packed, x), whole, atol=0, rtol=2 * BF16)


@pytest.mark.parametrize("count", [1, 3])
def test_results_do_not_share_work_buffers(count: int) -> None:
    table, backend = quantize(torch.randn(96, 64), "int8", 32), TorchOps()
    first = backend.linear(table, torch.ones(count, 64))
    kept = first.clone()
    backend.linear(table, torch.zeros(count, 64))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("scheme", ["int4", "int8", "none"])
def test_embedding(scheme: str) -> None:
    packed = TorchOps().pack(quantize(torch.randn(96, 64), scheme, 32))
    ids = torch.tensor([95, 3, 3, 64])
    assert torch.equal(TorchOps().embed(packed, ids), TorchOps().dequantize(packed)[ids])


def adapters(backend: TorchOps | Reference, count: int) -> list[LoraWeights]:
    """Adapters of ranks 1 to 24; the last lacks two modules."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for i in range(count):
        rank = (1, 3, 8, 24, 8)[i % 5]
        modules = {
            path: LowRank(
                torch.randn(rank, 64, generator=generator) * 0.1, torch.randn(32, rank, generator=generator), 0.5 + i
            )
            for path in ("m", "n", "layer.q_proj", "layer.k_proj")
        }
        if i == count - 1:
            del modules["m"], modules["layer.q_proj"]
        made.append(backend.prepare(LoraWeights(f"a{i}", f"{i:064x}", modules), "int4"))
    return made


@pytest.mark.usefixtures("processor")
@pytest.mark.parametrize("seed", range(6))
def test_batched_lora_equals_a_loop_over_adapters(seed: int) -> None:
    draw = random.Random(seed)
    plain, ours = SlotTable(8), SlotTable(8)
    for slot, (a, b) in enumerate(zip(adapters(Reference(), 7), adapters(TorchOps(), 7), strict=True)):
        plain.load_adapter(slot, a)
        ours.load_adapter(slot, b)
    weights = [-1.0, 0.25, 1.0, 2.0] if seed % 2 else [-1.0, 0.3, 0.7]  # exact in bf16, or not
    segments, start = [], 0
    for _ in range(12):
        rows = draw.choice([1, 1, 1, 2, SHARED_ROWS, SHARED_ROWS + 1, 40])
        mix: SlotWeights = tuple(
            (slot, draw.choice(weights)) for slot in draw.sample(range(7), draw.choice([0, 1, 1, 2, 4]))
        )
        segments.append(Segment(start, start + rows, mix))
        start += rows
    x = torch.randn(start, 64).bfloat16()
    for path in ("m", "layer.q_proj", "layer.k_proj", "layer.v_proj", "n", "absent"):
        expected, y = torch.zeros(start, 32), torch.zeros(start, 32, dtype=torch.bfloat16)
        Reference().add_lora(expected, x.float(), path, Segments(plain, segments))
        TorchOps().add_lora(y, x, path, Segments(ours, segments))
        for segment in segments:
            if not segment.mix:
                assert not y[segment.start : segment.stop].any()
        assert (y.float() - expected).norm() <= 2 * BF16 * expected.norm()


def test_an_overflowing_adapter_does_not_change_other_rows() -> None:
    table = SlotTable(3)
    for slot, adapter in enumerate(adapters(TorchOps(), 3)):
        table.load_adapter(slot, adapter)
    huge = {"m": LowRank(torch.full((2, 64), 3e38), torch.full((32, 2), 3e38), 16.0)}
    table.load_adapter(2, TorchOps().prepare(LoraWeights("huge", "f" * 64, huge), "int4"))
    x, y = torch.randn(4, 64).abs().bfloat16(), torch.zeros(4, 32, dtype=torch.bfloat16)
    rows: list[SlotWeights] = [((0, 1.0),), ((2, 1.0),), (), ((0, 1.0), (1, 1.0))]
    TorchOps().add_lora(y, x, "m", Segments(table, [Segment(i, i + 1, mix) for i, mix in enumerate(rows)]))
    assert not torch.isfinite(y[1]).any()
    assert torch.isfinite(y[[0, 2, 3]]).all()


def test_the_concatenated_copy_is_rebuilt_only_when_needed() -> None:
    table = SlotTable(4)
    made = adapters(TorchOps(), 5)
    for slot in range(4):
        table.load_adapter(slot, made[slot])
    both: ConcatenatedAdapters = table.concatenated([2, 3])
    assert table.concatenated([3]) is both  # a subset that is not much smaller
    assert table.concatenated([0]) is not both  # another adapter
    three = table.concatenated([2, 3, 0])
    assert table.concatenated([0]) is not three  # a much smaller subset
    held = table.concatenated([1, 2])
    table.unload_adapter(0)
    assert table.concatenated([1, 2]) is held
    table.unload_adapter(2)
    assert table.nbytes == 0
    table.load_adapter(2, made[4])
    assert made[4].digest in table.concatenated([1, 2]).index


def test_the_layout_name_depends_on_torch_and_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a base packed by another machine or torch version is packed again."""
    names = [TorchOps().layout]
    others = (
        (torch_ops.platform, "machine", "riscv64"),
        (torch_ops, "_capability", "SVE256"),
        (torch_ops, "_tile_rows", 8),
    )
    for where, what, other in others:
        monkeypatch.setattr(where, what, lambda other=other: other)
        names.append(TorchOps().layout)
    monkeypatch.setattr(torch, "__version__", "9.9.1+cpu")
    names.append(TorchOps().layout)
    assert len(set(names)) == 5 and names[-1] == f"{INT4PACK}-sve256-8-riscv64-torch9.9"
    monkeypatch.setattr(torch, "__version__", "9.9.2")
    assert TorchOps().layout == names[-1]
