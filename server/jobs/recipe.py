"""Recipes: TOML files that describe how an adapter is trained.

name = "sentiment"
data = "sentiment.train.jsonl"        # .json or .jsonl, relative to --data or to the recipe
validation = "sentiment.dev.jsonl"    # optional: evaluated at the end and every eval_steps; the best step is kept
auto_rank = true                      # optional: search ranks by module, with as many parameters as lora_rank has
prune_to = 2                          # optional: prune to this rank after training

[task]                                # as in task.json: prompt, format, system, labels, defaults
[training]                            # fields of adapters.training.TrainingConfig; quantization and
                                      # use_double_quant apply to the base unless settings say otherwise
[card]                                # about, data, limits: text for the model card
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters.errors import AdapterError
from adapters.training import TrainingConfig
from adapters.weights import RESERVED
from server.errors import BadSetting, InvalidRequest
from server.settings import given_path
from server.tasks.definitions import FixedRoute, parse

_PACKING = {"quantization": "quantization", "use_double_quant": "double_quant"}
"""Fields of the config, and the settings of the base with the same meaning."""
TRAINING_KEYS = {f.name for f in dataclasses.fields(TrainingConfig)} - {"model", "data", "output"}
HELD_OUT = 0.1
"""Fraction of the examples that is held out if a validation set is needed and no file is given."""
AUTO_RANK_FACTOR = 4
"""With auto_rank, a module's rank is at most this factor times the requested rank."""


@dataclass(frozen=True)
class Recipe:
    """A recipe. Paths are as in the file. `packing` holds the settings of the base that it asks for."""

    name: str
    data: str
    task: Mapping[str, Any]
    config: TrainingConfig
    validation: str | None = None
    card: Mapping[str, str] = field(default_factory=dict)
    auto_rank: bool = False
    prune_to: int | None = None
    packing: Mapping[str, Any] = field(default_factory=dict)


def max_module_rank(rank: int, auto_rank: bool) -> int:
    """The highest rank that a module can get when `rank` is requested."""
    return rank * AUTO_RANK_FACTOR if auto_rank else rank


def _max_trained_rank(recipe: Recipe) -> int:
    config = recipe.config
    return max([max_module_rank(config.lora_rank, recipe.auto_rank), *config.lora_rank_of.values()])


def check_rank(recipe: Recipe, max_rank: int) -> None:
    """Raise BadSetting if the result may exceed the rank limit of servers."""
    highest = min(_max_trained_rank(recipe), recipe.prune_to or math.inf)
    if highest > max_rank:
        why = f", because auto_rank may give a module {AUTO_RANK_FACTOR} times lora_rank" if recipe.auto_rank else ""
        raise BadSetting(
            f"{recipe.name}: its rank may be {highest}{why}, and servers take up to {max_rank} (--max-rank); lower the "
            f"rank, or set --max-rank {highest} here and on the server",
            "max_rank",
        )


def check_prune_to(recipe: Recipe) -> None:
    """Raise BadSetting if `prune_to` is not below the highest trained rank."""
    highest = _max_trained_rank(recipe)
    if recipe.prune_to is not None and recipe.prune_to >= highest:
        raise BadSetting(f"{recipe.name}: prune_to must be below the highest trained rank, {highest}", "prune_to")


def check_validation(recipe: Recipe) -> None:
    """Raise BadSetting if `eval_steps` is set without a validation file."""
    if recipe.config.eval_steps and recipe.validation is None:
        raise BadSetting(f"{recipe.name}: eval_steps needs a validation file", "validation")


def data_path(folder: Path, file: str) -> Path:
    """The path of a recipe's file, relative to `folder`. Raises BadSetting."""
    return folder / given_path(Path(file))


def packing(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """The settings of the base that recipes share. Raises BadSetting if they ask for different ones."""
    wanted: dict[str, Any] = {}
    for recipe in recipes:
        for name, value in recipe.packing.items():
            if wanted.setdefault(name, value) != value:
                raise BadSetting(
                    f"the recipes ask for {name} {wanted[name]} and {value}; train them in separate commands", name
                )
    return wanted


def read_recipes(paths: Sequence[Path]) -> list[Recipe]:
    """Read several recipes. Raises BadSetting as `read_recipe` does, and if two recipes have the same name."""
    recipes = [read_recipe(path) for path in paths]
    by_name: dict[str, Path] = {}
    for recipe, path in zip(recipes, paths, strict=True):
        if recipe.name in by_name:
            raise BadSetting(
                f"{by_name[recipe.name]} and {path} have the same name {recipe.name!r}; rename one", "name"
            )
        by_name[recipe.name] = path
    return recipes


class _RecipeFile(BaseModel):
    """The form of a recipe file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    name: Annotated[str, Field(min_length=1)]
    data: Annotated[str, Field(min_length=1)]
    task: dict[str, Any]
    validation: Annotated[str, Field(min_length=1)] | None = None
    auto_rank: bool = False
    prune_to: Annotated[int, Field(ge=1)] | None = None
    training: dict[str, Any] = {}
    card: dict[Literal["about", "data", "limits"], str] = {}


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises BadSetting, which names the file, the key and the fault."""
    try:
        file = _RecipeFile.model_validate(tomllib.loads(path.read_text("utf-8-sig")))
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"]))
        raise BadSetting(f"{path}: {key}: {fault['msg']}", key) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadSetting(f"{path}: {error}") from error
    if file.name in RESERVED:
        raise BadSetting(f"{path}: the name {file.name!r} is reserved; choose another", "name")
    for key in file.training.keys() - TRAINING_KEYS:
        raise BadSetting(
            f"{path}: training.{key} is not known; the settings are {', '.join(sorted(TRAINING_KEYS))}", key
        )
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in file.training.items()}
    try:
        parse(file.name, file.task, default_route=FixedRoute(), source="file")
        config = TrainingConfig(**settings, data=file.data)
    except (AdapterError, InvalidRequest, TypeError) as error:
        raise BadSetting(f"{path}: {error}", getattr(error, "param", None)) from error
    task = {"task": file.name, **file.task}
    packing = {setting: settings[key] for key, setting in _PACKING.items() if key in settings}
    card = {str(key): text for key, text in file.card.items()}
    return Recipe(file.name, file.data, task, config, file.validation, card, file.auto_rank, file.prune_to, packing)
