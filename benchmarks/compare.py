"""The table of ratios: our engine and server beside the peers that are installed, in one run, in both orders.

Owns the order of a run and its medians. Each contestant gives the same numbers for the same prompts and adapters:
tokens a second of decoding, and of prefill. Nothing here decides what is good enough.
"""

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
"""What we are called among the contestants."""
SEED = 3
"""Of the prompts that everybody is asked."""
DRAWS = 20
"""Draws of a prompt before one is taken whose text is not read as the same ids: a peer that is given text should find
them in it."""

SCRIPTS = {"vllm": "vllm_cpu.py", "peft": "transformers_peft.py", "mistralrs": "mistral_rs.py"}
TIMEOUT = 1800.0


class PeerFailed(ServerError):
    """A peer did not do what it was asked to."""


@dataclass(frozen=True)
class Job:
    """What every contestant does: greedy answers of `new_tokens` to `prompts` [[ids]], all at once.

    `adapter_of[i]` is the number of prompt i's adapter in `adapters` (PEFT folders), -1 for none.
    """

    prompts: Sequence[Sequence[int]]
    texts: Sequence[str]
    adapters: Sequence[Path]
    adapter_of: Sequence[int]
    new_tokens: int

    @property
    def requests(self) -> int:
        return len(self.prompts)


def drawn(base: Base, adapters: Sequence[Path], requests: int, prompt_tokens: int, new_tokens: int) -> Job:
    """So many different prompts of random ids, each on an adapter of its own, or all on the base."""
    random = np.random.RandomState(SEED)
    tokenizer = base.vocabulary.tokenizer
    prompts: list[list[int]] = []
    for draw in range(DRAWS * requests):
        ids = random.randint(100, base.config.vocab_size - 100, 2 * prompt_tokens).tolist()
        prompt = tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False).ids[:prompt_tokens]
        found = tokenizer.encode(tokenizer.decode(prompt), add_special_tokens=False).ids == prompt
        if len(prompt) == prompt_tokens and (found or draw >= (DRAWS - 1) * requests):
            prompts.append(prompt)
        if len(prompts) == requests:
            break
    which = list(range(requests)) if adapters else [-1] * requests
    return Job(prompts, [tokenizer.decode(prompt) for prompt in prompts], adapters, which, new_tokens)


@dataclass(frozen=True)
class Rates:
    """Tokens a second: of all prompts until their first tokens, and of all tokens after the first ones.

    Raises ValueError for what is no rate: times of two runs may say that the last tokens came before the first.
    """

    prefill: float
    decode: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(rate) and rate > 0 for rate in (self.prefill, self.decode)):
            raise ValueError(f"{self.prefill} and {self.decode} tokens a second are no rates")


Contestant = Callable[[Job], Rates]


@dataclass
class Row:
    """One contestant's measurements over the rounds."""

    rounds: list[Rates] = field(default_factory=list)

    @property
    def median(self) -> Rates:
        """Of at least one round."""
        return Rates(
            statistics.median(r.prefill for r in self.rounds), statistics.median(r.decode for r in self.rounds)
        )


@dataclass(frozen=True)
class Measured:
    """What the rounds gave: each contestant's row, empty if it never answered, and why those failed that did."""

    rows: Mapping[str, Row]
    failed: Mapping[str, str]

    @property
    def table(self) -> dict[str, Row]:
        """The rows with at least one round."""
        return {name: row for name, row in self.rows.items() if row.rounds}


def rates(
    job: Job, first: float, last: float, prompt_tokens: int | None = None, new_tokens: int | None = None
) -> Rates:
    """From seconds to all first and to all last tokens. A contestant that tells how many tokens it read and made in all
    is credited with these; they are the job's otherwise."""
    read = sum(len(p) for p in job.prompts) if prompt_tokens is None else prompt_tokens
    made = job.requests * job.new_tokens if new_tokens is None else new_tokens
    return Rates(read / first, (made - job.requests) / (last - first))


def installed(config: Path) -> dict[str, Any]:
    """The peers that a TOML file names: `vllm`, `peft` and `mistralrs` a Python, `[llama]` its `gguf`, and of its
    programs `bench` and `server` one or both; `convert`, its script for adapters, is for the latter.

    Raises BadSetting.
    """
    try:
        named = tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadSetting(f"{config.name} cannot be read: {error}", "config") from error
    for name, value in named.items():
        if name == "llama":
            given = {key for key, v in value.items() if isinstance(v, str)} if isinstance(value, dict) else set()
            programs = [value[key] for key in ("bench", "server") if key in given]
            if not (
                programs
                and "gguf" in given
                and given <= {"gguf", "bench", "server", "convert"}
                and len(value) == len(given)
            ):
                raise BadSetting(
                    f"{config.name}: [llama] is a table of `gguf` and of `bench`, `server` or both, and of `convert` "
                    "beside a server, each a path",
                    "config",
                )
        elif name in SCRIPTS and isinstance(value, str):
            programs = [value]
        elif name in SCRIPTS:
            raise BadSetting(f"{config.name}: {name} is the path of a Python, in quotes", "config")
        else:
            known = ", ".join(SCRIPTS)
            raise BadSetting(f"{config.name}: {name!r} is no peer; known are {known}, llama", "config")
        for program in programs:
            if shutil.which(program) is None:
                raise BadSetting(f"{config.name}: {program!r} of {name} is no program that can be run", "config")
    return named


