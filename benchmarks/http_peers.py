"""Sixteen requests on sixteen adapters over HTTP: ours, llama-server, and our engine in process, in one run.

Run it as `python -m benchmarks.http_peers BASE.gguf --llama LLAMA.CPP --gguf Q4_0.gguf`, where LLAMA.CPP is the folder
of llama.cpp's source with its binaries in `b/bin`. Both servers run from start to end and one client asks them in
turn, every second round backwards: prompts of 128 random tokens, 64 new ones, whatever the end token, no prefix cache.
A wave is all requests at once; the next begins when all are answered. Decoding is told apart in two ways, the same for
both: over all the time in which something decodes (`server.bench.client.decode_rate`), which for us has the reading of
prompts in it, and over the steps that only decode (`steady_rate`). Whole requests are the tokens of a wave over its
time. In process the same requests go to an engine without HTTP, from the client's own process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.serving import MODELS, free_port, running, serving
from server.bench import machine
from server.bench.client import Body, closed_loop, run, timed
from server.bench.export import export_base
from server.bench.inprocess import InProcess
from server.bench.slora import body_of, llama_body
from server.bench.synthetic import write_adapter
from server.bench.workloads import Arrival, closed
from server.kernels import choose
from server.model.loader import Base, load_base

PROMPT, NEW, VOCAB = 128, 64, 40_000
RANKS = (8, 16, 24, 32)

Wave = Callable[[], Mapping[str, float]]


def over_http(url: str, body: Body, arrivals: list[Arrival]) -> Wave:
    """A wave's rates and times, as the client saw them. Raises RuntimeError if a request fails."""

    def wave() -> Mapping[str, float]:
        outcomes, summary = run(timed(closed_loop(url, arrivals, body, len(arrivals))))
        for outcome in outcomes:
            if not outcome.ok or outcome.tokens != NEW:
                raise RuntimeError(f"{url} answered {outcome.tokens} tokens of {NEW}: {outcome.error}")
        return {
            "whole": summary.tokens_per_second,
            "decode": summary.decode_tokens_per_second,
            "steady decode": summary.steady_tokens_per_second,
            "ttft_p50": summary.ttft_p50,
        }

    return wave


def in_process(engine: InProcess, body: Body, arrivals: list[Arrival], adapters: int) -> Wave:
    """The same requests to an engine in this process."""
    prompts = [body(arrival, i)["prompt"] for i, arrival in enumerate(arrivals)]
    mixes = [engine.mix([(i, 1.0)] if adapters else []) for i in range(len(arrivals))]
    return lambda: {"whole": len(arrivals) * NEW / engine.run(prompts, mixes, NEW)}


@contextlib.contextmanager
def llama_serving(
    folder: Path, llama: Path, gguf: Path, base: Base, adapters: list[Path], slots: int, threads: int
) -> Iterator[str]:
    """The address of a llama-server with its adapters, which are converted into `folder` first, apart for each base."""
    folder, llama, gguf = folder.resolve(), llama.resolve(), gguf.resolve()
    converted = folder / f"converted-{base.id[:32]}"
    converted.mkdir(parents=True, exist_ok=True)
    command = [str(llama / "b/bin/llama-server"), "-m", str(gguf), "-t", str(threads), "-tb", str(threads)]
    command += ["-b", "2048", "-ub", "512"]
    command += ["--parallel", str(slots), "-c", "16384", "-fa", "on", "--lora-init-without-apply"]
    for i, adapter in enumerate(adapters):
        out = converted / f"{i}.gguf"
        if not out.exists():
            exported = export_base(base, folder / "exported")
            convert = [sys.executable, str(llama / "convert_lora_to_gguf.py"), "--base", str(exported), str(adapter)]
            subprocess.run([*convert, "--outfile", str(out)], check=True, capture_output=True)
        command += ["--lora", str(out)]
    port = free_port()
    with running([*command, "--port", str(port)], port, "/health", folder / "llama.log") as server:
        yield server.url


def measure(waves: Mapping[str, Wave], rounds: int) -> dict[str, list[Mapping[str, float]]]:
    """One wave each to warm up, then `rounds` of each in turn, every second time backwards."""
    for wave in waves.values():
        wave()
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in waves}
    for number in range(rounds):
        for name in list(waves) if number % 2 == 0 else list(waves)[::-1]:
            found[name].append(waves[name]())
            sys.stderr.write(f"{name}: {', '.join(f'{k} {v:,.3g}' for k, v in found[name][-1].items())}\n")
    return found


def report(found: Mapping[str, list[Mapping[str, float]]]) -> dict[str, Any]:
    """Medians, and the ratios that are asked for."""
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for name, rows in found.items()
    }
    ours, inside = medians["loramux"], medians["in process"]
    ratios = {"HTTP over in process, whole": ours["whole"] / inside["whole"]}
    if "llama-server" in medians:
        theirs = medians["llama-server"]
        ratios |= {f"over llama-server, {key}": ours[key] / theirs[key] for key in ("steady decode", "decode", "whole")}
    return {"medians": medians, "ratios": ratios, "rounds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--llama", type=Path, help="llama.cpp's folder; without it only ours is measured")
    parser.add_argument("--gguf", type=Path, help="the base as Q4_0, for llama-server")
    parser.add_argument("--converted", type=Path, help="keep adapters as llama-server wants them here, for a next run")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--adapters", action=argparse.BooleanOptionalAction, default=True, help="one a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of each server's kernels, and of those in process")
    parser.add_argument("--models", type=Path, default=MODELS, help="where the base has been fetched")
    given = parser.parse_args()
    if given.llama and not given.gguf:
        parser.error("--llama wants the base as Q4_0 too: --gguf FILE")
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder, count = Path(name), given.requests if given.adapters else 0
        base = load_base(given.base, name="base", backend=choose("auto"), cache_dir=folder / "cache")
        adapters = [
            write_adapter(folder / "adapters" / f"s{i}", base.shapes(), rank=RANKS[i % len(RANKS)], seed=200 + i)
            for i in range(count)
        ]
        arrivals = closed(given.requests, list(range(max(count, 1))), PROMPT, NEW)
        body = body_of([p.name for p in adapters] or ["smollm2-135m"], VOCAB)
        flags = ["--threads", str(given.threads), "--no-prefix-cache"]
        flags += ["--adapter-dir", str(folder / "adapters")] if count else []
        ours = stack.enter_context(serving(folder / "state", given.models, *flags))
        engine = stack.enter_context(InProcess(base, adapters, threads=given.threads))
        waves = {
            "in process": in_process(engine, body, arrivals, count),
            "loramux": over_http(ours.url, body, arrivals),
        }
        if given.llama is not None:
            peer = llama_serving(
                given.converted or folder, given.llama, given.gguf, base, adapters, given.requests, given.threads
            )
            waves["llama-server"] = over_http(stack.enter_context(peer), llama_body(count, VOCAB), arrivals)
        asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(given).items()}
        asked |= {"prompt_tokens": PROMPT, "new_tokens": NEW, "ranks": RANKS, "base_digest": base.id}
        told = {"asked": asked, "machine": machine.describe(), **report(measure(waves, given.rounds))}
        print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
