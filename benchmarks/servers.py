"""Comparison over HTTP: loramux, llama-server and vLLM, and loramux's engine in this process.

All servers run at the same time. One client sends each a wave of requests in turn; every second round is in reverse
order. Three rates are compared: `decode` (`client.decode_rate`), `steady decode` (`client.steady_rate`) and `whole`,
all tokens of a wave over its time.
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
from benchmarks.compare import OURS, PeerFailed, run_program, vocabulary_size
from benchmarks.hf_export import export_base
from benchmarks.local_engine import STEP_TOKENS, LocalEngine
from benchmarks.server_process import free_port, running
from benchmarks.slora import completion_body, llama_body
from benchmarks.workloads import Arrival, closed
from server.errors import BadSetting, ServerError
from server.model.file_digest import sha256
from server.model.loader import Base

Wave = Callable[[], Mapping[str, float]]
"""Sends a wave; returns rates in tokens per second, and the median time to first token in seconds."""

RATES = ("steady decode", "decode", "whole")
IN_PROCESS = "in process"
PEER_START_TIMEOUT = 900.0
"""vLLM compiles for minutes."""
VLLM_SERVER = Path(__file__).parent / "peers" / "vllm_server.py"


@dataclass(frozen=True)
class Workload:
    """The same for every server: `requests` greedy prompts of random ids at once, with `adapters` (PEFT folders in one
    parent folder, or none) in turn."""

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
        """loramux's --max-batch: the default, or all requests."""
        return max(32, self.requests)

    @property
    def vocab(self) -> int:
        return vocabulary_size(self.base)

    @property
    def body(self) -> Body:
        """Bodies for servers that select adapters by `model`."""
        return completion_body([path.name for path in self.adapters] or [self.base.name], self.vocab)


@dataclass(frozen=True)
class Folders:
    """Folders and the model name: `state` has models and packed bases, `scratch` is for new states and logs."""

    model: str
    state: Path
    scratch: Path

    @property
    def bench(self) -> Path:
        """Files converted for peers."""
        return self.state / "bench"


@dataclass(frozen=True)
class Measured:
    """Medians per server, ratios of loramux to each, all rounds, and the reasons of failures."""

    medians: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Mapping[str, float]]
    rounds: Mapping[str, Sequence[Mapping[str, float]]]
    failed: Mapping[str, str]


def compare(
    peers: Mapping[str, Any], workload: Workload, folders: Folders, rounds: int, log: Callable[[str], None]
) -> Measured:
    """Measure loramux, its engine in process, and the HTTP servers among `peers` (`compare.read_peers`).

    Raises:
        BadSetting: llama-server needs a conversion script for the adapters.
    """
    servers = {OURS: our_server(workload, folders)}
    llama = peers.get("llama", {})
    if "server" in llama:
        if workload.adapters and "convert" not in llama:
            raise BadSetting("[llama] needs `convert` for adapters. Add it, or use --no-adapters.", "config")
        servers["llama-server"] = llama_server(llama, workload, folders)
    if "vllm" in peers:
        servers["vllm"] = vllm_server(peers["vllm"], workload, folders)
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        own = {name: stack.enter_context(contextlib.ExitStack()) for name in (IN_PROCESS, *servers)}
        engine = LocalEngine(workload.base, workload.adapters, threads=workload.threads, max_batch=workload.batch)
        waves = {IN_PROCESS: in_process(own[IN_PROCESS].enter_context(engine), workload)}
        for name, server in servers.items():
            log(f"starting {name}")
            try:
                waves[name] = own[name].enter_context(server)
            except ServerError as error:
                failed[name] = error.message
        found, failed_later = take_turns(waves, rounds, log, lambda name: own[name].close())
    return report(found, failed | failed_later)


def over_http(url: str, body: Body, workload: Workload, key: str = "") -> Wave:
    """Waves over HTTP. A wave raises PeerFailed if a request fails or is shorter than requested."""
    arrivals = workload.arrivals

    def wave() -> Mapping[str, float]:
        outcomes, summary = run(timed(closed_loop(url, arrivals, body, len(arrivals), key=key)))
        for outcome in outcomes:
            if not outcome.ok or outcome.short:
                reason = outcome.error or "it is shorter than requested"
                raise PeerFailed(f"an answer ended after {outcome.tokens} tokens: {reason}", "peers")
        return {
            "whole": summary.tokens_per_second,
            "decode": summary.decode_tokens_per_second,
            "steady decode": summary.steady_tokens_per_second,
            "ttft_p50": summary.ttft_p50,
        }

    return wave


def in_process(engine: LocalEngine, workload: Workload) -> Wave:
    """The same requests on an engine in this process."""
    body, arrivals = workload.body, workload.arrivals
    prompts = [body(arrival, i)["prompt"] for i, arrival in enumerate(arrivals)]
    mixes = [engine.mix([(arrival.adapter, 1.0)] if workload.adapters else []) for arrival in arrivals]
    return lambda: {"whole": len(prompts) * workload.new_tokens / engine.run(prompts, mixes, workload.new_tokens)}


