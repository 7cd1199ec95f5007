"""`loramux compose` and `loramux prune`: adapter folders in, a new adapter folder out. Neither needs a base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import AdapterError
from server.cli.options import AsJson, path_option
from server.cli.output import out, print_json, size
from server.errors import BadSetting

if TYPE_CHECKING:
    from adapters.weights import LoraWeights

Output = Annotated[Path, path_option("Folder to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the adapter in the folder, with its task.json and card.")]


def compose(
    parts: Annotated[list[str], typer.Argument(help="Adapter folders, each FOLDER or FOLDER=WEIGHT.")],
    output: Output,
    method: Annotated[str, typer.Option(help="exact, linear, ties, dare_linear or dare_ties.")] = "exact",
    rank: Annotated[int | None, typer.Option(help="Re-rank the result to at most this; the error is told.")] = None,
    density: Annotated[float, typer.Option(help="Share of values that TIES and DARE keep.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Of DARE's draw.")] = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make one adapter of several, weighted. `exact` is what serving a mix computes, before each is rounded."""
    from adapters import composition, peft_format

    replaced = _check_free(output, force)
    pairs = []
    for part in parts:
        folder, _, weight = (part, "", "") if Path(part).is_dir() or "=" not in part else part.rpartition("=")
        try:
            factor = float(weight) if weight else 1.0
        except ValueError as error:
            raise BadSetting(f"{part!r}: the weight is no number") from error
        pairs.append((_read(Path(folder), Path(folder).name), factor))
    result = composition.compose(pairs, output.resolve().name, method, rank=rank, density=density, seed=seed)
    peft_format.save(result, output)
    _clear(output, replaced, result)
    told = {
        "path": str(output),
        "version": _version(output, max(result.ranks)),
        "ranks": result.ranks,
        "bytes": result.nbytes,
    }
    lost = result.metadata.get("pruning", {}).get("error", 0.0)
    if as_json:
        print_json({**told, "error": lost})
    else:
        out().print(f"{output}: ranks {result.ranks}, {size(result.nbytes)}, relative error of the re-rank {lost:.2g}")


def prune(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.")],
    output: Output,
    rank: Annotated[int | None, typer.Option(help="Cut every module to this rank.")] = None,
    budget: Annotated[int | None, typer.Option(help="Keep at most this many parameters, by one threshold.")] = None,
    energy: Annotated[float | None, typer.Option(help="Keep this share of the squared singular values.")] = None,
    drop: Annotated[float | None, typer.Option(help="Drop this share of the modules, weakest first.")] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make an adapter smaller, by exactly one of the four ways, and tell the error."""
    from adapters import peft_format, pruning

    if sum(option is not None for option in (rank, budget, energy, drop)) != 1:
        raise BadSetting("give exactly one of --rank, --budget, --energy and --drop")
    replaced = _check_free(output, force)
    weights, name = _read(adapter, adapter.resolve().name), output.resolve().name
    if rank is not None:
        result, cut = pruning.truncate(weights, rank, name=name)
    elif drop is not None:
        result, cut = pruning.drop_modules(weights, pruning.weakest_modules(weights, drop), name=name)
    else:
        result, cut = pruning.truncate_globally(weights, budget=budget, energy=energy, name=name)
    card = weights.metadata["card"]
    if card is not None:
        said = f"{cut.parameters:,} of {cut.parameters_before:,} parameters are left, relative error {cut.error:.3g}"
        card = f"{card.rstrip()}\n- **Pruned** afterwards: {said}. All figures above are of the adapter before that.\n"
    peft_format.save(result, output, card=card)
    _clear(output, replaced, result, card)
    if as_json:
        told = result.metadata["pruning"]
        version = _version(output, max(result.ranks))
        print_json({"path": str(output), "version": version, "ranks": result.ranks, **told})
    else:
        out().print(
            f"{output}: {cut.parameters:,} of {cut.parameters_before:,} parameters, relative error {cut.error:.3g} "
            f"(worst {cut.worst_error:.3g} at {cut.worst_module}), {len(cut.dropped)} modules dropped"
        )


def _read(folder: Path, name: str) -> LoraWeights:
    """The adapter in a folder, of any rank. Its errors say which folder that is: there may be several."""
    from adapters import peft_format

    try:
        return peft_format.read_folder(folder, name=name, max_rank=4096)
    except AdapterError as error:
        raise type(error)(f"{folder}: {error.message}", error.param) from error


def _check_free(output: Path, force: bool) -> bool:
    """Whether an adapter lies there that is replaced. Raises BadSetting if nobody has said that it may be."""
    from adapters.peft_format import CONFIG_FILE

    there = (output / CONFIG_FILE).exists()
    if there and not force:
        raise BadSetting(f"{output} holds an adapter; choose another folder, or --force to replace it", "output")
    return there


def _clear(output: Path, replaced: bool, result: LoraWeights, card: str | None = None) -> None:
    """A task and a card that came with the adapter before are not those of the new one."""
    from adapters.peft_format import CARD_FILE, TASK_FILE

    if replaced and result.metadata.get("task") is None:
        (output / TASK_FILE).unlink(missing_ok=True)
    if replaced and card is None and result.metadata.get("card") is None:
        (output / CARD_FILE).unlink(missing_ok=True)


def _version(output: Path, max_rank: int) -> str:
    """The version that lies in the folder: files have a precision of their own, and with it another content."""
    from adapters import peft_format

    return peft_format.read_folder(output, name=output.resolve().name, max_rank=max_rank).version.label
