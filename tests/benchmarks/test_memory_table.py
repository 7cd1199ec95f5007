"""The counts of the memory table: what is published of LoRA and QLoRA at 7B, and that real loads have these bytes."""

from __future__ import annotations

import math

import pytest
import torch

from adapters.layers import LoraSpec, inject, trainable_parameters
from benchmarks import memory_table
from benchmarks.memory_table import count, parameters, stored, table, trained
from benchmarks.shapes import LLAMA_7B, QWEN_7B
from server.jobs.trainable_model import TrainableModel
from server.model.config import from_hf
from server.model.quantization import quantize


def test_trained_parameters_of_7b_are_over_a_thousand_times_fewer() -> None:
    llama, qwen = from_hf(LLAMA_7B), from_hf(QWEN_7B)
    assert parameters(llama) == 6_738_415_616 and parameters(qwen) == 7_615_616_512, "as the models' own cards have it"
    assert trained(llama, 4) == 4_194_304 and trained(qwen, 8) == 5_046_272
    assert parameters(llama) > 1000 * trained(llama, 4) and parameters(qwen) > 1000 * trained(qwen, 8)


def test_full_lora_and_qlora_of_7b() -> None:
    full, lora, qlora = (count(from_hf(QWEN_7B), method, 8) for method in memory_table.METHODS)
    assert full.weights + full.gradients > 28e9 and full.total > 3 * full.weights
    assert 14e9 < lora.total < 16e9
    assert qlora.total < 5e9 and count(from_hf(LLAMA_7B), "qlora", 4).total < 4e9
    assert "1,607x fewer" in table() and table().count("counted") == 6


def test_a_tree_trains_what_is_counted(tiny_base) -> None:
    spec = LoraSpec(rank=3, targets=memory_table.ATTENTION)
    found = inject(TrainableModel(tiny_base, "float32").tree, spec)
    assert sum(p.numel() for layer in found.values() for p in (layer.lora_A, layer.lora_B)) == trained(
        tiny_base.config, 3
    )
    assert trained(tiny_base.config, 3) == trainable_parameters(tiny_base.shapes(), spec)
    matrices = sum(math.prod(weight.shape) for weight in tiny_base.weights.values())
    assert parameters(tiny_base.config) == matrices + sum(t.numel() for t in tiny_base.tensors.values())


@pytest.mark.parametrize(("scheme", "double"), [("int4", True), ("int4", False), ("nf4", True), ("int8", False)])
def test_stored_bytes_are_those_of_real_matrices(scheme: str, double: bool) -> None:
    shapes = [(40, 128), (16, 64)]
    made = [quantize(torch.randn(shape), scheme, 32, double) for shape in shapes]
    assert stored(shapes, scheme, 32, double) == sum(weight.nbytes for weight in made)
