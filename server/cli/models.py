"""`loramux pull`, `quantize` and `doctor`: bases, and the machine that is to run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.options import BASE, AsJson, with_settings
from server.cli.output import out, print_json, progress, size
from server.settings import Settings


@with_settings("state_dir")
def pull(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="Catalogue name or hub id (org/name@revision).")] = "smollm2-135m",
    as_json: AsJson = False,
) -> None:
    """Fetch a base, so that serving it needs no network."""
    from server.sources import resolve_model

    with progress("bytes", quiet=as_json) as bar:
        name, path = resolve_model(model, settings.state_dir, progress=bar)
    if as_json:
        print_json({"name": name, "path": str(path)})
    else:
        out().print(f"{name}: {path}")


@with_settings("quantization", "group_size", "double_quant", "table_bits", "state_dir")
def quantize(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="Catalogue name, local folder, .gguf file or hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    as_json: AsJson = False,
) -> None:
    """Write a base in 4 bits, or in floats with `--quantization none`, file by file, as a folder for `--model`."""
    from server.model.loader import quantize_folder
    from server.sources import resolve_model

    with progress("bytes", quiet=as_json) as bar:
        name, source = resolve_model(model, settings.state_dir, progress=bar)
    with progress("parameters", quiet=as_json) as bar:
        done = quantize_folder(
            source,
            target,
            quantization=settings.quantization,
            group_size=settings.group_size,
            double_quant=settings.double_quant,
            table_bits=settings.table_bits,
            progress=bar,
        )
    if as_json:
        print_json({"name": name, "path": str(target), **done})
    else:
        out().print(f"{target}: {size(done['bytes'])}, {done['bits']:.2f} bits a parameter in the linears")


_KEYS = ("api_keys_file", "admin_keys_file", "metrics_key_file")


@with_settings(*BASE, "state_dir", "adapter_ram", "kv_cache", "host", "port", *_KEYS, "insecure")
def doctor(settings: Settings, as_json: AsJson = False) -> None:
    """Tell what this machine offers, what would be used, and what would go wrong."""
    from server.cli.doctor import examine

    report = examine(settings)
    if as_json:
        print_json(report.describe())
    else:
        console = out()
        for name, value in report.facts.items():
            console.print(f"{name:<16} {value}")
        for name, colour, lines in (("problem", "red", report.problems), ("note", "yellow", report.remarks)):
            for line in lines:
                console.print(f"{name:<16}", style=colour, end=" ")
                console.print(line)
        if not report.problems:
            console.print("ready to serve")
    if report.problems:
        raise typer.Exit(1)
