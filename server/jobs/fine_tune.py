"""`fine_tune`: one training run of a job, from its spec and a loaded base to a PEFT folder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adapters import peft_format, pruning, rank_search
from adapters.errors import AdapterError, StoreFailed, TrainingStopped
from adapters.training import Event, TrainingConfig, train
from adapters.weights import LoraWeights
from server.engine.backends.cuda.memory import is_out_of_memory
from server.errors import out_of_memory_message
from server.jobs.errors import JobError
from server.jobs.gpu_share import device_of, place_base, use_device
from server.jobs.model_card import model_card
from server.jobs.recipe import Recipe
from server.jobs.train_recipe import as_written, on_base
from server.jobs.trainable_model import TrainableModel, loss_of
from server.jobs.training_data import Examples, prepare, write_pairs
from server.jobs.worker_messages import (
    CHECKPOINTS,
    EVALUATED,
    NOTE,
    PARTIAL_RESULT,
    RESULT,
    TRAINED,
    VALIDATED,
    WorkerSpec,
)
from server.kernels.recompress import recompress
from server.model.loader import Base

RECOVERY = 0.1
"""Fraction of the steps that auto_lora trains for after it has pruned."""
EVALUATIONS = 4
"""Validations within a run."""

Send = Callable[[dict[str, Any]], None]


def fine_tune(spec: WorkerSpec, base: Base, folder: Path, send: Send, stop: Callable[[], bool]) -> LoraWeights:
    """Train and write `folder/result`. Continues from the checkpoint in `folder`, if there is one.

    Args:
        base: The base. On a GPU, the server's weights are used where it shares them.
        send: Sends a message to the server.
        stop: Returns True when training should stop at a checkpoint.

    Raises:
        JobError: A file or a setting is wrong, or there is too little memory.
        TrainingStopped: `stop` returned True.
    """
    device = device_of(base)
    try:
        placed = base.to(device) if spec.gpu_share is None else place_base(base, spec.gpu_share, device, send)
        with use_device(device):
            return _fine_tune(spec, placed, folder, send, stop)
    except (MemoryError, RuntimeError) as error:
        if (message := out_of_memory_message(error)) is not None:
            raise JobError("no_memory", f"{message}; use shorter examples or a smaller rank") from error
        if not is_out_of_memory(error):
            raise
        raise JobError(
            "no_memory", f"the GPU has too little memory for training beside the server; lower --gpu-memory: {error}"
        ) from error


def _fine_tune(spec: WorkerSpec, base: Base, folder: Path, send: Send, stop: Callable[[], bool]) -> LoraWeights:
    examples = prepare(spec, base, stop)
    write_pairs(examples.records, folder)
    config = _config(spec, base)
    steps = config.steps(len(examples.training.examples))
    if examples.validation is not None:
        config = replace(config, eval_steps=max(1, math.ceil(steps / EVALUATIONS)))
    events = StepEvents(send, steps + (max(1, round(RECOVERY * steps)) if spec.auto_rank else 0))
    _send_validated(examples, events.steps, send)
    model = TrainableModel(base, config.compute_dtype)
    try:
        weights = recompress(_train(spec, model, base, examples, config, folder / CHECKPOINTS, events, stop))
        _note_best_step(weights.metadata["training"], send)
        if spec.prune_to is not None:
            weights, cut = pruning.truncate(weights, spec.prune_to, spec.name, dtype=torch.bfloat16)
            kept = f"{cut.parameters:,} of {cut.parameters_before:,} parameters"
            text = f"The result is pruned to rank {spec.prune_to}: {kept} are kept; relative error {cut.error:.4f}."
            send({"kind": NOTE, "message": text, "data": {"error": cut.error}})
        losses = _losses(spec, model, base, as_written(weights), examples)
        if spec.prune_to is not None and losses:
            loss = losses["losses"][EVALUATED]
            text = f"The validation loss after pruning is {loss:.4f}; the loss curve is from before."
            send({"kind": NOTE, "message": text, "data": {"valid_loss": loss}})
    except (JobError, StoreFailed, TrainingStopped):
        raise
    except AdapterError as error:
        raise JobError("invalid_settings", error.message, error.param) from error
    _write(spec, base, folder, weights)
    training = {k: v for k, v in weights.metadata["training"].items() if k != "config"}
    end = {"digest": weights.digest, "parameters": pruning.parameters(weights), **losses, "training": training}
    send({"kind": TRAINED, **end})
    return weights


def _send_validated(examples: Examples, steps: int, send: Send) -> None:
    send(
        {
            "kind": VALIDATED,
            "examples": len(examples.training.examples),
            "validation_examples": len(examples.validation.examples) if examples.validation is not None else 0,
            "too_long": examples.training.too_long,
            "held_out": examples.held_out,
            "steps": steps,
        }
    )
    if examples.left_out:
        text = f"{examples.left_out:,} validation examples are skipped when the result is evaluated: "
        text += "they or their answers are too long, or their prompt is empty."
        send({"kind": NOTE, "message": text, "data": {"left_out": examples.left_out}})
    if examples.evaluation is not None and (known := examples.evaluation.among(examples.training)):
        text = f"{known:,} of {len(examples.evaluation.examples):,} evaluation examples are also training examples"
        send({"kind": NOTE, "message": f"{text}; the scores will be too good.", "data": {"learned_too": known}})


class StepEvents:
    """Sends training events. The runs of auto_lora are numbered as one.

    Attributes:
        steps: Number of steps of all runs together.
    """

    def __init__(self, send: Send, steps: int) -> None:
        self._send, self.steps = send, steps
        self._before = Event("", 0, 0)

    def __call__(self, event: Event) -> None:
        before = self._before
        if event.kind == "done":
            step, tokens, seconds = before.step + event.step, before.tokens + event.tokens, event.seconds
            self._before = Event("done", step, step, tokens=tokens, seconds=before.seconds + seconds)
            return
        message: dict[str, Any] = vars(event) | {
            "step": before.step + event.step,
            "steps": self.steps,
            "tokens": before.tokens + event.tokens,
            "seconds": before.seconds + event.seconds,
        }
        self._send({k: v for k, v in message.items() if not (isinstance(v, float) and math.isnan(v))})


def _config(spec: WorkerSpec, base: Base) -> TrainingConfig:
    """The spec's config. An adapter to start from determines ranks and modules."""
    config = on_base(spec.config, base)
    if spec.init is None:
        return config
    start = _read_adapter(spec, base, spec.init, spec.init_name)
    rank = max(start.ranks)
    if spec.prune_to is not None and spec.prune_to >= rank:
        message = f"prune_to must be below the rank of the adapter to start from, {rank}"
        raise JobError("invalid_settings", message, "lora.prune_to")
    ranks = dict.fromkeys(base.shapes(), 0) | {path: m.rank for path, m in start.modules.items()}
    return replace(config, lora_rank=rank, lora_rank_of=ranks, target_modules="all-linear")


