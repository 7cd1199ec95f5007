"""Quantization: errors, exact cases, and refusals."""

from __future__ import annotations

import pytest
import torch

from server.errors import BadModel, BadSetting
from server.kernels.packed_format import NF4, TILE, dequantize_stored, pack_nibbles, unpack_nibbles
from server.model import quantization
from server.model.quantization import Quantization, bits, check_group, quantize, quantize_table
from server.settings.schema import GROUP_SIZES


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative(weight_error: torch.Tensor, matrix: torch.Tensor) -> float:
    return float(weight_error.norm() / matrix.norm())


def test_nibbles_are_packed_low_first() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(3, 2)
    packed = pack_nibbles(codes)
    assert packed[0, 0] == 0x10 and packed[0, 1] == 0x32
    assert torch.equal(unpack_nibbles(packed), codes)


def test_dequantize_equals_the_definition() -> None:
    for double in (False, True):
        weight = quantize(gaussian(37, 128), "int4", 32, double)
        t = weight.tensors
        got = dequantize_stored(weight)
        for row, column in [(0, 0), (1, 33), (36, 127), (20, 64), (15, 95), (16, 96)]:
            byte = int(t["codes"][row, column // 2])
            code = byte >> 4 if column % 2 else byte & 15
            values = []
            for key in ("scale", "zero"):
                if double:
                    tile = (row // TILE, column // 32 // TILE)
                    product = t[f"{key}_codes"][row, column // 32].float() * t[f"{key}_step"][tile]
                    values.append((product + t[f"{key}_base"][tile]).half().float())
                else:
                    values.append(t[key][row, column // 32].float())
            assert got[row, column] == code * values[0] + values[1]


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("double", [False, True])
def test_rows_can_be_dequantized_alone(scheme: str, double: bool) -> None:
    weight = quantize(gaussian(50, 128), scheme, 64, double)
    whole = dequantize_stored(weight)
    assert whole.dtype == torch.float32 and whole.shape == (50, 128)
    assert torch.equal(dequantize_stored(weight, 19, 41), whole[19:41])
    assert torch.equal(dequantize_stored(weight, 48, 60), whole[48:])


@pytest.mark.parametrize(
    ("scheme", "group", "double", "most", "at_most_bits"),
    [
        ("int4", 32, False, 0.075, 5.0),
        ("int4", 64, False, 0.087, 4.5),
        ("int4", 64, True, 0.089, 4.27),
        ("int4", 128, False, 0.097, 4.25),
        ("nf4", 64, True, 0.093, 4.14),
        ("int8", 32, False, 0.0055, 8.5),
    ],
)
def test_error_and_cost_on_gaussian_weights(scheme, group, double, most, at_most_bits) -> None:
    matrix = gaussian(512, 1024)
    weight = quantize(matrix, scheme, group, double)
    assert relative(dequantize_stored(weight) - matrix, matrix) <= most
    assert bits([weight]) <= at_most_bits
    assert weight.double_quantized is double


def test_fitted_scales_are_never_worse_than_the_range() -> None:
    matrix = gaussian(64, 512)
    blocks = matrix.view(64, -1, 64)
    low, high = blocks.aminmax(dim=-1)
    scale, zero = ((high - low) / 15).half().float(), low.half().float()
    codes = ((blocks - zero[..., None]) / scale[..., None]).round().clamp(0, 15)
    plain = (codes * scale[..., None] + zero[..., None] - blocks).square().sum(-1)
    ours = (dequantize_stored(quantize(matrix, "int4", 64)).view_as(blocks) - blocks).square().sum(-1)
    assert bool((ours <= plain * 1.02).all())  # codes are chosen for the rounded scale, hence the two per cent
    assert float(ours.sum()) < 0.94 * float(plain.sum())


def test_values_on_a_grid_of_16_are_exact() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (32, 128), generator=generator)
    codes.view(32, 4, 32)[..., 0], codes.view(32, 4, 32)[..., 1] = 0, 15
    matrix = codes.float() * 0.25 - 1.75
    assert torch.equal(dequantize_stored(quantize(matrix, "int4", 32)), matrix)


def test_settings_allow_the_groups() -> None:
    assert GROUP_SIZES == quantization.GROUPS


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8"])
def test_constant_groups(scheme: str) -> None:
    matrix = torch.zeros(16, 128)
    matrix[:, 64:] = 0.5
    for double in (False, True):
        got = dequantize_stored(quantize(matrix, scheme, 64, double))
        assert torch.allclose(got, matrix, rtol=5e-4, atol=1e-6)


def test_nf4_equals_the_table_of_qlora() -> None:
    assert NF4.shape == (16,) and NF4[0] == -1 and NF4[7] == 0 and NF4[15] == 1
    matrix = NF4.repeat(16, 4) * 0.5
    assert torch.equal(dequantize_stored(quantize(matrix, "nf4", 64)), matrix)


def test_int8_has_no_code_of_minus_128() -> None:
    weight = quantize_table(gaussian(64, 64), 8)
    assert weight.scheme == "int8" and weight.group == 32
    assert int(weight.tensors["codes"].min()) >= -127


def test_none_keeps_values_and_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        matrix = gaussian(8, 24).to(dtype)
        weight = quantize(matrix, "none")
        assert weight.tensors["codes"].dtype == dtype
        assert torch.equal(dequantize_stored(weight, 2, 5), matrix[2:5].float())
    assert quantize_table(gaussian(8, 24), 16).tensors["codes"].dtype == torch.bfloat16


def test_a_group_that_does_not_divide_names_possible_ones() -> None:
    with pytest.raises(BadModel, match=r"down_proj has 96 inputs, which groups of 64 do not divide; groups of 32 do"):
        quantize(gaussian(16, 96), "int4", 64, name="down_proj")
    with pytest.raises(BadModel, match="no group does"):
        check_group("x", 50, 32)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(scheme: str, bad: float) -> None:
    matrix = gaussian(16, 64)
    matrix[3, 5] = bad
    with pytest.raises(BadModel, match="q_proj"):
        quantize(matrix, scheme, 64, name="q_proj")


def test_invalid_settings() -> None:
    for wrong in ({"scheme": "int3"}, {"group": 48}, {"table_bits": 4}):
        with pytest.raises(BadSetting):
            Quantization(**wrong)


def test_bits_over_several_matrices() -> None:
    a, b = quantize(gaussian(16, 64), "int4", 32), quantize(gaussian(16, 64), "none")
    assert bits([a]) == 5.0
    assert bits([a, b]) == pytest.approx((5 + 32) / 2)


@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8"])
@pytest.mark.parametrize("double", [False, True])
def test_chunked_quantization_equals_quantizing_at_once(
    scheme: str, double: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of large models are, of whose rows some are looked at at a time: in whole tiles of scales."""
    whole = quantize(gaussian(75, 128), scheme, 64, double)
    monkeypatch.setattr(quantization, "_CHUNK", 128 * 40)
    pieces = quantize(gaussian(75, 128), scheme, 64, double)
    assert pieces.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        assert torch.equal(pieces.tensors[name], tensor), name
