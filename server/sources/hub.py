"""Downloads from the Hugging Face hub, for ids that the operator or an allowed request names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from adapters.peft_format import OPTIONAL, REQUIRED
from server.errors import BadModel, InvalidRequest, ServerError
from server.sources import retries
from server.sources.budget import Spend

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_OTHER_FORMATS = ["*/*", "consolidated*"]
_ADAPTER_FILES = [*REQUIRED, *OPTIONAL]
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"


class _Unavailable(ServerError):
    """The hub did not give what was asked for."""


def is_id(text: str) -> bool:
    """Whether `text` has the form org/name or org/name@revision."""
    return _ID.fullmatch(text) is not None


def fetched(hub_id: str, directory: Path) -> Path | None:
    """The folder of an earlier `fetch_model`, if it is complete. Does not use the network."""
    import huggingface_hub

    repo, _, revision = hub_id.partition("@")
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision or None, cache_dir=directory, local_files_only=True
            )
        )
    except (OSError, ValueError):  # LocalEntryNotFoundError and invalid ids
        return None
    return None if missing_files(folder) else folder


def fetch_model(hub_id: str, directory: Path) -> Path:
    """Download a base model and return its folder. Raises BadModel."""
    try:
        folder = _snapshot(hub_id, directory, _MODEL_FILES, ignore=_OTHER_FORMATS)
    except _Unavailable as error:
        if _is_local(error.__cause__):
            raise BadModel(f"{hub_id} cannot be written to {directory}: {error.__cause__}", "model") from None
        raise BadModel(error.message, "model") from None
    if missing := missing_files(folder):  # offline, the library returns an incomplete download
        raise BadModel(
            f"{hub_id} lacks {', '.join(missing[:3])}: an earlier download is incomplete and the hub cannot be "
            "reached, or the repository has no base in safetensors",
            "model",
        )
    return folder


def missing_files(folder: Path) -> list[str]:
    """Names of the files that a base needs and `folder` lacks."""
    weights: list[str] = [_WEIGHTS]
    manifest = folder / "loramux.json"
    index = manifest if manifest.is_file() else folder / _WEIGHTS_INDEX
    if index.is_file() and (index == manifest or not (folder / _WEIGHTS).is_file()):
        try:
            content = json.loads(index.read_text(encoding="utf-8"))
            weights = sorted(set(content["files"] if index == manifest else content["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return [f"a list of files in {index.name}"]
    tokenizer = "tokenizer.model" if (folder / "tokenizer.model").is_file() else "tokenizer.json"
    return [name for name in ("config.json", tokenizer, *weights) if not (folder / name).is_file()]


def fetch_adapter(hub_id: str, directory: Path, max_bytes: int, spend: Spend) -> Path:
    """Download an adapter and return its folder. `spend` is called with its size.

    Raises InvalidRequest, OSError if the disk fails, and the errors of `spend`.
    """
    try:
        return _snapshot(hub_id, directory, _ADAPTER_FILES, max_bytes=max_bytes, spend=spend)
    except _Unavailable as error:
        if _is_local(error.__cause__):
            raise error.__cause__ from None  # type: ignore[misc]
        raise InvalidRequest(error.message, "source") from None


def _is_local(error: BaseException | None) -> bool:
    """Whether an error is of this machine, such as a full disk, and not of the hub."""
    return isinstance(error, OSError) and error.errno is not None


def _snapshot(
    hub_id: str,
    directory: Path,
    patterns: list[str],
    ignore: Sequence[str] = (),
    max_bytes: int | None = None,
    spend: Spend = lambda count: None,
) -> Path:
    match = _ID.fullmatch(hub_id)
    if match is None:
        raise _Unavailable(f"{hub_id!r} is not a hub id (org/name or org/name@revision)")
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    repo, revision = match[1], match[2]
    sums: dict[str, str] = {}
    retrying = retries.retrying(_may_pass)
    try:
        if max_bytes is not None:
            disable_progress_bars()  # a server downloads adapters
            api = huggingface_hub.HfApi()
            info = retrying(lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=30))
            files = [file for file in info.siblings or () if file.rfilename in patterns]
            size = sum(file.size or 0 for file in files)
            if size > max_bytes:
                raise _Unavailable(f"{hub_id} has {size} bytes, over the limit of {max_bytes} (--max-upload)")
            spend(size)
            revision = info.sha  # download exactly what was measured
            sums = {file.rfilename: file.lfs.sha256 for file in files if file.lfs}
        folder = Path(
            retrying(
                lambda: huggingface_hub.snapshot_download(
                    repo, revision=revision, cache_dir=directory, allow_patterns=patterns, ignore_patterns=list(ignore)
                )
            )
        )
    except ServerError:
        raise
    except Exception as error:  # the library has dozens of error classes without a common base
        reason = " ".join(str(error).split("\n", 1)[0].split())[:300]
        raise _Unavailable(f"{hub_id} could not be downloaded from the hub: {reason}") from error
    for name, digest in sums.items():  # the library compares sizes only
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                raise _Unavailable(f"{name} of {hub_id} has another SHA-256 than the hub says; try again")
    return folder


def _may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later: not if the hub refuses it, offline, or on a full disk."""
    if isinstance(error, ServerError):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(status, int):
        return retries.is_transient(status)
    return not isinstance(error, ConnectionError | FileNotFoundError | ValueError) and not _is_local(error)
