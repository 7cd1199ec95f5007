"""`train`: a model, tokens and a config -> `LoraWeights`. The same result for the same arguments, resumed or not.

Owns the loop: batches, packing, the loss over learned tokens only, evaluation, checkpoints. The model is an argument
(`Model`), and so are the clock's listeners; neither serving nor tokenizers nor files of data are known here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapters import layers, memory
from adapters.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from adapters.data import Example, Tokens
from adapters.errors import AdapterError, Diverged, TrainingStopped
from adapters.layers import LoraSpec
from adapters.optimizer import AdamW, learning_rate
from adapters.seeds import check_seed
from adapters.weights import LoraWeights

TRIM_STEPS = 16
"""Updates after which freed memory is given back: batches differ in size, so the heap falls into ever more pieces."""
LOSS_ROWS = 256
"""Rows whose logits are in memory at a time."""
MOST_EPOCHS = 1e9
"""More are no number of steps that could be counted."""


class Model(Protocol):
    """A causal language model whose linears can be wrapped. Its own weights are frozen and shared, never changed."""

    tree: nn.Module
    """Where LoRALinears are put, by the base's own module paths."""
    blocks: Sequence[nn.Module]
    """The layers that activation checkpointing computes again, by `whole` where one has such a forward."""
    metadata: Mapping[str, Any]
    """`base` (name), `base_id`, `quantization`: goes into the result."""
    nbytes: int
    """Bytes of the frozen weights."""

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int], rows: torch.Tensor | None = None) -> torch.Tensor:
        """Several sequences one after the other, int64 [T] with T the sum of `lengths`: their last states [T, h], or
        those of `rows`, int64 [L], alone.

        No sequence sees another. Keeps the graph if gradients are on.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """States of any rows [L, h] -> float [L, vocab]."""


@dataclass(frozen=True)
class TrainingConfig:
    """What a run does. `model`, `data`, `output`, `quantization`, `use_double_quant` and `compute_dtype` say to whoever
    builds the arguments of `train` what to build; all else is read here.

    `batch_size` is examples an update, which are computed in packed pieces of up to `micro_tokens` tokens; a piece's
    size changes speed and memory only. `lora_rank_of` gives ranks to single module paths. `max_steps` 0 is no limit.
    Evaluation comes every `eval_steps` updates (0: only at the end) and training stops when it has not been better
    for `patience` times (0: never); the result is the best that was evaluated, or the last without validation data.
    """

    model: str = "smollm2-135m"
    data: str = ""
    output: str = ""
    epochs: float = 1.0
    batch_size: int = 16
    learning_rate: float = 5e-4
    lora_rank: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    quantization: str = "int4"
    use_double_quant: bool = False
    compute_dtype: str = "auto"
    use_rslora: bool = False
    lora_rank_of: Mapping[str, int] = field(default_factory=dict)
    max_steps: int = 0
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    micro_tokens: int = 1024
    activation_checkpointing: bool = False
    eval_steps: int = 0
    save_steps: int = 50
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        self._check_kinds()
        for name, most in (("epochs", MOST_EPOCHS), ("learning_rate", math.inf)):
            value = getattr(self, name)
            if not 0.0 < value < most:
                raise AdapterError(f"{name} must be over 0 and under {most:g}, not {value!r}", name)
        for name, least in (
            ("batch_size", 1),
            ("micro_tokens", 1),
            ("max_length", 2),
            ("max_steps", 0),
            ("eval_steps", 0),
            ("save_steps", 0),
            ("patience", 0),
        ):
            if getattr(self, name) < least:
                raise AdapterError(f"{name} must be at least {least}, not {getattr(self, name)!r}", name)
        for name in ("warmup_ratio", "weight_decay", "max_grad_norm"):
            if not 0.0 <= getattr(self, name) < (1.0 if name == "warmup_ratio" else math.inf):
                raise AdapterError(f"{name} is out of range: {getattr(self, name)!r}", name)
        if self.patience and not self.eval_steps:
            raise AdapterError(
                "patience counts evaluations; set eval_steps, after how many updates one comes", "patience"
            )
        check_seed(self.seed)
        if self.compute_dtype not in ("auto", "bfloat16", "float32"):
            said = f"compute_dtype is auto, bfloat16 or float32, not {self.compute_dtype!r}"
            raise AdapterError(said, "compute_dtype")
        if self.quantization not in ("int4", "nf4", "none"):
            raise AdapterError(f"quantization is int4, nf4 or none, not {self.quantization!r}", "quantization")
        self.spec()

    def told(self) -> dict[str, Any]:
        """The settings, as keys of runs are made of them: what leaves the dtype to the machine has those of before
        2026-12-01, when that was bfloat16, so that runs go on and what is finished is known. So a run that asks for
        bfloat16 goes on from its checkpoint, too.
        """
        return asdict(self) | {"compute_dtype": self.compute_dtype.replace("auto", "bfloat16")}

    def _check_kinds(self) -> None:
        """Files say anything: a text for a number would be found out at the first step."""
        whats = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            taken: Any = (int, float) if kind is float else kind
            beyond = kind is float and isinstance(value, int) and abs(value) > sys.float_info.max
            if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool) or beyond:
                raise AdapterError(f"{name} must be {whats[kind]}, not {value!r}", name)
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(targets, list | tuple) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise AdapterError(f"target_modules is a pattern or a list of names, not {targets!r}", "target_modules")
        if not isinstance(self.lora_rank_of, Mapping) or not all(
            isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in self.lora_rank_of.values()
        ):
            raise AdapterError("lora_rank_of gives whole numbers to module paths", "lora_rank_of")

    def spec(self) -> LoraSpec:
        """Which linears get a LoRA."""
        return LoraSpec(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.target_modules,
            rslora=self.use_rslora,
            rank_of=self.lora_rank_of,
        )

    def steps(self, examples: int) -> int:
        """Updates of a run over this many examples."""
        steps = max(1, round(self.epochs * math.ceil(examples / self.batch_size)))
        return min(steps, self.max_steps) if self.max_steps else steps


_KINDS = {f.name: type(f.default) for f in fields(TrainingConfig) if f.name not in ("target_modules", "lora_rank_of")}


@dataclass(frozen=True)
class Event:
    """What is told while a run goes on. `kind` is "step", "eval", "checkpoint" or "done".

    `loss` is the mean over learned tokens, in nats; `accuracy` the share of them whose likeliest token is right.
    `tokens` counts all tokens of the run so far, none is padding; `seconds` the time spent on updates alone.
    """

    kind: str
    step: int
    steps: int
    loss: float = math.nan
    accuracy: float = math.nan
    learning_rate: float = math.nan
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Progress:
    """Where a run is; all of it is in a checkpoint."""

    step: int = 0
    tokens: int = 0
    targets: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


def train(
    model: Model,
    data: Tokens,
    config: TrainingConfig,
    init: LoraWeights | None = None,
    *,
    name: str = "adapter",
    validation: Tokens | None = None,
    checkpoints: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> LoraWeights:
    """A LoRA trained on `data`, from `init` if it is given. The model's tree is as before when this returns.

    With a folder for `checkpoints` the run goes on from the one that is there, bit for bit as if it had never stopped
    (on a CPU, on the same number of threads: a GPU adds up gradients in no fixed order), and leaves one behind every
    `save_steps` updates and when `stop` says so. The metadata say what was done (`training`). Raises TrainingStopped if
    `stop` said so, BaseMismatch for targets that are no linears of the base, and AdapterError for a checkpoint of
    another run and for ranks that memory has no room for.
    """
    layers.check_room(model.tree, config.spec())
    found = layers.inject(model.tree, config.spec(), config.seed)
    try:
        if init is not None:
            layers.load(found, init)
        key = run_key(model, data, config, init, validation)
        run = _Run(model, data, config, _parameters(found), validation, checkpoints, key)
        progress, peak = run.go(on_event or (lambda event: None), stop or (lambda: False))
        weights = layers.extract(model.tree, name)
    finally:
        layers.eject(model.tree)
    made = _report(progress, peak, config, data, run, init)
    return replace(weights, metadata={**model.metadata, "training": made})


def train_dense(
    model: Model, data: Tokens, config: TrainingConfig, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Full fine-tuning of the same tree's linears, for comparison: each must be an `nn.Linear`, and is changed.

    Answers the report that `train` puts into its metadata.
    """
    parameters: list[torch.Tensor] = [m.weight for m in layers.linears(model.tree).values() if isinstance(m, nn.Linear)]
    model.tree.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    run = _Run(model, data, config, parameters, None, None, "")
    progress, peak = run.go(on_event, lambda: False)
    return _report(progress, peak, config, data, run, None)