def _train(
    spec: WorkerSpec,
    model: TrainableModel,
    base: Base,
    examples: Examples,
    config: TrainingConfig,
    checkpoints: Path,
    on_event: Callable[[Event], None],
    stop: Callable[[], bool],
) -> LoraWeights:
    options: dict[str, Any] = {
        "name": spec.name,
        "validation": examples.validation,
        "checkpoints": checkpoints,
        "on_event": on_event,
        "stop": stop,
    }
    if spec.auto_rank:
        return rank_search.auto_lora(model, examples.training, config, recovery=RECOVERY, **options)
    init = _read_adapter(spec, base, spec.init, spec.init_name) if spec.init is not None else None
    return train(model, examples.training, config, init, **options)


def _note_best_step(training: Mapping[str, Any], send: Send) -> None:
    """Say which step the result is from, if it is not the last one."""
    step = training["best_step"]
    if step == training["steps"]:
        return
    for loss in (e["loss"] for e in training["evaluations"] if e["step"] == step):
        text = f"The result is from step {step:,}, which has the lowest validation loss: {loss:.4f}."
        send({"kind": NOTE, "message": text, "data": {"best_step": step, "valid_loss": loss}})


def _read_adapter(spec: WorkerSpec, base: Base, folder: Path, name: str) -> LoraWeights:
    """Read a copy of a stored version in the form in which the server serves it."""
    stored = peft_format.read_folder(folder, name=name, max_rank=spec.max_rank, shapes=base.shapes(), stored=True)
    return recompress(stored)


def _losses(
    spec: WorkerSpec, model: TrainableModel, base: Base, weights: LoraWeights, examples: Examples
) -> dict[str, Any]:
    """The validation losses of the result and of the version that it would replace, with that version's digest."""
    if examples.validation is None:
        return {}
    losses: dict[str, Any] = {
        "examples": len(examples.validation.examples),
        EVALUATED: loss_of(model, weights, examples.validation),
    }
    if spec.replaced is not None:
        replaced = _read_adapter(spec, base, spec.replaced, spec.name)
        losses |= {"replaced": loss_of(model, replaced, examples.validation), "replaced_digest": replaced.digest}
    return {"losses": losses}


def _write(spec: WorkerSpec, base: Base, folder: Path, weights: LoraWeights) -> None:
    """Write the result in bf16. The folder gets its name by a rename, so it is complete or missing."""
    partial = folder / PARTIAL_RESULT
    shutil.rmtree(partial, ignore_errors=True)
    recipe = Recipe(spec.name, spec.data_name, spec.task or {}, spec.config, prune_to=spec.prune_to)
    card = model_card(recipe, weights)
    peft_format.save(weights, partial, dtype=torch.bfloat16, shapes=base.shapes(), task=spec.task, card=card)
    shutil.rmtree(folder / RESULT, ignore_errors=True)
    partial.rename(folder / RESULT)
