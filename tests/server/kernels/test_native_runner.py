"""The native runner on tiny random models: close to the reference runner, and bit-equal to itself in any batch."""

from __future__ import annotations

import resource
from ctypes import CDLL
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from adapters.weights import LoraWeights, LowRank
from server.engine.backends import make_runner
from server.engine.backends.cpu.runner import _Results
from server.engine.backends.protocol import Runner
from server.engine.batch import Batch, Logits
from server.kernels import choose, cpu
from server.kernels.cpu import bindings
from server.kernels.lora import SlotWeights
from server.kernels.packed_format import dequantize_stored
from server.model.config import RopeScaling
from server.model.quantization import quantize
from tests.conftest import part_missing
from tests.server.kernels import tiny
from tests.server.kernels.conftest import runs, same_bits
from tests.server.kernels.tiny import BLOCK, Sequence, Tiny, adapter, batch_of, codes_of, error, llama, random_tokens

pytestmark = pytest.mark.skipif(cpu.unavailable() is not None, reason=f"native kernels: {cpu.unavailable()}")

SLOTS = 16
RANKS = [1, 2, 3, 4, 7, 8, 16, 17, 32, 64]
WIDTHS: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
FAMILIES: dict[str, tuple[dict[str, Any], str, int, bool]] = {
    "llama-int4": ({}, "int4", 32, False),
    "llama-double": ({}, "int4", 32, True),
    "llama-nf4": ({"hidden_size": 128, "intermediate_size": 192}, "nf4", 64, True),
    "llama-bf16": ({}, "none", 0, False),
    "untied": ({"tie_word_embeddings": False}, "int4", 32, False),
    "wide-table": ({"vocab_size": 391}, "int4", 32, False),
    "qwen2": ({"attention_bias": True, "output_bias": True, "mlp_bias": True}, "int4", 32, False),
    "qwen3": ({"qk_norm": True, "head_dim": 64}, "int4", 32, False),
    "smollm3": ({"no_rope_layers": (1, 0, 1)}, "int4", 32, False),
    "odd-heads": ({"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 4}, "none", 0, False),
    "odd-widths": ({"hidden_size": 72, "intermediate_size": 100, "head_dim": 18}, "none", 0, False),
    "one-kv-head": ({"num_key_value_heads": 1, "num_attention_heads": 9, "head_dim": 64}, "int4", 32, False),
    "odd-kv": ({"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1}, "int4", 32, False),
    "every-head": ({"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 4}, "int4", 32, False),
    "four-heads": ({"head_dim": 160, "num_attention_heads": 4, "num_key_value_heads": 1}, "int4", 32, False),
    "large-eps": ({"rms_norm_eps": 0.5, "qk_norm": True, "head_dim": 64}, "int4", 32, False),
    "yarn": (
        {"rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=128)},
        "int4",
        32,
        False,
    ),
    "yarn-stretched": (
        {
            "rope_scaling": RopeScaling("yarn", 4.0, original_max_position_embeddings=128),
            "max_position_embeddings": 128,
        },
        "int4",
        32,
        False,
    ),
}


def bases(family: str) -> tuple[Tiny, Tiny]:
    """The same stored weights, packed natively and as the reference has them."""
    changes, scheme, group, double = FAMILIES[family]
    config = llama(**{**WIDTHS, **changes})
    table = "none" if config.hidden_size % 32 else "int8"
    return tiny.bases(config, scheme, group or 64, double, table, choose("native"), choose("reference"))


def runner_of(base: Tiny, threads: int = 2, blocks: int = 128) -> Runner:
    runner = make_runner(base, SLOTS, threads)
    runner.allocate(blocks, BLOCK)
    return runner


def place_all(runner: Runner, base: Tiny, adapters: dict[int, LoraWeights]) -> None:
    for slot, weights in adapters.items():
        runner.load_adapter(slot, base.prepare(weights))


def step(runner: Runner, new: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
    """Run `count` more tokens of each sequence: the logits [count, vocab] of each."""
    logits = runner.run(batch_of(new))
    assert logits.largest.tolist() == Logits(logits.rows).largest.tolist()
    return list(logits.rows.split([count for _, count in new]))


def tokens(seed: int, count: int) -> list[int]:
    return random_tokens(llama(**WIDTHS), seed, count)


def alone(runner: Runner, ids: list[int], mix: SlotWeights = (), first_block: int = 100) -> torch.Tensor:
    """Logits of every token, the sequence in one step by itself."""
    needed = -(-len(ids) // BLOCK)
    return step(runner, [(Sequence(ids, list(range(first_block, first_block + needed)), mix), len(ids))])[0]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_to_the_reference(family: str) -> None:
    native, reference = bases(family)
    ours, exact = runner_of(native), runner_of(reference)
    for count in (1, 3, 17, 300):
        ids = tokens(count, count)
        assert error(alone(ours, ids), alone(exact, ids)) < 0.04, count


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16", "qwen2", "odd-widths", "odd-kv"])
def test_adapters_of_all_ranks_share_a_batch(family: str) -> None:
    """Ranks from 1 to 64, rows without an adapter, mixes, weights of -1, 0 and 2, prefills beside decodes."""
    native, reference = bases(family)
    targets = [(), ("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "up_proj"), ("o_proj", "k_proj")]
    adapters = {i: adapter(native.config, i, rank, targets[i % len(targets)]) for i, rank in enumerate(RANKS)}
    mixes: list[SlotWeights] = [((i, weight),) for i, weight in enumerate([1.0, -1.0, 2.0, 0.5, 1.0, -1.0, 2.0, 1.0])]
    mixes += [(), ((8, 0.0),), ((9, 0.7), (0, -1.0), (5, 2.0)), ((8, 1.0), (9, 0.3)), ()]
    lengths = [1, 3, 17, 40, 1, 1, 2, 33, 5, 6, 20, 1, 1]
    results = []
    for base in (native, reference):
        runner = runner_of(base)
        place_all(runner, base, adapters)
        sequences = [
            Sequence(tokens(i, length + 1), list(range(i * 4, i * 4 + 4)), mix)
            for i, (length, mix) in enumerate(zip(lengths, mixes, strict=True))
        ]
        first = step(runner, [(s, n) for s, n in zip(sequences, lengths, strict=True)])
        second = step(runner, [(s, 1) for s in sequences])
        results.append([torch.cat(pair) for pair in zip(first, second, strict=True)])
    for i, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert error(ours, exact) < 0.05, (i, mixes[i])


@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16", "odd-heads"])
def test_processors_without_bf16_have_the_same_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the order of sums, whose pairs other processors add up together. Rows that overflow say so in both."""
    weights = {"": 0.0, "adapter": 1.0, "overflow": 3e38}
    ids, found = tokens(5, 65), []
    for name in ("_native_bf16", "_native"):
        try:
            library = bindings.load(name)
        except OSError as e:  # an older compiler builds one of them
            part_missing(f"{name}: {e}")
        if library.loramux_missing() is not None:
            pytest.skip("this processor has no bf16 to compare with")
        monkeypatch.setattr(bindings, "library", lambda library=library: library)
        monkeypatch.setattr(cpu, "_pools", [])
        base, _ = bases(family)
        runner = runner_of(base)
        place_all(runner, base, {0: adapter(base.config, 1, 17)})
        found.append([alone(runner, ids, ((0, weight),)) for weight in weights.values()])
    for which, ours, other in zip(weights, *found, strict=True):
        if which == "overflow":
            assert torch.equal(ours.isfinite(), other.isfinite()) and not ours.isfinite().all()
        else:
            assert error(ours, other) < 0.004, which


@pytest.mark.parametrize(
    "family",
    ["llama-int4", "llama-double", "llama-nf4", "llama-bf16", "qwen3", "odd-heads", "odd-widths"],
)
def test_vectors_of_half_the_size_give_the_same_bits(
    both_sizes: tuple[CDLL, CDLL], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, steps and adapters of all ranks, by eight rows a walk and by four, and rows that overflow."""
    lengths, found = [65, 1, 20, 7, 3, 1, 2, 9, 4, 30], []
    whole, halves = both_sizes
    for library in (whole, halves, halves):
        monkeypatch.setattr(bindings, "library", lambda library=library: library)
        monkeypatch.setattr(cpu, "_pools", [])
        usual = library.loramux_by_eight(len(found) == 2)
        try:
            base, _ = bases(family)
            runner = runner_of(base)
            place_all(runner, base, {i: adapter(base.config, i, rank) for i, rank in enumerate(RANKS)})
            mixes: list[SlotWeights] = [((i, (-1.0, 2.0, 1.0, 0.0)[i % 4]),) for i in range(len(RANKS))]
            mixes[1], mixes[4] = ((0, 3e38),), ((6, 0.5), (9, -1.0))
            sequences = [
                Sequence(tokens(i, n + 1), list(range(i * 8, i * 8 + 8)), mixes[i]) for i, n in enumerate(lengths)
            ]
            first = step(runner, list(zip(sequences, lengths, strict=True)))
            second = step(runner, [(s, 1) for s in sequences])
        finally:
            library.loramux_by_eight(usual)
        found.append(torch.cat([*first, *second]).numpy())
    assert np.isnan(found[0]).any() and np.isfinite(found[0]).any()
    for ours in found[1:]:
        assert same_bits(ours, found[0])


def close_in_one_step(
    native: Tiny, reference: Tiny, adapters: dict[int, LoraWeights], mixes: list[SlotWeights], lengths: list[int]
) -> None:
    """A sequence of each length, 32 at most, with its mix: close to the reference, and bit for bit as it is alone."""
    results = []
    for base in (native, reference):
        runner = runner_of(base)
        place_all(runner, base, adapters)
        sequences = [Sequence(tokens(i, n), [i * 2, i * 2 + 1], mixes[i]) for i, n in enumerate(lengths)]
        results.append(step(runner, list(zip(sequences, lengths, strict=True))))
        if base is native:
            for sequence, ours in zip(sequences, results[0], strict=True):
                assert torch.equal(alone(runner, sequence.tokens, sequence.mix), ours)
    for i, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert error(ours, exact) < 0.05, (i, mixes[i])


@pytest.mark.parametrize(
    "uneven", ["q_proj", "self_attn.o_proj", "gate_proj", "down_proj", "layers.1.mlp", "embed_tokens", "proj"]
)
def test_matrices_that_are_too_uneven_for_the_matrix_unit_share_a_model_with_others(uneven: str) -> None:
    """Activations are wanted in two forms then. Where there is no such unit, all are multiplied in one way."""
    native, reference = bases("llama-int4")
    for path, weight in native.weights.items():
        if uneven in path:
            rest = {name: tensor for name, tensor in weight.tensors.items() if name != "fineness"}
            native.weights[path] = replace(weight, tensors=rest)
    adapters = {i: adapter(native.config, i, 8 + i) for i in range(3)}
    mixes: list[SlotWeights] = [(), ((0, 1.0),), ((1, -0.5), (2, 1.0)), ()]
    close_in_one_step(native, reference, adapters, mixes, [5, 1, 20, 2])


@pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no matrix unit")
def test_steps_have_bytes_of_weights_where_no_scale_is_negative() -> None:
    native, reference = bases("llama-int4")
    ids = tokens(5, 40)
    exact, by_bytes = alone(runner_of(reference), ids), alone(runner_of(native), ids)
    for path, weight in native.weights.items():
        kept = {name: tensor for name, tensor in weight.tensors.items() if name != "rising"}
        native.weights[path] = replace(weight, tensors=kept)
    assert error(alone(runner_of(native), ids), exact) < error(by_bytes, exact) / 2


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [1, 3, 17, 300])
@pytest.mark.parametrize("family", ["llama-int4", "llama-nf4", "odd-widths", "odd-kv"])
def test_steps_of_one_to_many_rows(family: str, rows: int) -> None:
    """All ranks in a step as far as its rows go, weights of -1, 0 and 2: close to the reference, and each sequence bit
    for bit as it is alone."""
    native, reference = bases(family)
    adapters = {i: adapter(native.config, i, rank) for i, rank in enumerate(RANKS)}
    mixes: list[SlotWeights] = [((i, (-1.0, 2.0, 1.0, 0.0)[i % 4]),) for i in range(len(RANKS))]
    mixes += [(), ((6, 2.0), (3, -1.0)), ((9, 1.0),)]
    count = min(rows, len(mixes))
    lengths = [rows * (i + 1) // count - rows * i // count for i in range(count)]
    close_in_one_step(native, reference, adapters, mixes, lengths)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("family", ["llama-int4", "llama-nf4", "llama-bf16", "odd-kv"])
def test_a_mix_of_all_ranks_on_few_rows(family: str, rows: int) -> None:
    native, reference = bases(family)
    adapters = {i: adapter(native.config, i, rank) for i, rank in enumerate(RANKS)}
    mix = tuple((i, (2.0, -1.0, 0.5, 0.0)[i % 4] * 0.25) for i in range(len(RANKS)))
    close_in_one_step(native, reference, adapters, [mix] * rows, [1] * rows)


@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16"])
def test_mixes_that_begin_alike_or_differ_in_a_weight_alone_are_kept_apart(family: str) -> None:
    native, reference = bases(family)
    adapters = {i: adapter(native.config, i, 4 + i) for i in range(3)}
    mixes: list[SlotWeights] = [
        ((0, 1.0),),
        ((0, 1.0), (1, 1.0)),
        ((0, 1.0), (2, 1.0)),
        ((0, 1.0), (2, 0.5)),
        ((0, 0.5), (2, 1.0)),
        ((0, 1.0), (1, 1.0), (2, 1.0)),
    ]
    close_in_one_step(native, reference, adapters, mixes, [5, 1, 2, 9, 3, 1])


def test_an_adapter_changes_what_it_should_and_no_more() -> None:
    native, reference = bases("llama-bf16")
    ours, exact = runner_of(native), runner_of(reference)
    ids = tokens(5, 40)
    plain = alone(ours, ids)
    for base, runner in ((native, ours), (reference, exact)):
        place_all(runner, base, {0: adapter(native.config, 1, 8, size=2.0)})
    assert error(alone(ours, ids, ((0, 1.0),)), plain) > 0.3
    assert error(alone(ours, ids, ((0, 1.0),)), alone(exact, ids, ((0, 1.0),))) < 0.03
    assert torch.equal(alone(ours, ids, ((0, 0.0),)), plain)
    assert torch.equal(alone(ours, ids), plain)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "family", ["llama-int4", "llama-nf4", "llama-bf16", "qwen3", "odd-heads", "one-kv-head", "every-head", "four-heads"]
)
def test_a_row_does_not_depend_on_its_batch(family: str) -> None:
    """Bit for bit: alone or among others, at any place, in any chunks, blocks, slots and number of threads."""
    native, _ = bases(family)
    adapters = [adapter(native.config, i, rank) for i, rank in enumerate([8, 17, 1, 64])]
    runner = runner_of(native)
    place_all(runner, native, dict(enumerate(adapters)))
    ids, mix = tokens(1, 77), ((0, 1.0), (1, -1.0))
    expected = alone(runner, ids, mix)

    # among neighbours that differ in length, mix and slots, first in chunks, then token by token
    for place, chunks in ((0, [30, 30, 1, 1, 15]), (2, [1, 2, 3, 64, 7]), (1, [77])):
        others = [
            Sequence(tokens(20, 90), [3, 1, 9, 40, 41, 42], ((3, 0.5),)),
            Sequence(tokens(21, 300), list(range(60, 80)), ((0, 2.0), (2, 1.0))),
        ]
        subject = Sequence(ids, [99, 12, 55, 13, 98], mix)
        seen = []
        for count in chunks:
            batch = [(other, 300 // len(chunks) // 4) for other in others]
            batch.insert(place, (subject, count))
            seen.append(step(runner, batch)[place])
        assert torch.equal(torch.cat(seen), expected), (place, chunks)

    # another number of threads, the adapters in other slots
    for threads in (1, 3):
        other = runner_of(native, threads)
        place_all(other, native, {9: adapters[0], 2: adapters[1]})
        assert torch.equal(alone(other, ids, ((9, 1.0), (2, -1.0)), first_block=17), expected)

    # beginning behind a prefix that another sequence left in its blocks
    first = Sequence(ids[:64], [30, 31, 32, 33], mix)
    step(runner, [(first, 64)])
    behind = Sequence(ids, [30, 31, 32, 33, 50], mix, done=64)
    assert torch.equal(step(runner, [(behind, 13)])[0], expected[64:])


@pytest.mark.usefixtures("library")
def test_nor_where_products_are_too_small_to_be_normal_numbers() -> None:
    """Values of 1e-37, shared out among 77 tokens and made large again: the matrix unit takes denormals for 0."""
    native, plain = bases("llama-bf16")
    factors = {"v_proj": 1e-37, "o_proj": 1e36}
    weights = {
        path: native.backend.pack(quantize(dequantize_stored(weight) * factors[path.rsplit(".", 1)[-1]], "none", 64))
        for path, weight in plain.weights.items()
        if path.endswith(tuple(factors))
    }
    small = replace(native, weights=native.weights | weights)
    runner, ids = runner_of(small), tokens(1, 77)
    expected = alone(runner, ids)
    assert not torch.equal(expected, alone(runner_of(native), ids))
    subject = Sequence(ids, [99, 12, 55, 13, 98])
    assert torch.equal(torch.cat([step(runner, [(subject, 1)])[0] for _ in ids]), expected)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "odd-kv", "odd-widths", "every-head", "four-heads"])
@pytest.mark.parametrize("size", [32, 48, 256])
def test_nor_on_the_size_of_blocks(family: str, size: int) -> None:
    native, _ = bases(family)
    ids = tokens(1, 300)
    other = make_runner(native, SLOTS, 2)
    other.allocate(20, size)
    subject = Sequence(ids, [11, 3, 19, 0, 7, 8, 2, 16, 5, 12])
    beside = Sequence(tokens(2, 90), [1, 13, 4])
    seen = [step(other, [(beside, 20), (subject, count)])[1] for count in (37, 1, 10, 252)]
    assert torch.equal(torch.cat(seen), alone(runner_of(native), ids))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16", "odd-widths"])
def test_rows_that_threads_take_alone_give_the_same(family: str) -> None:
    """Bit for bit those of one thread: of sequences with one row or some, and where one is too long to be dealt out."""
    native, _ = bases(family)
    adapters = {i: adapter(native.config, i, rank) for i, rank in enumerate([8, 17, 1, 64])}
    mixes: list[SlotWeights] = [(), ((0, 1.0),), ((1, -1.0), (3, 0.5)), ((2, 2.0),), ((3, 1.0), (0, 0.0))]
    lengths = [5 + 7 * i % 31 for i in range(24)]
    seen: dict[int, list[list[torch.Tensor]]] = {}
    for threads in (1, 2, 3):
        runner = runner_of(native, threads, blocks=160)
        place_all(runner, native, adapters)
        sequences = [
            Sequence(tokens(i, length + 8), list(range(i * 3, i * 3 + 3)), mixes[i % 5])
            for i, length in enumerate(lengths)
        ]
        long = Sequence(tokens(99, 460), list(range(100, 130)))
        prompts = step(runner, list(zip(sequences, lengths, strict=True)))
        step(runner, [(long, 450)])
        before = runner.nbytes()["activations"]
        steps = [prompts, step(runner, [(s, 1) for s in sequences])]
        # A thread alone has room of its own, and the one that there is needs none for rows that were more before.
        assert (runner.nbytes()["activations"] > before) == (threads > 1)
        steps.append(step(runner, [(s, 1 + i % 3) for i, s in enumerate(sequences)]))
        steps.append(step(runner, [*((s, 1) for s in sequences), (long, 9)]))
        seen[threads] = steps
    for threads in (2, 3):
        for ours, one in zip(seen[threads], seen[1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, one, strict=True))


def steps_apart(runner: Runner) -> int:
    """Steps so far in which each thread took rows alone."""
    return int(bindings.library().loramux_model_apart(runner._model))  # type: ignore[attr-defined]


def test_threads_take_rows_alone_in_every_other_step_until_it_is_known_what_is_quicker() -> None:
    """Separately for every 16 rows, and the same is computed either way."""
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    sequences = [Sequence(tokens(i, 11), [i]) for i in range(16)]
    step(runner, [(s, 5) for s in sequences])

    for count in (1, 2, 3):
        batch, before = batch_of([(s, count) for s in sequences]), steps_apart(runner)
        first = runner.run(batch).rows
        for turn in range(1, 50):
            assert steps_apart(runner) - before == (turn + 1) // 2
            assert torch.equal(runner.run(batch).rows, first)
        before = steps_apart(runner)
        for _ in range(10):
            assert torch.equal(runner.run(batch).rows, first)
        assert steps_apart(runner) - before in (0, 10)


@pytest.mark.parametrize(("rows", "alike"), [(32, 17), (48, 33), (256, 241)])
def test_whether_threads_take_rows_alone_is_found_for_sixteen_rows_together(rows: int, alike: int) -> None:
    """From one more than a multiple of 16 to the next one."""
    native, _ = bases("llama-int4")
    runner = runner_of(native)

    def batch(count: int) -> Batch:
        each, more = divmod(count, 16)
        return batch_of([(Sequence(tokens(i, 17), [2 * i, 2 * i + 1]), each + (i < more)) for i in range(16)])

    def apart(of: Batch, times: int) -> int:
        before = steps_apart(runner)
        for _ in range(times):
            runner.run(of).wait()
        return steps_apart(runner) - before

    assert apart(batch(rows), 50) == 25
    assert apart(batch(alike), 10) in (0, 10)
    assert apart(batch(alike - 1), 10) == 5


def test_less_is_asked_for_ahead_in_every_other_step_until_it_is_known_what_is_quicker() -> None:
    """After threads took turns, and the same is computed either way. Where little is asked for there is one way."""
    native, _ = bases("llama-int4")
    for path, weight in native.weights.items():  # products are by vector instructions, whatever the processor
        rest = {name: tensor for name, tensor in weight.tensors.items() if name != "fineness"}
        native.weights[path] = replace(weight, tensors=rest)
    runner = runner_of(native)
    sequences = [Sequence(tokens(i, 60), list(range(4 * i, 4 * i + 4))) for i in range(16)]
    step(runner, [(s, 59) for s in sequences])
    batch = batch_of([(s, 1) for s in sequences])
    first = runner.run(batch).rows
    for _ in range(49):
        assert torch.equal(runner.run(batch).rows, first)

    def sparing() -> int:
        return int(bindings.library().loramux_model_sparing(runner._model))  # type: ignore[attr-defined]

    assert sparing() == 0
    for turn in range(50):
        assert torch.equal(runner.run(batch).rows, first)
        assert sparing() == (turn + 1) // 2
    before = sparing()
    for _ in range(10):
        assert torch.equal(runner.run(batch).rows, first)
    assert sparing() - before in (0, 10)
    before = sparing()
    short = batch_of([(Sequence(tokens(1, 2), [70]), 2)])
    for _ in range(20):
        runner.run(short)
    assert sparing() == before


def fresh_and_used(count: int) -> tuple[Runner, Runner]:
    """Two runners; in the first blocks of the second `count` tokens have left keys and values that are not finite."""
    native, _ = bases("llama-int4")
    fresh, used = runner_of(native), runner_of(native)
    place_all(used, native, {0: adapter(native.config, 1, 4, size=1e30)})
    assert not alone(used, tokens(2, count), ((0, 16.0),), first_block=0).isfinite().all()
    return fresh, used


def test_what_an_earlier_owner_left_in_a_block_is_not_seen() -> None:
    fresh, used = fresh_and_used(64)
    for count in (1, 2, 15, 16, 17, 33):
        ids = tokens(3, count)
        assert torch.equal(alone(used, ids, first_block=0), alone(fresh, ids, first_block=0))


def test_nor_is_it_where_a_sequence_goes_on_in_the_next_block_of_rows() -> None:
    """256 rows go through a layer together: with one before it, the sequence's 255th is the last of them."""
    fresh, used = fresh_and_used(400)
    ids = tokens(3, 300)
    expected = alone(fresh, ids, first_block=0)
    before = Sequence(tokens(4, 1), [60])
    assert torch.equal(step(used, [(before, 1), (Sequence(ids, list(range(19))), 300)])[1], expected)


def test_scores_that_are_not_finite_are_not_hidden() -> None:
    """Values are small here: were exp of NaN a number, values times it would be finite, and over its sum zero."""
    native, _ = bases("llama-int4")
    small = {n: t * 1e-3 if n.endswith("input_layernorm.weight") else t for n, t in native.tensors.items()}
    native = replace(native, tensors=small)
    runner = runner_of(native)
    place_all(runner, native, {0: adapter(native.config, 1, 4, ("q_proj", "k_proj"), size=1e37)})
    for count in (2, 3, 20):
        logits = runner.run(batch_of([(Sequence(tokens(5, count), [0, 1], ((0, 16.0),)), count)]))
        assert not logits.rows[1:].isfinite().any(), count
        assert (logits.largest[1:] == -1).all()


def test_a_slot_that_there_is_not_is_refused() -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    prepared = native.prepare(adapter(native.config, 1, 4))
    for slot in (-1, SLOTS):
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            runner.load_adapter(slot, prepared)
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            runner.unload_adapter(slot)


def test_threads_that_the_system_does_not_start_are_an_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + (64 << 20), limits[1]))  # room for some eight stacks
    try:
        with pytest.raises(OSError, match="does not start 64 threads"):
            cpu.bindings.Pool(64)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_a_slot_is_reused_and_cleared() -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    ids = tokens(4, 9)
    one, two = adapter(native.config, 1, 8), adapter(native.config, 2, 5, ("q_proj",))
    place_all(runner, native, {0: one, 1: two})
    alone_two = alone(runner, ids, ((1, 1.0),))
    runner.unload_adapter(0)
    place_all(runner, native, {0: two})
    assert torch.equal(alone(runner, ids, ((0, 1.0),)), alone_two)


def test_only_wanted_logits_are_computed() -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    ids = tokens(6, 40)
    everything = alone(runner, ids)
    for wanted in ([39], [0, 17, 39], []):
        batch = Batch(
            np.array(ids),
            np.arange(40),
            np.array([0, 40], np.int32),
            np.array([40], np.int32),
            np.array([[7, 8, 9]], np.int32),
            np.array(wanted, np.int64),
            ((),),
        )
        assert torch.equal(runner.run(batch).rows, everything[wanted])


def test_wrong_adapters_and_blocks_are_refused() -> None:
    native, reference = bases("llama-int4")
    runner = make_runner(native, SLOTS, 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        runner.allocate(4, 8)
    with pytest.raises(ValueError, match="not prepared"):
        runner.load_adapter(0, adapter(native.config, 1, 4))
    path = "model.layers.0.self_attn.q_proj"
    wrong = LoraWeights("w", "0" * 64, {path: LowRank(torch.zeros(2, 32), torch.zeros(192, 2), 1.0)})
    with pytest.raises(ValueError, match="the module is"):
        runner.load_adapter(0, native.prepare(wrong))
    foreign = LoraWeights("f", "0" * 64, {"lm_head": LowRank(torch.zeros(2, 96), torch.zeros(97, 2), 1.0)})
    with pytest.raises(ValueError, match="no linear lm_head"):
        runner.load_adapter(0, native.prepare(foreign))
    with pytest.raises(ValueError, match="at least one thread"):
        make_runner(native, SLOTS, 0)


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "a token beyond the table": ("not of the vocabulary", {"tokens": torch.tensor([5, 97])}),
    "a token below 0": ("not of the vocabulary", {"tokens": torch.tensor([-1, 5])}),
    "a position beyond the sequence": ("a position", {"positions": torch.tensor([0, 2])}),
    "a position beyond the model's context": (
        "a position",
        {
            "positions": torch.tensor([0, 512]),
            "context": torch.tensor([513], dtype=torch.int32),
            "blocks": torch.arange(33, dtype=torch.int32)[None],
        },
    ),
    "a position below 0": ("a position", {"positions": torch.tensor([-1, 1])}),
    "a sequence beyond its blocks": ("a position", {"context": torch.tensor([17], dtype=torch.int32)}),
    "a block beyond the cache": ("a block", {"blocks": torch.tensor([[128]], dtype=torch.int32)}),
    "no block": ("a block", {"blocks": torch.tensor([[-1]], dtype=torch.int32)}),
    "logits of a row that is not there": ("a row", {"logit_rows": torch.tensor([2])}),
    "rows of no sequence": ("a row", {"row_start": torch.tensor([0, 1], dtype=torch.int32)}),
    "a first row of no sequence": ("a row", {"row_start": torch.tensor([1, 2], dtype=torch.int32)}),
    "a sequence that ends before it begins": (
        "a row",
        {
            "row_start": torch.tensor([0, 2, 1, 2], dtype=torch.int32),
            "context": torch.tensor([2, 2, 2], dtype=torch.int32),
            "blocks": torch.tensor([[0], [1], [2]], dtype=torch.int32),
            "mixes": ((), (), ()),
        },
    ),
    "rows beyond the step": (
        "a row",
        {
            "row_start": torch.tensor([0, 10**6, 2], dtype=torch.int32),
            "context": torch.tensor([2, 2], dtype=torch.int32),
            "blocks": torch.tensor([[0], [1]], dtype=torch.int32),
            "mixes": ((), ()),
        },
    ),
    "a slot that is empty": ("slot is empty", {"mixes": (((3, 1.0),),)}),
    "a slot that is not there": ("slot is empty", {"mixes": (((SLOTS, 1.0),),)}),
}


@pytest.mark.parametrize("fault", WRONG)
def test_a_step_that_points_beyond_what_is_there_is_not_run(fault: str) -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    good = batch_of([(Sequence([5, 6], [0]), 2)])
    message, change = WRONG[fault]
    with pytest.raises(AssertionError, match=message):
        runner.run(replace(good, **change)).wait()
    assert runner.nbytes()["kv_cache"] == 0
    assert torch.isfinite(runner.run(good).rows).all()


def test_a_step_before_there_is_a_cache_is_not_run() -> None:
    native, _ = bases("llama-int4")
    with pytest.raises(AssertionError, match="allocate comes before run"):
        make_runner(native, SLOTS, 1).run(batch_of([(Sequence([5], [0]), 1)])).wait()


def test_nor_is_one_after_a_cache_that_there_was_no_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    ids = tokens(1, 20)
    before = alone(runner, ids, first_block=0)

    def full(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(np, "zeros", full)
        runner.allocate(64, BLOCK)
    assert runner.nbytes()["kv_cache"] == 0
    with pytest.raises(AssertionError, match="allocate comes before run"):
        alone(runner, ids, first_block=0)
    runner.allocate(64, BLOCK)
    assert torch.equal(alone(runner, ids, first_block=0), before)


def test_bytes_are_accounted_for() -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native, blocks=32)
    held = runner.nbytes()
    layers, heads, dim = 3, 2, 32
    assert runner.block_bytes(BLOCK) == layers * BLOCK * heads * dim * 2 * 2
    assert held["kv_cache"] == 0
    assert held["base"] == sum(w.nbytes for w in native.weights.values()) + sum(
        t.nbytes for t in native.tensors.values()
    )
    alone(runner, tokens(1, 20), first_block=0)
    assert runner.nbytes()["kv_cache"] == 2 * runner.block_bytes(BLOCK)
    assert runner.nbytes()["activations"] > held["activations"]


def test_what_attention_takes_for_a_longer_context_is_foreseen() -> None:
    """Angles are there from the start; what threads attend with is as long as the longest context yet."""
    native, _ = bases("llama-int4")
    runner = make_runner(native, SLOTS, 1)
    runner.allocate(32, BLOCK)
    sequence, work = Sequence(tokens(1, 400), list(range(32))), []
    for count in (320, 80):
        step(runner, [(sequence, count)])
        work.append(runner.nbytes()["activations"])
    angles = 4 * native.config.head_dim
    assert work[1] - work[0] == runner.work_bytes(416) - runner.work_bytes(320) - 96 * angles > 0
    assert runner.work_bytes(1 << 40) == runner.work_bytes(native.config.max_position_embeddings)
    two = make_runner(native, SLOTS, 2).work_bytes(416) - 416 * angles
    assert two >= 2 * (runner.work_bytes(416) - 416 * angles), "each thread has its own"


def test_the_largest_logit_is_the_first_among_equals() -> None:
    """`step` compares it with the reference's for every step of these tests."""
    native, _ = bases("wide-table")
    silent = replace(native, tensors=native.tensors | {"model.norm.weight": torch.zeros(96)})
    runner = runner_of(silent)
    assert not alone(runner, tokens(4, 9)).any()
    assert alone(runner_of(native), [300, 12, 385]).argmax(1).max() > 256, "in one of the later pieces of the table"


@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16"])
def test_a_prepared_adapter_lies_in_one_piece_in_the_order_of_a_step(family: str) -> None:
    native, _ = bases(family)
    weights = adapter(native.config, 1, 5)
    prepared = native.prepare(weights)
    assert prepared.version == weights.version
    for path, update in weights.modules.items():
        kept = prepared.modules[path]
        assert kept.scale == update.scale
        if family == "llama-bf16":
            assert kept.nbytes == update.nbytes // 2
            assert torch.equal(kept.A, update.A.bfloat16()) and torch.equal(kept.B, update.B.bfloat16())
        else:
            a, b = codes_of(kept)
            assert kept.units is not None
            assert kept.nbytes == 8 * -(-a.shape[1] // 32) * 32 + -(-len(b) // 16) * 16 * 8 + 4 * 5
            assert error((b * kept.units) @ a.float() * kept.scale, weights.delta(path)) < 0.02
    layer = "model.layers.1.self_attn"
    first = [prepared.modules[f"{layer}.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
    walked = [matrix for m in first for matrix in (m.units, m.A) if matrix is not None] + [m.B for m in first]
    walked.append(prepared.modules[f"{layer}.o_proj"].A)
    addresses = [matrix.data_ptr() for matrix in walked]
    assert addresses == sorted(addresses)
    assert addresses[-1] - addresses[0] < sum(matrix.nbytes + 64 for matrix in walked)
    assert all((address - addresses[0]) % 64 == 0 for address in addresses)


def test_an_adapter_that_was_prepared_for_another_kind_of_base_is_refused() -> None:
    coded, halves = bases("llama-int4")[0], bases("llama-bf16")[0]
    weights = adapter(coded.config, 1, 4)
    for base, other in ((coded, halves), (halves, coded)):
        with pytest.raises(ValueError, match="was not prepared"):
            runner_of(base).load_adapter(0, other.prepare(weights))


def test_what_is_drawn_of_a_step_that_lacked_memory_is_told_by_nobody() -> None:
    runner = runner_of(bases("llama-int4")[0])
    logits = runner.run(batch_of([(Sequence(tokens(1, 8), [0]), 8)]))
    logits.wait()
    logits._wait.__self__.outcome.value = bindings.NO_MEMORY  # type: ignore[attr-defined]
    drawn = runner.draw(logits, np.array([[1.0, 1.0, 0.0, 0.5]] * 8, np.float32), np.zeros(8, np.int32))
    with pytest.raises(MemoryError, match="work buffers"):
        drawn.read()


def test_memory_for_logits_is_used_again_once_nobody_holds_it() -> None:
    native, _ = bases("llama-int4")
    runner = runner_of(native)
    ids = tokens(1, 20)
    first = alone(runner, ids)
    row, kept = first[3], first.clone()
    second = alone(runner, ids)
    assert second.data_ptr() != first.data_ptr()
    address = second.data_ptr()
    del second
    assert alone(runner, tokens(2, 20)).data_ptr() == address
    del first
    for seed in range(4):
        alone(runner, tokens(seed, 20))
    assert torch.equal(row, kept[3])


def test_memory_of_logits_is_shared_by_no_two_results_and_goes_when_nobody_needs_it() -> None:
    results = _Results()
    one, other = results.take(2, 100), results.take(3, 100)
    one.fill(1.0)
    other.fill(2.0)
    assert (one == 1.0).all()
    place = one.ctypes.data
    del one
    assert results.take(2, 100).ctypes.data == place
    small = results.nbytes
    results.take(60, 100)
    assert results.nbytes > small
    for _ in range(results.RECENT):
        results.take(2, 100)
    assert results.nbytes <= small
