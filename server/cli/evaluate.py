"""`loramux evaluate`: compares candidates for a task on labelled examples, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters.errors import AdapterError
from server.cli import logs
from server.cli.local_engine import load_model, local_server, parse_mix, resolve_target
from server.cli.options import MODEL, AsJson, path_option, with_settings
from server.cli.output import Progress, error_json, print_json, progress, stdout
from server.cli.signals import Interrupted
from server.errors import BadSetting, ServerError
from server.settings import Settings, given_path

if TYPE_CHECKING:
    from adapters.data import Pair
    from server.api.state import Services
    from server.model.loader import Base
    from server.tasks.evaluation import Evaluation


@dataclass(frozen=True)
class Plan:
    """What to evaluate. Without candidates it is the task's own mix, without metrics the task's default metric."""

    task: str
    examples: Sequence[Pair]
    candidates: Sequence[str]
    metrics: Sequence[str]


@with_settings(*MODEL, "state_dir", "library", "max_rank", "max_mix", "max_context", "max_batch", "log_level")
def evaluate(
    settings: Settings,
    data: Annotated[Path, typer.Argument(help='.json or .jsonl file of {"input", "output"}.')],
    task: Annotated[str, typer.Option(help="Task of a shipped adapter or of a candidate folder, or a task.json file.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="NAME, FOLDER, a mix such as NAME=0.7+FOLDER=0.3, or base. Repeatable. Default: the task's."),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="accuracy, exact_match, rougeL, bleu, chrf or loss. Repeatable. Default: by task."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first examples.")] = None,
    answers: Annotated[Path | None, path_option("Write every example with every answer to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate candidates for a task on the same examples. Differences are paired, relative to the first candidate.

    If it is interrupted or fails, the results of the finished candidates are printed.
    """
    from adapters.data import read
    from server.kernels import choose
    from server.tasks.evaluation import check_metrics, check_references, pairs
    from server.tasks.scores import LOSS

    logs.configure_for_command(settings.log_format, settings.log_level)
    examples = pairs(read(data))[:limit]
    metrics = check_metrics(metric) if metric else ()
    check_references(metrics, examples)
    plan = Plan(task, examples, candidate or (), metrics)
    if answers is not None:
        if set(metrics) == {LOSS}:
            raise BadSetting("The loss needs no answers. Omit --answers, or add another metric.", "answers")
        _check_writable(answers)
    base = load_model(settings, choose(settings.kernels, settings.device), quiet=as_json)
    results: dict[str, Evaluation] = {}
    end: Interrupted | ServerError | AdapterError | None = None
    with progress("examples", quiet=as_json) as bar:
        try:
            asyncio.run(_evaluate(settings, base, plan, bar, results))
        except (KeyboardInterrupt, ServerError, AdapterError) as error:
            if not results:
                raise
            finished = f"{len(results)} of {len(set(plan.candidates)) or 1} candidates are finished"
            end = Interrupted(f"interrupted; {finished}") if isinstance(error, KeyboardInterrupt) else error
    report = _report(task, len(examples), results)
    write_error = None if answers is None else _write_answers(answers, plan.examples, results)
    errors = [error for error in (end, write_error) if error is not None]
    message = "; ".join(error.message for error in errors)
    if as_json:
        print_json({**report, "error": error_json(errors[0], message, errors[0].param)} if errors else report)
    else:
        _print_table(report)
    if isinstance(end, Interrupted):
        raise Interrupted(message, in_output=True)
    if errors:
        logs.fail(message)


