"""`loramux bench slora` and `load`, which ask a server that runs: any that speaks OpenAI's protocol.

Owns their arguments and output. The workloads, the client and its clock are in other modules of this package.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from benchmarks import results
from benchmarks.options import NEW, PROMPT, AsJson, Out, console, extra

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.client import Body
    from benchmarks.slora import Plan

Url = Annotated[str, typer.Argument(help="Any OpenAI-compatible server, with or without /v1 at the end.")]
Vocab = Annotated[int, typer.Option(min=101, help="Prompts are random token ids below this.")]
AsText = Annotated[bool, typer.Option("--text", help="Prompts of so many common words: some servers take no ids.")]
AsChat = Annotated[bool, typer.Option("--chat", help="Ask for chats, in words as with --text.")]
IgnoreEos = Annotated[
    bool, typer.Option(help="Ask for answers of full length, by a field that some servers do not know.")
]
PromptSeed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Of the prompts, which a server may keep. [another each time]"),
]
Cv = Annotated[float, typer.Option(help="Coefficient of variation of the gaps between requests; 1 is Poisson.")]
Slo = Annotated[float, typer.Option(help="Seconds within which a first token is in time.")]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="OPENAI_API_KEY", help="Key of the server, better given by the environment: of several, the first."
    ),
]
OwnKey = Annotated[str, typer.Option(hidden=True, envvar=["LORAMUX_API_KEYS", "LORAMUX_ADMIN_KEYS"])]
"""The keys of a loramux on this machine, which are no other server's business."""

LONGEST = 1 << 15
"""Tokens of a prompt or an answer that can be asked for."""


def slora(
    context: typer.Context,
    url: Url,
    prefix: Annotated[str, typer.Option(help="Adapters are named prefix0, prefix1, ...")] = "s",
    few: Annotated[int, typer.Option(min=1)] = 5,
    many: Annotated[int, typer.Option(min=2)] = 1000,
    requests: Annotated[int, typer.Option(min=1, help="Of one run.")] = 1000,
    duration: Annotated[float | None, typer.Option(help="Seconds of one run, instead of --requests.")] = None,
    alpha: Annotated[list[float] | None, typer.Option(help="Popularity, 1 is uniform; again for more [1, 0.3]")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Of the capacity; again for more [0.7, 1.2]")] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Requests/s instead of shares; again for more.")] = None,
    cv: Cv = 1.0,
    prompt: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of a prompt, below HIGH.")] = "8:128",
    output: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Tokens of an answer, below HIGH.")] = "8:128",
    slo: Slo = 6.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of arrivals, adapters and lengths.")] = 42,
    prompt_seed: PromptSeed = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind; few and many take turns.")] = 2,
    vocab: Vocab = 40_000,
    text: AsText = False,
    chat: AsChat = False,
    ignore_eos: IgnoreEos = True,
    api_key: ApiKey = "",
    own_key: OwnKey = "",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """S-LoRA's workload against a running server: many adapters beside few."""
    from server.errors import BadSetting

    extra()
    results.make_room(out)
    from benchmarks import plots
    from benchmarks import slora as workload

    if share and rate:
        raise BadSetting("give --share or --rate, not both: a share is of the measured capacity", "rate")
    plan = workload.Plan(
        few=few, many=many, requests=requests, duration=duration, alphas=tuple(alpha or (1.0, 0.3)),
        shares=() if rate else tuple(share or (0.7, 1.2)), rates=tuple(rate or ()), cv=cv,
        prompt=_lengths(prompt, "prompt"), output=_lengths(output, "output"), seed=seed, slo=slo, repeats=repeats,
    )  # fmt: skip
    plan.check()
    names = [f"{prefix}{i}" for i in range(many)]
    drawn = secrets.randbits(32) if prompt_seed is None else prompt_seed

    def bodies(number: int) -> Body:
        run_seed = (drawn + number * 2_654_435_761) % 2**32
        return workload.body_of(names, vocab, text, run_seed, chat=chat, ignore_eos=ignore_eos)

    client = workload.Client(url, bodies, _key(context, api_key, own_key, url))
    most, loads = workload.compare(client, plan, lambda line: console.print(line, markup=False))
    rows, kept = workload.ratios(loads), client.residency()
    result = results.report(
        {
            "url": url,
            "models": f"{prefix}0 to {prefix}{many - 1}",
            "vocab": vocab,
            "text": text,
            "chat": chat,
            "ignore_eos": ignore_eos,
            "prompt_seed": drawn,
            **asdict(plan),
        },
        {"capacity": most, "runs": [run.as_dict() for run in loads], "ratios": rows, "server": kept},
    )
    for name, wrong in _departures(kept, many).items():
        console.print(f"{name}: {wrong}", markup=False)
    for reason in dict.fromkeys(reason for run in loads for reason in run.summary.reasons):
        console.print(f"failed: {reason}", markup=False)
    results.show(result, _table(rows, plan), as_json, out, "slora")
    if out is not None:
        plots.loads(out / "slora.png", f"S-LoRA workload, {few} and {many} adapters", loads)


