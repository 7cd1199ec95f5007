"""`fine_tune`: one training run from its spec, over a base that has been loaded: files to tokens to a PEFT folder.

Owns which examples are trained on and which are held out, and what is told of it. The process around it is `child`'s.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters import data, peft_format, pruning, rank_search
from adapters.data import Chat, Encode, Pair, Record, Tokens
from adapters.errors import AdapterError, InvalidData, StoreFailed, TrainingStopped
from adapters.training import Event, TrainingConfig, train
from adapters.weights import LoraWeights
from server.engine.backends.cuda.memory import lacks_memory
from server.errors import out_of_memory_message
from server.jobs.encoding import Template, encoder
from server.jobs.errors import JobError
from server.jobs.gpu_share import at, device_of, take
from server.jobs.recipe import Recipe
from server.jobs.train_recipe import as_written, card, on_base
from server.jobs.trainable_model import TrainableModel, loss_of
from server.jobs.worker_messages import (
    CHECKPOINTS,
    EVALUATED,
    JUDGED,
    NOTE,
    PART,
    RESULT,
    TRAINED,
    VALIDATED,
    WorkerSpec,
)
from server.kernels.recompress import recompress
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from server.tasks.scores import too_long

MOST_HELD_OUT = 200
"""Examples, however many there are."""
MOST_JUDGED = 1000
"""Examples of a validation file that a result is compared on."""
MOST_EVALUATED = 500
"""Examples of a validation file that are looked at while a run goes on."""
RECOVERY = 0.1
"""The share of the steps that auto_lora trains for once it has cut."""
EVALUATIONS = 4
"""Within a run, if there is something to evaluate on."""

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Examples:
    """What a run learns and what it is judged by: as tokens, and as the records that the server may measure by.

    `judged` is what the run looks at as it goes on, `measured` what its result is measured on in the end. `held_out` is
    how many of the training file were kept for that, `left_out` how many of these cannot judge; where none of them can,
    none is kept.
    """

    learned: Tokens
    judged: Tokens | None = None
    records: tuple[Record, ...] = ()
    measured: Tokens | None = None
    held_out: int = 0
    left_out: int = 0


def fine_tune(spec: WorkerSpec, base: Base, folder: Path, tell: Tell, stop: Callable[[], bool]) -> LoraWeights:
    """Trains and writes `folder/result`. Goes on from the checkpoint in `folder`, if there is one.

    On the GPU if the base's kernels are its, on the server's matrices and a share of the memory that it lends. Raises
    JobError for the files and the settings, and where there is too little memory, TrainingStopped if `stop` said so (of
    what has been trained the checkpoint is written).
    """
    device = device_of(base)
    try:
        placed = base.to(device) if spec.loan is None else take(base, spec.loan, device, tell)
        with at(device):
            return _fine_tune(spec, placed, folder, tell, stop)
    except (MemoryError, RuntimeError) as error:
        if (words := out_of_memory_message(error)) is not None:
            raise JobError("no_memory", f"{words}; shorter examples or a smaller rank take less") from error
        if not lacks_memory(error):
            raise
        raise JobError(
            "no_memory", f"the GPU has no room for this training beside the server; lower --gpu-memory: {error}"
        ) from error


def _fine_tune(spec: WorkerSpec, base: Base, folder: Path, tell: Tell, stop: Callable[[], bool]) -> LoraWeights:
    examples = prepare(spec, base, stop)
    keep_pairs(examples.records, folder)
    config = _config(spec, base)
    steps = config.steps(len(examples.learned.examples))
    if examples.judged is not None:
        config = replace(config, eval_steps=max(1, math.ceil(steps / EVALUATIONS)))
    on_event = _Told(tell, steps + (max(1, round(RECOVERY * steps)) if spec.auto_rank else 0))
    tell(
        {
            "kind": VALIDATED,
            "examples": len(examples.learned.examples),
            "validation_examples": len(examples.judged.examples) if examples.judged is not None else 0,
            "too_long": examples.learned.too_long,
            "held_out": examples.held_out,
            "steps": on_event.steps,
        }
    )
    if examples.left_out:
        tell({"kind": NOTE, "message": _left_out(examples), "data": {"left_out": examples.left_out}})
    if examples.measured is not None and (known := examples.measured.among(examples.learned)):
        count = len(examples.measured.examples)
        said = f"{known:,} of {count:,} examples that the result is measured on are learned too"
        tell({"kind": NOTE, "message": f"{said}: it will seem better than it is.", "data": {"learned_too": known}})
    model = TrainableModel(base, config.compute_dtype)

    try:
        weights = recompress(_train(spec, model, base, examples, config, folder / CHECKPOINTS, on_event, stop))
        _tell_best(weights.metadata["training"], tell)
        if spec.prune_to is not None:
            weights, cut = pruning.truncate(weights, spec.prune_to, spec.name, dtype=torch.bfloat16)
            left = f"{cut.parameters:,} of {cut.parameters_before:,} parameters are left"
            said = f"The result is pruned to rank {spec.prune_to}: {left}; relative error {cut.error:.4f}."
            tell({"kind": NOTE, "message": said, "data": {"error": cut.error}})
        losses = _losses(spec, model, base, as_written(weights), examples)
        if spec.prune_to is not None and losses:
            left = losses["losses"][EVALUATED]
            said = f"After pruning its validation loss is {left:.4f}; the curve is from before."
            tell({"kind": NOTE, "message": said, "data": {"valid_loss": left}})
    except (JobError, StoreFailed, TrainingStopped):
        raise
    except AdapterError as error:
        raise JobError("invalid_settings", error.message, error.param) from error
    _write(spec, base, folder, weights)
    made = {k: v for k, v in weights.metadata["training"].items() if k != "config"}
    tell({"kind": TRAINED, "digest": weights.digest, "parameters": pruning.parameters(weights), **losses, "made": made})
    return weights


def _left_out(examples: Examples) -> str:
    """Of what the result would be measured on."""
    count = f"{examples.left_out:,} examples"
    if examples.judged is None:
        nothing = "none is, so that nothing measures the result; give a validation_file"
        return f"All {count} that would be held out are longer than a sequence may be here: {nothing}."
    why = "they, or their answers, are longer than may be here, or have nothing before the answer"
    return f"{count} that the result would be measured on are left out: {why}."


class _Told:
    """Passes events on. Of two runs, one after the other, as auto_lora makes them, the second goes on counting."""

    def __init__(self, tell: Tell, steps: int) -> None:
        self._tell, self.steps = tell, steps
        self._before = Event("", 0, 0)

    def __call__(self, event: Event) -> None:
        before = self._before
        if event.kind == "done":
            step, tokens, seconds = before.step + event.step, before.tokens + event.tokens, event.seconds
            self._before = Event("done", step, step, tokens=tokens, seconds=before.seconds + seconds)
            return
        line: dict[str, Any] = vars(event) | {
            "step": before.step + event.step,
            "steps": self.steps,
            "tokens": before.tokens + event.tokens,
            "seconds": before.seconds + event.seconds,
        }
        self._tell({k: v for k, v in line.items() if not (isinstance(v, float) and math.isnan(v))})


def prepare(spec: WorkerSpec, base: Base, stop: Callable[[], bool] = lambda: False) -> Examples:
    """The spec's files as tokens. Raises JobError, which names the file, the line and what is wrong with it, and
    TrainingStopped.
    """
    longest = min(spec.config.max_length, base.config.context_length)
    rendered = encoder(ModelTokenizer(base.vocabulary), Template.of(spec.template), longest)

    def encode(record: Record) -> tuple[Sequence[int], Sequence[bool]]:
        if stop():
            raise TrainingStopped("stopped before it began")
        return rendered(record)

    def tokens(records: Sequence[Record], name: str, param: str) -> Tokens:
        with _told(name, param):
            return data.tokenize(records, encode, longest, name)

    def judging(records: Sequence[Record], looked_at: Tokens, name: str, param: str) -> dict[str, Any]:
        # The server's context may be another when a run goes on, so it has no say in what the run looks at.
        if not all(isinstance(record, Pair) for record in records):
            return {"records": tuple(records), "measured": looked_at, "left_out": looked_at.too_long}
        with _told(name, param):
            left = answerable(records, encode, min(longest, spec.context or longest))
        measured = tokens(left, name, param) if left else looked_at
        return {"records": tuple(left), "measured": measured, "left_out": len(records) - len(left)}

    def none_fits(records: Sequence[Record], name: str, param: str) -> bool:
        with _told(name, param):
            return all(len(encode(record)[0]) > longest for record in records)

    records = _read(spec.data, spec.data_name, "training_file")
    if spec.validation is not None:
        judged = _read(spec.validation, spec.validation_name, "validation_file")
        learned = tokens(records, spec.data_name, "training_file")
        name, param = spec.validation_name, "validation_file"
        # Where the first ones are all too long, those that the server measures by may not be.
        first = MOST_JUDGED if none_fits(judged[:MOST_EVALUATED], name, param) else MOST_EVALUATED
        looked_at = tokens(judged[:first], name, param)
        return Examples(learned, looked_at, **judging(judged[:MOST_JUDGED], looked_at, name, param))
    kept = set(held_out(records, spec.held_out))
    judged = [records[i] for i in sorted(kept)]
    if none_fits(judged, spec.data_name, "training_file"):  # as if there were too few to hold any out
        return Examples(tokens(records, spec.data_name, "training_file"), left_out=len(judged))
    learned = tokens([r for i, r in enumerate(records) if i not in kept], spec.data_name, "training_file")
    looked_at = tokens(judged, f"{spec.data_name}, held out to judge by", "training_file")
    judges = judging(judged, looked_at, spec.data_name, "training_file")
    return Examples(learned, looked_at, held_out=len(judged), **judges)


@contextmanager
def _told(name: str, param: str) -> Iterator[None]:
    """A wrong line of a file, as the job's error."""
    try:
        yield
    except InvalidData as error:
        said = error.message if error.message.startswith(name) else f"{name}, {error.message}"
        raise JobError(f"invalid_{param}", said, param) from error


