"""`loramux bench`: the figures of docs/benchmarks.md, each by one command, as a table, JSON and a picture.

Owns arguments and output. What is measured, and how, is in the other modules of this package.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks import online, results
from benchmarks.options import NEW, PROMPT, AsJson, Out, console, extra

if TYPE_CHECKING:
    from server.model.loader import Base
    from server.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Measure this server, its steps, and its peers.")

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

RANKS = (8, 16, 24, 32) * 4
ADAPTER_SEED = 200
"""Of the first adapter that the peers and we are given."""


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
    from benchmarks import roofline
    from benchmarks import steps as measured
    from benchmarks.synthetic import write_adapter
    from server.engine.backends import make_runner

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
    extra()
    results.make_room(out)
    from benchmarks import compare, plots, roofline
    from benchmarks.hf_export import export_base
    from benchmarks.local_engine import LocalEngine

    named = compare.installed(config)
    settings = _settings(model, state_dir)
    base, folder = _base(settings), settings.state_dir / "bench"
    exported = export_base(base, folder / "exported")
    ranks = _ranks(requests, adapters)
    paths = _write(base, folder / "peer", ranks)
    job = compare.drawn(base, paths, requests, PROMPT, NEW)
    with LocalEngine(base, paths, threads=threads, max_batch=requests, max_step_tokens=requests * PROMPT) as ours:
        mixes = [ours.mix([(n, 1.0)] if n >= 0 else []) for n in job.adapter_of]
        meter, shares = roofline.Meter(threads), list[float]()

        def us(job: compare.Job) -> compare.Rates:
            ceilings = meter.take()
            first, last = ours.rates(job.prompts, mixes, job.new_tokens)
            least = sum(cost.seconds(ceilings) for cost in ours.decode_costs(job.prompts, mixes, job.new_tokens))
            shares.append(least / (last - first))
            return compare.rates(job, first, last)

        contestants: dict[str, compare.Contestant] = {compare.OURS: us}
        contestants |= compare.contestants(named, exported, threads, bool(paths))
        us(job)
        shares.clear()  # the first run has warmed caches
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
            "roofline": shares,
            "kernels": base.backend.name,
        },
    )
    asked = f"{requests} requests, {len(paths)} adapters"
    shown = results.table(
        "", "prefill tok/s", "decode tok/s", "of the roofline", "faster by (prefill, decode)",
        title=f"{base.name}, {asked}, {base.backend.name} kernels, {threads} threads",
    )  # fmt: skip
    for name, row in table.items():
        ratio = result["ratios"].get(name)
        ahead = f"{ratio['prefill']:.1f}, {ratio['decode']:.1f}" if ratio else ""
        of = f"{statistics.median(shares):.2f}" if name == compare.OURS else ""
        shown.add_row(name, f"{row.median.prefill:,.0f}", f"{row.median.decode:,.0f}", of, ahead)
    for name in measured.failed:
        shown.add_row(f"{name} failed", "", "", "", f"in round {len(measured.rows[name].rounds) + 1} of {rounds}")
    title = f"decode, {asked}"
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
    extra()
    results.make_room(out)
    from benchmarks import compare, plots
    from benchmarks import servers as over_http
    from benchmarks.client import figure

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
    title = f"over HTTP, {requests} requests, {len(ranks)} adapters"
    table = results.table(
        "", "steady decode tok/s", "decode tok/s", "whole tok/s", "first token", "loramux over it (the same three)",
        title=f"{base.name}, {title}, {base.backend.name} kernels, {threads} threads",
    )  # fmt: skip
    for name, row in measured.medians.items():
        rates = [figure(row[key], ",.0f") if key in row else "" for key in over_http.RATES]
        ratio = measured.ratios.get(name, {})
        over = ", ".join(figure(ratio[key], ".2f") if key in ratio else "-" for key in over_http.RATES) if ratio else ""
        table.add_row(name, *rates, figure(row["ttft_p50"], ".3f", " s") if "ttft_p50" in row else "", over)
    name = f"servers-{requests}-{len(ranks)}"
    results.show(result, table, as_json, out, name)
    if out is not None:
        plots.bars(out / f"{name}.png", title, "tokens/s", {n: row["whole"] for n, row in measured.medians.items()})
    _end(measured.failed)


app.command()(online.slora)
app.command()(online.load)


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

    from benchmarks.synthetic import write_adapter
    from benchmarks.workloads import S2_RANKS

    shapes = _base(_settings(model, state_dir, "reference")).shapes()
    for i in track(range(count), "writing adapters", console=console):
        write_adapter(folder / f"{prefix}{i}", shapes, rank=S2_RANKS[i % 4], seed=i)


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
    from benchmarks.synthetic import write_adapter

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


def _named(base: Any) -> dict[str, str]:
    return {"name": base.name, "digest": base.id}
