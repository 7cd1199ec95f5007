"""Settings as flags: `@with_settings("model", ...)` gives a command one flag for each, from the setting's own text."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from server.settings import Settings, flag, given_path, load_settings

SECRET = frozenset({"api_keys", "admin_keys", "metrics_key"})
"""Not flags: a command line can be read by every user of a machine."""

BASE = ("model", "device", "quantization", "group_size", "double_quant", "table_bits", "kernels", "threads")
DAY = 86_400.0
LEFT_OUT = "%s is left out: --threads says how many threads compute, taskset on which processors"
"""Of a variable that `leave_threads_alone` answers."""
EVERYTHING = tuple(name for name in Settings.model_fields if name not in SECRET)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]


def path_option(text: str) -> Any:
    """An option that is a path and no setting; `text` is its help."""
    return typer.Option(help=text, callback=given_path)


def with_settings(
    *names: str, texts: Mapping[str, str] | None = None, **fixed: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator for commands that take `settings: Settings`; `names` are the settings that become flags, `fixed` are
    those that are the command's own. `texts` are of those that mean something else to a command than to the server.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        added = [
            inspect.Parameter(
                n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(n, (texts or {}).get(n))
            )
            for n in names
        ]
        file = typer.Option("--config", help="Settings file; loramux.toml if that is there.")
        added.append(
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path | None, file]
            )
        )

        # What does not listen needs no keys, wherever the server that has the same settings would listen.
        own_rule = {} if "host" in names else {"insecure": True}

        @functools.wraps(command)
        def run(**given: Any) -> None:
            config = given.pop("config")
            settings = load_settings({**{n: given.pop(n) for n in names}, **own_rule, **fixed}, config=config)
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
    text = f"{text or field.description}{choices} [{_shown(name, field.default)}]"
    names = f"{flag(name)}/--no-{flag(name)[2:]}" if switch else flag(name)
    return Annotated[bool | None if switch else str | None, typer.Option(names, help=text, show_default=False)]


def _shown(name: str, default: object) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, int) and default >= 1 << 20:
        return f"{default >> 30}GiB" if default % (1 << 30) == 0 else f"{default >> 20}MiB"
    if isinstance(default, float):
        return f"{default / DAY:g}d" if default % DAY == 0 else f"{default:g}s"
    if isinstance(default, Path) and default.is_absolute():
        return "those that ship"
    if default is None:
        return "none" if name.endswith("_file") else "auto"
    return "none" if default == () else str(default)
