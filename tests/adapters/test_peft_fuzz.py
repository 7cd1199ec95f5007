"""Damaged adapter files: whatever the bytes are, they are read or refused, never a crash and never another error."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters import peft_format
from adapters.errors import AdapterError

SHAPES = {"model.layers.0.self_attn.q_proj": (6, 4), "model.layers.1.self_attn.q_proj": (6, 4)}
CONFIG = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}).encode()
TENSORS = save(
    {
        f"base_model.model.{path}.lora_{half}.weight": torch.ones((2, into) if half == "A" else (out, 2))
        for path, (out, into) in SHAPES.items()
        for half in "AB"
    }
)


def read(config: bytes, tensors: bytes) -> None:
    for shapes in (SHAPES, None):
        try:
            weights = peft_format.read_bytes(config, tensors, name="a", shapes=shapes)
        except AdapterError as error:
            assert error.message
        else:
            assert all(torch.isfinite(m.A).all() and torch.isfinite(m.B).all() for m in weights.modules.values())


def test_the_whole_file_is_read():
    assert peft_format.read_bytes(CONFIG, TENSORS, name="a", shapes=SHAPES).ranks == [2]


@given(flips=st.lists(st.tuples(st.integers(0, len(TENSORS) - 1), st.integers(0, 7)), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_flipped_bits(flips):
    damaged = bytearray(TENSORS)
    for place, bit in flips:
        damaged[place] ^= 1 << bit
    read(CONFIG, bytes(damaged))


@given(cut=st.integers(0, len(TENSORS)), tail=st.binary(max_size=16))
@settings(max_examples=60, deadline=None)
def test_cut_and_continued(cut, tail):
    read(CONFIG, TENSORS[:cut] + tail)


@given(data=st.binary(max_size=64))
@settings(max_examples=60, deadline=None)
def test_noise(data):
    read(CONFIG, data)
    read(data, TENSORS)


@given(length=st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_any_header_length(length):
    read(CONFIG, length.to_bytes(8, "little") + TENSORS[8:])


@given(data=st.data())
@settings(max_examples=80, deadline=None)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_damaged_config(data):
    place = data.draw(st.integers(0, len(CONFIG) - 1))
    damaged = bytearray(CONFIG)
    damaged[place] = data.draw(st.integers(0, 255))
    read(bytes(damaged), TENSORS)
