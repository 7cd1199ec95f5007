"""`loramux generate` over the tiny base: its JSON, the bounds of its flags, and names that nothing here has."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.errors import AdapterError
from server.cli import app, generate
from server.cli.local_engine import opened
from server.errors import InvalidRequest
from server.model.loader import Base
from server.settings import Settings
from server.tasks.sampling import NUMBERS

runner = CliRunner()
SETTINGS = ["--state-dir", "state", "--library", "library"]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Base, mood: dict[str, Any]) -> Path:
    """A folder with an adapter that ships, which brings the task `mood`."""
    monkeypatch.setattr(generate, "open_base", lambda settings, backend, quiet: tiny_base)
    return tmp_path


def test_an_answer_names_its_adapters_as_the_server_does(given: Path) -> None:
    done = runner.invoke(app, ["generate", "the", "--task", "mood", "--adapter", "mood=0.7", "--json", *SETTINGS])
    assert done.exit_code == 0, done.output
    [adapter] = json.loads(done.stdout)["adapters"]
    assert (adapter["name"], adapter["weight"]) == ("mood", 0.7) and adapter["version"].startswith("mood@")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("top_p", "0"), ("top_p", "1.5"), ("temperature", "2.5"), ("temperature", "nan"), ("max_tokens", "0"),
     ("seed", str(2**64))],
)  # fmt: skip
def test_the_bounds_are_those_of_the_api(monkeypatch: pytest.MonkeyPatch, flag: str, value: str) -> None:
    monkeypatch.setattr(generate, "open_base", lambda *_, **__: pytest.fail("the base is loaded before that"))
    done = runner.invoke(app, ["generate", "the", f"--{flag.replace('_', '-')}", value])
    assert isinstance(done.exception, InvalidRequest) and done.exception.param == flag
    assert f"{NUMBERS[flag].high:,}" in done.exception.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "there is no task 'nope' (mood here); give the folder of the adapter that brings it"),
        (["--adapter", "nope"], "'nope' is neither an adapter (mood here) nor a folder; give the folder of one"),
        (["--adapter", "nope@1f0c9a2be4d7=2"], "'nope@1f0c9a2be4d7' is neither an adapter (mood here)"),
        (["--adapter", "nope", "--library", "none"], "'nope' is neither an adapter (none is here)"),
        (["--adapter", "mood@1f0c9a2be4d7"], "the adapter 'mood' has no version '1f0c9a2be4d7'"),
    ],
)
def test_a_name_that_nothing_here_has(given: Path, arguments: list[str], message: str) -> None:
    done = runner.invoke(app, ["generate", "the", *SETTINGS, *arguments])
    assert message in str(done.exception)


@pytest.mark.parametrize("folder", ["half", "lr=1e-4"])
def test_a_folder_that_is_refused_is_named(given: Path, folder: str) -> None:
    (given / folder).mkdir()
    (given / folder / "adapter_config.json").write_text("{")
    done = runner.invoke(app, ["generate", "the", "--adapter", folder, *SETTINGS])
    assert isinstance(done.exception, AdapterError) and done.exception.message.startswith(f"{folder}: ")


async def test_who_is_told_to_end_while_it_opens_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Base
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun, go_on, closed = threading.Event(), threading.Event(), []

    class House:
        def close(self, seconds: float) -> None:
            assert list(tmp_path.glob("loramux-*/made")), "its folder is still there"
            closed.append(seconds)

    def build(settings: Settings, *_: Any) -> House:
        begun.set()
        assert go_on.wait(60)
        (settings.state_dir / "made").touch()
        return House()

    monkeypatch.setattr("server.api.startup.build", build)

    async def use() -> None:
        async with opened(Settings(), tiny_base):
            pytest.fail("it was told to end")

    task = asyncio.create_task(use())
    await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    await asyncio.sleep(0.05)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [0.0] and not list(tmp_path.iterdir())
