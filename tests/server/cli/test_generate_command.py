"""`loramux generate` on the tiny base."""

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
from server.cli.local_engine import local_server
from server.errors import InvalidRequest
from server.model.loader import Base
from server.settings import Settings
from server.tasks.sampling import NUMBERS

runner = CliRunner()
SETTINGS = ["--state-dir", "state", "--library", "library"]


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Base, mood: dict[str, Any]) -> Path:
    """The working directory; its library has an adapter with the task `mood`."""
    monkeypatch.setattr(generate, "load_model", lambda settings, backend, quiet: tiny_base)
    return tmp_path


def test_answer_with_a_weighted_adapter(folder: Path) -> None:
    done = runner.invoke(app, ["generate", "the", "--task", "mood", "--adapter", "mood=0.7", "--json", *SETTINGS])
    assert done.exit_code == 0, done.output
    [adapter] = json.loads(done.stdout)["adapters"]
    assert (adapter["name"], adapter["weight"]) == ("mood", 0.7) and adapter["version"].startswith("mood@")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("top_p", "0"), ("top_p", "1.5"), ("temperature", "2.5"), ("temperature", "nan"), ("max_tokens", "0"),
     ("seed", str(2**64))],
)  # fmt: skip
def test_sampling_limits_are_those_of_the_api(monkeypatch: pytest.MonkeyPatch, flag: str, value: str) -> None:
    monkeypatch.setattr(generate, "load_model", lambda *_, **__: pytest.fail("the base is loaded"))
    done = runner.invoke(app, ["generate", "the", f"--{flag.replace('_', '-')}", value])
    assert isinstance(done.exception, InvalidRequest) and done.exception.param == flag
    assert f"{NUMBERS[flag].high:,}" in done.exception.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "There is no task 'nope'. Known tasks: mood."),
        (["--adapter", "nope"], "'nope' is neither a known adapter nor a folder. Known adapters: mood."),
        (["--adapter", "nope@1f0c9a2be4d7=2"], "'nope@1f0c9a2be4d7' is neither"),
        (["--adapter", "nope", "--library", "none"], "Known adapters: none."),
        (["--adapter", "mood@1f0c9a2be4d7"], "1f0c9a2be4d7"),
        (["--adapter", "mood=x"], "The weight of 'mood' must be a number, not 'x'."),
    ],
)
def test_unknown_names_and_weights(folder: Path, arguments: list[str], message: str) -> None:
    assert message in str(runner.invoke(app, ["generate", "the", *SETTINGS, *arguments]).exception)


@pytest.mark.parametrize("name", ["half", "lr=1e-4"])
def test_an_invalid_folder_is_named(folder: Path, name: str) -> None:
    (folder / name).mkdir()
    (folder / name / "adapter_config.json").write_text("{")
    done = runner.invoke(app, ["generate", "the", "--adapter", name, *SETTINGS])
    assert isinstance(done.exception, AdapterError) and done.exception.message.startswith(f"{name}: ")


async def test_cancelled_start_removes_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Base
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    begun, proceed, closed = threading.Event(), threading.Event(), []

    class FakeServer:
        def close(self, seconds: float) -> None:
            assert list(tmp_path.glob("loramux-*/made"))
            closed.append(seconds)

    def build(settings: Settings, *_: Any) -> FakeServer:
        begun.set()
        assert proceed.wait(60)
        (settings.state_dir / "made").touch()
        return FakeServer()

    async def use() -> None:
        async with local_server(Settings(), tiny_base):
            pytest.fail("the start was cancelled")

    monkeypatch.setattr("server.api.startup.build", build)
    task = asyncio.create_task(use())
    await asyncio.to_thread(begun.wait, 60)
    task.cancel()
    await asyncio.sleep(0.05)
    proceed.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [0.0] and not list(tmp_path.iterdir())
