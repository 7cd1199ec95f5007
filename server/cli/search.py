"""`loramux search`: the smallest rank of a recipe that is good enough, with a table, a plot and advice."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import logs
from server.cli.local_engine import open_base, opened, threads_of
from server.cli.options import BASE, AsJson, path_option, with_settings
from server.cli.output import Progress, in_json, out, print_json, progress
from server.cli.signals import Interrupted
from server.errors import BadSetting
from server.settings import Settings, keep_few_kernels

if TYPE_CHECKING:
    from adapters.rank_search import RankResult, RankSearch
    from adapters.training import Event
    from adapters.weights import LoraWeights
    from server.api.startup import RunningServer
    from server.jobs.rank_trials import Examples
    from server.jobs.recipe import Recipe
    from server.jobs.trainable_model import TrainableModel
    from server.model.loader import Base

LOSS = "loss"
TOLERANCE = {"bleu": 1.0, "chrf": 1.0}
"""One point; of the others, which are shares or nats, a hundredth."""
RANKS = "1,2,4,8,16"
TRIALS, FOUND = "trials.jsonl", "search.json"


@dataclass(frozen=True)
class Plan:
    """What is searched for."""

    recipe: Recipe
    ranks: list[int]
    seeds: list[int]
    metric: str
    tolerance: float
    steps: int
    share: float


@dataclass
class Judges:
    """How many examples judge, how many of these are learned, and of how many the expected answer is longer than
    answers may be, once some have been written.
    """

    count: int
    learned_too: int
    out_of_reach: int = 0


@with_settings(*BASE, "state_dir", "log_level")
def search(
    settings: Settings,
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml); see examples/.")],
    data: Annotated[Path | None, path_option("Folder of the data files. [the recipe's own]")] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="File that judges, in the folder of --data. [the recipe's, or a tenth of the data]"),
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks to try.")] = RANKS,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Instead of ranks: 1, 2, 4, ... up to so many parameters.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="accuracy, exact_match, rougeL, bleu, chrf or loss. [what fits the task]")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds; each is a run of its own.")] = "0",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a full training. [the recipe's]")] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, max=1e9, help="How far from the best is as good. [a point of the metric]")
    ] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the full grid's steps, at most this.")] = 1 / 3,
    limit: Annotated[int, typer.Option(min=1, help="Examples that judge, at most.")] = 500,
    output: Annotated[
        Path | None,
        path_option("Folder that gets trials.jsonl, search.json and the plot. [search/<the recipe's name>]"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest rank that is good enough, by successive halving: all ranks for a while, the best for longer.

    What an earlier search of the same recipe has left in the folder is replaced. A search that is stopped begins anew
    when it is started again; trials.jsonl has the trials that were over.
    """
    import torch

    from server.jobs.rank_trials import examples, within
    from server.jobs.recipe import packing, read_recipe
    from server.jobs.trainable_model import TrainableModel
    from server.kernels import choose
    from server.tasks.definitions import FixedRoute, parse
    from server.tasks.evaluation import check_metrics, default_metric

    wanted = read_recipe(recipe)
    output = output or Path("search") / wanted.name
    _make(output, wanted.name)
    keep_few_kernels()
    torch.set_num_threads(threads_of(settings))
    logs.configure_quietly(settings.log_format, settings.log_level)
    wanted = replace(wanted, validation=validation or wanted.validation)
    task = parse(
        wanted.name, {k: v for k, v in wanted.task.items() if k != "task"}, default_route=FixedRoute(), source="api"
    )
    judged_by = check_metrics([metric])[0] if metric else default_metric(task)
    settings = settings.with_defaults(packing([wanted]))
    base = open_base(settings, choose("reference"), quiet=as_json)
    found = examples(wanted, base, data or recipe.parent, limit)
    plan = Plan(
        recipe=wanted,
        ranks=within(base.shapes(), wanted.config, budget) if budget is not None else _numbers(ranks, "ranks"),
        seeds=list(dict.fromkeys(_numbers(seeds, "seeds"))),  # a run that is there twice says nothing more
        metric=judged_by,
        tolerance=TOLERANCE.get(judged_by, 0.01) if tolerance is None else tolerance,
        steps=steps or wanted.config.steps(len(found.learned.examples)),
        share=share,
    )
    for seed in plan.seeds:
        replace(wanted.config, seed=seed)  # one that is none is told before the first trial
    model = TrainableModel(base, wanted.config.compute_dtype)
    result, judges = _run(settings, plan, model, found, output, quiet=as_json)
    told = _told(plan, result, found, judges)
    picture, lost = _write(output, plan, result, told)
    if as_json:
        told["plot"] = None if picture is None else str(picture)
        print_json(told if lost is None else {**told, "error": in_json(lost, lost.message, lost.param)})
    else:
        _show(told, picture)
    if lost is not None:  # what was found is not
        logs.fail(lost.message)


