"""Rank search on scores that are known, and auto-LoRA on a tiny Llama."""

from __future__ import annotations

import dataclasses
import json
import shutil
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from adapters import layers, pruning, rank_search, training
from adapters.data import Example, Tokens
from adapters.errors import AdapterError, TrainingStopped
from adapters.pruning import parameters
from adapters.training import TrainingConfig
from adapters.weights import LowRank, with_digest


def known(best: dict[int, float]):
    calls = []

    def trial(rank, steps, seed):
        calls.append((rank, steps, seed))
        return best[rank] * (1 - 1 / (1 + steps)) + 0.001 * (seed % 2), 1000 * rank

    return trial, calls


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ({2: 0.80, 4: 0.90, 8: 0.905, 16: 0.908, 32: 0.906}, 4),
        ({2: 0.90, 4: 0.90, 8: 0.90, 16: 0.90, 32: 0.90}, 2),
        ({2: 0.50, 4: 0.60, 8: 0.70, 16: 0.80, 32: 0.90}, 32),
    ],
)
def test_search_chooses_the_smallest_good_rank(scores, chosen):
    trial, calls = known(scores)
    found = rank_search.search_rank(trial, list(scores), max_steps=270, seeds=(0, 1))
    assert found.chosen == chosen
    assert found.steps_spent == sum(steps for _, steps, _ in calls)
    assert found.steps_spent <= found.steps_of_full_grid / 3
    assert {row.rank for row in found.table} == set(scores) and f"rank {chosen}" in found.advice
    picture = ElementTree.fromstring(rank_search.plot(found.table, found.chosen))
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == len(scores)


def test_small_ranks_may_learn_more_slowly():
    def trial(rank, steps, seed):
        return 0.9 - 0.2 / (rank * steps), 1000 * rank

    found = rank_search.search_rank(trial, [1, 2, 4, 8, 16], max_steps=100)
    assert 0.01 < trial(16, 11, 0)[0] - trial(1, 11, 0)[0] < 0.03, "worse by more than the tolerance after a ninth"
    assert found.chosen == 1 and found.steps_spent == 5 * 11 + 3 * 33


def test_one_candidate_and_none():
    trial, _ = known({8: 0.5})
    alone = rank_search.search_rank(trial, [8], max_steps=30)
    assert alone.chosen == 8 and "dropped out" not in alone.advice, "there are no others"
    assert "times its parameters" not in alone.advice
    for wrong in ({"ranks": []}, {"ranks": [0]}, {"ranks": [4], "seeds": ()}, {"ranks": [4], "share": 0.0}):
        with pytest.raises(AdapterError):
            rank_search.search_rank(trial, **{"max_steps": 10, **wrong})


def test_too_few_steps_for_the_share_are_refused():
    trial, calls = known({1: 0.1, 2: 0.2, 4: 0.3, 8: 0.4, 16: 0.5})
    few = rank_search.search_rank(trial, [1, 2, 4, 8, 16], max_steps=5)
    assert few.steps_spent == 8 and "compared at the longest trial" in few.advice
    with pytest.raises(AdapterError, match="4 steps are too few for 5 ranks"):
        rank_search.search_rank(trial, [1, 2, 4, 8, 16], max_steps=4)
    assert sum(steps for _, steps, _ in calls) == 8, "nothing is spent before it is refused"


@pytest.fixture
def model(tiny_base):
    from server.jobs.trainable_model import TrainableModel

    return TrainableModel(tiny_base, "float32")


@pytest.fixture
def data():
    draw = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 200, (9,), generator=draw).tolist() for _ in range(12)]
    return Tokens(tuple(Example(tuple(i), (False,) * 5 + (True,) * 4) for i in ids))


CONFIG = TrainingConfig(lora_rank=2, epochs=4, batch_size=4, learning_rate=0.01)


def test_allocate_gives_ranks_to_inputs_with_variance(model, data):
    ranks, directions = rank_search.allocate(model, data, CONFIG)
    assert sum(ranks.values()) == 2 * len(ranks) and max(ranks.values()) <= 4
    for path, rows in directions.items():
        assert len(rows) == ranks[path]
        assert torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)


@pytest.mark.parametrize("rslora", [False, True])
def test_auto_lora_starts_with_the_configured_scale(model, data, monkeypatch, rslora):
    config = dataclasses.replace(CONFIG, use_rslora=rslora)
    train, starts = training.train, []

    def seen(model, data, config, init, **options):
        starts.append(init)
        return train(model, data, config, init, **options)

    monkeypatch.setattr(training, "train", seen)
    rank_search.auto_lora(model, data, config)
    scale = config.lora_alpha / (config.lora_rank**0.5 if rslora else config.lora_rank)
    assert [module.scale for module in starts[0].modules.values()] == [scale] * len(starts[0].modules)
    for module in starts[0].modules.values():  # as long as PEFT's random rows are, and an update of zero
        assert torch.allclose(module.A.norm(dim=1), torch.tensor(3.0).rsqrt()) and not module.B.any()