def _table(rows: Sequence[Mapping[str, Any]], plan: Plan) -> Table:
    """The ratios of many adapters over few."""
    from benchmarks.client import figure

    table = results.table(
        "alpha", "requests/s", "of capacity", f"throughput, {plan.many} over {plan.few}", "p99 of first token, same",
        "failed", title=f"S-LoRA's workload, {plan.many} adapters over {plan.few}, medians of {plan.repeats}",
    )  # fmt: skip
    for row in rows:
        told = [figure(row[k], ".2f") for k in ("throughput", "ttft_p99")]
        of = "" if row["share"] is None else f"{row['share']:.2f}"
        failed = ", ".join(f"{n} with {name}" for name, n in row["failed"].items() if n) or "0"
        table.add_row(f"{row['alpha']:.2f}", f"{row['rate']:.2f}", of, *told, failed)
    return table


def _departures(kept: Mapping[str, int] | None, many: int) -> dict[str, str]:
    """What a server tells of itself by which it is another workload than the paper's, as far as it tells."""
    found = {}
    if kept is not None and kept["adapters_in_ram"] < many:
        found["adapters in RAM"] = f"{kept['adapters_in_ram']} of {many}; the others are read again (--adapter-ram)"
    if kept is not None and kept["prefix_tokens_found"]:
        found["prefix cache"] = f"{kept['prefix_tokens_found']} prompt tokens were found in it (--no-prefix-cache)"
    return found


def load(
    context: typer.Context,
    url: Url,
    models: Annotated[list[str], typer.Option("--model", help="Names to ask for in turn.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    rate: Annotated[float | None, typer.Option(help="Requests/s, whatever is in flight: an open loop.")] = None,
    cv: Cv = 1.0,
    slo: Slo = 6.0,
    requests: Annotated[int, typer.Option(min=1)] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=LONGEST)] = PROMPT,
    new_tokens: Annotated[int, typer.Option(min=1, max=LONGEST)] = NEW,
    prompt_seed: PromptSeed = None,
    vocab: Vocab = 40_000,
    text: AsText = False,
    chat: AsChat = False,
    ignore_eos: IgnoreEos = True,
    api_key: ApiKey = "",
    own_key: OwnKey = "",
    llama: Annotated[bool, typer.Option(help="Name adapters as llama-server does: --lora numbers, 0 first.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A closed loop, so many requests in flight until all are answered, or an open one, so many a second."""
    extra()
    results.make_room(out)
    from benchmarks.client import NoAnswer, closed_loop, figure, open_loop, run, timed
    from benchmarks.slora import body_of, check_positive, llama_body
    from benchmarks.workloads import closed, spread

    rates = () if rate is None else (rate,)
    check_positive({"cv": (cv,), "slo": (slo,), "rate": rates, "requests": (requests,), "concurrency": (concurrency,)})
    drawn = secrets.randbits(32) if prompt_seed is None else prompt_seed
    form = {"chat": chat, "ignore_eos": ignore_eos}
    body = llama_body(len(models), vocab, text, drawn, **form) if llama else body_of(models, vocab, text, drawn, **form)
    arrivals = closed(requests, list(range(len(models))), prompt_tokens, new_tokens)
    key = _key(context, api_key, own_key, url)
    how: dict[str, Any]
    if rate is None:
        how, title = {"concurrency": concurrency}, f"{concurrency} at a time"
        asking = closed_loop(url, arrivals, body, concurrency, key=key)
    else:
        how, title = {"rate": rate, "cv": cv}, f"{rate:g} a second"
        asking = open_loop(url, spread(arrivals, rate, cv), body, key=key)
    _, summary = run(timed(asking, slo))
    if not summary.finished:
        raise NoAnswer(f"none of {requests} requests was answered; the first: {summary.reasons[0]}")
    asked = {"url": url, "models": models, **how, "slo": slo, "requests": requests, "vocab": vocab}
    asked |= {"text": text, "prompt_seed": drawn, "llama": llama, **form}
    told = results.report({**asked, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}, summary.as_dict())
    table = results.table("", "", title=f"{requests} requests, {title}")
    for name, value in summary.as_dict().items():
        unit = " s" if name.startswith(("seconds", "ttft", "tpot", "e2e")) else ""
        number = isinstance(value, float | int)
        table.add_row(name, figure(value, unit=unit) if number else Text("\n".join(value) or "none"))
    if summary.short:
        console.print(f"{summary.short} answers are shorter than asked: it is another workload", markup=False)
    results.show(told, table, as_json, out, "load")


def _lengths(text: str, param: str) -> tuple[int, int]:
    """(low, high) of LOW:HIGH. Raises BadSetting."""
    from server.errors import BadSetting

    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= low < high <= LONGEST:
        raise BadSetting(
            f"--{param} is LOW:HIGH, whole numbers of tokens from 1 to {LONGEST} with LOW below HIGH, not {text!r}",
            param,
        )
    return low, high


def _key(context: typer.Context, given: str, own: str, url: str) -> str:
    """What the server at `url` is shown, the first of several: what the command says, this machine's own keys if it is
    there, or what the environment has for any."""
    from benchmarks.client import is_here

    source = context.get_parameter_source("api_key")
    said = source is not None and source.name == "COMMANDLINE"
    if own and not said and is_here(url):
        given = own
    return next((entry.strip() for entry in re.split(r"[,\n]", given) if entry.strip()), "")
