"""The base as a model to train: shared prefixes, dequantized and quantized weights, padding, compute dtypes."""

from __future__ import annotations

import pytest
import torch

from adapters import layers, training
from adapters.data import Example, Tokens
from adapters.layers import LoraSpec
from server.jobs import prefix_attention, trainable_model
from server.jobs.prefix_attention import PrefixAttention, group_by_length
from server.jobs.trainable_model import TrainableModel, bucket_padding, shared_prefix, small_padding
from server.kernels import cpu_info
from server.model.attention import Context, PackedAttention


def sequences(prefix: int, tails: list[int], seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    draw = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 200, (prefix,), generator=draw)
    parts = []
    for i, n in enumerate(tails):
        tail = torch.randint(3, 200, (n,), generator=draw)
        tail[0] = 210 + i  # the tails share no token
        parts.append(torch.cat((head, tail)))
    return torch.cat(parts), [len(p) for p in parts]


@pytest.mark.parametrize(
    ("prefix", "tails"),
    [
        (7, [3, 1, 6]),
        (1, [4, 4]),
        (0, [5, 4]),
        (0, [5]),
        (3, [9, 1, 1]),
        (20, [2] * 5),
        (0, [14, 13, 3, 2]),
        (4, [14, 2]),
    ],
)
def test_a_shared_prefix_changes_no_state_and_no_gradient(prefix, tails, tiny_base, monkeypatch):
    monkeypatch.setattr(prefix_attention, "MAX_BATCHED", 12)
    ids, lengths = sequences(prefix, tails)
    assert shared_prefix(ids, lengths) == (prefix if len(tails) > 1 else 0)
    model = TrainableModel(tiny_base, "float32")
    found = layers.inject(model.tree, LoraSpec(rank=3), seed=1)
    for layer in found.values():
        torch.nn.init.normal_(layer.lora_B, 0, 0.2)
    results = []
    for shared in (True, False):
        model.tree.zero_grad()
        if shared:
            states = model.hidden(ids, lengths)
        else:
            packed = PackedAttention(lengths)
            states = model.tree(model.tree.embed(ids), Context(packed.positions, packed))
        (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
        results.append(
            (states.detach(), torch.cat([p.grad.flatten() for p in model.tree.parameters() if p.requires_grad]))
        )
    (a, da), (b, db) = results
    assert torch.allclose(a, b, atol=2e-5)
    assert (da - db).abs().max() < 1e-4 * db.abs().max()


def test_batches_are_padded_to_few_numbers_of_rows():
    """oneDNN keeps kernels for each number."""
    whole = [rows + bucket_padding(rows) for rows in range(1, 2049)]
    assert len(set(whole)) <= 48
    assert all(rows <= found < rows + max(16, rows / 7) for rows, found in enumerate(whole, 1))


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", {320}), ("float32", {291, 292, 293})])
def test_padding_depends_on_the_compute_dtype(tiny_base, dtype, rows, monkeypatch):
    monkeypatch.setattr(trainable_model, "small_padding", lambda count: 0)
    model = TrainableModel(tiny_base, dtype)
    seen = set()
    model.tree.model.layers[0].register_forward_pre_hook(lambda module, given: seen.add(len(given[0])))
    for count in (291, 292, 293):
        model.hidden(torch.arange(count) % 200, [count])
    assert seen == rows
    assert {count + small_padding(count) for count in range(1, 17)} == {8, 16}


def test_dense_and_quantized_weights_give_the_same_states(tiny_base):
    ids, lengths = sequences(4, [3, 5])
    with torch.no_grad():
        kept = TrainableModel(tiny_base, "float32").hidden(ids, lengths)
        codes = TrainableModel(tiny_base, "float32", max_dense=0).hidden(ids, lengths)
    assert torch.allclose(kept, codes, atol=2e-5)
    assert TrainableModel(tiny_base, "float32", max_dense=0).nbytes < TrainableModel(tiny_base, "float32").nbytes


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t: avx512f avx512_vnni avx512_bf16", "bfloat16"),
        ("Features\t: asimd bf16", "bfloat16"),
        ("flags\t: avx2 avx512f avx512_vnni", "float32"),
        ("", "float32"),
    ],
)
def test_the_compute_dtype_is_bfloat16_where_the_processor_has_instructions(
    flags, dtype, tiny_base, tmp_path, monkeypatch
):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: some bf16 processor\n{flags}\n")
    monkeypatch.setattr(cpu_info, "CPUINFO", file)
    model = TrainableModel(tiny_base)
    assert model.metadata["compute_dtype"] == dtype
    assert {w.dtype for name, w in model.tree.named_parameters() if "proj" in name} == {getattr(torch, dtype)}
    assert TrainableModel(tiny_base, "bfloat16").metadata["compute_dtype"] == "bfloat16"


@pytest.mark.parametrize("max_dense", [0, 1 << 30])
def test_gradients_reach_the_first_layer_after_an_evaluation(max_dense, tiny_base):
    ids, lengths = sequences(5, [4, 6, 2])
    model = TrainableModel(tiny_base, "float32", max_dense=max_dense)
    layers.inject(model.tree, LoraSpec(rank=2, targets=("q_proj",)), seed=1)
    examples = tuple(Example(tuple(p.tolist()), (False,) * 3 + (True,) * (len(p) - 3)) for p in ids.split(lengths))

    def gradient():
        model.tree.zero_grad()
        training._loss_and_backward(model, *training._forward(model, examples), scale=0.1)
        return model.tree.model.layers[0].self_attn.q_proj.lora_B.grad.clone()

    before = gradient()
    training.evaluate_loss(model, Tokens(examples))
    assert before.abs().max() > 0 and torch.equal(before, gradient())


def test_activation_checkpointing_with_dropout_gives_the_same_adapter(tiny_base):
    ids, lengths = sequences(5, [4, 6, 2])
    examples = tuple(Example(tuple(p.tolist()), (False,) * 3 + (True,) * (len(p) - 3)) for p in ids.split(lengths))
    results = []
    for on in (False, True):
        model = TrainableModel(tiny_base, "float32")
        config = training.TrainingConfig(epochs=3, batch_size=2, lora_dropout=0.1, activation_checkpointing=on)
        results.append(training.train(model, Tokens(examples), config).digest)
    assert results[0] == results[1]


def test_positions_of_tails_continue_the_prefix():
    tails = PrefixAttention(2, [1, 3])
    assert tails.positions.tolist() == [0, 1, 2, 2, 3, 4]


def test_tails_of_similar_length_are_batched():
    assert group_by_length([10, 9, 5]) == [[10, 9, 5]]
    assert group_by_length([10, 9, 2, 1]) == [[10, 9, 2], [1]]
    assert group_by_length([400, 300, 20]) == [[400], [300], [20]]


def test_the_output_table_stays_float32(tiny_base):
    states = torch.randn(3, tiny_base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept, codes = TrainableModel(tiny_base).logits(states), TrainableModel(tiny_base, max_dense=0).logits(states)
    assert kept.dtype == torch.float32 and torch.allclose(kept, codes, atol=1e-5)
