"""The trials of a rank search: a recipe trained at a rank, for so many steps, with a seed, and how good it is then.

Owns what is trained on and what judges it. Which trials are made, and what follows from them, is
`adapters.rank_search`'s.
"""

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
from server.jobs.fine_tune import answerable, held_out
from server.jobs.recipe import HELD_OUT, Recipe, place
from server.jobs.trainable_model import TrainableModel
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer


@dataclass(frozen=True)
class Examples:
    """What a recipe's trials learn, and what judges them, as records that an engine can answer and as tokens: those of
    `given` ones that are not too long."""

    learned: Tokens
    given: int
    judges: Sequence[Record]
    judged: Tokens
    encode: Encode


def examples(recipe: Recipe, base: Base, data_dir: Path, most: int) -> Examples:
    """The recipe's files as tokens, with at most `most` judges. Raises InvalidData."""
    length = min(recipe.config.max_length, base.config.context_length)
    encode = encoder(ModelTokenizer(base.vocabulary), Template.of(recipe.task), length)
    file = place(data_dir, recipe.data)
    records = data.read(file)
    if recipe.validation:
        held = place(data_dir, recipe.validation)
        judges, name = data.read(held)[:most], str(held)
    else:
        kept = held_out(records, HELD_OUT)
        if not kept:
            raise InvalidData(
                f"{file} has {len(records)} examples, of which no tenth can be held out; name a validation file"
            )
        judges, name, out = [records[i] for i in kept[:most]], f"{file}, held out to judge by", set(kept)
        records = [record for i, record in enumerate(records) if i not in out]
    learned = data.tokenize(records, encode, length, str(file))
    judged = data.tokenize(judges, encode, length, name)
    return Examples(learned, len(judges), answerable(judges, encode, length), judged, encode)


def learned_too(found: Examples, judges: Sequence[Record]) -> int:
    """How many of these judges the trials learn."""
    known = {example.ids for example in found.learned.examples}
    return sum(tuple(found.encode(record)[0]) in known for record in judges)


def within(shapes: Mapping[str, tuple[int, int]], config: TrainingConfig, budget: int) -> list[int]:
    """The ranks 1, 2, 4, 8, ... whose trainable parameters a budget allows. Raises AdapterError if there is none."""
    costs = {
        rank: layers.trainable_parameters(shapes, replace(config, lora_rank=rank).spec())
        for rank in (2**i for i in range(12))
    }
    ranks = [rank for rank, cost in costs.items() if cost <= budget]
    if not ranks:
        raise AdapterError(f"rank 1 takes {costs[1]:,} parameters, more than the budget of {budget:,}", "budget")
    return ranks


class RankTrials:
    """`adapters.rank_search.Trial` for a recipe. `score` says how good an adapter is, more is better; without one it is
    minus its loss on the judges. `on_event` hears of every trial's training.
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
        """The score, which is -inf where training diverges, and how many parameters were trained. Raises
        TrainingStopped.
        """
        label = f"rank {rank}, {steps} steps, seed {seed}"
        # As many epochs as the steps need: `max_steps` alone would not go beyond the recipe's.
        config = replace(self._recipe.config, lora_rank=rank, max_steps=steps, epochs=float(steps), seed=seed)
        config = replace(config, eval_steps=0, patience=0)
        try:
            weights = train(
                self._model,
                self._found.learned,
                config,
                name=f"trial-r{rank}-s{seed}",
                validation=self._found.judged if self._score is None else None,
                on_event=lambda event: self._on_event(label, event),
                stop=self._stop,
            )
        except Diverged:
            return -math.inf, layers.trainable_parameters(layers.shapes(self._model.tree), config.spec())
        if self._score is not None:
            return self._score(weights), pruning.parameters(weights)
        return -float(weights.metadata["training"]["evaluations"][-1]["loss"]), pruning.parameters(weights)
