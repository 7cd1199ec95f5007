"""A tiny base in a folder that a training process can load, and a server over it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.kernels import choose
from server.model.config import to_hf
from server.model.loader import Base, load_base
from server.model.vocabulary import write_folder


@pytest.fixture
def tiny_folder(tiny_base: Base, tmp_path: Path) -> Path:
    """`tiny_base` as a Hugging Face folder, in bf16, which its weights are."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    tensors = {f"{p}.weight": tiny_base.backend.dequantize(w).bfloat16() for p, w in tiny_base.weights.items()}
    save_file({**tensors, **{n: t.to(torch.bfloat16) for n, t in tiny_base.tensors.items()}}, folder / "a.safetensors")
    (folder / "a.safetensors").rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(tiny_base.config)))
    write_folder(tiny_base.vocabulary, folder)
    return folder


@pytest.fixture
def folder_base(tiny_folder: Path, tmp_path: Path) -> Base:
    """The base that a training process finds in `tiny_folder`."""
    return load_base(
        tiny_folder,
        name="tiny",
        backend=choose("reference"),
        quantization="none",
        cache_dir=tmp_path / "state" / "cache",
    )
