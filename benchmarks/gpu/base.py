"""A random base on the device, random adapters, and a vocabulary for the GPU checklist."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models

from adapters.weights import LoraWeights, LowRank
from server.kernels.cuda import Cuda, packing
from server.kernels.lora import TARGET_MODULES
from server.kernels.packed_format import stored_parts
from server.kernels.threads import available_cpus
from server.kernels.weight import STORED, Weight
from server.model.config import ModelConfig
from server.model.vocabulary import Vocabulary


@dataclass(frozen=True)
class RandomBase:
    """int4 in groups of 64 with double quantization and 8-bit tables, with values like those of a trained model."""

    config: ModelConfig
    weights: dict[str, Weight]
    tensors: dict[str, torch.Tensor]
    backend: Cuda


def random_base(config: ModelConfig, backend: Cuda, device: torch.device) -> RandomBase:
    """A base with random weights, created on `device`: seven billion weights take minutes on a CPU."""
    weights = {path: _linear(shape, device) for path, shape in config.linear_shapes().items()}
    weights |= {path: _table(shape, device) for path, shape in config.table_shapes().items()}
    tensors = {
        name: torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
        for name, shape in config.tensor_shapes().items()
    }
    return RandomBase(config, weights, tensors, backend)


@dataclass(frozen=True)
class Kind:
    """Rank of adapters, and names of their linear layers."""

    rank: int
    linears: tuple[str, ...] = TARGET_MODULES

    def __str__(self) -> str:
        return f"rank {self.rank} on {'all linears' if self.linears == TARGET_MODULES else ', '.join(self.linears)}"

    def shapes(self, config: ModelConfig) -> dict[str, tuple[int, int]]:
        """Module path -> (outputs, inputs) of the adapted layers."""
        found = config.linear_shapes()
        return {path: shape for path, shape in found.items() if path.rpartition(".")[2] in self.linears}


def random_adapters(config: ModelConfig, backend: Cuda, count: int, kind: Kind) -> list[LoraWeights]:
    """Random adapters, prepared for copying to the device, using all processors."""
    threads = torch.get_num_threads()
    torch.set_num_threads(available_cpus())
    try:
        pool = torch.randn(1 << 22)
        return [_adapter(pool, config, backend, number, kind) for number in range(count)]
    finally:
        torch.set_num_threads(threads)


def _adapter(pool: torch.Tensor, config: ModelConfig, backend: Cuda, number: int, kind: Kind) -> LoraWeights:
    """Adapter `number` with values from `pool`."""
    rank, modules, at = kind.rank, {}, number * 7919
    for path, (out, width) in kind.shapes(config).items():
        size = rank * (out + width)
        at = (at + size) % (len(pool) - size)
        values = pool[at : at + size] * 0.01
        modules[path] = LowRank(values[: rank * width].view(rank, width), values[rank * width :].view(out, rank), 1.0)
    return backend.prepare(LoraWeights(f"a{number}", f"{number:064x}", modules), "int4")


def vocabulary_of(size: int) -> Vocabulary:
    """A vocabulary with one word per id; id 0 ends an answer."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t1"))
    tokenizer.decoder = decoders.ByteFallback()
    return Vocabulary(tokenizer, None, frozenset({0}), None, {}, False, 0)


def _linear(shape: tuple[int, int], device: torch.device) -> Weight:
    group = 64
    stored = stored_parts("int4", shape, group, True)
    spread = shape[1] ** -0.5 / 4
    offset = 127.5 / 512  # mean contribution of codes from 0 to 255, relative to `spread`
    tensors = {}
    for name, (dtype, size) in stored.items():
        if dtype == torch.uint8:
            tensors[name] = torch.randint(0, 256, size, dtype=dtype, device=device)
        else:
            value = {
                "scale_step": spread / 512,
                "scale_base": spread,
                "zero_step": spread / 512,
                # The mean weight is 0. Otherwise all outputs would be dominated by the sum of the inputs.
                "zero_base": -(7.5 * (1 + offset) + offset) * spread,
            }
            tensors[name] = torch.full(size, value[name], dtype=dtype, device=device)
    return packing.pack(Weight("int4", STORED, shape, group, tensors))


def _table(shape: tuple[int, int], device: torch.device) -> Weight:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    scale = torch.full((shape[0], shape[1] // 32), 0.02 / 127, dtype=torch.float16, device=device)
    return packing.pack(Weight("int8", STORED, shape, 32, {"codes": codes, "scale": scale}))
