"""The base as a model to train: sequences that share a prefix, kept and not kept weights, gradients against PEFT."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from adapters import layers, training
from adapters.data import Chat, Completion, Example, Pair, Tokens
from adapters.errors import InvalidData
from adapters.layers import LoraSpec
from server.jobs import prefix_attention, trainable_model
from server.jobs.encoding import Template, encoder
from server.jobs.prefix_attention import PrefixAttention, alike
from server.jobs.trainable_model import TrainableModel, few_odd_rows, filling, shared_prefix
from server.kernels import cpu_info
from server.model.attention import Context, PackedAttention
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import from_gguf


def sequences(prefix: int, tails: list[int], seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    draw = torch.Generator().manual_seed(seed)
    head = torch.randint(3, 200, (prefix,), generator=draw)
    parts = []
    for i, n in enumerate(tails):
        tail = torch.randint(3, 200, (n,), generator=draw)
        tail[0] = 210 + i  # so that they share no more than the prefix
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
    monkeypatch.setattr(prefix_attention, "SHORT", 12)
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


def test_batches_are_filled_to_few_numbers_of_rows():
    """Each of which oneDNN keeps kernels for."""
    whole = [rows + filling(rows) for rows in range(1, 2049)]
    assert len(set(whole)) <= 48
    assert all(rows <= found < rows + max(16, rows / 7) for rows, found in enumerate(whole, 1))


@pytest.mark.parametrize(("dtype", "rows"), [("bfloat16", {320}), ("float32", {291, 292, 293})])
def test_rows_that_are_computed_for_nothing_are_few_where_kernels_know_none(tiny_base, dtype, rows, monkeypatch):
    monkeypatch.setattr(trainable_model, "few_odd_rows", lambda count: 0)
    model = TrainableModel(tiny_base, dtype)
    seen = set()
    model.tree.model.layers[0].register_forward_pre_hook(lambda module, given: seen.add(len(given[0])))
    for count in (291, 292, 293):
        model.hidden(torch.arange(count) % 200, [count])
    assert seen == rows
    assert {count + few_odd_rows(count) for count in range(1, 17)} == {8, 16}


def test_kept_weights_are_the_dequantized_codes(tiny_base):
    ids, lengths = sequences(4, [3, 5])
    with torch.no_grad():
        kept = TrainableModel(tiny_base, "float32").hidden(ids, lengths)
        codes = TrainableModel(tiny_base, "float32", kept=0).hidden(ids, lengths)
    assert torch.allclose(kept, codes, atol=2e-5)
    assert TrainableModel(tiny_base, "float32", kept=0).nbytes < TrainableModel(tiny_base, "float32").nbytes


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags\t: avx512f avx512_vnni avx512_bf16", "bfloat16"),
        ("Features\t: asimd bf16", "bfloat16"),
        ("flags\t: avx2 avx512f avx512_vnni", "float32"),
        ("", "float32"),
    ],
)
def test_a_tree_computes_in_what_the_processor_multiplies_in(flags, dtype, tiny_base, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nmodel name\t: some bf16 processor\n{flags}\n")
    monkeypatch.setattr(cpu_info, "CPUINFO", file)
    model = TrainableModel(tiny_base)
    assert model.metadata["compute_dtype"] == dtype
    assert {w.dtype for name, w in model.tree.named_parameters() if "proj" in name} == {getattr(torch, dtype)}
    assert TrainableModel(tiny_base, "bfloat16").metadata["compute_dtype"] == "bfloat16", "whoever asks for it has it"


@pytest.mark.parametrize("kept", [0, 1 << 30])
def test_gradients_reach_the_first_layer_also_after_an_evaluation(kept, tiny_base):
    """bitsandbytes loses the base's gradient after an evaluation on a CPU; here it is bit for bit the same."""
    ids, lengths = sequences(5, [4, 6, 2])
    model = TrainableModel(tiny_base, "float32", kept=kept)
    layers.inject(model.tree, LoraSpec(rank=2, targets=("q_proj",)), seed=1)
    examples = tuple(Example(tuple(p.tolist()), (False,) * 3 + (True,) * (len(p) - 3)) for p in ids.split(lengths))

    def gradient():
        model.tree.zero_grad()
        training._loss_and_backward(model, *training._forward(model, examples), scale=0.1)
        return model.tree.model.layers[0].self_attn.q_proj.lora_B.grad.clone()

    before = gradient()
    training.evaluate_loss(model, Tokens(examples))
    assert before.abs().max() > 0 and torch.equal(before, gradient())