def run_key(
    model: Model, data: Tokens, config: TrainingConfig, init: LoraWeights | None, validation: Tokens | None
) -> str:
    """What a checkpoint must have been made of to go on from: all that has a say in the result."""
    told = config.told() | {"output": "", "data": data.digest, "init": init.digest if init is not None else ""}
    told["validation"] = validation.digest if validation is not None else ""
    # A run goes on in what the machine multiplies in, if the settings leave that to it.
    told["on"] = {key: value for key, value in model.metadata.items() if key != "compute_dtype"}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=list).encode()).hexdigest()


def done(made: Mapping[str, Any]) -> Event:
    """What is told at the end of a run, of one whose report (`metadata["training"]`) is at hand."""
    steps = made["steps"]
    return Event("done", steps, steps, tokens=made["tokens"], seconds=made["seconds"])


def evaluate_loss(model: Model, data: Tokens, micro_tokens: int = 1024) -> tuple[float, float]:
    """Mean loss and accuracy over all learned tokens of `data`, by the tree as it is."""
    loss = correct = 0.0
    targets = 0
    with torch.no_grad(), _mode(model.tree, training=False):
        for piece in pieces(data.examples, micro_tokens):
            part, hits = _losses(model, *_forward(model, piece), scale=0.0)
            loss, correct, targets = loss + part, correct + hits, targets + sum(e.targets for e in piece)
    return loss / targets, correct / targets


