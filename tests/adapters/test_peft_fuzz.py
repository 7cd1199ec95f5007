"""Random adapter files are read or refused with an AdapterError."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from adapters.errors import AdapterError
from adapters.peft_format import read_folder

SHAPES = {"model.layers.0.self_attn.q_proj": (8, 4), "model.layers.0.self_attn.v_proj": (4, 4)}
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
TENSORS = safetensors.torch.save(
    {
        f"base_model.model.{path}.lora_{side}.weight": torch.ones(*(2, n_in) if side == "A" else (n_out, 2))
        for path, (n_out, n_in) in SHAPES.items()
        for side in "AB"
    }
)
KEYS = (
    "peft_type", "r", "lora_alpha", "target_modules", "bias", "use_rslora", "rank_pattern", "alpha_pattern",
    "exclude_modules", "layers_to_transform", "layers_pattern", "use_dora", "modules_to_save", "init_lora_weights",
    "target_parameters", "layer_replication", "fan_in_fan_out", "task_type", "lora_bias", "made_up",
)  # fmt: skip
WORDS = ("LORA", "none", "q_proj", "all-linear", ".*q_proj", "(a+)+$", "[", "layers", "\ud800", "1" * 400)
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=20)
    | st.sampled_from([2**63, -1, 0, 1e308, 10**400])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.sampled_from(WORDS) | st.text(), v, max_size=3)
)


def read(config: bytes, tensors: bytes) -> bool:
    with TemporaryDirectory() as folder:
        (Path(folder) / "adapter_config.json").write_bytes(config)
        (Path(folder) / "adapter_model.safetensors").write_bytes(tensors)
        try:
            read_folder(Path(folder), name="fuzzed", shapes=SHAPES)
        except AdapterError as error:
            json.dumps(error.message)
            assert len(error.message) < 5000
            return False
    return True


def test_the_unchanged_adapter_is_read() -> None:
    assert read(json.dumps(GOOD).encode(), TENSORS)


@given(st.sampled_from(KEYS), SCALARS)
@example("r", 10**400)
@example("rank_pattern", {"q_proj": 10**400})
def test_any_value_of_one_key(key: str, value: object) -> None:
    read(json.dumps({**GOOD, key: value}).encode(), TENSORS)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4))
def test_any_config(changed: dict) -> None:
    read(json.dumps({**GOOD, **changed}).encode(), TENSORS)


@given(st.binary(max_size=200) | st.recursive(VALUES, st.lists).map(lambda v: json.dumps(v).encode()))
def test_any_bytes_as_config(config: bytes) -> None:
    assert not read(config, TENSORS)


@given(st.lists(st.tuples(st.integers(0, len(TENSORS) - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_tensor_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(TENSORS)
    for at, value in changes:
        data[at] = value
    read(json.dumps(GOOD).encode(), bytes(data))


@given(st.integers(0, len(TENSORS) - 1), st.binary(max_size=64))
def test_truncated_and_extended_tensors(at: int, tail: bytes) -> None:
    if at + len(tail) != len(TENSORS):
        assert not read(json.dumps(GOOD).encode(), TENSORS[:at] + tail)
    else:
        read(json.dumps(GOOD).encode(), TENSORS[:at] + tail)


@given(st.dictionaries(st.text(max_size=20) | st.sampled_from(["__metadata__", "a.lora_A.weight"]), VALUES, max_size=3))
def test_any_header(header: dict) -> None:
    text = json.dumps(header).encode()
    assert not read(json.dumps(GOOD).encode(), len(text).to_bytes(8, "little") + text + bytes(64))
