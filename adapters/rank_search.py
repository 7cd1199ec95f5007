"""Rank search by successive halving, and auto-LoRA: ranks per module by the variance of the activations.

Training and scoring are callables of the caller. A score is a number where higher is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from adapters import layers, peft_config, pruning, training
from adapters.checkpoints import FILE, read_adapter, read_checkpoint, write_adapter
from adapters.data import Tokens
from adapters.errors import AdapterError, StoreFailed
from adapters.training import Model, TrainingConfig
from adapters.weights import LoraWeights, LowRank, with_digest

Trial = Callable[[int, int, int], tuple[float, int]]
"""(rank, steps, seed) -> score and number of parameters of the trained adapter. A score that is not finite means that
training diverged."""

MAX_RANK_FACTOR = 2.0
"""The highest rank that `allocate` gives a module, as a multiple of `lora_rank`."""
START = "start"
"""The folder of the initial weights among the checkpoints of a run."""
CALIBRATION_ROWS = 512
"""Rows of each module's inputs that `allocate` uses."""


@dataclass(frozen=True)
class RankResult:
    """The last trial of a rank: mean score over the seeds, and the range between them (`spread`). The score is -inf if
    training diverged with one of them.
    """

    rank: int
    parameters: int
    steps: int
    score: float
    spread: float

    @staticmethod
    def of(rank: int, steps: int, results: Sequence[tuple[float, int]]) -> RankResult:
        """The result of a rank's trials, one per seed."""
        scores = [score for score, _ in results]
        if not all(map(math.isfinite, scores)):
            return RankResult(rank, results[0][1], steps, -math.inf, 0.0)
        return RankResult(rank, results[0][1], steps, fmean(scores), max(scores) - min(scores))

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.score)


@dataclass(frozen=True)
class RankSearch:
    """`chosen` is the smallest rank whose score is within `tolerance` of the best."""

    chosen: int
    table: tuple[RankResult, ...]
    steps_spent: int
    steps_of_full_grid: int
    tolerance: float
    advice: str


def search_rank(
    trial: Trial,
    ranks: Sequence[int],
    *,
    max_steps: int,
    tolerance: float = 0.01,
    seeds: Sequence[int] = (0,),
    share: float = 1.0 / 3.0,
    tell: Callable[[RankResult], None] | None = None,
    shown: Callable[[float], float] = lambda score: score,
) -> RankSearch:
    """Find the smallest rank that is good enough, by successive halving with factor 3 (Jamieson & Talwalkar 2016).

    Every rank trains for `max_steps` / 9. The best ones, at least two, train for `max_steps` / 3. Small ranks learn
    more slowly at first, so ranks within 3 * `tolerance` of the best count as equal after the first rung, and the
    smaller one is preferred. A rank that diverged is dropped.

    Args:
        share: most steps to spend, as a share of the full grid (every rank for `max_steps` with every seed).
        tell: called with the result of each trial.
        shown: converts a score for the advice.

    Raises:
        AdapterError: invalid arguments, too few steps for the share, or all ranks diverged.
    """
    ranks = sorted(set(ranks))
    if not ranks or ranks[0] < 1:
        raise AdapterError(f"ranks to try must be positive, not {list(ranks)}", "ranks")
    if not seeds or max_steps < 1 or not 0.0 < share <= 1.0:
        raise AdapterError("a search needs a seed, at least one step and a share over 0 and up to 1", "max_steps")
    grid = len(ranks) * max_steps * len(seeds)
    afforded = math.floor(3 * len(ranks) * (share - 1 / 9) + 1e-6)
    finalists = min(len(ranks), max(2, afforded))
    planned = len(ranks) * max_steps / 9 + finalists * max_steps / 3
    shrink = min(1.0, share * len(ranks) * max_steps / planned)
    rungs = [
        (keep, max(1, int(length * shrink)))
        for keep, length in ((len(ranks), max_steps / 9), (finalists, max_steps / 3))
    ]
    if sum(keep * steps for keep, steps in rungs) > share * len(ranks) * max_steps + 1e-6:
        raise AdapterError(
            f"{max_steps} steps are too few for {len(ranks)} ranks in {share:.3g} of the full grid's; "
            "give more steps, fewer ranks or a larger share",
            "max_steps",
        )
    rows: dict[int, RankResult] = {}
    left, spent = list(ranks), 0
    for keep, steps in rungs:
        left = [rank for rank in _best(left, rows, keep, 3 * tolerance) if rank not in rows or not rows[rank].diverged]
        for rank in left:
            rows[rank] = RankResult.of(rank, steps, [trial(rank, steps, seed) for seed in seeds])
            spent += steps * len(seeds)
            if tell is not None:
                tell(rows[rank])
        if all(rows[rank].diverged for rank in left):
            ranks_shown = ", ".join(map(str, left))
            raise AdapterError(
                f"training diverges with rank {ranks_shown} in {steps} steps; lower the learning rate", "learning_rate"
            )
    top = max(rows[r].score for r in left)
    chosen = next(r for r in left if rows[r].score >= top - tolerance)
    table = tuple(rows[r] for r in ranks)
    return RankSearch(chosen, table, spent, grid, tolerance, _advice(table, chosen, left, tolerance, shown))


