"""Recipe files: the shipped ones are valid, and faults are named."""

from __future__ import annotations

from pathlib import Path

import pytest

from adapters import data
from server.errors import BadSetting
from server.jobs.recipe import read_recipe

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


def test_the_shipped_recipes_are_valid() -> None:
    folders = sorted(path.parent for path in EXAMPLES.glob("*/recipe.toml"))
    names = {folder.name for folder in folders}
    assert names >= {"sentiment", "classification", "summarization", "translation", "code"}
    for folder in folders:
        recipe = read_recipe(folder / "recipe.toml")
        assert recipe.name == folder.name and {"about", "data", "limits"} <= set(recipe.card)
        labels = recipe.task.get("labels")
        examples = data.read(folder / "example.jsonl")
        assert all(not labels or getattr(example, "output", None) in labels for example in examples)


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("epochs = 1", "epochs = 0", "epochs"),
        ("epochs = 1", 'epochs = "many"', "r.toml"),
        ("epochs = 1", "epoch = 1", "training.epoch is not known"),
        ('name = "one"', "nam = 1", "name: Field required"),
        ("[task]", "nam = 1\n[task]", "nam: Extra inputs"),
        ('data = "d.jsonl"', 'data = ""', "data: String should have at least 1 character"),
        ('prompt = "Say: {input}"', 'prompt = "Say"', "prompt"),
        ('prompt = "Say: {input}"', "prompt = 3", "r.toml: prompt must be"),
        ("[task]", "[task", "r.toml"),
        ("[task]", "[other]", "task: Field required"),
        ("[task]", "validation = 3\n[task]", "validation: Input should be a valid string"),
        ("[task]", 'validation = ""\n[task]', "validation"),
        ("[task]", "auto_rank = 1\n[task]", "auto_rank: Input should be a valid boolean"),
        ("[task]", "prune_to = 0\n[task]", "prune_to: Input should be greater than or equal to 1"),
        ("[task]", "prune_to = true\n[task]", "prune_to: Input should be a valid integer"),
        ("batch_size = 2", "batch_size = 2.5", "batch_size must be a whole number, not 2.5"),
        ("batch_size = 2", "lora_alpha = 0", "alpha must be finite and over 0"),
        ("[training]", "[card]\nabout = 3\n[training]", "card.about: Input should be a valid string"),
        ("[training]", '[card]\nother = "x"\n[training]', "card.other"),
        ('name = "one"', 'name = "base"', "'base' is reserved"),
        ('name = "one"', "name = " + "[" * 99_999, "r.toml"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_named(old: str, new: str, fault: str, tmp_path: Path) -> None:
    text = RECIPE.format(name="one", data="d.jsonl")
    assert old in text
    (tmp_path / "r.toml").write_text(text.replace(old, new))
    with pytest.raises(BadSetting, match=fault):
        read_recipe(tmp_path / "r.toml")


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"nothing\.toml"):
        read_recipe(tmp_path / "nothing.toml")
