"""Server against server over HTTP: ours, others that are installed, and our engine in process, in one run.

Owns how each server is started, the order of a run, and its medians. All servers run from start to end and one client
asks them in turn, every second round backwards. A wave is all requests at once; the next begins when all are answered.
Decoding is told apart in two ways, the same for all: over all the time in which something decodes
(`client.decode_rate`), which has the reading of prompts in it that goes on meanwhile, and over the steps that only
decode (`client.steady_rate`). Whole requests are the tokens of a wave over its time. In process the same requests go to
an engine without HTTP, from the client's own process.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.peft_format import TENSOR_FILE
from benchmarks.client import Body, closed_loop, run, timed
from benchmarks.compare import OURS, PeerFailed, output
from benchmarks.hf_export import export_base
from benchmarks.local_engine import STEP_TOKENS, LocalEngine
from benchmarks.server_process import free_port, running
from benchmarks.slora import body_of, llama_body
from benchmarks.workloads import Arrival, closed
from server.errors import BadSetting, ServerError
from server.model.file_digest import sha256
from server.model.loader import Base

Wave = Callable[[], Mapping[str, float]]
"""One wave's rates in tokens a second, and its median time to a first token in seconds."""

RATES = ("steady decode", "decode", "whole")
INSIDE = "in process"
PATIENCE = 900.0
"""vLLM compiles for minutes before it answers."""
VLLM_SERVER = Path(__file__).parent / "peers" / "vllm_server.py"


@dataclass(frozen=True)
class Served:
    """What every server serves and is asked: `base`, the PEFT folders `adapters` of one parent, one a request in turn
    (none: the base alone), and `requests` greedy prompts of `prompt_tokens` random ids, for `new_tokens` each."""

    base: Base
    adapters: Sequence[Path]
    requests: int
    prompt_tokens: int
    new_tokens: int
    threads: int

    @property
    def arrivals(self) -> list[Arrival]:
        return closed(self.requests, range(max(len(self.adapters), 1)), self.prompt_tokens, self.new_tokens)

    @property
    def batch(self) -> int:
        """Ours is as large as by default, or holds all requests, as the others' do."""
        return max(32, self.requests)

    @property
    def body(self) -> Body:
        """Of a server that names adapters by `model`."""
        return body_of([path.name for path in self.adapters] or [self.base.name], self.base.config.vocab_size)


@dataclass(frozen=True)
class Place:
    """Where servers find and leave things: `model` as ours is told it, `kept` with models, packed bases and what is
    converted for others, `fresh` for states and logs."""

    model: str
    kept: Path
    fresh: Path

    @property
    def bench(self) -> Path:
        """For what others want converted."""
        return self.kept / "bench"


@dataclass(frozen=True)
class Measured:
    """Medians of each contestant's rounds, how many times faster our server is, all rounds, and why those failed that
    did."""

    medians: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Mapping[str, float]]
    rounds: Mapping[str, Sequence[Mapping[str, float]]]
    failed: Mapping[str, str]


def compare(
    named: Mapping[str, Any], served: Served, place: Place, rounds: int, heard: Callable[[str], None]
) -> Measured:
    """Ours, our engine in process, and what `compare.installed` found that serves over HTTP: `[llama]` with a `server`
    and `vllm`. Raises BadSetting for a llama-server whose adapters nothing converts."""
    servers = {OURS: our_server(served, place)}
    llama = named.get("llama", {})
    if "server" in llama:
        if served.adapters and "convert" not in llama:
            raise BadSetting("[llama] needs `convert` beside its `server`, or give --no-adapters", "config")
        servers["llama-server"] = llama_server(llama, served, place)
    if "vllm" in named:
        servers["vllm"] = vllm_server(named["vllm"], served, place)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        own = {name: stack.enter_context(contextlib.ExitStack()) for name in (INSIDE, *servers)}
        inside = LocalEngine(served.base, served.adapters, threads=served.threads, max_batch=served.batch)
        waves = {INSIDE: in_process(own[INSIDE].enter_context(inside), served)}
        for name, server in servers.items():
            heard(f"starting {name}")
            try:
                waves[name] = own[name].enter_context(server)
            except ServerError as error:
                failed[name] = error.message
        found, fallen = take_turns(waves, rounds, heard, lambda name: own[name].close())
    return report(found, failed | fallen)


def over_http(url: str, body: Body, served: Served, key: str = "") -> Wave:
    """A wave's rates and times, as the client saw them. It raises PeerFailed if a request fails or is cut short."""
    arrivals = served.arrivals

    def wave() -> Mapping[str, float]:
        outcomes, summary = run(timed(closed_loop(url, arrivals, body, len(arrivals), key=key)))
        for outcome in outcomes:
            if not outcome.ok or outcome.short:
                reason = outcome.error or "it is shorter than asked"
                raise PeerFailed(f"an answer ended after {outcome.tokens} tokens: {reason}", "peers")
        return {
            "whole": summary.tokens_per_second,
            "decode": summary.decode_tokens_per_second,
            "steady decode": summary.steady_tokens_per_second,
            "ttft_p50": summary.ttft_p50,
        }

    return wave


