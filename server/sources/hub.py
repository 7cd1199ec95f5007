"""The Hugging Face hub, through `huggingface_hub` (the extra `hub`), for ids that somebody asked for by name."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeGuard, TypeVar

from adapters.peft_format import OPTIONAL, REQUIRED
from server.errors import BadModel, InvalidRequest, ServerError, install_command
from server.sources import retries
from server.sources.budget import Spend

T = TypeVar("T")

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_MODEL_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]
_ADAPTER_FILES = [*REQUIRED, *OPTIONAL]
_WEIGHTS, _WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEXES = {"loramux.json": "files", _WEIGHTS_INDEX: "weight_map"}
"""Files that name the files of weights, the one that rules first, and the key that they have them under."""


def is_id(text: str) -> bool:
    """Whether `text` has the form org/name or org/name@revision."""
    return _ID.fullmatch(text) is not None


def check_client(hub_id: str) -> None:
    """Raises ServerError if the client that would fetch `hub_id` is not installed."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise _Unavailable(f"{hub_id} comes from the hub, which needs an extra: {install_command('hub')}")


def fetched(hub_id: str, directory: Path) -> Path | None:
    """The folder that an earlier `fetch_model` brought, if it is still there and whole: no network is asked."""
    try:
        told = json.loads(_record(hub_id, directory).read_text())["path"]
        folder = directory.resolve() / told  # what is told whole stays so, as records of before 2026-12-01 are
        return None if _missing(folder) else folder
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fetch_model(hub_id: str, directory: Path) -> Path:
    """The folder of a base on the hub, recorded for `fetched` when it is whole. Raises BadModel."""
    try:
        folder = _snapshot(hub_id, directory, _MODEL_FILES, ignore=["*/*", "consolidated*"])  # other forms of the same
        missing = _missing(folder)  # where the hub is not reached, what an interrupted fetch left may be given
        if missing:
            raise BadModel(
                f"what there is of {hub_id} lacks {', '.join(missing[:3])}: either an earlier fetch was cut short and "
                "the hub cannot be reached now, or the repository has no base in safetensors",
                "model",
            )
        record = _record(hub_id, directory)
        directory.mkdir(parents=True, exist_ok=True)
        partial = record.with_suffix(f".{os.getpid()}.partial")
        place = directory.resolve()  # within it, it is found after the directory was moved
        told = folder.relative_to(place) if folder.is_relative_to(place) else folder
        partial.write_text(json.dumps({"path": str(told)}))
        os.replace(partial, record)
    except _Unavailable as e:
        if _of_the_machine(e.__cause__):
            raise BadModel(f"{hub_id} can not be written to {directory}: {_reason(e.__cause__)}", "model") from None
        raise BadModel(e.message, "model") from None
    except OSError as e:
        raise BadModel(f"{hub_id} can not be written to {directory}: {_reason(e)}", "model") from None
    return folder


def _missing(folder: Path) -> list[str]:
    """Names of the files that a base needs and `folder` lacks."""
    index = next((name for name in _INDEXES if (folder / name).is_file()), None)
    weights = [_WEIGHTS]
    if index is not None:
        try:
            named = json.loads((folder / index).read_text(encoding="utf-8"))[_INDEXES[index]]
            weights = sorted(set(map(str, named.values() if isinstance(named, dict) else named)))
        except (ValueError, KeyError, TypeError):
            return [f"a list of files in {index}"]
    if index == _WEIGHTS_INDEX and (folder / _WEIGHTS).is_file():
        weights = [_WEIGHTS]  # one whole file is read alone, and the index is of an earlier save
    # Reading the folder has better words for a tokenizer in another form.
    tokenizer = "tokenizer.model" if (folder / "tokenizer.model").is_file() else "tokenizer.json"
    return [name for name in ("config.json", tokenizer, *weights) if not (folder / name).is_file()]


def fetch_adapter(hub_id: str, directory: Path, max_bytes: int, spend: Spend) -> Path:
    """The folder of an adapter on the hub; `spend` is told its bytes.

    Raises InvalidRequest, OSError if the disk refuses, and what `spend` does.
    """
    try:
        return _snapshot(hub_id, directory, _ADAPTER_FILES, max_bytes=max_bytes, spend=spend)
    except _Unavailable as e:
        if _of_the_machine(e.__cause__):
            raise e.__cause__ from None
        raise InvalidRequest(e.message, "source") from None


def _of_the_machine(error: BaseException | None) -> TypeGuard[OSError]:
    """Whether it is the machine's own error and not the hub's: one with a path in it, such as of a full disk."""
    return isinstance(error, OSError) and error.errno is not None


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _record(hub_id: str, directory: Path) -> Path:
    return directory / f"{hub_id.replace('/', '--')}.json"


class _Unavailable(ServerError):
    """The hub did not give what was asked for."""


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
        raise _Unavailable(f"{hub_id!r} is no hub id (org/name or org/name@revision)")
    check_client(hub_id)
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    repo, revision = match[1], match[2]
    sums: dict[str, str] = {}
    try:
        if max_bytes is not None:
            disable_progress_bars()  # a server fetches, and its log is no place for them
            api = huggingface_hub.HfApi()
            info = _again(lambda: api.model_info(repo, revision=revision, files_metadata=True, timeout=30))
            size = sum(f.size or 0 for f in info.siblings or () if f.rfilename in patterns)
            if size > max_bytes:
                raise _Unavailable(f"{hub_id} has {size} bytes, over the limit of {max_bytes} (--max-upload)")
            spend(size)
            revision = info.sha  # what was measured is what is fetched
            sums = {f.rfilename: f.lfs.sha256 for f in info.siblings or () if f.rfilename in patterns and f.lfs}
        folder = _again(
            lambda: huggingface_hub.snapshot_download(
                repo, revision=revision, cache_dir=directory, allow_patterns=patterns, ignore_patterns=list(ignore)
            )
        )
    except ServerError:
        raise
    except Exception as e:  # the library has dozens of error classes of no common base
        reason = " ".join(str(e).split("\n", 1)[0].split())[:300]
        raise _Unavailable(f"{hub_id} could not be fetched from the hub: {reason}") from e
    for name, digest in sums.items():  # the library compares sizes alone
        if _sha256(Path(folder) / name) != digest:
            raise _Unavailable(f"{name} of {hub_id} came with another SHA-256 than the hub says; try again")
    return Path(folder)


def _again(call: Callable[[], T]) -> T:
    """What `call` gives; what broke on the way is tried again after a pause, what the hub refuses is not."""
    for tried in range(1, retries.TRIES):
        try:
            return call()
        except Exception as e:  # the library has dozens of error classes of no common base
            status = getattr(getattr(e, "response", None), "status_code", None)
            if not (_broke(e) if status is None else retries.may_pass(status)):
                raise
            time.sleep(retries.PAUSE * tried)
    return call()


def _broke(error: Exception) -> bool:
    """Whether a call without an answer may go better the next time: it does not offline, or on a full disk."""
    refused = isinstance(error, ConnectionError | FileNotFoundError | ValueError)
    return not refused and getattr(error, "errno", None) is None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
