"""`loramux train`: trains one adapter per recipe on a resident base model."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import logs
from server.cli.local_engine import load_model, thread_count
from server.cli.options import MODEL, AsJson, path_option, with_settings
from server.cli.output import error_json, format_size, print_error, print_json, progress, stdout
from server.cli.signals import REPEAT_WINDOW, handle_signals
from server.errors import NoCapacity, ServerError, out_of_memory_message
from server.settings import Settings, keep_few_kernels

if TYPE_CHECKING:
    from adapters.errors import AdapterError
    from adapters.training import Event
    from adapters.weights import LoraWeights
    from server.jobs.recipe import Recipe
    from server.kernels import Backend
    from server.model.loader import Base


@with_settings(
    *(name for name in MODEL if name != "kernels"),
    *("state_dir", "max_rank"),
    texts={"max_rank": "highest rank that the server will accept"},
)
def train(
    settings: Settings,
    recipes: Annotated[list[Path], typer.Argument(help="Recipes (.toml); see examples/.")],
    data: Annotated[Path | None, path_option("Folder of the data files. Default: the recipe's folder.")] = None,
    output: Annotated[Path, path_option("Folder that receives one adapter folder per recipe.")] = Path("trained"),
    rank: Annotated[int | None, typer.Option(min=1, help="Override lora_rank.")] = None,
    auto_rank: Annotated[
        bool, typer.Option("--auto-rank", help="Distribute the parameters of this rank over the modules by need.")
    ] = False,
    prune_to: Annotated[int | None, typer.Option(min=1, help="Reduce the result to this rank.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Override max_steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Override seed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train one adapter per recipe on the quantized base. Run it again to resume.

    An adapter that is finished, with the same recipe, data and base, is skipped. If a recipe fails, the others are
    still trained and the exit status is 1; a full disk ends the command. Ctrl-C stops after the current update and
    loses nothing; a second Ctrl-C stops at once. With --json, each finished or failed recipe is one JSON object.
    """
    import torch

    from adapters.errors import AdapterError
    from server.jobs.recipe import check_rank, packing
    from server.jobs.train_recipe import finished, prepare

    keep_few_kernels()
    torch.set_num_threads(thread_count(settings))
    overrides = {"lora_rank": rank, "max_steps": steps, "seed": seed}
    jobs = _read_jobs(recipes, data, overrides, auto_rank, prune_to)
    settings = settings.with_defaults(packing([recipe for recipe, _ in jobs]))
    base = load_model(settings, training_backend(settings.device), quiet=as_json)
    done = {}
    for recipe, folder in jobs:
        with _errors_name(recipe):
            done[recipe.name] = finished(recipe, base, output, data_dir=folder)
    remaining = [(recipe, folder) for recipe, folder in jobs if done[recipe.name] is None]
    for recipe, _ in remaining:
        check_rank(recipe, settings.max_rank)
    for recipe, folder in remaining if len(remaining) > 1 else ():
        with _errors_name(recipe):
            prepare(recipe, base, folder)  # report invalid data of every recipe before training the first
    failed = []
    with _stop_requested() as stop:
        for recipe, folder in jobs:
            existing = done[recipe.name]
            if existing is not None:
                _print_result(existing, output, as_json, skipped=True)
                continue
            try:
                weights = _train(recipe, base, output, folder, stop, quiet=as_json)
            except (AdapterError, ServerError) as error:
                if len(jobs) == 1 or _ends_all(error):
                    raise
                failed.append(recipe.name)
                _print_failure(recipe, error, as_json)
            else:
                _print_result(weights, output, as_json, skipped=False)
    if failed:
        logs.fail(f"{len(failed)} of {len(jobs)} recipes failed: {', '.join(failed)}")


def _read_jobs(
    paths: list[Path], data: Path | None, overrides: dict[str, int | None], auto_rank: bool, prune_to: int | None
) -> list[tuple[Recipe, Path]]:
    """Recipes with the options of the command line, each with its data folder."""
    from server.jobs.recipe import check_prune_to, check_validation, read_recipes

    changes: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    jobs = []
    for path, recipe in zip(paths, read_recipes(paths), strict=True):
        recipe = replace(
            recipe,
            config=replace(recipe.config, **changes),
            auto_rank=auto_rank or recipe.auto_rank,
            prune_to=prune_to or recipe.prune_to,
        )
        check_prune_to(recipe)
        check_validation(recipe)
        jobs.append((recipe, data or path.parent))
    return jobs


