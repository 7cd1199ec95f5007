"""`loramux train`: recipes to adapters, several over one resident base."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.options import BASE, AsJson, with_settings
from server.cli.terminal import Progress, out, print_json, progress, size
from server.settings import Settings


@with_settings(*BASE, "state_dir")
def train(
    settings: Settings,
    recipes: Annotated[list[Path], typer.Argument(help="Recipes (.toml); see examples/.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the data files. [the recipe's own]")] = None,
    output: Annotated[Path, typer.Option(help="Folder that gets one adapter folder for each.")] = Path("trained"),
    as_json: AsJson = False,
) -> None:
    """Train one adapter for each recipe, on the 4-bit base that serves. Started again, it goes on where it was."""
    from adapters.training import Event
    from server.jobs.recipe import read_recipe
    from server.jobs.run import run
    from server.kernels import choose
    from server.model.loader import load_base
    from server.sources import resolve_model

    wanted = [(read_recipe(path), data or path.parent) for path in recipes]
    name, source = resolve_model(settings.model, settings.state_dir)
    # Training multiplies in bf16 or fp32 over dequantized codes, which the reference kernels give exactly.
    base = load_base(
        source,
        name=name,
        backend=choose("reference"),
        quantization=settings.quantization,
        group_size=settings.group_size,
        double_quant=settings.double_quant,
        table_bits=settings.table_bits,
        cache_dir=settings.state_dir / "cache",
    )
    for recipe, folder in wanted:
        with progress("parameters", quiet=as_json) as bar:

            def tell(event: Event, bar: Progress = bar, name: str = recipe.name) -> None:
                if event.kind == "step":
                    bar(name, event.step, event.steps)

            weights = run(recipe, base, output, data_dir=folder, on_event=tell)
        made = weights.metadata["training"]
        if as_json:
            print_json(
                {"name": recipe.name, "path": str(output / recipe.name), "version": weights.version.label, **made}
            )
        else:
            peak = made["memory"]["peak_process"]
            out().print(
                f"{output / recipe.name}: {made['steps']} steps, {made['tokens_per_second'] or 0:,.0f} tokens/s"
                + (f", peak {size(peak)}" if peak else "")
            )
