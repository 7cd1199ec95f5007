"""Greedy answers of a real base on the GPU, compared with the reference kernels on the CPU.

Answers may differ by rounding. At the first different token, the margin of the reference's logits is compared with the
root mean square of all differences of logits.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.gpu.bench import Bench
from server.engine.backends.cuda.runner import CudaRunner, gpu_memory
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch
from server.kernels.cuda import Cuda
from server.kernels.reference import Reference
from server.kernels.threads import available_cpus
from server.kernels.weight import STORED, Weight
from server.model.loader import Base, load_base
from server.model.tokenizer import ModelTokenizer

BLOCK_SIZE = 16
SUBJECTS = ("rain", "a bridge", "the sea", "bread", "a violin", "gravity", "ants", "glass", "the moon", "a market")
FORMS = (
    "Tell me about {}.", "Why do people like {}?", "Write one sentence about {}.", "What is {} made of?",
    "Explain {} to a child.", "List three facts about {}.", "How old is {}?", "Translate to French: I see {}.",
    "Is {} dangerous?", "Summarize what is known of {}.", "Write a title for a story about {}.", "{} and time:",
    "Once upon a time, {}", "The opposite of {} is", "A poem about {}:", "Who studies {}?", "Describe {} in ten words.",
    "What would happen without {}?", "Compare {} with a cloud.", "Name a song about {}.",
)  # fmt: skip
"""With the subjects, 200 prompts."""
TOKENS = 32
ROWS = 25
"""Batch size."""
TIME_LIMIT = 90.0
"""Seconds, unless this is the last section. 200 prompts take 150 s on two slow processors."""
CLAIM = "greedy answers equal to the CPU reference's, or noise at the first difference"
NOISE_RMS = 0.04
"""Maximum root mean square of the differences of logits, relative to their standard deviation. bf16 inputs, keys and
values alone give 0.018 with the reference kernels (the embedded base, on a CPU)."""
NOISE_MARGIN = 6.0
"""Maximum margin of the first different token, relative to the root mean square of the differences of its step."""


class Compared(NamedTuple):
    """An answer compared with the reference, up to and including the first different token.

    Attributes:
        margin: of the two tokens in the reference's logits, relative to the RMS of the differences; None if equal.
        squares: sum of the squared differences of logits.
        deviations: sum of the squared deviations of the reference's logits from their mean.
    """

    margin: float | None
    squares: float
    deviations: float


def answers(bench: Bench) -> None:
    """Compare as many answers as there is time for, with a separate small runner."""
    wanted = len(FORMS) * len(SUBJECTS)
    if not bench.folders:
        bench.record(CLAIM, "not measured: --answers is not given", wanted, False)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(available_cpus())  # the earlier runner has set torch to one thread
    with tempfile.TemporaryDirectory() as place:
        folder = _joined(bench.folders, Path(place) / "base")
        ours: Base = load_base(folder, name="base", backend=Cuda(bench.backend.dtype))
        exact = _dequantized(load_base(folder, name="base", backend=Reference()))
    text = ModelTokenizer(ours.vocabulary)
    prompts = [text.encode(form.format(subject)) for form in FORMS for subject in SUBJECTS]
    prompts = prompts[:1] if bench.check else prompts
    rows, count = min(len(prompts), ROWS), 3 if bench.check else TOKENS
    each = -(-(max(map(len, prompts)) + count) // BLOCK_SIZE)
    memory = gpu_memory(None) if bench.device.type == "cuda" else 1 << 31
    gpu = CudaRunner(ours, rows, memory=memory, device=bench.device, adapters=1 << 20)
    gpu.allocate(rows * each, BLOCK_SIZE)
    cpu = TorchRunner(exact, 1, available_cpus())
    cpu.allocate(each, BLOCK_SIZE)
    end = bench.deadline if bench.is_last else min(time.monotonic() + TIME_LIMIT, bench.deadline)
    found: list[Compared] = []
    try:
        for prompt, tokens, logits in _generated(gpu, prompts, rows, each, count):
            found.append(_compared(tokens, logits, _reference_logits(cpu, prompt, tokens, each)))
            if time.monotonic() > end:
                break
    finally:
        torch.set_num_threads(before)
        if found:
            _record(bench, found, wanted)


def _record(bench: Bench, found: list[Compared], wanted: int) -> None:
    """Record the comparison, and the claim last."""
    margins = [each.margin for each in found if each.margin is not None]
    equal = len(found) - len(margins)
    rms = math.sqrt(sum(each.squares for each in found) / sum(each.deviations for each in found))
    noise = sum(margin <= NOISE_MARGIN for margin in margins) if rms < NOISE_RMS else 0
    bench.record("greedy answers compared", len(found))
    bench.record("greedy answers equal", equal)
    bench.record("greedy answers whose first difference is noise", noise, margins=sorted(margins), most=NOISE_MARGIN)
    bench.record("differences of the logits, rms, of their deviation", round(rms, 5), f"< {NOISE_RMS}", rms < NOISE_RMS)
    late = {} if len(found) == wanted else {"reason": f"only {len(found)} were compared in the time limit"}
    bench.record(CLAIM, equal + noise, wanted, equal + noise == len(found) == wanted, **late)


def _compared(tokens: list[int], logits: torch.Tensor, exact: torch.Tensor) -> Compared:
    """Compare `logits` of the n `tokens` with `exact` of the reference; both are [n, vocab]."""
    best = exact.argmax(1).tolist()
    first = next((i for i, (ours, theirs) in enumerate(zip(tokens, best, strict=True)) if ours != theirs), None)
    until = len(tokens) if first is None else first + 1
    logits, exact = logits[:until], exact[:until]
    apart = (logits - exact).square()
    margin = None
    if first is not None:
        margin = float((exact[first].max() - exact[first, tokens[first]]) / apart[first].mean().sqrt())
    return Compared(margin, float(apart.sum()), float((exact - exact.mean(1, keepdim=True)).square().sum()))


def _dequantized(base: Base) -> Base:
    """The base with all matrices dequantized in advance, which gives the same bits."""
    weights = {
        path: Weight("none", STORED, weight.shape, weight.group, {"codes": base.backend.dequantize(weight)})
        for path, weight in base.weights.items()
    }
    return replace(base, weights=weights)


def _reference_logits(cpu: TorchRunner, prompt: list[int], tokens: list[int], each: int) -> torch.Tensor:
    """The reference's logits for each of `tokens`, in one pass. They are valid up to its first different choice."""
    return cpu.run(_batch([prompt + tokens[:-1]], [0], [len(tokens)], each)).rows