def test_auto_lora_excludes_modules_of_rank_zero(model, data):
    """A module that is told to have rank 0 has none, before the cut or after it."""
    paths = list(layers.LoraSpec(rank=2).ranks(layers.linears(model.tree)))
    config = dataclasses.replace(CONFIG, lora_rank_of={paths[0]: 0, paths[1]: 3})
    weights = rank_search.auto_lora(model, data, config)
    assert paths[0] not in weights.modules and paths[0] not in weights.metadata["auto_lora"]["ranks"]
    assert weights.modules


def test_auto_lora_keeps_to_the_budget(model, data, monkeypatch):
    allocate = rank_search.allocate

    def without_one(*given):
        ranks, directions = allocate(*given)
        left_out = next(iter(directions))
        del directions[left_out]
        return ranks | {left_out: 0}, directions

    monkeypatch.setattr(rank_search, "allocate", without_one)
    events = []
    weights = rank_search.auto_lora(model, data, CONFIG, validation=data, on_event=events.append)
    made, steps = weights.metadata["training"], [e for e in events if e.kind == "step"]
    assert made["from"] is None and made["steps"] == len(steps) == 13, "12 before the cut and a tenth of them after it"
    assert made["tokens"] == 9 * 4 * 13 and [e["step"] for e in made["evaluations"]] == [13]
    assert made["best_step"] == 13
    rates = [e.learning_rate for e in steps]
    assert rates[12] == pytest.approx(CONFIG.learning_rate / 4)
    uniform = layers.LoraSpec(rank=2).ranks(layers.linears(model.tree))
    budget = weights.metadata["auto_lora"]["budget"]
    assert parameters(weights) <= budget and not layers.injected(model.tree)
    assert sorted([*weights.modules, *weights.metadata["auto_lora"]["dropped"]]) == sorted(uniform)
    at_last = 4 * parameters(weights)
    assert made["memory"]["adapters"] > at_last, "the most that either run took, which the first did"
    base, _ = training.evaluate_loss(model, data)
    spec = dataclasses.replace(
        CONFIG, lora_rank_of=dict.fromkeys(uniform, 0) | weights.metadata["auto_lora"]["ranks"]
    ).spec()
    layers.load(layers.inject(model.tree, spec), weights)
    assert training.evaluate_loss(model, data)[0] < base


def stopping(at):
    """`told, stop`: events as they are told, and a stop after the step `at`, of both runs together."""
    told = []
    return told, lambda: sum(event.kind == "step" for event in told) == at


@pytest.mark.parametrize("at", [0, 3, 12])
def test_auto_lora_resumes_from_the_stored_start_and_cut(model, data, tmp_path, monkeypatch, at):
    """Another number of threads sums otherwise, and would begin from another: here as if by far."""
    whole = rank_search.auto_lora(model, data, CONFIG)
    told, stop = stopping(at)
    with pytest.raises(TrainingStopped):
        rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path, on_event=told.append, stop=stop)
    monkeypatch.setattr(rank_search, "allocate", None)
    if at == 12:
        monkeypatch.setattr(pruning, "truncate_globally", None)
    on = []
    resumed = rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path, on_event=on.append)
    assert resumed.digest == whole.digest
    assert resumed.metadata["auto_lora"] == whole.metadata["auto_lora"]
    assert resumed.metadata["training"]["steps"] == whole.metadata["training"]["steps"] == 13
    assert json.loads(json.dumps(resumed.metadata["pruning"])) == json.loads(json.dumps(whole.metadata["pruning"]))
    ends = [(event.step, event.tokens) for event in on if event.kind == "done"]
    assert ends == [(12, 12 * 36), (1, 36)], "who counts hears of both runs"
    assert sum(event.kind == "step" for event in on) == 13 - at


def test_auto_lora_with_other_settings_does_not_resume(model, data, tmp_path):
    other = dataclasses.replace(CONFIG, learning_rate=0.003)
    told, stop = stopping(0)
    with pytest.raises(TrainingStopped):
        rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path, on_event=told.append, stop=stop)
    told, stop = stopping(2)
    with pytest.raises(TrainingStopped):  # nothing was trained from that start
        rank_search.auto_lora(model, data, other, checkpoints=tmp_path, on_event=told.append, stop=stop)
    with pytest.raises(AdapterError, match=f"{tmp_path.name} is of another run .*remove that folder"):
        rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path)
    assert (
        rank_search.auto_lora(model, data, other, checkpoints=tmp_path).digest
        == rank_search.auto_lora(model, data, other).digest
    )


def test_the_initial_scale_depends_on_rank_and_width(model, data, tmp_path):
    """Other ranks that are as wide begin from as many directions, and are scaled and cut otherwise."""
    told, stop = stopping(12)
    with pytest.raises(TrainingStopped):
        rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path, on_event=told.append, stop=stop)
    twice = dataclasses.replace(CONFIG, lora_rank=4)
    (tmp_path / "cut").rename(tmp_path / "kept")
    with pytest.raises(AdapterError, match="another run"):
        rank_search.auto_lora(model, data, twice, widen=1.0, checkpoints=tmp_path)
    (tmp_path / "kept").rename(tmp_path / "cut")
    (tmp_path / "narrow").mkdir(exist_ok=True)
    (tmp_path / "narrow" / "checkpoint.safetensors").touch()
    with pytest.raises(AdapterError, match="another run"):
        rank_search.auto_lora(model, data, twice, widen=1.0, checkpoints=tmp_path)


