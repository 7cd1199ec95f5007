"""Training a recipe: what is written, when it is skipped, and what the model card says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import peft_format
from adapters.errors import BaseMismatch, InvalidData
from adapters.weights import LowRank, with_digest
from server.errors import BadSetting
from server.jobs import train_recipe
from server.jobs.model_card import model_card
from server.jobs.recipe import Recipe, read_recipe
from server.jobs.train_recipe import finished, prepare, run
from server.kernels import cpu_info
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from server.tasks.definitions import FixedRoute, parse
from tests.server.jobs.test_recipe import RECIPE

Write = Callable[..., Recipe]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name)`: a recipe with its data."""

    def make(name: str = "one", count: int = 1, extra: str = "", without: str = "") -> Recipe:
        text = RECIPE.format(name=name, data=f"{name}.jsonl").replace(without, "") + extra
        (tmp_path / "r.toml").write_text("\ufeff" + text, encoding="utf-8")
        lines = [json.dumps({"input": f"{name} {i}", "output": "yes"}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        return read_recipe(tmp_path / "r.toml")

    return make


def test_two_recipes_over_one_base(tiny_base: Base, tmp_path: Path, write: Write) -> None:
    for name in ("one", "two"):
        run(write(name, 4), tiny_base, tmp_path / "out", data_dir=tmp_path)
    for name in ("one", "two"):
        weights = peft_format.read_folder(tmp_path / "out" / name, name=name, shapes=tiny_base.shapes())
        assert weights.ranks == [2] and weights.metadata["training"]["samples"] == 4
        assert weights.metadata["quantization"]["base_id"] == tiny_base.id
        assert weights.metadata["task"]["prompt"] == "Say: {input}"
        assert "4 examples" in weights.metadata["card"] and "2 steps of 2" in weights.metadata["card"]
    assert not (tmp_path / "out" / ".checkpoints" / "one").exists()


def test_a_result_in_another_compute_dtype_is_trained_again(
    tiny_base: Base, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_info, "CPUINFO", tmp_path / "none")  # no bfloat16
    recipe, out = write(without='compute_dtype = "float32"\n'), tmp_path / "out"
    result = run(recipe, tiny_base, out, data_dir=tmp_path)
    assert "float32" in (out / "one" / "README.md").read_text()
    done = finished(recipe, tiny_base, out, data_dir=tmp_path)
    assert done is not None and done.digest == result.digest
    other = replace(recipe, config=replace(recipe.config, compute_dtype="bfloat16"))
    assert finished(other, tiny_base, out, data_dir=tmp_path) is None


def test_an_adapter_whose_halves_cancel_is_not_lost_by_rounding(
    tiny_base: Base, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, (out, into) = next(iter(tiny_base.shapes().items()))
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, into, generator=draw), torch.randn(out, 1, generator=draw)
    halves = torch.cat([a, a + 1e-3 * torch.randn(1, into, generator=draw)]), torch.cat([b, -b], 1)
    trained = with_digest("one", {path: LowRank(*halves, 1.0)})
    train = train_recipe.train

    def fake(*given: Any, **options: Any) -> Any:
        return replace(trained, metadata=train(*given, **options).metadata)

    monkeypatch.setattr(train_recipe, "train", fake)
    result = run(write(), tiny_base, tmp_path / "out", data_dir=tmp_path)
    assert torch.dist(result.delta(path), trained.delta(path)) < 0.02 * trained.delta(path).norm()


def test_two_processes_cannot_train_one_adapter(tiny_base: Base, tmp_path: Path, write: Write) -> None:
    recipe, refused = write(), list[str | None]()

    def start_again(event: object) -> None:
        with pytest.raises(BadSetting, match="another process is training one") as error:
            run(recipe, tiny_base, tmp_path / "out", data_dir=tmp_path)
        refused.append(error.value.param)

    run(recipe, tiny_base, tmp_path / "out", data_dir=tmp_path, on_event=start_again)
    assert refused and set(refused) == {"output"}
    run(recipe, tiny_base, tmp_path / "out", data_dir=tmp_path)


def test_a_recipe_without_a_format_trains_on_the_prompt_that_is_served(
    tiny_base: Base, tmp_path: Path, write: Write
) -> None:
    recipe, tokenizer = write(without='format = "chat"\n'), ModelTokenizer(tiny_base.vocabulary)
    task = parse("one", recipe.task, default_route=FixedRoute(), source="file")
    prompt = tokenizer.encode_task(task.prompt, task.format, task.system, "one 0")
    [example] = prepare(recipe, tiny_base, tmp_path)[0].examples
    assert list(example.ids[: len(prompt)]) == prompt and not any(example.learned[: len(prompt)])


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ('target_modules = ["nothing"]', "nothing"),
        ('target_modules = ["q_proj", "mlp.up_porj"]', "mlp.up_porj"),
        ('lora_rank_of = { "model.layers.7.mlp.up_proj" = 3 }', "up_proj', which is no linear"),
        ('target_modules = ["q_proj"]\nlora_rank_of = { "model.layers.0.mlp.up_proj" = 3 }', "not in target_modules"),
    ],
)
def test_missing_modules_are_named_before_training(
    extra: str, message: str, tiny_base: Base, tmp_path: Path, write: Write
) -> None:
    with pytest.raises(BaseMismatch, match=message):
        prepare(write(extra=extra), tiny_base, tmp_path)


def test_the_name_of_the_base_and_bad_lines_are_refused(tiny_base: Base, tmp_path: Path, write: Write) -> None:
    with pytest.raises(BadSetting, match="'tiny' is the base's own"):
        prepare(write("tiny"), tiny_base, tmp_path)
    recipe = write()
    (tmp_path / "one.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a"}\n')
    with pytest.raises(InvalidData, match=r"one\.jsonl, line 2: 'output' is missing"):
        run(recipe, tiny_base, tmp_path, data_dir=tmp_path)


def test_the_figures_of_the_model_card(tiny_base: Base, write: Write) -> None:
    recipe = write()
    training = {"samples": 3, "steps": 2, "evaluations": [{"step": 2, "loss": 0.5, "accuracy": 1.0}], "from": None}
    [(path, (out, into)), (other, _)] = list(tiny_base.shapes().items())[:2]
    module = LowRank(torch.ones(1, into), torch.ones(out, 1), 1.0)
    weights = with_digest("one", {path: module}, {"training": training})
    card = model_card(recipe, weights)
    assert "**Validation**: loss 0.5000" in card and "rank 2, alpha 16" in card
    weights.metadata["pruning"] = {"error": 0.3}
    assert "**Validation** before pruning: loss 0.5000" in model_card(replace(recipe, prune_to=1), weights)
    training["from"] = "first@0123456789ab"
    card = model_card(recipe, weights)
    assert "rank 2" not in card and "continued from first@0123456789ab" in card

    config = replace(recipe.config, target_modules=("q_proj", "v_proj"), use_rslora=True)
    recipe = replace(recipe, config=config, prune_to=1, auto_rank=True)
    metadata = {
        "training": {**training, "from": None, "evaluations": []},
        "quantization": {"scheme": "none"},
        "pruning": {"error": 0.3},
        "auto_lora": {"ranks": {path: 4, other: 1}, "dropped": []},
    }
    card = model_card(recipe, with_digest("one", {path: module}, metadata))
    assert "on the served unquantized weights; rank 2, alpha 16 (rsLoRA), q_proj, v_proj, AdamW" in card
    assert "**Ranks**: 1 to 4 by module" in card and f"**Size**: {into + out} parameters, 0.3 kB" in card
