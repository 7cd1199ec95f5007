"""LoRA training: `train(model, data, config) -> LoraWeights`, deterministic and resumable.

The loop packs examples without padding, takes the loss over target tokens only, evaluates, and writes checkpoints. The
model is an argument (`Model`).
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
"""Updates between calls of malloc_trim: batches of different sizes fragment the heap."""
LOSS_ROWS = 256
"""Rows of logits that are computed at a time, to bound memory."""
MAX_EPOCHS = 1e9


class Model(Protocol):
    """A causal language model whose linears can be wrapped with LoRA. Its own weights are frozen and shared."""

    tree: nn.Module
    """The module tree that `LoRALinear` is injected into, with the base's module paths."""
    blocks: Sequence[nn.Module]
    """Layers that activation checkpointing recomputes. A layer may have a separate forward for that, `whole`."""
    metadata: Mapping[str, Any]
    """`base` (name), `base_id`, `quantization`: copied into the result."""
    nbytes: int
    """Bytes of the frozen weights."""

    def hidden(self, ids: torch.Tensor, lengths: Sequence[int], rows: torch.Tensor | None = None) -> torch.Tensor:
        """The last hidden states of packed sequences. Sequences do not attend to each other.

        Args:
            ids: int64 [T], the sequences one after another.
            lengths: their lengths, which sum to T.
            rows: int64 [L], the positions to return; None for all.

        Returns:
            Hidden states [T, h] or [L, h], with a graph if gradients are enabled.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states [L, h] -> logits, float [L, vocab]."""


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a run.

    Attributes:
        model, data, output, quantization, use_double_quant, compute_dtype: for the caller, who builds the arguments of
            `train` from them.
        batch_size: examples per update. They are computed in packs of up to `micro_tokens` tokens; the pack size
            changes speed and memory only.
        lora_rank_of: ranks of single module paths.
        max_steps: most updates; 0 is no limit.
        eval_steps: updates between evaluations; 0 evaluates at the end only. The best evaluated state is the result, or
            the last one without validation data.
        patience: evaluations without improvement before training stops; 0 never stops early.

    Raises:
        AdapterError: a value has the wrong type or is out of range; `param` names it.
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
        self._check_types()
        for name, most in (("epochs", MAX_EPOCHS), ("learning_rate", math.inf)):
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
                "patience counts evaluations: set eval_steps to the number of updates between them", "patience"
            )
        check_seed(self.seed)
        if self.compute_dtype not in ("auto", "bfloat16", "float32"):
            raise AdapterError(
                f"compute_dtype is auto, bfloat16 or float32, not {self.compute_dtype!r}", "compute_dtype"
            )
        if self.quantization not in ("int4", "nf4", "none"):
            raise AdapterError(f"quantization is int4, nf4 or none, not {self.quantization!r}", "quantization")
        self.spec()

    def key_settings(self) -> dict[str, Any]:
        """The settings that identify a run. "auto" counts as bfloat16, so that older checkpoints can be resumed."""
        return asdict(self) | {"compute_dtype": self.compute_dtype.replace("auto", "bfloat16")}

    def _check_types(self) -> None:
        names = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
        for name, kind in _KINDS.items():
            value = getattr(self, name)
            taken: Any = (int, float) if kind is float else kind
            beyond = kind is float and isinstance(value, int) and abs(value) > sys.float_info.max
            if not isinstance(value, taken) or (isinstance(value, bool) and kind is not bool) or beyond:
                raise AdapterError(f"{name} must be {names[kind]}, not {value!r}", name)
        targets = (self.target_modules,) if isinstance(self.target_modules, str) else self.target_modules
        if not isinstance(targets, list | tuple) or not targets or not all(isinstance(t, str) and t for t in targets):
            raise AdapterError(f"target_modules is a pattern or a list of names, not {targets!r}", "target_modules")
        if not isinstance(self.lora_rank_of, Mapping) or not all(
            isinstance(rank, int) and not isinstance(rank, bool) and rank >= 0 for rank in self.lora_rank_of.values()
        ):
            raise AdapterError("lora_rank_of gives whole numbers to module paths", "lora_rank_of")

    def spec(self) -> LoraSpec:
        """Which linears get a LoRA, and of which rank."""
        return LoraSpec(
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.target_modules,
            rslora=self.use_rslora,
            rank_of=self.lora_rank_of,
        )

    def steps(self, examples: int) -> int:
        """The number of updates of a run over this many examples."""
        steps = max(1, round(self.epochs * math.ceil(examples / self.batch_size)))
        return min(steps, self.max_steps) if self.max_steps else steps


_KINDS = {f.name: type(f.default) for f in fields(TrainingConfig) if f.name not in ("target_modules", "lora_rank_of")}


