"""The native runner on tiny random models: close to the reference runner, and the same bits in any batch."""

from __future__ import annotations

import resource
from ctypes import CDLL
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from adapters.weights import LoraWeights, LowRank
from server.engine.backends import make_runner
from server.engine.backends.cpu.runner import _LogitsMemory
from server.engine.backends.protocol import Runner
from server.engine.batch import Batch, Logits
from server.kernels import choose, cpu
from server.kernels.cpu import bindings
from server.kernels.lora import SlotWeights
from server.kernels.packed_format import dequantize_stored
from server.model.config import RopeScaling
from server.model.quantization import quantize
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
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=128)
INT4 = ("int4", 32, False)
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, int, bool]]] = {
    "llama-int4": ({}, INT4),
    "llama-double": ({}, ("int4", 32, True)),
    "llama-nf4": ({"hidden_size": 128, "intermediate_size": 192}, ("nf4", 64, True)),
    "llama-bf16": ({}, ("none", 64, False)),
    "untied": ({"tie_word_embeddings": False}, INT4),
    "wide-table": ({"vocab_size": 391}, INT4),
    "qwen2": ({"attention_bias": True, "output_bias": True, "mlp_bias": True}, INT4),
    "qwen3": ({"qk_norm": True, "head_dim": 64, "rms_norm_eps": 0.5}, INT4),
    "smollm3": ({"no_rope_layers": (1, 0, 1)}, INT4),
    "odd-heads": ({"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 4}, ("none", 64, False)),
    "odd-widths": ({"hidden_size": 72, "intermediate_size": 100, "head_dim": 18}, ("none", 64, False)),
    "one-kv-head": ({"num_key_value_heads": 1, "num_attention_heads": 9, "head_dim": 64}, INT4),
    "odd-kv": ({"head_dim": 24, "num_attention_heads": 4, "num_key_value_heads": 1}, INT4),
    "every-head": ({"head_dim": 96, "num_attention_heads": 4, "num_key_value_heads": 4}, INT4),
    "four-heads": ({"head_dim": 160, "num_attention_heads": 4, "num_key_value_heads": 1}, INT4),
    "yarn": ({"rope_scaling": YARN}, INT4),
    "yarn-stretched": ({"rope_scaling": YARN, "max_position_embeddings": 128}, INT4),
}


@lru_cache
def _bases(family: str) -> tuple[Tiny, Tiny]:
    changes, (scheme, group, double) = FAMILIES[family]
    config = llama(**{**WIDTHS, **changes})
    table = "none" if config.hidden_size % 32 else "int8"
    return tiny.bases(config, scheme, group, double, table, choose("native"), choose("reference"))


def bases(family: str = "llama-int4") -> tuple[Tiny, Tiny]:
    """The same weights, packed for the native kernels and for the reference. A test may change its copies."""
    native, reference = _bases(family)
    return replace(native, weights=dict(native.weights)), replace(reference, weights=dict(reference.weights))


def without_amx(base: Tiny, part: str = "") -> None:
    """Multiply the matrices whose path contains `part` without AMX."""
    for path, weight in base.weights.items():
        if part in path:
            tensors = {name: tensor for name, tensor in weight.tensors.items() if name != "inverse_scale"}
            base.weights[path] = replace(weight, tensors=tensors)


def runner_of(base: Tiny, threads: int = 2, blocks: int = 128) -> Runner:
    runner = make_runner(base, SLOTS, threads)
    runner.allocate(blocks, BLOCK)
    return runner


def native_runner(threads: int = 2) -> Runner:
    return runner_of(bases()[0], threads)


def load_all(runner: Runner, base: Tiny, adapters: dict[int, LoraWeights]) -> None:
    for slot, weights in adapters.items():
        runner.load_adapter(slot, base.prepare(weights))


def step(runner: Runner, new: list[tuple[Sequence, int]]) -> list[torch.Tensor]:
    """Run `count` more tokens of each sequence: the logits [count, vocab] of each. Checks their argmax too."""
    logits = runner.run(batch_of(new))
    assert logits.largest.tolist() == Logits(logits.rows).largest.tolist()
    return list(logits.rows.split([count for _, count in new]))


def tokens(seed: int, count: int) -> list[int]:
    return random_tokens(llama(**WIDTHS), seed, count)


def alone(runner: Runner, ids: list[int], mix: SlotWeights = (), first_block: int = 100) -> torch.Tensor:
    """Logits of every token of a sequence that runs in one step by itself."""
    blocks = list(range(first_block, first_block - (-len(ids) // BLOCK)))
    return step(runner, [(Sequence(ids, blocks, mix), len(ids))])[0]


def all_ranks(base: Tiny) -> dict[int, LoraWeights]:
    return {i: adapter(base.config, i, rank) for i, rank in enumerate(RANKS)}


def mixes_of_all_ranks(weights: tuple[float, ...] = (-1.0, 2.0, 1.0, 0.0)) -> list[SlotWeights]:
    return [((i, weights[i % 4]),) for i in range(len(RANKS))]


def assert_close_in_one_step(
    native: Tiny, reference: Tiny, adapters: dict[int, LoraWeights], mixes: list[SlotWeights], lengths: list[int]
) -> None:
    """One sequence per length (32 at most) and mix: close to the reference, and the same bits as each alone."""
    results = []
    for base in (native, reference):
        runner = runner_of(base)
        load_all(runner, base, adapters)
        sequences = [Sequence(tokens(i, n), [i * 2, i * 2 + 1], mixes[i]) for i, n in enumerate(lengths)]
        results.append(step(runner, list(zip(sequences, lengths, strict=True))))
        if base is native:
            for sequence, ours in zip(sequences, results[0], strict=True):
                assert torch.equal(alone(runner, sequence.tokens, sequence.mix), ours)
    for i, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert error(ours, exact) < 0.05, (i, mixes[i])


# -- close to the reference


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_close_to_the_reference(family: str) -> None:
    native, reference = bases(family)
    ours, exact = runner_of(native), runner_of(reference)
    for count in (1, 3, 300):
        ids = tokens(count, count)
        assert error(alone(ours, ids), alone(exact, ids)) < 0.04, count


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16", "qwen2", "odd-widths", "odd-kv"])
def test_adapters_of_all_ranks_share_a_batch(family: str) -> None:
    """Different target modules, rows without an adapter, mixes, and prefills beside decodes."""
    native, reference = bases(family)
    targets = [(), ("q_proj", "v_proj"), ("down_proj",), ("gate_proj", "up_proj"), ("o_proj", "k_proj")]
    adapters = {i: adapter(native.config, i, rank, targets[i % len(targets)]) for i, rank in enumerate(RANKS)}
    mixes: list[SlotWeights] = [((i, weight),) for i, weight in enumerate([1.0, -1.0, 2.0, 0.5, 1.0, -1.0, 2.0, 1.0])]
    mixes += [(), ((8, 0.0),), ((9, 0.7), (0, -1.0), (5, 2.0)), ((8, 1.0), (9, 0.3)), ()]
    lengths = [1, 3, 17, 40, 1, 1, 2, 33, 5, 6, 20, 1, 1]
    results = []
    for base in (native, reference):
        runner = runner_of(base)
        load_all(runner, base, adapters)
        sequences = [
            Sequence(tokens(i, length + 1), list(range(i * 4, i * 4 + 4)), mix)
            for i, (length, mix) in enumerate(zip(lengths, mixes, strict=True))
        ]
        prefills = step(runner, list(zip(sequences, lengths, strict=True)))
        decodes = step(runner, [(s, 1) for s in sequences])
        results.append([torch.cat(pair) for pair in zip(prefills, decodes, strict=True)])
    for i, (ours, exact) in enumerate(zip(*results, strict=True)):
        assert error(ours, exact) < 0.05, (i, mixes[i])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "llama-nf4", "llama-bf16", "odd-widths", "odd-kv"])
@pytest.mark.parametrize("rows", [1, 3, 300])
def test_steps_of_few_and_many_rows(family: str, rows: int) -> None:
    """Each adapter by itself, mixes, and with few rows one mix of all ranks."""
    native, reference = bases(family)
    mixes = [*mixes_of_all_ranks(), (), ((6, 2.0), (3, -1.0)), ((9, 1.0),)]
    count = min(rows, len(mixes))
    lengths = [rows * (i + 1) // count - rows * i // count for i in range(count)]
    assert_close_in_one_step(native, reference, all_ranks(native), mixes, lengths)
    if rows <= 3:
        mix = tuple((i, (2.0, -1.0, 0.5, 0.0)[i % 4] * 0.25) for i in range(len(RANKS)))
        assert_close_in_one_step(native, reference, all_ranks(native), [mix] * rows, [1] * rows)


@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16"])
def test_mixes_with_a_common_prefix_or_other_weights_are_distinct(family: str) -> None:
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
    assert_close_in_one_step(native, reference, adapters, mixes, [5, 1, 2, 9, 3, 1])


@pytest.mark.parametrize("part", ["q_proj", "o_proj", "down_proj", "layers.1.mlp", "embed_tokens", "proj"])
def test_matrices_with_and_without_amx_share_a_model(part: str) -> None:
    native, reference = bases()
    without_amx(native, part)
    adapters = {i: adapter(native.config, i, 8 + i) for i in range(3)}
    mixes: list[SlotWeights] = [(), ((0, 1.0),), ((1, -0.5), (2, 1.0)), ()]
    assert_close_in_one_step(native, reference, adapters, mixes, [5, 1, 20, 2])


@pytest.mark.skipif(not runs("_native_amx"), reason="the processor has no AMX")
def test_gate_and_up_use_8_bit_weights_unless_a_scale_is_negative() -> None:
    native, reference = bases()
    ids = tokens(5, 40)
    exact, int8 = alone(runner_of(reference), ids), alone(runner_of(native), ids)
    for path, weight in native.weights.items():
        tensors = {name: tensor for name, tensor in weight.tensors.items() if name != "nonnegative_scales"}
        native.weights[path] = replace(weight, tensors=tensors)
    assert error(alone(runner_of(native), ids), exact) < error(int8, exact) / 2


def test_an_adapter_with_weight_0_changes_nothing() -> None:
    native, reference = bases("llama-bf16")
    ours, exact = runner_of(native), runner_of(reference)
    ids = tokens(5, 40)
    plain = alone(ours, ids)
    for base, runner in ((native, ours), (reference, exact)):
        load_all(runner, base, {0: adapter(native.config, 1, 8, size=2.0)})
    assert error(alone(ours, ids, ((0, 1.0),)), plain) > 0.3
    assert error(alone(ours, ids, ((0, 1.0),)), alone(exact, ids, ((0, 1.0),))) < 0.03
    assert torch.equal(alone(ours, ids, ((0, 0.0),)), plain)
    assert torch.equal(alone(ours, ids), plain)


# -- equal bits


@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16", "odd-heads"])
def test_avx512_with_and_without_bf16_agree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the order of additions within pairs. Rows that overflow are not finite in both."""
    if not (runs("_native_bf16") and runs("_native")):
        pytest.skip("this processor has no AVX512-BF16")
    weights = {"none": 0.0, "adapter": 1.0, "overflow": 3e38}
    ids, results = tokens(5, 65), []
    for name in ("_native_bf16", "_native"):
        library = bindings.load(name)
        monkeypatch.setattr(bindings, "library", lambda library=library: library)
        base, _ = bases(family)
        runner = runner_of(base)
        load_all(runner, base, {0: adapter(base.config, 1, 17)})
        results.append([alone(runner, ids, ((0, weight),)) for weight in weights.values()])
    for which, ours, other in zip(weights, *results, strict=True):
        if which == "overflow":
            assert torch.equal(ours.isfinite(), other.isfinite()) and not ours.isfinite().all()
        else:
            assert error(ours, other) < 0.004, which


@pytest.mark.parametrize(
    "family", ["llama-int4", "llama-double", "llama-nf4", "llama-bf16", "qwen3", "odd-heads", "odd-widths"]
)
def test_avx2_and_avx512_give_the_same_bits(
    both_sizes: tuple[CDLL, CDLL], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefills and decodes with adapters of all ranks, rows that overflow, and both tile heights."""
    lengths, results = [65, 1, 20, 7, 3, 1, 2, 9, 4, 30], []
    avx512, avx2 = both_sizes
    for library, eight_rows in ((avx512, False), (avx2, False), (avx2, True)):
        monkeypatch.setattr(bindings, "library", lambda library=library: library)
        usual = library.loramux_eight_row_tiles(eight_rows)
        try:
            base, _ = bases(family)
            runner = runner_of(base)
            load_all(runner, base, all_ranks(base))
            mixes = mixes_of_all_ranks()
            mixes[1], mixes[4] = ((0, 3e38),), ((6, 0.5), (9, -1.0))
            sequences = [
                Sequence(tokens(i, n + 1), list(range(i * 8, i * 8 + 8)), mixes[i]) for i, n in enumerate(lengths)
            ]
            prefills = step(runner, list(zip(sequences, lengths, strict=True)))
            decodes = step(runner, [(s, 1) for s in sequences])
        finally:
            library.loramux_eight_row_tiles(usual)
        results.append(torch.cat([*prefills, *decodes]).numpy())
    assert np.isnan(results[0]).any() and np.isfinite(results[0]).any()
    assert all(same_bits(ours, results[0]) for ours in results[1:])


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(
    "family", ["llama-int4", "llama-nf4", "llama-bf16", "qwen3", "odd-heads", "one-kv-head", "every-head", "four-heads"]
)
def test_a_row_does_not_depend_on_its_batch(family: str) -> None:
    """The same bits alone or among others, in any chunks, blocks, slots and with any number of threads."""
    native, _ = bases(family)
    adapters = [adapter(native.config, i, rank) for i, rank in enumerate([8, 17, 1, 64])]
    runner = runner_of(native)
    load_all(runner, native, dict(enumerate(adapters)))
    ids, mix = tokens(1, 77), ((0, 1.0), (1, -1.0))
    expected = alone(runner, ids, mix)

    for index, chunks in ((0, [30, 30, 1, 1, 15]), (2, [1, 2, 3, 64, 7]), (1, [77])):
        others = [
            Sequence(tokens(20, 90), [3, 1, 9, 40, 41, 42], ((3, 0.5),)),
            Sequence(tokens(21, 300), list(range(60, 80)), ((0, 2.0), (2, 1.0))),
        ]
        subject = Sequence(ids, [99, 12, 55, 13, 98], mix)
        rows = []
        for count in chunks:
            batch = [(other, 300 // len(chunks) // 4) for other in others]
            batch.insert(index, (subject, count))
            rows.append(step(runner, batch)[index])
        assert torch.equal(torch.cat(rows), expected), (index, chunks)

    for threads in (1, 3):
        other = runner_of(native, threads)
        load_all(other, native, {9: adapters[0], 2: adapters[1]})
        assert torch.equal(alone(other, ids, ((9, 1.0), (2, -1.0)), first_block=17), expected)

    prefix = Sequence(ids[:64], [30, 31, 32, 33], mix)
    step(runner, [(prefix, 64)])
    shared = Sequence(ids, [30, 31, 32, 33, 50], mix, done=64)
    assert torch.equal(step(runner, [(shared, 13)])[0], expected[64:])


@pytest.mark.usefixtures("library")
def test_denormal_products_do_not_depend_on_the_batch() -> None:
    """AMX takes denormals for zero: values of 1e-37 are averaged over 77 tokens and scaled up again."""
    native, plain = bases("llama-bf16")
    factors = {"v_proj": 1e-37, "o_proj": 1e36}
    for path, weight in plain.weights.items():
        if path.endswith(tuple(factors)):
            values = dequantize_stored(weight) * factors[path.rsplit(".", 1)[-1]]
            native.weights[path] = native.backend.pack(quantize(values, "none", 64))
    runner, ids = runner_of(native), tokens(1, 77)
    expected = alone(runner, ids)
    assert not torch.equal(expected, alone(runner_of(bases("llama-bf16")[0]), ids))
    subject = Sequence(ids, [99, 12, 55, 13, 98])
    assert torch.equal(torch.cat([step(runner, [(subject, 1)])[0] for _ in ids]), expected)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "odd-kv", "every-head", "four-heads"])
@pytest.mark.parametrize("size", [48, 256])
def test_a_row_does_not_depend_on_the_block_size(family: str, size: int) -> None:
    native, _ = bases(family)
    ids = tokens(1, 300)
    other = make_runner(native, SLOTS, 2)
    other.allocate(20, size)
    subject = Sequence(ids, [11, 3, 19, 0, 7, 8, 2, 16, 5, 12])
    beside = Sequence(tokens(2, 90), [1, 13, 4])
    rows = [step(other, [(beside, 20), (subject, count)])[1] for count in (37, 1, 10, 252)]
    assert torch.equal(torch.cat(rows), alone(runner_of(native), ids))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16", "odd-widths"])
def test_row_parallel_steps_give_the_same_bits(family: str) -> None:
    """With sequences of one row and of several, and with one too long to split the rows evenly."""
    native, _ = bases(family)
    adapters = {i: adapter(native.config, i, rank) for i, rank in enumerate([8, 17, 1, 64])}
    mixes: list[SlotWeights] = [(), ((0, 1.0),), ((1, -1.0), (3, 0.5)), ((2, 2.0),), ((3, 1.0), (0, 0.0))]
    lengths = [5 + 7 * i % 31 for i in range(24)]
    results: dict[int, list[list[torch.Tensor]]] = {}
    for threads in (1, 2, 3):
        runner = runner_of(native, threads, blocks=160)
        load_all(runner, native, adapters)
        sequences = [
            Sequence(tokens(i, length + 8), list(range(i * 3, i * 3 + 3)), mixes[i % 5])
            for i, length in enumerate(lengths)
        ]
        long = Sequence(tokens(99, 460), list(range(100, 130)))
        prefills = step(runner, list(zip(sequences, lengths, strict=True)))
        step(runner, [(long, 450)])
        before = runner.nbytes()["activations"]
        steps = [prefills, step(runner, [(s, 1) for s in sequences])]
        assert (runner.nbytes()["activations"] > before) == (threads > 1)  # threads have buffers of their own
        steps.append(step(runner, [(s, 1 + i % 3) for i, s in enumerate(sequences)]))
        steps.append(step(runner, [*((s, 1) for s in sequences), (long, 9)]))
        results[threads] = steps
    for threads in (2, 3):
        for ours, one in zip(results[threads], results[1], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, one, strict=True))


# -- autotuning


def count_of(runner: Runner, name: str) -> int:
    return int(getattr(bindings.library(), f"loramux_model_{name}_steps")(runner._model))  # type: ignore[attr-defined]


def test_row_parallel_steps_are_tuned_for_every_16_rows() -> None:
    """Every other step is row-parallel for 50 steps; then one way is kept. Results do not change."""
    runner = native_runner()

    def batch(count: int) -> Batch:
        each, more = divmod(count, 16)
        return batch_of([(Sequence(tokens(i, 17), [2 * i, 2 * i + 1]), each + (i < more)) for i in range(16)])

    for rows, same_bucket, next_bucket in ((32, 17, 16), (256, 241, 240)):
        first = runner.run(batch(rows)).rows
        before = count_of(runner, "row_parallel")
        for trial in range(1, 50):
            assert torch.equal(runner.run(batch(rows)).rows, first)
            assert count_of(runner, "row_parallel") - before == trial // 2
        for count, expected in ((rows, (0, 10)), (same_bucket, (0, 10)), (next_bucket, (5,))):
            before = count_of(runner, "row_parallel")
            for _ in range(10):
                runner.run(batch(count)).wait()
            assert count_of(runner, "row_parallel") - before in expected, count


def test_the_prefetch_rate_is_tuned_after_row_parallel_steps() -> None:
    native, _ = bases()
    without_amx(native)
    runner = runner_of(native)
    sequences = [Sequence(tokens(i, 60), list(range(4 * i, 4 * i + 4))) for i in range(16)]
    step(runner, [(s, 59) for s in sequences])
    batch = batch_of([(s, 1) for s in sequences])
    first = runner.run(batch).rows

    def reduced(steps: int) -> int:
        before = count_of(runner, "reduced_prefetch")
        for _ in range(steps):
            assert torch.equal(runner.run(batch).rows, first)
        return count_of(runner, "reduced_prefetch") - before

    assert reduced(49) == 0  # row-parallel steps are tuned meanwhile
    assert [reduced(1) for _ in range(50)] == [0, 1] * 25
    assert reduced(10) in (0, 10)
    before = count_of(runner, "reduced_prefetch")
    short = batch_of([(Sequence(tokens(1, 2), [70]), 2)])
    for _ in range(20):
        runner.run(short)
    assert count_of(runner, "reduced_prefetch") == before  # so little to prefetch that there is one rate


# -- values that are not finite


def fresh_and_used(count: int) -> tuple[Runner, Runner]:
    """Two runners; the first blocks of the second have `count` tokens of keys and values that are not finite."""
    native, _ = bases()
    fresh, used = runner_of(native), runner_of(native)
    load_all(used, native, {0: adapter(native.config, 1, 4, size=1e30)})
    assert not alone(used, tokens(2, count), ((0, 16.0),), first_block=0).isfinite().all()
    return fresh, used


def test_old_contents_of_a_block_are_not_read() -> None:
    fresh, used = fresh_and_used(400)
    for count in (1, 2, 15, 16, 17, 33):
        ids = tokens(3, count)
        assert torch.equal(alone(used, ids, first_block=0), alone(fresh, ids, first_block=0))
    fresh, used = fresh_and_used(400)
    ids = tokens(3, 300)
    expected = alone(fresh, ids, first_block=0)
    before = Sequence(tokens(4, 1), [60])  # so that a row block ends between the two tokens of a pair
    assert torch.equal(step(used, [(before, 1), (Sequence(ids, list(range(19))), 300)])[1], expected)


def test_scores_that_are_not_finite_give_logits_that_are_not_finite() -> None:
    """With small values: exp of NaN must not become a finite number."""
    native, _ = bases()
    small = {n: t * 1e-3 if n.endswith("input_layernorm.weight") else t for n, t in native.tensors.items()}
    native = replace(native, tensors=small)
    runner = runner_of(native)
    load_all(runner, native, {0: adapter(native.config, 1, 4, ("q_proj", "k_proj"), size=1e37)})
    for count in (2, 3, 20):
        logits = runner.run(batch_of([(Sequence(tokens(5, count), [0, 1], ((0, 16.0),)), count)]))
        assert not logits.rows[1:].isfinite().any(), count
        assert (logits.largest[1:] == -1).all()


# -- slots, arguments, memory


def test_slots_are_reused_and_unknown_slots_refused() -> None:
    native, _ = bases()
    runner = runner_of(native)
    ids = tokens(4, 9)
    one, two = adapter(native.config, 1, 8), adapter(native.config, 2, 5, ("q_proj",))
    load_all(runner, native, {0: one, 1: two})
    expected = alone(runner, ids, ((1, 1.0),))
    runner.unload_adapter(0)
    load_all(runner, native, {0: two})
    assert torch.equal(alone(runner, ids, ((0, 1.0),)), expected)
    for slot in (-1, SLOTS):
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            runner.load_adapter(slot, native.prepare(one))
        with pytest.raises(IndexError, match=f"no slot {slot}"):
            runner.unload_adapter(slot)


def test_only_wanted_logits_are_computed() -> None:
    runner = native_runner()
    ids = tokens(6, 40)
    everything = alone(runner, ids)
    batch = batch_of([(Sequence(ids, [7, 8, 9]), 40)])
    for wanted in ([39], [0, 17, 39], []):
        rows = runner.run(replace(batch, logit_rows=np.array(wanted, np.int64))).rows
        assert torch.equal(rows, everything[wanted])


def test_wrong_adapters_and_arguments_are_refused() -> None:
    (native, _), (bf16, _) = bases(), bases("llama-bf16")
    runner = make_runner(native, SLOTS, 1)
    with pytest.raises(ValueError, match="multiple of 16"):
        runner.allocate(4, 8)
    with pytest.raises(ValueError, match="at least one thread"):
        make_runner(native, SLOTS, 0)
    weights = adapter(native.config, 1, 4)
    with pytest.raises(ValueError, match="not prepared"):
        runner.load_adapter(0, weights)
    for base, other in ((native, bf16), (bf16, native)):
        with pytest.raises(ValueError, match="was not prepared"):
            runner_of(base).load_adapter(0, other.prepare(weights))
    for path, out, width, message in (
        ("model.layers.0.self_attn.q_proj", 192, 32, "the module is"),
        ("lm_head", 97, 96, "no linear lm_head"),
    ):
        modules = {path: LowRank(torch.zeros(2, width), torch.zeros(out, 2), 1.0)}
        with pytest.raises(ValueError, match=message):
            runner.load_adapter(0, native.prepare(LoraWeights("w", "0" * 64, modules)))


def int32(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


INVALID: dict[str, tuple[str, dict[str, Any]]] = {
    "token beyond the vocabulary": ("not in the vocabulary", {"tokens": torch.tensor([5, 97])}),
    "token below 0": ("not in the vocabulary", {"tokens": torch.tensor([-1, 5])}),
    "position beyond the sequence": ("a position", {"positions": torch.tensor([0, 2])}),
    "position beyond the context": (
        "a position",
        {
            "positions": torch.tensor([0, 512]),
            "context": int32(513),
            "blocks": torch.arange(33, dtype=torch.int32)[None],
        },
    ),
    "position below 0": ("a position", {"positions": torch.tensor([-1, 1])}),
    "sequence beyond its blocks": ("a position", {"context": int32(17)}),
    "block beyond the cache": ("a block", {"blocks": int32([128])}),
    "missing block": ("a block", {"blocks": int32([-1])}),
    "logits of a missing row": ("a row", {"logit_rows": torch.tensor([2])}),
    "last row in no sequence": ("a row", {"row_start": int32(0, 1)}),
    "first row in no sequence": ("a row", {"row_start": int32(1, 2)}),
    "sequence that ends before it starts": (
        "a row",
        {
            "row_start": int32(0, 2, 1, 2),
            "context": int32(2, 2, 2),
            "blocks": int32([0], [1], [2]),
            "mixes": ((), (), ()),
        },
    ),
    "rows beyond the step": (
        "a row",
        {"row_start": int32(0, 10**6, 2), "context": int32(2, 2), "blocks": int32([0], [1]), "mixes": ((), ())},
    ),
    "empty slot": ("slot is empty", {"mixes": (((3, 1.0),),)}),
    "missing slot": ("slot is empty", {"mixes": (((SLOTS, 1.0),),)}),
}


def test_invalid_steps_are_not_run() -> None:
    runner = native_runner()
    valid = batch_of([(Sequence([5, 6], [0]), 2)])
    for name, (message, changes) in INVALID.items():
        with pytest.raises(AssertionError, match=message):
            runner.run(replace(valid, **changes)).wait()
        assert runner.nbytes()["kv_cache"] == 0, name
    assert torch.isfinite(runner.run(valid).rows).all()


def test_a_step_without_a_cache_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before `allocate`, and after one that failed for lack of memory."""
    with pytest.raises(AssertionError, match="call allocate before run"):
        alone(make_runner(bases()[0], SLOTS, 1), [5], first_block=0)
    runner = native_runner()
    ids = tokens(1, 20)
    before = alone(runner, ids, first_block=0)

    def no_memory(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(np, "zeros", no_memory)
        runner.allocate(64, BLOCK)
    assert runner.nbytes()["kv_cache"] == 0
    with pytest.raises(AssertionError, match="call allocate before run"):
        alone(runner, ids, first_block=0)
    runner.allocate(64, BLOCK)
    assert torch.equal(alone(runner, ids, first_block=0), before)


def test_a_thread_that_cannot_be_started_is_an_error() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), limits[1]))  # room for about eight stacks
    try:
        with pytest.raises(OSError, match="cannot start 64 threads"):
            bindings.ThreadPool(64)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_nbytes_counts_weights_used_blocks_and_buffers() -> None:
    native, _ = bases()
    runner = runner_of(native, blocks=32)
    before = runner.nbytes()
    layers, heads, dim = 3, 2, 32
    assert runner.block_bytes(BLOCK) == layers * BLOCK * heads * dim * 2 * 2
    assert before["kv_cache"] == 0
    tensors = sum(t.nbytes for t in native.tensors.values())
    assert before["base"] == sum(w.nbytes for w in native.weights.values()) + tensors
    alone(runner, tokens(1, 20), first_block=0)
    assert runner.nbytes()["kv_cache"] == 2 * runner.block_bytes(BLOCK)
    assert runner.nbytes()["activations"] > before["activations"]


def test_work_bytes_predicts_the_growth_with_the_context() -> None:
    native, _ = bases()
    runner = make_runner(native, SLOTS, 1)
    runner.allocate(32, BLOCK)
    sequence, work = Sequence(tokens(1, 400), list(range(32))), []
    for count in (320, 80):
        step(runner, [(sequence, count)])
        work.append(runner.nbytes()["activations"])
    angles = 4 * native.config.head_dim  # allocated for all positions from the start
    assert work[1] - work[0] == runner.work_bytes(416) - runner.work_bytes(320) - 96 * angles > 0
    assert runner.work_bytes(1 << 40) == runner.work_bytes(native.config.max_position_embeddings)
    two = make_runner(native, SLOTS, 2).work_bytes(416) - 416 * angles
    assert two >= 2 * (runner.work_bytes(416) - 416 * angles)


def test_argmax_is_the_first_among_equal_logits() -> None:
    """`step` compares it with the reference in every other test."""
    native, _ = bases("wide-table")
    zeros = replace(native, tensors=native.tensors | {"model.norm.weight": torch.zeros(96)})
    assert not alone(runner_of(zeros), tokens(4, 9)).any()
    assert alone(runner_of(native), [300, 12, 385]).argmax(1).max() > 256  # also in a later chunk of the table


@pytest.mark.parametrize("family", ["llama-int4", "llama-bf16"])
def test_a_prepared_adapter_is_contiguous_in_the_order_of_a_step(family: str) -> None:
    native, _ = bases(family)
    weights = adapter(native.config, 1, 5)
    prepared = native.prepare(weights)
    assert prepared.version == weights.version
    for path, update in weights.modules.items():
        ours = prepared.modules[path]
        assert ours.scale == update.scale
        if family == "llama-bf16":
            assert ours.nbytes == update.nbytes // 2
            assert torch.equal(ours.A, update.A.bfloat16()) and torch.equal(ours.B, update.B.bfloat16())
        else:
            a, b = codes_of(ours)
            assert ours.units is not None
            assert ours.nbytes == 8 * -(-a.shape[1] // 32) * 32 + -(-len(b) // 16) * 16 * 8 + 4 * 5
            assert error((b * ours.units) @ a.float() * ours.scale, weights.delta(path)) < 0.02
    layer = "model.layers.1.self_attn"
    qkv = [prepared.modules[f"{layer}.{name}"] for name in ("q_proj", "k_proj", "v_proj")]
    matrices = [matrix for m in qkv for matrix in (m.units, m.A) if matrix is not None] + [m.B for m in qkv]
    matrices.append(prepared.modules[f"{layer}.o_proj"].A)
    addresses = [matrix.data_ptr() for matrix in matrices]
    assert addresses == sorted(addresses)
    assert addresses[-1] - addresses[0] < sum(matrix.nbytes + 64 for matrix in matrices)
    assert all((address - addresses[0]) % 64 == 0 for address in addresses)


def test_samples_of_a_step_that_lacked_memory_are_not_returned() -> None:
    runner = native_runner()
    logits = runner.run(batch_of([(Sequence(tokens(1, 8), [0]), 8)]))
    logits.wait()
    logits._wait.__self__.outcome.value = bindings.NO_MEMORY  # type: ignore[attr-defined]
    samples = runner.draw(logits, np.array([[1.0, 1.0, 0.0, 0.5]] * 8, np.float32), np.zeros(8, np.int32))
    with pytest.raises(MemoryError, match="work buffers"):
        samples.read()


def test_memory_of_logits_is_reused_once_it_is_unreferenced() -> None:
    runner = native_runner()
    ids = tokens(1, 20)
    first = alone(runner, ids)
    row, copy = first[3], first.clone()
    second = alone(runner, ids)
    assert second.data_ptr() != first.data_ptr()
    address = second.data_ptr()
    del second
    assert alone(runner, tokens(2, 20)).data_ptr() == address
    del first
    for seed in range(4):
        alone(runner, tokens(seed, 20))
    assert torch.equal(row, copy[3])

    memory = _LogitsMemory()
    memory.take(2, 100)
    small = memory.nbytes
    memory.take(60, 100)
    assert memory.nbytes > small
    for _ in range(memory.RECENT):
        memory.take(2, 100)
    assert memory.nbytes <= small