def test_activation_checkpointing_changes_nothing(tiny_base):
    ids, lengths = sequences(5, [4, 6, 2])
    examples = tuple(Example(tuple(p.tolist()), (False,) * 3 + (True,) * (len(p) - 3)) for p in ids.split(lengths))
    results = []
    for on in (False, True):
        model = TrainableModel(tiny_base, "float32")
        config = training.TrainingConfig(epochs=3, batch_size=2, lora_dropout=0.1, activation_checkpointing=on)
        results.append(training.train(model, Tokens(examples), config).digest)
    assert results[0] == results[1]


def test_pairs_learn_the_answer_and_the_end(tiny_vocabulary):
    text = ModelTokenizer(tiny_vocabulary)
    ids, learned = encoder(text, Template("Say {input}!"), 100)(Pair(1, "this", "and that"))
    asked = text.encode_task("Say {input}!", "chat", None, "this")
    assert ids[: len(asked)] == asked and ids[-1] == text.end_of_turn
    assert not any(learned[: len(asked)]) and all(learned[len(asked) :])
    assert text.decode(ids[len(asked) : -1]) == "and that"


def test_completions_and_chats(tiny_vocabulary):
    text = ModelTokenizer(tiny_vocabulary)
    encode = encoder(text, Template(), 100)
    ids, learned = encode(Completion(1, "def f():", " pass"))
    assert text.decode([i for i, on in zip(ids, learned, strict=True) if on][:-1]) == " pass"
    turns = (
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two", "weight": 0},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    )
    ids, learned = encode(Chat(1, turns))
    assert text.decode([i for i, on in zip(ids, learned, strict=True) if on][:-1]) == "four"
    assert ids[: len(text.encode_chat(turns[:1]))] == text.encode_chat(turns[:1])


def test_of_a_chat_that_is_too_long_no_more_is_rendered_than_shows_that(tiny_vocabulary, monkeypatch):
    """Each answer has all before it rendered anew: of thousands that would be hours."""
    text = ModelTokenizer(tiny_vocabulary)
    turns = tuple({"role": role, "content": "one"} for _ in range(50) for role in ("user", "assistant"))
    whole, learned = encoder(text, Template(), 10_000)(Chat(1, turns))
    rendered: list[int] = []
    encode_chat = text.encode_chat
    monkeypatch.setattr(text, "encode_chat", lambda messages: rendered.append(len(messages)) or encode_chat(messages))
    ids, begun = encoder(text, Template(), len(whole) // 10)(Chat(1, turns))
    assert len(ids) > len(whole) // 10 and (ids, begun) == (whole[: len(ids)], learned[: len(ids)])
    assert any(begun) and max(rendered) < 15
    rendered.clear()
    assert encoder(text, Template(), len(whole))(Chat(1, turns))[0] == whole and len(rendered) == 50


def test_a_chat_goes_on_as_its_template_writes_it(spm_metadata):
    """A tokenizer of SentencePiece's kind puts a space before a text, and none where an answer begins amid one."""
    template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant>\n' }}{% endif %}"
    )
    text = ModelTokenizer(from_gguf(spm_metadata | {"tokenizer.chat_template": template}))
    turns = tuple(
        {"role": role, "content": content}
        for role, content in [("user", "one"), ("assistant", "the other"), ("user", "this"), ("assistant", "that")]
    )
    ids, learned = encoder(text, Template(), 100)(Chat(1, turns))
    written = text.encode_chat(turns, generation_prompt=False)
    assert ids == written[: len(ids)] and ids[-1] == text.end_of_turn
    assert [text.token_text(i) for i, on in zip(ids, learned, strict=True) if on][:2] == ["the", " other"]


def test_a_template_that_rewrites_history_is_refused(tiny_vocabulary):
    import dataclasses

    odd = "{% for m in messages %}{{ m['role'] + loop.revindex|string + m['content'] }}{% endfor %}"
    text = ModelTokenizer(dataclasses.replace(tiny_vocabulary, chat_template=odd))
    turns = tuple({"role": r, "content": "x"} for r in ("user", "assistant", "user", "assistant"))
    with pytest.raises(InvalidData, match="line 7"):
        encoder(text, Template(), 100)(Chat(7, turns))


def test_answers_of_weight_0_are_history_however_the_template_writes_them(tiny_vocabulary):
    import dataclasses

    odd = (
        "{% for m in messages %}{{ m['role'] + ' ' + m['content'] | trim + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
    )
    text = ModelTokenizer(dataclasses.replace(tiny_vocabulary, chat_template=odd))

    def turns(weight: int) -> tuple[dict[str, Any], ...]:
        return (
            {"role": "assistant", "content": "Hello there.\n", "weight": weight},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": "  two\n", "weight": weight},
            {"role": "user", "content": "three"},
            {"role": "assistant", "content": "four"},
        )

    encode = encoder(text, Template(), 100)
    told = "before message 3 has other tokens .* than message 1 is learned in; .* those before it at weight 0"
    with pytest.raises(InvalidData, match=told):
        encode(Chat(7, turns(1)))
    ids, learned = encode(Chat(7, turns(0)))
    asked = text.encode_chat([{k: v for k, v in turn.items() if k != "weight"} for turn in turns(0)[:-1]])
    assert ids[: len(asked)] == asked and learned == [False] * len(asked) + [True] * (len(ids) - len(asked))
    assert text.decode(ids[len(asked) : -1]) == "four" and ids[-1] == text.end_of_turn


def test_an_answer_of_a_chat_is_learned_after_the_prompt_that_a_server_sends(tiny_vocabulary):
    """Though its first spaces would share a token with the end of that, which is not tokenized again."""
    import dataclasses

    letters = {"<end>": 0, "a": 1, "b": 2, " ": 3, "\n": 4, "\n ": 5}
    merging = Tokenizer(models.BPE(letters, [("\n", " ")]))
    merging.decoder = decoders.ByteFallback()
    template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    text = ModelTokenizer(
        dataclasses.replace(
            tiny_vocabulary, tokenizer=merging, chat_template=template, eos_ids=frozenset({0}), eos_id=0,
            special={"<end>": 0}, bos_id=None, add_bos=False, names={},
        )
    )  # fmt: skip
    encode = encoder(text, Template(), 100)
    assert encode(Pair(1, "a", " b")) == ([1, 4, 3, 2, 0], [False, False, True, True, True])
    assert encode(Chat(1, ({"role": "user", "content": "a"}, {"role": "assistant", "content": " b"})))[0] == [
        1,
        4,
        3,
        2,
        0,
    ]
    raw = encoder(text, Template(format="raw"), 100)
    assert raw(Pair(1, "a\n", " b"))[0] == [1, 5, 2, 0], "as PEFT users do, where the prompt is one's own"


def test_the_mask_of_padded_tails():
    tails = PrefixAttention(2, [1, 3])
    assert tails.positions.tolist() == [0, 1, 2, 2, 3, 4]


def test_tails_of_like_length_are_padded_together():
    assert alike([10, 9, 5]) == [[10, 9, 5]]
    assert alike([10, 9, 2, 1]) == [[10, 9, 2], [1]]
    assert alike([400, 300, 20]) == [[400], [300], [20]]


def test_the_stored_output_table_is_kept_in_float32_where_there_is_room(tiny_base):
    states = torch.randn(3, tiny_base.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept, codes = TrainableModel(tiny_base).logits(states), TrainableModel(tiny_base, kept=0).logits(states)
    assert kept.dtype == torch.float32 and torch.allclose(kept, codes, atol=1e-5)
