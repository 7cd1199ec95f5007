"""Recipes: TOML files that say how an adapter is made. One command trains several over one resident base.

Owns the file's form and what can be wrong with it. A recipe names its data, which stays outside of the project.

    name = "sentiment"
    data = "sentiment.train.jsonl"        # .json or .jsonl, relative to --data or to the recipe
    validation = "sentiment.dev.jsonl"    # optional: evaluated at the end, and with eval_steps before; the best is kept
    auto_rank = true                      # optional: ranks by module, at the parameters that lora_rank would have
    prune_to = 2                          # optional: cut to this rank, below the one that is trained, at the end

    [task]                                # as in task.json: prompt, format, system, labels, defaults
    [training]                            # any field of adapters.training.TrainingConfig; quantization and
                                          # use_double_quant stand where no setting says how the base is packed
    [card]                                # about, data, limits: text for the model card
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.errors import AdapterError
from adapters.training import TrainingConfig
from adapters.weights import RESERVED
from server.errors import BadSetting, InvalidRequest
from server.settings import given_path
from server.tasks.definitions import FixedRoute, parse

_KEYS = {"name", "data", "validation", "auto_rank", "prune_to", "task", "training", "card"}
_CARD = {"about", "data", "limits"}
_PACKING = {"quantization": "quantization", "use_double_quant": "double_quant"}
"""Fields of the config that say how the base is packed, and the settings that say the same."""
_TRAINING = {f.name for f in dataclasses.fields(TrainingConfig)} - {"model", "data", "output"}
HELD_OUT = 0.1
"""The share of the examples that judge, where that is asked for and no validation file is named."""
AUTO_WIDENS = 4
"""How many times its rank a module may get with auto_rank."""


@dataclass(frozen=True)
class Recipe:
    """How one adapter is made. Paths are as the file has them; `packing` has the base's settings that it asks for."""

    name: str
    data: str
    task: Mapping[str, Any]
    config: TrainingConfig
    validation: str | None = None
    card: Mapping[str, str] = field(default_factory=dict)
    auto_rank: bool = False
    prune_to: int | None = None
    packing: Mapping[str, Any] = field(default_factory=dict)


def highest_rank(rank: int, auto_rank: bool) -> int:
    """The highest that a module may get where this `rank` is asked for."""
    return rank * AUTO_WIDENS if auto_rank else rank


def _trained_rank(recipe: Recipe) -> int:
    """The highest that a module may be trained with."""
    config = recipe.config
    return max([highest_rank(config.lora_rank, recipe.auto_rank), *config.lora_rank_of.values()])


def check_rank(recipe: Recipe, max_rank: int) -> None:
    """Raises BadSetting for a recipe whose result may have more ranks than servers take, which is `max_rank`."""
    most = min(_trained_rank(recipe), recipe.prune_to or math.inf)
    if most > max_rank:
        why = f", as auto_rank may give a module {AUTO_WIDENS} times lora_rank" if recipe.auto_rank else ""
        raise BadSetting(
            f"{recipe.name}: its rank may be {most}{why}, and a server takes up to {max_rank} (--max-rank): ask for "
            f"less, or give --max-rank {most} here and to the server",
            "max_rank",
        )


def check_prune_to(recipe: Recipe) -> None:
    """Raises BadSetting for a `prune_to` that no module's rank is above: nothing would be cut."""
    most = _trained_rank(recipe)
    if recipe.prune_to is not None and recipe.prune_to >= most:
        raise BadSetting(
            f"{recipe.name}: prune_to must be below the highest rank that is trained, {most}: nothing would be cut",
            "prune_to",
        )


def check_validation(recipe: Recipe) -> None:
    """Raises BadSetting for evaluations that are asked for without a file to evaluate on."""
    if recipe.config.eval_steps and recipe.validation is None:
        raise BadSetting(
            f"{recipe.name}: eval_steps needs something to evaluate on; name a validation file", "validation"
        )


def place(folder: Path, file: str) -> Path:
    """Where a recipe's file lies that is in `folder` unless it says otherwise. Raises BadSetting."""
    return folder / given_path(Path(file))


def packing(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """The settings that recipes ask of the base which they are trained on together. Raises BadSetting."""
    wanted: dict[str, Any] = {}
    for recipe in recipes:
        for name, value in recipe.packing.items():
            if wanted.setdefault(name, value) != value:
                raise BadSetting(
                    f"recipes ask for {name} {wanted[name]} and {value}; one base is resident, so train them apart",
                    name,
                )
    return wanted


def read_recipes(paths: Sequence[Path]) -> list[Recipe]:
    """Recipes that are trained together. Raises BadSetting as `read_recipe` does, and for one name in two of them."""
    recipes = [read_recipe(path) for path in paths]
    places: dict[str, Path] = {}
    for recipe, path in zip(recipes, paths, strict=True):
        if recipe.name in places:
            raise BadSetting(
                f"{places[recipe.name]} and {path} both make {recipe.name!r}, and the second would replace the first",
                "name",
            )
        places[recipe.name] = path
    return recipes


def read_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises BadSetting, which names the file, the key and what it must be."""
    try:
        raw = tomllib.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadSetting(f"{path}: {error}") from error
    except RecursionError as error:
        raise BadSetting(f"{path}: its brackets are too deep within each other") from error
    _known(raw, _KEYS, str(path))
    name, data = raw.get("name"), raw.get("data")
    if not isinstance(name, str) or not isinstance(data, str) or not data:
        raise BadSetting(f"{path}: name and data must be there, each a text", "name")
    if name in RESERVED:
        raise BadSetting(f"{path}: the name {name!r} is reserved; nothing could be served under it", "name")
    if "task" not in raw:
        raise BadSetting(
            f'{path}: [task] is missing; it says how the adapter is asked, as prompt = "{{input}}"', "task"
        )
    tables = {key: raw.get(key, {}) for key in ("task", "training", "card")}
    for key, table in tables.items():
        if not isinstance(table, dict):
            raise BadSetting(f"{path}: [{key}] must be a table", key)
    _known(tables["training"], _TRAINING, f"{path} [training]")
    _known(tables["card"], _CARD, f"{path} [card]")
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tables["training"].items()}
    try:
        parse(name, tables["task"], default_route=FixedRoute(), source="file")
        config = TrainingConfig(**settings, data=data)
    except (AdapterError, InvalidRequest, TypeError) as error:
        raise BadSetting(f"{path}: {error}", getattr(error, "param", None)) from error
    auto_rank, prune_to, validation = raw.get("auto_rank", False), raw.get("prune_to"), raw.get("validation")
    if validation is not None and not (isinstance(validation, str) and validation):
        raise BadSetting(f"{path}: validation must be a text, the name of a file", "validation")
    for key, text in tables["card"].items():
        if not isinstance(text, str):
            raise BadSetting(f"{path} [card]: {key} must be a text", key)
    if not isinstance(auto_rank, bool):
        raise BadSetting(f"{path}: auto_rank is true or false", "auto_rank")
    if prune_to is not None and (not isinstance(prune_to, int) or isinstance(prune_to, bool) or prune_to < 1):
        raise BadSetting(f"{path}: prune_to is a rank, at least 1", "prune_to")
    task = {"task": name, **tables["task"]}
    packed = {setting: settings[key] for key, setting in _PACKING.items() if key in settings}
    return Recipe(name, data, task, config, validation, tables["card"], auto_rank, prune_to, packed)


def _known(table: Mapping[str, Any], known: set[str], where: str) -> None:
    for key in table:
        if key not in known:
            raise BadSetting(f"{where}: {key!r} is not known; known are {', '.join(sorted(known))}", key)
