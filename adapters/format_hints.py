"""What people take for an adapter's folder or its files, and what they should do instead.

Owns the advice, and the names that others give their files. Does not know what an adapter's own are called, nor what is
in a right one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path

MODEL_FILE = "config.json"
"""In a folder that has no adapter's config, the config of a model."""
WHOLE_MODEL = "this is a whole model, as merge_and_unload leaves one, and --model serves it"
COPY_FILES = ": copy the files themselves, as `cp -rL` does"
"""What to do about a link, such as a hub's cache consists of."""
MAX_ENTRIES = 1000
"""Of a folder that is no adapter, how many entries are looked at for one, on each of the levels below it."""
LEVELS = 2

BEGINNINGS = {
    b"version https://git-lfs": "it is Git LFS's pointer to the file; fetch the file itself with `git lfs pull`",
    b"PK": "it is a pickle, which is refused; save_pretrained writes safetensors by default",
    b"<": "it is a web page; download the file itself",
}
"""What files begin with that are taken for a safetensors file."""


FOREIGN = {
    r"\.lora_[AB]\.(?!weight$)([^.]+)\.weight": "the adapter's own name {} is in it: save_pretrained leaves that out",
    r"\.lora_[AB]": "PEFT ends such names in .weight",
    r"[._]lora_[ab]": "mlx-lm writes such names, and its factors transposed: convert it to PEFT's format",
    r"[._](lora_down|lora_up)\.weight|\.alpha": "kohya's scripts write such names: convert it to PEFT's format",
    r"\.trainable_tokens_delta": "it replaces rows of the embedding: retrain without trainable_token_indices",
    r"\.lora_diag": "KaSA truncates the base's weights, which is no sum of B A x: retrain without kasa_config",
}
"""How the names end of tensors that are no half of a pair, where that says what they are. Strangers write the names,
of any length: no pattern begins with a repetition, which a search would try from each of their characters on."""


def lying_loose(name: str, folders: Collection[str], config: str) -> str | None:
    """What is said of a file among the folders of adapters that holds one, or the tensors of one; None for any other,
    and where there is a folder of its name that it is in, or was unpacked into, already.
    """
    if (found := _LOOSE.fullmatch(name)) is None or found["stem"] in folders:
        return None
    if found["tensors"]:
        return f"the tensors lie in the adapter directory itself: move them, with {config}, into {_OWN_FOLDER}"
    return f"it is an archive: unpack it into {_OWN_FOLDER}"


_LOOSE = re.compile(r"(?P<stem>.+?)\.(?:(?P<tensors>safetensors)|zip|7z|rar|tgz|tar|tar\.[a-z0-9]+)", re.IGNORECASE)
_OWN_FOLDER = "a folder of its own, whose name is the adapter's"


def leads_out(name: str, where: str = "the adapter directory") -> str:
    """What is said of a file or folder that is not where it seems to be."""
    return f"{name} leads out of {where}{COPY_FILES}"


def foreign(name: str) -> str | None:
    """What a tensor of that name is, though it belongs to no pair, and what to do; None if that is not known."""
    found = ((told, re.search(f"(?:{end})$", name)) for end, told in FOREIGN.items())
    return next((told.format(*map(repr, match.groups()[:1])) for told, match in found if match), None)


def not_safetensors(data: bytes) -> str | None:
    """What a file is that is no safetensors file, and what to do; None if that is not known."""
    return next((told for start, told in BEGINNINGS.items() if data.startswith(start)), None)


def no_config(folder: Path, config: str) -> str:
    """What follows "`config` is missing": what `folder` holds in its place, and what to do; empty for nothing."""
    if below := folders_with(folder, config):
        return told_below(below, "give", folder, "in its place")
    return f": {WHOLE_MODEL}" if os.path.lexists(folder / MODEL_FILE) else ""


def no_tensors(folder: Path) -> str:
    """What follows "the file of the tensors is missing": what `folder` may have them in, and what to do; or nothing."""
    with suppress(OSError), os.scandir(folder) as entries:
        if found := sorted(entry.name for entry in islice(entries, MAX_ENTRIES) if _TENSORS.fullmatch(entry.name)):
            return (
                f", but {shown(found[0])!r} is there: save the adapter with save_pretrained and safe_serialization, "
                "which writes it in one file"
            )
    return ""


_TENSORS = re.compile(r"(adapter|model|pytorch_model).*\.(safetensors|pt|pth|bin)")


def folders_with(folder: Path, file: str) -> list[str]:
    """The paths from `folder` on of the folders in it that have a file of that name, or else of those in these.

    What is not to be looked into has none. Long paths come last, and so does a training's last checkpoint.
    """
    below = [""]
    for _ in range(LEVELS):
        below = _folders(folder, below)
        if found := [path for path in below if os.path.isfile(folder / path / file)]:
            return sorted(sorted(found), key=len)
    return []


def _folders(folder: Path, within: Sequence[str]) -> list[str]:
    """The folders in those of `folder` that are named, as far as MAX_ENTRIES of all entries tell."""
    # Anything may lie there, and it may be looked at every second: names first.
    left = MAX_ENTRIES
    found = []
    for path in within:
        if not left:
            break
        with suppress(OSError), os.scandir(folder / path) as entries:
            for entry in islice(entries, left):
                left -= 1
                if entry.name[0] != "." and entry.is_dir(follow_symlinks=False):
                    found.append(os.path.join(path, entry.name))
    return found


def told_below(below: Sequence[str], do: str, folder: Path, how: str) -> str:
    """What to do about a folder that has no adapter's config and holds those adapters `below`, sorted as
    `folders_with` does: move the files of the one there is, or of the last checkpoint, up, or `do` with it what `how`
    says.
    """
    several = len({_CHECKPOINT.sub("", path) for path in below}) > 1
    one = shown(below[0] if several else below[-1])
    otherwise = f"{do} {shown(folder.name)}/{one} {how}"
    if several:
        return f", but {len(below)} folders in it have one, {one!r} among them: {otherwise}, or whichever it is to be"
    return (
        f", but {one!r} in it has one, as PEFT saves named adapters and trainers save checkpoints: move the files of "
        f"{one!r} up into the folder, or {otherwise}"
    )


_CHECKPOINT = re.compile(r"(^|/)checkpoint-\d+\Z")


def shown(name: str) -> str:
    """The name of a file or folder as text, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "replace")
