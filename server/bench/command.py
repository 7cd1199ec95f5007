"""`loramux bench`: the figures of docs/benchmarks.md, each by one command, as a table, JSON and a picture.

Owns arguments and output. What is measured, and how, is in the other modules of this package.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import json
import math
import re
import secrets
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from server.bench.client import Body
    from server.model.loader import Base
    from server.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Measure this server, its steps, and its peers.")
console = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the JSON, and a picture where there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str | None, typer.Option(help="Catalogue name, folder, .gguf file or hub id. [as served]")]
State = Annotated[
    Path | None, typer.Option(help="Where models, the cache and synthetic adapters are kept. [as served]")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of the kernels, and of each peer.")]
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
SEED = 3
"""Of the prompts that the peers and we are asked."""
DRAWS = 20
"""Draws of a prompt before one is taken whose text is not read as the same ids: a peer that is given text should find
them in it."""
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
    _make_room(out)
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
    result = _report(
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
    table = _table(
        "step", "ms", "of the roofline", title=f"{base.name}, {base.backend.name} kernels, {threads} threads"
    )
    for t in times:
        table.add_row(t.name, f"{t.seconds * 1e3:.2f}", f"{t.roofline:.2f}")
    for name, ratio in ratios.items():
        table.add_row(name, f"x {ratio:.2f}", "")
    _show(result, table, as_json, out, "steps")


@app.command()
def peers(
    config: Annotated[Path, typer.Argument(help="TOML: which peers are installed, and where (docs/benchmarks.md).")],
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    rounds: Annotated[int, typer.Option(min=1)] = 3,
    requests: Annotated[int, typer.Option(min=1)] = 16,
    adapters: Annotated[bool, typer.Option(help="A different adapter for each request.")] = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """In process: decode and prefill beside every peer that is installed, in both orders, medians, ratios."""
    _extra()
    _make_room(out)
    from server.bench import compare, plots
    from server.bench.export import export_base
    from server.bench.inprocess import InProcess
    from server.bench.synthetic import write_adapter

    named = compare.installed(config)
    settings = _settings(model, state_dir)
    base, folder = _base(settings), settings.state_dir / "bench"
    exported = export_base(base, folder / "exported")
    ranks = [RANKS[i % len(RANKS)] for i in range(requests if adapters else 0)]
    paths = [write_adapter(folder / f"peer{i}", base.shapes(), rank=rank, seed=200 + i) for i, rank in enumerate(ranks)]
    job = _job(base, paths, requests)
    with InProcess(base, paths, threads=threads, max_batch=requests, max_step_tokens=requests * PROMPT) as ours:
        mixes = [ours.mix([(n, 1.0)] if n >= 0 else []) for n in job.adapter_of]
        contestants: dict[str, compare.Contestant] = {
            "loramux": lambda job: compare.rates(job, *ours.rates(job.prompts, mixes, job.new_tokens))
        }
        contestants |= compare.contestants(named, exported, threads, bool(paths))
        contestants["loramux"](job)
        measured = compare.rounds(job, contestants, rounds, lambda line: console.print(line, markup=False))
    table = measured.table
    asked = {"base": _named(base), "peers": named, "ranks": ranks, "prompt_tokens": PROMPT, "new_tokens": NEW}
    result = _report(
        {
            **asked,
            "threads": threads,
            "rounds": rounds,
            "seed": SEED,
            "adapter_seeds": [200 + i for i in range(len(ranks))],
        },
        {
            "requests": requests,
            "adapters": len(paths),
            "rates": compare.as_json(table),
            "ratios": compare.ratios(table),
            "failed": measured.failed,
        },
    )
    shown = _table("", "prefill tok/s", "decode tok/s", "we are faster by (prefill, decode)")
    for name, row in table.items():
        ratio = result["ratios"].get(name)
        ahead = f"{ratio['prefill']:.1f}, {ratio['decode']:.1f}" if ratio else ""
        shown.add_row(name, f"{row.median.prefill:,.0f}", f"{row.median.decode:,.0f}", ahead)
    for name in measured.failed:
        shown.add_row(f"{name} failed", "", "", f"in round {len(measured.rows[name].rounds) + 1} of {rounds}")
    title = f"decode, {requests} requests, {len(paths)} adapters"
    _show(result, shown, as_json, out, f"peers-{requests}-{len(paths)}")
    if out is not None:
        rates = {name: row.median.decode for name, row in table.items()}
        plots.bars(out / f"peers-{requests}-{len(paths)}.png", title, "tokens/s", rates)
    for name, reason in measured.failed.items():
        console.print(f"error: the peer {name} failed: {reason}", markup=False)
    if measured.failed:
        raise typer.Exit(1)


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
    _make_room(out)
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
    result = _report(
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
    table = _table(
        "alpha", "requests/s", "of capacity", f"throughput, {many} over {few}", "p99 of first token", "failed"
    )
    for row in rows:
        told = [figure(row[k], ".2f") for k in ("throughput", "ttft_p99")]
        of = "" if row["share"] is None else f"{row['share']:.2f}"
        failed = ", ".join(f"{n} with {name}" for name, n in row["failed"].items() if n) or "0"
        table.add_row(f"{row['alpha']:.2f}", f"{row['rate']:.2f}", of, *told, failed)
    for reason in dict.fromkeys(reason for run in loads for reason in run.summary.reasons):
        console.print(f"failed: {reason}", markup=False)
    _show(result, table, as_json, out, "slora")
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
    _make_room(out)
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
    told = _report({**asked, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}, summary.as_dict())
    table = _table("", "", title=f"{requests} requests, {title}")
    for name, value in summary.as_dict().items():
        unit = " s" if name.startswith(("seconds", "ttft", "tpot", "e2e")) else ""
        number = isinstance(value, float | int)
        table.add_row(name, figure(value, unit=unit) if number else Text("\n".join(value) or "none"))
    if summary.short:
        console.print(f"{summary.short} answers are shorter than asked: it is another workload", markup=False)
    _show(told, table, as_json, out, "load")


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
    from server.errors import BadSetting

    for module in ("aiohttp", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise BadSetting(f"{module} is missing, which this command needs: pip install 'loramux[bench]'", "bench")


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


def _job(base: Any, paths: list[Path], requests: int):  # type: ignore[no-untyped-def]
    import numpy as np

    from server.bench.compare import Job

    random = np.random.RandomState(SEED)
    tokenizer = base.vocabulary.tokenizer
    prompts: list[list[int]] = []
    for draw in range(DRAWS * requests):
        drawn = tokenizer.decode(random.randint(100, base.config.vocab_size - 100, 2 * PROMPT).tolist())
        prompt = tokenizer.encode(drawn, add_special_tokens=False).ids[:PROMPT]
        found = tokenizer.encode(tokenizer.decode(prompt), add_special_tokens=False).ids == prompt
        if len(prompt) == PROMPT and (found or draw >= (DRAWS - 1) * requests):
            prompts.append(prompt)
        if len(prompts) == requests:
            break
    texts = [tokenizer.decode(p) for p in prompts]
    which = list(range(requests)) if paths else [-1] * requests
    return Job(prompts, texts, paths, which, NEW)


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
    source = context.get_parameter_source("api_key")
    said = source is not None and source.name == "COMMANDLINE"
    if own and not said and _is_here(url):
        given = own
    return next((entry.strip() for entry in re.split(r"[,\n]", given) if entry.strip()), "")


def _is_here(url: str) -> bool:
    """Whether a URL is of this machine."""
    try:
        host = urlsplit(url if "//" in url else f"//{url}").hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _named(base: Any) -> dict[str, str]:
    return {"name": base.name, "digest": base.id}


def _report(asked: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file has: what was asked, the machine, and what came of it."""
    from server.bench.machine import describe

    return {"asked": asked, "machine": describe(), **found}


def _make_room(out: Path | None) -> None:
    """Find out before anything is measured whether what comes of it can be written. Raises OSError."""
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass


def _table(*headings: str, title: str | None = None) -> Table:
    """A table that folds what its terminal is too narrow for, and cuts no figure off."""
    return Table(*(Column(heading, overflow="fold") for heading in headings), title=title)


def _show(result: Mapping[str, Any], table: Table, as_json: bool, out: Path | None, name: str) -> None:
    text = json.dumps(_finite(result), indent=1, allow_nan=False)
    if out is not None:
        (out / f"{name}.json").write_text(text + "\n")
    if as_json:
        typer.echo(text)
    else:
        Console().print(table)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not: the rate of nothing, a wait without end, a ratio of those."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
