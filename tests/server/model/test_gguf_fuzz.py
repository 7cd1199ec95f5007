"""Fuzzing of GGUF files: every input is read or raises BadModel."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.errors import BadModel
from server.model.gguf_file import GgufFile
from server.model.gguf_vocabulary import from_gguf

TMP = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key.encode()) + struct.pack("<I", kind) + value


def file(pairs: list[bytes], tensors: list[bytes], data: bytes = bytes(256), tensor_count: int | None = None) -> bytes:
    count = len(tensors) if tensor_count is None else tensor_count
    return b"GGUF" + struct.pack("<IQQ", 3, count, len(pairs)) + b"".join(pairs) + b"".join(tensors) + data


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


GOOD = file(
    [
        pair("general.architecture", 8, text(b"llama")),
        pair("general.alignment", 4, struct.pack("<I", 32)),
        pair("tokens", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"bc")),
        pair("numbers", 9, struct.pack("<IQ", 5, 3) + struct.pack("<3i", 1, 2, 3)),
    ],
    [tensor("f", (4, 2), 0, 0), tensor("q", (32, 2), 3, 64)],
)


def read(path: Path, content: bytes) -> bool:
    path.write_bytes(content)
    try:
        opened = GgufFile(path)
        for name in opened.tensors:
            opened.stored(name)
            opened.rows(name)[0:1]
    except BadModel:
        return False
    return True


def test_the_valid_file_is_read(tmp_path: Path) -> None:
    assert read(tmp_path / "f", GOOD)


@pytest.mark.parametrize(
    "content",
    [
        file([pair("general.alignment", 4, struct.pack("<I", 0))], []),
        file([pair("general.alignment", 8, text(b"x"))], []),
        file([pair("general.alignment", 6, struct.pack("<f", float("nan")))], []),
        file([pair("general.alignment", 5, struct.pack("<i", -32))], [tensor("f", (4,), 0, 0)]),
        file([pair("general.alignment", 9, struct.pack("<IQ", 4, 2) + bytes(8))], []),
        file([pair("deep", 9, struct.pack("<IQ", 9, 1) * 5000)], []),
        file([], [tensor("f", (2**63, 2**63), 0, 0)]),
        file([], [tensor("f", (4,), 0, 2**64 - 64)]),
        file([], [tensor("f", (4,), 4, 0)]),
        file([], [tensor("f", (4,), 99, 0)]),
        file([], [], tensor_count=2**62),
    ],
)
def test_earlier_findings(tmp_path: Path, content: bytes) -> None:
    assert not read(tmp_path / "f", content)


@TMP
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=5))
def test_changed_bytes(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    data = bytearray(GOOD)
    for at, value in changes:
        data[at] = value
    read(tmp_path / "f", bytes(data))


@TMP
@given(st.integers(0, len(GOOD)), st.binary(max_size=64))
def test_truncated_and_extended(tmp_path: Path, at: int, tail: bytes) -> None:
    read(tmp_path / "f", GOOD[:at] + tail)


NUMBER = st.sampled_from([0, 1, 4, 32, 2**31, 2**32 - 1])
ENTRY = st.builds(
    pair,
    st.sampled_from(["general.alignment", "general.architecture", "x"]),
    st.integers(0, 14),
    st.binary(max_size=24) | NUMBER.map(lambda n: struct.pack("<IQ", n, n)),
)
TENSOR = st.builds(
    tensor,
    st.sampled_from(["f", "g", ""]),
    st.lists(st.sampled_from([0, 1, 4, 32, 2**40, 2**63]), max_size=5).map(tuple),
    st.integers(0, 45),
    st.sampled_from([0, 32, 64, 2**62, 2**64 - 1]),
)


@TMP
@given(st.lists(ENTRY, max_size=3), st.lists(TENSOR, max_size=3), st.binary(max_size=128))
def test_random_headers(tmp_path: Path, pairs: list[bytes], tensors: list[bytes], data: bytes) -> None:
    read(tmp_path / "f", file(pairs, tensors, data))


# Tokenizer metadata, as `GgufFile` returns it

SCALAR = st.sampled_from([None, True, False, -1, 0, 2, 10**6, 2**64 - 1, float("nan"), "", "llama", "a"])
ARRAY = st.sampled_from(
    [np.zeros(0, np.float32), np.ones(389, np.int32), np.full(389, np.nan, np.float32), np.arange(389) * 1.0]
)
NESTED: Any = st.sampled_from([[], ["a"], ["a", "a"], [np.zeros(2), np.zeros(3)], [[["a"]], []]])
VALUE = SCALAR | ARRAY | NESTED
KEYS = st.sampled_from(
    ["model", "tokens", "scores", "token_type", "merges", "pre", "add_bos_token", "add_space_prefix"]
    + ["bos_token_id", "eos_token_id", "eot_token_id", "unknown_token_id", "precompiled_charsmap"]
)
ENTRIES = st.tuples(
    st.sampled_from(["tokens", "scores", "token_type"]),
    st.sampled_from([0, 2, 100, 259, 264, 300, 388]),
    st.sampled_from(["", "▁", "the", "<0x41>", "</s>", "日本"])
    | st.sampled_from([float("nan"), float("-inf"), -2.0, 1e30, -1, 1, 2, 4, 5, 6]),
)


@TMP
@given(changes=st.dictionaries(KEYS, VALUE, max_size=3), entries=st.lists(ENTRIES, max_size=3))
def test_random_vocabularies(
    spm_metadata: dict[str, Any], changes: dict[str, Any], entries: list[tuple[str, int, str | float]]
) -> None:
    metadata = dict(spm_metadata)
    for key, at, value in entries:
        name = f"tokenizer.ggml.{key}"
        if isinstance(value, str) == (key == "tokens") and not (key == "token_type" and isinstance(value, float)):
            metadata[name] = metadata[name].copy()
            metadata[name][at] = value
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    try:
        vocabulary = from_gguf(metadata)
    except BadModel:
        return
    tokenizer = vocabulary.tokenizer
    assert max(tokenizer.encode("the other </s> 日").ids) < len(metadata["tokenizer.ggml.tokens"])
    assert vocabulary.eos_ids <= set(range(389))
