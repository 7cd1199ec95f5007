"""Settings as command-line flags: `@with_settings("model", ...)` adds a flag for each named setting."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from server.settings import Settings, flag, given_path, load_settings

SECRETS = frozenset({"api_keys", "admin_keys", "metrics_key"})
"""Settings without a flag: other users can see the command line of a process."""
MODEL = ("model", "device", "quantization", "group_size", "double_quant", "table_bits", "kernels", "threads")
"""Settings of commands that load a model."""
ALL_SETTINGS = tuple(name for name in Settings.model_fields if name not in SECRETS)

DAY = 86_400.0
IGNORED_VARIABLE = "%s is ignored. Use --threads to set the number of threads, and taskset to choose processors."

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def path_option(text: str) -> Any:
    """An option for a path that is not a setting."""
    return typer.Option(help=text, callback=given_path)


def with_settings(
    *names: str, texts: Mapping[str, str] | None = None, **fixed: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator for commands with a parameter `settings: Settings`.

    Args:
        names: settings that become flags.
        texts: help texts that replace those of the settings.
        fixed: values of settings that the user cannot change.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        annotations = {name: _option(name, (texts or {}).get(name)) for name in names}
        file = typer.Option("--config", help="Settings file. Default: loramux.toml, if it exists.")
        annotations["config"] = Annotated[Path | None, file]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in annotations.items()
        ]
        # A command that does not listen needs no API keys, whatever LORAMUX_HOST says.
        defaults = {} if "host" in names else {"insecure": True}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            config = given.pop("config")
            settings = load_settings({**{n: given.pop(n) for n in names}, **defaults, **fixed}, config=config)
            command(settings=settings, **given)

        signature = inspect.Signature([*own, *added])
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return run

    return decorate


def _option(name: str, text: str | None) -> Any:
    field = Settings.model_fields[name]
    switch = field.annotation is bool
    choices = f" ({', '.join(map(str, get_args(field.annotation)))})" if get_origin(field.annotation) is Literal else ""
    text = f"{text or field.description}{choices} [{_show_default(name, field.default)}]"
    names = f"{flag(name)}/--no-{flag(name)[2:]}" if switch else flag(name)
    return Annotated[bool | None if switch else str | None, typer.Option(names, help=text, show_default=False)]


def _show_default(name: str, default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 1 << 20:
        return f"{default >> 30}GiB" if default % (1 << 30) == 0 else f"{default >> 20}MiB"
    if isinstance(default, float):
        return f"{default / DAY:g}d" if default % DAY == 0 else f"{default:g}s"
    if isinstance(default, Path) and default.is_absolute():
        return "the shipped ones"
    if default is None:
        return "none" if name.endswith("_file") else "auto"
    return "none" if default == () else str(default)