@dataclass(frozen=True)
class Event:
    """Progress of a run.

    Attributes:
        kind: "step", "eval", "checkpoint" or "done".
        loss: mean over target tokens, in nats.
        accuracy: share of target tokens that are the argmax.
        tokens: all tokens of the run so far; there is no padding.
        seconds: time spent on updates.
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
    """The state of a run beside its tensors. It is part of a checkpoint."""

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
    """Train a LoRA. The model's tree is restored when this returns.

    Args:
        init: weights to start from; None is PEFT's default initialization.
        name: name of the result.
        validation: held-out data, see `TrainingConfig.eval_steps`.
        checkpoints: folder of the run's checkpoint, written every `save_steps` updates and when the run is stopped. A
            run resumes from it bit for bit on a CPU with the same number of threads.
        on_event: called with each `Event`.
        stop: checked before each update; True stops the run.

    Returns:
        The trained weights, float32, with a report in `metadata["training"]`.

    Raises:
        TrainingStopped: `stop` returned True; the checkpoint is written.
        BaseMismatch: a target is not a linear of the base.
        AdapterError: the checkpoint is of another run, or memory is too small for the ranks.
        Diverged: a gradient is not finite.
    """
    layers.check_room(model.tree, config.spec())
    found = layers.inject(model.tree, config.spec(), config.seed)
    try:
        if init is not None:
            layers.load(found, init)
        key = run_key(model, data, config, init, validation)
        run = _Run(model, data, config, _parameters(found), validation, checkpoints, key)
        progress, peak = run.run(on_event or (lambda event: None), stop or (lambda: False))
        weights = layers.extract(model.tree, name)
    finally:
        layers.eject(model.tree)
    report = _report(progress, peak, config, data, run, init)
    return replace(weights, metadata={**model.metadata, "training": report})


def train_dense(
    model: Model, data: Tokens, config: TrainingConfig, on_event: Callable[[Event], None]
) -> dict[str, Any]:
    """Full fine-tuning of the tree's `nn.Linear` weights in place, for comparison. Returns the report of the run."""
    parameters: list[torch.Tensor] = [m.weight for m in layers.linears(model.tree).values() if isinstance(m, nn.Linear)]
    model.tree.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    run = _Run(model, data, config, parameters, None, None, "")
    progress, peak = run.run(on_event, lambda: False)
    return _report(progress, peak, config, data, run, None)


def run_key(
    model: Model, data: Tokens, config: TrainingConfig, init: LoraWeights | None, validation: Tokens | None
) -> str:
    """A digest of everything that influences the result. A checkpoint with another key is not resumed."""
    parts = config.key_settings() | {"output": "", "data": data.digest, "init": init.digest if init is not None else ""}
    parts["validation"] = validation.digest if validation is not None else ""
    # With compute_dtype "auto" a run may be resumed on a machine with another dtype.
    parts["on"] = {key: value for key, value in model.metadata.items() if key != "compute_dtype"}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=list).encode()).hexdigest()


def finished_event(report: Mapping[str, Any]) -> Event:
    """The last event of a finished run, from its report (`metadata["training"]`)."""
    steps = report["steps"]
    return Event("done", steps, steps, tokens=report["tokens"], seconds=report["seconds"])


def evaluate_loss(model: Model, data: Tokens, micro_tokens: int = 1024) -> tuple[float, float]:
    """Mean loss in nats and accuracy over all target tokens of `data`."""
    loss = correct = 0.0
    targets = 0
    with torch.no_grad(), _mode(model.tree, training=False):
        for packed in pack(data.examples, micro_tokens):
            part, hits = _loss_and_backward(model, *_forward(model, packed), scale=0.0)
            loss, correct, targets = loss + part, correct + hits, targets + sum(e.targets for e in packed)
    return loss / targets, correct / targets


