"""Recipes: those that ship can be read and run, and what is wrong with one is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters import data, peft_format
from adapters.errors import BaseMismatch, InvalidData
from adapters.weights import LowRank, with_digest
from server.errors import BadSetting, ServerError
from server.jobs import train_recipe as run_module
from server.jobs.recipe import read_recipe
from server.jobs.train_recipe import card, finished, prepare, run
from server.kernels import cpu_info
from server.model.tokenizer import ModelTokenizer
from server.tasks.definitions import FixedRoute, parse

EXAMPLES = Path(__file__).parents[3] / "examples"
RECIPE = """
name = "{name}"
data = "{data}"
[task]
prompt = "Say: {{input}}"
format = "chat"
[training]
epochs = 1
batch_size = 2
lora_rank = 2
compute_dtype = "float32"
max_length = 200
"""


@pytest.mark.parametrize("folder", sorted(p.parent.name for p in EXAMPLES.glob("*/recipe.toml")))
def test_every_recipe_that_ships_is_whole(folder):
    recipe = read_recipe(EXAMPLES / folder / "recipe.toml")
    assert recipe.name == folder and {"about", "data", "limits"} <= set(recipe.card)
    examples = data.read(EXAMPLES / folder / "example.jsonl")
    labels = recipe.task.get("labels")
    assert all(not labels or e.output in labels for e in examples)


def test_there_is_a_recipe_for_each_adapter_that_ships_and_one_for_code():
    names = {p.parent.name for p in EXAMPLES.glob("*/recipe.toml")}
    assert names >= {"sentiment", "classification", "summarization", "translation", "code"}


def test_a_recipe_without_a_task_is_told_what_it_lacks(tmp_path):
    (tmp_path / "r.toml").write_text('name = "one"\ndata = "d.jsonl"\n[training]\n')
    with pytest.raises(BadSetting, match=r"r.toml: \[task\] is missing") as refused:
        read_recipe(tmp_path / "r.toml")
    assert refused.value.param == "task"


def test_a_recipe_of_deep_brackets_is_told_so(tmp_path):
    (tmp_path / "r.toml").write_text("data = " + "[" * 99_999)
    with pytest.raises(BadSetting, match=r"r.toml: its brackets are too deep"):
        read_recipe(tmp_path / "r.toml")


def test_two_recipes_over_one_base(tiny_base, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.toml").write_text(RECIPE.format(name=name, data=f"{name}.jsonl"))
        lines = [json.dumps({"input": f"{name} {i}", "output": "yes"}) for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        run(read_recipe(tmp_path / f"{name}.toml"), tiny_base, tmp_path / "out", data_dir=tmp_path)
    for name in ("one", "two"):
        weights = peft_format.read_folder(tmp_path / "out" / name, name=name, shapes=tiny_base.shapes())
        assert weights.ranks == [2] and weights.metadata["training"]["samples"] == 4
        assert weights.metadata["quantization"]["base_id"] == tiny_base.id
        assert weights.metadata["task"]["prompt"] == "Say: {input}"
        assert "4 examples" in weights.metadata["card"] and "2 steps of 2" in weights.metadata["card"]
    assert not (tmp_path / "out" / ".checkpoints" / "one").exists()


def test_what_was_left_to_a_machine_without_bf16_is_not_what_asks_for_it(tiny_base, tmp_path, monkeypatch):
    """Though both are one run, of which a checkpoint goes on."""
    monkeypatch.setattr(cpu_info, "CPUINFO", tmp_path / "none")
    (tmp_path / "one.jsonl").write_text("\n".join(json.dumps({"input": f"{i}", "output": "yes"}) for i in range(4)))
    text = RECIPE.format(name="one", data="one.jsonl")
    (tmp_path / "one.toml").write_text(text.replace('compute_dtype = "float32"\n', ""))
    recipe, out = read_recipe(tmp_path / "one.toml"), tmp_path / "out"
    made = run(recipe, tiny_base, out, data_dir=tmp_path)
    assert "float32" in (out / "one" / "README.md").read_text()
    done = finished(recipe, tiny_base, out, data_dir=tmp_path)
    assert done is not None and done.digest == made.digest
    asking = replace(recipe, config=replace(recipe.config, compute_dtype="bfloat16"))
    assert finished(asking, tiny_base, out, data_dir=tmp_path) is None


def test_ranks_that_cancel_are_written_anew_before_a_recipes_result_is_rounded(tiny_base, tmp_path, monkeypatch):
    (tmp_path / "one.toml").write_text(RECIPE.format(name="one", data="one.jsonl"))
    (tmp_path / "one.jsonl").write_text(json.dumps({"input": "this", "output": "yes"}))
    path, (out, into) = next(iter(tiny_base.shapes().items()))
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(1, into, generator=draw), torch.randn(out, 1, generator=draw)
    halves = torch.cat([a, a + 1e-3 * torch.randn(1, into, generator=draw)]), torch.cat([b, -b], 1)
    trained = with_digest("one", {path: LowRank(*halves, 1.0)})
    train = run_module.train
    monkeypatch.setattr(
        run_module, "train", lambda *given, **how: replace(trained, metadata=train(*given, **how).metadata)
    )
    made = run(read_recipe(tmp_path / "one.toml"), tiny_base, tmp_path / "out", data_dir=tmp_path)
    assert torch.dist(made.delta(path), trained.delta(path)) < 0.02 * trained.delta(path).norm()


def test_one_adapter_is_made_by_one_process_at_a_time(tiny_base, tmp_path):
    (tmp_path / "once.toml").write_text(RECIPE.format(name="once", data="once.jsonl"))
    (tmp_path / "once.jsonl").write_text(json.dumps({"input": "this", "output": "yes"}))
    recipe, said = read_recipe(tmp_path / "once.toml"), []

    def begin_again(event):
        with pytest.raises(BadSetting, match="another process is training once") as refused:
            run(recipe, tiny_base, tmp_path / "out", data_dir=tmp_path)
        said.append(refused.value.param)

    run(recipe, tiny_base, tmp_path / "out", data_dir=tmp_path, on_event=begin_again)
    assert said and set(said) == {"output"}
    run(recipe, tiny_base, tmp_path / "out", data_dir=tmp_path)  # it is free again


def test_a_recipe_without_a_format_trains_on_what_is_served(tiny_base, tmp_path):
    """A task's format is raw where none is said, and so is its template for training."""
    whole = RECIPE.format(name="one", data="d.jsonl").replace('format = "chat"\n', "")
    (tmp_path / "r.toml").write_text("\ufeff" + whole, encoding="utf-8")
    (tmp_path / "d.jsonl").write_text('{"input": "a", "output": "b"}')
    recipe, text = read_recipe(tmp_path / "r.toml"), ModelTokenizer(tiny_base.vocabulary)
    task = parse("one", recipe.task, default_route=FixedRoute(), source="file")
    asked = text.encode_task(task.prompt, task.format, task.system, "a")
    [learned] = prepare(recipe, tiny_base, tmp_path)[0].examples
    assert list(learned.ids[: len(asked)]) == asked and not any(learned.learned[: len(asked)])


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('target_modules = ["nothing"]', "target_modules = nothing"),
        ('target_modules = ["q_proj", "mlp.up_porj"]', "target_modules = mlp.up_porj; they are called"),
        (
            'lora_rank_of = { "model.layers.7.mlp.up_proj" = 3 }',
            "'model.layers.7.mlp.up_proj' a rank of 3, but that is no",
        ),
        (
            'target_modules = ["q_proj"]\nlora_rank_of = { "model.layers.0.mlp.up_proj" = 3 }',
            "a rank of 3, but that is not among target_modules",
        ),
    ],
)
def test_modules_that_are_not_there_are_named_before_training(line, named, tiny_base, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format(name="one", data="d.jsonl") + line)
    (tmp_path / "d.jsonl").write_text('{"input": "a", "output": "b"}')
    with pytest.raises(BaseMismatch, match=named):
        prepare(read_recipe(tmp_path / "r.toml"), tiny_base, tmp_path)


