"""Greedy answers of a real base on the GPU against the reference kernels on the CPU, and how near the first differing
tokens were."""

from __future__ import annotations

import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from server.engine.batch import Batch
from server.engine.cuda_runner import CudaRunner, gpu_memory
from server.engine.runner import Runner, TorchRunner
from server.engine.text import Text
from server.kernels.cuda import Cuda
from server.kernels.reference import Reference
from server.model.loader import Base, load_base

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
"""The reference is slow, and what comes after it is to be measured too."""


def answers(bench: Any) -> None:
    """Equal answers of 200 by a second, small runner; where one differs, the margin between the two tokens in the
    reference's logits. No further prompts are compared once it has taken too long."""
    with tempfile.TemporaryDirectory() as place:
        folder = _joined(bench.folders, Path(place) / "base")
        ours: Base = load_base(folder, name="base", backend=Cuda(bench.backend.dtype))
        exact: Base = load_base(folder, name="base", backend=Reference())
        text = Text(ours.vocabulary)
        prompts = [text.encode(form.format(subject)) for form in FORMS for subject in SUBJECTS]
        prompts = prompts[:1] if bench.check else prompts
        rows = min(len(prompts), ROWS)
        memory = gpu_memory(None) if bench.device.type == "cuda" else 1 << 31
        gpu = CudaRunner(ours, rows, memory=memory, device=bench.device, adapters=1 << 20)
        cpu = TorchRunner(exact, 1, torch.get_num_threads())
        count, equal, margins = 0, 0, []
        end = time.monotonic() + LIMIT_SECONDS
        for start in range(0, len(prompts), rows):
            if count and time.monotonic() > end:
                break
            given = prompts[start : start + rows]
            said = [_generate(runner, given, 3 if bench.check else TOKENS) for runner in (gpu, cpu)]
            count += len(given)
            for (a, _), (b, logits) in zip(*said, strict=True):
                first = next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
                equal += first is None
                if first is not None:
                    margins.append(float(logits[first][b[first]] - logits[first][a[first]]))
        gpu.release()
    bench.tell(f"greedy answers equal to the reference's, of {count}", equal, len(prompts), equal == len(prompts),
               margins=sorted(margins))  # fmt: skip
    if margins:
        bench.tell("largest margin of a first differing token, logits", round(max(margins), 4))


def _generate(runner: Runner, prompts: list[list[int]], count: int) -> list[tuple[list[int], list[torch.Tensor]]]:
    """The greedy tokens of each prompt, and the logits that each was chosen from."""
    longest = max(map(len, prompts)) + count
    each = -(-longest // BLOCK)
    runner.allocate(each * len(prompts), BLOCK)
    blocks = np.arange(each * len(prompts), dtype=np.int32).reshape(len(prompts), each)
    outputs: list[list[int]] = [[] for _ in prompts]
    chosen: list[list[torch.Tensor]] = [[] for _ in prompts]
    new = prompts
    done = [0] * len(prompts)
    for _ in range(count):
        counts = [len(ids) for ids in new]
        starts = np.cumsum([0, *counts])
        batch = Batch(
            tokens=np.array([token for ids in new for token in ids]),
            positions=np.array([d + i for d, ids in zip(done, new, strict=True) for i in range(len(ids))]),
            row_start=starts.astype(np.int32),
            context=np.array([d + n for d, n in zip(done, counts, strict=True)], np.int32),
            blocks=blocks,
            logit_rows=starts[1:] - 1,
            mixes=((),) * len(prompts),
            block_size=BLOCK,
        )
        logits = runner.run(batch).rows.float().cpu()
        done = [d + n for d, n in zip(done, counts, strict=True)]
        new = [[int(row.argmax())] for row in logits]
        for i, row in enumerate(logits):
            outputs[i].append(new[i][0])
            chosen[i].append(row.clone())
    return list(zip(outputs, chosen, strict=True))


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
