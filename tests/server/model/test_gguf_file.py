"""Headers and tensors of GGUF files, against the `gguf` package."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from server.errors import BadModel
from server.kernels.packed_format import dequantize_stored
from server.model.gguf_file import GgufFile
from server.model.quantization import quantize

KINDS = gguf.GGMLQuantizationType


def write(path: Path, tensors: dict[str, tuple[np.ndarray, KINDS]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 1e4)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["a", "Ġb", "ü"])
    writer.add_array("tokenizer.ggml.token_type", [1, 1, 3])
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32) * 0.1


def test_metadata_and_shapes(tmp_path: Path) -> None:
    file = GgufFile(write(tmp_path / "m.gguf", {"a": (values(4, 64), KINDS.Q4_0), "b": (values(5), KINDS.F32)}))
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["llama.block_count"] == 2
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "Ġb", "ü"]
    assert file.metadata["tokenizer.ggml.token_type"].tolist() == [1, 1, 3]
    assert file.tensors["a"].shape == (4, 64) and file.tensors["b"].shape == (5,)
    assert file.tensors["a"].type_name == "Q4_0"
    assert torch.equal(file.floats("b"), torch.from_numpy(values(5)))


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q4_1, KINDS.Q8_0])
def test_blocks_are_stored_without_loss(tmp_path: Path, kind: KINDS) -> None:
    matrix = values(24, 96)
    file = GgufFile(write(tmp_path / "m.gguf", {"w": (matrix, kind)}))
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind))
    stored = file.stored("w")
    assert stored is not None
    assert (stored.scheme, stored.group) == (("int8" if kind == KINDS.Q8_0 else "int4"), 32)
    assert torch.equal(dequantize_stored(stored), expected)
    assert torch.equal(file.floats("w"), expected)


@pytest.mark.parametrize("kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q5_1, KINDS.Q8_0])
def test_rows_equal_those_of_the_gguf_package(tmp_path: Path, kind: KINDS) -> None:
    matrix = values(40, 64)
    file = GgufFile(write(tmp_path / "m.gguf", {"w": (matrix, kind)}))
    expected = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(matrix, kind), kind))
    rows = file.rows("w")
    assert rows.shape == (40, 64)
    assert torch.equal(rows[7:31].float(), expected[7:31])
    if kind in (KINDS.F32, KINDS.Q5_1):
        assert file.stored("w") is None


def test_codes_of_minus_128_have_no_lossless_form(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"w": (values(2, 32), KINDS.Q8_0)})
    info = GgufFile(path).tensors["w"]
    data = bytearray(path.read_bytes())
    data[info.offset + 2] = 0x80
    path.write_bytes(data)
    assert GgufFile(path).stored("w") is None


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.Q4_1, KINDS.Q8_0])
def test_non_finite_scales_have_no_lossless_form(tmp_path: Path, kind: KINDS) -> None:
    path = write(tmp_path / "m.gguf", {"w": (values(2, 32), kind)})
    info = GgufFile(path).tensors["w"]
    data = bytearray(path.read_bytes())
    data[info.offset : info.offset + 2] = np.float16(np.inf).tobytes()
    path.write_bytes(data)
    file = GgufFile(path)
    assert file.stored("w") is None and not torch.isfinite(file.floats("w")).all()
    with pytest.raises(BadModel, match="w holds values that are not finite"):
        quantize(file.rows("w"), "int4", 32, name="w")


def test_broken_files_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "m.gguf", {"w": (values(8, 64), KINDS.Q4_0)}).read_bytes()
    for cut in (0, 3, 23, 30, 120, 250, len(whole) - 64):
        path = tmp_path / f"cut{cut}.gguf"
        path.write_bytes(whole[:cut])
        with pytest.raises(BadModel):
            GgufFile(path)
    other = tmp_path / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + whole[4:])
    with pytest.raises(BadModel, match="not a GGUF file"):
        GgufFile(other)
    other.write_bytes(b"GGUF\x01\x00\x00\x00" + whole[8:])
    with pytest.raises(BadModel, match="version 1"):
        GgufFile(other)
    other.write_bytes(b"GGUF\x00\x00\x00\x03" + whole[8:])
    with pytest.raises(BadModel, match="big-endian"):
        GgufFile(other)


def test_repeated_keys_and_tensors_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"wa": (values(2, 32), KINDS.Q8_0), "wb": (values(2, 32), KINDS.Q8_0)})
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"\2\0\0\0\0\0\0\0wb", b"\2\0\0\0\0\0\0\0wa"))
    with pytest.raises(BadModel, match="it has the tensor wa twice"):
        GgufFile(path)
    path.write_bytes(whole.replace(b"llama.rope.freq_base", b"general.architecture"))
    with pytest.raises(BadModel, match="it has the key general.architecture twice"):
        GgufFile(path)


@pytest.mark.parametrize("kind", [KINDS.Q4_0, KINDS.F32, KINDS.Q5_1])
def test_a_file_that_is_truncated_during_reading_is_refused(tmp_path: Path, kind: KINDS) -> None:
    path = write(tmp_path / "m.gguf", {"w": (values(64, 64), kind)})
    file = GgufFile(path)
    os.truncate(path, 500)
    for read in (file.stored, file.floats) if kind == KINDS.Q4_0 else (file.floats,):
        with pytest.raises(BadModel, match=r"m\.gguf was truncated while it was read; start again"):
            read("w")
    path.unlink()
    with pytest.raises(BadModel, match=r"m\.gguf cannot be read: No such file"):
        file.floats("w")
    with pytest.raises(BadModel, match=r"m\.gguf cannot be read: No such file"):
        GgufFile(path)


def test_unknown_tensor_types_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"w": (values(8, 64), KINDS.Q4_0)})
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", 1) + b"w") + 9 + 4 + 16  # behind the name and two dimensions
    assert data[at] == KINDS.Q4_0
    data[at] = 99
    path.write_bytes(data)
    with pytest.raises(BadModel, match="type number 99 are not supported; quantize the model to"):
        GgufFile(path)


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_alignment(tmp_path: Path, alignment: int) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_custom_alignment(alignment)
    for name, count in (("a", 5), ("b", 7)):
        writer.add_tensor(name, values(count))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "m.gguf")
    assert file.tensors["a"].offset % alignment == 0
    for name, count in (("a", 5), ("b", 7)):
        assert torch.equal(file.floats(name), torch.from_numpy(values(count)))