def _best(ranks: list[int], rows: Mapping[int, RankResult], keep: int, tolerance: float) -> list[int]:
    """`keep` ranks, ascending: the best, then ranks as good from the smallest up, then by score."""
    if keep >= len(ranks):
        return ranks
    best = max(ranks, key=lambda r: rows[r].score)
    as_good = [r for r in ranks if r != best and rows[r].score >= rows[best].score - tolerance]
    others = sorted((r for r in ranks if r != best and r not in as_good), key=lambda r: -rows[r].score)
    return sorted([best, *as_good, *others][:keep])


def _advice(
    table: Sequence[RankResult],
    chosen: int,
    finalists: Sequence[int],
    tolerance: float,
    shown: Callable[[float], float],
) -> str:
    diverged = [r.rank for r in table if r.diverged]
    table, finalists = [r for r in table if not r.diverged], [rank for rank in finalists if rank not in diverged]
    row = next(r for r in table if r.rank == chosen)
    largest = table[-1]
    score = f"score {shown(row.score):.4f}"
    lines = [f"Use rank {chosen}: {row.parameters:,} parameters, {score} after {row.steps} steps."]
    if chosen == 1 and len(table) > 1:
        lines.append("It is the smallest possible.")
    elif chosen == table[0].rank and len(table) > 1:
        lines.append("It is the smallest that was tried; a smaller one may be as good.")
    elif chosen == largest.rank and len(table) > 1:
        lines.append("It is the largest that was tried; a larger one may be better.")
    elif len(table) > 1 and largest.parameters:
        lines.append(f"Rank {largest.rank} has {largest.parameters / row.parameters:.1f} times its parameters.")
    if row.spread > tolerance:
        lines.append(f"Its seeds differ by {row.spread:.4f}, more than the tolerance of {tolerance:g}: try more seeds.")
    if diverged:
        lines.append(f"Training diverged with rank {', '.join(map(str, diverged))}; try a lower learning rate.")
    if len(finalists) < len(table):
        lines.append(f"Ranks {', '.join(map(str, finalists))} were compared at the longest trial.")
    return " ".join(lines)


def plot(table: Sequence[RankResult], chosen: int, title: str = "quality against parameters") -> str:
    """An SVG plot of score against parameters (log axis). The chosen rank is filled; diverged ranks are not shown."""
    table = [row for row in table if not row.diverged]
    width, height, left, bottom = 480, 300, 60, 40
    xs = [math.log10(max(1, row.parameters)) for row in table]
    ys = [row.score for row in table]
    x_span, y_span = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    marks = []
    for row, x, y in zip(table, xs, ys, strict=True):
        px = left + (x - min(xs)) / x_span * (width - left - 30)
        py = height - bottom - (y - min(ys)) / y_span * (height - bottom - 40)
        fill = "#2563eb" if row.rank == chosen else "white"
        marks.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5" fill="{fill}" stroke="#2563eb"/>'
            f'<text x="{px:.1f}" y="{py - 10:.1f}" text-anchor="middle">r={row.rank}: {row.score:.3f}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="11">'
        f'<text x="{width / 2}" y="16" text-anchor="middle" font-size="13">{title}</text>'
        f'<path d="M{left} 30V{height - bottom}H{width - 20}" fill="none" stroke="#888"/>'
        f'<text x="{width / 2}" y="{height - 10}" text-anchor="middle">parameters, '
        f"{min(r.parameters for r in table):,} to {max(r.parameters for r in table):,} (log)</text>"
        f"{''.join(marks)}</svg>\n"
    )


