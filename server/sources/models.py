"""`resolve_model`: what `--model` says, as a name and a place on this machine."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from adapters.weights import NAME
from server.errors import BadModel
from server.settings import keep_transfers_in
from server.sources import catalogue, hub

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and of how much (0: not known)."""


class Resolved(NamedTuple):
    """A base's name, as clients see it, and its folder or GGUF file."""

    name: str
    path: Path


def resolve_model(model: str, state_dir: Path, *, progress: Progress | None = None) -> Resolved:
    """The base that `model` names: a catalogue name, a local folder, a .gguf file, or a hub id (org/name@revision).

    Fetches what is not there yet to `state_dir`/models; what appears there is whole. Raises BadModel, which says what
    to do when it cannot be had.
    """
    found = locate(model, state_dir)
    if found is not None:
        return found
    if model in catalogue.ENTRIES:
        return Resolved(model, catalogue.fetch(catalogue.ENTRIES[model], state_dir / "models", progress))
    try:
        keep_transfers_in(state_dir / "cache")
        return Resolved(_hub_name(model), hub.fetch_model(model, state_dir / "models" / "hub"))
    except BadModel as e:
        raise BadModel(f"{no_folder(model)} {e.message}", "model") from None


def no_folder(hub_id: str) -> str:
    """How to begin what is said of a hub id, which is a mistyped folder as often."""
    return f"there is no folder {hub_id} here; as a hub id:"


def locate(model: str, state_dir: Path) -> Resolved | None:
    """The base that `model` names if it is on this machine, None if it has to be fetched. Raises BadModel."""
    if model in catalogue.ENTRIES:
        placed = catalogue.present(catalogue.ENTRIES[model], state_dir / "models")
        return None if placed is None else Resolved(model, placed)
    path = _on_this_machine(model) if model else None
    if path is not None:
        return Resolved(_served_name(path.stem if path.is_file() else path.resolve().name), path.resolve())
    if hub.is_id(model) and not model.endswith(".gguf"):
        known = hub.fetched(model, state_dir / "models" / "hub")
        return None if known is None else Resolved(_hub_name(model), known)
    near = difflib.get_close_matches(model, catalogue.ENTRIES, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise BadModel(
        f"the model {model!r} is no name of the catalogue ({', '.join(catalogue.ENTRIES)}), no folder or .gguf file "
        f"on this machine and no hub id (org/name){hint}",
        "model",
    )


def _on_this_machine(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # longer than a path may be, behind a closed door, or a user's whom nobody knows
        return None


def _hub_name(hub_id: str) -> str:
    return _served_name(hub_id.partition("@")[0].rpartition("/")[2])


def _served_name(name: str) -> str:
    """`name` with what a served name can not have replaced."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64]
    return cleaned if NAME.fullmatch(cleaned) else "model"
