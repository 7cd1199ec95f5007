"""Trains the adapter of a recipe over a loaded base, and writes the PEFT folder with task and model card."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from adapters import checkpoints, data, peft_format, pruning, rank_search
from adapters.atomic_files import replace_file
from adapters.data import Tokens
from adapters.errors import AdapterError
from adapters.training import Event, TrainingConfig, train
from adapters.weights import LoraWeights, LowRank
from server.errors import BadSetting
from server.jobs.encoding import Template, encoder
from server.jobs.gpu_share import device_of, use_device
from server.jobs.model_card import model_card
from server.jobs.recipe import Recipe, data_path
from server.jobs.trainable_model import TrainableModel, loss_of
from server.kernels.recompress import recompress
from server.model.chat_template import template_time
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer

CHECKPOINTS, FINISHED, LOCKS = ".checkpoints", ".finished", ".locks"
"""Folders in the output folder: checkpoints of unfinished runs, records of finished runs, and lock files."""
STARTED = "begun"
"""A file beside a run's checkpoint: the time when the run started."""


def run(
    recipe: Recipe,
    base: Base,
    output: Path,
    *,
    data_dir: Path,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LoraWeights:
    """Train and write `output/<name>`: a PEFT folder in bf16, with task.json and a model card.

    A run that was interrupted continues from its last checkpoint. Trains on the GPU if the base's kernels are CUDA's.

    Returns:
        The adapter as it is read back from the folder.

    Raises:
        InvalidData, BaseMismatch: The data or the settings are wrong.
        TrainingStopped: `stop` returned True.
        BadSetting: Another process is training this recipe into the same output.
    """
    with _locked(output, recipe.name):
        folder, unfinished = output / recipe.name, output / CHECKPOINTS / recipe.name
        started = _start_time(unfinished)
        with template_time(started):
            examples, validation = prepare(recipe, base, data_dir)
        key = _key(recipe, base, data_dir)  # before training, because the files may change meanwhile
        _write(unfinished / STARTED, repr(started))
        make = rank_search.auto_lora if recipe.auto_rank else train
        device = device_of(base)
        with use_device(device):
            model = TrainableModel(base.to(device), recipe.config.compute_dtype)
            trained = make(
                model,
                examples,
                on_base(recipe.config, base),
                name=recipe.name,
                validation=validation,
                checkpoints=unfinished,
                on_event=on_event,
                stop=stop,
            )
            weights = _evaluated(recipe, model, recompress(trained), examples, validation)
            dtype = model.metadata["compute_dtype"]
        card = model_card(recipe, weights)
        peft_format.save(weights, folder, dtype=torch.bfloat16, shapes=base.shapes(), task=recipe.task, card=card)
        max_rank = max(weights.ranks)
        saved = peft_format.read_folder(folder, name=recipe.name, max_rank=max_rank, shapes=base.shapes())
        record = {"key": key, "digest": saved.digest, "max_rank": max_rank, "compute_dtype": dtype}
        _write(output / FINISHED / f"{recipe.name}.json", json.dumps(record))
        shutil.rmtree(unfinished, ignore_errors=True)
        return saved


def finished(recipe: Recipe, base: Base, output: Path, *, data_dir: Path) -> LoraWeights | None:
    """The result of an earlier run with the same recipe, data and base, or None if it is missing or changed."""
    try:
        record = json.loads((output / FINISHED / f"{recipe.name}.json").read_text(encoding="utf-8"))
        dtype = recipe.config.compute_dtype
        if record["key"] != _key(recipe, base, data_dir) or dtype not in ("auto", record.get("compute_dtype", dtype)):
            return None
        folder, max_rank = output / recipe.name, record["max_rank"]
        weights = peft_format.read_folder(folder, name=recipe.name, max_rank=max_rank, shapes=base.shapes())
    except (OSError, ValueError, KeyError, TypeError, AdapterError):
        return None
    return weights if weights.digest == record["digest"] else None


def prepare(recipe: Recipe, base: Base, data_dir: Path) -> tuple[Tokens, Tokens | None]:
    """The training and the validation set of a recipe, as tokens.

    Raises:
        InvalidData: A line is not usable.
        BaseMismatch: The recipe names modules that the base does not have.
        BadSetting: The recipe has the base's name.
    """
    if recipe.name == base.name:
        raise BadSetting(f"the name {recipe.name!r} is the base's own; choose another", "name")
    recipe.config.spec().ranks(base.shapes())
    max_length = min(recipe.config.max_length, base.config.context_length)
    encode = encoder(ModelTokenizer(base.vocabulary), Template.of(recipe.task), max_length)

    def tokens(file: str) -> Tokens:
        path = data_path(data_dir, file)
        return data.tokenize(data.read(path), encode, max_length, str(path))

    return tokens(recipe.data), tokens(recipe.validation) if recipe.validation else None


def on_base(config: TrainingConfig, base: Base) -> TrainingConfig:
    """The config with the real name and packing of the base. On a GPU, activation checkpointing is on."""
    quantization = base.quantization
    return replace(
        config,
        model=base.name,
        quantization=str(quantization["scheme"]),
        use_double_quant=bool(quantization.get("double")),
        activation_checkpointing=config.activation_checkpointing or base.backend.name == "cuda",
    )


def as_written(weights: LoraWeights) -> LoraWeights:
    """The weights rounded to bf16, as they are read back from a folder."""
    modules = {
        path: LowRank(m.A.bfloat16().float(), m.B.bfloat16().float(), m.scale) for path, m in weights.modules.items()
    }
    return replace(weights, modules=modules)


def _evaluated(
    recipe: Recipe, model: TrainableModel, weights: LoraWeights, examples: Tokens, validation: Tokens | None
) -> LoraWeights:
    """Prune if the recipe asks for it, and add its figures and those of the validation set to the metadata."""
    training = {
        **weights.metadata["training"],
        "learned_too": validation.among(examples) if validation else 0,
        "judges_left_out": validation.too_long if validation else 0,
    }
    if recipe.prune_to is not None:
        weights, cut = pruning.truncate(weights, recipe.prune_to, recipe.name, dtype=torch.bfloat16)
        loss = loss_of(model, as_written(weights), validation) if validation else None
        training["pruned"] = {"rank": recipe.prune_to, "error": cut.error, "loss": loss}
    return replace(weights, metadata={**weights.metadata, "training": training})


@contextlib.contextmanager
def _locked(output: Path, name: str) -> Iterator[None]:
    file = output / LOCKS / name  # never removed: two processes could lock different files
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadSetting(
                f"another process is training {name} into {output}; wait for it, or use another --output", "output"
            ) from None
        yield


def _start_time(unfinished: Path) -> float:
    """When the run with this checkpoint started, so that chat templates with a date give the same tokens; else now."""
    if any(file.parent != unfinished / rank_search.START for file in unfinished.rglob(checkpoints.FILE)):
        with contextlib.suppress(OSError, ValueError):
            return float((unfinished / STARTED).read_text(encoding="utf-8"))
    return time.time()


def _key(recipe: Recipe, base: Base, data_dir: Path) -> str:
    """A digest of everything that a run depends on. Raises OSError and BadSetting for its files."""
    parts: list[Any] = [asdict(recipe) | {"config": recipe.config.key_settings()}, base.id]
    for file in (recipe.data, recipe.validation):
        if file is not None:
            with data_path(data_dir, file).open("rb") as stream:
                parts.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())