class _Run:
    """One training run over a set of trainable parameters."""

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
        self.saved_step = 0
        """The step of the last checkpoint."""
        self.best: torch.Tensor | None = None

    def run(self, tell: Callable[[Event], None], stop: Callable[[], bool]) -> tuple[_Progress, memory.Peak]:
        """Run to the end, from the checkpoint if there is one, and leave the best values in the parameters."""
        config, progress = self.config, self._resume()
        meter = memory.PeakMeter()
        recompute = _checkpointed(self.model.blocks) if config.activation_checkpointing else contextlib.nullcontext()
        with torch.random.fork_rng(devices=[]), recompute:
            while progress.step < self.steps:
                if stop():
                    self._save(tell)
                    raise TrainingStopped(f"stopped at step {progress.step} of {self.steps}")
                event = self._update()
                tell(event)
                at_end = progress.step == self.steps
                if self.validation is not None and (at_end or _due(progress.step, config.eval_steps)):
                    tell(self._evaluate())
                    if config.patience and progress.worse >= config.patience:
                        break
                if at_end or _due(progress.step, config.save_steps):
                    self._save(tell)
        if self.best is not None:
            with torch.no_grad():
                self.optimizer.values.copy_(self.best)
        tell(self._event("done"))
        return progress, meter.peak()

    def _update(self) -> Event:
        """One update: forward and backward for each pack of the batch, then an optimizer step."""
        config, progress = self.config, self.progress
        started = time.perf_counter()
        batch = self._batch(progress.step)
        targets = sum(example.targets for example in batch)
        loss = hits = 0.0
        # Dropout depends on seed and step only, so that a resumed run draws the same.
        torch.manual_seed(_seed_for(config.seed, progress.step))
        with _mode(self.model.tree, training=True):
            for packed in pack(batch, config.micro_tokens):
                part, correct = _loss_and_backward(self.model, *_forward(self.model, packed), scale=1.0 / targets)
                loss, hits = loss + part, hits + correct
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
        """The examples of a step. Each epoch is a permutation drawn from the seed and the epoch's number."""
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

    def _save(self, tell: Callable[[Event], None]) -> None:
        """Write a checkpoint, unless there is one of this step."""
        if self.folder is None or self.saved_step == self.progress.step:
            return
        tensors = self.optimizer.state() | ({"best": self.best} if self.best is not None else {})
        write_checkpoint(self.folder, Checkpoint(self.key, asdict(self.progress), tensors))
        self.saved_step = self.progress.step
        tell(self._event("checkpoint"))

    def _resume(self) -> _Progress:
        found = read_checkpoint(self.folder, self.key) if self.folder is not None else None
        if found is not None:
            self.optimizer.restore(found.tensors)
            self.best = found.tensors.get("best")
            self.progress = _Progress(**found.progress)
            self.saved_step = self.progress.step
        return self.progress


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(_seed_for(seed, epoch))
    order: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
    return order


def _seed_for(seed: int, number: int) -> int:
    """A 64-bit seed for one of a run's draws."""
    return (seed * 1_000_003 + number) % (1 << 63)


def pack(examples: Sequence[Example], limit: int) -> list[list[Example]]:
    """Pack examples into groups of up to `limit` tokens by first-fit decreasing. A longer example is alone."""
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


def _forward(model: Model, packed: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states that predict a pack's target tokens, [L, h], and the targets, int64 [L]."""
    ids = torch.tensor([token for example in packed for token in example.ids])
    is_target = torch.tensor([flag for example in packed for flag in example.learned])
    # The first token of an example is never a target, so the row before a target belongs to the same sequence.
    rows = is_target.nonzero().flatten()
    return model.hidden(ids, [len(example.ids) for example in packed], rows - 1), ids[rows]


def _loss_and_backward(model: Model, hidden: torch.Tensor, targets: torch.Tensor, scale: float) -> tuple[float, float]:
    """Sum of the cross-entropy losses, and the number of targets that are the argmax.

    If gradients are enabled, runs the backward pass of `scale` times the sum. Logits are computed for `LOSS_ROWS` rows
    at a time and never stored for the backward pass.
    """
    loss = 0.0
    hits = 0.0
    gradients = []
    for start in range(0, len(targets), LOSS_ROWS):
        rows = hidden[start : start + LOSS_ROWS].detach().requires_grad_(torch.is_grad_enabled())
        target = targets[start : start + LOSS_ROWS, None]
        logits = model.logits(rows)
        values = logits.detach().float()
        top, likeliest = values.max(-1, keepdim=True)
        hits += int((likeliest == target).sum())
        values.sub_(top)  # in place, also for float32 logits: the backward pass does not read them
        target_logits = values.gather(1, target)
        exponentials = values.exp_()
        total = exponentials.sum(-1, keepdim=True)
        loss += float((total.log() - target_logits).double().sum())
        if torch.is_grad_enabled():
            gradient = exponentials.div_(total)
            gradient.scatter_add_(1, target, torch.full_like(target_logits, -1.0))
            _backward(logits, gradient.mul_(scale).to(logits.dtype))
            assert rows.grad is not None
            gradients.append(rows.grad)
    if gradients:
        _backward(hidden, torch.cat(gradients).to(hidden.dtype))
    return loss, hits


def _backward(output: torch.Tensor, gradient: torch.Tensor) -> None:
    """`torch.autograd.backward(output, gradient)` without its import of sympy (0.3 s and tens of megabytes)."""
    _WithGradient.apply(output, gradient).backward()  # type: ignore[no-untyped-call]


class _WithGradient(torch.autograd.Function):
    """A scalar whose gradient with respect to `output` is the given tensor."""

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
def _checkpointed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Activation checkpointing: blocks store their inputs only, and recompute activations in the backward pass."""
    originals = [getattr(block, "plain_forward", block.forward) for block in blocks]
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
    """The report in the result's metadata."""
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
        "memory": {"base": run.model.nbytes, **run.optimizer.nbytes, **peak.as_dict()},
        "config": settings,
    }
