"""The trainer on a tiny Llama: gradients against PEFT, the loss, packing, resumption, stopping."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters import layers, training
from adapters.data import Example, Tokens
from adapters.errors import AdapterError, BaseMismatch, Diverged, StoreFailed, TrainingStopped
from adapters.layers import LoraSpec
from adapters.optimizer import AdamW, learning_rate
from adapters.seeds import SEEDS
from adapters.training import TrainingConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


class Wrapped:
    """A Transformers model as the `Model` of a trainer; sequences one by one."""

    metadata = {"base": "tiny", "quantization": {"scheme": "none"}}
    nbytes = 0

    def __init__(self, model) -> None:
        self.model = copy.deepcopy(model)
        self.tree = self.model
        self.blocks = list(self.model.model.layers)

    def hidden(self, ids, lengths, rows=None):
        parts = [self.model.model(part[None]).last_hidden_state[0] for part in ids.split(list(lengths))]
        return torch.cat(parts) if rows is None else torch.cat(parts)[rows]

    def logits(self, hidden):
        return self.model.lm_head(hidden)


def examples(count: int, seed: int = 0) -> Tokens:
    draw = torch.Generator().manual_seed(seed)
    result = []
    for i in range(count):
        size, learned = 4 + i % 5, 1 + i % 3
        ids = torch.randint(0, 48, (size,), generator=draw).tolist()
        result.append(Example(tuple(ids), (False,) * (size - learned) + (True,) * learned))
    return Tokens(tuple(result))


def plain_loss(model, data: Tokens) -> torch.Tensor:
    """The mean loss over learned tokens, written down once more."""
    total, count = torch.tensor(0.0), 0
    for e in data.examples:
        logits = model(torch.tensor([e.ids])).logits[0]
        rows = [i for i, on in enumerate(e.learned) if on]
        total = total + F.cross_entropy(
            logits[[i - 1 for i in rows]], torch.tensor([e.ids[i] for i in rows]), reduction="sum"
        )
        count += len(rows)
    return total / count


@pytest.mark.parametrize("rslora", [False, True])
def test_gradients_equal_peft(llama, rslora):
    """In float64, where both are within 1e-6 whatever was drawn; in float32 the order of sums alone is up to 1.4e-5."""
    data = examples(6)
    llama = copy.deepcopy(llama).double()
    peft = get_peft_model(
        copy.deepcopy(llama),
        LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", use_rslora=rslora, task_type="CAUSAL_LM"),
    ).double()
    model = Wrapped(llama)
    found = layers.inject(model.tree, LoraSpec(rank=3, alpha=7, rslora=rslora), seed=0)
    model.tree.double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, layer in found.items():
            layer.lora_B.normal_(0, 0.3, generator=random)
            theirs = peft.base_model.model.get_submodule(path)
            theirs.lora_A["default"].weight.copy_(layer.lora_A)
            theirs.lora_B["default"].weight.copy_(layer.lora_B)
    loss = plain_loss(peft, data)
    loss.backward()
    loss = loss.detach()
    targets = sum(e.targets for e in data.examples)
    for _ in range(2):
        model.tree.zero_grad()
        ours = 0.0
        for piece in training.pack(data.examples, 16):
            ours += training._loss_and_backward(model, *training._forward(model, piece), scale=1 / targets)[0]
        assert ours / targets == pytest.approx(float(loss), abs=1e-5)
        for path, layer in found.items():
            theirs = peft.base_model.model.get_submodule(path)
            assert (layer.lora_A.grad - theirs.lora_A["default"].weight.grad).abs().max() < 1e-5
            assert (layer.lora_B.grad - theirs.lora_B["default"].weight.grad).abs().max() < 1e-5
        mean, _ = training.evaluate_loss(model, data)
        assert mean == pytest.approx(float(loss), abs=1e-5)


def test_chunked_loss_equals_whole_loss(llama, monkeypatch):
    data, model = examples(9), Wrapped(llama)
    whole = training.evaluate_loss(model, data)
    monkeypatch.setattr(training, "LOSS_ROWS", 2)
    assert training.evaluate_loss(model, data) == pytest.approx(whole)


CONFIG = TrainingConfig(epochs=3, batch_size=4, lora_rank=2, learning_rate=0.02, lora_dropout=0.1, save_steps=2, seed=5)


def test_training_reduces_the_loss_and_restores_the_model(llama):
    data, model = examples(12), Wrapped(llama)
    before = {name: tensor.clone() for name, tensor in model.tree.state_dict().items()}
    start, _ = training.evaluate_loss(model, data)
    events = []
    config = dataclasses.replace(CONFIG, epochs=20, lora_dropout=0.0)
    weights = training.train(model, data, config, on_event=events.append)
    after = model.tree.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)
    steps = [e for e in events if e.kind == "step"]
    assert len(steps) == 60 and steps[-1].loss < 0.5 * start and events[-1].kind == "done"
    made = weights.metadata["training"]
    assert made["steps"] == 60 and made["samples"] == 12 and made["config"]["lora_rank"] == 2
    assert made["tokens"] == 20 * sum(len(e.ids) for e in data.examples)
    assert weights.metadata["base"] == "tiny" and made["memory"]["optimizer"] == 2 * made["memory"]["adapters"]


def test_the_result_is_deterministic(llama):
    data = examples(12)
    torch.manual_seed(1)
    first = training.train(Wrapped(llama), data, CONFIG)
    torch.manual_seed(2)
    drawn = torch.get_rng_state()
    again = training.train(Wrapped(llama), data, CONFIG)
    assert torch.equal(torch.get_rng_state(), drawn), "the caller's random numbers are its own"
    other = training.train(Wrapped(llama), data, dataclasses.replace(CONFIG, seed=6))
    assert first.digest == again.digest != other.digest


def test_micro_tokens_change_rounding_only(llama):
    data, config = examples(12), dataclasses.replace(CONFIG, lora_dropout=0.0, epochs=1)
    one, two = (training.train(Wrapped(llama), data, dataclasses.replace(config, micro_tokens=n)) for n in (8, 4096))
    for path in one.modules:
        assert torch.allclose(one.delta(path), two.delta(path), atol=1e-4)


@pytest.mark.parametrize("stopped_at", [1, 2, 5])
def test_a_stopped_run_resumes_bit_for_bit(llama, tmp_path, stopped_at):
    data, held = examples(12), examples(5, seed=9)
    config = dataclasses.replace(CONFIG, eval_steps=2)
    whole = training.train(Wrapped(llama), data, config, validation=held)
    seen = []
    with pytest.raises(TrainingStopped, match=f"step {stopped_at} of 9"):
        training.train(
            Wrapped(llama),
            data,
            config,
            validation=held,
            checkpoints=tmp_path,
            on_event=lambda e: seen.append((e.kind, e.step)),
            stop=lambda: bool(seen) and seen[-1][1] >= stopped_at,
        )
    assert seen[-1] == ("checkpoint", stopped_at) and seen.count(seen[-1]) == 1
    with pytest.raises(TrainingStopped):  # nothing has been done since
        training.train(Wrapped(llama), data, config, validation=held, checkpoints=tmp_path,
                       on_event=seen.append, stop=lambda: True)  # fmt: skip
    assert seen[-1] == ("checkpoint", stopped_at)
    resumed = training.train(Wrapped(llama), data, config, validation=held, checkpoints=tmp_path)
    assert resumed.digest == whole.digest
    told = resumed.metadata["training"]["evaluations"]
    assert told == whole.metadata["training"]["evaluations"]


def test_a_killed_run_resumes_bit_for_bit(llama, tmp_path):
    """The child is killed in the middle of a step, well after its last checkpoint."""
    data = examples(12)
    whole = training.train(Wrapped(llama), data, CONFIG)
    torch.save(llama.state_dict(), tmp_path / "model.pt")
    child = f"""
