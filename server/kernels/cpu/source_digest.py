"""The digest of the C++ sources, which setup.py builds into the libraries. setup.py runs this file by its path."""

from __future__ import annotations

import hashlib
from pathlib import Path

MACHINES = ("x86_64", "AMD64")
"""Values of platform.machine() that the kernels support."""


def digest(folder: Path) -> str | None:
    """Digest of the names and contents of all sources in `folder`; None if there are none."""
    paths = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")], key=lambda path: path.name)
    state = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        state.update(f"{path.name} {len(content)}\n".encode() + content)
    return state.hexdigest()[:16] if paths else None