def allocate(model: Model, data: Tokens, config: TrainingConfig) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    """Distribute ranks by the variance of each module's inputs (EVA, Paischer et al. 2024).

    The sum of ranks is that of the uniform `config`, or less with few inputs. No module gets more than
    `MAX_RANK_FACTOR` times `lora_rank`; a module that explains little variance gets 0.

    Returns:
        Path -> rank, and path -> orthonormal rows [rank, in] to initialize A with.
    """
    found = layers.linears(model.tree)
    uniform = config.spec().ranks(found)
    with torch.random.fork_rng(devices=[]):  # the randomized SVD must draw the same in a resumed run
        torch.manual_seed(config.seed)
        return _allocated(model, data, config, found, uniform)


def _allocated(
    model: Model,
    data: Tokens,
    config: TrainingConfig,
    found: Mapping[str, nn.Module],
    uniform: Mapping[str, int],
) -> tuple[dict[str, int], dict[str, torch.Tensor]]:
    inputs = _inputs(model, data, {path: found[path] for path in uniform}, config.micro_tokens)
    limit = max(1, int(config.lora_rank * MAX_RANK_FACTOR))
    shares: list[tuple[float, str]] = []
    directions = {}
    for path, x in inputs.items():
        k = min(limit, *x.shape)
        _, s, v = torch.svd_lowrank(x, q=min(k + 8, *x.shape), niter=2)
        directions[path] = v[:, :k].T.contiguous()
        variance = s[:k].square() / x.square().sum()
        shares += [(float(share), path) for share in variance]
    taken = sorted(shares, key=lambda entry: (-entry[0], entry[1]))[: sum(uniform.values())]
    ranks = dict.fromkeys(uniform, 0)
    for _, path in taken:
        ranks[path] += 1
    return ranks, {path: directions[path][:rank] for path, rank in ranks.items() if rank}


