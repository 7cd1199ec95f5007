"""`loramux bench steps`, `peers`, `servers` and `adapters`; `slora` and `load` are in `online`."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import online, report
from benchmarks.report import NEW_TOKENS, PROMPT_TOKENS, AsJson, Out

if TYPE_CHECKING:
    from server.model.loader import Base
    from server.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Benchmark decode steps, a running server, and peers.")

Model = Annotated[str | None, typer.Option(help="Catalogue name, folder, .gguf file or hub id. Default: as for serve.")]
State = Annotated[
    Path | None, typer.Option(help="Folder for models, the cache and synthetic adapters. Default: as for serve.")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads of loramux and of each peer.")]
Config = Annotated[Path, typer.Argument(help="TOML file with the installed peers (docs/benchmarks.md).")]
Rounds = Annotated[int, typer.Option(min=1, help="Measurements of each contestant.")]
Requests = Annotated[int, typer.Option("--requests", min=1, help="Concurrent requests.")]
WithAdapters = Annotated[
    bool, typer.Option("--adapters/--no-adapters", help="Use a different adapter for each request, or none.")
]
Kernels = Annotated[str | None, typer.Option(help="auto, native, aten or reference. Default: as for serve.")]

RANKS = (8, 16, 24, 32) * 4
PEER_SEED, STEP_SEED = 200, 100
"""Seeds of the first adapter."""


@app.command()
def steps(
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    kernels: Kernels = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each step.")] = 60,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Time decode steps with and without adapters, as ratios and as shares of the roofline."""
    report.check_output(out)
    from adapters.peft_format import read_folder
    from benchmarks import roofline
    from benchmarks import steps as measured
    from benchmarks.synthetic import write_adapter
    from server.engine.backends import make_runner

    settings = _settings(model, state_dir, kernels)
    base, folder = _load_base(settings), settings.state_dir / "bench"
    ranks = (*RANKS, 8, 8, 8, 8, 32)
    seeds = [STEP_SEED + i for i in range(len(ranks))]
    paths = [
        write_adapter(folder / f"step{i}", base.shapes(), rank=rank, seed=seeds[i]) for i, rank in enumerate(ranks)
    ]
    slots = [base.prepare(read_folder(p, name=p.name, shapes=base.shapes())) for p in paths]
    shapes = measured.standard_shapes(RANKS, (16, 17, 18, 19), 20)
    runner = make_runner(base, len(slots), threads)
    meter = roofline.Meter(threads)
    times = measured.measure(base, runner, slots, shapes, meter, repeats)
    limits = meter.median()
    ratios = measured.overheads(times)
    parameters = {"base": _identity(base), "ranks": ranks, "context": shapes[0].context, "threads": threads}
    result = report.result(
        {**parameters, "repeats": repeats, "seeds": seeds},
        {
            "ceilings": {"GB_per_second": limits.bytes_per_second / 1e9, "GOP_per_second": limits.ops_per_second / 1e9},
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
    table = report.table(
        "step", "ms", "of the roofline", title=f"{base.name}, {base.backend.name} kernels, {threads} threads"
    )
    for t in times:
        table.add_row(t.name, f"{t.seconds * 1e3:.2f}", f"{t.roofline:.2f}")
    for name, ratio in ratios.items():
        table.add_row(name, f"x {ratio:.2f}", "")
    report.show(result, table, as_json, out, "steps")


@app.command()
def peers(
    config: Config,
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    rounds: Rounds = 3,
    requests: Requests = 16,
    adapters: WithAdapters = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare prefill and decoding with installed peers, without HTTP."""
    report.check_extra()
    report.check_output(out)
    from benchmarks import compare, plots
    from benchmarks.hf_export import export_base
    from benchmarks.local_engine import LocalEngine

    installed = compare.read_peers(config)
    settings = _settings(model, state_dir)
    base, folder = _load_base(settings), settings.state_dir / "bench"
    exported = export_base(base, folder / "exported")
    ranks = _ranks(requests, adapters)
    paths = _write_adapters(base, folder / "peer", ranks)
    job = compare.make_job(base, paths, requests, PROMPT_TOKENS, NEW_TOKENS)
    engine = LocalEngine(base, paths, threads=threads, max_batch=requests, max_step_tokens=requests * PROMPT_TOKENS)
    with engine:
        ours, shares = _our_contestant(engine, job, threads)
        contestants = {compare.OURS: ours, **compare.contestants(installed, exported, threads, bool(paths))}
        ours(job)  # warms the caches
        shares.clear()
        measured = compare.measure_rounds(job, contestants, rounds, report.log)
    rows = measured.table
    result = report.result(
        {**_parameters(base, installed, ranks, threads), "rounds": rounds, "seed": compare.SEED},
        {
            "requests": requests,
            "adapters": len(paths),
            "rates": compare.as_json(rows),
            "ratios": compare.ratios(rows),
            "failed": measured.failed,
            "roofline": shares,
            "kernels": base.backend.name,
        },
    )
    title = f"{requests} requests, {len(paths)} adapters"
    table = report.table(
        "", "prefill tokens/s", "decode tokens/s", "of the roofline", "loramux is faster by (prefill, decode)",
        title=f"{base.name}, {title}, {base.backend.name} kernels, {threads} threads",
    )  # fmt: skip
    for name, row in rows.items():
        ratio = result["ratios"].get(name)
        faster = f"{ratio['prefill']:.1f}, {ratio['decode']:.1f}" if ratio else ""
        share = f"{statistics.median(shares):.2f}" if name == compare.OURS else ""
        table.add_row(name, f"{row.median.prefill:,.0f}", f"{row.median.decode:,.0f}", share, faster)
    for name in measured.failed:
        table.add_row(f"{name} failed", "", "", "", f"in round {len(measured.rows[name].rounds) + 1} of {rounds}")
    report.show(result, table, as_json, out, f"peers-{requests}-{len(paths)}")
    if out is not None:
        rates = {name: row.median.decode for name, row in rows.items()}
        plots.bars(out / f"peers-{requests}-{len(paths)}.png", f"decode, {title}", "tokens/s", rates)
    _exit(measured.failed)


def _our_contestant(engine: Any, job: Any, threads: int) -> tuple[Any, list[float]]:
    """loramux as a contestant, and a list that receives its share of the roofline in each run."""
    from benchmarks import compare, roofline

    mixes = [engine.mix([(n, 1.0)] if n >= 0 else []) for n in job.adapter_of]
    meter, shares = roofline.Meter(threads), list[float]()

    def measure(job: compare.Job) -> compare.Rates:
        limits = meter.take()
        first, last = engine.rates(job.prompts, mixes, job.new_tokens)
        minimum = sum(cost.seconds(limits) for cost in engine.decode_costs(job.prompts, mixes, job.new_tokens))
        shares.append(minimum / (last - first))
        return compare.rates(job, first, last)

    return measure, shares


@app.command()
def servers(
    config: Config,
    model: Model = None,
    state_dir: State = None,
    threads: Threads = 2,
    rounds: Rounds = 3,
    requests: Requests = 16,
    adapters: WithAdapters = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Compare with the servers of installed peers over HTTP, and with loramux's engine without HTTP."""
    report.check_extra()
    report.check_output(out)
    from benchmarks import compare, plots
    from benchmarks import servers as over_http
    from benchmarks.client import format_number

    installed = compare.read_peers(config)
    settings = _settings(model, state_dir)
    base, ranks = _load_base(settings), _ranks(requests, adapters)
    with tempfile.TemporaryDirectory(prefix="loramux-") as scratch:
        paths = _write_adapters(base, Path(scratch) / "adapters" / "s", ranks)
        workload = over_http.Workload(base, paths, requests, PROMPT_TOKENS, NEW_TOKENS, threads)
        folders = over_http.Folders(settings.model, settings.state_dir, Path(scratch))
        measured = over_http.compare(installed, workload, folders, rounds, report.log)
    result = report.result(
        {**_parameters(base, installed, ranks, threads), "rounds": rounds},
        {"requests": requests, "adapters": len(ranks), **asdict(measured), "kernels": base.backend.name},
    )
    title = f"over HTTP, {requests} requests, {len(ranks)} adapters"
    table = report.table(
        "", "steady decode tokens/s", "decode tokens/s", "whole tokens/s", "time to first token",
        "loramux is faster by (the same three)",
        title=f"{base.name}, {title}, {base.backend.name} kernels, {threads} threads",
    )  # fmt: skip
    for name, row in measured.medians.items():
        rates = [format_number(row[key], ",.0f") if key in row else "" for key in over_http.RATES]
        ratio = measured.ratios.get(name, {})
        faster = ", ".join(format_number(ratio[k], ".2f") if k in ratio else "-" for k in over_http.RATES)
        ttft = format_number(row["ttft_p50"], ".3f", " s") if "ttft_p50" in row else ""
        table.add_row(name, *rates, ttft, faster if ratio else "")
    name = f"servers-{requests}-{len(ranks)}"
    report.show(result, table, as_json, out, name)
    if out is not None:
        plots.bars(out / f"{name}.png", title, "tokens/s", {n: row["whole"] for n, row in measured.medians.items()})
    _exit(measured.failed)


app.command()(online.slora)
app.command()(online.load)


@app.command()
def adapters(
    folder: Annotated[Path, typer.Argument(help="Folder to write the adapter folders to.")],
    count: Annotated[int, typer.Option(min=1, help="Number of adapters.")] = 1000,
    prefix: Annotated[str, typer.Option(help="Adapters are named prefix0, prefix1, ...")] = "s",
    model: Model = None,
    state_dir: State = None,
) -> None:
    """Write synthetic adapters of ranks 64, 32, 16 and 8 for the S-LoRA benchmark."""
    from rich.progress import track

    from benchmarks.synthetic import write_adapter
    from benchmarks.workloads import S2_RANKS

    shapes = _load_base(_settings(model, state_dir, "reference")).shapes()
    for i in track(range(count), "writing adapters", console=report.console):
        write_adapter(folder / f"{prefix}{i}", shapes, rank=S2_RANKS[i % 4], seed=i)


def _settings(model: str | None, state_dir: Path | None, kernels: str | None = None) -> Settings:
    """The settings of `loramux serve` with the given options. Raises BadSetting."""
    from server.settings import load_settings

    given = {"model": model, "state_dir": state_dir, "kernels": kernels}
    return load_settings({**given, "insecure": True})


def _load_base(settings: Settings) -> Base:
    """The base on the CPU; `benchmarks.gpu` is for GPUs."""
    from server.kernels import choose
    from server.model.loader import load_base
    from server.sources import resolve_model

    found = resolve_model(settings.model, settings.state_dir)
    kernels = "auto" if settings.kernels == "cuda" else settings.kernels
    return load_base(found.path, name=found.name, backend=choose(kernels, "cpu"), **settings.packing)


def _ranks(requests: int, adapters: bool) -> list[int]:
    return [RANKS[i % len(RANKS)] for i in range(requests if adapters else 0)]


def _write_adapters(base: Base, prefix: Path, ranks: Sequence[int]) -> list[Path]:
    """Write an adapter of each rank to the folders `prefix`0, `prefix`1, ..."""
    from benchmarks.synthetic import write_adapter

    return [
        write_adapter(prefix.with_name(f"{prefix.name}{i}"), base.shapes(), rank=rank, seed=PEER_SEED + i)
        for i, rank in enumerate(ranks)
    ]


def _parameters(base: Base, installed: Mapping[str, Any], ranks: Sequence[int], threads: int) -> dict[str, Any]:
    seeds = [PEER_SEED + i for i in range(len(ranks))]
    parameters = {"base": _identity(base), "peers": installed, "ranks": ranks, "adapter_seeds": seeds}
    return {**parameters, "threads": threads, "prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS}


def _exit(failed: Mapping[str, str]) -> None:
    """Print the reasons of failed peers. Exits with status 1 if there are any."""
    for name, reason in failed.items():
        report.log(f"error: the peer {name} failed: {reason}")
    if failed:
        raise typer.Exit(1)


def _identity(base: Base) -> dict[str, str]:
    return {"name": base.name, "digest": base.id}
