"""`loramux train`: recipes to adapters, several over one resident base."""

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
from server.cli.local_engine import open_base, threads_of
from server.cli.options import BASE, AsJson, path_option, with_settings
from server.cli.output import in_json, out, print_json, progress, say_error, size
from server.cli.signals import SAME_SIGNAL, heard
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
    *(name for name in BASE if name != "kernels"),
    *("state_dir", "max_rank"),
    texts={"max_rank": "highest rank that the server takes which the adapter is for"},
)
def train(
    settings: Settings,
    recipes: Annotated[list[Path], typer.Argument(help="Recipes (.toml); see examples/.")],
    data: Annotated[Path | None, path_option("Folder of the data files. [the recipe's own]")] = None,
    output: Annotated[Path, path_option("Folder that gets one adapter folder for each.")] = Path("trained"),
    rank: Annotated[int | None, typer.Option(min=1, help="Instead of the recipes' lora_rank.")] = None,
    auto_rank: Annotated[
        bool, typer.Option("--auto-rank", help="Spend the parameters of that rank on the modules that need them.")
    ] = False,
    prune_to: Annotated[int | None, typer.Option(min=1, help="Cut to this rank at the end.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipes' max_steps.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the recipes' seed.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train one adapter for each recipe, on the 4-bit base that serves. Started again, it goes on where it was.

    What is finished, by the very same recipe, data and base, is skipped. One that fails is told, the others are trained
    all the same, and the status is 1 then; a disk that is full ends it. Ctrl-C stops it after the update that runs, and
    nothing is lost; a second one ends it at once. With --json, each recipe that is done is a JSON object, and of
    several one that fails one with its name and its error: one line, on a terminal several.
    """
    import torch

    from adapters.errors import AdapterError
    from server.jobs.recipe import check_prune_to, check_rank, check_validation, packing, read_recipes
    from server.jobs.train_recipe import finished, prepare

    keep_few_kernels()
    torch.set_num_threads(threads_of(settings))
    given = {"lora_rank": rank, "max_steps": steps, "seed": seed}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    wanted = []
    for path, recipe in zip(recipes, read_recipes(recipes), strict=True):
        recipe = replace(
            recipe,
            config=replace(recipe.config, **changed),
            auto_rank=auto_rank or recipe.auto_rank,
            prune_to=prune_to or recipe.prune_to,
        )
        check_prune_to(recipe)
        check_validation(recipe)
        wanted.append((recipe, data or path.parent))
    settings = settings.with_defaults(packing([recipe for recipe, _ in wanted]))
    base = open_base(settings, training_backend(settings.device), quiet=as_json)
    done = {}
    for recipe, folder in wanted:
        with _about(recipe):
            done[recipe.name] = finished(recipe, base, output, data_dir=folder)
    to_train = [(recipe, folder) for recipe, folder in wanted if done[recipe.name] is None]
    for recipe, _ in to_train:
        check_rank(recipe, settings.max_rank)
    for recipe, folder in to_train if len(to_train) > 1 else ():
        with _about(recipe):
            prepare(recipe, base, folder)  # what is wrong with the last one's data is said before the first one's hours
    failed = []
    with _asked_to_stop() as stop:
        for recipe, folder in wanted:
            found = done[recipe.name]
            if found is not None:
                _tell(found, output, as_json, skipped=True)
                continue
            try:
                weights = _trained(recipe, base, output, folder, stop, quiet=as_json)
            except (AdapterError, ServerError) as error:
                if len(wanted) == 1 or _ends_all(error):
                    raise
                failed.append(recipe.name)
                _tell_failure(recipe, error, as_json)
            else:
                _tell(weights, output, as_json, skipped=False)
    if failed:
        logs.fail(f"{len(failed)} of {len(wanted)} recipes failed: {', '.join(failed)}")


def _trained(
    recipe: Recipe, base: Base, output: Path, folder: Path, stop: Callable[[], bool], quiet: bool
) -> LoraWeights:
    from server.jobs.train_recipe import run

    with progress("parameters", quiet=quiet) as bar, _about(recipe):

        def tell(event: Event) -> None:
            if event.kind == "step":
                bar(recipe.name, event.step, event.steps)

        return run(recipe, base, output, data_dir=folder, on_event=tell, stop=stop)


def _ends_all(error: AdapterError | ServerError) -> bool:
    """Whether the recipes that come after need not be tried: somebody wants an end, or the disk refuses."""
    from adapters.errors import StoreFailed, TrainingStopped

    cause = error.__cause__  # as it was before it was said which recipe it is about
    refused = isinstance(cause, StoreFailed) and isinstance(cause.__context__, OSError)
    return refused or isinstance(error, TrainingStopped)


@contextlib.contextmanager
def _about(recipe: Recipe) -> Iterator[None]:
    """Errors within say which recipe they are about: there may be many."""
    from adapters.errors import AdapterError, TrainingStopped
    from server.engine.backends.cuda.memory import lacks_memory

    try:
        yield
    except (AdapterError, ServerError) as error:
        after = "; the same command goes on from there" if isinstance(error, TrainingStopped) else ""
        raise type(error)(f"{recipe.name}: {error.message}{after}", error.param) from error
    except (MemoryError, RuntimeError) as error:
        words = out_of_memory_message(error)
        if words is None and lacks_memory(error):
            words = f"the GPU has too little memory: {error}"
        if words is None:
            raise
        less = "a smaller micro_tokens in its recipe takes less, and so does activation_checkpointing = true"
        raise NoCapacity(f"{recipe.name}: {words}; {less}") from error


@contextlib.contextmanager
def _asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Whether the process was asked to end, by Ctrl-C or as the system does. Asked again, it does at once."""
    asked, since = False, 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked, since
        if not asked:
            asked, since = True, time.monotonic()
        elif time.monotonic() - since > SAME_SIGNAL:
            give_back()
            signal.raise_signal(number)

    with heard(ask, signal.SIGINT, signal.SIGTERM) as give_back:
        yield lambda: asked


def _tell_failure(recipe: Recipe, error: AdapterError | ServerError, as_json: bool) -> None:
    if as_json:
        print_json({"name": recipe.name, "error": in_json(error, error.message, error.param)})
    say_error(error.message)


def _tell(weights: LoraWeights, output: Path, as_json: bool, *, skipped: bool) -> None:
    """What lies in the output now, and how it was made, if not by this command then by an earlier one."""
    made, path = weights.metadata["training"], output / weights.name
    if as_json:
        told = {"name": weights.name, "path": str(path), "version": weights.version.label, "skipped": skipped}
        print_json({**told, **made})
    elif skipped:
        out().print(
            f"{path} is finished, by the same recipe, data and base; another --output or --seed has it trained again"
        )
    else:
        peak = made["memory"]["peak_process"]
        out().print(
            f"{path}: {made['steps']} steps, {made['tokens_per_second'] or 0:,.0f} tokens/s"
            + (f", peak {size(peak)}" if peak else "")
        )
        if pruned := made.get("pruned"):
            loss = "" if pruned["loss"] is None else f"; validation loss {pruned['loss']:.4f} after it"
            out().print(f"pruned to rank {pruned['rank']}, relative error {pruned['error']:.4f}{loss}")
        if known := made.get("learned_too"):
            out().print(f"{known:,} of the examples that judge it were learned too: it seems better than it is")
        learned, judges = made["left_out_as_too_long"], made["judges_left_out"]
        of_all = f"its {learned + made['samples']:,} examples"
        for left_out, whose in ((learned, of_all), (judges, "the examples that judge it")):
            if left_out:
                out().print(
                    f"{left_out:,} of {whose} are longer than max_length, or than the base's context, and were left out"
                )


def training_backend(device: str) -> Backend:
    """The kernels to train over: the GPU's where there is one to be used.

    Training multiplies in bf16 or fp32 over dequantized codes, which on a CPU the reference kernels give exactly.
    """
    from server.kernels import choose, cuda

    on_gpu = device == "cuda" or (device == "auto" and cuda.unavailable() is None)
    return choose("cuda") if on_gpu else choose("reference")
