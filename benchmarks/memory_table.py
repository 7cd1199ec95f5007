"""What training a 7B model takes: full, LoRA on bf16, QLoRA on the 4-bit codes that serve; and how little is trained.

    python -m benchmarks.memory_table                      exact byte counts from the shapes, in seconds
    python -m benchmarks.memory_table --load --layers N    and real loads of N layers, each trained for a step

Counted are weights, gradients and optimizer states: what a method needs whatever the batch. Each row says whether it
was counted or loaded. A real load writes bf16 shards of random weights into a temporary folder, loads them in a
process of its own through `load_base`, trains one step on 64 tokens, and tells the peak of private memory above that
of the imports, activations included. What would not fit into the memory that is free is left out, and that is said.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters import memory
from adapters.layers import LoraSpec, trainable_parameters
from benchmarks.shapes import LLAMA_7B, QWEN_7B
from server.kernels.packed_format import stored_parts
from server.model.config import ModelConfig, from_hf
from server.model.quantization import TABLE_GROUP

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES = {"Llama-7B": (LLAMA_7B, 4), "Qwen2.5-7B": (QWEN_7B, 8)}
"""Name -> its shape, and the rank on q, k, v and o."""
GROUP = 64
FLOAT, BF16 = 4, 2
ADAM = 2 * FLOAT
"""Bytes of a value's two moments."""
METHODS = ("full", "lora", "qlora")
SPARE = 1.25
"""Free memory over what a load needs by the count, for activations and for others."""


@dataclass(frozen=True)
class Bytes:
    """What a method keeps in memory, by kind."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def parameters(config: ModelConfig) -> int:
    """All values of a model: matrices, norms and biases."""
    matrices = config.linear_shapes() | config.table_shapes()
    return sum(math.prod(shape) for shape in (*matrices.values(), *config.tensor_shapes().values()))


def trained(config: ModelConfig, rank: int, targets: tuple[str, ...] = ATTENTION) -> int:
    """Values of a LoRA of this rank: rank * (in + out) for each target."""
    return trainable_parameters(config.linear_shapes(), LoraSpec(rank=rank, targets=targets))


def stored(shapes: Iterable[tuple[int, int]], scheme: str, group: int, double: bool) -> int:
    """Bytes of matrices in the stored layout, codes and scales."""
    parts = (stored_parts(scheme, shape, group, double).values() for shape in shapes)
    return sum(dtype.itemsize * math.prod(size) for matrix in parts for dtype, size in matrix)


def count(config: ModelConfig, method: str, rank: int) -> Bytes:
    """Exact bytes of a method. `full` is bf16 weights and gradients and float32 moments of AdamW; a LoRA's factors,
    gradients and moments are float32, as `adapters.optimizer` has them; QLoRA's linears are int4 in groups of 64 with
    scales in 8 bits, its tables 8 bits.
    """
    everything = parameters(config)
    if method == "full":
        return Bytes(BF16 * everything, BF16 * everything, ADAM * everything)
    lora = trained(config, rank)
    if method == "lora":
        base = BF16 * everything
    else:
        base = stored(config.linear_shapes().values(), "int4", GROUP, True)
        base += stored(config.table_shapes().values(), "int8", TABLE_GROUP, False)
        base += FLOAT * sum(math.prod(shape) for shape in config.tensor_shapes().values())
    return Bytes(base + FLOAT * lora, FLOAT * lora, ADAM * lora)


def table() -> str:
    """The counted table."""
    lines = ["| model | method | trained | weights | + gradients | + AdamW | how |", "|---|---|---|---|---|---|---|"]
    for name, (shape, rank) in SHAPES.items():
        config = from_hf(shape)
        everything = parameters(config)
        for method in METHODS:
            need = count(config, method, rank)
            values = everything if method == "full" else trained(config, rank)
            share = "all" if method == "full" else f"rank {rank}, {everything / values:,.0f}x fewer"
            sums = (need.weights, need.weights + need.gradients, need.total)
            cells = " | ".join(f"{n / 1e9:.2f} GB" for n in sums)
            lines.append(f"| {name} | {method} | {values / 1e6:,.1f}M ({share}) | {cells} | counted |")
    return "\n".join(lines)


def measure(folder: Path, method: str, rank: int) -> dict[str, Any]:
    """Load and train a step; run in a process of its own."""
    import torch

    from adapters.data import Example, Tokens
    from adapters.training import TrainingConfig, train, train_dense
    from benchmarks.large_base import sampled_peak
    from server.jobs.trainable_model import TrainableModel
    from server.kernels import choose
    from server.model.loader import load_base

    torch.ones(1 << 16).sum()  # torch's own threads and buffers are not the model's
    peaks: list[int] = []
    draw = torch.Generator().manual_seed(0)
    with sampled_peak(peaks):
        scheme = "int4" if method == "qlora" else "none"
        base = load_base(
            folder,
            name="large",
            backend=choose("reference"),
            quantization=scheme,
            group_size=GROUP if scheme == "int4" else None,
            double_quant=scheme == "int4",
            table_bits=8 if scheme == "int4" else 16,
            cache_dir=None,
        )
        model = TrainableModel(base, "bfloat16", kept=sys.maxsize if method == "full" else 0)
        ids = tuple(torch.randint(0, base.config.vocab_size, (64,), generator=draw).tolist())
        data = Tokens((Example(ids, (False, *(True,) * 63)),))
        config = TrainingConfig(
            max_steps=1, batch_size=1, lora_rank=rank, target_modules=ATTENTION, activation_checkpointing=True
        )
        if method == "full":
            made = train_dense(model, data, config, lambda event: None)
        else:
            made = train(model, data, config).metadata["training"]
    return {
        "method": method,
        "base_bytes": base.nbytes,
        "parameters": parameters(base.config),
        "peak_private": peaks[0],
        "seconds_of_the_step": made["seconds"],
        "memory": made["memory"],
    }


def load(methods: Iterable[str], layers: int, directory: Path | None) -> None:
    """Real loads of `layers` layers of Qwen2.5-7B's shape, a line of JSON for each."""
    from benchmarks.large_base import write_model

    shape: Mapping[str, Any] = QWEN_7B | {"num_hidden_layers": layers}
    rank = SHAPES["Qwen2.5-7B"][1]
    config = from_hf(shape)
    with tempfile.TemporaryDirectory(dir=directory) as name:
        folder = Path(name)
        write_model(folder, dict(shape) | {"model_type": "qwen2", "eos_token_id": 0})
        for method in methods:
            counted = count(config, method, rank)
            # Full fine-tuning here keeps float32 values beside the bf16 ones, and trains the linears alone.
            need = counted.total + (FLOAT * parameters(config) if method == "full" else 0)
            said = {"layers": layers, "method": method, "counted": counted.total}
            if need * SPARE > memory.free():
                print(json.dumps(said | {"left_out": f"needs {need / 1e9:.1f} GB, {memory.free() / 1e9:.1f} are free"}))
                continue
            again = [sys.executable, "-m", "benchmarks.memory_table", "--measure", str(folder), method, str(rank)]
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True)
            print(json.dumps(said | json.loads(done.stdout.splitlines()[-1])), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", action="store_true", help="real loads, too")
    parser.add_argument("--layers", type=int, default=QWEN_7B["num_hidden_layers"])
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--directory", type=Path, help="where the temporary folder is made")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1], int(args.measure[2]))))
        return
    print(table())
    if args.load:
        load(args.methods.split(","), args.layers, args.directory)


if __name__ == "__main__":
    main()
