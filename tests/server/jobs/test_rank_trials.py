"""Trials of a rank search: their data, their config and their score."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import Diverged, InvalidData
from adapters.training import TrainingConfig
from server.jobs import rank_trials
from server.jobs.rank_trials import RankTrials, examples, ranks_within_budget
from server.jobs.recipe import Recipe
from server.jobs.trainable_model import TrainableModel
from server.model.loader import Base

TASK = {"prompt": "{input}", "format": "raw"}


def write(folder: Path, lines: list[dict[str, str]]) -> None:
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_examples_that_no_engine_can_answer_are_not_scored(tiny_base: Base, tmp_path: Path) -> None:
    lines = [{"input": "the 1", "output": "good"}, {"input": "", "output": "good"}, {"input": "x " * 90, "output": "b"}]
    write(tmp_path, lines)
    config = TrainingConfig(max_length=50, data="d.jsonl")
    found = examples(Recipe("m", "d.jsonl", TASK, config, validation="d.jsonl"), tiny_base, tmp_path, 10)
    assert [record.line for record in found.records] == [1]
    assert len(found.validation.examples) == len(found.training.examples) == 2, "the loss allows an empty prompt"


def test_held_out_examples_are_not_learned_even_if_fewer_are_used(tiny_base: Base, tmp_path: Path) -> None:
    write(tmp_path, [{"input": f"the {i // 2}", "output": "good"} for i in range(200)])  # each twice
    recipe = Recipe("m", "d.jsonl", TASK, TrainingConfig(data="d.jsonl"))
    every, few = (examples(recipe, tiny_base, tmp_path, limit) for limit in (500, 5))
    assert len(every.validation.examples) == 20 and len(few.validation.examples) == 5
    assert few.training == every.training and len(few.training.examples) == 180
    assert not set(few.validation.examples) & set(few.training.examples)


def test_held_out_examples_that_are_too_long_are_named(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, [{"input": "the " * 90, "output": "good"}, *({"input": f"the {i}", "output": "b"} for i in "123")])
    recipe = Recipe("m", "d.jsonl", TASK, TrainingConfig(max_length=50))
    monkeypatch.setattr(rank_trials, "held_out", lambda records, fraction: (0,))
    message = rf"^{re.escape(str(tmp_path))}/d\.jsonl, held out for validation: all 1 examples are longer than 50"
    with pytest.raises(InvalidData, match=message):
        examples(recipe, tiny_base, tmp_path, 10)


def test_a_trial_trains_the_recipe_with_its_rank_steps_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, ...]] = []
    trained = SimpleNamespace(metadata={"training": {"evaluations": [{"loss": 9.0}, {"loss": 1.5}]}})

    def train(model: Any, learned: Any, config: TrainingConfig, **options: Any) -> Any:
        options["on_event"]("an event")
        runs.append((model, learned, config, options["validation"], options["stop"]))
        return trained

    monkeypatch.setattr(rank_trials, "train", train)
    monkeypatch.setattr(rank_trials.pruning, "parameters", lambda weights: 7)
    recipe: Any = SimpleNamespace(config=TrainingConfig(epochs=2, seed=1, eval_steps=5, patience=3))
    found: Any = SimpleNamespace(training="training", validation="validation")
    events: list[tuple[str, Any]] = []

    def stop() -> bool:
        return True

    options: dict[str, Any] = {"on_event": lambda *event: events.append(event), "stop": stop}
    model: Any = "model"
    by_loss = RankTrials(recipe, model, found, **options)
    by_score = RankTrials(recipe, model, found, score=lambda weights: 0.25, **options)
    assert by_loss(4, 30, 9) == (-1.5, 7) and by_score(4, 30, 9) == (0.25, 7)
    config = replace(recipe.config, lora_rank=4, max_steps=30, epochs=30.0, seed=9, eval_steps=0, patience=0)
    assert runs == [("model", "training", config, held, stop) for held in ("validation", None)]
    assert events == [("rank 4, 30 steps, seed 9", "an event")] * 2


def test_a_trial_that_diverges_has_the_lowest_score(monkeypatch: pytest.MonkeyPatch, tiny_base: Base) -> None:
    def train(*given: Any, **options: Any) -> Any:
        raise Diverged("the gradient of step 3 is not finite", "learning_rate")

    monkeypatch.setattr(rank_trials, "train", train)
    recipe: Any = SimpleNamespace(config=TrainingConfig())
    found: Any = SimpleNamespace(training="training", validation="validation")
    trials = RankTrials(recipe, TrainableModel(tiny_base, "float32"), found)
    (one, few), (two, more) = trials(1, 30, 9), trials(2, 30, 9)
    assert one == two == float("-inf") and more == 2 * few > 0


@pytest.mark.parametrize(("budget", "ranks"), [(10, [1]), (19, [1]), (20, [1, 2]), (10**9, [2**i for i in range(12)])])
def test_the_ranks_of_a_budget(budget: int, ranks: list[int]) -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (6, 4)}
    assert ranks_within_budget(shapes, TrainingConfig(target_modules="all-linear"), budget) == ranks
