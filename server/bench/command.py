"""`loramux bench`: the figures of docs/benchmarks.md, each by one command, as a table, JSON and a picture.

Owns arguments and output. What is measured, and how, is in the other modules of this package.
"""

from __future__ import annotations

import importlib.util
import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Measure this server, its steps, and its peers.")
console = Console(stderr=True)

Out = Annotated[Path | None, typer.Option(help="Folder for the JSON, and a picture where there is one.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Model = Annotated[str, typer.Option(help="Catalogue name, folder, .gguf file or hub id.")]
State = Annotated[Path, typer.Option(help="Where models, the cache and synthetic adapters are kept.")]
Threads = Annotated[int, typer.Option(help="Threads of the kernels, and of each peer.")]
Kernels = Annotated[str, typer.Option(help="auto, native, aten or reference.")]

RANKS = (8, 16, 24, 32) * 4
PROMPT, NEW = 128, 64


@app.command()
def steps(
    model: Model = "smollm2-135m",
    state_dir: State = Path("data"),
    threads: Threads = 2,
    kernels: Kernels = "auto",
    repeats: int = 60,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Decode steps with and without adapters, as ratios and as shares of the roofline."""
    from adapters.peft_format import read_folder
    from server.bench import roofline
    from server.bench import steps as measured
    from server.bench.synthetic import write_adapter
    from server.engine.runner import make_runner

    base = _base(model, state_dir, kernels)
    folder = state_dir / "bench"
    ranks = (*RANKS, 8, 8, 8, 8, 32)
    paths = [write_adapter(folder / f"step{i}", base.shapes(), rank=rank, seed=100 + i) for i, rank in enumerate(ranks)]
    slots = [base.backend.prepare(read_folder(p, name=p.name, shapes=base.shapes())) for p in paths]
    runner = make_runner(base, len(slots), threads)
    ceilings = roofline.measure(threads)
    times = measured.measure(
        base, runner, slots, measured.standard_shapes(RANKS, (16, 17, 18, 19), 20), ceilings, repeats
    )
    ratios = measured.overheads(times)
    result = {
        "ceilings": {"GB_per_second": ceilings.bytes_per_second / 1e9, "GOP_per_second": ceilings.ops_per_second / 1e9},
        "steps": [{"name": t.name, "ms": t.seconds * 1e3, "roofline": t.roofline} for t in times],
        "ratios": ratios,
        "kernels": base.backend.name,
    }
    table = Table("step", "ms", "of the roofline", title=f"{base.name}, {base.backend.name} kernels, {threads} threads")
    for t in times:
        table.add_row(t.name, f"{t.seconds * 1e3:.2f}", f"{t.roofline:.2f}")
    for name, ratio in ratios.items():
        table.add_row(name, f"x {ratio:.2f}", "")
    _show(result, table, as_json, out, "steps")


@app.command()
def peers(
    config: Annotated[Path, typer.Argument(help="TOML: which peers are installed, and where (docs/benchmarks.md).")],
    model: Model = "smollm2-135m",
    state_dir: State = Path("data"),
    threads: Threads = 2,
    rounds: int = 3,
    requests: int = 16,
    adapters: Annotated[bool, typer.Option(help="A different adapter for each request.")] = True,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """In process: decode and prefill beside every peer that is installed, in both orders, medians, ratios."""
    _extra()
    from server.bench import compare, plots
    from server.bench.export import export_base
    from server.bench.inprocess import InProcess
    from server.bench.synthetic import write_adapter

    base = _base(model, state_dir, "auto")
    folder = state_dir / "bench"
    exported = folder / "exported"
    if not (exported / "model.safetensors").exists():
        export_base(base, exported)
    paths = [
        write_adapter(folder / f"peer{i}", base.shapes(), rank=RANKS[i % 16], seed=200 + i)
        for i in range(requests if adapters else 0)
    ]
    job = _job(base, paths, requests)
    with InProcess(base, paths, threads=threads) as ours:
        mixes = [ours.mix([(n, 1.0)] if n >= 0 else []) for n in job.adapter_of]
        contestants: dict[str, compare.Contestant] = {
            "loramux": lambda job: compare.rates(job, *ours.rates(job.prompts, mixes, job.new_tokens))
        }
        contestants |= _contestants(config, exported, threads, bool(paths))
        contestants["loramux"](job)
        table = compare.rounds(job, contestants, rounds, lambda line: console.print(line))
    result: dict[str, Any] = {
        "requests": requests,
        "adapters": len(paths),
        "rates": compare.as_json(table),
        "ratios": compare.ratios(table),
    }
    shown = Table("", "prefill tok/s", "decode tok/s", "we are faster by (prefill, decode)")
    for name, row in table.items():
        ratio = result["ratios"].get(name)
        ahead = f"{ratio['prefill']:.1f}, {ratio['decode']:.1f}" if ratio else ""
        shown.add_row(name, f"{row.median.prefill:,.0f}", f"{row.median.decode:,.0f}", ahead)
    title = f"decode, {requests} requests, {len(paths)} adapters"
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        rates = {name: row.median.decode for name, row in table.items()}
        plots.bars(out / f"peers-{requests}-{len(paths)}.png", title, "tokens/s", rates)
    _show(result, shown, as_json, out, f"peers-{requests}-{len(paths)}")


@app.command()
def slora(
    url: Annotated[str, typer.Argument(help="Any OpenAI-compatible server.")],
    prefix: Annotated[str, typer.Option(help="Adapters are named prefix0, prefix1, ...")] = "s",
    few: int = 5,
    many: int = 1000,
    requests: int = 1000,
    alpha: Annotated[list[float] | None, typer.Option(help="Popularity, 1 is uniform; again for more [1, 0.3]")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Of the capacity; again for more [0.7, 1.2]")] = None,
    vocab: Annotated[int, typer.Option(help="Prompts are random token ids below this.")] = 40_000,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """S-LoRA's workload against a running server: many adapters beside few."""
    _extra()
    from server.bench import plots
    from server.bench import slora as workload

    body = workload.body_of([f"{prefix}{i}" for i in range(many)], vocab)
    most, loads = workload.compare(
        url,
        body,
        few=few,
        many=many,
        alphas=alpha or (1.0, 0.3),
        shares=share or (0.7, 1.2),
        requests=requests,
        heard=lambda line: console.print(line),
    )
    result = {"capacity": most, "runs": [run.as_dict() for run in loads], "ratios": workload.ratios(loads)}
    table = Table("alpha", "share of capacity", f"throughput, {many} over {few}", "p99 of first token")
    for row in workload.ratios(loads):
        table.add_row(*(f"{row[k]:.2f}" for k in ("alpha", "share", "throughput", "ttft_p99")))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        plots.loads(out / "slora.png", f"S-LoRA workload, {few} and {many} adapters", loads)
    _show(result, table, as_json, out, "slora")


@app.command()
def load(
    url: Annotated[str, typer.Argument(help="Any OpenAI-compatible server.")],
    models: Annotated[list[str], typer.Option("--model", help="Names to ask for in turn.")],
    concurrency: int = 16,
    requests: int = 64,
    prompt_tokens: int = PROMPT,
    new_tokens: int = NEW,
    vocab: int = 40_000,
    llama: Annotated[bool, typer.Option(help="Name adapters as llama-server does: --lora numbers, 0 first.")] = False,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """A closed loop: so many requests in flight until all are answered."""
    import asyncio

    _extra()
    from server.bench.client import NoAnswer, closed_loop, timed
    from server.bench.slora import body_of, llama_body
    from server.bench.workloads import closed

    body = llama_body(len(models), vocab) if llama else body_of(models, vocab)
    arrivals = closed(requests, list(range(len(models))), prompt_tokens, new_tokens)
    outcomes, summary = asyncio.run(timed(closed_loop(url, arrivals, body, concurrency)))
    told = {**summary.as_dict(), "error": next((o.error for o in outcomes if not o.ok), None)}
    if not summary.finished:
        raise NoAnswer(f"none of {requests} requests was answered; the first: {told['error']}")
    table = Table("", "", title=f"{requests} requests, {concurrency} at a time")
    for name, value in told.items():
        table.add_row(name, f"{value:,.4g}" if isinstance(value, float | int) else str(value or "none"))
    _show(told, table, as_json, out, "load")


@app.command()
def adapters(
    folder: Annotated[Path, typer.Argument(help="Where to write them, one PEFT folder each.")],
    count: int = 1000,
    prefix: str = "s",
    model: Model = "smollm2-135m",
    state_dir: State = Path("data"),
) -> None:
    """Write synthetic adapters of ranks 64, 32, 16, 8 in turn, for the S-LoRA workload."""
    from rich.progress import track

    from server.bench.synthetic import write_adapter
    from server.bench.workloads import S2_RANKS

    shapes = _base(model, state_dir, "reference").shapes()
    for i in track(range(count), "writing adapters", console=console):
        write_adapter(folder / f"{prefix}{i}", shapes, rank=S2_RANKS[i % 4], seed=i)


def _extra() -> None:
    """Raises BadSetting where what clients and pictures need is not installed."""
    from server.errors import BadSetting

    for module in ("aiohttp", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise BadSetting(f"{module} is missing, which this command needs: pip install 'loramux[bench]'", "bench")


def _base(model: str, state_dir: Path, kernels: str):  # type: ignore[no-untyped-def]
    from server.kernels import choose
    from server.model.loader import load_base
    from server.sources import resolve_model

    found = resolve_model(model, state_dir)
    # What is measured here, and the peers, are of the processor; a GPU has a script of its own, benchmarks/gpu.py.
    backend = choose(kernels, "cpu")
    return load_base(found.path, name=found.name, backend=backend, cache_dir=state_dir / "cache")


def _job(base: Any, paths: list[Path], requests: int):  # type: ignore[no-untyped-def]
    import numpy as np

    from server.bench.compare import Job

    random = np.random.RandomState(3)
    prompts = random.randint(100, base.config.vocab_size - 100, (requests, PROMPT)).tolist()
    texts = [base.vocabulary.tokenizer.decode(p) for p in prompts]
    which = list(range(requests)) if paths else [-1] * requests
    return Job(prompts, texts, paths, which, NEW)


def _contestants(config: Path, exported: Path, threads: int, with_adapters: bool):  # type: ignore[no-untyped-def]
    """The peers of the file: `vllm`, `peft`, `mistralrs` name a Python; `[llama]` has `bench` and `gguf`."""
    from server.bench import compare
    from server.errors import BadSetting

    try:
        named: Mapping[str, Any] = tomllib.loads(config.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"{config.name} cannot be read: {error}", "config") from error
    found: dict[str, compare.Contestant] = {}
    for name, value in named.items():
        if name in compare.SCRIPTS:
            found[name] = compare.script_peer(name, str(value), exported, threads)
        elif name == "llama" and not with_adapters:
            found["llama.cpp"] = compare.llama_peer(Path(value["bench"]), Path(value["gguf"]), threads)
        elif name != "llama":
            raise BadSetting(f"{config.name}: {name!r} is no peer; known are {', '.join(compare.SCRIPTS)}, llama")
    return found


def _show(result: Mapping[str, Any], table: Table, as_json: bool, out: Path | None, name: str) -> None:
    text = json.dumps(_finite(result), indent=1, allow_nan=False)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(text + "\n")
    if as_json:
        typer.echo(text)
    else:
        Console().print(table)


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has not: the rate of nothing."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