import copy, os, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(training.__file__).parents[1])!r}]
import torch
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
import test_training as t
torch.set_num_threads({torch.get_num_threads()})  # sums are those of as many
model = LlamaForCausalLM(LlamaConfig(**{llama.config.to_dict()!r})).eval()
model.load_state_dict(torch.load({str(tmp_path / "model.pt")!r}))
def die(event):
    if event.kind == "step" and event.step == 7:
        os.kill(os.getpid(), 9)
t.training.train(t.Wrapped(model), t.examples(12), t.CONFIG, checkpoints=Path({str(tmp_path / "run")!r}), on_event=die)
"""
    done = subprocess.run(
        [sys.executable, "-c", child], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True
    )
    assert done.returncode == -9, done.stderr.decode()[-2000:]
    steps = []
    resumed = training.train(
        Wrapped(llama), data, CONFIG, checkpoints=tmp_path / "run", on_event=lambda e: steps.append((e.kind, e.step))
    )
    assert steps[0] == ("step", 7) and resumed.digest == whole.digest


def test_a_checkpoint_of_another_run_is_refused(llama, tmp_path):
    data = examples(8)
    training.train(Wrapped(llama), data, CONFIG, checkpoints=tmp_path)
    for other in (dataclasses.replace(CONFIG, learning_rate=0.5), dataclasses.replace(CONFIG, seed=1)):
        with pytest.raises(AdapterError, match="another run"):
            training.train(Wrapped(llama), data, other, checkpoints=tmp_path)
    with pytest.raises(AdapterError, match="another run"):
        training.train(Wrapped(llama), examples(9), CONFIG, checkpoints=tmp_path)
    with pytest.raises(AdapterError, match="another run"):
        training.train(Wrapped(llama), data, CONFIG, validation=examples(2), checkpoints=tmp_path)
    moved = Wrapped(llama)  # to a machine that multiplies in something else: a run that leaves it to that goes on there
    moved.metadata = {**moved.metadata, "compute_dtype": "bfloat16"}
    assert training.train(moved, data, CONFIG, checkpoints=tmp_path).metadata["compute_dtype"] == "bfloat16"
    served = Wrapped(llama)
    served.metadata = {**served.metadata, "quantization": {"scheme": "none", "base_id": "another"}}
    with pytest.raises(AdapterError, match="another run"):
        training.train(served, data, CONFIG, checkpoints=tmp_path)
    (tmp_path / "checkpoint.safetensors").write_bytes(b"half a fi")
    with pytest.raises(StoreFailed, match="damaged"):  # which is no setting's fault
        training.train(Wrapped(llama), data, CONFIG, checkpoints=tmp_path)


def test_run_keys_of_earlier_versions_are_unchanged(llama):
    """Their checkpoints, and recipes that are done, are known by these; a new setting has to leave them as they are."""
    model, data = Wrapped(llama), Tokens((Example((1, 2, 3), (False, True, True)),))
    key = training.run_key(model, data, TrainingConfig(), None, None)
    assert key == "7ed0ef7863f0ba8b4d83eb033ba5f2ac5e1f806e1ac7228ca1a78a112f57d0f6"
    assert key != training.run_key(model, data, TrainingConfig(compute_dtype="float32"), None, None)


def test_the_largest_seed_works(llama):
    config = dataclasses.replace(CONFIG, max_steps=2, seed=2**63 - 1)
    assert training.train(Wrapped(llama), examples(4), config).metadata["training"]["steps"] == 2


def test_early_stopping_returns_the_best_state(llama):
    data, held = examples(4), examples(8, seed=3)
    config = dataclasses.replace(CONFIG, epochs=60, batch_size=4, eval_steps=3, patience=2, lora_dropout=0.0)
    model, events = Wrapped(llama), []
    weights = training.train(model, data, config, validation=held, on_event=events.append)
    evals = [e for e in events if e.kind == "eval"]
    assert events[-1].step < 60, "random data cannot be learned, so more training makes it worse"
    best = min(evals, key=lambda e: e.loss)
    assert weights.metadata["training"]["best_step"] == best.step
    found = layers.inject(model.tree, config.spec())
    layers.load(found, weights)
    assert training.evaluate_loss(model, held)[0] == pytest.approx(best.loss, abs=1e-6)


def test_training_starts_from_an_adapter(llama):
    data = examples(8)
    first = training.train(Wrapped(llama), data, CONFIG)
    tiny = dataclasses.replace(CONFIG, max_steps=1, learning_rate=1e-9)
    same = training.train(Wrapped(llama), data, tiny, init=first)
    for path in first.modules:
        assert torch.allclose(same.delta(path), first.delta(path), atol=1e-6)
    with pytest.raises(BaseMismatch, match="initial adapter"):
        training.train(Wrapped(llama), data, dataclasses.replace(CONFIG, lora_rank=3), init=first)


def test_ranks_of_single_modules(llama, shapes):
    ranks = dict.fromkeys(shapes, 0) | {"model.layers.0.self_attn.q_proj": 5, "model.layers.1.mlp.up_proj": 1}
    weights = training.train(Wrapped(llama), examples(4), dataclasses.replace(CONFIG, lora_rank_of=ranks))
    assert {p: m.rank for p, m in weights.modules.items()} == {p: r for p, r in ranks.items() if r}


def test_full_fine_tuning_of_the_same_tree(llama):
    model = Wrapped(llama)
    data = examples(8)
    before, _ = training.evaluate_loss(model, data)
    made = training.train_dense(model, data, dataclasses.replace(CONFIG, learning_rate=1e-2, epochs=10), lambda e: None)
    assert training.evaluate_loss(model, data)[0] < before
    assert made["memory"]["adapters"] == 4 * sum(m.weight.numel() for m in layers.linears(model.tree).values())


def test_divergence_is_an_error(llama):
    data, model = examples(4), Wrapped(llama)
    with pytest.raises(Diverged, match="not finite"):
        config = dataclasses.replace(CONFIG, learning_rate=1e30, lora_dropout=0.0, max_grad_norm=0.0, warmup_ratio=0.0)
        training.train(model, data, config)
    assert not layers.injected(model.tree), "the next rank of a search is trained on it"


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1e308},
        {"epochs": 10**400},
        {"learning_rate": float("nan")},
        {"learning_rate": -1e-3},
        {"lora_alpha": 10**400},
        {"weight_decay": 10**400},
        {"lora_rank": 0},
        {"batch_size": 0},
        {"lora_dropout": 1.0},
        {"compute_dtype": "float8"},
        {"quantization": "fp4"},
        {"quantization": ""},
        {"warmup_ratio": 1.5},
        {"lora_alpha": float("inf")},
        {"patience": 2},
        {"batch_size": 2.5},
        {"learning_rate": "5e-4"},
        {"use_rslora": 1},
        {"seed": True},
        {"seed": 1 << 64},
        {"seed": -(1 << 63) - 1},
        {"target_modules": ()},
        {"target_modules": ("q_proj", 3)},
        {"lora_rank_of": {"model.layers.0.mlp.up_proj": "4"}},
        {"lora_rank_of": {"model.layers.0.mlp.up_proj": True}},
    ],
)
def test_invalid_settings_are_refused_by_name(wrong):
    with pytest.raises(AdapterError) as error:
        TrainingConfig(**wrong)
    assert error.value.param == next(iter(wrong))


@pytest.mark.parametrize("seed", SEEDS)
def test_seeds_at_the_bounds_work(llama, seed):
    config = dataclasses.replace(CONFIG, seed=seed, max_steps=1)
    assert training.train(Wrapped(llama), examples(4), config).metadata["training"]["config"]["seed"] == seed


@pytest.mark.parametrize("rank", [10**9, 10**30])
def test_ranks_that_exceed_memory_are_refused(llama, rank):
    model = Wrapped(llama)
    with pytest.raises(AdapterError, match="MiB are free") as error:
        training.train(model, examples(4), dataclasses.replace(CONFIG, lora_rank=rank))
    assert error.value.param == "lora_rank" and not layers.injected(model.tree)


def test_the_memory_estimate_counts_24_bytes_per_parameter(llama, monkeypatch):
    spec, tree = CONFIG.spec(), copy.deepcopy(llama)
    count = layers.trainable_parameters(layers.shapes(tree), spec)
    monkeypatch.setattr("adapters.memory.free", lambda: 24 * count - 1)
    with pytest.raises(AdapterError, match="MiB are free"):
        layers.check_room(tree, spec)
    monkeypatch.setattr("adapters.memory.free", lambda: 24 * count)
    layers.check_room(tree, spec)


def test_packing_contains_every_example_once():
    data = examples(20).examples
    packed = training.pack(data, 20)
    assert sorted(e.ids for p in packed for e in p) == sorted(e.ids for e in data)
    assert all(sum(len(e.ids) for e in p) <= 20 for p in packed)
    assert [len(p) for p in training.pack(data[:2], 1)] == [1, 1]


def test_adamw_equals_torch():
    torch.manual_seed(0)
    ours, theirs = ([nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(5))] for _ in range(2))
    with torch.no_grad():
        for a, b in zip(ours, theirs, strict=True):
            b.copy_(a)
    flat = AdamW(ours, weight_decay=0.1)
    oracle = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for step in range(5):
        for a, b in zip(ours, theirs, strict=True):
            (a.sin() * (step + 1)).sum().backward()
            (b.sin() * (step + 1)).sum().backward()
        norm = flat.clip(0.5)
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs, 0.5)), rel=1e-5)
        flat.step(0.01)
        oracle.step()
        oracle.zero_grad()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(s, 100, 1.0, 10) for s in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and rates[10] == 1.0
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False)) and 0 < rates[-1] < 1e-3
    assert math.isclose(rates[55], 0.5)


def test_seven_billion_parameters_need_four_million():
    llama = {f"model.layers.{i}.self_attn.{p}_proj": (4096, 4096) for i in range(32) for p in "qkvo"} | {
        f"model.layers.{i}.mlp.up_proj": (11008, 4096) for i in range(32)
    }
    spec = LoraSpec(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    assert layers.trainable_parameters(llama, spec) == 4_194_304
    qwen = {
        f"model.layers.{i}.self_attn.{p}_proj": (out, 3584)
        for i in range(28)
        for p, out in (("q", 3584), ("k", 512), ("v", 512), ("o", 3584))
    }
    assert layers.trainable_parameters(qwen, dataclasses.replace(spec, rank=8)) == 5_046_272
    with pytest.raises(BaseMismatch, match="no linear"):
        LoraSpec(targets=("W_pack",)).ranks(llama)


def test_inject_and_eject(llama):
    tree = copy.deepcopy(llama)
    names = [n for n, _ in tree.named_parameters()]
    found = layers.inject(tree, LoraSpec(targets=r".*layers\.1\..*(q|k)_proj"))
    assert sorted(found) == ["model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"]
    assert [n for n, p in tree.named_parameters() if p.requires_grad] == [
        f"{path}.lora_{half}"
        for path in ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj")
        for half in "AB"
    ]
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(tree(ids).logits, llama(ids).logits), "B begins at zero"
    with pytest.raises(AdapterError, match="already"):
        layers.inject(tree, LoraSpec())
    layers.eject(tree)
    assert [n for n, _ in tree.named_parameters()] == names and not layers.injected(tree)


@pytest.mark.parametrize("bias", [False, True])
def test_the_fused_linear_equals_autograd(bias):
    """What autograd makes of the formula, on inputs of three dimensions, with and without a gradient of the input."""
    torch.manual_seed(0)
    base = torch.nn.Linear(6, 5, bias=bias).double().requires_grad_(False)
    layer = layers.LoRALinear(base, rank=2, alpha=3).double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    out = torch.randn(2, 4, 5, dtype=torch.float64)
    given = (x, layer.lora_A, layer.lora_B)
    plain = base(x) + layer.scale * (x @ layer.lora_A.T) @ layer.lora_B.T
    expected = torch.autograd.grad(plain, given, out)
    assert torch.allclose(layer(x), plain)
    for ours, theirs in zip(torch.autograd.grad(layer(x), given, out), expected, strict=True):
        assert torch.allclose(ours, theirs)
    layer(x.detach()).backward(out)
    assert torch.allclose(layer.lora_A.grad, expected[1])
    nothing = torch.zeros(3, 0, 6, dtype=torch.float64, requires_grad=True)
    layer(nothing).sum().backward()
    assert layer(nothing).shape == (3, 0, 5) and nothing.grad.shape == nothing.shape


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_small_updates_are_not_lost_to_bf16_rounding(dropout, bias):
    """In bf16, where a base's product that is rounded first swallows it: all of it is there in the mean."""
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 64, bias=bias).bfloat16().requires_grad_(False)
    layer = layers.LoRALinear(base, rank=4, alpha=4, dropout=dropout)
    torch.nn.init.normal_(layer.lora_B, std=2e-4)
    x = torch.randn(4, 1024, 64).bfloat16()
    update = (x.float() @ layer.lora_A.T @ layer.lora_B.T).detach()
    plain = F.linear(x.float(), base.weight.float(), base.bias.float() if bias else None)
    assert update.abs().mean() < 2**-9 * plain.abs().mean() / 2
    for learns in (True, False):
        found = layer.train(learns)(x).detach().float() - plain
        assert float((found * update).sum() / update.square().sum()) == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"rank": -1}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_invalid_lora_arguments_are_refused_by_name(wrong):
    with pytest.raises(AdapterError) as error:
        layers.LoRALinear(torch.nn.Linear(3, 2), **{"rank": 2, "alpha": 3.0, **wrong})
    assert error.value.param == f"lora_{next(iter(wrong))}"