class _Run:
    """One training run over a set of trainable parameters, whatever they are."""

    def __init__(
        self,
        model: Model,
        data: Tokens,
        config: TrainingConfig,
        parameters: Sequence[torch.Tensor],
        validation: Tokens | None,
        folder: Path | None,
        key: str,
    ) -> None:
        self.model, self.data, self.config, self.validation = model, data, config, validation
        self.optimizer = AdamW([p for p in parameters if p.requires_grad], weight_decay=config.weight_decay)
        self.steps = config.steps(len(data.examples))
        self.warmup = math.ceil(config.warmup_ratio * self.steps)
        self.folder, self.key = folder, key
        self.progress = _Progress()
        self.kept = 0
        """The step of the last checkpoint; 0 needs none."""
        self.best: torch.Tensor | None = None

    def go(self, tell: Callable[[Event], None], stop: Callable[[], bool]) -> tuple[_Progress, memory.Peak]:
        """Runs to the end, from the checkpoint if there is one, and leaves the best values in the parameters."""
        config, progress = self.config, self._resume()
        watch = memory.Watch()
        recompute = _recomputed(self.model.blocks) if config.activation_checkpointing else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), recompute:
            while progress.step < self.steps:
                if stop():
                    self._keep(tell)
                    raise TrainingStopped(f"stopped at step {progress.step} of {self.steps}")
                event = self._update()
                tell(event)
                at_end = progress.step == self.steps
                if self.validation is not None and (at_end or _due(progress.step, config.eval_steps)):
                    tell(self._evaluate())
                    if config.patience and progress.worse >= config.patience:
                        break
                if at_end or _due(progress.step, config.save_steps):
                    self._keep(tell)
        if self.best is not None:
            with torch.no_grad():
                self.optimizer.values.copy_(self.best)
        tell(self._event("done"))
        return progress, watch.peak()

    def _update(self) -> Event:
        """One batch: forward and backward piece by piece, then one step."""
        config, progress = self.config, self.progress
        started = time.perf_counter()
        batch = self._batch(progress.step)
        targets = sum(example.targets for example in batch)
        loss = hits = 0.0
        # The noise of dropout depends on the seed and the step alone, so that a resumed run draws the same.
        torch.manual_seed(_drawn_from(config.seed, progress.step))
        with _mode(self.model.tree, training=True):
            for piece in pieces(batch, config.micro_tokens):
                part, right = _losses(self.model, *_forward(self.model, piece), scale=1.0 / targets)
                loss, hits = loss + part, hits + right
        rate = learning_rate(progress.step, self.steps, config.learning_rate, self.warmup)
        norm = self.optimizer.clip(config.max_grad_norm)
        if not math.isfinite(norm):
            raise Diverged(
                f"the gradient of step {progress.step + 1} is not finite; lower the learning rate ({rate:g})",
                "learning_rate",
            )
        self.optimizer.step(rate)
        progress.step += 1
        if progress.step % TRIM_STEPS == 0:
            memory.trim()
        progress.tokens += sum(len(example.ids) for example in batch)
        progress.targets += targets
        progress.seconds += time.perf_counter() - started
        return self._event("step", loss / targets, hits / targets, rate)

    def _batch(self, step: int) -> list[Example]:
        """The examples of a step: each epoch is all of them once, in an order drawn from the seed and its number."""
        count, size = len(self.data.examples), self.config.batch_size
        per_epoch = math.ceil(count / size)
        epoch, place = divmod(step, per_epoch)
        order = _order(count, self.config.seed, epoch)
        return [self.data.examples[i] for i in order[place * size : (place + 1) * size]]

    def _evaluate(self) -> Event:
        progress = self.progress
        assert self.validation is not None
        loss, accuracy = evaluate_loss(self.model, self.validation, self.config.micro_tokens)
        progress.history.append({"step": progress.step, "loss": loss, "accuracy": accuracy})
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = loss, progress.step, 0
            self.best = self.optimizer.values.clone()
        else:
            progress.worse += 1
        return self._event("eval", loss, accuracy)

    def _event(self, kind: str, loss: float = math.nan, accuracy: float = math.nan, rate: float = math.nan) -> Event:
        p = self.progress
        return Event(kind, p.step, self.steps, loss, accuracy, rate, p.tokens, p.seconds)

    def _keep(self, tell: Callable[[Event], None]) -> None:
        """A checkpoint of where the run is, unless it was there when it began, or one has been written since."""
        if self.folder is None or self.kept == self.progress.step:
            return
        tensors = self.optimizer.state() | ({"best": self.best} if self.best is not None else {})
        write_checkpoint(self.folder, Checkpoint(self.key, asdict(self.progress), tensors))
        self.kept = self.progress.step
        tell(self._event("checkpoint"))

    def _resume(self) -> _Progress:
        found = read_checkpoint(self.folder, self.key) if self.folder is not None else None
        if found is not None:
            self.optimizer.restore(found.tensors)
            self.best = found.tensors.get("best")
            self.progress = _Progress(**found.progress)
            self.kept = self.progress.step
        return self.progress


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(_drawn_from(seed, epoch))
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


