"""Makes one recipe's adapter over a loaded base: data to tokens, training, and the folder that is published.

Owns the model card, where checkpoints lie while a run goes on, and what is known of runs that are over.
"""

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
from server.jobs.gpu_share import at, device_of
from server.jobs.recipe import Recipe, place
from server.jobs.trainable_model import TrainableModel, loss_of
from server.kernels.recompress import recompress
from server.model.chat_template import template_time
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer

CHECKPOINTS, FINISHED, LOCKS = ".checkpoints", ".finished", ".locks"
"""Folders within the output: of runs that go on, of what is known of those that are over, and of a file for each name
that is held while a process makes it."""
BEGUN = "begun"
"""Beside a run's checkpoint, when it began, in seconds since the epoch."""


def run(
    recipe: Recipe,
    base: Base,
    output: Path,
    *,
    data_dir: Path,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LoraWeights:
    """Trains and writes `output/<name>`: the PEFT folder in bf16, task.json and a model card.

    On the GPU if the base's kernels are for one. A run that was killed goes on from its last checkpoint when it is
    started again. Answers what has been written, as it is read back. Raises InvalidData for the data, BaseMismatch
    and other AdapterErrors for what the recipe asks of the base, TrainingStopped if `stop` said so, and BadSetting
    while another process makes an adapter of that name there.
    """
    with _alone(output, recipe.name):
        folder, resumed = output / recipe.name, output / CHECKPOINTS / recipe.name
        moment = _begun(resumed)
        with template_time(moment):
            examples, held = prepare(recipe, base, data_dir)
        key = _key(recipe, base, data_dir)  # now: the files may be others when hours of training are over
        _write(resumed / BEGUN, repr(moment))
        config = on_base(recipe.config, base)
        make = rank_search.auto_lora if recipe.auto_rank else train
        device = device_of(base)
        with at(device):
            model = TrainableModel(base.to(device), recipe.config.compute_dtype)
            made = make(
                model,
                examples,
                config,
                name=recipe.name,
                validation=held,
                checkpoints=resumed,
                on_event=on_event,
                stop=stop,
            )
            weights = _measured(recipe, model, recompress(made), examples, held)
            dtype = model.metadata["compute_dtype"]
        peft_format.save(
            weights, folder, dtype=torch.bfloat16, shapes=base.shapes(), task=recipe.task, card=card(recipe, weights)
        )
        most = max(weights.ranks)
        saved = peft_format.read_folder(folder, name=recipe.name, max_rank=most, shapes=base.shapes())
        _write(
            output / FINISHED / f"{recipe.name}.json",
            json.dumps({"key": key, "digest": saved.digest, "max_rank": most, "compute_dtype": dtype}),
        )
        shutil.rmtree(resumed, ignore_errors=True)
        return saved


def _measured(
    recipe: Recipe, model: TrainableModel, weights: LoraWeights, examples: Tokens, held: Tokens | None
) -> LoraWeights:
    """The result, pruned if the recipe says so, with what that cost, and with how much of what it was validated on it
    has learned and how much was too long to be, among what is known of its training."""
    made = {
        **weights.metadata["training"],
        "learned_too": held.among(examples) if held else 0,
        "judges_left_out": held.too_long if held else 0,
    }
    if recipe.prune_to is not None:
        weights, cut = pruning.truncate(weights, recipe.prune_to, recipe.name, dtype=torch.bfloat16)
        loss = loss_of(model, as_written(weights), held) if held else None
        made["pruned"] = {"rank": recipe.prune_to, "error": cut.error, "loss": loss}
    return replace(weights, metadata={**weights.metadata, "training": made})


def as_written(weights: LoraWeights) -> LoraWeights:
    """With the values that are read back from a folder in bf16: what is served, and so what is to be measured."""
    modules = {
        path: LowRank(m.A.bfloat16().float(), m.B.bfloat16().float(), m.scale) for path, m in weights.modules.items()
    }
    return replace(weights, modules=modules)


def finished(recipe: Recipe, base: Base, output: Path, *, data_dir: Path) -> LoraWeights | None:
    """What an earlier run of the very same recipe, data and base has written; None if it is gone or another since."""
    try:
        told = json.loads((output / FINISHED / f"{recipe.name}.json").read_text(encoding="utf-8"))
        asked = recipe.config.compute_dtype
        if told["key"] != _key(recipe, base, data_dir) or asked not in ("auto", told.get("compute_dtype", asked)):
            return None
        folder, most = output / recipe.name, told["max_rank"]
        weights = peft_format.read_folder(folder, name=recipe.name, max_rank=most, shapes=base.shapes())
    except (OSError, ValueError, KeyError, TypeError, AdapterError):
        return None  # whatever is wrong with it, training makes it anew
    return weights if weights.digest == told["digest"] else None


@contextlib.contextmanager
def _alone(output: Path, name: str) -> Iterator[None]:
    """Two processes would write one checkpoint, and each go on from what the other has done."""
    file = output / LOCKS / name  # stays: who removed it would let two have one each
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadSetting(
                f"another process is training {name} into {output}; wait until it has ended, or give another --output",
                "output",
            ) from None
        yield


def _begun(resumed: Path) -> float:
    """When the run whose checkpoint is there began, so that a template tells it the same date; else the present."""
    if any(file.parent != resumed / rank_search.START for file in resumed.rglob(checkpoints.FILE)):
        try:
            return float((resumed / BEGUN).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass  # of a version that did not keep it
    return time.time()


def _key(recipe: Recipe, base: Base, data_dir: Path) -> str:
    """What a run is made of. Raises OSError for files that cannot be read, BadSetting for those in nobody's home."""
    told: list[Any] = [asdict(recipe) | {"config": recipe.config.key_settings()}, base.id]
    for file in (recipe.data, recipe.validation):
        if file is not None:
            with place(data_dir, file).open("rb") as stream:
                told.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def _write(file: Path, text: str) -> None:
    """The whole of a file or nothing of it, whenever the process is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, text.encode())


def prepare(recipe: Recipe, base: Base, data_dir: Path) -> tuple[Tokens, Tokens | None]:
    """What a recipe learns, and what it is validated on, as tokens. Raises InvalidData, BaseMismatch for modules that
    the base has not, and BadSetting for the base's own name.
    """
    if recipe.name == base.name:
        raise BadSetting(f"the name {recipe.name!r} is the base's own; nothing could be served under it", "name")
    recipe.config.spec().ranks(base.shapes())
    longest = min(recipe.config.max_length, base.config.context_length)
    encode = encoder(ModelTokenizer(base.vocabulary), Template.of(recipe.task), longest)

    def tokens(file: str) -> Tokens:
        path = place(data_dir, file)
        return data.tokenize(data.read(path), encode, longest, str(path))

    return tokens(recipe.data), tokens(recipe.validation) if recipe.validation else None


def on_base(config: TrainingConfig, base: Base) -> TrainingConfig:
    """The config with the base that it is really trained on. On a GPU layers keep their inputs alone for the way back:
    its memory is scarcer than its time."""
    packed = base.quantization
    return replace(
        config,
        model=base.name,
        quantization=str(packed["scheme"]),
        use_double_quant=bool(packed.get("double")),
        activation_checkpointing=config.activation_checkpointing or base.backend.name == "cuda",
    )


def card(recipe: Recipe, weights: LoraWeights) -> str:
    """The model card: what the recipe says about it, and what the run measured."""
    made: dict[str, Any] = weights.metadata["training"]
    config, base = recipe.config, weights.metadata.get("base")
    count = pruning.parameters(weights)
    scheme = (weights.metadata.get("quantization") or {}).get("scheme")
    on = "unquantized weights" if scheme in (None, "none") else f"{scheme} codes"
    dtype = weights.metadata.get("compute_dtype", config.compute_dtype)
    auto = weights.metadata.get("auto_lora")
    targets = config.target_modules if isinstance(config.target_modules, str) else ", ".join(config.target_modules)
    kind = f"rank {config.lora_rank}, alpha {config.lora_alpha:g}{' (rsLoRA)' * config.use_rslora}, {targets}"
    if made["from"] is not None:
        kind = f"going on from {made['from']} with its ranks and modules"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {base}",
        "tags: [lora]",
        "---",
        "",
        f"# {recipe.name}",
        "",
        recipe.card.get("about", f"A LoRA for {base}.").strip(),
        "",
        *([f"- **Task**: `POST /generate?task={recipe.name}`; the template is in `task.json`."] if recipe.task else []),
        f"- **Data**: {recipe.card.get('data', f'{recipe.data},').strip()} {made['samples']:,} examples.",
        f"- **Training**: `loramux train` on the {on} that are served; {kind}, "
        f"AdamW at {config.learning_rate:g} with warm-up and cosine decay, {made['steps']} steps of "
        f"{config.batch_size}, loss on the answer and the end token only, {dtype}, seed {config.seed}.",
    ]
    if auto is not None:
        ranks, none = sorted(auto["ranks"].values()), len(auto["dropped"])  # as trained: pruning comes after
        lines.append(
            f"- **Ranks**: {ranks[0]} to {ranks[-1]} by module, for the parameters that rank {config.lora_rank} takes "
            f"everywhere; {none} modules have none."
        )
    if recipe.prune_to is not None:
        error = weights.metadata["pruning"]["error"]
        loss = made.get("pruned", {}).get("loss")
        after = f", held-out loss {loss:.4f} a token" if loss is not None else ""
        lines.append(f"- **Pruned** to rank {recipe.prune_to} after training; relative error {error:.3g}{after}.")
    if made["evaluations"]:
        best = min(made["evaluations"], key=lambda e: e["loss"])
        pruned = ", before it was pruned" if recipe.prune_to is not None else ""
        lines.append(
            f"- **Held out**{pruned}: loss {best['loss']:.4f} a token, {100 * best['accuracy']:.1f} % of the answers' "
            f"tokens right when the ones before are given, at step {best['step']}."
        )
    size = f"{2 * count / 1e6:.1f} MB" if 2 * count >= 1e5 else f"{2 * count / 1e3:.1f} kB"
    lines.append(f"- **Size**: {count:,} parameters, {size} in bf16.")
    if "limits" in recipe.card:
        lines.append(f"- **Limits**: {recipe.card['limits'].strip()}")
    return "\n".join(lines) + "\n"
