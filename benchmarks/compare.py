"""In-process comparison with peers: all contestants generate for the same prompts in turn; medians are compared."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from server.errors import BadSetting, ServerError

if TYPE_CHECKING:
    from server.model.loader import Base

OURS = "loramux"
SEED = 3
"""Seed of the prompts."""
MAX_DRAWS = 20
"""Draws per prompt until its text is tokenized into the same ids, for peers that take text."""
FIRST_ID = 100
"""Lower token ids are often special tokens."""
SCRIPTS = {"vllm": "vllm_cpu.py", "peft": "transformers_peft.py", "mistralrs": "mistral_rs.py"}
TIMEOUT = 1800.0


class PeerFailed(ServerError):
    """A peer could not do its job."""


@dataclass(frozen=True)
class Job:
    """Greedy generation of `new_tokens` for all `prompts` at once.

    Attributes:
        prompts: token ids; `texts` are the same prompts as text.
        adapters: PEFT folders.
        adapter_of: number of each prompt's adapter, -1 for none.
    """

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    adapters: Sequence[Path]
    adapter_of: Sequence[int]
    new_tokens: int

    @property
    def requests(self) -> int:
        return len(self.prompts)


def vocabulary_size(base: Base) -> int:
    """Token ids below this exist in the tokenizer and in the embedding table, which may be padded."""
    return min(base.config.vocab_size, base.vocabulary.tokenizer.get_vocab_size())


def make_job(base: Base, adapters: Sequence[Path], requests: int, prompt_tokens: int, new_tokens: int) -> Job:
    """A job with random prompts, each with its own adapter, or all without.

    Raises:
        BadSetting: the tokenizer gives no prompts of this length.
    """
    random = np.random.RandomState(SEED)
    tokenizer = base.vocabulary.tokenizer
    last = max(vocabulary_size(base) - FIRST_ID, FIRST_ID + 1)
    prompts: list[list[int]] = []
    for draw in range(MAX_DRAWS * requests):
        ids = random.randint(FIRST_ID, last, 2 * prompt_tokens).tolist()
        prompt = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids[:prompt_tokens]
        found = tokenizer.encode(tokenizer.decode(prompt), add_special_tokens=False).ids == prompt
        if len(prompt) == prompt_tokens and (found or draw >= (MAX_DRAWS - 1) * requests):
            prompts.append(prompt)
        if len(prompts) == requests:
            break
    if len(prompts) < requests:
        raise BadSetting(f"The tokenizer of {base.name} gives no random prompts of {prompt_tokens} tokens.", "model")
    adapter_of = list(range(requests)) if adapters else [-1] * requests
    return Job(prompts, [tokenizer.decode(prompt) for prompt in prompts], adapters, adapter_of, new_tokens)


@dataclass(frozen=True)
class Rates:
    """Tokens per second of prefill and of decoding. Raises ValueError if they are not positive numbers."""

    prefill: float
    decode: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(rate) and rate > 0 for rate in (self.prefill, self.decode)):
            raise ValueError(f"{self.prefill} and {self.decode} tokens per second are not valid rates")


Contestant = Callable[[Job], Rates]


@dataclass
class Row:
    """The measurements of one contestant."""

    rounds: list[Rates] = field(default_factory=list)

    @property
    def median(self) -> Rates:
        return Rates(
            statistics.median(r.prefill for r in self.rounds), statistics.median(r.decode for r in self.rounds)
        )


@dataclass(frozen=True)
class Measured:
    """All rows, and the reasons of failed contestants."""

    rows: Mapping[str, Row]
    failed: Mapping[str, str]

    @property
    def table(self) -> dict[str, Row]:
        """The rows with at least one round."""
        return {name: row for name, row in self.rows.items() if row.rounds}


def rates(
    job: Job, first: float, last: float, prompt_tokens: int | None = None, new_tokens: int | None = None
) -> Rates:
    """Rates from the seconds until all first and all last tokens.

    `prompt_tokens` and `new_tokens` are the totals that a contestant reports; the default is those of the job.
    """
    read = sum(len(p) for p in job.prompts) if prompt_tokens is None else prompt_tokens
    generated = job.requests * job.new_tokens if new_tokens is None else new_tokens
    return Rates(read / first, (generated - job.requests) / (last - first))


def read_peers(config: Path) -> dict[str, Any]:
    """The installed peers from a TOML file (docs/benchmarks.md).

    `vllm`, `peft` and `mistralrs` are paths of a Python. `[llama]` has `gguf`, and `bench`, `server` or both; a server
    may have `convert`, the conversion script for adapters.

    Raises:
        BadSetting: the file is invalid, or a program does not exist.
    """
    try:
        peers = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"{config.name} cannot be read: {error}", "config") from error
    for name, value in peers.items():
        if name == "llama":
            programs = _llama_programs(config.name, value)
        elif name in SCRIPTS and isinstance(value, str):
            programs = [value]
        elif name in SCRIPTS:
            raise BadSetting(f"{config.name}: {name} must be the path of a Python.", "config")
        else:
            known = ", ".join(SCRIPTS)
            raise BadSetting(f"{config.name}: unknown peer {name!r}. Known peers: {known}, llama.", "config")
        for program in programs:
            if shutil.which(program) is None:
                raise BadSetting(f"{config.name}: {program!r} of {name} is not an executable program.", "config")
    return peers


def _llama_programs(config: str, value: Any) -> list[str]:
    given = {key for key, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else set()
    programs = [value[key] for key in ("bench", "server") if key in given]
    known = {"gguf", "bench", "server", "convert"}
    if not (programs and "gguf" in given and given <= known and len(value) == len(given)):
        raise BadSetting(
            f"{config}: [llama] needs `gguf`, and `bench`, `server` or both; `convert` is optional. All are paths.",
            "config",
        )
    return programs


def contestants(peers: Mapping[str, Any], exported: Path, threads: int, with_adapters: bool) -> dict[str, Contestant]:
    """The contestants for `peers`. llama.cpp takes part only without adapters."""
    found: dict[str, Contestant] = {}
    for name, value in peers.items():
        if name != "llama":
            found[name] = script_peer(name, value, exported, threads)
        elif not with_adapters and "bench" in value:
            found["llama.cpp"] = llama_peer(Path(value["bench"]), Path(value["gguf"]), threads)
    return found


def script_peer(kind: str, python: str, base: Path, threads: int) -> Contestant:
    """A peer in its own environment, run by a script in `peers/`. `base` is an exported folder."""
    script = Path(__file__).parent / "peers" / SCRIPTS[kind]

    def measure(job: Job) -> Rates:
        body = {
            "base": str(base),
            "adapters": [str(a) for a in job.adapters],
            "prompts": [list(p) for p in job.prompts],
            "texts": list(job.texts),
            "adapter_of": list(job.adapter_of),
            "new_tokens": job.new_tokens,
            "threads": threads,
            "repeats": 1,
        }
        text = run_program([python, str(script)], json.dumps(body))
        try:
            answer = json.loads(text.strip().splitlines()[-1])
            tokens = [answer[name][0] if name in answer else None for name in ("prompt_tokens", "new_tokens")]
            return rates(job, answer["first"][0], answer["all"][0], *tokens)
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise _invalid_output(text) from error

    return measure


def llama_peer(binary: Path, gguf: Path, threads: int) -> Contestant:
    """llama.cpp's llama-batched-bench, which cannot use a different adapter per sequence."""

    def measure(job: Job) -> Rates:
        context = max(16384, job.requests * (len(job.prompts[0]) + job.new_tokens))
        command = [str(binary), "-m", str(gguf), "-c", str(context), "-b", "2048", "-ub", "512", "-fa", "on"]
        command += ["-npp", str(len(job.prompts[0])), "-ntg", str(job.new_tokens), "-npl", str(job.requests)]
        command += ["-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]
        text = run_program(command, "")
        try:
            answer = json.loads([line for line in text.splitlines() if line.startswith("{")][-1])
            return Rates(float(answer["speed_pp"]), float(answer["speed_tg"]))
        except (ValueError, LookupError, TypeError) as error:
            raise _invalid_output(text) from error

    return measure


def measure_rounds(job: Job, contestants: Mapping[str, Contestant], count: int, log: Callable[[str], None]) -> Measured:
    """Measure every contestant `count` times, every second round in reverse order. Failed ones are not run again."""
    rows = {name: Row() for name in contestants}
    failed: dict[str, str] = {}
    for number in range(count):
        for name in list(contestants)[:: -1 if number % 2 else 1]:
            if name in failed:
                continue
            try:
                rows[name].rounds.append(contestants[name](job))
            except ServerError as error:
                failed[name] = error.message
                log(f"{name} failed: {error.message}")
                continue
            last = rows[name].rounds[-1]
            log(f"round {number + 1}: {name} prefill {last.prefill:,.0f}, decode {last.decode:,.0f} tokens/s")
    return Measured(rows, failed)


def ratios(table: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """How many times faster loramux is than each other contestant, by medians."""
    if OURS not in table:
        return {}
    ours = table[OURS].median
    return {
        name: {"prefill": ours.prefill / row.median.prefill, "decode": ours.decode / row.median.decode}
        for name, row in table.items()
        if name != OURS
    }


def run_program(command: list[str], stdin: str) -> str:
    """The standard output of a program. Raises PeerFailed.

    The program gets its own process group, which is killed at the end, so that nothing keeps computing.
    """
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace", process_group=0
        )
    except OSError as error:
        raise PeerFailed(f"{command[0]!r} cannot be run: {error}; see docs/benchmarks.md", "peers") from error
    with process:
        try:
            output, errors = process.communicate(stdin, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise PeerFailed(f"{Path(command[0]).name!r} did not finish within {TIMEOUT:.0f} s", "peers") from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        tail = "\n".join(errors.strip().splitlines()[-5:])
        raise PeerFailed(f"{Path(command[0]).name!r} exited with status {process.returncode}:\n{tail}", "peers")
    return output


def _invalid_output(text: str) -> PeerFailed:
    return PeerFailed(f"the output cannot be parsed: {text.strip()[-200:] or 'it is empty'}", "peers")


def as_json(table: Mapping[str, Row]) -> dict[str, Any]:
    """The medians and all rounds."""
    return {
        name: {
            "prefill": row.median.prefill,
            "decode": row.median.decode,
            "rounds": [{"prefill": r.prefill, "decode": r.decode} for r in row.rounds],
        }
        for name, row in table.items()
    }