@contextlib.contextmanager
def our_server(workload: Workload, folders: Folders) -> Iterator[Wave]:
    """`loramux serve` on the CPU with a new state directory, and the kernels and step size of the in-process engine."""
    state, port = folders.scratch / "state", free_port()
    state.mkdir()
    for name in ("models", "cache"):
        if (folders.state / name).is_dir():
            (state / name).symlink_to((folders.state / name).resolve())
    command = [sys.executable, "-m", "server.cli", "serve", "--model", folders.model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--state-dir", str(state), "--library", "none", "--no-prefix-cache"]
    command += ["--threads", str(workload.threads), "--max-batch", str(workload.batch)]
    command += ["--device", "cpu", "--kernels", workload.base.backend.name, "--max-step-tokens", str(STEP_TOKENS)]
    key, keys = secrets.token_hex(16), folders.scratch / "keys"  # a settings file may require keys
    keys.write_text(f"bench:{key}")
    command += ["--api-keys-file", str(keys)]
    if workload.adapters:
        command += ["--adapter-dir", str(workload.adapters[0].parent)]
    with running(command, port, "/health/ready", folders.scratch / "loramux.log") as server:
        yield over_http(server.url, workload.body, workload, key)


@contextlib.contextmanager
def llama_server(peer: Mapping[str, str], workload: Workload, folders: Folders) -> Iterator[Wave]:
    """llama-server with all adapters loaded. Converted adapters are cached by base and content."""
    count, threads = workload.requests, str(workload.threads)
    exported = export_base(workload.base, folders.bench / "exported")
    converted = folders.bench / "gguf" / exported.name
    converted.mkdir(parents=True, exist_ok=True)
    command = [peer["server"], "-m", peer["gguf"], "-t", threads, "-tb", threads, "-b", "2048", "-ub", "512"]
    command += ["--parallel", str(count), "-c", str(1024 * count), "-fa", "on", "--lora-init-without-apply"]
    for adapter in workload.adapters:
        file = converted / f"{sha256(adapter / TENSOR_FILE)}.gguf"
        if not file.exists():
            partial = file.with_suffix(".partial")
            convert = [sys.executable, peer["convert"], "--base", str(exported), str(adapter)]
            run_program([*convert, "--outfile", str(partial)], "")
            partial.replace(file)
        command += ["--lora", str(file)]
    port = free_port()
    log = folders.scratch / "llama.log"
    with running([*command, "--port", str(port)], port, "/health", log, PEER_START_TIMEOUT) as server:
        yield over_http(server.url, llama_body(len(workload.adapters), workload.vocab), workload)


@contextlib.contextmanager
def vllm_server(python: str, workload: Workload, folders: Folders) -> Iterator[Wave]:
    """vLLM's server with the settings of `peers/vllm_cpu.py`."""
    port = free_port()
    job = {
        "base": str(export_base(workload.base, folders.bench / "exported")),
        "name": workload.base.name,
        "adapters": {path.name: str(path) for path in workload.adapters},
        "requests": workload.requests,
        "threads": workload.threads,
        "port": port,
    }
    command = [python, str(VLLM_SERVER), json.dumps(job)]
    with running(command, port, "/health", folders.scratch / "vllm.log", PEER_START_TIMEOUT) as server:
        yield over_http(server.url, workload.body, workload)


def take_turns(
    waves: Mapping[str, Wave], rounds: int, log: Callable[[str], None], stop: Callable[[str], None]
) -> tuple[dict[str, list[Mapping[str, float]]], dict[str, str]]:
    """Send one wave each to warm up, then `rounds` waves each, in alternating order.

    A server that fails is stopped with `stop`, because it may still be computing.

    Returns:
        The results of the rounds, and the reasons of failures.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in waves}
    failed: dict[str, str] = {}
    for number in range(rounds + 1):
        for name in list(waves)[::-1] if number and number % 2 == 0 else waves:
            if name in failed:
                continue
            try:
                measured = waves[name]()
            except ServerError as error:
                failed[name] = error.message
                log(f"{name} failed: {error.message}")
                stop(name)
                continue
            values = ", ".join(f"{k} {v:,.3g}" for k, v in measured.items())
            log(f"{name}{'' if number else ' (warm-up)'}: {values}")
            if number:
                found[name].append(measured)
    return found, failed


def report(rounds: Mapping[str, Sequence[Mapping[str, float]]], failed: Mapping[str, str]) -> Measured:
    """Medians, and ratios of loramux to the others."""
    medians = {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in rounds.items()
        if rows
    }
    ours = medians.get(OURS, {})
    ratios = {
        name: {key: ours[key] / theirs[key] for key in RATES if key in ours and key in theirs}
        for name, theirs in medians.items()
        if ours and name != OURS
    }
    return Measured(medians, ratios, rounds, failed)