def _run(
    settings: Settings, plan: Plan, model: TrainableModel, found: Examples, output: Path, *, quiet: bool
) -> tuple[RankSearch, Judges]:
    """All trials, kept in the output as they end, and what judged them."""
    from server.kernels import choose

    (output / TRIALS).unlink(missing_ok=True)  # of a search before
    with _told_where(output / TRIALS), progress("steps", quiet=quiet) as bar:
        if plan.metric == LOSS:
            result = _searched(plan, model, found, None, bar, lambda: False, output)
            return result, Judges(len(found.judged.examples), found.judged.among(found.learned))
        serving = open_base(settings, choose(settings.kernels, settings.device), quiet=True)
        return asyncio.run(_with_engine(settings, serving, plan, model, found, bar, output))


@contextlib.contextmanager
def _told_where(trials: Path) -> Iterator[None]:
    """Who stops a search is told where that lies which it has found."""
    try:
        yield
    except KeyboardInterrupt:
        if not trials.exists():
            raise
        raise Interrupted(f"interrupted, and what was found is in {trials}") from None


def _searched(
    plan: Plan,
    model: TrainableModel,
    found: Examples,
    score: Callable[[LoraWeights], float] | None,
    bar: Progress,
    stop: Callable[[], bool],
    output: Path,
) -> RankSearch:
    from adapters.rank_search import search_rank
    from server.jobs.rank_trials import RankTrials

    def heard(label: str, event: Event) -> None:
        if event.kind == "step":
            bar(label, event.step, event.steps)

    trials = RankTrials(plan.recipe, model, found, score=score, on_event=heard, stop=stop)
    return search_rank(
        trials, plan.ranks, max_steps=plan.steps, tolerance=plan.tolerance, seeds=plan.seeds, share=plan.share,
        tell=lambda row: _keep(output, plan, row), shown=lambda score: _value(plan, score),
    )  # fmt: skip


async def _with_engine(
    settings: Settings, base: Base, plan: Plan, model: TrainableModel, found: Examples, bar: Progress, output: Path
) -> tuple[RankSearch, Judges]:
    """The search with answers judged as they are served: trained on a thread, evaluated by an engine beside it."""
    stopped = threading.Event()
    most = max(settings.max_rank, *plan.ranks, *plan.recipe.config.lora_rank_of.values())
    ranked = {"library": None, "max_rank": most}
    async with opened(settings.model_copy(update=ranked), base) as house:
        with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
            score, judges = _scorer(house, base, plan, found, Path(scratch), asyncio.get_running_loop())
            threads = threads_of(settings)

            def work() -> RankSearch:
                import torch

                def scored(weights: LoraWeights) -> float:
                    value = score(weights)
                    torch.set_num_threads(threads)
                    return value

                torch.set_num_threads(threads)  # the engine has left this process's threads of torch with one
                return _searched(plan, model, found, scored, bar, stopped.is_set, output)

            try:
                return await asyncio.to_thread(work), judges
            finally:
                stopped.set()


def _scorer(
    house: RunningServer, base: Base, plan: Plan, found: Examples, scratch: Path, loop: asyncio.AbstractEventLoop
) -> tuple[Callable[[LoraWeights], float], Judges]:
    """A function for another thread: an adapter's score by the engine. And what it is judged by."""
    from adapters import peft_format
    from adapters.errors import InvalidAdapter, InvalidData
    from server.errors import InvalidRequest
    from server.jobs.fine_tune import answerable
    from server.jobs.rank_trials import learned_too
    from server.tasks.evaluation import check_references, evaluate, pairs

    parts, name = house.services, plan.recipe.name
    parts.tasks.put(name, plan.recipe.task)
    room = parts.prompts.limit.context
    judging = answerable(found.judges, found.encode, room)
    examples = pairs(judging)
    if not examples:
        raise InvalidData(
            f"none of the {len(found.judges)} examples that judge fits into {room} tokens that the engine takes"
        )
    check_references([plan.metric], examples)
    judges = Judges(len(examples), learned_too(found, judging))

    def score(weights: LoraWeights) -> float:
        folder = scratch / weights.name
        try:
            peft_format.save(weights, folder, shapes=base.shapes())
        except InvalidAdapter:  # values that are not finite
            return -math.inf
        parts.registry.publish_now(weights.name, folder, source="file")
        target = parts.resolver.task(name, [(weights.name, 1.0)])
        asked = evaluate(parts.inference, parts.prompts, target, examples, [plan.metric])
        try:
            result = asyncio.run_coroutine_threadsafe(asked, loop).result()
        except InvalidRequest as error:
            if error.param == "adapters":  # with which the numbers overflow
                return -math.inf
            raise
        judges.out_of_reach = result.out_of_reach
        return result.scores[plan.metric].value

    return score, judges


