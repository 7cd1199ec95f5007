"""`loramux bench slora` and `load`: benchmarks of a running OpenAI-compatible server."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from benchmarks import report
from benchmarks.report import NEW_TOKENS, PROMPT_TOKENS, AsJson, Out

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.client import Body
    from benchmarks.slora import Plan

Url = Annotated[str, typer.Argument(help="Address of an OpenAI-compatible server, with or without /v1.")]
Vocab = Annotated[int, typer.Option(min=101, help="Prompts are random token ids below this.")]
AsText = Annotated[bool, typer.Option("--text", help="Send prompts as words, for servers that accept no token ids.")]
AsChat = Annotated[bool, typer.Option("--chat", help="Send chats with words, as with --text.")]
IgnoreEos = Annotated[
    bool, typer.Option(help="Request answers of full length with a field that some servers do not support.")
]
PromptSeed = Annotated[
    int | None,
    typer.Option(min=0, max=2**32 - 1, help="Seed of the prompts. Default: random, because servers cache prompts."),
]
Cv = Annotated[float, typer.Option(help="Coefficient of variation of the gaps between requests; 1 is Poisson.")]
Slo = Annotated[float, typer.Option(help="Service level: seconds to the first token.")]
ApiKey = Annotated[
    str,
    typer.Option(
        envvar="OPENAI_API_KEY", help="Key of the server; prefer the environment variable. The first of several counts."
    ),
]
LocalKey = Annotated[str, typer.Option(hidden=True, envvar=["LORAMUX_API_KEYS", "LORAMUX_ADMIN_KEYS"])]
"""Keys of a loramux server on this machine. They are not sent to other machines."""

MAX_LENGTH = 1 << 15
"""Maximum tokens of a prompt or an answer."""


def slora(
    context: typer.Context,
    url: Url,
    prefix: Annotated[str, typer.Option(help="Adapters are named prefix0, prefix1, ...")] = "s",
    few: Annotated[int, typer.Option(min=1, help="Smaller number of adapters.")] = 5,
    many: Annotated[int, typer.Option(min=2, help="Larger number of adapters.")] = 1000,
    requests: Annotated[int, typer.Option(min=1, help="Requests per run.")] = 1000,
    duration: Annotated[float | None, typer.Option(help="Seconds per run, instead of --requests.")] = None,
    alpha: Annotated[
        list[float] | None, typer.Option(help="Popularity; 1 is uniform. Repeatable. Default: 1 and 0.3.")
    ] = None,
    share: Annotated[
        list[float] | None, typer.Option(help="Share of the capacity. Repeatable. Default: 0.7 and 1.2.")
    ] = None,
    rate: Annotated[list[float] | None, typer.Option(help="Requests/s, instead of --share. Repeatable.")] = None,
    cv: Cv = 1.0,
    prompt: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Prompt tokens, below HIGH.")] = "8:128",
    output: Annotated[str, typer.Option(metavar="LOW:HIGH", help="Answer tokens, below HIGH.")] = "8:128",
    slo: Slo = 6.0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of arrivals, adapters and lengths.")] = 42,
    prompt_seed: PromptSeed = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 2,
    vocab: Vocab = 40_000,
    text: AsText = False,
    chat: AsChat = False,
    ignore_eos: IgnoreEos = True,
    api_key: ApiKey = "",
    local_key: LocalKey = "",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare many adapters with few on a running server, with S-LoRA's workload."""
    from server.errors import BadSetting

    report.check_extra()
    report.check_output(out)
    from benchmarks import plots
    from benchmarks import slora as workload

    if share and rate:
        raise BadSetting("Give --share or --rate, not both: a share is relative to the measured capacity.", "rate")
    plan = workload.Plan(
        few=few, many=many, requests=requests, duration=duration, alphas=tuple(alpha or (1.0, 0.3)),
        shares=() if rate else tuple(share or (0.7, 1.2)), rates=tuple(rate or ()), cv=cv,
        prompt=_parse_range(prompt, "prompt"), output=_parse_range(output, "output"), seed=seed, slo=slo,
        repeats=repeats,
    )  # fmt: skip
    plan.check()
    names = [f"{prefix}{i}" for i in range(many)]
    first_seed = secrets.randbits(32) if prompt_seed is None else prompt_seed

    def bodies(number: int) -> Body:
        run_seed = (first_seed + number * 2_654_435_761) % 2**32
        return workload.completion_body(names, vocab, text, run_seed, chat=chat, ignore_eos=ignore_eos)

    client = workload.Client(url, bodies, _choose_key(context, api_key, local_key, url))
    capacity, loads = workload.compare(client, plan, report.log)
    rows, stats = workload.ratios(loads), client.stats()
    result = report.result(
        {
            "url": url,
            "models": f"{prefix}0 to {prefix}{many - 1}",
            "vocab": vocab,
            "text": text,
            "chat": chat,
            "ignore_eos": ignore_eos,
            "prompt_seed": first_seed,
            **asdict(plan),
        },
        {"capacity": capacity, "runs": [run.as_dict() for run in loads], "ratios": rows, "server": stats},
    )
    for warning in _warnings(stats, many):
        report.log(warning)
    for reason in dict.fromkeys(reason for run in loads for reason in run.summary.reasons):
        report.log(f"failed: {reason}")
    report.show(result, _ratio_table(rows, plan), as_json, out, "slora")
    if out is not None:
        plots.loads(out / "slora.png", f"S-LoRA workload, {few} and {many} adapters", loads)