def contestants(named: Mapping[str, Any], exported: Path, threads: int, with_adapters: bool) -> dict[str, Contestant]:
    """What `installed` found, as contestants; llama.cpp has none for a job with adapters."""
    found: dict[str, Contestant] = {}
    for name, value in named.items():
        if name != "llama":
            found[name] = script_peer(name, value, exported, threads)
        elif not with_adapters and "bench" in value:
            found["llama.cpp"] = llama_peer(Path(value["bench"]), Path(value["gguf"]), threads)
    return found


def script_peer(kind: str, python: str, base: Path, threads: int) -> Contestant:
    """A peer of an environment of its own, by one of the scripts in `peers/`. `base` is an exported folder.

    It raises PeerFailed, as that of `llama_peer` does.
    """
    script = Path(__file__).parent / "peers" / SCRIPTS[kind]

    def run(job: Job) -> Rates:
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
        told = output([python, str(script)], json.dumps(body))
        try:
            answer = json.loads(told.strip().splitlines()[-1])
            tokens = [answer[name][0] if name in answer else None for name in ("prompt_tokens", "new_tokens")]
            return rates(job, answer["first"][0], answer["all"][0], *tokens)
        except (ValueError, LookupError, TypeError, ArithmeticError) as error:
            raise _unreadable(told) from error

    return run


def llama_peer(binary: Path, gguf: Path, threads: int) -> Contestant:
    """llama.cpp's batched bench, which has no adapters per sequence: only for jobs without any."""

    def run(job: Job) -> Rates:
        context = max(16384, job.requests * (len(job.prompts[0]) + job.new_tokens))
        command = [str(binary), "-m", str(gguf), "-c", str(context), "-b", "2048", "-ub", "512", "-fa", "on"]
        command += ["-npp", str(len(job.prompts[0])), "-ntg", str(job.new_tokens), "-npl", str(job.requests)]
        command += ["-t", str(threads), "-tb", str(threads), "--output-format", "jsonl"]
        told = output(command, "")
        try:
            answer = json.loads([line for line in told.splitlines() if line.startswith("{")][-1])
            return Rates(float(answer["speed_pp"]), float(answer["speed_tg"]))
        except (ValueError, LookupError, TypeError) as error:
            raise _unreadable(told) from error

    return run


def rounds(job: Job, contestants: Mapping[str, Contestant], count: int, heard: Callable[[str], None]) -> Measured:
    """Measure everybody `count` times, every second time in the reverse order. One that fails is not asked again; what
    it and the others have given stays."""
    rows = {name: Row() for name in contestants}
    failed: dict[str, str] = {}
    for i in range(count):
        names = list(contestants) if i % 2 == 0 else list(contestants)[::-1]
        for name in names:
            if name in failed:
                continue
            try:
                got = contestants[name](job)
            except ServerError as error:
                failed[name] = error.message
                heard(f"{name} failed in round {i + 1} of {count}: {error.message}")
                continue
            rows[name].rounds.append(got)
            heard(f"{name}: prefill {got.prefill:.0f} tok/s, decode {got.decode:.0f} tok/s")
    return Measured(rows, failed)


def ratios(table: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """How many times faster we are than each of the others, by medians; of nobody where we have none."""
    if OURS not in table:
        return {}
    mine = table[OURS].median
    return {
        name: {"prefill": mine.prefill / row.median.prefill, "decode": mine.decode / row.median.decode}
        for name, row in table.items()
        if name != OURS
    }


def output(command: list[str], stdin: str) -> str:
    """What a program prints. Raises PeerFailed.

    It leads a group of its own, so that nothing of it goes on once it is not waited for: it would compute while others
    are measured.
    """
    pipe = subprocess.PIPE
    try:
        # What a peer tells of itself need not be text throughout: a name that it cuts off within a character.
        peer = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace", process_group=0
        )
    except OSError as error:
        raise PeerFailed(f"{command[0]!r} cannot be run: {error}; see docs/benchmarks.md", "peers") from error
    with peer:
        try:
            told, complaints = peer.communicate(stdin, timeout=TIMEOUT)
        except subprocess.TimeoutExpired as error:
            raise PeerFailed(f"{Path(command[0]).name!r} did not end within {TIMEOUT:.0f} s", "peers") from error
        finally:
            with suppress(ProcessLookupError):  # all of it has ended
                os.killpg(peer.pid, signal.SIGKILL)
    if peer.returncode:
        tail = "\n".join(complaints.strip().splitlines()[-5:])
        raise PeerFailed(f"{Path(command[0]).name!r} ended with status {peer.returncode}:\n{tail}", "peers")
    return told


def _unreadable(told: str) -> PeerFailed:
    return PeerFailed(f"its answer cannot be read: {told.strip()[-200:] or 'nothing was printed'}", "peers")


def as_json(table: Mapping[str, Row]) -> dict[str, Any]:
    """All rounds and the medians."""
    return {
        name: {
            "prefill": row.median.prefill,
            "decode": row.median.decode,
            "rounds": [{"prefill": r.prefill, "decode": r.decode} for r in row.rounds],
        }
        for name, row in table.items()
    }
