"""A tiny base in a folder that a training process can load, and a server over it."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.kernels import choose
from server.model.loader import Base, load_base


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
