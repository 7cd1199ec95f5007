"""`loramux evaluate` over the tiny base: candidates by name, folder and mix, people's table and machines' JSON."""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from adapters.peft_format import save
from adapters.weights import LoraWeights
from server.api import startup
from server.cli import app, evaluate, main
from server.engine.backends.torch.runner import TorchRunner
from server.engine.batch import Batch
from server.errors import InvalidRequest
from server.model.loader import Base
from server.tasks import evaluation

runner = CliRunner()
SETTINGS = ["--state-dir", "state"]


@pytest.fixture
def given(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_base: Base,
    tiny_adapter: Callable[..., LoraWeights],
    mood: dict[str, Any],
) -> Path:
    """A folder with data, a task.json and two adapters, the first of which ships and brings the task `mood`."""
    monkeypatch.setattr(evaluate, "open_base", lambda settings, backend, quiet: tiny_base)
    save(tiny_adapter(2), tmp_path / "mine" / "mood")
    (tmp_path / "task.json").write_text(json.dumps({**mood, "task": "another", "labels": []}))
    lines = [json.dumps({"input": f"text {i}", "output": "good" if i % 2 else "bad"}) for i in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_candidates_are_compared_on_the_same_examples(given: Path) -> None:
    command = ["evaluate", "data.jsonl", "--task", "mood", "--metric", "loss", "--metric", "accuracy", "--limit", "7"]
    command += ["--candidate", "mood", "--candidate", "mine/mood", "--candidate", "base"]
    command += ["--candidate", "mood=0.5+mine/mood=-1", "--library", "library", "--answers", "said.jsonl", *SETTINGS]
    done = runner.invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    mood, mine, base, mix = told["candidates"]
    assert told["examples"] == 7 and [len(row["adapters"]) for row in told["candidates"]] == [1, 1, 0, 2]
    assert [(a["name"], a["weight"]) for a in mix["adapters"]] == [("mood", 0.5), ("mood-3", -1.0)]
    assert mood["adapters"] != mine["adapters"], "a folder does not take the place of what ships"
    assert "difference" not in mood["scores"]["loss"]
    found = mine["scores"]["loss"]
    assert found["difference"]["low"] <= found["difference"]["mean"] <= found["difference"]["high"]
    assert base["scores"]["loss"]["value"] != mix["scores"]["loss"]["value"]
    said = [json.loads(line) for line in (given / "said.jsonl").read_text().splitlines()]
    assert len(said) == 7 and set(said[0]["answers"]) == {"mood", "mine/mood", "base", "mood=0.5+mine/mood=-1"}
    shown = runner.invoke(app, command)
    assert "to the first" in shown.stdout and "mine/mood" in shown.stdout and "±" in shown.stdout


def test_a_corpus_score_and_its_difference_are_of_one_scale(given: Path) -> None:
    command = ["evaluate", "data.jsonl", "--task", "mood", "--metric", "bleu", "--metric", "chrf", "--json", *SETTINGS]
    command += ["--library", "library", "--candidate", "mood", "--candidate", "base"]
    first = [part for part in command if part != "bleu"]  # of answers of one word
    first.remove("--metric")
    runner.invoke(app, [*first, "--answers", "said.jsonl"])
    said = [json.loads(line) for line in (given / "said.jsonl").read_text().splitlines()]
    lines = [json.dumps({"input": one["input"], "output": one["answers"]["base"] + " ."}) for one in said]
    (given / "data.jsonl").write_text("\n".join(lines))
    done = runner.invoke(app, command)
    first, second = (row["scores"] for row in json.loads(done.stdout)["candidates"])
    for metric, score in second.items():
        found = score["difference"]
        assert found["mean"] == score["value"] - first[metric]["value"]
        assert found["low"] <= found["mean"] <= found["high"]
    assert second["chrf"]["difference"]["mean"] > 1.0, "not of the sentences' own scores, which are from 0 to 1"


def test_one_example_has_no_interval_and_the_answer_is_still_json(given: Path) -> None:
    command = ["evaluate", "data.jsonl", "--task", "mood", "--limit", "1", "--candidate", "mood", "--candidate", "base"]
    done = runner.invoke(app, [*command, "--library", "library", "--json", *SETTINGS])
    assert json.loads(done.stdout)["candidates"][1]["scores"]["accuracy"]["difference"] is None
    assert "Infinity" not in done.stdout


@pytest.mark.parametrize("limit", [0.05, None])
def test_a_slow_machine_ends_no_command(given: Path, monkeypatch: pytest.MonkeyPatch, limit: float | None) -> None:
    """Whatever a step takes; with a `limit` that is not the command's own it would."""
    ended: list[int] = []
    watchdog, step = startup.Watchdog, TorchRunner.run

    def watching(steps: Any, limit: float, given: float | None = limit) -> Any:
        return watchdog(steps, limit=given or limit, interval=0.01, end=ended.append)

    def slow(runner: TorchRunner, batch: Batch) -> Any:
        time.sleep(0.2)
        return step(runner, batch)

    monkeypatch.setattr(startup, "Watchdog", watching)
    monkeypatch.setattr(TorchRunner, "run", slow)
    command = ["evaluate", "data.jsonl", "--task", "mood", "--limit", "2", "--library", "library", "--json", *SETTINGS]
    assert runner.invoke(app, command).exit_code == 0
    assert bool(ended) == (limit is not None)


def test_answers_that_end_before_what_is_expected_are_told(given: Path) -> None:
    """Of the task `mood` they have three tokens, of which "bad" is three and "good" four."""
    command = ["evaluate", "data.jsonl", "--task", "mood", "--library", "library", *SETTINGS]
    assert json.loads(runner.invoke(app, [*command, "--json"]).stdout)["out_of_reach"] == 4
    said = "4 of 9 expected answers have more tokens than an answer may have"
    assert said in " ".join(runner.invoke(app, command).stdout.split())
    assert "expected answers" not in runner.invoke(app, [*command, "--limit", "1"]).stdout


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_task_file_and_the_metric_that_fits(given: Path, encoding: str) -> None:
    task = given / "task.json"
    task.write_text(task.read_text(), encoding=encoding)
    done = runner.invoke(
        app, ["evaluate", "data.jsonl", "--task", "task.json", "--json", *SETTINGS, "--library", "library"]
    )
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["candidates"]
    assert list(row["scores"]) == ["chrf"] and row["adapters"] == []


def test_a_home_is_meant_by_its_sign(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(given))
    command = ["evaluate", "data.jsonl", "--task=~/task.json", "--candidate=~/mine/mood", "--answers=~/said.jsonl"]
    done = runner.invoke(app, [*command, *SETTINGS, "--library", "library"])
    assert done.exit_code == 0 and (given / "said.jsonl").exists(), done.exception


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.jsonl", "--task", "~nobody-at-all/task.json"], "home directory in"),
        (["data.jsonl", "--task", "mood", "--candidate", "~nobody-at-all/x"], "home directory in"),
        (["data.jsonl", "--task", "unknown"], "no task 'unknown'"),
        (["data.jsonl", "--task", "mood", "--metric", "f1"], "'f1' is no metric"),
        (["data.jsonl", "--task", "mood", "--metric", "bleu"], "bleu looks at 4 tokens in a row"),
        (["data.jsonl", "--task", "mood", "--candidate", "nobody"], "nobody"),
        (["data.jsonl", "--task", "mood", "--candidate", "mood=x"], "must be a number"),
        (["bad.jsonl", "--task", "mood"], "line 2: an evaluation needs"),
        (["none.jsonl", "--task", "mood"], "cannot be read"),
        (["data.jsonl", "--task", "mood", "--answers", "none/said.jsonl"], "none/said.jsonl cannot be written"),
    ],
)
def test_what_is_wrong_is_said_before_any_example(
    given: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.tasks.evaluation.evaluate", lambda *_, **__: pytest.fail("it has begun"))
    (given / "bad.jsonl").write_text('{"input": "a", "output": "b"}\n{"prompt": "a", "completion": "b"}')
    done = runner.invoke(app, ["evaluate", *arguments, "--library", "library", *SETTINGS])
    assert done.exit_code != 0 and message in str(done.exception)


@pytest.mark.parametrize("stops", [True, False])
@pytest.mark.parametrize("as_json", [True, False])
def test_what_is_done_is_told_before_what_has_ended_it(
    given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], stops: bool, as_json: bool
) -> None:
    measure, calls = evaluation.evaluate, []

    async def second(*arguments: Any, **how: Any) -> Any:
        calls.append(how)
        if len(calls) < 2:
            return await measure(*arguments, **how)
        if not stops:
            raise InvalidRequest("its numbers overflow", "adapters")
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(60)

    monkeypatch.setattr(evaluation, "evaluate", second)
    command = ["evaluate", "data.jsonl", "--task", "mood", "--library", "library", "--answers", "said.jsonl", *SETTINGS]
    command += ["--candidate", "mood", "--candidate", "base", "--candidate", "mine/mood"]
    monkeypatch.setattr(sys, "argv", ["loramux", *command, *(["--json"] if as_json else [])])
    handlers, before = logging.getLogger().handlers[:], signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
        logging.getLogger().handlers[:] = handlers
    printed, said = capsys.readouterr(), "interrupted; 1 of 3 candidates are done" if stops else "its numbers overflow"
    assert ended.value.code == (130 if stops else 1) and len(calls) == 2
    assert printed.err.splitlines()[-1] == (said if stops else f"error: {said}")
    answers = [json.loads(line)["answers"] for line in (given / "said.jsonl").read_text().splitlines()]
    assert len(answers) == 9 and all(set(row) == {"mood"} for row in answers)
    if as_json:
        told = json.loads(printed.out)
        assert [row["candidate"] for row in told["candidates"]] == ["mood"]
        kind, param = ("Interrupted", None) if stops else ("InvalidRequest", "adapters")
        assert told["error"] == {"message": said, "type": kind, "param": param}
    else:
        assert "accuracy" in printed.out and "mine/mood" not in printed.out


def test_scores_are_told_though_answers_cannot_be_written(given: Path) -> None:
    command = ["evaluate", "data.jsonl", "--task", "mood", "--library", "library", "--answers", "/dev/full", *SETTINGS]
    for how in ([], ["--json"]):
        done = runner.invoke(app, [*command, *how])
        assert done.exit_code == 1 and "accuracy" in done.stdout and "/dev/full cannot be written" in done.stderr
    told = json.loads(done.stdout)
    assert told["candidates"][0]["scores"]["accuracy"] and "/dev/full" in told["error"]["message"]
    done = runner.invoke(app, [*command, "--metric", "loss"])
    assert "without answers" in str(done.exception)
