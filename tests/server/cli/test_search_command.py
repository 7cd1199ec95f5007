"""`loramux search` on the tiny base."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters import training
from adapters.weights import LoraWeights, LowRank
from server.cli import app, main, search
from server.model.loader import Base
from tests.server.cli.test_train_command import LONG, folder, write_recipe
from tests.waiting import until

__all__ = ["folder"]

runner = CliRunner()
QUICK = ["--ranks", "1", "--steps", "2", "--share", "1"]
HELD = ["--validation", "held.jsonl"]


@pytest.fixture(autouse=True)
def _tiny_base(folder: Path, monkeypatch: pytest.MonkeyPatch, tiny_base: Base) -> None:
    monkeypatch.setattr(search, "load_model", lambda settings, backend, quiet: tiny_base)


def invoke(*arguments: str) -> Any:
    return runner.invoke(app, ["search", *arguments, "--state-dir", "state"])


def run(*arguments: str) -> dict:
    done = invoke(*arguments, "--json")
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(done.stdout)


def test_search_by_loss_writes_result_and_plot(folder: Path) -> None:
    found = run("echo.toml", "--ranks", "1,2,4", "--metric", "loss", "--steps", "9", "--seeds", "0,1")
    assert [row["rank"] for row in found["table"]] == [1, 2, 4] and found["chosen"] in (1, 2, 4)
    assert all(row["loss"] > 0 for row in found["table"]) and found["table"][0]["parameters"] > 0
    assert found["steps_spent"] <= found["steps_of_full_grid"] / 3 + 3 * 2
    assert json.loads((folder / "search" / "echo" / "search.json").read_text())["chosen"] == found["chosen"]
    assert (folder / "search" / "echo" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_search_by_answers_without_matplotlib(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    done = invoke("echo.toml", "--budget", "3000", "--steps", "9", *HELD, "--output", "out")
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "accuracy" in done.stdout and (folder / "out" / "search.svg").read_text().startswith("<svg")


def test_ranks_above_the_default_max_rank(folder: Path) -> None:
    found = run("echo.toml", "--ranks", "1,100", "--steps", "9", "--share", "1", *HELD)
    assert [row["rank"] for row in found["table"]] == [1, 100]


def test_counts_of_validation_examples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe("echo", "auto_rank = true\nprune_to = 2")
    monkeypatch.setenv("LORAMUX_MAX_CONTEXT", "100")
    with (folder / "held.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"input": "x" * 120, "output": "yes"}))
        lines.write("\n" + json.dumps({"input": "long", "output": "yes yes"}))
    found = run("echo.toml", *QUICK, *HELD, "--metric", "exact_match", "--seeds", "3,0,3")
    assert (found["judges"], found["judges_left_out"], found["learned_too"]) == (9, 1, 8)
    assert found["out_of_reach"] > 0 and found["left_aside"] == ["auto_rank", "prune_to"]
    assert found["seeds"] == [3, 0] and found["steps_spent"] == 4
    text = " ".join(invoke("echo.toml", *QUICK, *HELD, "--metric", "exact_match").stdout.split())
    assert "skipped 1 validation examples" in text and "8 validation examples are also in the training data" in text
    assert "auto_rank and prune_to of the recipe are ignored" in text


def test_too_long_validation_examples_do_not_count_for_the_loss(folder: Path) -> None:
    with (folder / "held.jsonl").open("a") as lines:
        lines.write(LONG)
    found = run("echo.toml", *QUICK, *HELD, "--metric", "loss")
    assert (found["left_out_as_too_long"], found["judges_left_out"], found["learned_too"]) == (0, 1, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1,x"], "--ranks must be integers"),
        (["--seeds", "a"], "--seeds must be integers"),
        (["--metric", "loss", f"--seeds=0,{2**64}"], "seed"),
        (["--budget", "10"], "10"),
        (["--output", "data.jsonl/x"], "data.jsonl/x cannot be written"),
        (["--validation", "long.jsonl"], "validation examples fits into"),
        (["--validation", "short.jsonl", "--metric", "bleu"], "bleu"),
    ],
)
def test_errors_before_the_first_trial(
    folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("adapters.training._Run.run", lambda *_: pytest.fail("a trial has begun"))
    monkeypatch.setenv("LORAMUX_MAX_CONTEXT", "100")
    (folder / "long.jsonl").write_text(json.dumps({"input": "x" * 120, "output": "yes"}))
    (folder / "short.jsonl").write_text(json.dumps({"input": "x", "output": "yes"}))
    (folder / "search" / "echo").mkdir(parents=True)
    (folder / "search" / "echo" / "trials.jsonl").write_text("earlier")
    assert message in str(invoke("echo.toml", *arguments).exception)
    if "--validation" not in arguments:
        assert (folder / "search" / "echo" / "trials.jsonl").read_text() == "earlier"


def test_too_few_examples_to_hold_out(folder: Path) -> None:
    (folder / "data.jsonl").write_text('{"input": "a", "output": "yes"}\n' * 9)
    assert "data.jsonl" in str(invoke("echo.toml").exception)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_diverged_trials(folder: Path, monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    """By their loss, or by weights that are not finite or overflow."""
    original = training.train

    def diverging(*arguments: object, **options: object) -> LoraWeights:
        weights = original(*arguments, **options)  # type: ignore[arg-type]
        value = {"trial-r2-s0": float("inf"), "trial-r4-s0": 1e30}.get(weights.name)
        if value is None:
            return weights
        if evaluations := weights.metadata["training"]["evaluations"]:
            evaluations[-1]["loss"] = float("nan")
        modules = {path: LowRank(torch.full_like(m.A, value), m.B, m.scale) for path, m in weights.modules.items()}
        return replace(weights, modules=modules)

    def no_constants(text: str) -> None:
        raise AssertionError(text)

    monkeypatch.setattr("server.jobs.rank_trials.train", diverging)
    done = invoke("echo.toml", "--ranks", "1,2,4", "--steps", "9", *HELD, "--metric", metric)
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert done.stdout.count("diverged") >= 2
    written = json.loads((folder / "search" / "echo" / "search.json").read_text(), parse_constant=no_constants)
    assert written["chosen"] == 1
    assert [(r["diverged"], r[metric] is None) for r in written["table"]] == [
        (False, False),
        (True, True),
        (True, True),
    ]
    for line in (folder / "search" / "echo" / "trials.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=no_constants)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
@pytest.mark.parametrize("stop_at", [1, 2])
def test_an_interrupt_says_where_the_trials_are(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], metric: str, stop_at: int
) -> None:
    original, trials = training.train, []

    def stopping(*arguments: Any, **options: Any) -> LoraWeights:
        trials.append(options["name"])
        if len(trials) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
            until(options["stop"])  # with an engine, training runs on a thread
        return original(*arguments, **options)

    monkeypatch.setattr("server.jobs.rank_trials.train", stopping)
    command = ["search", "echo.toml", "--ranks", "1,2,4", "--steps", "9", "--share", "1", "--metric", metric, "--json"]
    monkeypatch.setattr(sys, "argv", ["loramux", *command, "--state-dir", "state"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr()
    message = "interrupted" + ("; finished trials are in search/echo/trials.jsonl" if stop_at == 2 else "")
    assert ended.value.code == 130 and printed.err == f"{message}\n"
    assert json.loads(printed.out)["error"]["message"] == message
    assert (folder / "search" / "echo" / "trials.jsonl").exists() == (stop_at == 2)


def test_results_of_another_recipe_are_kept(folder: Path) -> None:
    write_recipe("second")
    command = ["--ranks", "1", "--metric", "loss", "--share", "1", "--steps", "2"]
    run("echo.toml", *command)
    run("echo.toml", *command)  # replaces its own results
    before = (folder / "search" / "echo" / "search.json").read_text()
    failure = str(invoke("second.toml", *command, "--output", "search/echo").exception)
    assert "has the results of recipe echo" in failure
    assert (folder / "search" / "echo" / "search.json").read_text() == before


def test_results_are_printed_even_if_they_cannot_be_written(folder: Path) -> None:
    (folder / "search" / "echo" / "search.json").mkdir(parents=True)
    command = ["echo.toml", "--ranks", "1,2", "--metric", "loss", "--steps", "18"]
    for options in ([], ["--json"]):
        done = invoke(*command, *options)
        assert done.exit_code == 1 and done.stdout and "search/echo cannot be written" in done.stderr
    found = json.loads(done.stdout)
    assert found["chosen"] in (1, 2) and found["plot"] is None
    assert (found["error"]["type"], found["error"]["param"]) == ("BadSetting", "output")
    trials = [json.loads(line) for line in (folder / "search" / "echo" / "trials.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in trials] == [1, 2, 1, 2] and trials[2:] == found["table"]
