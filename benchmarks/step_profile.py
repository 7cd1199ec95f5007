"""Profile of decode steps on the CPU: phases of the native kernels, and the processor time of Python.

    python -m benchmarks.step_profile BASE.gguf

Sixteen requests with prompts of 128 tokens decode together, without adapters and with sixteen adapters, greedily and
sampled. The result has milliseconds per step, medians over rounds: the phases that the runner counts, `rest` (no phase
runs), and `python` (processor time of all Python threads outside of the kernels, which runs beside the phases).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adapters.weights import Mix
from benchmarks.local_engine import GREEDY, LocalEngine
from benchmarks.synthetic import write_adapter
from server.engine.backends.cpu.runner import NativeRunner
from server.engine.request import Sampling
from server.kernels import choose
from server.model.loader import load_base

PROMPT_TOKENS, NEW_TOKENS = 128, 64
RANKS = (8, 16, 24, 32)
THREADS = 2
SAMPLED = "one adapter each, sampled"
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


class PythonTime:
    """Processor time of the Python threads outside of the native kernels."""

    def __init__(self, runner: NativeRunner) -> None:
        self._native = 0.0
        for name in ("wait", "wait_until_nearly_done", "step", "sample"):
            call = f"loramux_model_{name}"
            setattr(runner._library, call, self._timed(getattr(runner._library, call)))

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.thread_time()
            try:
                return call(*args)
            finally:
                self._native += time.thread_time() - start

        return timed

    def seconds(self) -> float:
        """Seconds of all current Python threads since their start."""
        clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.ident is not None]
        return sum(map(time.clock_gettime, clocks)) - self._native


def profile(
    engine: LocalEngine,
    runner: NativeRunner,
    python: PythonTime,
    prompts: Sequence[Sequence[int]],
    mixes: Sequence[Mix],
    sampling: Sampling,
) -> dict[str, float]:
    """Milliseconds per decode step: each phase, `rest`, `python` and `step`.

    The difference of a run of NEW_TOKENS and a run of one token has only decode steps.
    """
    runs = []
    for new_tokens in (1, NEW_TOKENS):
        runner.take_times()
        before = python.seconds()
        seconds = engine.run(prompts, mixes, new_tokens, sampling)
        python_seconds, phases = python.seconds() - before, runner.take_times()
        runs.append({**phases, "rest": seconds - sum(phases.values()), "python": python_seconds, "step": seconds})
    one, all_tokens = runs
    return {name: 1000 * (all_tokens[name] - one[name]) / (NEW_TOKENS - 1) for name in all_tokens}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians of each phase, of the share of `rest` in the step, and of Python in the processor time."""
    found: dict[str, Any] = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    found["rest_share"] = statistics.median(r["rest"] / r["step"] for r in rounds)
    found["python_share"] = statistics.median(r["python"] / (THREADS * r["step"]) for r in rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    count = options.requests
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = load_base(options.base, name="base", backend=choose("native"), cache_dir=folder / "cache")
        adapters = [
            write_adapter(folder / f"a{i}", base.shapes(), rank=RANKS[i % len(RANKS)], seed=200 + i)
            for i in range(count)
        ]
        prompts = np.random.RandomState(3).randint(100, 40_000, (count, PROMPT_TOKENS)).tolist()
        with LocalEngine(
            base, adapters, threads=THREADS, max_batch=count, max_step_tokens=count * PROMPT_TOKENS
        ) as engine:
            runner = engine.runner
            assert isinstance(runner, NativeRunner), "the native kernels are not available"
            python = PythonTime(runner)
            own = [engine.mix([(i, 1.0)]) for i in range(count)]
            cases = {"no adapter": ([engine.mix([])] * count, GREEDY), "one adapter each": (own, GREEDY)}
            cases[SAMPLED] = (own, SAMPLING)
            found: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
            for number in range(options.rounds + 1):
                for case in list(cases) if number % 2 else list(cases)[::-1]:
                    row = profile(engine, runner, python, prompts, *cases[case])
                    if number:  # the first round warms the caches
                        found[case].append(row)
        print(json.dumps({case: medians(rounds) for case, rounds in found.items()}, indent=1))


if __name__ == "__main__":
    main()