def _generated(
    runner: CudaRunner, prompts: list[list[int]], rows: int, each: int, count: int
) -> Iterator[tuple[list[int], list[int], torch.Tensor]]:
    """Yields each prompt with its `count` greedy tokens and their logits [count, vocab] on the CPU."""
    for start in range(0, len(prompts), rows):
        given = prompts[start : start + rows]
        new, done = given, [0] * len(given)
        chosen = []
        for _ in range(count):
            logits = runner.run(_batch(new, done, [1] * len(new), each)).rows.float().cpu()
            chosen.append(logits.clone())
            done = [d + len(ids) for d, ids in zip(done, new, strict=True)]
            new = [[token] for token in logits.argmax(1).tolist()]
        for prompt, logits in zip(given, torch.stack(chosen, 1), strict=True):
            yield prompt, logits.argmax(1).tolist(), logits


def _batch(new: list[list[int]], done: list[int], wanted: list[int], each: int) -> Batch:
    """A batch with `new` tokens per sequence after `done` cached ones, with `each` blocks, and logits of the last
    `wanted` tokens."""
    counts = [len(ids) for ids in new]
    ends = np.cumsum(counts)
    return Batch(
        tokens=np.concatenate([np.array(ids) for ids in new]),
        positions=np.concatenate([np.arange(d, d + n) for d, n in zip(done, counts, strict=True)]),
        row_start=np.array([0, *ends], np.int32),
        context=np.array(done, np.int32) + np.array(counts, np.int32),
        blocks=np.arange(each * len(new), dtype=np.int32).reshape(len(new), each),
        logit_rows=np.concatenate([np.arange(end - n, end) for end, n in zip(ends, wanted, strict=True)]),
        mixes=((),) * len(new),
    )


def _joined(parts: list[Path], target: Path) -> Path:
    """One folder with all files; NAME.part0, NAME.part1, ... are joined."""
    target.mkdir()
    files = sorted(path for folder in parts for path in folder.iterdir() if path.is_file())
    pieces: dict[str, list[tuple[int, Path]]] = {}
    for path in files:
        cut = re.fullmatch(r"(.+)\.part(\d+)", path.name)
        pieces.setdefault(cut[1] if cut else path.name, []).append((int(cut[2]) if cut else 0, path))
    for name, found in pieces.items():
        with (target / name).open("wb") as out:
            for _, path in sorted(found):
                with path.open("rb") as source:
                    shutil.copyfileobj(source, out)
    return target
