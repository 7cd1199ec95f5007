"""The reference kernels compared with torch's own functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from adapters.errors import InvalidAdapter
from adapters.weights import LoraWeights, LowRank
from server.kernels import choose, reference
from server.kernels.lora import Segment, Segments, SlotTable
from server.kernels.packed_format import dequantize_stored
from server.model.quantization import quantize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


def test_functions_equal_those_of_torch() -> None:
    x, weight = torch.randn(5, 32), torch.randn(32)
    torch.testing.assert_close(reference.rms_norm(x, weight, 1e-5), F.rms_norm(x, (32,), weight, 1e-5))
    torch.testing.assert_close(reference.swiglu(x, x.flip(0)), F.silu(x) * x.flip(0))
    torch.testing.assert_close(reference.softmax(x * 50), F.softmax(x * 50, -1))


def test_rope_keeps_norms() -> None:
    x, angle = torch.randn(3, 2, 8), torch.randn(3, 4)
    turned = reference.rope(x, angle.cos(), angle.sin())
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones(3, 1, 4), angle[:, None])
    torch.testing.assert_close(turned, torch.cat((pairs.real, pairs.imag), -1))


def test_attention_follows_the_block_table() -> None:
    n, context, size, heads, kv_heads, d = 3, 9, 4, 4, 2, 8
    q, k, v = torch.randn(n, heads, d), torch.randn(context, kv_heads, d), torch.randn(context, kv_heads, d)
    keys, values = torch.full((6, size, kv_heads, d), torch.nan), torch.full((6, size, kv_heads, d), torch.nan)
    table = torch.tensor([4, 0, 5, -1])
    for i in range(context):
        keys[table[i // size], i % size], values[table[i // size], i % size] = k[i], v[i]
    got = reference.attention(q, keys, values, table, context)
    mask = torch.ones(n, context).tril(context - n).bool()
    swapped = (t.transpose(0, 1)[None] for t in (q, k, v))
    expected = F.scaled_dot_product_attention(*swapped, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["int4", "nf4", "int8", "none"])
def test_products_and_rows_equal_the_stored_matrix(scheme: str, double_quant: bool) -> None:
    backend = choose("reference")
    stored = quantize(torch.randn(40, 128), scheme, 32, double_quant)
    packed = backend.pack(stored)
    dense = dequantize_stored(stored)
    assert torch.equal(backend.dequantize(packed, 3, 21), dense[3:21])
    ids = torch.tensor([39, 0, 17, 17, 16])
    assert torch.equal(backend.embed(packed, ids), dense[ids])
    assert backend.embed(packed, ids[:0]).shape == (0, 128)
    x = torch.randn(6, 128)
    torch.testing.assert_close(backend.linear(packed, x), x @ dense.t())


def test_products_do_not_depend_on_the_batch_or_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 sums would depend on the number of rows."""
    backend = choose("reference")
    stored = quantize(torch.randn(72, 1536), "int4", 32)
    x = torch.randn(81, 1536) * torch.logspace(-2, 2, 1536)
    whole = backend.linear(stored, x)
    assert torch.equal(whole, (x.double() @ dequantize_stored(stored).double().t()).float())
    assert torch.equal(whole, torch.cat([backend.linear(stored, rows) for rows in x.split([1, 9, 71])]))
    monkeypatch.setattr(reference, "CHUNK", 1536 * 17)
    assert torch.equal(whole, backend.linear(stored, x))


def test_an_adapter_that_overflows_its_dtype_is_refused() -> None:
    big = LoraWeights("big", "b" * 64, {"m": LowRank(torch.full((1, 4), 3.4e38), torch.ones(4, 1), 1.0)})
    assert choose("reference").prepare(big, "int4").modules["m"].A.dtype == torch.float32
    with pytest.raises(InvalidAdapter, match="'big' has values in m that are not finite"):
        choose("aten").prepare(big, "int4")


def test_lora_updates_change_their_own_rows_only() -> None:
    table = SlotTable(2)
    update = LowRank(torch.randn(3, 8), torch.randn(5, 3), 0.5)
    table.load_adapter(1, LoraWeights("a", "a" * 64, {"m": update}))
    x, y = torch.randn(6, 8), torch.zeros(6, 5)
    segments = Segments(table, [Segment(0, 2, ()), Segment(2, 4, ((1, -2.0),)), Segment(4, 6, ((1, 1.0),))])
    choose("reference").add_lora(y, x, "m", segments)  # type: ignore[attr-defined]
    choose("reference").add_lora(y, x, "other", segments)  # type: ignore[attr-defined]
    dense = x @ (update.B @ update.A).t() * 0.5
    assert not y[:2].any()
    torch.testing.assert_close(y[2:], torch.cat((dense[2:4] * -2, dense[4:])))