def test_a_run_of_another_cut_starts_again(model, data, tmp_path, monkeypatch):
    """As versions that kept none have left one: the long run before it is not lost for that."""
    told, stop = stopping(14)
    with pytest.raises(TrainingStopped):
        rank_search.auto_lora(model, data, CONFIG, recovery=0.5, checkpoints=tmp_path, on_event=told.append, stop=stop)
    shutil.rmtree(tmp_path / "cut")
    truncate = pruning.truncate_globally

    def otherwise(weights, **bound):
        cut, told = truncate(weights, **bound)
        modules = {path: LowRank(m.A * 2.0, m.B / 2.0, m.scale) for path, m in cut.modules.items()}
        return with_digest(cut.name, modules, cut.metadata), told

    monkeypatch.setattr(pruning, "truncate_globally", otherwise)
    on = []
    resumed = rank_search.auto_lora(model, data, CONFIG, recovery=0.5, checkpoints=tmp_path, on_event=on.append)
    assert sum(event.kind == "step" for event in on) == 6
    assert resumed.digest == rank_search.auto_lora(model, data, CONFIG, recovery=0.5).digest


@pytest.mark.parametrize("at", [0, 12])
def test_a_damaged_start_is_computed_again_if_unused(model, data, tmp_path, at):
    told, stop = stopping(at)
    with pytest.raises(TrainingStopped):
        rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path, on_event=told.append, stop=stop)
    (tmp_path / "start" / "checkpoint.safetensors").write_bytes(b"half a fi")
    assert (
        rank_search.auto_lora(model, data, CONFIG, checkpoints=tmp_path).digest
        == rank_search.auto_lora(model, data, CONFIG).digest
    )


@pytest.mark.parametrize("lost", [float("nan"), float("-inf")])
def test_a_diverging_rank_does_not_stop_the_search(lost):
    calls = []

    def trial(rank, steps, seed):
        calls.append((rank, steps))
        return lost if rank in (4, 8) and seed else rank / 100, 1000 * rank

    found = rank_search.search_rank(trial, [1, 2, 4, 8], max_steps=90, seeds=(0, 1), tolerance=0.001, share=1.0)
    assert found.chosen == 2 and [row.diverged for row in found.table] == [False, False, True, True]
    assert found.steps_spent == sum(steps for _, steps in calls)
    assert {rank for rank, steps in calls if steps == 30} == {1, 2}, "nothing more is spent on the others"
    assert "It is the largest" in found.advice and "Training diverged with rank 4, 8" in found.advice
    picture = ElementTree.fromstring(rank_search.plot(found.table, found.chosen))
    assert len(picture.findall("{http://www.w3.org/2000/svg}circle")) == 2

    with pytest.raises(AdapterError, match="training diverges with rank 2, 4 in 10 steps; lower the learning rate"):
        rank_search.search_rank(lambda *_: (lost, 1), [2, 4], max_steps=90, share=1.0)
    with pytest.raises(AdapterError, match="training diverges with rank 2, 4 in 30 steps; lower the learning rate"):
        rank_search.search_rank(
            lambda rank, steps, seed: (lost if steps > 10 else rank, 1), [2, 4], max_steps=90, share=1.0
        )


def test_the_report_has_the_maximum_memory_of_both_runs():
    """Above what there was before the first: the second begins with what that has left."""
    wide = {"adapters": 9, "peak_process": 120, "peak_above_start": 20}
    narrow = {"adapters": 4, "peak_process": 125, "peak_above_start": -3}
    assert rank_search._max_memory(wide, narrow) == {"adapters": 9, "peak_process": 125, "peak_above_start": 25}
    unknown = {"adapters": 9, "peak_process": None, "peak_above_start": None}
    assert rank_search._max_memory(unknown, unknown) == unknown


def test_allocate_uses_the_explained_share_of_variance(model, data, monkeypatch):
    """However large its inputs are: one whose inputs lie along one direction has use for no second."""
    inputs, first = {}, {}
    for place, (path, (_, width)) in enumerate(sorted(layers.shapes(model.tree).items())):
        basis = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(place)))[0][:6]
        sizes = torch.tensor([1000.0] + [10.0] * 5) if place % 2 else torch.tensor([2.0, 1.9, 1.8, 1.7, 1.6, 1.5])
        inputs[path], first[path] = sizes[:, None] * basis, basis[0]
    monkeypatch.setattr(rank_search, "_inputs", lambda *_: inputs)
    ranks, directions = rank_search.allocate(model, data, CONFIG)
    assert [ranks[path] for path in sorted(ranks)] == [3, 1] * (len(ranks) // 2)
    for path, rows in directions.items():
        assert abs(float(rows[0] @ first[path])) == pytest.approx(1.0, abs=1e-3), "the first is that of most variance"