def test_patience_counts_consecutive_evaluations(llama, monkeypatch):
    losses = iter([5.0, 6.0, 4.0, 6.0, 3.0, 6.0, 6.0, 1.0])
    monkeypatch.setattr(training, "evaluate_loss", lambda *args: (next(losses), 0.0))
    config = dataclasses.replace(CONFIG, epochs=8, batch_size=4, eval_steps=1, patience=2)
    made = training.train(Wrapped(llama), examples(4), config, validation=examples(2)).metadata["training"]
    assert made["steps"] == 7 and made["best_step"] == 5


def test_a_checkpoint_with_other_initial_weights_is_refused(llama, tmp_path):
    first = training.train(Wrapped(llama), examples(8), CONFIG)
    with pytest.raises(TrainingStopped):
        training.train(
            Wrapped(llama), examples(8), CONFIG, init=first, checkpoints=tmp_path, stop=iter([False, True]).__next__
        )
    with pytest.raises(AdapterError, match="another run"):
        training.train(Wrapped(llama), examples(8), CONFIG, checkpoints=tmp_path)


def test_evaluation_disables_dropout_and_restores_the_mode(llama):
    model, data = Wrapped(llama), examples(6)
    found = layers.inject(model.tree, dataclasses.replace(CONFIG, lora_dropout=0.5).spec(), seed=0)
    for layer in found.values():
        layer.lora_B.data.normal_(0, 0.3)
    model.tree.train(False)
    quiet = training.evaluate_loss(model, data)
    model.tree.train(True)
    assert training.evaluate_loss(model, data) == quiet and model.tree.training


