"""Where the time of decode steps goes: the kernels' phases, and what Python takes, in an engine in this process.

Run it as `python -m benchmarks.step_profile BASE.gguf`, native kernels. Sixteen requests with prompts of 128 decode
together, without adapters and then on sixteen of rank 8 to 32, greedily and drawn (temperature and top_p). Milliseconds
a step, medians over rounds of all, in turn. The time between their first tokens and their last ones is told apart into
the phases that the runner counts and the `rest`, in which no phase runs.

Python (scheduling, batches, picking, text, delivery) runs beside the phases, on a processor that they then lack, so the
rest does not tell of it. `python` does: the processor time of all Python threads, less what the engine's own spends
within the kernels; its share is of all that the kernels' threads had in that time.
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

PROMPT, NEW = 128, 64
RANKS = (8, 16, 24, 32)
THREADS = 2
REST = "rest"
PYTHON = "python"
DRAWN = "one adapter each, drawn"
SAMPLING = Sampling(temperature=0.8, top_p=0.95)


class Outside:
    """Processor time that Python threads take outside of the kernels: `native` of a runner is what its calls take."""

    def __init__(self, runner: NativeRunner) -> None:
        self._native = 0.0
        for name in ("wait", "wait_until_nearly_done", "step", "sample"):
            call = f"loramux_model_{name}"
            setattr(runner._library, call, self._counted(getattr(runner._library, call)))

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args)
            finally:
                self._native += time.thread_time() - began

        return counted

    def seconds(self) -> float:
        """Of all threads that there are now, since they began. The kernels' own are none of Python's."""
        clocks = [time.pthread_getcpuclockid(t.ident) for t in threading.enumerate() if t.ident is not None]
        return sum(map(time.clock_gettime, clocks)) - self._native


def decoding(
    engine: LocalEngine,
    runner: NativeRunner,
    outside: Outside,
    prompts: Sequence[Sequence[int]],
    mixes: Sequence[Mix],
    how: Sampling = GREEDY,
) -> dict[str, float]:
    """Milliseconds of a decode step by phase, `rest` for what is none, `step` for all of it; and of `python` beside it.

    Everything is read in one step, so a run of one token has none that decodes, and the difference to a run of `NEW`
    is `NEW` - 1 steps that do nothing else.
    """
    runs = []
    for new in (1, NEW):
        runner.take_times()
        before = outside.seconds()
        seconds = engine.run(prompts, mixes, new, how)
        python, phases = outside.seconds() - before, runner.take_times()
        runs.append({**phases, REST: seconds - sum(phases.values()), PYTHON: python, "step": seconds})
    first, whole = runs
    return {name: 1000 * (whole[name] - first[name]) / (NEW - 1) for name in whole}


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Of each phase over the rounds, with the share of a step that is none, and that of Python in the processors."""
    found: dict[str, Any] = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    shares = {
        "rest_share": statistics.median(r[REST] / r["step"] for r in rounds),
        "python_share": statistics.median(r[PYTHON] / (THREADS * r["step"]) for r in rounds),
    }
    return found | shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = load_base(given.base, name="base", backend=choose("native"), cache_dir=folder / "cache")
        adapters = [
            write_adapter(folder / f"a{i}", base.shapes(), rank=RANKS[i % len(RANKS)], seed=200 + i)
            for i in range(given.requests)
        ]
        prompts = np.random.RandomState(3).randint(100, 40_000, (given.requests, PROMPT)).tolist()
        every_prompt = given.requests * PROMPT
        with LocalEngine(
            base, adapters, threads=THREADS, max_batch=given.requests, max_step_tokens=every_prompt
        ) as engine:
            runner = engine.runner
            assert isinstance(runner, NativeRunner), "native kernels were asked for"
            outside = Outside(runner)
            ways = {
                "no adapter": [engine.mix([])] * given.requests,
                "one adapter each": [engine.mix([(i, 1.0)]) for i in range(given.requests)],
                DRAWN: [engine.mix([(i, 1.0)]) for i in range(given.requests)],
            }
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for number in range(given.rounds + 1):
                for way in list(ways) if number % 2 else list(ways)[::-1]:
                    row = decoding(engine, runner, outside, prompts, ways[way], SAMPLING if way == DRAWN else GREEDY)
                    if number:  # the first round warms caches
                        found[way].append(row)
        print(json.dumps({way: medians(rounds) for way, rounds in found.items()}, indent=1))


if __name__ == "__main__":
    main()