def test_a_card_says_of_what_its_figures_are(tiny_base, tmp_path):
    """The loss is measured before a cut, and ranks and alpha may be those of the adapter that was started from."""
    (tmp_path / "r.toml").write_text(RECIPE.format(name="one", data="d.jsonl"))
    recipe = read_recipe(tmp_path / "r.toml")
    made = {"samples": 3, "steps": 2, "evaluations": [{"step": 2, "loss": 0.5, "accuracy": 1.0}], "from": None}
    path, (out, into) = next(iter(tiny_base.shapes().items()))
    weights = with_digest("one", {path: LowRank(torch.ones(1, into), torch.ones(out, 1), 1.0)}, {"training": made})
    assert "**Held out**: loss 0.5000" in card(recipe, weights) and "rank 2, alpha 16" in card(recipe, weights)
    weights.metadata["pruning"] = {"error": 0.3}
    assert "**Held out**, before it was pruned: loss 0.5000" in card(replace(recipe, prune_to=1), weights)
    made["from"] = "first@0123456789ab"
    assert "rank 2" not in card(recipe, weights) and "going on from first@0123456789ab" in card(recipe, weights)


def test_a_card_tells_what_was_trained_in_words(tiny_base, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format(name="one", data="d.jsonl"))
    recipe = read_recipe(tmp_path / "r.toml")
    config = replace(recipe.config, target_modules=("q_proj", "v_proj"), use_rslora=True)
    recipe = replace(recipe, config=config, prune_to=1, auto_rank=True)
    made = {"samples": 3, "steps": 2, "evaluations": [], "from": None}
    [(path, (out, into)), (other, _)] = list(tiny_base.shapes().items())[:2]
    told = {"training": made, "quantization": {"scheme": "none"}, "pruning": {"error": 0.3}}
    told["auto_lora"] = {"ranks": {path: 4, other: 1}, "dropped": []}
    said = card(recipe, with_digest("one", {path: LowRank(torch.ones(1, into), torch.ones(out, 1), 1.0)}, told))
    assert "on the unquantized weights that are served; rank 2, alpha 16 (rsLoRA), q_proj, v_proj, AdamW" in said
    assert "**Ranks**: 1 to 4 by module" in said, "those that were trained, before the cut"
    assert f"**Size**: {into + out} parameters, 0.3 kB" in said