def _numbers(text: str, what: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadSetting(f"{what} are whole numbers with commas between, as in {RANKS}, not {text!r}", what) from error


def _value(plan: Plan, score: float) -> float:
    """As people know the metric: a search's scores are better when larger, a loss when smaller."""
    return -score if plan.metric == LOSS else score


def _row(plan: Plan, row: RankResult) -> dict[str, Any]:
    told = asdict(row) | {plan.metric: None if row.diverged else _value(plan, row.score), "diverged": row.diverged}
    del told["score"]
    return told


def _told(plan: Plan, result: RankSearch, found: Examples, judges: Judges) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.name,
        "metric": plan.metric,
        "chosen": result.chosen,
        "tolerance": plan.tolerance,
        "seeds": plan.seeds,
        "steps_spent": result.steps_spent,
        "steps_of_full_grid": result.steps_of_full_grid,
        "table": [_row(plan, r) for r in result.table],
        "advice": result.advice,
        "left_out_as_too_long": found.learned.too_long,
        "judges": judges.count,
        "judges_left_out": found.given - judges.count,
        "learned_too": judges.learned_too,
        "left_aside": [key for key in ("auto_rank", "prune_to") if getattr(plan.recipe, key)],
        "out_of_reach": judges.out_of_reach,
    }


def _keep(output: Path, plan: Plan, row: RankResult) -> None:
    """What a trial has found, for whoever stops the search before its end. A disk that is full is told at the end."""
    with contextlib.suppress(OSError), (output / TRIALS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(_row(plan, row)) + "\n")


def _make(output: Path, name: str) -> None:
    """Raises BadSetting for a folder that cannot be, or that has what was found of a recipe of another name, before
    the trials whose outcome it would get."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"{output} cannot be written: {error.strerror}", "output") from error
    try:
        other = json.loads((output / FOUND).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # there is none
    if other != name:
        raise BadSetting(
            f"{output} has the search of {other}, which {name}'s would replace: choose another --output, or remove it",
            "output",
        )


def _write(output: Path, plan: Plan, result: RankSearch, told: dict[str, Any]) -> tuple[Path | None, BadSetting | None]:
    """search.json and the plot: a PNG where matplotlib is installed, else an SVG. The plot's path, or why there is
    none."""
    from adapters.rank_search import plot

    title = f"{plan.recipe.name}: {plan.metric} against parameters"
    try:
        (output / FOUND).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            from benchmarks.plots import quality

            points = [
                (r.rank, r.parameters, _value(plan, r.score), r.spread, r.steps) for r in result.table if not r.diverged
            ]
            return quality(output / "search.png", title, plan.metric, points, result.chosen), None
        picture, shown = output / "search.svg", [replace(r, score=_value(plan, r.score)) for r in result.table]
        picture.write_text(plot(shown, result.chosen, title), encoding="utf-8")
        return picture, None
    except OSError as error:
        return None, BadSetting(f"{output} cannot be written: {error.strerror}", "output")


def _show(told: dict[str, Any], picture: Path | None) -> None:
    from rich import box
    from rich.table import Table

    from server.tasks.evaluation import unreachable_note

    table = Table(box=box.SIMPLE)
    for column in ("rank", "parameters", "steps", told["metric"], "between seeds"):
        table.add_column(column, justify="right")
    for row in told["table"]:
        mark = "*" if row["rank"] == told["chosen"] else ""
        cells = (f"{mark}{row['rank']}", f"{row['parameters']:,}", str(row["steps"]))
        found = ("diverged", "") if row["diverged"] else (f"{row[told['metric']]:.4f}", f"{row['spread']:.4f}")
        table.add_row(*cells, *found)
    out().print(table)
    out().print(f"{told['steps_spent']:,} of the full grid's {told['steps_of_full_grid']:,} steps. {told['advice']}")
    if learned := told["left_out_as_too_long"]:
        out().print(f"{learned:,} examples are longer than max_length, or than the base's context, and were left out")
    if judges := told["judges_left_out"]:
        out().print(
            f"{judges:,} examples that would judge were left out: they, or their answers, are longer than may be here, "
            "or have nothing before the answer"
        )
    if known := told["learned_too"]:
        out().print(f"{known:,} of the examples that judge were learned too: the ranks seem better than they are")
    if told["left_aside"]:
        out().print(f"the recipe's {' and '.join(told['left_aside'])} had no part in it: each rank is tried as it is")
    if told["out_of_reach"]:
        out().print(unreachable_note(told["out_of_reach"], told["judges"]))
    if picture is not None:
        out().print(f"{picture}")