def _drawn_from(seed: int, number: int) -> int:
    """What a generator begins with for one of a run's draws: torch takes 64 bits, whatever the seed."""
    return (seed * 1_000_003 + number) % (1 << 63)


def pieces(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """The examples in packs of up to `limit` tokens, by first-fit decreasing; one that is longer is alone."""
    packs: list[list[Example]] = []
    room: list[int] = []
    for example in sorted(examples, key=lambda e: -len(e.ids)):
        size = len(example.ids)
        place = next((i for i, left in enumerate(room) if size <= left), None)
        if place is None:
            packs.append([example])
            room.append(limit - size)
        else:
            packs[place].append(example)
            room[place] -= size
    return packs


def _forward(model: Model, piece: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The states from which the learned tokens of a pack are predicted, [L, h], and those tokens, int64 [L]."""
    ids = torch.tensor([token for example in piece for token in example.ids])
    learned = torch.tensor([flag for example in piece for flag in example.learned])
    # An example's first token is never learned, so the row before a target is always of its own sequence.
    rows = learned.nonzero().flatten()
    return model.hidden(ids, [len(example.ids) for example in piece], rows - 1), ids[rows]


def _losses(model: Model, hidden: torch.Tensor, targets: torch.Tensor, scale: float) -> tuple[float, float]:
    """Sum of the losses, and how many targets are the likeliest token. If gradients are on, sends back those of
    `scale` times the sum. Logits are in memory for `LOSS_ROWS` rows at a time, and never kept for the way back.
    """
    loss = 0.0
    hits = 0.0
    back = []
    for start in range(0, len(targets), LOSS_ROWS):
        rows = hidden[start : start + LOSS_ROWS].detach().requires_grad_(torch.is_grad_enabled())
        target = targets[start : start + LOSS_ROWS, None]
        logits = model.logits(rows)
        values = logits.detach().float()
        top, likeliest = values.max(-1, keepdim=True)
        hits += int((likeliest == target).sum())
        values.sub_(top)  # in the logits themselves where those are float32: the way back does not read them
        right = values.gather(1, target)
        powers = values.exp_()
        total = powers.sum(-1, keepdim=True)
        loss += float((total.log() - right).double().sum())
        if torch.is_grad_enabled():
            gradient = powers.div_(total)
            gradient.scatter_add_(1, target, torch.full_like(right, -1.0))
            _send_back(logits, gradient.mul_(scale).to(logits.dtype))
            assert rows.grad is not None
            back.append(rows.grad)
    if back:
        _send_back(hidden, torch.cat(back).to(hidden.dtype))
    return loss, hits


def _send_back(output: torch.Tensor, gradient: torch.Tensor) -> None:
    """`torch.autograd.backward(output, gradient)`, which would import sympy to compare the two shapes: a third of a
    second and tens of megabytes in each training process.
    """
    _Given.apply(output, gradient).backward()  # type: ignore[no-untyped-call]


class _Given(torch.autograd.Function):
    """A scalar whose gradient to `output` is what it is given."""

    @staticmethod
    def forward(ctx: Any, output: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.gradient, None


@contextlib.contextmanager
def _mode(tree: nn.Module, training: bool) -> Iterator[None]:
    before = tree.training
    tree.train(training)
    try:
        yield
    finally:
        tree.train(before)


@contextlib.contextmanager
def _recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within it the blocks keep their inputs only, and compute the rest again on the way back."""
    originals = [getattr(block, "whole", block.forward) for block in blocks]
    for block, forward in zip(blocks, originals, strict=True):
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _parameters(found: Mapping[str, layers.LoRALinear]) -> list[torch.Tensor]:
    return [p for layer in found.values() for p in (layer.lora_A, layer.lora_B)]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _report(
    p: _Progress, peak: memory.Peak, config: TrainingConfig, data: Tokens, run: _Run, init: LoraWeights | None
) -> dict[str, Any]:
    """What is told of a run in the result's metadata."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("data", "output") and v != {}}
    return {
        "samples": len(data.examples),
        "left_out_as_too_long": data.too_long,
        "steps": p.step,
        "tokens": p.tokens,
        "target_tokens": p.targets,
        "seconds": round(p.seconds, 3),
        "tokens_per_second": round(p.tokens / p.seconds, 1) if p.seconds else None,
        "evaluations": p.history,
        "best_step": p.best_step if p.history else p.step,
        "from": init.version.label if init is not None else None,
        "memory": {"base": run.model.nbytes, **run.optimizer.nbytes, **peak.told()},
        "config": settings,
    }
