"""Which C++ sources lie here, as a digest that setup.py builds into the libraries, and for which processors they are.

Imports nothing of ours: setup.py runs it by its path.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

MACHINES = ("x86_64", "AMD64")
"""What systems call the processors that they are written for."""


def digest(folder: Path) -> str | None:
    """Of the names and contents of all sources in `folder`; None where there are none."""
    paths = sorted([*folder.glob("*.cpp"), *folder.glob("*.h")], key=lambda path: path.name)
    together = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        together.update(f"{path.name} {len(content)}\n".encode() + content)
    return together.hexdigest()[:16] if paths else None
