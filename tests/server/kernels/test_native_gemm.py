"""Packing and GEMM of the native kernels, compared with the stored weights, float64 products and each other's bits."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import CDLL

import pytest
import torch

from server.kernels import cpu
from server.kernels.cpu import bindings, packing
from server.kernels.packed_format import dequantize_stored, group_values, unpack_nibbles
from server.kernels.weight import Weight
from server.model.quantization import quantize
from tests.server.kernels.conftest import runs, same_bits

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native kernels: {cpu.unavailable()}")
needs_amx = pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no AMX")

Matrix = tuple[str, int, bool, int, int]
MATRICES: list[Matrix] = [  # scheme, group, double-quantized, out, in: partial tiles and half spans among them
    ("int4", 32, False, 130, 1536),
    ("int4", 32, False, 49, 96),
    ("int4", 64, False, 49, 384),
    ("int4", 96, False, 7, 192),
    ("int4", 128, False, 48, 384),
    ("int4", 64, True, 48, 576),
    ("int4", 32, True, 49, 160),
    ("nf4", 64, False, 7, 192),
    ("nf4", 32, False, 49, 160),
    ("nf4", 64, True, 130, 576),
    ("int8", 32, False, 49, 96),
    ("int8", 64, True, 130, 1536),
    ("none", 0, False, 49, 384),
]
KINDS = [("int4", 32, False), ("int4", 64, True), ("nf4", 64, False), ("int8", 64, True), ("none", 0, False)]


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_pools", [bindings.ThreadPool(2)])
        yield


def stored(scheme: str, group: int, double: bool, out: int, width: int) -> Weight:
    torch.manual_seed(out * width + group)
    values = torch.randn(out, width) * 0.05 + 0.01
    return quantize(values.bfloat16() if scheme == "none" else values, scheme, group or 64, double)


def exact_product(x: torch.Tensor, weight: Weight) -> torch.Tensor:
    return x.double() @ dequantize_stored(weight).double().t()


def linear(packed: Weight, x: torch.Tensor) -> torch.Tensor:
    return cpu.Native().linear(packed, x)


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_packing_keeps_the_stored_values(matrix: Matrix) -> None:
    weight, native, out = stored(*matrix), cpu.Native(), matrix[3]
    packed, expected = native.pack(weight), dequantize_stored(weight)
    assert torch.equal(native.dequantize(packed), expected)
    assert torch.equal(native.dequantize(packed, 3, out - 2), expected[3 : out - 2])
    assert torch.equal(native.dequantize(packed, 5, 5), expected[5:5])
    ids = torch.tensor([0, out - 1, out // 2, out // 2, 5])
    assert torch.equal(native.embed(packed, ids), expected[ids])
    assert ("inverse_scale" in packed.tensors) == (matrix[0] != "none")


@pytest.mark.parametrize("row", [-1, 49])
def test_embedding_refuses_an_id_outside_the_table(row: int) -> None:
    with pytest.raises(IndexError):
        cpu.Native().embed(cpu.Native().pack(stored("int8", 32, False, 49, 384)), torch.tensor([row]))


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_products_are_accurate_and_rows_do_not_depend_on_their_batch(library: str, matrix: Matrix) -> None:
    """Also with tiles of four rows and of eight, bit for bit."""
    scheme, _, _, _, width = matrix
    weight = stored(*matrix)
    packed, x = cpu.Native().pack(weight), torch.randn(300, width)
    y, exact = linear(packed, x), exact_product(x, weight)
    error = (y.double() - exact).norm() / exact.norm()
    if library == "_native_amx" and scheme != "none":  # 16-bit activations
        assert error < (6.5e-3 if scheme == "nf4" else 4e-4)
    else:  # int8 activations; nf4 levels are rounded too
        assert error < (1e-2 if scheme == "nf4" else 6.5e-3)
    usual = bindings.library().loramux_eight_row_tiles(False)
    try:
        for eight_rows in (False, True):
            bindings.library().loramux_eight_row_tiles(eight_rows)
            for rows in (slice(0, 1), slice(5, 7), slice(11, 14), slice(20, 32), slice(298, 300), slice(40, 57)):
                assert torch.equal(linear(packed, x[rows]), y[rows]), (eight_rows, rows)
    finally:
        bindings.library().loramux_eight_row_tiles(usual)


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
def test_avx2_and_avx512_give_the_same_bits(
    both_sizes: tuple[CDLL, CDLL], matrix: Matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = matrix[4]
    packed = cpu.Native().pack(stored(*matrix))
    x = torch.randn(17, width) * torch.logspace(-2, 1, width)
    x[3] = 0
    results = []
    for library in both_sizes:
        monkeypatch.setattr(bindings, "library", lambda library=library: library)
        monkeypatch.setattr(cpu, "_pools", [bindings.ThreadPool(2)])
        results.append([linear(packed, x[:rows]).numpy() for rows in (1, 2, 3, 8, 17)])
    assert all(same_bits(ours, theirs) for ours, theirs in zip(*results, strict=True))


@pytest.mark.parametrize("group", [32, 64, 96, 128])
def test_scales_far_below_a_rows_largest_are_exact(library: str, group: int) -> None:
    """Groups of a row differ by up to 10,000 times; some rows and groups are zero or constant."""
    torch.manual_seed(group)
    values = torch.randn(49, 384 // group, group) * 10 ** (torch.rand(49, 384 // group, 1) * 4 - 3)
    values[3], values[4, 0], values[5, 1] = 0, 0, 7.0
    values[6] *= 1e-6
    weight, native = quantize(values.flatten(1), "int4", group, False), cpu.Native()
    packed, exact = native.pack(weight), dequantize_stored(weight)
    assert len(packed.tensors["exception_at"]) > 40
    assert torch.equal(native.dequantize(packed), exact)
    assert torch.equal(native.dequantize(packed, 17, 40), exact[17:40])
    assert torch.equal(native.embed(packed, torch.arange(49)), exact)
    x = torch.randn(64, 384)
    error = (linear(packed, x) - x @ exact.t()).norm(dim=0) / (x @ exact.t()).norm(dim=0).clamp_min(1e-30)
    assert error.max() < (2.5e-2 if library == "_native_amx" else 1e-2)


@pytest.mark.parametrize(
    ("group", "double", "bits"), [(32, False, 5.06), (64, False, 4.56), (128, False, 4.31), (64, True, 4.3)]
)
def test_bits_per_weight(group: int, double: bool, bits: float) -> None:
    assert cpu.Native().pack(stored("int4", group, double, 576, 1536)).nbytes * 8 <= bits * 576 * 1536


@pytest.mark.parametrize("double", [False, True])
def test_int8_scales_bound_weights_and_group_scales(double: bool) -> None:
    """And make integers of the integer scales."""
    torch.manual_seed(0)
    size = torch.exp2(torch.randint(-12, 8, (320, 1)).float())
    values = torch.cat((torch.randn(160, 576), torch.rand(160, 576) + torch.randn(160, 1) / 2)) * size
    values[7] = 0
    weight = quantize(values, "int4", 64, double)
    packed = cpu.Native().pack(weight)
    inverse = packed.tensors["inverse_scale"].double()
    scale = inverse * group_values(weight.tensors, "scale", 0, 320).double().abs().amax(1)
    largest = inverse * dequantize_stored(weight).double().abs().amax(1)
    assert largest.max() <= 127 and scale.max() < 16
    if not double:
        integers = torch.ldexp(inverse, packed.tensors["exponents"].int() + 23)[largest > 0]
        assert torch.equal(integers, integers.round()) and 2**11 <= integers.min() <= integers.max() < 2**14


def test_rows_with_an_outlier_are_not_packed_for_amx(library: str) -> None:
    torch.manual_seed(0)
    values = torch.randn(49, 1536) * 0.05
    values[:, 7] = 2.0
    weight = quantize(values, "int4", 32, False)
    packed = cpu.Native().pack(weight)
    assert "inverse_scale" not in packed.tensors
    x = torch.randn(40, 1536)
    x[:, 7] = 0  # so that it does not hide errors of the others
    y, exact = linear(packed, x), exact_product(x, weight)
    assert (y.double() - exact).norm() < 6.5e-3 * exact.norm()
    assert torch.equal(linear(packed, x[3:6]), y[3:6])


def test_long_rows_and_negative_scales_are_not_packed_for_amx() -> None:
    pack = cpu.Native().pack
    assert "inverse_scale" in pack(stored("int4", 32, False, 1, packing.MAX_INPUTS)).tensors
    assert "inverse_scale" not in pack(stored("int4", 32, False, 1, packing.MAX_INPUTS + 32)).tensors
    weight = stored("int4", 32, False, 49, 192)
    assert "nonnegative_scales" in pack(weight).tensors
    weight.tensors["scale"][17, 2] *= -1
    assert "inverse_scale" in pack(weight).tensors and "nonnegative_scales" not in pack(weight).tensors


# -- AMX: an integer model of the arithmetic


def integer_weights(packed: Weight, weight: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 codes [out, in / 32, 32], scales and zeros [out, in / 32, 1] in 1/256 of the rows' int8 scales."""
    out, width = weight.shape
    inverse, exponents = (packed.tensors[name][:out] for name in ("inverse_scale", "exponents"))
    factor = torch.ldexp(inverse.float(), exponents.int() + 23).long()[:, None, None]
    spans = packed.tensors["span_scales"].long()
    if weight.group % packing.SPAN:
        groups = spans.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:out, : width // packing.GROUP]
        groups = groups[:, :: weight.group // packing.GROUP]
    else:
        groups = spans.permute(0, 3, 1, 2).flatten(0, 1)[:out]
    scale, shifted_zero = (groups * factor + 2**14 >> 15).unbind(-1)  # [out, groups]
    codes = unpack_nibbles(weight.tensors["codes"]).long().view(out, -1, packing.GROUP)
    times = weight.group // packing.GROUP
    scale, zero = (t.repeat_interleave(times, 1)[..., None] for t in (scale, 8 * (shifted_zero - scale)))
    return codes, scale, zero


def split16(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantized activations int64 [rows, in] and their scale float32 [rows, 1]."""
    peak = x.abs().amax(1, keepdim=True)
    inverse = torch.tensor(32639.0) / peak  # a Python number would be multiplied by a reciprocal
    code = (x * inverse).round().long()
    low = (code + 128) % 256 - 128
    return code - low + low.clamp_min(-127), peak / 32639


def integer_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int64 [rows, out], exact because all values stay below 2^53."""
    return (x.double() @ weight.double().t()).long()


def int16_sums(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Products with 16-bit weights, in 2^16."""
    return integer_product(x, (codes * scale + zero).flatten(1)) + 2**15 >> 16


def int8_sums(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Products with 8-bit weights and the remainders of their groups, in 2^16."""
    rounding = (15 * scale // 2).clamp_max(120)
    high = zero + rounding + 128 >> 8
    weight, remainder = ((codes * scale >> 8) + high).flatten(1), (zero + rounding - 256 * high).flatten(1)
    assert weight.abs().max() <= 127
    low = (x + 128) % 256 - 128
    total = x.view(len(x), -1, packing.GROUP).sum(-1)
    first = total + 2**15 >> 16
    second = (total - (first << 16) + 128 >> 8).clamp_max(127)
    high_sums, low_sums = integer_product((x - low) // 256, weight), integer_product(low, weight)
    return high_sums + integer_product(first, remainder) + (low_sums + integer_product(second, remainder) + 128 >> 8)


@pytest.fixture(params=[False, True], ids=["int16", "int8"])
def as_int8(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """AMX products with weights of 16 bits, and of 8 bits as gate and up have in steps."""
    matrix = packing.matrix

    def with_format(weight: Weight) -> bindings.Matrix:
        pointers = matrix(weight)
        pointers.as_int8 = request.param
        return pointers

    monkeypatch.setattr(packing, "matrix", with_format)
    monkeypatch.setattr(bindings, "library", lambda: bindings.load("_native_amx"))
    monkeypatch.setattr(cpu, "_pools", [])
    return bool(request.param)


def assert_integer_arithmetic(weight: Weight, as_int8: bool) -> None:
    out, width = weight.shape
    packed = cpu.Native().pack(weight)
    integers, column = integer_weights(packed, weight), 256 / packed.tensors["inverse_scale"][:out].float()
    for rows in (1, 2, 3, 4, 8, 9, 16, 17, 40, 256, 300):
        x = torch.randn(rows, width)
        x[:, 5] *= 30
        inputs, scale = split16(x)
        sums = (int8_sums if as_int8 else int16_sums)(*integers, inputs)
        assert torch.equal(linear(packed, x), sums.float() * column * scale), rows


@needs_amx
@pytest.mark.parametrize(
    ("out", "width", "group"),
    [(49, 576, 32), (130, 192, 64), (17, 1536, 128), (35, 4128, 32), (33, 2304, 64), (16, 288, 96), (64, 64, 32)],
)
def test_amx_equals_integer_arithmetic(as_int8: bool, out: int, width: int, group: int) -> None:
    assert_integer_arithmetic(stored("int4", group, False, out, width), as_int8)


@needs_amx
def test_amx_equals_integer_arithmetic_for_extreme_groups(as_int8: bool) -> None:
    """Groups over the whole range of a row, near either end, constant, and zero."""
    torch.manual_seed(0)
    values = torch.rand(49, 18, 32) * 1.6 - 0.8
    values[:20, ::3, 0], values[:20, ::3, 1] = -1, 1
    values[:, 1::6] = 1 - values[:, 1::6].abs() * 1e-3
    values[:, 4::6] = -1 + values[:, 4::6].abs() * 1e-3
    values[:, 5::6] = torch.rand(49, 3, 1)
    values[:, 8], values[7], values[30] = 0, 0, 0
    weight = quantize(values.flatten(1), "int4", 32, False)
    assert_integer_arithmetic(weight, as_int8)
    x = torch.randn(40, 576) + 0.3
    y, exact = linear(cpu.Native().pack(weight), x).double(), exact_product(x, weight)
    assert not y[:, [7, 30]].any()
    assert (y - exact).norm() < (8.5e-3 if as_int8 else 4e-4) * exact.norm()


@needs_amx
@pytest.mark.parametrize("group", [32, 64])
def test_amx_is_accurate_with_double_quantization_and_a_mean(as_int8: bool, group: int) -> None:
    """Half of the groups are zero and activations have a mean, so that a bias would add up."""
    torch.manual_seed(0)
    values = torch.randn(49, 18, 32)
    values[torch.rand(49, 18) < 0.5] = 0
    for double in (False, True):
        weight = quantize(values.flatten(1), "int4", group, double)
        packed, x = cpu.Native().pack(weight), torch.randn(300, 576) + 0.3
        y, exact = linear(packed, x), exact_product(x, weight)
        assert (y.double() - exact).norm() < (1e-2 if as_int8 else 5e-4) * exact.norm()
        for rows in (slice(0, 1), slice(5, 8), slice(11, 15), slice(40, 57)):
            assert torch.equal(linear(packed, x[rows]), y[rows])


# -- precision and limits


@pytest.mark.parametrize("matrix", [m for m in MATRICES if m[0] in ("int4", "int8")], ids=str)
def test_products_are_exact_where_activations_are(library: str, matrix: Matrix) -> None:
    """int8 holds the activations exactly; what remains is float32 rounding, and 16-bit weights with AMX."""
    width, weight = matrix[4], stored(*matrix)
    x = torch.randint(-127, 128, (9, width)).float()
    x[:, ::16] = 127.0
    exact = exact_product(x, weight)
    error = (linear(cpu.Native().pack(weight), x) - exact).norm()
    assert error < (4e-4 if library == "_native_amx" else 1e-6) * exact.norm()


@pytest.mark.parametrize("double", [False, True])
def test_nf4_levels_are_rounded_to_int8(library: str, double: bool) -> None:
    weight = stored("nf4", 64, double, 49, 192)
    exact = dequantize_stored(weight)
    levels = linear(cpu.Native().pack(weight), 127 * torch.eye(192)).t() / 127
    error = (levels - exact).view(49, 3, 64).abs().amax(2) / exact.view(49, 3, 64).abs().amax(2)
    assert error.max() < 0.5 / 127 + (4e-4 if library == "_native_amx" else 1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("size", [-100.0, 100.0])
def test_a_large_input_does_not_cost_precision_in_other_quarters(
    library: str, kind: tuple[str, int, bool], size: float
) -> None:
    weight = stored(*kind, 49, 192)
    packed = cpu.Native().pack(weight)
    for large in range(4):
        x = torch.randn(9, 3, 4, 16)
        x[:, :, large] = 0
        outliers = torch.zeros(9, 192)
        outliers[:, 16 * large :: 64] = size
        y = linear(packed, x.reshape(9, 192) + outliers).double() - linear(packed, outliers).double()
        exact = exact_product(x.reshape(9, 192), weight)
        assert (y - exact).norm() < 3e-2 * exact.norm(), large  # one scale per span would give 0.2


@pytest.mark.parametrize("matrix", [m for m in MATRICES if m[0] != "none" and m[3] > 16], ids=str)
def test_extreme_codes_and_activations_do_not_overflow(library: str, matrix: Matrix) -> None:
    """Weights of extreme codes; quarters of activations of one sign and of both, of equal and different sizes."""
    scheme, _, _, _, width = matrix
    weight = stored(*matrix)
    lowest, highest = (-127, 127) if scheme == "int8" else (0, 255)
    weight.tensors["codes"][::3], weight.tensors["codes"][1::3] = lowest, highest
    quarters = width // 16
    size = torch.exp2(-torch.randint(0, 20, (400, quarters)).float())
    size[:100], size[100:200] = 1, size[100:200].clamp_min(0.25)
    size[::2] *= torch.randn(200, quarters).sign()
    x = (size * 127).repeat_interleave(16, 1)
    x[200:] *= 1 - torch.rand(200, width) / 2
    x[5::20] *= 1 - torch.rand(20, width) / 100
    packed = cpu.Native().pack(weight)
    y = linear(packed, x)
    bound = x.double().abs() @ dequantize_stored(weight).double().abs().t()
    error = ((y.double() - exact_product(x, weight)).abs() / bound).max()
    assert error < (1.6e-2 if scheme == "nf4" else 4e-3) * (2 if library == "_native_amx" else 1)
    for first in range(0, 400, 80):
        for rows in (1, 2, 3):
            part = slice(first, first + rows)
            assert torch.equal(linear(packed, x[part]), y[part]), (first, rows)


def test_nan_and_infinity_stay_in_their_rows(library: str) -> None:
    packed = cpu.Native().pack(stored("int4", 32, False, 48, 192))
    x = torch.randn(8, 192)
    clean = linear(packed, x)
    x[2, 40], x[5, 3] = float("nan"), float("inf")
    y = linear(packed, x)
    assert y[2].isnan().all() and not y[5].isfinite().any()
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(y[others], clean[others])


def test_zero_rows_tiny_values_and_empty_batches(library: str) -> None:
    packed = cpu.Native().pack(stored("int4", 32, False, 48, 192))
    assert torch.equal(linear(packed, torch.zeros(2, 192)), torch.zeros(2, 48))
    assert linear(packed, torch.full((2, 192), 1e-38)).isfinite().all()
    assert linear(packed, torch.empty(0, 192)).shape == (0, 48)


def test_unsupported_groups_and_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        cpu.Native().pack(stored("int4", 48, False, 16, 192))
    with pytest.raises(ValueError, match="not packed"):
        linear(stored("int4", 32, False, 16, 192), torch.randn(1, 192))


def test_bfloat16_activations_give_bfloat16() -> None:
    packed = cpu.Native().pack(stored("int4", 32, False, 48, 192))
    x = torch.randn(4, 192).bfloat16()
    y = linear(packed, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, linear(packed, x.float()).bfloat16())


def test_the_shared_pool_has_the_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()
    monkeypatch.setattr(cpu, "_pools", [])
    monkeypatch.setattr(bindings, "ThreadPool", sizes.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    cpu.shared_pool()
    cpu.shared_pool()
    assert sizes == [7]
