"""Advice for files and folders that are not PEFT adapters: what they are, and what to do instead."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

MODEL_CONFIG = "config.json"
WHOLE_MODEL = "this is a whole model, as merge_and_unload writes it; serve it with --model"
COPY_FILES = ": copy the files themselves, for example with `cp -rL`"
"""Advice for links, such as those of a Hugging Face cache."""
MAX_ENTRIES = 1000
"""Entries of a folder that are searched for an adapter, per level."""
LEVELS = 2

FILE_STARTS = {
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file with `git lfs pull`",
    b"PK": "it is a pickle, which is refused; save_pretrained writes safetensors by default",
    b"<": "it is a web page; download the file itself",
}
"""First bytes of files that are mistaken for safetensors."""

# Names come from untrusted files and have any length: no pattern starts with a repetition, so a search is linear.
TENSOR_NAMES = {
    r"\.lora_[AB]\.(?!weight$)([^.]+)\.weight": "it contains the adapter's name {}; save_pretrained leaves that out",
    r"\.lora_[AB]": "PEFT's names end in .weight",
    r"[._]lora_[ab]": "this is mlx-lm's format, with transposed factors: convert it to PEFT's format",
    r"[._](lora_down|lora_up)\.weight|\.alpha": "this is the format of kohya's scripts: convert it to PEFT's format",
    r"\.trainable_tokens_delta": "it replaces rows of the embedding: retrain without trainable_token_indices",
    r"\.lora_diag": "KaSA truncates the base's weights, which is not a sum of B A x: retrain without kasa_config",
}
"""Suffixes of tensor names that are not PEFT LoRA tensors, and what they are."""

_STRAY_FILE = re.compile(
    r"(?P<stem>.+?)\.(?:(?P<tensors>safetensors)|zip|7z|rar|tgz|tar|tar\.[a-z0-9]+)", re.IGNORECASE
)
_OTHER_TENSOR_FILE = re.compile(r"(adapter|model|pytorch_model).*\.(safetensors|pt|pth|bin)")
_CHECKPOINT = re.compile(r"(^|/)checkpoint-\d+\Z")


def stray_file_hint(name: str, folders: Collection[str], config: str) -> str | None:
    """Return advice for a tensor file or archive in the adapter directory itself; None for other files.

    None also if one of `folders` has its name: the file was unpacked or moved there.
    """
    own_folder = "a folder of its own, named after the adapter"
    if (found := _STRAY_FILE.fullmatch(name)) is None or found["stem"] in folders:
        return None
    if found["tensors"]:
        return f"the tensors are in the adapter directory itself: move them, with {config}, into {own_folder}"
    return f"it is an archive: unpack it into {own_folder}"


def outside_error(name: str, where: str = "the adapter directory") -> str:
    """Return the message for a link that leads out of a folder."""
    return f"{name} leads out of {where}{COPY_FILES}"


def tensor_name_hint(name: str) -> str | None:
    """Return what a tensor that is not a lora_A or lora_B weight is; None if unknown."""
    found = ((hint, re.search(f"(?:{suffix})$", name)) for suffix, hint in TENSOR_NAMES.items())
    return next((hint.format(*map(repr, match.groups()[:1])) for hint, match in found if match), None)


def file_content_hint(data: bytes) -> str | None:
    """Return what a file that is not safetensors is; None if unknown."""
    return next((hint for start, hint in FILE_STARTS.items() if data.startswith(start)), None)


def missing_config_hint(folder: Path, config: str) -> str:
    """Return what follows "`config` is missing": what the folder holds instead, or an empty string."""
    if below := folders_with(folder, config):
        return nested_folder_hint(below, "give", folder, "in its place")
    return f": {WHOLE_MODEL}" if os.path.lexists(folder / MODEL_CONFIG) else ""


def missing_tensors_hint(folder: Path) -> str:
    """Return what follows "the tensor file is missing": a file that may hold the tensors, or an empty string."""
    with suppress(OSError), os.scandir(folder) as entries:
        names = sorted(e.name for e in islice(entries, MAX_ENTRIES) if _OTHER_TENSOR_FILE.fullmatch(e.name))
        if names:
            return (
                f", but {printable(names[0])!r} is there: save the adapter with save_pretrained and "
                "safe_serialization, which writes one file"
            )
    return ""


def folders_with(folder: Path, file: str) -> list[str]:
    """Return the subfolders that contain `file`, relative to `folder`: those of the first level that has any.

    Sorted by length, then by name, so that a training's last checkpoint comes last.
    """
    below = [""]
    for _ in range(LEVELS):
        below = _subfolders(folder, below)
        if found := [path for path in below if os.path.isfile(folder / path / file)]:
            return sorted(sorted(found), key=len)
    return []


def _subfolders(folder: Path, parents: Sequence[str]) -> list[str]:
    """Return the subfolders of `parents`, looking at `MAX_ENTRIES` entries in total."""
    left = MAX_ENTRIES
    found = []
    for parent in parents:
        if not left:
            break
        with suppress(OSError), os.scandir(folder / parent) as entries:
            for entry in islice(entries, left):
                left -= 1
                if entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                    found.append(os.path.join(parent, entry.name))
    return found


def nested_folder_hint(below: Sequence[str], verb: str, folder: Path, how: str) -> str:
    """Return advice for a folder whose adapters are in subfolders `below`, sorted as `folders_with` does.

    The advice is to move the files of the only adapter, or of the last checkpoint, up; or to `verb` that folder `how`.
    """
    several = len({_CHECKPOINT.sub("", path) for path in below}) > 1
    one = printable(below[0] if several else below[-1])
    alternative = f"{verb} {printable(folder.name)}/{one} {how}"
    if several:
        return f", but {len(below)} subfolders have one, for example {one!r}: {alternative}, or choose another"
    return (
        f", but {one!r} in it has one, as PEFT saves named adapters and trainers save checkpoints: move the files of "
        f"{one!r} up into the folder, or {alternative}"
    )


def printable(name: str) -> str:
    """Return a file name as valid text, whatever its bytes."""
    return os.fsencode(name).decode("utf-8", "replace")
