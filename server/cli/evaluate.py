"""`loramux evaluate`: candidates for a task against examples with known answers, without a server."""

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
from server.cli.local_engine import choice_of, open_base, opened, target_of
from server.cli.options import BASE, AsJson, path_option, with_settings
from server.cli.output import Progress, in_json, out, print_json, progress
from server.cli.signals import Interrupted
from server.errors import BadSetting, ServerError
from server.settings import Settings, given_path

if TYPE_CHECKING:
    from adapters.data import Pair
    from server.api.state import Services
    from server.model.loader import Base
    from server.tasks.evaluation import Evaluation


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated. No candidates is the task's own; no metrics is what fits the task."""

    task: str
    examples: Sequence[Pair]
    candidates: Sequence[str]
    metrics: Sequence[str]


@with_settings(*BASE, "state_dir", "library", "max_rank", "max_mix", "max_context", "max_batch", "log_level")
def evaluate(
    settings: Settings,
    data: Annotated[Path, typer.Argument(help='.json or .jsonl of {"input", "output"}.')],
    task: Annotated[str, typer.Option(help="Task of a shipped adapter or of one given here, or a task.json.")],
    candidate: Annotated[
        list[str] | None,
        typer.Option(help="NAME, FOLDER, a mix as NAME=0.7+FOLDER=0.3, or base; again for more. [the task's own]"),
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="accuracy, exact_match, rougeL, bleu, chrf or loss; again for more. [what fits the task]"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only so many of the first examples.")] = None,
    answers: Annotated[Path | None, path_option("File that gets every example with every answer.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure one or several candidates for a task on the same examples; differences are to the first, paired.

    Ctrl-C, or an error on the way, ends it with what is done: the candidates before that.
    """
    from adapters.data import read
    from server.kernels import choose
    from server.tasks.evaluation import LOSS, check_metrics, check_references, pairs

    logs.configure_quietly(settings.log_format, settings.log_level)
    examples = pairs(read(data))[:limit]
    metrics = check_metrics(metric) if metric else ()
    check_references(metrics, examples)
    asked = Asked(task, examples, candidate or (), metrics)
    if answers is not None:
        if set(metrics) == {LOSS}:
            raise BadSetting("the loss is taken without answers; leave --answers out, or add a metric", "answers")
        _writable(answers)
    base = open_base(settings, choose(settings.kernels, settings.device), quiet=as_json)
    found: dict[str, Evaluation] = {}
    ended: Interrupted | ServerError | AdapterError | None = None
    with progress("examples", quiet=as_json) as bar:
        try:
            asyncio.run(_evaluate(settings, base, asked, bar, found))
        except (KeyboardInterrupt, ServerError, AdapterError) as error:
            if not found:
                raise
            done = f"{len(found)} of {len(set(asked.candidates)) or 1} candidates are done"
            ended = Interrupted(f"interrupted; {done}") if isinstance(error, KeyboardInterrupt) else error
    told = _told(task, len(examples), found)
    lost = None if answers is None else _write_answers(answers, asked.examples, found)
    faults = [fault for fault in (ended, lost) if fault is not None]
    message = "; ".join(fault.message for fault in faults)
    if as_json:
        print_json({**told, "error": in_json(faults[0], message, faults[0].param)} if faults else told)
    else:
        _show(told)
    if isinstance(ended, Interrupted):
        raise Interrupted(message, told=True)
    if faults:  # the scores are not lost
        logs.fail(message)


async def _evaluate(settings: Settings, base: Base, asked: Asked, bar: Progress, found: dict[str, Evaluation]) -> None:
    """Fill `found`, candidate -> what came of it, in the order in which they were asked for."""
    from server.tasks.evaluation import default_metric
    from server.tasks.evaluation import evaluate as measure

    async with opened(settings, base) as house:
        parts = house.services
        choices: dict[str, list[tuple[str, float]] | None] = {c: choice_of(house, c) for c in asked.candidates}
        name = _task(parts, asked.task)
        for label, choice in (choices or {f"{name}, as it is": None}).items():
            target = target_of(house, name, choice)
            metrics = asked.metrics or (default_metric(target.task),)

            def tell(done: int, total: int, label: str = label) -> None:
                bar(label, done, total)

            found[label] = await measure(parts.inference, parts.prompts, target, asked.examples, metrics, tell=tell)


def _task(parts: Services, task: str) -> str:
    """The task's name; one that is a file is defined first."""
    if parts.tasks.find(task) is not None or not (path := given_path(Path(task))).is_file():
        return task
    try:
        body = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise BadSetting(f"{path}: no task.json ({error})", "task") from error
    if not isinstance(body, dict):
        raise BadSetting(f"{path}: a task is an object", "task")
    name = str(body.pop("task", None) or path.resolve().parent.name)
    parts.tasks.put(name, body)
    return name


def _told(task: str, examples: int, found: dict[str, Evaluation]) -> dict[str, Any]:
    from server.tasks.evaluation import difference
    from server.tasks.mix_key import adapters_json

    first = next(iter(found.values()))
    rows = []
    for candidate, evaluation in found.items():
        measured: dict[str, Any] = {}
        for metric, score in evaluation.scores.items():
            measured[metric] = {"value": score.value}
            if evaluation is not first:
                apart = asdict(difference(score, first.scores[metric]))
                measured[metric]["difference"] = apart if examples > 1 else None  # one example has no interval
        rows.append(
            {
                "candidate": candidate,
                "adapters": adapters_json(evaluation.versions),
                "scores": measured,
                "prompt_tokens": evaluation.prompt_tokens,
                "completion_tokens": evaluation.completion_tokens,
                "seconds": round(evaluation.seconds, 3),
            }
        )
    return {"task": task, "examples": examples, "out_of_reach": first.out_of_reach, "candidates": rows}


def _show(told: dict[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    from server.tasks.evaluation import unreachable_note

    table = Table(box=box.SIMPLE)
    table.add_column("candidate", overflow="fold")
    for metric in told["candidates"][0]["scores"]:
        table.add_column(metric, justify="right")
        if len(told["candidates"]) > 1:
            table.add_column("to the first", justify="right")
    table.add_column("seconds", justify="right")
    for row in told["candidates"]:
        cells = [row["candidate"]]
        for score in row["scores"].values():
            cells.append(f"{score['value']:.4f}")
            if score.get("difference"):
                mean, high = score["difference"]["mean"], score["difference"]["high"]
                cells.append(f"{mean:+.4f} ± {high - mean:.4f}")
            elif len(told["candidates"]) > 1:
                cells.append("")
        table.add_row(*cells, f"{row['seconds']:.1f}")
    several = "; differences are those of the scores, with 95 % intervals" if len(told["candidates"]) > 1 else ""
    out().print(f"{told['task']}, {told['examples']} examples{several}")
    out().print(table)
    if told["out_of_reach"]:
        out().print(unreachable_note(told["out_of_reach"], told["examples"]))


def _writable(path: Path) -> None:
    """Raises BadSetting now for a file that would be refused when hours of answers are there."""
    try:
        path.open("a").close()
    except OSError as error:
        raise BadSetting(f"{path} cannot be written: {error.strerror}", "answers") from error


def _write_answers(path: Path, examples: Sequence[Pair], found: dict[str, Evaluation]) -> BadSetting | None:
    """Why they cannot be written, if they cannot."""
    try:
        with path.open("w", encoding="utf-8") as stream:
            for i, example in enumerate(examples):
                said = {candidate: evaluation.answers[i] for candidate, evaluation in found.items()}
                row = {"input": example.input, "output": example.output, "answers": said}
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        return None
    except OSError as error:
        return BadSetting(f"{path} cannot be written: {error.strerror}", "answers")
