"""`loramux generate`: answers one prompt without a server."""

from __future__ import annotations

import asyncio
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.cli import logs
from server.cli.local_engine import load_model, local_server, parse_weighted, resolve_target
from server.cli.options import MODEL, AsJson, with_settings
from server.cli.output import print_json
from server.errors import InvalidRequest
from server.settings import Settings

if TYPE_CHECKING:
    from server.model.loader import Base


@with_settings(*MODEL, "state_dir", "library", "max_rank", "max_mix", "max_context", "log_level")
def generate(
    settings: Settings,
    prompt: Annotated[str, typer.Argument(help="The prompt. - reads it from stdin (UTF-8).")],
    task: Annotated[str | None, typer.Option(help="Task of a shipped adapter, or of an --adapter folder.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME or FOLDER, optionally with =WEIGHT. Repeat it for a mix.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Maximum tokens. Default: the task's, or 64.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the task's, or 0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling. Default: the task's, or 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for sampling.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt.

    Adapters published to a server are not available here; give their folders.
    """
    from server.kernels import choose
    from server.tasks.sampling import NUMBERS

    logs.configure_for_command(settings.log_format, settings.log_level)
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    sampling = {name: NUMBERS[name].check(name, value) for name, value in given.items() if value is not None}
    text = _read_stdin() if prompt == "-" else prompt
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("The prompt is not valid UTF-8.", "prompt") from None
    base = load_model(settings, choose(settings.kernels, settings.device), quiet=as_json)
    answer = asyncio.run(_answer(settings, base, text, task, adapter, sampling, stream=not as_json))
    if as_json:
        print_json(answer)


def _read_stdin() -> str:
    """Text from stdin without a byte-order mark and without its last newline."""
    text = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")


async def _answer(
    settings: Settings,
    base: Base,
    prompt: str,
    task: str | None,
    adapters: list[str] | None,
    options: dict[str, Any],
    stream: bool,
) -> dict[str, Any]:
    from server.tasks.generation import Caller
    from server.tasks.mix_key import adapters_json
    from server.tasks.sampling import OWN_DEFAULTS, build

    async with local_server(settings, base) as server:
        services = server.services
        choice = None if adapters is None else [parse_weighted(server, text) for text in adapters]
        target = resolve_target(server, task, choice)
        ids = await services.prompts.encode_input(target.task, prompt)
        defaults = target.task.defaults if target.task else {}
        sampling = build(options, defaults, OWN_DEFAULTS, services.prompts.limit, len(ids))
        start = time.monotonic()
        generation = services.inference.start(target, [ids], [sampling], Caller())
        pieces: list[str] = []
        try:
            async for arrived in generation.steps():
                for _, delivery in arrived:
                    pieces.append(delivery.text)
                    if stream:
                        sys.stdout.write(delivery.text)
                        sys.stdout.flush()
        finally:
            if stream:
                sys.stdout.write("\n")
        return {
            "text": "".join(pieces),
            "task": task,
            "finish_reason": generation.replies[0].finish_reason,
            "adapters": adapters_json(generation.versions),
            "usage": generation.usage(),
            "seconds": round(time.monotonic() - start, 4),
        }