async def _evaluate(settings: Settings, base: Base, plan: Plan, bar: Progress, results: dict[str, Evaluation]) -> None:
    """Add the evaluation of each candidate to `results`."""
    from server.tasks.evaluation import default_metric
    from server.tasks.evaluation import evaluate as measure

    async with local_server(settings, base) as server:
        services = server.services
        mixes: dict[str, list[tuple[str, float]] | None] = {c: parse_mix(server, c) for c in plan.candidates}
        name = _define_task(services, plan.task)
        for label, mix in (mixes or {f"{name}, current mix": None}).items():
            target = resolve_target(server, name, mix)
            metrics = plan.metrics or (default_metric(target.task),)

            def update(done: int, total: int, label: str = label) -> None:
                bar(label, done, total)

            results[label] = await measure(
                services.inference, services.prompts, target, plan.examples, metrics, on_progress=update
            )


def _define_task(services: Services, task: str) -> str:
    """The name of the task. If `task` is a task.json file, the task is defined first."""
    if services.tasks.find(task) is not None or not (path := given_path(Path(task))).is_file():
        return task
    try:
        body = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadSetting(f"{path} is not a valid task.json: {error}", "task") from error
    if not isinstance(body, dict):
        raise BadSetting(f"{path} is not a valid task.json: it must be a JSON object", "task")
    name = str(body.pop("task", None) or path.resolve().parent.name)
    services.tasks.put(name, body)
    return name


def _report(task: str, examples: int, results: dict[str, Evaluation]) -> dict[str, Any]:
    from server.tasks.mix_key import adapters_json
    from server.tasks.scores import difference

    first = next(iter(results.values()))
    rows = []
    for candidate, evaluation in results.items():
        scores: dict[str, Any] = {}
        for metric, score in evaluation.scores.items():
            scores[metric] = {"value": score.value}
            if evaluation is not first:
                paired = asdict(difference(score, first.scores[metric]))
                scores[metric]["difference"] = paired if examples > 1 else None  # no interval of one example
        rows.append(
            {
                "candidate": candidate,
                "adapters": adapters_json(evaluation.versions),
                "scores": scores,
                "prompt_tokens": evaluation.prompt_tokens,
                "completion_tokens": evaluation.completion_tokens,
                "seconds": round(evaluation.seconds, 3),
            }
        )
    return {"task": task, "examples": examples, "out_of_reach": first.out_of_reach, "candidates": rows}


def _print_table(report: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from server.tasks.evaluation import unreachable_note

    several = len(report["candidates"]) > 1
    table = Table(box=box.SIMPLE)
    table.add_column("candidate", overflow="fold")
    for metric in report["candidates"][0]["scores"]:
        table.add_column(metric, justify="right")
        if several:
            table.add_column("difference", justify="right")
    table.add_column("seconds", justify="right")
    for row in report["candidates"]:
        cells = [row["candidate"]]
        for score in row["scores"].values():
            cells.append(f"{score['value']:.4f}")
            if score.get("difference"):
                mean, high = score["difference"]["mean"], score["difference"]["high"]
                cells.append(f"{mean:+.4f} ± {high - mean:.4f}")
            elif several:
                cells.append("")
        table.add_row(*cells, f"{row['seconds']:.1f}")
    note = "; differences to the first candidate, with 95 % intervals" if several else ""
    stdout().print(f"{report['task']}, {report['examples']} examples{note}")
    stdout().print(table)
    if report["out_of_reach"]:
        stdout().print(unreachable_note(report["out_of_reach"], report["examples"]))


def _check_writable(path: Path) -> None:
    """Raise BadSetting before the evaluation if the file cannot be written after it."""
    try:
        path.open("a").close()
    except OSError as error:
        raise BadSetting(f"{path} cannot be written: {error.strerror}", "answers") from error


def _write_answers(path: Path, examples: Sequence[Pair], results: dict[str, Evaluation]) -> BadSetting | None:
    """Write the answers as JSON lines. Returns the error if that fails."""
    try:
        with path.open("w", encoding="utf-8") as stream:
            for i, example in enumerate(examples):
                answers = {candidate: evaluation.answers[i] for candidate, evaluation in results.items()}
                row = {"input": example.input, "output": example.output, "answers": answers}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        return None
    except OSError as error:
        return BadSetting(f"{path} cannot be written: {error.strerror}", "answers")