def _train(
    recipe: Recipe, base: Base, output: Path, folder: Path, stop: Callable[[], bool], quiet: bool
) -> LoraWeights:
    from server.jobs.train_recipe import run

    with progress("parameters", quiet=quiet) as bar, _errors_name(recipe):

        def on_event(event: Event) -> None:
            if event.kind == "step":
                bar(recipe.name, event.step, event.steps)

        return run(recipe, base, output, data_dir=folder, on_event=on_event, stop=stop)


def _ends_all(error: AdapterError | ServerError) -> bool:
    """Whether the remaining recipes are not tried: the user stopped the command, or the disk is full."""
    from adapters.errors import StoreFailed, TrainingStopped

    cause = error.__cause__  # the error before `_errors_name`
    disk_failed = isinstance(cause, StoreFailed) and isinstance(cause.__context__, OSError)
    return disk_failed or isinstance(error, TrainingStopped)


@contextlib.contextmanager
def _errors_name(recipe: Recipe) -> Iterator[None]:
    """Errors in the context start with the name of the recipe."""
    from adapters.errors import AdapterError, TrainingStopped
    from server.engine.backends.cuda.memory import is_out_of_memory

    try:
        yield
    except (AdapterError, ServerError) as error:
        note = "; run the same command again to resume" if isinstance(error, TrainingStopped) else ""
        raise type(error)(f"{recipe.name}: {error.message}{note}", error.param) from error
    except (MemoryError, RuntimeError) as error:
        message = out_of_memory_message(error)
        if message is None and is_out_of_memory(error):
            message = f"the GPU has too little memory: {error}"
        if message is None:
            raise
        advice = "Lower micro_tokens in the recipe, or set activation_checkpointing = true."
        raise NoCapacity(f"{recipe.name}: {message}. {advice}") from error


@contextlib.contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether SIGINT or SIGTERM arrived. The second signal ends the process."""
    requested, since = False, 0.0

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested, since
        if not requested:
            requested, since = True, time.monotonic()
        elif time.monotonic() - since > REPEAT_WINDOW:
            restore()
            signal.raise_signal(number)

    with handle_signals(request, signal.SIGINT, signal.SIGTERM) as restore:
        yield lambda: requested


def _print_failure(recipe: Recipe, error: AdapterError | ServerError, as_json: bool) -> None:
    if as_json:
        print_json({"name": recipe.name, "error": error_json(error, error.message, error.param)})
    print_error(error.message)


def _print_result(weights: LoraWeights, output: Path, as_json: bool, *, skipped: bool) -> None:
    """Print the adapter and how it was trained, by this command or an earlier one."""
    training, path = weights.metadata["training"], output / weights.name
    if as_json:
        head = {"name": weights.name, "path": str(path), "version": weights.version.label, "skipped": skipped}
        print_json({**head, **training})
        return
    if skipped:
        stdout().print(f"{path} is already finished. To train it again, choose another --output or --seed.")
        return
    peak = training["memory"]["peak_process"]
    stdout().print(
        f"{path}: {training['steps']} steps, {training['tokens_per_second'] or 0:,.0f} tokens/s"
        + (f", peak memory {format_size(peak)}" if peak else "")
    )
    if pruned := training.get("pruned"):
        loss = "" if pruned["loss"] is None else f", validation loss {pruned['loss']:.4f}"
        stdout().print(f"pruned to rank {pruned['rank']}, relative error {pruned['error']:.4f}{loss}")
    if overlap := training.get("learned_too"):
        stdout().print(f"{overlap:,} validation examples are also in the training data: the score is too optimistic")
    long, long_validation = training["left_out_as_too_long"], training["judges_left_out"]
    total = f"{long + training['samples']:,} training examples"
    for skipped_count, examples in ((long, total), (long_validation, "validation examples")):
        if skipped_count:
            stdout().print(f"skipped {skipped_count:,} of the {examples}: longer than max_length or the context")


def training_backend(device: str) -> Backend:
    """The kernels for training: CUDA if a GPU is used, otherwise the exact reference kernels."""
    from server.kernels import choose, cuda

    on_gpu = device == "cuda" or (device == "auto" and cuda.unavailable() is None)
    return choose("cuda") if on_gpu else choose("reference")
