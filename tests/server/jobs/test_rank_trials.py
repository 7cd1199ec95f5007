"""What judges the trials of a search: no example that an engine would refuse, after all that was trained for it."""

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
from server.jobs.rank_trials import examples
from server.jobs.recipe import Recipe
from server.model.loader import Base


def test_what_no_engine_can_answer_judges_no_trial(tiny_base: Base, tmp_path: Path) -> None:
    lines = [{"input": "the 1", "output": "good"}, {"input": "", "output": "good"}, {"input": "x " * 90, "output": "b"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = TrainingConfig(max_length=50, data="d.jsonl")
    recipe = Recipe("m", "d.jsonl", {"prompt": "{input}", "format": "raw"}, config, validation="d.jsonl")
    found = examples(recipe, tiny_base, tmp_path, 10)
    assert [record.line for record in found.judges] == [1]
    assert len(found.judged.examples) == len(found.learned.examples) == 2, "the loss can have an empty prompt"


def test_what_is_held_out_is_not_learned_though_fewer_judge(tiny_base: Base, tmp_path: Path) -> None:
    lines = [{"input": f"the {i // 2}", "output": "good"} for i in range(200)]  # each twice
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe("m", "d.jsonl", {"prompt": "{input}", "format": "raw"}, TrainingConfig(data="d.jsonl"))
    every, few = (examples(recipe, tiny_base, tmp_path, most) for most in (500, 5))
    assert len(every.judged.examples) == 20 and len(few.judged.examples) == 5
    assert few.learned == every.learned and len(few.learned.examples) == 180
    assert not set(few.judged.examples) & set(few.learned.examples)


def test_what_is_held_out_and_too_long_is_told_as_that(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [{"input": "the " * 90, "output": "good"}, *({"input": f"the {i}", "output": "good"} for i in range(19))]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe("m", "d.jsonl", {"prompt": "{input}", "format": "raw"}, TrainingConfig(max_length=50))
    monkeypatch.setattr(rank_trials, "held_out", lambda records, share: (0,))
    told = rf"^{re.escape(str(tmp_path))}/d\.jsonl, held out to judge by: all 1 examples are longer than 50"
    with pytest.raises(InvalidData, match=told):
        examples(recipe, tiny_base, tmp_path, 10)


def test_a_trial_is_a_run_of_the_recipe_with_its_rank_steps_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[Any, ...]] = []
    trained = SimpleNamespace(metadata={"training": {"evaluations": [{"loss": 9.0}, {"loss": 1.5}]}})

    def train(model: Any, learned: Any, config: TrainingConfig, **how: Any) -> Any:
        how["on_event"]("an event")
        runs.append((model, learned, config, how["validation"], how["stop"]))
        return trained

    monkeypatch.setattr(rank_trials, "train", train)
    monkeypatch.setattr(rank_trials.pruning, "parameters", lambda weights: 7)
    recipe: Any = SimpleNamespace(config=TrainingConfig(epochs=2, seed=1, eval_steps=5, patience=3))
    found: Any = SimpleNamespace(learned="learned", judged="judged")
    heard: list[tuple[str, Any]] = []

    def stop() -> bool:
        return True

    told: dict[str, Any] = {"on_event": lambda *what: heard.append(what), "stop": stop}
    model: Any = "model"
    by_loss = rank_trials.RankTrials(recipe, model, found, **told)
    by_score = rank_trials.RankTrials(recipe, model, found, score=lambda weights: 0.25, **told)
    assert by_loss(4, 30, 9) == (-1.5, 7) and by_score(4, 30, 9) == (0.25, 7)
    config = replace(recipe.config, lora_rank=4, max_steps=30, epochs=30.0, seed=9, eval_steps=0, patience=0)
    assert runs == [("model", "learned", config, judged, stop) for judged in ("judged", None)]
    assert heard == [("rank 4, 30 steps, seed 9", "an event")] * 2


def test_a_trial_that_diverges_has_no_score(monkeypatch: pytest.MonkeyPatch, tiny_base: Base) -> None:
    def train(*given: Any, **how: Any) -> Any:
        raise Diverged("the gradient of step 3 is not finite", "learning_rate")

    monkeypatch.setattr(rank_trials, "train", train)
    recipe: Any = SimpleNamespace(config=TrainingConfig())
    found: Any = SimpleNamespace(learned="learned", judged="judged")
    model: Any = rank_trials.Trainable(tiny_base, "float32")
    one, two = (rank_trials.RankTrials(recipe, model, found)(rank, 30, 9) for rank in (1, 2))
    assert one[0] == two[0] == float("-inf") and two[1] == 2 * one[1] > 0


def test_a_budget_that_a_rank_takes_whole_allows_it_up_to_2048() -> None:
    shapes = {"model.layers.0.self_attn.q_proj": (6, 4)}
    config = TrainingConfig(target_modules="all-linear")
    assert rank_trials.within(shapes, config, 10) == rank_trials.within(shapes, config, 19) == [1]
    assert rank_trials.within(shapes, config, 10 * 4096)[-1] == 2048