def test_a_step_reports_loss_and_accuracy(llama):
    """Of the first one, those of the base: the LoRA does nothing yet."""
    data, events = examples(6), []
    # what the base says itself is right at some places, and never at others
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=6, lora_dropout=0.0)
    with torch.no_grad():
        model = Wrapped(llama)
        likely = [model.model(torch.tensor([e.ids])).logits[0].argmax(-1).tolist() for e in data.examples]
    data = Tokens(
        tuple(
            dataclasses.replace(e, ids=(*e.ids[:-1], said[-2])) for e, said in zip(data.examples, likely, strict=True)
        ),
        too_long=3,
    )
    targets = sum(e.targets for e in data.examples)
    loss, accuracy = training.evaluate_loss(Wrapped(llama), data)
    assert len(data.examples) / targets <= accuracy <= 1.0
    made = training.train(Wrapped(llama), data, config, on_event=events.append).metadata["training"]
    assert events[0].loss == pytest.approx(loss, rel=1e-4) and events[0].accuracy == pytest.approx(accuracy)
    assert made["target_tokens"] == targets and made["left_out_as_too_long"] == 3
    assert made["from"] is None and made["tokens"] == sum(len(e.ids) for e in data.examples)


@pytest.mark.parametrize(("changed", "value"), [("weight_decay", 0.5), ("max_grad_norm", 1e-3)])
def test_optimizer_settings_change_the_result(llama, changed, value):
    config = dataclasses.replace(CONFIG, epochs=4, learning_rate=0.1)
    one = training.train(Wrapped(llama), examples(8), config)
    assert (
        training.train(Wrapped(llama), examples(8), dataclasses.replace(config, **{changed: value})).digest
        != one.digest
    )


