"""`loramux pull`, `quantize` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from server.cli.options import MODEL, AsJson, with_settings
from server.cli.output import format_size, print_json, progress, stdout
from server.settings import Settings


@with_settings("state_dir")
def pull(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="Catalogue name or hub id (org/name@revision).")] = "smollm2-135m",
    as_json: AsJson = False,
) -> None:
    """Download a base model, so that serving it needs no network."""
    from server.sources import resolve_model

    with progress("bytes", quiet=as_json) as bar:
        name, path = resolve_model(model, settings.state_dir, progress=bar)
    if as_json:
        print_json({"name": name, "path": str(path)})
    else:
        stdout().print(f"{name}: {path}")


@with_settings("quantization", "group_size", "double_quant", "table_bits", "state_dir")
def quantize(
    settings: Settings,
    model: Annotated[str, typer.Argument(help="Catalogue name, local folder, .gguf file or hub id.")],
    target: Annotated[Path, typer.Argument(help="Folder to create. It must not exist.")],
    as_json: AsJson = False,
) -> None:
    """Quantize a base model and write it to a folder that `--model` accepts.

    With `--quantization none` the weights stay floating point. Files are processed one at a time.
    """
    from server.model.quantized_folder import quantize_folder
    from server.sources import resolve_model

    with progress("bytes", quiet=as_json) as bar:
        name, source = resolve_model(model, settings.state_dir, progress=bar)
    with progress("parameters", quiet=as_json) as bar:
        result = quantize_folder(
            source,
            target,
            quantization=settings.quantization,
            group_size=settings.group_size,
            double_quant=settings.double_quant,
            table_bits=settings.table_bits,
            progress=bar,
        )
    if as_json:
        print_json({"name": name, "path": str(target), **result})
    else:
        stdout().print(
            f"{target}: {format_size(result['bytes'])}, {result['bits']:.2f} bits per parameter in the linear layers"
        )


_KEY_FILES = ("api_keys_file", "admin_keys_file", "metrics_key_file")


@with_settings(*MODEL, "state_dir", "adapter_ram", "kv_cache", "host", "port", *_KEY_FILES, "insecure")
def doctor(settings: Settings, as_json: AsJson = False) -> None:
    """Check this machine: what it offers, what the server would use, and what would prevent a start.

    The exit status is 1 if there is a problem.
    """
    from server.cli.doctor import examine

    report = examine(settings)
    if as_json:
        print_json(report.as_json())
    else:
        console = stdout()
        for name, value in report.facts.items():
            console.print(f"{name:<16} {value}")
        for name, colour, lines in (("problem", "red", report.problems), ("warning", "yellow", report.warnings)):
            for line in lines:
                console.print(f"{name:<16}", style=colour, end=" ")
                console.print(line)
        if not report.problems:
            console.print("ready to serve")
    if report.problems:
        raise typer.Exit(1)
