"""What the native kernels cost in quality: perplexity, and agreement of labels, against the float32 reference kernels.

Run it as `python -m benchmarks.quality BASE.gguf --data FOLDER`, where FOLDER has `summarization.dev.jsonl` and a
`.dev.jsonl` for each task that is compared. Perplexity is that of the base over the inputs of the e-mails, joined by
blank lines and cut into windows of so many tokens, each after the first of its window. Labels are the greedy answers of
`loramux evaluate` with the adapters that ship, to the same examples on both kinds of kernels.
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

from server.engine.backends import make_runner
from server.engine.backends.protocol import Runner
from server.engine.batch import Batch
from server.kernels import choose
from server.model.loader import load_base
from server.model.tokenizer import ModelTokenizer

BLOCK = 16
STATE = Path(__file__).resolve().parents[1] / "data"


def tell(line: str) -> None:
    """On the way: it takes long, and what is known when it is ended is not lost."""
    print(line, file=sys.stderr, flush=True)


def loss(runner: Runner, ids: list[int]) -> float:
    """The sum of -log p of all of one window's tokens but its first."""
    count = len(ids)
    batch = Batch(
        tokens=np.array(ids),
        positions=np.arange(count),
        row_start=np.array([0, count], np.int32),
        context=np.array([count], np.int32),
        blocks=np.arange(-(-count // BLOCK), dtype=np.int32)[None],
        logit_rows=np.arange(count - 1),
        mixes=((),),
    )
    told = torch.log_softmax(runner.run(batch).rows.double(), 1)
    return -float(told[torch.arange(count - 1), torch.tensor(ids[1:])].sum())


def perplexities(gguf: Path, data: Path, windows: int | None, length: int) -> dict[str, float]:
    """Of each kind of kernels, over the same tokens: so many windows of the text, all that it has if None. Raises
    ValueError for a text that is shorter than one."""
    inputs = [json.loads(line)["input"] for line in data.read_text("utf-8").splitlines()]
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as cache:
        for kernels in ("native", "reference"):
            base = load_base(gguf, name="base", backend=choose(kernels), cache_dir=Path(cache))
            ids = ModelTokenizer(base.vocabulary).encode("\n\n".join(inputs))
            pieces = [ids[i * length : (i + 1) * length] for i in range(len(ids) // length)][:windows]
            if not pieces:
                raise ValueError(f"{data} has {len(ids)} tokens, which is less than a window of {length} (--length)")
            found["tokens"] = len(pieces) * length
            runner = make_runner(base, 1, 2)
            runner.allocate(-(-length // BLOCK), BLOCK)
            sums = []
            for piece in pieces:
                sums.append(loss(runner, piece))
                tell(f"perplexity, {kernels}: {len(sums)} of {len(pieces)} windows")
            found[kernels] = math.exp(sum(sums) / (len(pieces) * (length - 1)))
    return found


def answers(kernels: str, task: str, data: Path, state: Path, limit: int | None, folder: Path) -> list[str]:
    """What `loramux evaluate` says to each example."""
    out = folder / f"{task}-{kernels}.jsonl"
    command = [sys.executable, "-m", "server.cli", "evaluate", str(data), "--task", task, "--answers", str(out)]
    command += ["--kernels", kernels, "--state-dir", str(state), "--json"]
    command += ["--limit", str(limit)] if limit else []
    subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return [next(iter(json.loads(line)["answers"].values())) for line in out.read_text("utf-8").splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="the embedded base, a .gguf file")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .dev.jsonl files")
    parser.add_argument("--task", nargs="*", default=["sentiment", "classification"], help="[%(default)s]")
    parser.add_argument("--limit", type=int, help="only so many examples of each task")
    parser.add_argument("--windows", type=int, help="of the text; 0 leaves perplexity out [all that it has]")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--state-dir", type=Path, default=STATE, help="where the base has been fetched")
    given = parser.parse_args()
    report: dict[str, Any] = {"agreement": {}}
    if given.windows != 0:
        found = perplexities(given.base, given.data / "summarization.dev.jsonl", given.windows, given.length)
        report["perplexity"] = {**found, "relative": found["native"] / found["reference"] - 1}
        tell(f"perplexity: {report['perplexity']}")
    with tempfile.TemporaryDirectory() as name:
        for task in given.task:
            data = given.data / f"{task}.dev.jsonl"
            ours, exact = (
                answers(kernels, task, data, given.state_dir, given.limit, Path(name))
                for kernels in ("native", "reference")
            )
            same = sum(a == b for a, b in zip(ours, exact, strict=True))
            report["agreement"][task] = {"examples": len(ours), "equal": same, "share": same / len(ours)}
            tell(f"{task}: {report['agreement'][task]}")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