def _inputs(model: Model, data: Tokens, found: Mapping[str, nn.Module], micro_tokens: int) -> dict[str, torch.Tensor]:
    """Up to `CALIBRATION_ROWS` rows of each module's inputs, float32, from packs of the first examples."""
    rows: dict[str, list[torch.Tensor]] = {path: [] for path in found}

    def keep(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x: torch.Tensor = args[0].detach().reshape(-1, args[0].shape[-1])
            rows[path].append(x[:: max(1, 4 * len(x) // CALIBRATION_ROWS)].float())

        return hook

    hooks = [module.register_forward_pre_hook(keep(path)) for path, module in found.items()]
    try:
        with torch.no_grad():
            for piece in training.pack(data.examples[: 4 * CALIBRATION_ROWS // 16], micro_tokens)[:4]:
                ids = torch.tensor([token for example in piece for token in example.ids])
                model.hidden(ids, [len(example.ids) for example in piece])
    finally:
        for handle in hooks:
            handle.remove()
    return {path: torch.cat(parts)[:CALIBRATION_ROWS] for path, parts in rows.items()}


def auto_lora(
    model: Model,
    data: Tokens,
    config: TrainingConfig,
    *,
    name: str = "auto",
    widen: float = 2.0,
    recovery: float = 0.1,
    validation: Tokens | None = None,
    on_event: Callable[[training.Event], None] | None = None,
    checkpoints: Path | None = None,
    stop: Callable[[], bool] | None = None,
) -> LoraWeights:
    """Train an adapter with the parameters of a uniform `config`, distributed over the modules where they matter.

    1. `allocate` chooses ranks and initial directions for `widen` times the parameters.
    2. After training, one global threshold over the singular values truncates to the budget and drops modules.
    3. A share `recovery` of the steps trains the truncated adapter.

    Both runs use `checkpoints` and `stop` as `train` does. The metadata contain `pruning`, `auto_lora` and `training`.
    """
    shapes = layers.shapes(model.tree)
    uniform = config.spec().ranks(shapes)
    budget = layers.trainable_parameters(shapes, config.spec())
    wide = replace(
        config,
        lora_rank=max(1, round(config.lora_rank * widen)),
        use_rslora=False,
        lora_alpha=config.lora_alpha * widen,
    )
    common: dict[str, Any] = {"name": name, "validation": validation, "on_event": on_event, "stop": stop}
    folders = (checkpoints / "wide", checkpoints / "narrow") if checkpoints is not None else (None, None)
    state = _ResumeState(checkpoints, f"{training.run_key(model, data, config, None, validation)} {widen!r}")
    cut_now = (cut := state.read("cut", before="narrow")) is None
    if cut is None:
        if (start := state.read(START, before="wide")) is None:
            start = _start(model, data, config, wide, name)
            state.write(START, start, before="wide")
        ranks = dict.fromkeys(uniform, 0) | {path: module.rank for path, module in start.modules.items()}
        first = replace(wide, lora_rank_of={**config.lora_rank_of, **ranks})
        trained = training.train(model, data, first, start, checkpoints=folders[0], **common)
        cut, _ = pruning.truncate_globally(trained, budget=budget)
    elif on_event is not None:
        on_event(training.finished_event(cut.metadata["training"]))
    left = dict.fromkeys(uniform, 0) | {path: module.rank for path, module in cut.modules.items()}
    steps = max(1, round(recovery * config.steps(len(data.examples))))
    after = replace(
        wide, lora_rank_of={**config.lora_rank_of, **left}, max_steps=steps, learning_rate=config.learning_rate / 4
    )
    if cut_now:
        state.drop_other("narrow", training.run_key(model, data, after, cut, validation))
        state.write("cut", cut, before="narrow")
    result = training.train(model, data, after, cut, checkpoints=folders[1], **common)
    dropped = sorted(path for path, rank in left.items() if not rank)
    summary = {"ranks": {p: m.rank for p, m in result.modules.items()}, "dropped": dropped, "budget": budget}
    report = _combined_report(cut.metadata["training"], result.metadata["training"])
    return replace(
        result,
        metadata={**result.metadata, "training": report, "auto_lora": summary, "pruning": cut.metadata["pruning"]},
    )


def _start(model: Model, data: Tokens, config: TrainingConfig, wide: TrainingConfig, name: str) -> LoraWeights:
    """Initial weights of the wide run: the directions of `allocate` as A, zeros as B."""
    shapes = layers.shapes(model.tree)
    _, directions = allocate(model, data, wide)
    scale = peft_config.scale_of(config.lora_alpha, config.lora_rank, config.use_rslora)
    modules = {
        # The norm of a random row of A, so that learning rates keep their meaning.
        path: LowRank(rows / math.sqrt(3.0), torch.zeros(shapes[path][0], len(rows)), scale)
        for path, rows in directions.items()
    }
    return with_digest(name, modules)


class _ResumeState:
    """The initial weights of the two runs of `auto_lora`, stored so that a resumed run starts from the same bits. They
    depend on the number of threads and the processor.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._folder, self._key = folder, key

    def read(self, part: str, before: str) -> LoraWeights | None:
        """The initial weights of the run `before`; None if it has not started. Raises as `read_adapter`."""
        if self._folder is None:
            return None
        try:
            return read_adapter(self._folder / part, self._key, self._folder)
        except AdapterError:  # of another run, or damaged
            if self._started(before):
                raise
            return None

    def write(self, part: str, weights: LoraWeights, before: str) -> None:
        """Store the initial weights of a run that has not started. Raises StoreFailed."""
        if self._folder is not None and not self._started(before):
            write_adapter(self._folder / part, self._key, weights)

    def drop_other(self, run: str, key: str) -> None:
        """Delete a checkpoint that was trained from another cut. Raises StoreFailed for a damaged one."""
        if self._folder is None:
            return
        try:
            read_checkpoint(self._folder / run, key)
        except StoreFailed:
            raise
        except AdapterError:
            (self._folder / run / FILE).unlink()

    def _started(self, run: str) -> bool:
        assert self._folder is not None
        return (self._folder / run / FILE).exists()


def _combined_report(wide: Mapping[str, Any], narrow: Mapping[str, Any]) -> dict[str, Any]:
    """One report for both runs: work is summed, the rest is that of the second run."""
    sums = {key: wide[key] + narrow[key] for key in ("steps", "tokens", "target_tokens", "seconds")}
    before = wide["steps"]
    return {
        **narrow,
        **sums,
        "from": None,
        "tokens_per_second": round(sums["tokens"] / sums["seconds"], 1) if sums["seconds"] else None,
        "evaluations": [{**e, "step": before + e["step"]} for e in narrow["evaluations"]],
        "best_step": before + narrow["best_step"],
        "memory": _max_memory(wide["memory"], narrow["memory"]),
    }


def _max_memory(wide: Mapping[str, int | None], narrow: Mapping[str, int | None]) -> dict[str, int | None]:
    """Memory by kind: the maximum of both runs, relative to the start of the first."""
    most = {key: max(wide[key] or 0, size) if size is not None else None for key, size in narrow.items()}
    peak, first, above = most["peak_process"], wide["peak_process"], wide["peak_above_start"]
    if peak is None or first is None or above is None:
        return {**most, "peak_above_start": None}
    return {**most, "peak_above_start": peak - (first - above)}
