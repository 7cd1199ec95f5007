"""`loramux search`: finds the smallest LoRA rank that is good enough for a recipe."""

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
from server.cli.local_engine import load_model, local_server, thread_count
from server.cli.options import MODEL, AsJson, path_option, with_settings
from server.cli.output import Progress, error_json, print_json, progress, stdout
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
TOLERANCES = {"bleu": 1.0, "chrf": 1.0}
"""Default tolerance by metric; 0.01 for all others."""
RANKS = "1,2,4,8,16"
TRIALS_FILE, RESULT_FILE = "trials.jsonl", "search.json"


@dataclass(frozen=True)
class Plan:
    """What to search."""

    recipe: Recipe
    ranks: list[int]
    seeds: list[int]
    metric: str
    tolerance: float
    steps: int
    share: float


@dataclass
class Validation:
    """Counts of validation examples: used, also in the training data, with an expected answer that is too long."""

    count: int
    in_training: int
    out_of_reach: int = 0


@with_settings(*MODEL, "state_dir", "log_level")
def search(
    settings: Settings,
    recipe: Annotated[Path, typer.Argument(help="Recipe (.toml); see examples/.")],
    data: Annotated[Path | None, path_option("Folder of the data files. Default: the recipe's folder.")] = None,
    validation: Annotated[
        str | None,
        typer.Option(help="Validation file in the data folder. Default: the recipe's, or a tenth of the data."),
    ] = None,
    ranks: Annotated[str, typer.Option(help="Ranks to try.")] = RANKS,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Try ranks 1, 2, 4, ... up to this many parameters, instead of --ranks.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="accuracy, exact_match, rougeL, bleu, chrf or loss. Default: by task."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds. Each is a separate run.")] = "0",
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a full training. Default: the recipe's.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, max=1e9, help="Maximum distance to the best score. Default: one point of the metric."),
    ] = None,
    share: Annotated[float, typer.Option(min=0, max=1, help="Maximum share of the steps of a full grid.")] = 1 / 3,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of validation examples.")] = 500,
    output: Annotated[
        Path | None,
        path_option("Folder for trials.jsonl, search.json and the plot. Default: search/<recipe name>."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Find the smallest rank that is good enough, by successive halving: train all ranks briefly, the best ones longer.

    Results of an earlier search of the same recipe are replaced. An interrupted search cannot be resumed; trials.jsonl
    has the finished trials.
    """
    import torch

    from server.jobs.rank_trials import examples
    from server.jobs.recipe import packing, read_recipe
    from server.jobs.trainable_model import TrainableModel
    from server.kernels import choose
    from server.tasks.definitions import FixedRoute, parse
    from server.tasks.evaluation import check_metrics, default_metric

    wanted = read_recipe(recipe)
    output = output or Path("search") / wanted.name
    _create_output(output, wanted.name)
    keep_few_kernels()
    torch.set_num_threads(thread_count(settings))
    logs.configure_for_command(settings.log_format, settings.log_level)
    wanted = replace(wanted, validation=validation or wanted.validation)
    task = parse(
        wanted.name, {k: v for k, v in wanted.task.items() if k != "task"}, default_route=FixedRoute(), source="api"
    )
    score_metric = check_metrics([metric])[0] if metric else default_metric(task)
    settings = settings.with_defaults(packing([wanted]))
    base = load_model(settings, choose("reference"), quiet=as_json)
    found = examples(wanted, base, data or recipe.parent, limit)
    plan = Plan(
        recipe=wanted,
        ranks=_ranks(ranks, budget, base, wanted),
        seeds=list(dict.fromkeys(_numbers(seeds, "seeds"))),
        metric=score_metric,
        tolerance=TOLERANCES.get(score_metric, 0.01) if tolerance is None else tolerance,
        steps=steps or wanted.config.steps(len(found.training.examples)),
        share=share,
    )
    for seed in plan.seeds:
        replace(wanted.config, seed=seed)  # raises if the seed is invalid
    model = TrainableModel(base, wanted.config.compute_dtype)
    result, checked = _run(settings, plan, model, found, output, quiet=as_json)
    report = _report(plan, result, found, checked)
    picture, write_error = _write(output, plan, result, report)
    if as_json:
        report["plot"] = None if picture is None else str(picture)
        error = (
            {} if write_error is None else {"error": error_json(write_error, write_error.message, write_error.param)}
        )
        print_json({**report, **error})
    else:
        _print_table(report, picture)
    if write_error is not None:
        logs.fail(write_error.message)


def _ranks(ranks: str, budget: int | None, base: Base, recipe: Recipe) -> list[int]:
    from server.jobs.rank_trials import ranks_within_budget

    return _numbers(ranks, "ranks") if budget is None else ranks_within_budget(base.shapes(), recipe.config, budget)


def _run(
    settings: Settings, plan: Plan, model: TrainableModel, found: Examples, output: Path, *, quiet: bool
) -> tuple[RankSearch, Validation]:
    """Run all trials. Finished trials are appended to the trials file."""
    from server.kernels import choose

    (output / TRIALS_FILE).unlink(missing_ok=True)
    with _report_interrupt(output / TRIALS_FILE), progress("steps", quiet=quiet) as bar:
        if plan.metric == LOSS:
            result = _search(plan, model, found, None, bar, lambda: False, output)
            return result, Validation(len(found.validation.examples), found.validation.among(found.training))
        serving = load_model(settings, choose(settings.kernels, settings.device), quiet=True)
        return asyncio.run(_search_with_engine(settings, serving, plan, model, found, bar, output))


@contextlib.contextmanager
def _report_interrupt(trials: Path) -> Iterator[None]:
    """After Ctrl-C, say where the finished trials are."""
    try:
        yield
    except KeyboardInterrupt:
        if not trials.exists():
            raise
        raise Interrupted(f"interrupted; finished trials are in {trials}") from None


def _search(
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

    def on_event(label: str, event: Event) -> None:
        if event.kind == "step":
            bar(label, event.step, event.steps)

    trials = RankTrials(plan.recipe, model, found, score=score, on_event=on_event, stop=stop)
    return search_rank(
        trials, plan.ranks, max_steps=plan.steps, tolerance=plan.tolerance, seeds=plan.seeds, share=plan.share,
        tell=lambda row: _append_trial(output, plan, row), shown=lambda score: _metric_value(plan, score),
    )  # fmt: skip


async def _search_with_engine(
    settings: Settings, base: Base, plan: Plan, model: TrainableModel, found: Examples, bar: Progress, output: Path
) -> tuple[RankSearch, Validation]:
    """Train on a thread, and score the generated answers with an engine on the event loop."""
    stopped = threading.Event()
    max_rank = max(settings.max_rank, *plan.ranks, *plan.recipe.config.lora_rank_of.values())
    changes = {"library": None, "max_rank": max_rank}
    async with local_server(settings.model_copy(update=changes), base) as server:
        with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
            score, checked = _scorer(server, base, plan, found, Path(scratch), asyncio.get_running_loop())
            threads = thread_count(settings)

            def work() -> RankSearch:
                import torch

                def score_with_threads(weights: LoraWeights) -> float:
                    value = score(weights)
                    torch.set_num_threads(threads)
                    return value

                torch.set_num_threads(threads)  # the engine has set torch to one thread
                return _search(plan, model, found, score_with_threads, bar, stopped.is_set, output)

            try:
                return await asyncio.to_thread(work), checked
            finally:
                stopped.set()


def _scorer(
    server: RunningServer, base: Base, plan: Plan, found: Examples, scratch: Path, loop: asyncio.AbstractEventLoop
) -> tuple[Callable[[LoraWeights], float], Validation]:
    """A function that scores an adapter with the engine, for use on another thread, and the validation counts."""
    from adapters import peft_format
    from adapters.errors import InvalidAdapter, InvalidData
    from server.errors import InvalidRequest
    from server.jobs.rank_trials import count_in_training
    from server.jobs.training_data import answerable
    from server.tasks.evaluation import check_references, evaluate, pairs

    services, name = server.services, plan.recipe.name
    services.tasks.put(name, plan.recipe.task)
    context = services.prompts.limit.context
    records = answerable(found.records, found.encode, context)
    examples = pairs(records)
    if not examples:
        raise InvalidData(
            f"None of the {len(found.records)} validation examples fits into {context} tokens of context."
        )
    check_references([plan.metric], examples)
    checked = Validation(len(examples), count_in_training(found, records))

    def score(weights: LoraWeights) -> float:
        folder = scratch / weights.name
        try:
            peft_format.save(weights, folder, shapes=base.shapes())
        except InvalidAdapter:  # not finite: the training diverged
            return -math.inf
        services.registry.publish_now(weights.name, folder, source="file")
        target = services.resolver.task(name, [(weights.name, 1.0)])
        running = evaluate(services.inference, services.prompts, target, examples, [plan.metric])
        try:
            result = asyncio.run_coroutine_threadsafe(running, loop).result()
        except InvalidRequest as error:
            if error.param == "adapters":  # the logits are not finite
                return -math.inf
            raise
        checked.out_of_reach = result.out_of_reach
        return result.scores[plan.metric].value

    return score, checked


def _numbers(text: str, param: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadSetting(f"--{param} must be integers with commas, such as {RANKS}, not {text!r}.", param) from error


def _metric_value(plan: Plan, score: float) -> float:
    """The value of the metric. Scores are maximized, so a loss is negated."""
    return -score if plan.metric == LOSS else score


def _row(plan: Plan, row: RankResult) -> dict[str, Any]:
    value = None if row.diverged else _metric_value(plan, row.score)
    result = asdict(row) | {plan.metric: value, "diverged": row.diverged}
    del result["score"]
    return result


def _report(plan: Plan, result: RankSearch, found: Examples, checked: Validation) -> dict[str, Any]:
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
        "left_out_as_too_long": found.training.too_long,
        "judges": checked.count,
        "judges_left_out": found.given - checked.count,
        "learned_too": checked.in_training,
        "left_aside": [key for key in ("auto_rank", "prune_to") if getattr(plan.recipe, key)],
        "out_of_reach": checked.out_of_reach,
    }


def _append_trial(output: Path, plan: Plan, row: RankResult) -> None:
    """Save a finished trial. A full disk is reported at the end, when the results are written."""
    with contextlib.suppress(OSError), (output / TRIALS_FILE).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(_row(plan, row)) + "\n")


def _create_output(output: Path, name: str) -> None:
    """Create the folder. Raises BadSetting if that fails, or if it has the results of another recipe."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadSetting(f"{output} cannot be written: {error.strerror}", "output") from error
    try:
        other = json.loads((output / RESULT_FILE).read_text(encoding="utf-8"))["recipe"]
    except (OSError, ValueError, LookupError, TypeError):
        return  # no earlier search
    if other != name:
        raise BadSetting(
            f"{output} has the results of recipe {other}. Choose another --output, or remove the folder.", "output"
        )


def _write(
    output: Path, plan: Plan, result: RankSearch, report: dict[str, Any]
) -> tuple[Path | None, BadSetting | None]:
    """Write search.json and a plot (PNG with matplotlib, otherwise SVG). Returns the plot, or the error."""
    from adapters.rank_search import plot

    title = f"{plan.recipe.name}: {plan.metric} by number of parameters"
    try:
        (output / RESULT_FILE).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is not None:
            from benchmarks.plots import quality

            points = [
                (r.rank, r.parameters, _metric_value(plan, r.score), r.spread, r.steps)
                for r in result.table
                if not r.diverged
            ]
            return quality(output / "search.png", title, plan.metric, points, result.chosen), None
        picture = output / "search.svg"
        rows = [replace(r, score=_metric_value(plan, r.score)) for r in result.table]
        picture.write_text(plot(rows, result.chosen, title), encoding="utf-8")
        return picture, None
    except OSError as error:
        return None, BadSetting(f"{output} cannot be written: {error.strerror}", "output")


def _print_table(report: dict[str, Any], picture: Path | None) -> None:
    from rich import box
    from rich.table import Table

    from server.tasks.evaluation import unreachable_note

    table = Table(box=box.SIMPLE)
    for column in ("rank", "parameters", "steps", report["metric"], "spread of seeds"):
        table.add_column(column, justify="right")
    for row in report["table"]:
        mark = "*" if row["rank"] == report["chosen"] else ""
        cells = (f"{mark}{row['rank']}", f"{row['parameters']:,}", str(row["steps"]))
        scores = ("diverged", "") if row["diverged"] else (f"{row[report['metric']]:.4f}", f"{row['spread']:.4f}")
        table.add_row(*cells, *scores)
    out = stdout()
    out.print(table)
    out.print(f"{report['steps_spent']:,} of {report['steps_of_full_grid']:,} steps of a full grid. {report['advice']}")
    if count := report["left_out_as_too_long"]:
        out.print(f"skipped {count:,} training examples: longer than max_length or the context")
    if count := report["judges_left_out"]:
        out.print(f"skipped {count:,} validation examples: too long, or without input before the answer")
    if count := report["learned_too"]:
        out.print(f"{count:,} validation examples are also in the training data: the scores are too optimistic")
    if report["left_aside"]:
        out.print(f"{' and '.join(report['left_aside'])} of the recipe are ignored: each rank is tried as it is")
    if report["out_of_reach"]:
        out.print(unreachable_note(report["out_of_reach"], report["judges"]))
    if picture is not None:
        out.print(f"{picture}")
