"""What people take for an adapter's folder or its files, and what they should do instead.

Owns the advice. Does not know what an adapter's files are called, nor what is in a right one.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

MODEL_FILE = "config.json"
"""In a folder that has no adapter's config, the config of a model."""
WHOLE_MODEL = "this is a whole model, as merge_and_unload leaves one, and --model serves it"
COPY_FILES = ": copy the files themselves, as `cp -rL` does"
"""What to do about a link, such as a hub's cache consists of."""
MAX_ENTRIES = 1000
"""Of a folder that is no adapter, how many entries are looked at for one."""

BEGINNINGS = {
    b"version https://git-lfs": "it is Git LFS's pointer to the file; fetch the file itself with `git lfs pull`",
    b"PK": "it is a pickle, which is refused; save_pretrained writes safetensors by default",
    b"<": "it is a web page; download the file itself",
}
"""What files begin with that are taken for a safetensors file."""


def not_safetensors(data: bytes) -> str | None:
    """What a file is that is no safetensors file, and what to do; None if that is not known."""
    return next((told for start, told in BEGINNINGS.items() if data.startswith(start)), None)


def no_config(folder: Path, config: str) -> str:
    """What follows "`config` is missing": what `folder` holds in its place, and what to do; empty for nothing."""
    try:
        below = folders_with(folder, config)
    except OSError:  # it is not to be looked into
        below = []
    if below:
        return told_below(below[-1], f"give {shown(folder.name)}/{shown(below[-1])} in its place")
    return f": {WHOLE_MODEL}" if os.path.lexists(folder / MODEL_FILE) else ""


def folders_with(folder: Path, file: str) -> list[str]:
    """The names of those folders in `folder` that have a file of that name. Raises OSError.

    Long names come last, and so does a training's last checkpoint.
    """
    # Anything may lie there, and it may be looked at every second: names first.
    with os.scandir(folder) as entries:
        folders = (entry.name for entry in islice(entries, MAX_ENTRIES) if entry.is_dir(follow_symlinks=False))
        below = [name for name in folders if name[0] != "."]
    return [name for name in sorted(sorted(below), key=len) if (folder / name / file).is_file()]


def told_below(name: str, otherwise: str) -> str:
    """What to do about a folder that has no adapter's config and holds the adapter `name`, or `otherwise`."""
    return (
        f", but {shown(name)!r} in it has one, as PEFT saves named adapters and trainers save checkpoints: move the "
        f"files of {shown(name)!r} up into the folder, or {otherwise}"
    )


def shown(name: str) -> str:
    """The name of a file or folder as text, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")
