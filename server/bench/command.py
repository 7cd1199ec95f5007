"""`loramux bench`: the figures of docs/benchmarks.md, each by one command, as a table, JSON and a picture.

Owns arguments and output. What is measured, and how, is in the other modules of this package.
"""

from __future__ import annotations

import importlib.util
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from server.bench import results
from server.settings import given_path

if TYPE_CHECKING:
    from server.bench.client import Body
    from server.model.loader import Base
    from server.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Measure this server, its steps, and its peers.")
console = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the JSON, and for a picture.", callback=given_path)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str | None, typer.Option(help="Catalogue name, folder, .gguf file or hub id. [as served]")]
State = Annotated[
    Path | None, typer.Option(help="Where models, the cache and synthetic adapters are kept. [as served]")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the kernels, and of each peer.")]
Config = Annotated[Path, typer.Argument(help="TOML: which peers are installed, and where (docs/benchmarks.md).")]
Rounds = Annotated[int, typer.Option(min=1)]
AtOnce = Annotated[int, typer.Option("--requests", min=1, help="At once.")]
Different = Annotated[bool, typer.Option("--adapters/--no-adapters", help="A different adapter for each request.")]
Kernels = Annotated[str | None, typer.Option(help="auto, native, aten or reference. [as served]")]

Url = Annotated[str, typer.Argument(help="Any OpenAI-compatible server, with or without /v1 at the end.")]
Vocab = Annotated[int, typer.Option(min=101, help="Prompts are random token ids below this.")]
AsText = Annotated[bool, typer.Option("--text", help="Prompts of so many common words: some servers take no ids.")]
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

RANKS = (8, 16, 24, 32) * 4
ADAPTER_SEED = 200
"""Of the first adapter that the peers and we are given."""
LONGEST = 1 << 15
"""Tokens of a prompt or an answer that can be asked for."""
PROMPT, NEW = 128, 64


@app.command()
def steps(
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    kernels: Kernels = None,
    repeats: Annotated[int, typer.Option(min=1)] = 60,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Decode steps with and without adapters, as ratios and as shares of the roofline."""
    results.make_room(out)
    from adapters.peft_format import read_folder
    from server.bench import roofline
    from server.bench import steps as measured
    from server.bench.synthetic import write_adapter
    from server.engine.runner import make_runner

    settings = _settings(model, state_dir, kernels)
    base, folder = _base(settings), settings.state_dir / "bench"
    ranks = (*RANKS, 8, 8, 8, 8, 32)
    paths = [write_adapter(folder / f"step{i}", base.shapes(), rank=rank, seed=100 + i) for i, rank in enumerate(ranks)]
    slots = [base.prepare(read_folder(p, name=p.name, shapes=base.shapes())) for p in paths]
    shapes = measured.standard_shapes(RANKS, (16, 17, 18, 19), 20)
    runner = make_runner(base, len(slots), threads)
    meter = roofline.Meter(threads)
    times = measured.measure(base, runner, slots, shapes, meter, repeats)
    ceilings = meter.median()
    ratios = measured.overheads(times)
    asked = {"base": _named(base), "ranks": ranks, "context": shapes[0].context, "threads": threads, "repeats": repeats}
    result = results.report(
        {**asked, "seeds": [100 + i for i in range(len(ranks))]},
        {
            "ceilings": {
                "GB_per_second": ceilings.bytes_per_second / 1e9,
                "GOP_per_second": ceilings.ops_per_second / 1e9,
            },
            "steps": [
                {
                    "name": t.name,
                    "ms": t.seconds * 1e3,
                    "roofline": t.roofline,
                    "bytes": t.cost.nbytes,
                    "operations": t.cost.ops,
                }
                for t in times
            ],
            "ratios": ratios,
            "kernels": base.backend.name,
        },
    )
    table = results.table(
        "step", "ms", "of the roofline", title=f"{base.name}, {base.backend.name} kernels, {threads} threads"
    )
    for t in times:
        table.add_row(t.name, f"{t.seconds * 1e3:.2f}", f"{t.roofline:.2f}")
    for name, ratio in ratios.items():
        table.add_row(name, f"x {ratio:.2f}", "")
    results.show(result, table, as_json, out, "steps")


@app.command()
def peers(
    config: Config,
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    rounds: Rounds = 3,
    requests: AtOnce = 16,
    adapters: Different = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """In process: decode and prefill beside every peer that is installed, in both orders, medians, ratios."""
    _extra()
    results.make_room(out)
    from server.bench import compare, plots
    from server.bench.export import export_base
    from server.bench.inprocess import InProcess

    named = compare.installed(config)
    settings = _settings(model, state_dir)
    base, folder = _base(settings), settings.state_dir / "bench"
    exported = export_base(base, folder / "exported")
    ranks = _ranks(requests, adapters)
    paths = _write(base, folder / "peer", ranks)
    job = compare.drawn(base, paths, requests, PROMPT, NEW)
    with InProcess(base, paths, threads=threads, max_batch=requests, max_step_tokens=requests * PROMPT) as ours:
        mixes = [ours.mix([(n, 1.0)] if n >= 0 else []) for n in job.adapter_of]
        contestants: dict[str, compare.Contestant] = {
            compare.OURS: lambda job: compare.rates(job, *ours.rates(job.prompts, mixes, job.new_tokens))
        }
        contestants |= compare.contestants(named, exported, threads, bool(paths))
        contestants[compare.OURS](job)
        measured = compare.rounds(job, contestants, rounds, lambda line: console.print(line, markup=False))
    table = measured.table
    result = results.report(
        {**_compared(base, named, ranks, threads), "rounds": rounds, "seed": compare.SEED},
        {
            "requests": requests,
            "adapters": len(paths),
            "rates": compare.as_json(table),
            "ratios": compare.ratios(table),
            "failed": measured.failed,
            "kernels": base.backend.name,
        },
    )
    shown = results.table("", "prefill tok/s", "decode tok/s", "we are faster by (prefill, decode)")
    for name, row in table.items():
        ratio = result["ratios"].get(name)
        ahead = f"{ratio['prefill']:.1f}, {ratio['decode']:.1f}" if ratio else ""
        shown.add_row(name, f"{row.median.prefill:,.0f}", f"{row.median.decode:,.0f}", ahead)
    for name in measured.failed:
        shown.add_row(f"{name} failed", "", "", f"in round {len(measured.rows[name].rounds) + 1} of {rounds}")
    title = f"decode, {requests} requests, {len(paths)} adapters"
    results.show(result, shown, as_json, out, f"peers-{requests}-{len(paths)}")
    if out is not None:
        rates = {name: row.median.decode for name, row in table.items()}
        plots.bars(out / f"peers-{requests}-{len(paths)}.png", title, "tokens/s", rates)
    _end(measured.failed)


@app.command()
def servers(
    config: Config,
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    rounds: Rounds = 3,
    requests: AtOnce = 16,
    adapters: Different = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Over HTTP: our server beside every other that is installed, and beside our engine in process."""
    _extra()
    results.make_room(out)
    from server.bench import compare, plots
    from server.bench import servers as over_http

    named = compare.installed(config)
    settings = _settings(model, state_dir)
    base, ranks = _base(settings), _ranks(requests, adapters)
    with tempfile.TemporaryDirectory(prefix="loramux-") as fresh:
        served = over_http.Served(
            base, _write(base, Path(fresh) / "adapters" / "s", ranks), requests, PROMPT, NEW, threads
        )
        place = over_http.Place(settings.model, settings.state_dir, Path(fresh))
        measured = over_http.compare(named, served, place, rounds, lambda line: console.print(line, markup=False))
    result = results.report(
        {**_compared(base, named, ranks, threads), "rounds": rounds},
        {"requests": requests, "adapters": len(ranks), **asdict(measured), "kernels": base.backend.name},
    )
    table = results.table("", "decode tok/s", "all tok/s", "first token", "we are faster by (decode, all)")
    for name, row in measured.medians.items():
        rates = [f"{row[key]:,.0f}" if key in row else "" for key in over_http.SHOWN]
        ratio = measured.ratios.get(name, {})
        ahead = ", ".join(f"{ratio[key]:.2f}" for key in over_http.SHOWN if key in ratio)
        table.add_row(name, *rates, f"{row['ttft_p50']:.3f} s" if "ttft_p50" in row else "", ahead)
    name = f"servers-{requests}-{len(ranks)}"
    results.show(result, table, as_json, out, name)
    if out is not None:
        title = f"over HTTP, {requests} requests, {len(ranks)} adapters"
        plots.bars(out / f"{name}.png", title, "tokens/s", {n: row["whole"] for n, row in measured.medians.items()})
    _end(measured.failed)


@app.command()
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
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind; few and many take turns.")] = 1,
    vocab: Vocab = 40_000,
    text: AsText = False,
    api_key: ApiKey = "",
    own_key: OwnKey = "",
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """S-LoRA's workload against a running server: many adapters beside few."""
    from server.errors import BadSetting

    _extra()
    results.make_room(out)
    from server.bench import plots
    from server.bench import slora as workload
    from server.bench.client import figure

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
        return workload.body_of(names, vocab, text, (drawn + number * 2_654_435_761) % 2**32)

    client = workload.Client(url, bodies, _key(context, api_key, own_key, url))
    most, loads = workload.compare(client, plan, lambda line: console.print(line, markup=False))
    rows = workload.ratios(loads)
    result = results.report(
        {
            "url": url,
            "models": f"{prefix}0 to {prefix}{many - 1}",
            "vocab": vocab,
            "text": text,
            "prompt_seed": drawn,
            **asdict(plan),
        },
        {"capacity": most, "runs": [run.as_dict() for run in loads], "ratios": rows},
    )
    table = results.table(
        "alpha", "requests/s", "of capacity", f"throughput, {many} over {few}", "p99 of first token", "failed"
    )
    for row in rows:
        told = [figure(row[k], ".2f") for k in ("throughput", "ttft_p99")]
        of = "" if row["share"] is None else f"{row['share']:.2f}"
        failed = ", ".join(f"{n} with {name}" for name, n in row["failed"].items() if n) or "0"
        table.add_row(f"{row['alpha']:.2f}", f"{row['rate']:.2f}", of, *told, failed)
    for reason in dict.fromkeys(reason for run in loads for reason in run.summary.reasons):
        console.print(f"failed: {reason}", markup=False)
    results.show(result, table, as_json, out, "slora")
    if out is not None:
        plots.loads(out / "slora.png", f"S-LoRA workload, {few} and {many} adapters", loads)


@app.command()
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
    api_key: ApiKey = "",
    own_key: OwnKey = "",
    llama: Annotated[bool, typer.Option(help="Name adapters as llama-server does: --lora numbers, 0 first.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A closed loop, so many requests in flight until all are answered, or an open one, so many a second."""
    _extra()
    results.make_room(out)
    from server.bench.client import NoAnswer, closed_loop, figure, open_loop, run, timed
    from server.bench.slora import body_of, check_positive, llama_body
    from server.bench.workloads import closed, spread

    rates = () if rate is None else (rate,)
    check_positive({"cv": (cv,), "slo": (slo,), "rate": rates, "requests": (requests,), "concurrency": (concurrency,)})
    drawn = secrets.randbits(32) if prompt_seed is None else prompt_seed
    body = llama_body(len(models), vocab, text, drawn) if llama else body_of(models, vocab, text, drawn)
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
    asked |= {"text": text, "prompt_seed": drawn, "llama": llama}
    told = results.report({**asked, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}, summary.as_dict())
    table = results.table("", "", title=f"{requests} requests, {title}")
    for name, value in summary.as_dict().items():
        unit = " s" if name.startswith(("seconds", "ttft", "tpot", "e2e")) else ""
        number = isinstance(value, float | int)
        table.add_row(name, figure(value, unit=unit) if number else Text("\n".join(value) or "none"))
    if summary.short:
        console.print(f"{summary.short} answers are shorter than asked: it is another workload", markup=False)
    results.show(told, table, as_json, out, "load")


@app.command()
def adapters(
    folder: Annotated[Path, typer.Argument(help="Where to write them, one PEFT folder each.")],
    count: Annotated[int, typer.Option(min=1)] = 1000,
    prefix: str = "s",
    model: Model = None,
    state_dir: State = None,
) -> None:
    """Write synthetic adapters of ranks 64, 32, 16, 8 in turn, for the S-LoRA workload."""
    from rich.progress import track

    from server.bench.synthetic import write_adapter
    from server.bench.workloads import S2_RANKS

    shapes = _base(_settings(model, state_dir, "reference")).shapes()
    for i in track(range(count), "writing adapters", console=console):
        write_adapter(folder / f"{prefix}{i}", shapes, rank=S2_RANKS[i % 4], seed=i)


def _extra() -> None:
    """Raises BadSetting where what clients and pictures need is not installed."""
    from server.errors import BadSetting, to_install

    for module in ("aiohttp", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise BadSetting(f"{module} is missing, which this command needs: {to_install('bench')}", "bench")


def _settings(model: str | None, state_dir: Path | None, kernels: str | None = None) -> Settings:
    """What a server here would go by, but for what is given. Raises BadSetting."""
    from server.settings import load_settings

    given = {"model": model, "state_dir": state_dir, "kernels": kernels}
    return load_settings({**given, "insecure": True})  # nothing listens


def _base(settings: Settings) -> Base:
    from server.kernels import choose
    from server.model.loader import load_base
    from server.sources import resolve_model

    found = resolve_model(settings.model, settings.state_dir)
    # What is measured here, and the peers, are of the processor; a GPU has a script of its own, benchmarks/gpu.py.
    kernels = "auto" if settings.kernels == "cuda" else settings.kernels
    return load_base(found.path, name=found.name, backend=choose(kernels, "cpu"), **settings.packing)


def _ranks(requests: int, adapters: bool) -> list[int]:
    """Of the adapters of so many requests."""
    return [RANKS[i % len(RANKS)] for i in range(requests if adapters else 0)]


def _write(base: Base, prefix: Path, ranks: Sequence[int]) -> list[Path]:
    """An adapter of each rank, the same ones each time, in folders that begin with `prefix`."""
    from server.bench.synthetic import write_adapter

    return [
        write_adapter(prefix.with_name(f"{prefix.name}{i}"), base.shapes(), rank=rank, seed=ADAPTER_SEED + i)
        for i, rank in enumerate(ranks)
    ]


def _compared(base: Base, named: Mapping[str, Any], ranks: Sequence[int], threads: int) -> dict[str, Any]:
    """What is asked of all."""
    seeds = [ADAPTER_SEED + i for i in range(len(ranks))]
    asked = {"base": _named(base), "peers": named, "ranks": ranks, "adapter_seeds": seeds, "threads": threads}
    return {**asked, "prompt_tokens": PROMPT, "new_tokens": NEW}


def _end(failed: Mapping[str, str]) -> None:
    """Tell why peers failed. Raises Exit if one did."""
    for name, reason in failed.items():
        console.print(f"error: the peer {name} failed: {reason}", markup=False)
    if failed:
        raise typer.Exit(1)


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
    from server.bench.client import is_here

    source = context.get_parameter_source("api_key")
    said = source is not None and source.name == "COMMANDLINE"
    if own and not said and is_here(url):
        given = own
    return next((entry.strip() for entry in re.split(r"[,\n]", given) if entry.strip()), "")


def _named(base: Any) -> dict[str, str]:
    return {"name": base.name, "digest": base.id}
