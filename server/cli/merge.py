"""`loramux compose` and `loramux prune`: read adapter folders and write a new one. They need no base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import AdapterError
from server.cli.options import AsJson, path_option
from server.cli.output import format_size, print_json, stdout
from server.errors import BadSetting

if TYPE_CHECKING:
    from adapters.weights import LoraWeights

MAX_RANK = 4096

Output = Annotated[Path, path_option("Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an adapter in the folder, with its task.json and card.")]


def compose(
    parts: Annotated[list[str], typer.Argument(help="Adapter folders, each FOLDER or FOLDER=WEIGHT.")],
    output: Output,
    method: Annotated[str, typer.Option(help="exact, linear, ties, dare_linear or dare_ties.")] = "exact",
    rank: Annotated[int | None, typer.Option(help="Reduce the result to this rank and report the error.")] = None,
    density: Annotated[float, typer.Option(help="Share of values that TIES and DARE keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Random seed of DARE.")] = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compose several weighted adapters into one.

    `exact` stores the sum that the server computes for the same mix.
    """
    from adapters import composition, peft_format

    replaces = _check_output(output, force)
    pairs = []
    for part in parts:
        folder, _, weight = (part, "", "") if Path(part).is_dir() or "=" not in part else part.rpartition("=")
        try:
            factor = float(weight) if weight else 1.0
        except ValueError as error:
            raise BadSetting(f"{part!r}: the weight is not a number.") from error
        pairs.append((_read(Path(folder), Path(folder).name), factor))
    result = composition.compose(pairs, output.resolve().name, method, rank=rank, density=density, seed=seed)
    peft_format.save(result, output)
    _remove_old_files(output, replaces, result)
    lost = result.metadata.get("pruning", {}).get("error", 0.0)
    if as_json:
        version = _saved_version(output, max(result.ranks))
        print_json(
            {"path": str(output), "version": version, "ranks": result.ranks, "bytes": result.nbytes, "error": lost}
        )
    else:
        stdout().print(
            f"{output}: ranks {result.ranks}, {format_size(result.nbytes)}, relative error of the rank reduction "
            f"{lost:.2g}"
        )


def prune(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Reduce every module to this rank.")] = None,
    budget: Annotated[int | None, typer.Option(help="Keep at most this many parameters overall.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of the squared singular values.")] = None,
    drop: Annotated[float | None, typer.Option(help="Drop this share of the modules, weakest first.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter smaller with one of four methods, and report the error."""
    from adapters import peft_format, pruning

    if sum(option is not None for option in (rank, budget, energy, drop)) != 1:
        raise BadSetting("Give exactly one of --rank, --budget, --energy and --drop.")
    replaces = _check_output(output, force)
    weights, name = _read(adapter, adapter.resolve().name), output.resolve().name
    if rank is not None:
        result, cut = pruning.truncate(weights, rank, name=name)
    elif drop is not None:
        result, cut = pruning.drop_modules(weights, pruning.weakest_modules(weights, drop), name=name)
    else:
        result, cut = pruning.truncate_globally(weights, budget=budget, energy=energy, name=name)
    parameters = f"{cut.parameters:,} of {cut.parameters_before:,} parameters"
    card = weights.metadata["card"]
    if card is not None:
        card = (
            f"{card.rstrip()}\n- **Pruned**: {parameters} remain, relative error {cut.error:.3g}. All figures above "
            "describe the adapter before pruning.\n"
        )
    peft_format.save(result, output, card=card)
    _remove_old_files(output, replaces, result, card)
    if as_json:
        version = _saved_version(output, max(result.ranks))
        print_json({"path": str(output), "version": version, "ranks": result.ranks, **result.metadata["pruning"]})
    else:
        stdout().print(
            f"{output}: {parameters}, relative error {cut.error:.3g} (largest {cut.worst_error:.3g} at "
            f"{cut.worst_module}), {len(cut.dropped)} modules dropped"
        )


def _read(folder: Path, name: str) -> LoraWeights:
    """Read an adapter folder. Errors name the folder."""
    from adapters import peft_format

    try:
        return peft_format.read_folder(folder, name=name, max_rank=MAX_RANK)
    except AdapterError as error:
        raise type(error)(f"{folder}: {error.message}", error.param) from error


def _check_output(output: Path, force: bool) -> bool:
    """Whether an existing adapter is replaced. Raises BadSetting without --force."""
    from adapters.peft_format import CONFIG_FILE

    exists = (output / CONFIG_FILE).exists()
    if exists and not force:
        raise BadSetting(f"{output} already has an adapter. Choose another folder, or use --force.", "output")
    return exists


def _remove_old_files(output: Path, replaces: bool, result: LoraWeights, card: str | None = None) -> None:
    """Remove the task.json and card of a replaced adapter if the new one has none."""
    from adapters.peft_format import CARD_FILE, TASK_FILE

    if replaces and result.metadata.get("task") is None:
        (output / TASK_FILE).unlink(missing_ok=True)
    if replaces and card is None and result.metadata.get("card") is None:
        (output / CARD_FILE).unlink(missing_ok=True)


def _saved_version(output: Path, max_rank: int) -> str:
    """The version of the written folder: its digest is of the rounded values."""
    from adapters import peft_format

    return peft_format.read_folder(output, name=output.resolve().name, max_rank=max_rank).version.label