def _ratio_table(rows: Sequence[Mapping[str, Any]], plan: Plan) -> Table:
    from benchmarks.client import format_number

    table = report.table(
        "alpha", "requests/s", "of capacity", f"throughput, {plan.many} over {plan.few}",
        "p99 of time to first token, same", "failed",
        title=f"S-LoRA workload, {plan.many} over {plan.few} adapters, medians of {plan.repeats}",
    )  # fmt: skip
    for row in rows:
        values = [format_number(row[k], ".2f") for k in ("throughput", "ttft_p99")]
        share = "" if row["share"] is None else f"{row['share']:.2f}"
        failed = ", ".join(f"{n} with {name}" for name, n in row["failed"].items() if n) or "0"
        table.add_row(f"{row['alpha']:.2f}", f"{row['rate']:.2f}", share, *values, failed)
    return table


def _warnings(stats: Mapping[str, int] | None, many: int) -> list[str]:
    """Conditions of the server that differ from the paper's."""
    found = []
    if stats is not None and stats["adapters_in_ram"] < many:
        found.append(f"only {stats['adapters_in_ram']} of {many} adapters fit into RAM (see --adapter-ram)")
    if stats is not None and stats["prefix_tokens_found"]:
        found.append(f"{stats['prefix_tokens_found']} prompt tokens came from the prefix cache (see --no-prefix-cache)")
    return found


def load(
    context: typer.Context,
    url: Url,
    models: Annotated[list[str], typer.Option("--model", help="Model names, used in turn. Repeatable.")],
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight (closed loop).")] = 16,
    rate: Annotated[float | None, typer.Option(help="Requests per second (open loop).")] = None,
    cv: Cv = 1.0,
    slo: Slo = 6.0,
    requests: Annotated[int, typer.Option(min=1, help="Number of requests.")] = 64,
    prompt_tokens: Annotated[int, typer.Option(min=1, max=MAX_LENGTH, help="Prompt length.")] = PROMPT_TOKENS,
    new_tokens: Annotated[int, typer.Option(min=1, max=MAX_LENGTH, help="Answer length.")] = NEW_TOKENS,
    prompt_seed: PromptSeed = None,
    vocab: Vocab = 40_000,
    text: AsText = False,
    chat: AsChat = False,
    ignore_eos: IgnoreEos = True,
    api_key: ApiKey = "",
    local_key: LocalKey = "",
    llama: Annotated[bool, typer.Option(help="llama-server: select adapters by their --lora number.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Send requests to a running server, with a fixed concurrency or, with --rate, at a fixed rate."""
    report.check_extra()
    report.check_output(out)
    from benchmarks.client import NoAnswer, closed_loop, format_number, open_loop, run, timed
    from benchmarks.slora import check_positive, completion_body, llama_body
    from benchmarks.workloads import closed, spread

    rates = () if rate is None else (rate,)
    check_positive({"cv": (cv,), "slo": (slo,), "rate": rates, "requests": (requests,), "concurrency": (concurrency,)})
    seed = secrets.randbits(32) if prompt_seed is None else prompt_seed
    form = {"chat": chat, "ignore_eos": ignore_eos}
    if llama:
        body = llama_body(len(models), vocab, text, seed, **form)
    else:
        body = completion_body(models, vocab, text, seed, **form)
    arrivals = closed(requests, list(range(len(models))), prompt_tokens, new_tokens)
    key = _choose_key(context, api_key, local_key, url)
    mode: dict[str, Any]
    if rate is None:
        mode, title = {"concurrency": concurrency}, f"{concurrency} in flight"
        running = closed_loop(url, arrivals, body, concurrency, key=key)
    else:
        mode, title = {"rate": rate, "cv": cv}, f"{rate:g} per second"
        running = open_loop(url, spread(arrivals, rate, cv), body, key=key)
    _, summary = run(timed(running, slo))
    if not summary.finished:
        raise NoAnswer(f"None of {requests} requests was answered. The first error: {summary.reasons[0]}")
    parameters = {"url": url, "models": models, **mode, "slo": slo, "requests": requests, "vocab": vocab, "text": text}
    parameters |= {"prompt_seed": seed, "llama": llama, **form}
    parameters |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    table = report.table("", "", title=f"{requests} requests, {title}")
    for name, value in summary.as_dict().items():
        unit = " s" if name.startswith(("seconds", "ttft", "tpot", "e2e")) else ""
        number = isinstance(value, float | int)
        table.add_row(name, format_number(value, unit=unit) if number else Text("\n".join(value) or "none"))
    if summary.short:
        report.log(f"{summary.short} answers are shorter than requested, so the workload is smaller")
    report.show(report.result(parameters, summary.as_dict()), table, as_json, out, "load")


def _parse_range(text: str, param: str) -> tuple[int, int]:
    """(low, high) of LOW:HIGH. Raises BadSetting."""
    from server.errors import BadSetting

    found = re.fullmatch(r"(\d{1,6}):(\d{1,6})", text.strip())
    low, high = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= low < high <= MAX_LENGTH:
        raise BadSetting(
            f"--{param} must be LOW:HIGH with whole numbers from 1 to {MAX_LENGTH} and LOW below HIGH, not {text!r}.",
            param,
        )
    return low, high


def _choose_key(context: typer.Context, given: str, local: str, url: str) -> str:
    """The key for the server: --api-key, else this machine's own keys for a local server, else OPENAI_API_KEY."""
    from benchmarks.client import is_local

    source = context.get_parameter_source("api_key")
    explicit = source is not None and source.name == "COMMANDLINE"
    if local and not explicit and is_local(url):
        given = local
    return next((entry.strip() for entry in re.split(r"[,\n]", given) if entry.strip()), "")