def answerable(records: Sequence[Record], encode: Encode, longest: int) -> list[Record]:
    """The records that can be measured: of up to `longest` tokens, with something before the answer for an engine, and
    an answer that is not too long to be compared.

    One that an engine refuses would cost the measure of all the others. Raises InvalidData as `encode` does.
    """

    def fits(record: Record) -> bool:
        ids, learned = encode(record)
        return len(ids) <= longest and not all(learned) and not (isinstance(record, Pair) and too_long(record.output))

    return [record for record in records if fits(record)]


def held_out(records: Sequence[Record], share: float) -> tuple[int, ...]:
    """Positions of the records that a share holds out, ascending; none if that is less than one record.

    By what they say alone, so that whoever learns from the same file, in any order and by any seed, has the same ones
    held out. Those that say the same are held out together or not at all.
    """
    wanted = min(MOST_HELD_OUT, int(share * len(records)), len(records) - 1)
    places: dict[bytes, list[int]] = {}
    for place, record in enumerate(records):
        places.setdefault(hashlib.sha256(_said(record).encode()).digest(), []).append(place)
    kept: list[int] = []
    for _, alike in sorted(places.items()):
        if len(kept) + len(alike) <= wanted:
            kept += alike
    return tuple(sorted(kept))


def _said(record: Record) -> str:
    """The same for records that say the same, wherever they stand and in whatever order their messages are written."""
    if isinstance(record, Chat):
        record = replace(record, messages=tuple(map(_as_commonly_written, record.messages)))
    return repr(replace(record, line=0, unit=""))