def in_process(engine: LocalEngine, served: Served) -> Wave:
    """The same requests to an engine in this process."""
    body, arrivals = served.body, served.arrivals
    prompts = [body(arrival, i)["prompt"] for i, arrival in enumerate(arrivals)]
    mixes = [engine.mix([(arrival.adapter, 1.0)] if served.adapters else []) for arrival in arrivals]
    return lambda: {"whole": len(prompts) * served.new_tokens / engine.run(prompts, mixes, served.new_tokens)}


@contextlib.contextmanager
def our_server(served: Served, place: Place) -> Iterator[Wave]:
    """A `loramux serve` with a state of its own, on the processor, with the kernels and the tokens a step of our engine
    in process, whatever settings say of these. Raises as `running`."""
    state, port = place.fresh / "state", free_port()
    state.mkdir()
    for name in ("models", "cache"):
        if (place.kept / name).is_dir():
            (state / name).symlink_to((place.kept / name).resolve())
    command = [sys.executable, "-m", "server.cli", "serve", "--model", place.model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--state-dir", str(state), "--library", "none", "--no-prefix-cache"]
    command += ["--threads", str(served.threads), "--max-batch", str(served.batch)]
    command += ["--device", "cpu", "--kernels", served.base.backend.name, "--max-step-tokens", str(STEP_TOKENS)]
    key, keys = secrets.token_hex(16), place.fresh / "keys"  # it may ask for one, as any server here would
    keys.write_text(f"bench:{key}")
    command += ["--api-keys-file", str(keys)]
    if served.adapters:
        command += ["--adapter-dir", str(served.adapters[0].parent)]
    with running(command, port, "/health/ready", place.fresh / "loramux.log") as server:
        yield over_http(server.url, served.body, served, key)


@contextlib.contextmanager
def llama_server(named: Mapping[str, str], served: Served, place: Place) -> Iterator[Wave]:
    """A llama-server with all adapters loaded and none applied. Each content is converted once for each base.

    Raises PeerFailed where they cannot be, and as `running`.
    """
    count, threads = served.requests, str(served.threads)
    exported = export_base(served.base, place.bench / "exported")
    converted = place.bench / "gguf" / exported.name
    converted.mkdir(parents=True, exist_ok=True)
    command = [named["server"], "-m", named["gguf"], "-t", threads, "-tb", threads, "-b", "2048", "-ub", "512"]
    command += ["--parallel", str(count), "-c", str(1024 * count), "-fa", "on", "--lora-init-without-apply"]
    for adapter in served.adapters:
        file = converted / f"{sha256(adapter / TENSOR_FILE)}.gguf"
        if not file.exists():
            partial = file.with_suffix(".partial")
            convert = [sys.executable, named["convert"], "--base", str(exported), str(adapter)]
            output([*convert, "--outfile", str(partial)], "")
            partial.replace(file)
        command += ["--lora", str(file)]
    port = free_port()
    with running([*command, "--port", str(port)], port, "/health", place.fresh / "llama.log", PATIENCE) as server:
        yield over_http(server.url, llama_body(len(served.adapters), served.base.config.vocab_size), served)


@contextlib.contextmanager
def vllm_server(python: str, served: Served, place: Place) -> Iterator[Wave]:
    """vLLM's own server, with the settings that its engine has in process. Raises as `running`."""
    port = free_port()
    job = {
        "base": str(export_base(served.base, place.bench / "exported")),
        "name": served.base.name,
        "adapters": {path.name: str(path) for path in served.adapters},
        "requests": served.requests,
        "threads": served.threads,
        "port": port,
    }
    command = [python, str(VLLM_SERVER), json.dumps(job)]
    with running(command, port, "/health", place.fresh / "vllm.log", PATIENCE) as server:
        yield over_http(server.url, served.body, served)


def take_turns(
    waves: Mapping[str, Wave], rounds: int, heard: Callable[[str], None], stop: Callable[[str], None]
) -> tuple[dict[str, list[Mapping[str, float]]], dict[str, str]]:
    """One wave each to warm up, then `rounds` of each in turn, every second time backwards. One that fails is not asked
    again: `stop` ends it, as it may still compute what it was asked for. Returns what the rounds gave, and why those
    failed that did."""
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in waves}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for name in list(waves)[::-1] if number and number % 2 == 0 else waves:
            if name in failed:
                continue
            try:
                got = waves[name]()
            except ServerError as error:
                failed[name] = error.message
                heard(f"{name} failed: {error.message}")
                stop(name)
                continue
            heard(f"{name}{'' if number else ', to warm up'}: {', '.join(f'{k} {v:,.3g}' for k, v in got.items())}")
            if number:
                found[name].append(got)
    return found, failed


def report(rounds: Mapping[str, Sequence[Mapping[str, float]]], failed: Mapping[str, str]) -> Measured:
    """Medians of who was measured at all, and ratios of rates, where we were."""
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in rounds.items()
        if rows
    }
    mine = medians.get(OURS, {})
    ratios = {
        name: {key: mine[key] / theirs[key] for key in RATES if key in mine and key in theirs}
        for name, theirs in medians.items()
        if mine and name != OURS
    }
    return Measured(medians, ratios, rounds, failed)
