"""The native kernels' packed layouts and products, against the stored layout and float64 products."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from ctypes import CDLL

import pytest
import torch

from server.kernels import cpu
from server.kernels.cpu import bindings, packing
from server.kernels.packed_format import dequantize_stored, group_values, unpack_nibbles
from server.kernels.threads import processors
from server.kernels.weight import Weight
from server.model.quantization import quantize
from tests.server.kernels.conftest import runs, same_bits

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native kernels: {cpu.unavailable()}")

SCHEMES = [
    ("int4", 32, False),
    ("int4", 64, False),
    ("int4", 96, False),
    ("int4", 64, True),
    ("int4", 32, True),
    ("nf4", 64, False),
    ("nf4", 64, True),
    ("int8", 32, False),
    ("int8", 64, True),
    ("none", 0, False),
]
SHAPES = [(16, 192), (48, 576), (49, 384), (7, 192), (130, 1536)]


@pytest.fixture(scope="module", autouse=True)
def two_threads() -> Iterator[None]:
    """Whatever torch has when the first product comes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "_pools", [bindings.Pool(2)])
        yield


def stored(scheme: str, group: int, double: bool, out: int, width: int) -> Weight:
    torch.manual_seed(out * width + group)
    values = torch.randn(out, width) * 0.05 + 0.01
    if scheme == "none":
        values = values.bfloat16()
    return quantize(values, scheme, group or 64, double)


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_packing_gives_back_the_stored_values(scheme: str, group: int, double: bool, out: int, width: int) -> None:
    kept = stored(scheme, group, double, out, width)
    packed = cpu.Native().pack(kept)
    expected = dequantize_stored(kept)
    assert torch.equal(cpu.Native().dequantize(packed), expected)
    assert torch.equal(cpu.Native().dequantize(packed, 3, out - 2), expected[3 : out - 2])
    assert torch.equal(cpu.Native().dequantize(packed, 5, 5), expected[5:5])


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
def test_embedding_rows_are_the_stored_rows(scheme: str, group: int, double: bool) -> None:
    kept = stored(scheme, group, double, 49, 384)
    ids = torch.tensor([0, 48, 15, 16, 16, 31])
    assert torch.equal(cpu.Native().embed(cpu.Native().pack(kept), ids), dequantize_stored(kept)[ids])


def test_an_id_beyond_the_table_is_refused() -> None:
    packed = cpu.Native().pack(stored("int8", 32, False, 49, 384))
    with pytest.raises(IndexError):
        cpu.Native().embed(packed, torch.tensor([49]))
    with pytest.raises(IndexError):
        cpu.Native().embed(packed, torch.tensor([-1]))


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
@pytest.mark.parametrize(("out", "width"), [(49, 384), (130, 1536)])
@pytest.mark.parametrize("rows", [7, 8, 9, 12, 15, 16, 17, 300])
def test_walks_of_four_rows_and_of_eight_answer_the_same(
    library: str, scheme: str, group: int, double: bool, out: int, width: int, rows: int
) -> None:
    packed = cpu.Native().pack(stored(scheme, group, double, out, width))
    x = torch.randn(rows, width) * torch.logspace(-2, 1, width)
    found = {}
    usual = bindings.library().loramux_by_eight(False)
    try:
        for by_eight in (False, True):
            bindings.library().loramux_by_eight(by_eight)
            found[by_eight] = cpu.Native().linear(packed, x)
    finally:
        bindings.library().loramux_by_eight(usual)
    assert torch.equal(found[True], found[False])
    alone = cpu.Native().linear(packed, x[rows - 1 :])
    assert torch.equal(found[True][rows - 1 :], alone)


