"""Greedy answers of a real base on the GPU against the reference kernels on the CPU, and whether where one differs is
noise: the two have the same tokens before that, so that their logits can be compared up to it and there."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from server.engine.backends.cuda.runner import CudaRunner, gpu_memory
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch
from server.kernels.cuda import Cuda
from server.kernels.reference import Reference
from server.kernels.threads import available_cpus
from server.kernels.weight import STORED, Weight
from server.model.loader import Base, load_base
from server.model.tokenizer import ModelTokenizer

BLOCK = 16
SUBJECTS = ("rain", "a bridge", "the sea", "bread", "a violin", "gravity", "ants", "glass", "the moon", "a market")
FORMS = (
    "Tell me about {}.", "Why do people like {}?", "Write one sentence about {}.", "What is {} made of?",
    "Explain {} to a child.", "List three facts about {}.", "How old is {}?", "Translate to French: I see {}.",
    "Is {} dangerous?", "Summarize what is known of {}.", "Write a title for a story about {}.", "{} and time:",
    "Once upon a time, {}", "The opposite of {} is", "A poem about {}:", "Who studies {}?", "Describe {} in ten words.",
    "What would happen without {}?", "Compare {} with a cloud.", "Name a song about {}.",
)  # fmt: skip
"""200 prompts with the subjects."""
TOKENS = 32
ROWS = 25
"""Prompts that are answered together."""
LIMIT_SECONDS = 90.0
"""From when the kernels are compiled, if something comes after that is to be measured too; else all the time that there
is. 200 prompts take 150 s on two slow processors."""
CLAIM = "greedy answers equal to the CPU reference's, or noise at the first difference"
NOISE_RMS = 0.04
"""The most that the root mean square of all differences of logits may be, of the logits' own deviation. In the
reference itself, bf16 for inputs of products, keys and values alone makes 0.018 (the embedded base, on a CPU)."""
NOISE_MARGIN = 6.0
"""The most that the margin of a first differing token may be, of the root mean square of its step's differences: that
of two logits is 1.4 of it, and a margin is met by the rare ones. (Twice the largest difference says nothing: below that
the margin always is, as each of the two tokens is the largest of its own logits.)"""


class Compared(NamedTuple):
    """An answer beside the reference's, up to and including their first difference."""

    margin: float | None
    """Of the two tokens there, in the reference's logits, over the root mean square of the step's differences; None
    where they are equal to the end."""
    squares: float
    """The sum of the squares of all differences of logits."""
    deviations: float
    """The same of the reference's logits from their steps' means."""


def answers(bench: Any) -> None:
    """As many answers of a second, small runner as there is time for beside those of the reference."""
    wanted = len(FORMS) * len(SUBJECTS)
    if not bench.folders:
        bench.tell(CLAIM, "not measured: --answers names no base", wanted, False)
        return
    before = torch.get_num_threads()
    torch.set_num_threads(available_cpus())  # the runner before has left this process one
    with tempfile.TemporaryDirectory() as place:
        folder = _joined(bench.folders, Path(place) / "base")
        ours: Base = load_base(folder, name="base", backend=Cuda(bench.backend.dtype))
        exact = _dequantized(load_base(folder, name="base", backend=Reference()))
    text = ModelTokenizer(ours.vocabulary)
    prompts = [text.encode(form.format(subject)) for form in FORMS for subject in SUBJECTS]
    prompts = prompts[:1] if bench.check else prompts
    rows, count = min(len(prompts), ROWS), 3 if bench.check else TOKENS
    each = -(-(max(map(len, prompts)) + count) // BLOCK)
    memory = gpu_memory(None) if bench.device.type == "cuda" else 1 << 31
    gpu = CudaRunner(ours, rows, memory=memory, device=bench.device, adapters=1 << 20)
    gpu.allocate(rows * each, BLOCK)
    cpu = TorchRunner(exact, 1, available_cpus())
    cpu.allocate(each, BLOCK)
    end = bench.cut_off if bench.is_last else min(time.monotonic() + LIMIT_SECONDS, bench.cut_off)
    found: list[Compared] = []
    try:
        for prompt, tokens, logits in _generated(gpu, prompts, rows, each, count):
            found.append(_compared(tokens, logits, _reference_logits(cpu, prompt, tokens, each)))
            if time.monotonic() > end:
                break
    finally:  # what fails or is cut off has compared some
        torch.set_num_threads(before)
        if found:
            _send_tables(bench, found, wanted)


def _send_tables(bench: Any, found: list[Compared], wanted: int) -> None:
    """The claim last, after what it is made of."""
    margins = [each.margin for each in found if each.margin is not None]
    equal = len(found) - len(margins)
    rms = math.sqrt(sum(each.squares for each in found) / sum(each.deviations for each in found))
    noise = sum(margin <= NOISE_MARGIN for margin in margins) if rms < NOISE_RMS else 0
    bench.tell("greedy answers compared", len(found))
    bench.tell("greedy answers equal", equal)
    bench.tell("greedy answers whose first difference is noise", noise, margins=sorted(margins), most=NOISE_MARGIN)
    bench.tell("differences of the logits, rms, of their deviation", round(rms, 5), f"< {NOISE_RMS}", rms < NOISE_RMS)
    late = {} if len(found) == wanted else {"reason": f"only {len(found)} were compared in the time that there was"}
    bench.tell(CLAIM, equal + noise, wanted, equal + noise == len(found) == wanted, **late)


def _compared(tokens: list[int], logits: torch.Tensor, exact: torch.Tensor) -> Compared:
    """`logits` and `exact` [n, vocab] are those that the n `tokens` and the reference's were chosen from."""
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
    """The same base with every matrix dequantized once, not at each product: those are the same to the bit."""
    weights = {
        path: Weight("none", STORED, weight.shape, weight.group, {"codes": base.backend.dequantize(weight)})
        for path, weight in base.weights.items()
    }
    return replace(base, weights=weights)


def _reference_logits(cpu: TorchRunner, prompt: list[int], tokens: list[int], each: int) -> torch.Tensor:
    """What the reference chooses each token from, after those of `tokens` before it: one pass over all of them. Up to
    and including the first that it chooses otherwise, they are those of its own answer."""
    return cpu.run(_batch([prompt + tokens[:-1]], [0], [len(tokens)], each)).rows


def _generated(
    runner: CudaRunner, prompts: list[list[int]], rows: int, each: int, count: int
) -> Iterator[tuple[list[int], list[int], torch.Tensor]]:
    """Each prompt with its `count` greedy tokens and the logits [count, vocab] that they were chosen from, on the CPU;
    `rows` prompts at a time."""
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
    """The `new` tokens of sequences that have `done` so many in the cache, `each` blocks long, and the logits of the
    last `wanted` of each."""
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
    """One folder of all files, those that came as NAME.part0, NAME.part1, ... put together."""
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