def _as_commonly_written(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with its role first and without what is there to no effect: a weight other than an answer's of 0."""
    keys = ["role", "content", *sorted(message.keys() - {"role", "content", "weight"})]
    left_out = {"weight": 0} if message["role"] == "assistant" and message.get("weight", 1) == 0 else {}
    return {key: message[key] for key in keys if message[key] not in (None, [])} | left_out


def keep_pairs(records: Sequence[Record], folder: Path) -> None:
    """Put what a result is judged by where the server finds it, if all of it has an input and an output.

    So the server never reads a file as large as training files are.
    """
    pairs = [record for record in records if isinstance(record, Pair)]
    (folder / JUDGED).unlink(missing_ok=True)
    if pairs and len(pairs) == len(records):
        lines = (json.dumps({"input": pair.input, "output": pair.output}) for pair in pairs)
        (folder / JUDGED).write_text("\n".join(lines), encoding="utf-8")


def _read(path: Path, name: str, param: str) -> list[Record]:
    try:
        return data.parse(path.read_bytes(), name)
    except OSError as error:
        raise JobError(f"invalid_{param}", f"{name} cannot be read: {error.strerror}", param) from error
    except InvalidData as error:
        raise JobError(f"invalid_{param}", error.message, param) from error


def _config(spec: WorkerSpec, base: Base) -> TrainingConfig:
    """The spec's config; an adapter to start from gives ranks and modules."""
    config = on_base(spec.config, base)
    if spec.init is None:
        return config
    start = _adapter(spec, base, spec.init, spec.init_name)
    rank = max(start.ranks)
    if spec.prune_to is not None and spec.prune_to >= rank:
        why = f"prune_to must be below the rank of the adapter that is started from, {rank}: nothing would be cut"
        raise JobError("invalid_settings", why, "lora.prune_to")
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
    run: dict[str, Any] = {
        "name": spec.name,
        "validation": examples.judged,
        "checkpoints": checkpoints,
        "on_event": on_event,
        "stop": stop,
    }
    if spec.auto_rank:
        return rank_search.auto_lora(model, examples.learned, config, recovery=RECOVERY, **run)
    init = _adapter(spec, base, spec.init, spec.init_name) if spec.init is not None else None
    return train(model, examples.learned, config, init, **run)


def _tell_best(made: Mapping[str, Any], tell: Tell) -> None:
    """Say which step the result is of, if that is not the last one, whose losses are what a reader sees last."""
    step = made["best_step"]
    if step == made["steps"]:
        return
    for loss in (e["loss"] for e in made["evaluations"] if e["step"] == step):
        said = f"The result is that of step {step:,}, whose validation loss is the lowest: {loss:.4f}."
        tell({"kind": NOTE, "message": said, "data": {"best_step": step, "valid_loss": loss}})


def _adapter(spec: WorkerSpec, base: Base, folder: Path, name: str) -> LoraWeights:
    """The server's copy of a version of its store, by the rules that let it in, and with ranks that can be rounded: the
    server serves it so too."""
    stored = peft_format.read_folder(folder, name=name, max_rank=spec.max_rank, shapes=base.shapes(), stored=True)
    return recompress(stored)


def _losses(
    spec: WorkerSpec, model: TrainableModel, base: Base, weights: LoraWeights, examples: Examples
) -> dict[str, Any]:
    """The loss on the judged examples, of the result and of the one that it would replace, with that one's digest:
    another may have its name by the time that the two are compared.
    """
    if examples.judged is None:
        return {}
    told: dict[str, Any] = {
        "examples": len(examples.judged.examples),
        EVALUATED: loss_of(model, weights, examples.judged),
    }
    if spec.rival is not None:
        rival = _adapter(spec, base, spec.rival, spec.name)
        told |= {"rival": loss_of(model, rival, examples.judged), "rival_digest": rival.digest}
    return {"losses": told}


def _write(spec: WorkerSpec, base: Base, folder: Path, weights: LoraWeights) -> None:
    """The result in bf16 under a name of its own, then by a rename under the one that is looked for."""
    part = folder / PART
    shutil.rmtree(part, ignore_errors=True)
    about = Recipe(spec.name, spec.data_name, spec.task or {}, spec.config, prune_to=spec.prune_to)
    peft_format.save(
        weights, part, dtype=torch.bfloat16, shapes=base.shapes(), task=spec.task, card=card(about, weights)
    )
    shutil.rmtree(folder / RESULT, ignore_errors=True)
    part.rename(folder / RESULT)