@pytest.mark.parametrize(("scheme", "group", "double"), [*SCHEMES, ("nf4", 32, False), ("int4", 128, False)])
@pytest.mark.parametrize(("out", "width"), SHAPES)
def test_vectors_of_half_the_size_give_the_same_bits(
    both_sizes: tuple[CDLL, CDLL],
    scheme: str,
    group: int,
    double: bool,
    out: int,
    width: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if width % (group or 1):
        width = group * 3
    packed = cpu.Native().pack(stored(scheme, group, double, out, width))
    x = torch.randn(17, width) * torch.logspace(-2, 1, width)
    x[3] = 0
    found = []
    for library in both_sizes:
        monkeypatch.setattr(bindings, "library", lambda library=library: library)
        monkeypatch.setattr(cpu, "_pools", [bindings.Pool(2)])
        found.append([cpu.Native().linear(packed, x[:rows]).numpy() for rows in (1, 2, 3, 8, 17)])
    assert all(same_bits(ours, theirs) for ours, theirs in zip(*found, strict=True))


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
@pytest.mark.parametrize(("out", "width"), SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 17, 300])
def test_products_are_close_to_exact_ones(
    library: str, scheme: str, group: int, double: bool, out: int, width: int, rows: int
) -> None:
    kept = stored(scheme, group, double, out, width)
    packed, weight = cpu.Native().pack(kept), dequantize_stored(kept).double()
    errors, exact = [], []
    for _ in range(max(1, 64 // rows)):  # a single row's error says little
        x = torch.randn(rows, width)
        exact.append(x.double() @ weight.t())
        errors.append(cpu.Native().linear(packed, x).double() - exact[-1])
    error = torch.cat(errors).norm() / torch.cat(exact).norm()
    # Rounding to int8 by quarters of spans of 64 leaves about 5.7e-3; the levels of nf4 in 127ths, as much besides. The
    # matrix unit reads 16 bits.
    if library == "_native_amx" and scheme != "none":
        assert error < (6.5e-3 if scheme == "nf4" else 4e-4)
    else:
        assert error < (1e-2 if scheme == "nf4" else 6.5e-3)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("width", [32, 96, 160])
def test_the_last_span_may_be_half_a_one(library: str, scheme: str, width: int) -> None:
    kept = stored(scheme, 32, False, 49, width)
    packed = cpu.Native().pack(kept)
    x = torch.randn(21, width)
    exact = x.double() @ dequantize_stored(kept).double().t()
    y = cpu.Native().linear(packed, x)
    assert (y.double() - exact).norm() < 1.2e-2 * exact.norm()
    assert torch.equal(cpu.Native().linear(packed, x[5:6]), y[5:6])


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
def test_a_row_does_not_depend_on_its_batch(library: str, scheme: str, group: int, double: bool) -> None:
    packed = cpu.Native().pack(stored(scheme, group, double, 49, 576))
    x = torch.randn(300, 576)
    together = cpu.Native().linear(packed, x)
    for rows in (slice(0, 1), slice(5, 7), slice(11, 14), slice(20, 32), slice(298, 300), slice(40, 57)):
        assert torch.equal(cpu.Native().linear(packed, x[rows]), together[rows])


def of_many_sizes(group: int) -> Weight:
    """Rows whose groups differ by up to 10,000 times; some are zero throughout, some one number throughout."""
    torch.manual_seed(group)
    values = torch.randn(49, 384 // group, group) * 10 ** (torch.rand(49, 384 // group, 1) * 4 - 3)
    values[3], values[4, 0], values[5, 1] = 0, 0, 7.0
    values[6] *= 1e-6
    return quantize(values.flatten(1), "int4", group, False)


@pytest.mark.parametrize("group", [32, 64, 96, 128])
def test_scales_far_below_a_rows_largest_are_kept(library: str, group: int) -> None:
    kept, native = of_many_sizes(group), cpu.Native()
    packed, exact = native.pack(kept), dequantize_stored(kept)
    assert len(packed.tensors["odd_at"]) > 40
    assert torch.equal(native.dequantize(packed), exact)
    assert torch.equal(native.dequantize(packed, 17, 40), exact[17:40])
    assert torch.equal(native.embed(packed, torch.arange(49)), exact)
    x = torch.randn(64, 384)
    error = (native.linear(packed, x) - x @ exact.t()).norm(dim=0) / (x @ exact.t()).norm(dim=0).clamp_min(1e-30)
    assert error.max() < (2.5e-2 if library == "_native_amx" else 1e-2)


@pytest.mark.parametrize(("group", "bits"), [(32, 5.02), (64, 4.52), (128, 4.27)])
def test_what_packing_adds_is_a_byte_a_row(group: int, bits: float) -> None:
    """And two for products of the matrix unit."""
    assert cpu.Native().pack(stored("int4", group, False, 32, 512)).nbytes <= (bits + 16 / 512) * 32 * 512 / 8


@pytest.mark.parametrize("width", [576, 1536])
def test_groups_of_64_with_scales_in_codes_take_4_3_bits_at_most(width: int) -> None:
    packed = cpu.Native().pack(stored("int4", 64, True, 576, width))
    assert packed.nbytes * 8 <= 4.3 * 576 * width
    assert "fineness" in packed.tensors


@pytest.mark.parametrize("double", [False, True])
def test_weights_are_127_units_at_most_and_scales_less_than_16(double: bool) -> None:
    """And where scales are whole numbers, so is what makes 256ths of units of them."""
    torch.manual_seed(0)
    size = torch.exp2(torch.randint(-12, 8, (320, 1)).float())
    values = torch.cat((torch.randn(160, 576), torch.rand(160, 576) + torch.randn(160, 1) / 2)) * size
    values[7] = 0
    kept = quantize(values, "int4", 64, double)
    packed = cpu.Native().pack(kept)
    fineness = packed.tensors["fineness"].double()
    scale = fineness * group_values(kept.tensors, "scale", 0, 320).double().abs().amax(1)
    weight = fineness * dequantize_stored(kept).double().abs().amax(1)
    assert weight.max() <= 127 and scale.max() < 16
    if not double:
        whole = torch.ldexp(fineness, packed.tensors["exponents"].int() + 23)[weight > 0]
        assert torch.equal(whole, whole.round()) and 2**11 <= whole.min() <= whole.max() < 2**14


def test_a_matrix_whose_rows_are_too_uneven_is_not_for_the_matrix_unit(library: str) -> None:
    """One weight in each row is far larger than the others, which no unit of all of them is fine enough for."""
    torch.manual_seed(0)
    values = torch.randn(49, 1536) * 0.05
    values[:, 7] = 2.0
    kept, native = quantize(values, "int4", 32, False), cpu.Native()
    packed, weight = native.pack(kept), dequantize_stored(kept).double()
    assert "fineness" not in packed.tensors
    x = torch.randn(40, 1536)
    x[:, 7] = 0  # what the others give is not hidden by it
    exact = x.double() @ weight.t()
    y = native.linear(packed, x)
    assert (y.double() - exact).norm() < 6.5e-3 * exact.norm()
    assert torch.equal(native.linear(packed, x[3:6]), y[3:6])


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
def test_what_is_in_codes_is_for_the_matrix_unit(scheme: str, group: int, double: bool) -> None:
    packed = cpu.Native().pack(stored(scheme, group, double, 49, 192))
    assert ("fineness" in packed.tensors) == (scheme != "none")


def test_rows_too_long_for_its_sums_are_not_for_the_matrix_unit() -> None:
    assert "fineness" in cpu.Native().pack(stored("int4", 32, False, 1, packing.MOST_INPUTS)).tensors
    assert "fineness" not in cpu.Native().pack(stored("int4", 32, False, 1, packing.MOST_INPUTS + 32)).tensors


def whole_scales(packed: Weight, kept: Weight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 [out, in / 32, 32] and twice [out, in / 32, 1]: an int4 matrix's codes, its scales and zeros as `packed`
    has them, in 256ths of its rows' units."""
    out, width = kept.shape
    fineness, exponents = (packed.tensors[name][:out] for name in ("fineness", "exponents"))
    factor = torch.ldexp(fineness.float(), exponents.int() + 23).long()[:, None, None]
    spans = packed.tensors["span_scales"].long()
    if kept.group % packing.SPAN:
        groups = spans.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)[:out, : width // packing.GROUP]
        groups = groups[:, :: kept.group // packing.GROUP]
    else:
        groups = spans.permute(0, 3, 1, 2).flatten(0, 1)[:out]
    scale, rest = (groups * factor + 2**14 >> 15).unbind(-1)  # [out, groups]
    codes = unpack_nibbles(kept.tensors["codes"]).long().view(out, -1, packing.GROUP)
    times = kept.group // packing.GROUP
    scale, zero = (t.repeat_interleave(times, 1)[..., None] for t in (scale, 8 * (rest - scale)))
    return codes, scale, zero


def whole_inputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [rows, in] and float32 [rows, 1]: activations as two codes of eight bits each have them, and their unit."""
    peak = x.abs().amax(1, keepdim=True)
    inverse = torch.tensor(32639.0) / peak  # a plain number would be multiplied by a reciprocal
    code = (x * inverse).round().long()
    low = (code + 128) % 256 - 128
    return code - low + low.clamp_min(-127), peak / 32639


def products(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """int64 [rows, out] of whole numbers, less than 2^53, so exact."""
    return (x.double() @ weight.double().t()).long()


def sums_of_words(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """In multiples of 2^16."""
    return products(x, (codes * scale + zero).flatten(1)) + 2**15 >> 16


def sums_of_bytes(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The same by weights of 8 bits, and what these leave of a group by two bytes of the sum of its inputs."""
    taken = (15 * scale // 2).clamp_max(120)  # by rounding down
    whole = zero + taken + 128 >> 8
    weight, left = ((codes * scale >> 8) + whole).flatten(1), (zero + taken - 256 * whole).flatten(1)
    assert weight.abs().max() <= 127
    low = (x + 128) % 256 - 128
    total = x.view(len(x), -1, packing.GROUP).sum(-1)
    first = total + 2**15 >> 16
    second = (total - (first << 16) + 128 >> 8).clamp_max(127)
    high_bytes, low_bytes = products((x - low) // 256, weight), products(low, weight)
    return high_bytes + products(first, left) + (low_bytes + products(second, left) + 128 >> 8)


def test_bytes_are_not_for_scales_below_zero() -> None:
    kept = stored("int4", 32, False, 49, 192)
    assert "rising" in cpu.Native().pack(kept).tensors
    kept.tensors["scale"][17, 2] *= -1
    packed = cpu.Native().pack(kept)
    assert "fineness" in packed.tensors and "rising" not in packed.tensors


@pytest.fixture(params=[False, True])
def coarse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """The matrix unit's products with weights of 16 bits, and of 8 as steps have some."""
    described = packing.matrix

    def as_steps_have_it(weight: Weight) -> bindings.Matrix:
        matrix = described(weight)
        matrix.coarse = request.param
        return matrix

    monkeypatch.setattr(packing, "matrix", as_steps_have_it)
    monkeypatch.setattr(bindings, "library", lambda: bindings.load("_native_amx"))
    monkeypatch.setattr(cpu, "_pools", [])
    return bool(request.param)


@pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no matrix unit")
@pytest.mark.parametrize(
    ("out", "width", "group"),
    [
        (49, 576, 32),
        (130, 192, 64),
        (32, 96, 32),
        (17, 1536, 128),
        (96, 352, 32),
        (35, 4128, 32),
        (33, 2304, 64),
        (16, 288, 96),
        (64, 64, 32),
    ],
)
def test_the_matrix_unit_adds_whole_numbers(coarse: bool, out: int, width: int, group: int) -> None:
    """Bit for bit what integers give, of any number of rows."""
    adds_whole_numbers(stored("int4", group, False, out, width), coarse)


@pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no matrix unit")
def test_so_it_does_of_groups_at_the_limits(coarse: bool) -> None:
    """From the least to the largest of a row, next to nothing at either, nothing but one number, and none."""
    torch.manual_seed(0)
    values = torch.rand(49, 18, 32) * 1.6 - 0.8
    values[:20, ::3, 0], values[:20, ::3, 1] = -1, 1
    values[:, 1::6] = 1 - values[:, 1::6].abs() * 1e-3
    values[:, 4::6] = -1 + values[:, 4::6].abs() * 1e-3
    values[:, 5::6] = torch.rand(49, 3, 1)
    values[:, 8], values[7], values[30] = 0, 0, 0
    kept = quantize(values.flatten(1), "int4", 32, False)
    adds_whole_numbers(kept, coarse)
    x = torch.randn(40, 576) + 0.3
    exact = x.double() @ dequantize_stored(kept).double().t()
    y = cpu.Native().linear(cpu.Native().pack(kept), x).double()
    assert not y[:, [7, 30]].any()
    assert (y - exact).norm() < (8.5e-3 if coarse else 4e-4) * exact.norm()


@pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no matrix unit")
def test_what_bytes_leave_does_not_add_up(coarse: bool) -> None:
    """Groups of zeros, and activations with a mean."""
    torch.manual_seed(0)
    values = torch.randn(96, 18, 32)
    values[torch.rand(96, 18) < 0.5] = 0
    kept, x = quantize(values.flatten(1), "int4", 32, False), torch.randn(64, 576) + 0.3
    exact = x.double() @ dequantize_stored(kept).double().t()
    y = cpu.Native().linear(cpu.Native().pack(kept), x).double()
    assert (y - exact).norm() < (1e-2 if coarse else 5e-4) * exact.norm()


def adds_whole_numbers(kept: Weight, coarse: bool) -> None:
    """Asserts that products of 1 to 300 rows are bit for bit what integers give."""
    out, width = kept.shape
    packed = cpu.Native().pack(kept)
    whole, column = whole_scales(packed, kept), 256 / packed.tensors["fineness"][:out].float()
    sums = sums_of_bytes if coarse else sums_of_words
    for rows in (1, 2, 3, 4, 8, 9, 16, 17, 40, 256, 300):
        x = torch.randn(rows, width)
        x[:, 5] *= 30
        inputs, unit = whole_inputs(x)
        assert torch.equal(cpu.Native().linear(packed, x), sums(*whole, inputs).float() * column * unit), rows


@pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no matrix unit")
@pytest.mark.parametrize("group", [32, 64])
def test_so_it_does_where_scales_are_codes(coarse: bool, group: int) -> None:
    """Close to exact, and each row as it is alone."""
    kept = stored("int4", group, True, 49, 576)
    packed, x = cpu.Native().pack(kept), torch.randn(300, 576)
    exact = x.double() @ dequantize_stored(kept).double().t()
    together = cpu.Native().linear(packed, x)
    assert (together.double() - exact).norm() < (8.5e-3 if coarse else 4e-4) * exact.norm()
    for rows in (slice(0, 1), slice(5, 8), slice(11, 15), slice(20, 36), slice(40, 57)):
        assert torch.equal(cpu.Native().linear(packed, x[rows]), together[rows])


def test_products_are_exact_where_activations_are(library: str) -> None:
    """Activations that int8 holds exactly leave nothing but the rounding of float32 sums, and of weights of 16 bits."""
    kept = stored("int4", 32, False, 49, 192)
    x = torch.randint(-127, 128, (9, 192)).float()
    x[:, ::32] = 127.0
    packed, weight = cpu.Native().pack(kept), dequantize_stored(kept).double()
    exact = x.double() @ weight.t()
    y = cpu.Native().linear(packed, x)
    if library == "_native_amx":
        assert (y.double() - exact).norm() < 4e-4 * exact.norm()
    else:
        assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("scheme", "group", "double"), [s for s in SCHEMES if s[0] in ("int4", "int8")])
def test_so_they_are_by_whatever_scales(library: str, scheme: str, group: int, double: bool) -> None:
    """Those that are codes themselves are rounded to float16, as the stored ones are."""
    kept = stored(scheme, group, double, 130, 1536)
    x = torch.randint(-127, 128, (9, 1536)).float()
    x[:, ::16] = 127.0
    exact = x.double() @ dequantize_stored(kept).double().t()
    y = cpu.Native().linear(cpu.Native().pack(kept), x)
    assert (y.double() - exact).norm() < (4e-4 if library == "_native_amx" else 1e-6) * exact.norm()


@pytest.mark.parametrize("double", [False, True])
def test_levels_of_nf4_are_the_nearest_127ths(library: str, double: bool) -> None:
    """The largest weight of a group is its scale."""
    kept = stored("nf4", 64, double, 49, 192)
    packed, weight = cpu.Native().pack(kept), dequantize_stored(kept)
    taken = cpu.Native().linear(packed, 127 * torch.eye(192)).t() / 127
    off = (taken - weight).view(49, 3, 64).abs().amax(2) / weight.view(49, 3, 64).abs().amax(2)
    assert off.max() < 0.5 / 127 + (4e-4 if library == "_native_amx" else 1e-5)


@pytest.mark.parametrize(("scheme", "group", "double"), SCHEMES)
@pytest.mark.parametrize("large", [0, 16, 32, 48])
@pytest.mark.parametrize("size", [-100.0, 100.0])
def test_a_large_input_costs_the_other_quarters_of_its_span_nothing(
    library: str, scheme: str, group: int, double: bool, large: int, size: float
) -> None:
    kept = stored(scheme, group, double, 49, 192)
    x = torch.randn(9, 192).view(9, 3, 4, 16)
    x[:, :, large // 16] = 0
    x = x.reshape(9, 192)
    exact = x.double() @ dequantize_stored(kept).double().t()
    alone = torch.zeros(9, 192)
    alone[:, large::64] = size
    packed = cpu.Native().pack(kept)
    y = cpu.Native().linear(packed, x + alone).double() - cpu.Native().linear(packed, alone).double()
    # One scale for all would leave about 0.2. Sums of finer quarters are rounded to the units of the next one.
    assert (y - exact).norm() < 3e-2 * exact.norm()


@pytest.mark.parametrize("width", [192, 1536])
@pytest.mark.parametrize(("scheme", "group", "double"), [s for s in SCHEMES if s[0] != "none"])
def test_sums_at_their_limits_hold(scheme: str, group: int, double: bool, width: int, library: str) -> None:
    """Rows of the least codes and of the largest, and inputs as large as their quarter's largest, of one sign and of
    both, where quarters are of one size and where they differ; many rows at once, and few."""
    kept = stored(scheme, group, double, 49, width)
    least, most = (-127, 127) if scheme == "int8" else (0, 255)
    kept.tensors["codes"][::3], kept.tensors["codes"][1::3] = least, most
    quarters = width // 16
    size = torch.exp2(-torch.randint(0, 20, (400, quarters)).float())
    size[:100], size[100:200] = 1, size[100:200].clamp_min(0.25)
    size[::2] *= torch.randn(200, quarters).sign()
    x = (size * 127).repeat_interleave(16, 1)
    x[200:] *= 1 - torch.rand(200, width) / 2
    x[5::20] *= 1 - torch.rand(20, width) / 100
    weight = dequantize_stored(kept).double()
    packed = cpu.Native().pack(kept)
    y = cpu.Native().linear(packed, x)
    off = (y.double() - x.double() @ weight.t()).abs()
    assert (off / (x.double().abs() @ weight.abs().t())).max() < (1.6e-2 if scheme == "nf4" else 4e-3) * (
        2 if library == "_native_amx" else 1  # where a row has one unit for all of its quarters
    )
    for first, rows in itertools.product(range(0, 400, 50), (1, 2, 3)):
        some = slice(first, first + rows)
        assert torch.equal(cpu.Native().linear(packed, x[some]), y[some]), (first, rows)


def test_a_row_that_is_not_finite_stays_alone(library: str) -> None:
    packed = cpu.Native().pack(stored("int4", 32, False, 48, 192))
    x = torch.randn(8, 192)
    clean = cpu.Native().linear(packed, x)
    x[2, 40] = float("nan")
    x[5, 3] = float("inf")
    y = cpu.Native().linear(packed, x)
    assert y[2].isnan().all()
    assert not y[5].isfinite().any()
    others = [0, 1, 3, 4, 6, 7]
    assert torch.equal(y[others], clean[others])


def test_zero_rows_and_tiny_values(library: str) -> None:
    packed = cpu.Native().pack(stored("int4", 32, False, 48, 192))
    assert torch.equal(cpu.Native().linear(packed, torch.zeros(2, 192)), torch.zeros(2, 48))
    assert cpu.Native().linear(packed, torch.full((2, 192), 1e-38)).isfinite().all()
    assert cpu.Native().linear(packed, torch.empty(0, 192)).shape == (0, 48)


def test_a_group_that_the_kernels_do_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        cpu.Native().pack(stored("int4", 48, False, 16, 192))
    unpacked = stored("int4", 32, False, 16, 192)
    with pytest.raises(ValueError, match="not packed"):
        cpu.Native().linear(unpacked, torch.randn(1, 192))


def test_products_beside_a_runner_have_as_many_threads_as_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training job's two, say, whatever the machine has."""
    asked = list[int]()
    monkeypatch.setattr(cpu, "_pools", [])
    monkeypatch.setattr(bindings, "Pool", asked.append)
    torch.set_num_threads(processors() + 1)
    cpu.shared_pool()
    cpu.shared_pool()
    assert asked == [processors() + 1]


def test_bfloat16_in_gives_bfloat16_out() -> None:
    packed = cpu.Native().pack(stored("int4", 32, False, 48, 192))
    x = torch.randn(4, 192).bfloat16()
    y = cpu.Native().linear(packed, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, cpu.Native().linear(packed, x.float()).bfloat16())
