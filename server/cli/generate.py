"""`loramux generate`: one answer without a server, on an engine of its own, streamed to the terminal."""

from __future__ import annotations

import asyncio
import io
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

import typer

from server.cli import logs
from server.cli.local_engine import open_base, opened, target_of, weighted
from server.cli.options import BASE, AsJson, with_settings
from server.cli.output import print_json
from server.errors import InvalidRequest
from server.settings import Settings

if TYPE_CHECKING:
    from server.model.loader import Base


@with_settings(*BASE, "state_dir", "library", "max_rank", "max_mix", "max_context", "log_level")
def generate(
    settings: Settings,
    prompt: Annotated[
        str, typer.Argument(help="What to answer; - reads standard input, in UTF-8, without its last line end.")
    ],
    task: Annotated[str | None, typer.Option(help="Task of a shipped adapter, or of one given here.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="NAME or FOLDER, with =WEIGHT if it is not 1; again for a mix.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of the answer; the task's, or 64.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token; the task's, or 0.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Of the likeliest tokens, so much; the task's, or 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is drawn: the same seed draws the same.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt and end. Adapters that were published to a server are that server's: give their folders."""
    from server.kernels import choose
    from server.tasks.sampling import NUMBERS

    logs.configure_quietly(settings.log_format, settings.log_level)
    given = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    asked = {name: NUMBERS[name].check(name, value) for name, value in given.items() if value is not None}
    text = _read(sys.stdin.buffer) if prompt == "-" else prompt
    if not _is_text(text):
        raise InvalidRequest("the prompt is no UTF-8 text", "prompt")
    base = open_base(settings, choose(settings.kernels, settings.device), quiet=as_json)
    answer = asyncio.run(_answer(settings, base, text, task, adapter, asked, stream=not as_json))
    if as_json:
        print_json(answer)


def _read(stream: BinaryIO) -> str:
    """UTF-8 text, its lines ended as Python ends them; bytes that are none of it stay as lone surrogates.

    A byte-order mark is no part of it, nor is one line end at the end: `echo` writes it, and nobody means it.
    """
    text = stream.read().decode("utf-8-sig", "surrogateescape")
    return io.StringIO(text, newline=None).read().removesuffix("\n")


def _is_text(text: str) -> bool:
    """Whether it has no lone surrogates, which stand for what was given in another encoding."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


async def _answer(
    settings: Settings,
    base: Base,
    prompt: str,
    task: str | None,
    adapters: list[str] | None,
    asked: dict[str, Any],
    stream: bool,
) -> dict[str, Any]:
    from server.tasks.inference import Caller
    from server.tasks.mix_key import adapters_json
    from server.tasks.sampling import OWN_DEFAULTS, build

    async with opened(settings, base) as house:
        parts = house.services
        choice = None if adapters is None else [weighted(house, text) for text in adapters]
        target = target_of(house, task, choice)
        ids = await parts.prompts.encode_input(target.task, prompt)
        defaults = target.task.defaults if target.task else {}
        sampling = build(asked, defaults, OWN_DEFAULTS, parts.prompts.limit, len(ids))
        start = time.monotonic()
        generation = parts.inference.start(target, [ids], [sampling], Caller())
        pieces: list[str] = []
        try:
            async for arrived in generation.steps():
                for _, delivery in arrived:
                    pieces.append(delivery.text)
                    if stream:
                        sys.stdout.write(delivery.text)
                        sys.stdout.flush()
        finally:  # what is said of an end before its time has a line of its own
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