def test_a_recipe_with_the_bases_name_is_refused_before_training(tiny_base, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format(name="tiny", data="d.jsonl"))
    with pytest.raises(BadSetting, match="'tiny' is the base's own"):
        prepare(read_recipe(tmp_path / "r.toml"), tiny_base, tmp_path)


def test_a_bad_line_is_named(tiny_base, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format(name="one", data="d.jsonl"))
    (tmp_path / "d.jsonl").write_text('{"input": "a", "output": "b"}\n{"input": "a"}\n')
    with pytest.raises(InvalidData, match=r"d\.jsonl, line 2: 'output' is missing"):
        run(read_recipe(tmp_path / "r.toml"), tiny_base, tmp_path, data_dir=tmp_path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("epochs = 1", "epochs = 0"), "epochs"),
        (("epochs = 1", 'epochs = "many"'), "r.toml"),
        (("epochs = 1", "epoch = 1"), "'epoch' is not known"),
        (('name = "one"', "nam = 1"), "'nam' is not known"),
        (('name = "one"', ""), "name and data"),
        (('prompt = "Say: {input}"', 'prompt = "Say"'), "prompt"),
        (("[task]", "[task"), "r.toml"),
        (("[task]", "validation = 3\n[task]"), "validation"),
        (("batch_size = 2", "batch_size = 2.5"), "batch_size must be a whole number, not 2.5"),
        (("[training]", "[card]\nabout = 3\n[training]"), "about must be a text"),
        (('prompt = "Say: {input}"', "prompt = 3"), "r.toml: prompt must be"),
        (("batch_size = 2", "lora_alpha = 0"), "alpha must be finite and over 0"),
        (('name = "one"', 'name = "base"'), "'base' is reserved"),
        (("[task]", 'validation = ""\n[task]'), "validation must be a text"),
        (('data = "d.jsonl"', 'data = ""'), "name and data"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(change, named, tmp_path):
    (tmp_path / "r.toml").write_text(RECIPE.format(name="one", data="d.jsonl").replace(*change))
    with pytest.raises(ServerError, match=named):
        read_recipe(tmp_path / "r.toml")
    with pytest.raises(ServerError, match="nothing"):
        read_recipe(tmp_path / "nothing.toml")
