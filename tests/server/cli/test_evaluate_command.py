"""`loramux evaluate` on the tiny base."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.cli import app, evaluate, main
from server.errors import InvalidRequest
from server.model.loader import Base
from server.tasks import evaluation

runner = CliRunner()
SETTINGS = ["--state-dir", "state", "--library", "library"]
MOOD = ["evaluate", "data.jsonl", "--task", "mood"]


@pytest.fixture
def folder(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_base: Base,
    tiny_adapter: Callable[..., LoraWeights],
    mood: dict[str, Any],
) -> Path:
    """The working directory with data, a task.json, an adapter `mine/mood`, and the shipped adapter `mood`."""
    monkeypatch.setattr(evaluate, "load_model", lambda settings, backend, quiet: tiny_base)
    save(tiny_adapter(2), tmp_path / "mine" / "mood")
    (tmp_path / "task.json").write_text(json.dumps({**mood, "task": "another", "labels": []}))
    lines = [json.dumps({"input": f"text {i}", "output": "good" if i % 2 else "bad"}) for i in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_candidates_on_the_same_examples(folder: Path) -> None:
    mix = "mood=0.5+mine/mood=-1"
    command = [*MOOD, "--metric", "loss", "--metric", "accuracy", "--limit", "7", "--answers", "answers.jsonl"]
    command += [part for c in ("mood", "mine/mood", "base", mix) for part in ("--candidate", c)]
    done = runner.invoke(app, [*command, "--json", *SETTINGS])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    mood, mine, base, mixed = result["candidates"]
    assert result["examples"] == 7 and [len(row["adapters"]) for row in result["candidates"]] == [1, 1, 0, 2]
    assert [(a["name"], a["weight"]) for a in mixed["adapters"]] == [("mood", 0.5), ("mood-3", -1.0)]
    assert mood["adapters"] != mine["adapters"]
    assert "difference" not in mood["scores"]["loss"]
    difference = mine["scores"]["loss"]["difference"]
    assert difference["low"] <= difference["mean"] <= difference["high"]
    assert base["scores"]["loss"]["value"] != mixed["scores"]["loss"]["value"]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 7 and set(answers[0]["answers"]) == {"mood", "mine/mood", "base", mix}
    shown = runner.invoke(app, [*command, *SETTINGS]).stdout
    assert "difference" in shown and "mine/mood" in shown and "±" in shown


def test_one_example_has_no_interval(folder: Path) -> None:
    command = [*MOOD, "--limit", "1", "--candidate", "mood", "--candidate", "base"]
    done = runner.invoke(app, [*command, "--json", *SETTINGS])
    assert json.loads(done.stdout)["candidates"][1]["scores"]["accuracy"]["difference"] is None
    assert "Infinity" not in done.stdout


def test_expected_answers_that_are_too_long_are_counted(folder: Path) -> None:
    """The task allows three tokens; "good" has four."""
    assert json.loads(runner.invoke(app, [*MOOD, "--json", *SETTINGS]).stdout)["out_of_reach"] == 4
    assert "4 of 9" in " ".join(runner.invoke(app, [*MOOD, *SETTINGS]).stdout.split())


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_task_file_with_its_default_metric(folder: Path, encoding: str) -> None:
    task = folder / "task.json"
    task.write_text(task.read_text(), encoding=encoding)
    done = runner.invoke(app, ["evaluate", "data.jsonl", "--task", "task.json", "--json", *SETTINGS])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["candidates"]
    assert list(row["scores"]) == ["chrf"] and row["adapters"] == []


def test_home_directory_in_paths(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    command = ["evaluate", "data.jsonl", "--task=~/task.json", "--candidate=~/mine/mood", "--answers=~/answers.jsonl"]
    done = runner.invoke(app, [*command, *SETTINGS])
    assert done.exit_code == 0 and (folder / "answers.jsonl").exists(), done.exception


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.jsonl", "--task", "~nobody-at-all/task.json"], "~nobody-at-all"),
        (["data.jsonl", "--task", "mood", "--candidate", "~nobody-at-all/x"], "~nobody-at-all"),
        (["data.jsonl", "--task", "unknown"], "There is no task 'unknown'"),
        (["data.jsonl", "--task", "data.jsonl"], "data.jsonl is not a valid task.json"),
        (["data.jsonl", "--task", "mood", "--metric", "f1"], "f1"),
        (["data.jsonl", "--task", "mood", "--metric", "bleu"], "bleu"),
        (["data.jsonl", "--task", "mood", "--metric", "loss", "--answers", "x"], "The loss needs no answers"),
        (["data.jsonl", "--task", "mood", "--candidate", "nobody"], "nobody"),
        (["data.jsonl", "--task", "mood", "--candidate", "mood=x"], "must be a number"),
        (["bad.jsonl", "--task", "mood"], "line 2"),
        (["none.jsonl", "--task", "mood"], "none.jsonl"),
        (["data.jsonl", "--task", "mood", "--answers", "none/x.jsonl"], "none/x.jsonl cannot be written"),
    ],
)
def test_errors_before_the_first_example(
    folder: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tasks.evaluation.evaluate", lambda *_, **__: pytest.fail("the evaluation has begun"))
    (folder / "bad.jsonl").write_text('{"input": "a", "output": "b"}\n{"prompt": "a", "completion": "b"}')
    done = runner.invoke(app, ["evaluate", *arguments, *SETTINGS])
    assert done.exit_code != 0 and message in str(done.exception)


@pytest.mark.parametrize("interrupted", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_finished_candidates_are_printed_before_the_error(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], interrupted: bool, as_json: bool
) -> None:
    measure, calls = evaluation.evaluate, []

    async def second_fails(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        if len(calls) < 2:
            return await measure(*arguments, **options)
        if not interrupted:
            raise InvalidRequest("logits overflow", "adapters")
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(evaluation, "evaluate", second_fails)
    command = [*MOOD, "--answers", "answers.jsonl", *SETTINGS, *(["--json"] if as_json else [])]
    command += ["--candidate", "mood", "--candidate", "base", "--candidate", "mine/mood"]
    monkeypatch.setattr(sys, "argv", ["loramux", *command])
    handlers, before = logging.getLogger().handlers[:], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
        logging.getLogger().handlers[:] = handlers
    printed = capsys.readouterr()
    message = "interrupted; 1 of 3 candidates are finished" if interrupted else "logits overflow"
    assert ended.value.code == (130 if interrupted else 1) and len(calls) == 2
    assert printed.err.splitlines()[-1] == (message if interrupted else f"error: {message}")
    answers = [json.loads(line)["answers"] for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 9 and all(set(row) == {"mood"} for row in answers)
    if as_json:
        result = json.loads(printed.out)
        assert [row["candidate"] for row in result["candidates"]] == ["mood"]
        kind, param = ("Interrupted", None) if interrupted else ("InvalidRequest", "adapters")
        assert result["error"] == {"message": message, "type": kind, "param": param}
    else:
        assert "accuracy" in printed.out and "mine/mood" not in printed.out


def test_scores_are_printed_if_answers_cannot_be_written(folder: Path) -> None:
    for options in ([], ["--json"]):
        done = runner.invoke(app, [*MOOD, "--answers", "/dev/full", *SETTINGS, *options])
        assert done.exit_code == 1 and "accuracy" in done.stdout and "/dev/full cannot be written" in done.stderr
    result = json.loads(done.stdout)
    assert result["candidates"][0]["scores"]["accuracy"] and "/dev/full" in result["error"]["message"]
