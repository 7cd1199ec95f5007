"""Flags generated from settings, and terminal output."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.table import Table
from typer.testing import CliRunner

from server.cli import app, output
from server.cli.options import ALL_SETTINGS, SECRETS
from server.settings import Settings, flag

runner = CliRunner()


@pytest.fixture(autouse=True)
def _working_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield " ".join(path), command
        return
    for name, child in children.items():
        yield from commands(child, (*path, name))


def test_serve_has_a_flag_for_every_setting_except_secrets() -> None:
    shown = runner.invoke(app, ["serve", "--help"], env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}).output
    assert all(flag(name) in shown for name in ALL_SETTINGS)
    assert not any(f"{flag(name)} " in shown for name in SECRETS)
    assert set(ALL_SETTINGS) | SECRETS == set(Settings.model_fields)
    assert "(auto, cpu, cuda) [auto]" in " ".join(shown.split()) and "[90d]" in shown


def test_every_setting_has_a_description() -> None:
    assert not [name for name, field in Settings.model_fields.items() if not field.description]


def test_every_command_with_a_result_prints_json() -> None:
    every = dict(commands(typer.main.get_command(app)))
    without = {name for name, command in every.items() if not any("--json" in p.opts for p in command.params)}
    assert without == {"serve", "bench adapters"} and len(every) > 15


def test_home_directory_in_path_options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A shell does not expand `~` in `--output=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found, context = {}, typer.Context(typer.main.get_command(app))
    for name, command in commands(context.command):
        for option in (p for p in command.params if p.param_type_name == "option"):
            with contextlib.suppress(typer.BadParameter):
                value = option.process_value(context, "~/x")
                if isinstance(value, Path) and option.name not in ("config", "state_dir"):  # expanded as settings
                    found[f"{name} {option.name}"] = value
    assert set(found.values()) == {tmp_path / "x"}
    assert found.keys() >= {"train data", "train output", "search output", "evaluate answers", "prune output"}


def test_commands_that_do_not_listen_need_no_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAMUX_HOST", "0.0.0.0")
    (tmp_path / "tiny.gguf").touch()
    done = runner.invoke(app, ["pull", str(tmp_path / "tiny.gguf"), "--json"])
    assert json.loads(done.output) == {"name": "tiny", "path": str(tmp_path / "tiny.gguf")}
    assert "keys" in str(runner.invoke(app, ["doctor", "--json"]).exception)


def test_progress_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def work(**options: Any) -> None:
        with output.progress("bytes", **options) as update:
            for done in (0, 5, 10):
                update("fetching", done, 10)
            update("loading", 0, 0)
            update("loading", 7, 0)

    work()
    assert capsys.readouterr().err == "fetching ...\nloading ...\n"
    monkeypatch.setattr(output, "PROGRESS_INTERVAL", 0.0)
    work()
    assert capsys.readouterr().err == "fetching ...\nfetching 50 %\nfetching 100 %\nloading ...\n"
    lines: list[str] = []
    work(quiet=True)
    work(log=lines.append)
    assert len(lines) == 4 and capsys.readouterr().err == ""


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3072.0 GiB")])
def test_format_size(size: int, text: str) -> None:
    assert output.format_size(size) == text


def test_control_characters_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name")
    table.add_row("a\x1b]0;b\x07")
    output.stdout().print(table)
    output.stdout().print("one [x]\r\n\ttwo \u202e\x9b2J\r")
    output.print_error("no \x1b[2J")
    printed = capsys.readouterr()
    assert "a\\x1b]0;b\\x07" in printed.out and "one [x]\n        two \\u202e\\x9b2J\\r\n" in printed.out
    assert "\x1b" not in printed.out and printed.err == "error: no \\x1b[2J\n"
