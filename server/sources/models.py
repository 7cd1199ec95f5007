"""`resolve_model`: turns `--model` into a name and a local path."""

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
"""Called with the name of the operation, the amount done, and the total (0: unknown)."""


class Resolved(NamedTuple):
    """A base's name, as clients see it, and its folder or GGUF file."""

    name: str
    path: Path


def resolve_model(model: str, state_dir: Path, *, progress: Progress | None = None) -> Resolved:
    """Find a base model, and download it to `state_dir`/models if needed.

    Args:
        model: A catalogue name, a local folder, a .gguf file, or a hub id (org/name@revision).

    Raises:
        BadModel: it cannot be found or downloaded.
    """
    found = locate(model, state_dir)
    if found is not None:
        return found
    if model in catalogue.ENTRIES:
        return Resolved(model, catalogue.fetch(catalogue.ENTRIES[model], state_dir / "models", progress))
    try:
        keep_transfers_in(state_dir / "cache")
        return Resolved(_hub_name(model), hub.fetch_model(model, state_dir / "models" / "hub"))
    except BadModel as error:
        raise BadModel(f"{no_folder(model)} {error.message}", "model") from None


def no_folder(hub_id: str) -> str:
    """Begins messages about a hub id, which may be a mistyped path."""
    return f"there is no folder {hub_id} here; as a hub id:"


def locate(model: str, state_dir: Path) -> Resolved | None:
    """The base `model` if it is on this machine, None if it must be downloaded. Raises BadModel."""
    if model in catalogue.ENTRIES:
        local = catalogue.find_local(catalogue.ENTRIES[model], state_dir / "models")
        return None if local is None else Resolved(model, local)
    path = _existing_path(model) if model else None
    if path is not None:
        return Resolved(_served_name(path.stem if path.is_file() else path.resolve().name), path.resolve())
    if hub.is_id(model) and not model.endswith(".gguf"):
        keep_transfers_in(state_dir / "cache")
        known = hub.fetched(model, state_dir / "models" / "hub")
        return None if known is None else Resolved(_hub_name(model), known)
    near = difflib.get_close_matches(model, catalogue.ENTRIES, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise BadModel(
        f"the model {model!r} is not in the catalogue ({', '.join(catalogue.ENTRIES)}), not a folder or .gguf file "
        f"on this machine, and not a hub id (org/name){hint}",
        "model",
    )


def _existing_path(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):  # too long, not permitted, or an unknown user
        return None


def _hub_name(hub_id: str) -> str:
    return _served_name(hub_id.partition("@")[0].rpartition("/")[2])


def _served_name(name: str) -> str:
    """`name` with the characters replaced that names may not have."""
    cleaned = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip("._-")[:64]
    return cleaned if NAME.fullmatch(cleaned) else "model"