def test_gradients_are_clipped_to_max_grad_norm(llama, monkeypatch):
    seen = []
    clip = training.AdamW.clip
    monkeypatch.setattr(training.AdamW, "clip", lambda self, most: seen.append(most) or clip(self, most))
    training.train(Wrapped(llama), examples(4), dataclasses.replace(CONFIG, epochs=1, max_grad_norm=0.25))
    assert set(seen) == {0.25}


def test_epochs_have_different_orders(llama):
    run = training._Run(Wrapped(llama), examples(12), CONFIG, [torch.zeros(1, requires_grad=True)], None, None, "")
    per_epoch = -(-12 // CONFIG.batch_size)
    epochs = [[e.ids for s in range(per_epoch) for e in run._batch(n * per_epoch + s)] for n in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == sorted(e.ids for e in examples(12).examples) for epoch in epochs)


def test_training_does_not_use_the_global_generator(llama):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    training.train(Wrapped(llama), examples(4), dataclasses.replace(CONFIG, epochs=1, lora_dropout=0.5))
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpoints_depend_on_the_base_and_not_on_the_output_folder(llama, tmp_path):
    config = dataclasses.replace(CONFIG, output="here")
    with pytest.raises(TrainingStopped):
        training.train(Wrapped(llama), examples(8), config, checkpoints=tmp_path, stop=iter([False, True]).__next__)
    other = Wrapped(llama)
    other.metadata = {**Wrapped.metadata, "base": "another"}
    with pytest.raises(AdapterError, match="another run"):
        training.train(other, examples(8), config, checkpoints=tmp_path)
    with pytest.raises(AdapterError, match="another run"):
        training.train(Wrapped(llama), examples(8), config, checkpoints=tmp_path, validation=examples(2))
    steps = []
    moved = dataclasses.replace(config, output="there")
    training.train(
        Wrapped(llama), examples(8), moved, checkpoints=tmp_path, on_event=lambda e: steps.append((e.kind, e.step))
    )
    assert steps[0] == ("step", 2), "the result may be put elsewhere"


def test_number_of_updates():
    def steps(examples, **settings):
        return TrainingConfig(batch_size=4, **settings).steps(examples)

    assert (steps(1, epochs=0.1), steps(9, epochs=1.0), steps(9, epochs=0.9), steps(9, epochs=1.2)) == (1, 3, 3, 4)
    assert steps(9, epochs=5.0, max_steps=4) == 4 and steps(9, epochs=1.0, max_steps=4) == 3


def test_warmup_steps_are_rounded_up(llama):
    rates = []
    config = dataclasses.replace(CONFIG, epochs=2, batch_size=4, warmup_ratio=0.4, learning_rate=1.0)
    training.train(Wrapped(llama), examples(8), config, on_event=lambda e: rates.append(e.learning_rate))
    assert rates[:2] == [training.learning_rate(step, 4, 1.0, 2) for step in range(2)]


def test_the_first_of_equal_losses_is_the_best(llama, monkeypatch):
    monkeypatch.setattr(training, "evaluate_loss", lambda *args: (1.0, 0.5))
    config = dataclasses.replace(CONFIG, epochs=3, batch_size=4, eval_steps=1, patience=0)
    made = training.train(Wrapped(llama), examples(4), config, validation=examples(2)).metadata["training"]
    assert made["steps"] == 3 and made["best_step"] == 1


def test_a_finished_run_is_not_trained_again(llama, tmp_path):
    config = dataclasses.replace(CONFIG, epochs=2, save_steps=0)
    told = []
    training.train(Wrapped(llama), examples(4), config, checkpoints=tmp_path)
    training.train(Wrapped(llama), examples(4), config, checkpoints=tmp_path, on_event=lambda e: told.append(e.kind))
    assert told == ["done"]


def test_activation_checkpointing_restores_the_blocks(llama):
    model = Wrapped(llama)
    config = dataclasses.replace(CONFIG, epochs=1, activation_checkpointing=True)
    training.train(model, examples(4), config)
    assert not [block for block in model.blocks if "forward" in vars(block)]


def test_the_batch_loss_is_the_mean_over_target_tokens(llama, monkeypatch):
    """What gradients are clipped to goes by it, though Adam itself hardly sees a factor."""
    data, norms = examples(6), []
    clip = AdamW.clip
    monkeypatch.setattr(AdamW, "clip", lambda self, most: norms.append(clip(self, most)) or norms[-1])
    config = dataclasses.replace(CONFIG, epochs=1, batch_size=6, lora_dropout=0.0, micro_tokens=8)
    training.train(Wrapped(llama), data, config)
    model = Wrapped(llama)
    found = layers.inject(model.tree, config.spec(), config.seed)
    plain_loss(model.model, data).backward()
    whole = torch.cat([p.grad.flatten() for layer in found.values() for p in (layer.lora_A, layer.lora_B)])
    assert norms == [pytest.approx(float(whole.norm()), rel=1e-4)]


def test_initialization_has_the_variance_of_peft(llama):
    """A with the variance of PEFT's uniform start, B at zero."""
    base = torch.nn.Linear(4000, 3)
    a = layers.LoRALinear(base, rank=60, alpha=1, generator=torch.Generator().manual_seed(0)).lora_A.detach()
    peft = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=60, target_modules=["0"]))
    theirs = peft.base_model.model[0].lora_A["default"].weight.detach()
    assert a.shape == theirs.shape and float(a.std() / theirs.std()) == pytest.approx(1.0, abs=0.02)
    one, again, other = (layers.inject(copy.deepcopy(llama), CONFIG.spec(), seed) for seed in (3, 3, 4))
    for path, layer in one.items():
        assert torch.equal(layer.lora_A, again[path].lora_A) and not torch.equal(layer.lora_A, other[path].lora_A)
        assert not layer.lora_B.any()


def test_dropout_rate():
    layer = layers.LoRALinear(torch.nn.Linear(8, 8, bias=False).requires_grad_(False), rank=8, alpha=8, dropout=0.2)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A.copy_(torch.eye(8))
        layer.lora_B.copy_(torch.eye(8))
    torch.manual_seed(0)
    seen = layer.train()(torch.ones(2000, 8)).detach()
    assert set(seen.unique().tolist()) == {0.0, 1.25}
    assert float((seen == 0).float().mean()) == pytest.approx(0.2, abs=0.02)
