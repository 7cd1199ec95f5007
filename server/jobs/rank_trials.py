"""Trials of a rank search: train a recipe at a rank, for a number of steps, with a seed, and score the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from adapters import data, layers, pruning
from adapters.data import Encode, Record, Tokens
from adapters.errors import AdapterError, Diverged, InvalidData
from adapters.training import Event, TrainingConfig, train
from adapters.weights import LoraWeights
from server.jobs.encoding import Template, encoder
from server.jobs.recipe import HELD_OUT, Recipe, data_path
from server.jobs.trainable_model import TrainableModel
from server.jobs.training_data import answerable, held_out
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer


@dataclass(frozen=True)
class Examples:
    """The data of a search.

    Attributes:
        given: Number of validation examples, including those that are skipped.
        records: The validation examples that an engine can answer.
        validation: The validation set as tokens.
    """

    training: Tokens
    given: int
    records: Sequence[Record]
    validation: Tokens
    encode: Encode


def examples(recipe: Recipe, base: Base, data_dir: Path, limit: int) -> Examples:
    """Read and tokenize a recipe's files, with at most `limit` validation examples. Raises InvalidData."""
    max_length = min(recipe.config.max_length, base.config.context_length)
    encode = encoder(ModelTokenizer(base.vocabulary), Template.of(recipe.task), max_length)
    file = data_path(data_dir, recipe.data)
    records = data.read(file)
    if recipe.validation:
        path = data_path(data_dir, recipe.validation)
        held, name = data.read(path)[:limit], str(path)
    else:
        positions = held_out(records, HELD_OUT)
        if not positions:
            raise InvalidData(f"{file} has {len(records)} examples, too few to hold a tenth out; set validation")
        held, name, out = [records[i] for i in positions[:limit]], f"{file}, held out for validation", set(positions)
        records = [record for i, record in enumerate(records) if i not in out]
    training = data.tokenize(records, encode, max_length, str(file))
    validation = data.tokenize(held, encode, max_length, name)
    return Examples(training, len(held), answerable(held, encode, max_length), validation, encode)


def count_in_training(found: Examples, records: Sequence[Record]) -> int:
    """How many of these validation records are also in the training set."""
    known = {example.ids for example in found.training.examples}
    return sum(tuple(found.encode(record)[0]) in known for record in records)


def ranks_within_budget(shapes: Mapping[str, tuple[int, int]], config: TrainingConfig, budget: int) -> list[int]:
    """The ranks 1, 2, 4, ... 2048 whose trainable parameters fit a budget. Raises AdapterError if none does."""
    costs = {
        rank: layers.trainable_parameters(shapes, replace(config, lora_rank=rank).spec())
        for rank in (2**i for i in range(12))
    }
    ranks = [rank for rank, cost in costs.items() if cost <= budget]
    if not ranks:
        raise AdapterError(f"rank 1 has {costs[1]:,} parameters, more than the budget of {budget:,}", "budget")
    return ranks


class RankTrials:
    """`adapters.rank_search.Trial` of a recipe.

    Args:
        score: Scores an adapter; higher is better. By default it is the negative validation loss.
        on_event: Called with a label and each training event of a trial.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: TrainableModel,
        found: Examples,
        *,
        score: Callable[[LoraWeights], float] | None = None,
        on_event: Callable[[str, Event], None] = lambda label, event: None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self._recipe, self._model, self._found = recipe, model, found
        self._score, self._on_event, self._stop = score, on_event, stop

    def __call__(self, rank: int, steps: int, seed: int) -> tuple[float, int]:
        """The score, -inf if training diverges, and the number of trained parameters. Raises TrainingStopped."""
        label = f"rank {rank}, {steps} steps, seed {seed}"
        # An epoch has at least one step, so `steps` epochs are enough for `max_steps`.
        config = replace(self._recipe.config, lora_rank=rank, max_steps=steps, epochs=float(steps), seed=seed)
        config = replace(config, eval_steps=0, patience=0)
        try:
            weights = train(
                self._model,
                self._found.training,
                config,
                name=f"trial-r{rank}-s{seed}",
                validation=self._found.validation if self._score is None else None,
                on_event=lambda event: self._on_event(label, event),
                stop=self._stop,
            )
        except Diverged:
            return -math.inf, layers.trainable_parameters(layers.shapes(self._model.tree), config.spec())
        if self._score is not None:
            return self._score(weights), pruning.parameters(weights)
        return -float(weights.metadata["training"]["evaluations"][-1]["loss"]), pruning.parameters(weights)
