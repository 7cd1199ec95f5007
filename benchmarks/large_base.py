"""Load a random model of Qwen2.5-7B's shape as 4-bit with double quantization, and say what it costs.

    python -m benchmarks.large_base [--directory DIR] [--layers N] [--kernels NAME] [--cache] [--tokens N]

Writes bf16 shards of random weights (15 GB for the whole shape) into a temporary folder, layer by layer, then loads
them in a fresh process through `load_base` and generates greedily from a random prompt. Prints one JSON object:
bytes by kind, bits a parameter, seconds, and the peak of private memory (RssAnon, sampled) over that of the process
before loading. `--cache` packs into a mapped file instead of memory and loads a second time from it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapters import memory
from benchmarks.shapes import QWEN_7B
from server.model.config import from_hf

SHAPE = QWEN_7B | {"eos_token_id": 0}


def write_model(folder: Path, shape: dict[str, Any]) -> int:
    """Random bf16 shards, one a layer, and the files beside them. Returns the parameters of the matrices."""
    config = from_hf(shape)
    (folder / "config.json").write_text(json.dumps(shape))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<end>", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    # one pool of values, read at another offset for each row: making seven billion of them anew takes minutes
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(1 << 22, generator=generator).mul_(0.02).bfloat16()
    matrices = {f"{path}.weight": size for path, size in (config.linear_shapes() | config.table_shapes()).items()}
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, size in (matrices | config.tensor_shapes()).items():
        shards.setdefault(".".join(name.split(".")[:3]), {})[name] = size
    weight_map = {}
    for number, tensors in enumerate(shards.values()):
        file = f"model-{number:05d}.safetensors"
        content = {}
        for name, size in tensors.items():
            if len(size) == 1:
                content[name] = torch.ones(size, dtype=torch.bfloat16)
                continue
            starts = torch.randint(0, len(pool) - size[1], (size[0],), generator=generator).tolist()
            content[name] = torch.stack([pool[start : start + size[1]] for start in starts])
        save_file(content, folder / file)
        weight_map |= dict.fromkeys(content, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(rows * columns for rows, columns in matrices.values())


def private_memory() -> int:
    """Anonymous resident bytes of this process: what is neither a mapped file nor shared."""
    found = memory.resident("RssAnon")
    if found is None:
        raise RuntimeError("this kernel does not report RssAnon")
    return found


@contextmanager
def sampled_peak(result: list[int]) -> Iterator[None]:
    """Appends the peak of private memory while the block runs, over what it was at its start."""
    before, peak, done = private_memory(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], private_memory() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        result.append(max(peak[0], private_memory() - before))


def measure(folder: Path, kernels: str, cache: Path | None, tokens: int, threads: int, group: int) -> dict[str, Any]:
    """Load, then generate greedily; run in a process of its own."""
    from server.engine.backends import make_runner
    from server.kernels import choose
    from server.model.loader import load_base

    torch.set_num_threads(threads)
    backend, peaks = choose(kernels), list[int]()
    torch.ones(1 << 16).sum()  # torch's own threads and buffers are not the base's
    started = time.perf_counter()
    with sampled_peak(peaks):
        base = load_base(folder, name="large", backend=backend, group_size=group, double_quant=True, cache_dir=cache)
    seconds = time.perf_counter() - started
    runner = make_runner(base, 1, threads)
    ids, rate = generate(runner, base.config.vocab_size, tokens)
    return {
        "kernels": backend.name,
        "bytes": base.nbytes,
        "bits": round(base.bits, 4),
        "load_seconds": round(seconds, 1),
        "peak_private": peaks[0],
        "peak_over_bytes": round(peaks[0] / base.nbytes, 3),
        "runner_bytes": runner.nbytes(),
        "tokens": ids,
        "tokens_per_second": round(rate, 2),
    }


def generate(runner: Any, vocabulary: int, count: int) -> tuple[list[int], float]:
    """`count` greedy tokens after a prompt of 16, and the rate of those after the first."""
    from server.engine.batch import Batch

    block, prompt = 16, torch.randint(0, vocabulary, (16,), generator=torch.Generator().manual_seed(1))
    blocks = -(-(len(prompt) + count) // block)
    runner.allocate(blocks, block)
    ids: list[int] = []
    new, context, started = prompt, 0, 0.0
    for step in range(count):
        context += len(new)
        logits = runner.run(
            Batch(
                tokens=new.numpy(),
                positions=np.arange(context - len(new), context),
                row_start=np.array([0, len(new)], np.int32),
                context=np.array([context], np.int32),
                blocks=np.arange(blocks, dtype=np.int32)[None],
                logit_rows=np.array([len(new) - 1]),
                mixes=((),),
            )
        ).rows
        if not bool(torch.isfinite(logits).all()):
            raise RuntimeError("logits are not finite")
        new = logits[-1].argmax().reshape(1)
        ids.append(int(new))
        if step == 0:
            started = time.perf_counter()
    return ids, (count - 1) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--measure", type=Path, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        folder, cache = options.measure
        result = measure(
            folder, options.kernels, cache if options.cache else None, options.tokens, options.threads, options.group
        )
        sys.stdout.write(json.dumps(result) + "\n")
        return
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder, cache = Path(name) / "model", Path(name) / "cache"
        folder.mkdir()
        parameters = write_model(folder, SHAPE | {"num_hidden_layers": options.layers})
        again = [sys.executable, "-m", "benchmarks.large_base", *sys.argv[1:], "--measure", str(folder), str(cache)]
        results = []
        for _ in range(2 if options.cache else 1):
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
        sys.stdout.write(json.dumps({"parameters": parameters, "runs": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
