"""Quality of the native kernels compared with the float32 reference kernels: perplexity, and agreement of labels.

    python -m benchmarks.quality BASE.gguf --data FOLDER

FOLDER has `summarization.dev.jsonl` and a `.dev.jsonl` file for each task. Perplexity is measured on the inputs of the
summarization examples, joined by blank lines and cut into windows. Labels are greedy answers of `loramux evaluate` with
the shipped adapters.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.server_process import REPO
from server.engine.backends import make_runner
from server.engine.backends.protocol import Runner
from server.engine.batch import Batch
from server.kernels import choose
from server.model.loader import load_base
from server.model.tokenizer import ModelTokenizer

BLOCK_SIZE = 16


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def window_loss(runner: Runner, ids: list[int]) -> float:
    """Sum of -log p of all tokens of a window except the first."""
    count = len(ids)
    batch = Batch(
        tokens=np.array(ids),
        positions=np.arange(count),
        row_start=np.array([0, count], np.int32),
        context=np.array([count], np.int32),
        blocks=np.arange(-(-count // BLOCK_SIZE), dtype=np.int32)[None],
        logit_rows=np.arange(count - 1),
        mixes=((),),
    )
    log_p = torch.log_softmax(runner.run(batch).rows.double(), 1)
    return -float(log_p[torch.arange(count - 1), torch.tensor(ids[1:])].sum())


def perplexities(gguf: Path, data: Path, windows: int | None, length: int) -> dict[str, float]:
    """Perplexity with each kind of kernels on the same windows; None uses the whole text."""
    inputs = [json.loads(line)["input"] for line in data.read_text("utf-8").splitlines()]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for kernels in ("native", "reference"):
            base = load_base(gguf, name="base", backend=choose(kernels), cache_dir=Path(cache))
            ids = ModelTokenizer(base.vocabulary).encode("\n\n".join(inputs))
            pieces = [ids[i * length : (i + 1) * length] for i in range(len(ids) // length)][:windows]
            if not pieces:
                raise ValueError(f"{data} has {len(ids)} tokens, less than a window of {length} (--length)")
            found["tokens"] = len(pieces) * length
            runner = make_runner(base, 1, 2)
            runner.allocate(-(-length // BLOCK_SIZE), BLOCK_SIZE)
            losses = []
            for piece in pieces:
                losses.append(window_loss(runner, piece))
                log(f"perplexity, {kernels}: {len(losses)} of {len(pieces)} windows")
            found[kernels] = math.exp(sum(losses) / (len(pieces) * (length - 1)))
    return found


def answers(kernels: str, task: str, data: Path, state: Path, limit: int | None, folder: Path) -> list[str]:
    """The answers of `loramux evaluate` to all examples."""
    out = folder / f"{task}-{kernels}.jsonl"
    command = [sys.executable, "-m", "server.cli", "evaluate", str(data), "--task", task, "--answers", str(out)]
    command += ["--kernels", kernels, "--state-dir", str(state), "--json"]
    command += ["--limit", str(limit)] if limit else []
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return [next(iter(json.loads(line)["answers"].values())) for line in out.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .dev.jsonl files")
    parser.add_argument("--task", nargs="*", default=["sentiment", "classification"], help="[%(default)s]")
    parser.add_argument("--limit", type=int, help="number of examples per task")
    parser.add_argument("--windows", type=int, help="number of windows; 0 skips perplexity [the whole text]")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    parser.add_argument("--state-dir", type=Path, default=REPO / "data", help="state directory with the base")
    options = parser.parse_args()
    result: dict[str, Any] = {"agreement": {}}
    if options.windows != 0:
        found = perplexities(options.base, options.data / "summarization.dev.jsonl", options.windows, options.length)
        result["perplexity"] = {**found, "relative": found["native"] / found["reference"] - 1}
        log(f"perplexity: {result['perplexity']}")
    with tempfile.TemporaryDirectory() as name:
        for task in options.task:
            data = options.data / f"{task}.dev.jsonl"
            native, reference = (
                answers(kernels, task, data, options.state_dir, options.limit, Path(name))
                for kernels in ("native", "reference")
            )
            equal = sum(a == b for a, b in zip(native, reference, strict=True))
            result["agreement"][task] = {"examples": len(native), "equal": equal, "share": equal / len(native)}
            log(f"{task}: {result['agreement'][task]}")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
