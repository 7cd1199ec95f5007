"""`loramux generate`: one answer without a server, on an engine of its own, streamed to the terminal."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import logs
from server.cli.options import BASE, AsJson, with_settings
from server.cli.terminal import print_json, progress
from server.errors import InvalidRequest
from server.settings import Settings

if TYPE_CHECKING:
    from server.api.assembly import House
    from server.model.loader import Base

Number = float | None


@with_settings(*BASE, "state_dir", "library", "max_rank", "max_mix", "max_context", "log_level")
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="What to answer; - reads standard input.")],
    task: Annotated[str | None, typer.Option(help="Task of a shipped adapter, or of one given here.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME or FOLDER, with =WEIGHT if it is not 1; again for a mix.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt and end. Adapters that were published to a server are that server's: give their folders."""
    from server.kernels import choose
    from server.model.loader import load_base
    from server.sources import resolve_model

    logs.configure(settings.log_format, "warning" if settings.log_level == "info" else settings.log_level)
    asked = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    text = sys.stdin.read() if prompt == "-" else prompt
    with progress("bytes", quiet=as_json) as bar:
        name, source = resolve_model(settings.model, settings.state_dir, progress=bar)
    with progress("parameters", quiet=as_json) as bar:
        base = load_base(
            source,
            name=name,
            backend=choose(settings.kernels, settings.device),
            quantization=settings.quantization,
            group_size=settings.group_size,
            double_quant=settings.double_quant,
            table_bits=settings.table_bits,
            cache_dir=settings.cache_dir,
            progress=bar,
        )
    with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:  # a server may hold the store of the state dir
        own = settings.model_copy(update={"state_dir": Path(scratch), "adapter_dir": None})
        answer = asyncio.run(_answer(own, base, text, task, adapter, asked, stream=not as_json))
    if as_json:
        print_json(answer)


async def _answer(
    settings: Settings,
    base: Base,
    prompt: str,
    task: str | None,
    adapters: list[str] | None,
    asked: dict[str, Any],
    stream: bool,
) -> dict[str, Any]:
    from server.api.assembly import build
    from server.metrics import Metrics
    from server.tasks.inference import Caller
    from server.tasks.mailbox import Mailbox
    from server.tasks.sampling import OWN_DEFAULTS
    from server.tasks.sampling import build as build_sampling

    mailbox = Mailbox(asyncio.get_running_loop())
    house = await asyncio.to_thread(build, settings, base, Metrics(), mailbox)
    try:
        parts = house.parts
        choice = None if adapters is None else [_adapter(house, text) for text in adapters]
        target = parts.resolver.task(task, choice)
        ids = await parts.prompts.of_input(target.task, prompt)
        defaults = target.task.defaults if target.task else {}
        sampling = build_sampling(asked, defaults, OWN_DEFAULTS, parts.prompts.room, len(ids))
        start = time.monotonic()
        generation = parts.inference.start(target, [ids], [sampling], Caller())
        pieces: list[str] = []
        async for arrived in generation.steps():
            for _, delivery in arrived:
                pieces.append(delivery.text)
                if stream:
                    sys.stdout.write(delivery.text)
                    sys.stdout.flush()
        if stream:
            sys.stdout.write("\n")
        return {
            "text": "".join(pieces),
            "task": task,
            "finish_reason": generation.replies[0].finish_reason,
            "adapters": [{"version": v.label, "weight": w} for v, w in generation.versions],
            "usage": generation.usage(),
            "seconds": round(time.monotonic() - start, 4),
        }
    finally:
        await asyncio.to_thread(house.close, 0.0)


def _adapter(house: House, text: str) -> tuple[str, float]:
    """NAME=WEIGHT as an entry of a choice; a folder is published under its own name first."""
    from adapters.weights import check_weight

    name, equals, weight_text = text.rpartition("=")
    if not equals:
        name, weight_text = text, "1"
    try:
        weight = check_weight(float(weight_text))
    except ValueError:
        raise InvalidRequest(f"the weight of {name!r} must be a number, not {weight_text!r}", "adapter") from None
    folder = Path(name).expanduser()
    if name not in house.parts.registry.names() and folder.is_dir():
        name = folder.resolve().name
        house.parts.registry.publish_now(name, folder, source="file")
    return name, weight
