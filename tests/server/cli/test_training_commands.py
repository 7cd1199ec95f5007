"""`loramux train` and `loramux search` over the tiny base: what they write, tell, and refuse."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters import peft_format, training
from adapters.errors import AdapterError, Diverged, StoreFailed, TrainingStopped
from adapters.weights import LoraWeights, LowRank
from benchmarks import plots
from server.cli import app, main, search, train
from server.cli.main import _as_ctrl_c
from server.errors import BadSetting, ServerError
from server.jobs import train_recipe
from server.jobs.rank_trials import within
from server.jobs.recipe import Recipe, read_recipe
from server.jobs.train_recipe import prepare
from server.jobs.trainable_model import TrainableModel, loss_of
from server.model.loader import Base
from tests.waiting import until

runner = CliRunner()
RECIPE = """
name = "echo"
data = "data.jsonl"
[task]
prompt = "Say: {input}"
format = "chat"
labels = ["yes", "no"]
defaults = { max_tokens = 2 }
[training]
batch_size = 4
learning_rate = 0.01
compute_dtype = "float32"
max_length = 200
"""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Base) -> Path:
    """A folder with a recipe and its data; the base is the tiny one."""
    monkeypatch.chdir(tmp_path)
    for module in (search, train):
        monkeypatch.setattr(module, "open_base", lambda settings, backend, quiet: tiny_base)
    (tmp_path / "echo.toml").write_text(RECIPE)
    lines = [json.dumps({"input": f"text {i}", "output": "yes" if i % 2 else "no"}) for i in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:8]))
    return tmp_path


def told(*arguments: str) -> dict:
    done = runner.invoke(app, [*arguments, "--json", "--state-dir", "state"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(done.stdout)


def test_a_search_by_loss_tells_a_table_a_plot_and_advice(given: Path) -> None:
    found = told("search", "echo.toml", "--ranks", "1,2,4", "--metric", "loss", "--steps", "9", "--seeds", "0,1")
    assert [row["rank"] for row in found["table"]] == [1, 2, 4] and found["chosen"] in (1, 2, 4)
    assert all(row["loss"] > 0 for row in found["table"]) and found["table"][0]["parameters"] > 0
    assert found["steps_spent"] <= found["steps_of_full_grid"] / 3 + 3 * 2
    assert found["advice"].startswith(f"Take rank {found['chosen']}")
    assert json.loads((given / "search" / "echo" / "search.json").read_text())["chosen"] == found["chosen"]
    assert (given / "search" / "echo" / "search.png").read_bytes().startswith(b"\x89PNG")


def test_a_search_by_answers_as_they_are_served_without_matplotlib(
    given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)
    command = ["search", "echo.toml", "--budget", "3000", "--steps", "9", "--validation", "held.jsonl"]
    done = runner.invoke(app, [*command, "--output", "out", "--state-dir", "state"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "accuracy" in done.stdout and "Take rank" in done.stdout
    assert (given / "out" / "search.svg").read_text().startswith("<svg")


def test_answers_that_cannot_be_as_long_as_expected_are_told(given: Path) -> None:
    """Nothing that answers in two tokens says what is expected, so all ranks are as good as the smallest."""
    with (given / "held.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"input": "long", "output": "yes yes"}))
    command = ["--ranks", "1", "--steps", "2", "--share", "1", "--validation", "held.jsonl", "--metric", "exact_match"]
    found = told("search", "echo.toml", *command)
    assert 0 < found["out_of_reach"] <= found["judges"] and found["judges_left_out"] == 0
    done = runner.invoke(app, ["search", "echo.toml", *command, "--state-dir", "state"])
    said = f"{found['out_of_reach']} of {found['judges']} expected answers have more tokens than an answer may have"
    assert said in " ".join(done.stdout.split())


def test_ranks_over_what_a_server_takes_by_itself_are_searched_and_told(given: Path) -> None:
    command = ["--ranks", "1,100", "--steps", "9", "--share", "1", "--validation", "held.jsonl"]
    found = told("search", "echo.toml", *command)
    assert [row["rank"] for row in found["table"]] == [1, 100] and (given / "search" / "echo" / "search.json").exists()


def test_judges_that_the_engine_cannot_take_are_left_out_or_said_before_any_trial(
    given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAMUX_MAX_CONTEXT", "100")
    lines = (given / "held.jsonl").read_text()
    (given / "held.jsonl").write_text(lines + "\n" + json.dumps({"input": "x" * 120, "output": "yes"}) + "\n")
    command = ["--ranks", "1", "--steps", "2", "--share", "1", "--validation", "held.jsonl"]
    found = told("search", "echo.toml", *command)
    assert found["table"] and (found["judges_left_out"], found["left_out_as_too_long"]) == (1, 0)
    (given / "held.jsonl").write_text(json.dumps({"input": "x" * 120, "output": "yes"}) + "\n")
    done = runner.invoke(app, ["search", "echo.toml", *command, "--state-dir", "state"])
    assert "none of the 1 examples that judge fits into 100 tokens" in str(done.exception)
    (given / "held.jsonl").write_text(json.dumps({"input": "x", "output": "yes"}) + "\n")

    def begun(*_: object) -> None:
        raise RuntimeError("a trial is made for nothing")

    monkeypatch.setattr("server.cli.search._searched", begun)
    done = runner.invoke(app, ["search", "echo.toml", *command, "--metric", "bleu", "--state-dir", "state"])
    assert "bleu looks at 4 tokens in a row" in str(done.exception)


def test_a_search_tells_what_its_judges_are_and_what_of_the_recipe_has_no_part(given: Path) -> None:
    path = "model.layers.0.self_attn.q_proj"
    more = f'lora_rank_of = {{ "{path}" = 100 }}\n'  # over what a server takes by itself
    (given / "echo.toml").write_text(f"auto_rank = true\nprune_to = 2\n{RECIPE}{more}")
    command = ["search", "echo.toml", "--ranks", "1", "--steps", "2", "--share", "1", "--seeds", "3,0,3"]
    for metric in ("loss", "accuracy"):
        found = told(*command, "--validation", "held.jsonl", "--metric", metric)
        assert (found["learned_too"], found["judges"]) == (8, 8), metric
        assert found["seeds"] == [3, 0] and found["steps_spent"] == 4, "one that is there twice is one run"
        assert found["left_aside"] == ["auto_rank", "prune_to"]
    done = runner.invoke(app, [*command, "--validation", "held.jsonl", "--metric", "loss", "--state-dir", "state"])
    said = " ".join(done.stdout.split())
    assert "8 of the examples that judge were learned too: the ranks seem better than they are" in said
    assert "the recipe's auto_rank and prune_to had no part in it" in said
    (given / "echo.toml").write_text(RECIPE)
    found = told(*command, "--metric", "loss")
    assert found["learned_too"] == 0 and found["left_aside"] == []


@pytest.mark.parametrize("plots", [True, False])
@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_a_trial_that_diverges_is_told_as_that(
    given: Path, monkeypatch: pytest.MonkeyPatch, metric: str, plots: bool
) -> None:
    """By its loss, or by values that cannot be written or answered with."""
    train_ = training.train
    if not plots:
        monkeypatch.setattr(search.importlib.util, "find_spec", lambda name: None)

    def broken(*args: object, **how: object) -> LoraWeights:
        weights = train_(*args, **how)  # type: ignore[arg-type]
        value = {"trial-r2-s0": float("inf"), "trial-r4-s0": 1e30}.get(weights.name)
        if value is None:
            return weights
        made = weights.metadata["training"]
        if made["evaluations"]:
            made["evaluations"][-1]["loss"] = float("nan")
        modules = {path: LowRank(torch.full_like(m.A, value), m.B, m.scale) for path, m in weights.modules.items()}
        return replace(weights, modules=modules)

    monkeypatch.setattr("server.jobs.rank_trials.train", broken)
    command = ["search", "echo.toml", "--ranks", "1,2,4", "--steps", "9", "--validation", "held.jsonl"]
    done = runner.invoke(app, [*command, "--metric", metric, "--state-dir", "state"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    assert "With rank 2, 4 training diverged" in " ".join(done.stdout.split())
    assert done.stdout.count("diverged") == 3, "in both rows, and in the advice"

    def strict(text: str) -> None:
        raise AssertionError(text)

    written = json.loads((given / "search" / "echo" / "search.json").read_text(), parse_constant=strict)
    assert written["chosen"] == 1
    assert [(row["diverged"], row[metric] is None) for row in written["table"]] == [
        (False,) * 2,
        (True,) * 2,
        (True,) * 2,
    ]
    for line in (given / "search" / "echo" / "trials.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=strict)


def test_a_budget_is_parameters(given: Path, tiny_base: Base) -> None:
    config = read_recipe(given / "echo.toml").config
    one = sum(sum(shape) for shape in tiny_base.shapes().values())
    assert within(tiny_base.shapes(), config, 5 * one) == [1, 2, 4]
    path, shape = next(iter(tiny_base.shapes().items()))
    fixed = replace(config, lora_rank_of={path: 16})
    rest = one - sum(shape)
    assert within(tiny_base.shapes(), fixed, 16 * sum(shape) + 8 * rest) == [1, 2, 4, 8]
    done = runner.invoke(app, ["search", "echo.toml", "--budget", "10", "--state-dir", "state"])
    assert f"rank 1 takes {one:,} parameters" in str(done.exception)


def test_what_is_wrong_with_any_recipe_is_said_before_the_first_is_trained(given: Path) -> None:
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"').replace("data.jsonl", "bad.jsonl"))
    (given / "bad.jsonl").write_text('{"input": "a"}')
    done = runner.invoke(app, ["train", "echo.toml", "other.toml", "--state-dir", "state"])
    assert str(done.exception) == "second: bad.jsonl, line 1: 'output' is missing" and not (given / "trained").exists()
    done = runner.invoke(app, ["train", "echo.toml", "echo.toml", "--state-dir", "state"])
    assert "both make 'echo'" in str(done.exception)


@pytest.mark.parametrize(
    ("recipe", "wrong"),
    [
        ('nam = "x"\n' + RECIPE, "{path}: 'nam' is not known"),
        (RECIPE.replace('name = "echo"', ""), "{path}: name and data must be there"),
        (RECIPE + "ranks = 3", "{path} [training]: 'ranks' is not known"),
        (RECIPE + "batch_size = 0", "{path}: batch_size must be"),
        (RECIPE + "[card]\nabout = 3", "{path} [card]: about must be a text"),
        (RECIPE.replace("data.jsonl", "held.jsonl"), "echo: mine/held.jsonl cannot be read: No such file or directory"),
    ],
)
def test_an_error_says_which_of_many_recipes_it_is_about(given: Path, recipe: str, wrong: str) -> None:
    """By its path: all of them may be called recipe.toml."""
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"'))
    (given / "mine").mkdir()
    path = Path("mine") / "recipe.toml"
    path.write_text(recipe.replace("batch_size = 4\n", "") if "batch_size = 0" in recipe else recipe)
    done = runner.invoke(app, ["train", "other.toml", str(path), "--state-dir", "state"])
    assert str(done.exception).startswith(wrong.format(path=path)), done.exception


def test_a_home_is_meant_by_its_sign_in_a_recipe(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (given / "home").mkdir()
    for name in ("data.jsonl", "held.jsonl"):
        shutil.move(name, given / "home")
    monkeypatch.setenv("HOME", str(given / "home"))
    (given / "echo.toml").write_text('validation = "~/held.jsonl"\n' + RECIPE.replace('"data', '"~/data'))
    assert not told("train", "echo.toml", "--steps", "1", "--output=~/made")["skipped"]
    assert told("train", "echo.toml", "--steps", "1", "--output=~/made")["skipped"]
    assert (given / "home" / "made" / "echo").is_dir() and not (given / "~").exists()
    found = told("search", "echo.toml", "--ranks", "1", "--steps", "2", "--share", "1", "--metric", "loss")
    assert found["judges"] == 8
    (given / "echo.toml").write_text(RECIPE.replace('"data', '"~nobody-at-all/data'))
    for command in ("train", "search"):
        done = runner.invoke(app, [command, "echo.toml", "--state-dir", "state"])
        assert isinstance(done.exception, ServerError) and "home directory in" in str(done.exception)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    """The recipe of that name fails by the error, once it is trained."""
    run_ = train_recipe.run

    def broken(recipe: Recipe, *arguments: object, **how: object) -> LoraWeights:
        if recipe.name == name:
            raise error
        return run_(recipe, *arguments, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(train_recipe, "run", broken)


@pytest.mark.parametrize(
    "error", [Diverged("it diverged", "lr"), BadSetting("another process"), StoreFailed("damaged")]
)
def test_a_recipe_that_fails_is_told_and_the_others_are_trained(
    given: Path, monkeypatch: pytest.MonkeyPatch, error: AdapterError | ServerError
) -> None:
    for name in ("second", "third"):
        (given / f"{name}.toml").write_text(RECIPE.replace('"echo"', f'"{name}"'))
    failing(monkeypatch, "second", error)
    command = ["train", "echo.toml", "second.toml", "third.toml", "--steps", "1", "--state-dir", "state"]
    done = runner.invoke(app, command)
    said = [f"error: second: {error.message}", "error: 1 of 3 recipes failed: second"]
    assert done.exit_code == 1 and [line for line in done.stderr.splitlines() if "error" in line] == said
    assert "trained/echo: 1 steps" in done.stdout and "trained/third: 1 steps" in done.stdout
    done = runner.invoke(app, [*command, "--json"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and [row["name"] for row in rows] == ["echo", "second", "third"]
    told = {"message": f"second: {error.message}", "type": type(error).__name__, "param": error.param}
    assert rows[1] == {"name": "second", "error": told} and "error" not in rows[2]
    done = runner.invoke(app, ["train", "second.toml", "--state-dir", "state"])
    assert isinstance(done.exception, type(error)) and str(done.exception) == f"second: {error.message}"


@pytest.mark.parametrize(
    ("error", "whose"),
    [
        (MemoryError("no room"), "out of memory: "),
        (RuntimeError("DefaultCPUAllocator: you tried to allocate 7 bytes"), "out of memory: "),
        (torch.OutOfMemoryError("no block"), "the GPU has too little memory: "),
    ],
)
def test_so_is_one_that_the_machine_has_too_little_memory_for(
    given: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, whose: str
) -> None:
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"'))
    failing(monkeypatch, "echo", error)
    done = runner.invoke(app, ["train", "echo.toml", "other.toml", "--steps", "1", "--state-dir", "state", "--json"])
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert first["error"]["message"].startswith(f"echo: {whose}")
    assert first["error"]["message"].endswith(
        "; a smaller micro_tokens in its recipe takes less, and so does activation_checkpointing = true"
    )
    assert second["name"] == "second" and "error" not in second and done.exit_code == 1
    failing(monkeypatch, "echo", RuntimeError("something else"))
    done = runner.invoke(app, ["train", "echo.toml", "other.toml", "--steps", "1", "--state-dir", "state"])
    assert str(done.exception) == "something else"


def test_a_disk_that_refuses_ends_all(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"'))
    command = ["train", "echo.toml", "other.toml", "--steps", "1", "--state-dir", "state"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(peft_format, "replace_file", full)
        done = runner.invoke(app, command)
    assert str(done.exception) == "echo: the adapter could not be written: No space left on device"
    failing(monkeypatch, "echo", OSError(errno.ENOSPC, "No space left on device"))
    assert isinstance(runner.invoke(app, command).exception, OSError) and not (given / "trained" / "second").exists()


def test_what_is_wrong_with_the_first_of_several_is_said_before_any_is_trained(given: Path) -> None:
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"').replace("data.jsonl", "held.jsonl"))
    (given / "data.jsonl").write_text("{}")
    done = runner.invoke(app, ["train", "echo.toml", "other.toml", "--steps", "1", "--state-dir", "state"])
    assert str(done.exception).startswith("echo: data.jsonl, line 1: it has nothing")
    assert not (given / "trained").exists()


def test_a_search_needs_something_to_judge_by(given: Path) -> None:
    (given / "data.jsonl").write_text('{"input": "a", "output": "yes"}\n' * 9)
    done = runner.invoke(app, ["search", "echo.toml", "--state-dir", "state"])
    assert "data.jsonl has 9 examples, of which no tenth can be held out; name a validation file" in str(done.exception)


def test_where_a_search_cannot_write_is_said_before_any_trial(given: Path) -> None:
    done = runner.invoke(app, ["search", "echo.toml", "--output", "data.jsonl/x", "--state-dir", "state"])
    assert "data.jsonl/x cannot be written" in str(done.exception)


def test_seeds_that_are_no_numbers_are_named(given: Path) -> None:
    done = runner.invoke(app, ["search", "echo.toml", "--seeds", "a", "--state-dir", "state"])
    assert "seeds are whole numbers" in str(done.exception)


@pytest.mark.parametrize("line", ["train echo.toml --seed", "search echo.toml --metric loss --steps 9 --seeds 0,"])
def test_a_seed_of_more_than_64_bits_is_refused_before_any_step(
    given: Path, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.training._Run.run", lambda *_: pytest.fail("it trains"))
    words = f"{line}{'' if line.endswith(',') else '='}{2**64}".split(" ")
    done = runner.invoke(app, [*words, "--state-dir", "state"])
    assert isinstance(done.exception, AdapterError) and "2**64 - 1" in done.exception.message, done.output
    (given / "echo.toml").write_text(f"{RECIPE}seed = {2**64}\n")
    with pytest.raises(ServerError, match="seed must be"):
        read_recipe(given / "echo.toml")


def counted(monkeypatch: pytest.MonkeyPatch, fails_at: int = 0) -> list[int]:
    """The steps of each update from now on; the update of that number is cut short."""
    steps: list[int] = []
    update = training._Run._update

    def counting(self: training._Run) -> training.Event:
        if len(steps) + 1 == fails_at:
            raise TrainingStopped("as by a signal")
        steps.append(self.progress.step)
        return update(self)

    monkeypatch.setattr(training._Run, "_update", counting)
    return steps


def test_started_again_it_trains_what_is_left(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"') + "save_steps = 1\n")
    command = ["train", "echo.toml", "other.toml", "--steps", "4", "--state-dir", "state"]
    with monkeypatch.context() as patch:
        counted(patch, fails_at=7)
        assert "as by a signal" in str(runner.invoke(app, command).exception)
    steps = counted(monkeypatch)
    done = runner.invoke(app, command)
    assert done.exit_code == 0 and steps == [2, 3], "the first is finished, and the second goes on"
    assert "trained/echo is finished" in done.stdout and "trained/second: 4 steps" in done.stdout
    assert "another --output or --seed has it trained again" in done.stdout
    again = told("train", "echo.toml", "--steps", "4")
    read = peft_format.read_folder(given / "trained" / "echo", name="echo")
    assert again["skipped"] and again["version"] == read.version.label and again["steps"] == 4 and len(steps) == 2

    told("train", "echo.toml", "--steps", "3")
    assert len(steps) == 5, "it is another recipe"
    (given / "data.jsonl").write_text((given / "held.jsonl").read_text())
    assert not told("train", "echo.toml", "--steps", "1")["skipped"]
    (given / "data.jsonl").write_text('{"input": "a", "output": "yes"}')
    assert not told("train", "echo.toml", "--steps", "1")["skipped"] and len(steps) == 7, "it is other data"
    shutil.rmtree(given / "trained" / "echo")
    told("train", "echo.toml", "--steps", "1")
    assert len(steps) == 8, "there is nothing left of it"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_asked_again_it_ends_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the command itself, whose own handler has the last word. A closed terminal may ask twice at a time."""
    asked = (signal.SIGTERM, signal.SIGHUP)
    before = {each: signal.signal(each, _as_ctrl_c) for each in asked}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with train._asked_to_stop() as stop:
            assert not stop()
            for _ in range(2):
                signal.raise_signal(number)
                assert stop()
            monkeypatch.setattr(train, "SAME_SIGNAL", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert [signal.getsignal(each) for each in asked] == [_as_ctrl_c] * 2
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def heeded(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is not ignored, as `nohup` and a shell's background have some."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_asked_to_end_it_leaves_a_checkpoint_of_the_last_update(
    given: Path, heeded: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told("train", "echo.toml", "--steps", "4", "--output", "whole")["version"]
    steps = counted(monkeypatch)
    update = training._Run._update

    def asked(self: training._Run) -> training.Event:
        event = update(self)
        if event.step == 2:
            signal.raise_signal(heeded)
        return event

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_update", asked)
        done = runner.invoke(app, ["train", "echo.toml", "--steps", "4", "--state-dir", "state"])
    assert isinstance(done.exception, TrainingStopped), done.output
    assert done.exception.message == "echo: stopped at step 2 of 4; the same command goes on from there"
    assert told("train", "echo.toml", "--steps", "4")["version"] == whole and steps == [0, 1, 2, 3]
    assert signal.getsignal(heeded) is signal.default_int_handler


def test_what_is_left_out_and_where_a_checkpoint_lies_is_told(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (given / "data.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"input": "long", "output": "yes " * 200}))
    (given / "echo.toml").write_text(RECIPE + "save_steps = 1\n")
    command = ["train", "echo.toml", "--state-dir", "state", "--steps"]
    with monkeypatch.context() as patch:
        counted(patch, fails_at=2)
        assert "as by a signal" in str(runner.invoke(app, [*command, "2"]).exception)
    refused = str(runner.invoke(app, [*command, "1"]).exception)
    assert "echo: the checkpoint in trained/.checkpoints/echo is of another run" in refused
    done = runner.invoke(app, [*command, "2"])
    assert "1 of its 25 examples are longer than max_length" in " ".join(done.stdout.split())


def test_judges_that_are_too_long_are_told_to_be_left_out(given: Path) -> None:
    """A loss of a part of what was given to judge by is that of a part."""
    with (given / "held.jsonl").open("a") as lines:
        lines.write("\n" + json.dumps({"input": "long", "output": "yes " * 200}))
    (given / "echo.toml").write_text('validation = "held.jsonl"\n' + RECIPE)
    done = runner.invoke(app, ["train", "echo.toml", "--steps", "1", "--state-dir", "state"])
    assert "1 of the examples that judge it are longer than max_length" in " ".join(done.stdout.split())
    command = ["search", "echo.toml", "--ranks", "1,2", "--steps", "9", "--share", "1", "--metric", "loss"]
    done = runner.invoke(app, [*command, "--state-dir", "state"])
    assert "1 examples that would judge were left out" in " ".join(done.stdout.split()), done.output
    found = told(*command)
    assert (found["left_out_as_too_long"], found["judges_left_out"]) == (0, 1)


@pytest.mark.parametrize("name", ["echo", "start"])
def test_a_run_over_a_template_with_the_date_goes_on_on_another_day(
    given: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever it is called: its folder is no part of a run."""
    dated = "Today is {{ strftime_now('%d %b %Y') }}\n" + (tiny_base.vocabulary.chat_template or "")
    base = replace(tiny_base, vocabulary=replace(tiny_base.vocabulary, chat_template=dated))
    monkeypatch.setattr(train, "open_base", lambda settings, backend, quiet: base)
    (given / "echo.toml").write_text(RECIPE.replace("echo", name) + "save_steps = 1\n")
    command = ["train", "echo.toml", "--steps", "4", "--state-dir", "state"]
    with monkeypatch.context() as patch:
        patch.setattr("server.jobs.train_recipe.time.time", lambda: 1e9)
        counted(patch, fails_at=3)
        assert "as by a signal" in str(runner.invoke(app, command).exception)
    steps = counted(monkeypatch)
    done = runner.invoke(app, command)
    assert done.exit_code == 0 and steps == [2, 3], done.exception


def test_the_version_told_is_the_one_that_lies_in_the_folder(given: Path) -> None:
    made = told("train", "echo.toml", "--steps", "3")
    assert made["version"] == peft_format.read_folder(given / made["path"], name="echo").version.label


def test_ranks_of_their_own_and_pruning_are_reached_from_train(given: Path) -> None:
    torch.set_num_threads(2)
    asked = ["--rank", "4", "--auto-rank", "--prune-to", "2", "--steps", "3", "--seed", "5", "--threads", "1"]
    made = told("train", "echo.toml", *asked)
    assert torch.get_num_threads() == 1
    weights = peft_format.read_folder(given / made["path"], name="echo")
    assert max(weights.ranks) <= 2 and made["config"]["seed"] == 5
    card = weights.metadata["card"]
    assert "by module" in card and "Pruned** to rank 2" in card


def test_what_pruning_costs_and_what_was_learned_of_the_judges_is_told(given: Path, tiny_base: Base) -> None:
    (given / "echo.toml").write_text(f'validation = "held.jsonl"\nprune_to = 1\n{RECIPE}')
    asked = ["train", "echo.toml", "--rank", "2", "--steps", "2", "--state-dir", "state"]
    said = " ".join(runner.invoke(app, asked).stdout.split())
    made = told(*asked[:-2])
    assert made["skipped"] and made["learned_too"] == 8
    pruned, weights = made["pruned"], peft_format.read_folder(given / made["path"], name="echo")
    assert pruned["rank"] == max(weights.ranks) == 1 and pruned["error"] > 0.01
    recipe = read_recipe(given / "echo.toml")
    _, held = prepare(recipe, tiny_base, given)
    served = loss_of(TrainableModel(tiny_base, "float32"), weights, held)
    assert pruned["loss"] == served, "of what is left, in bf16 as it is there"
    assert pruned["loss"] != made["evaluations"][-1]["loss"]
    assert (
        f"pruned to rank 1, relative error {pruned['error']:.4f}; validation loss {pruned['loss']:.4f} after it" in said
    )
    assert "8 of the examples that judge it were learned too" in said
    assert f"held-out loss {pruned['loss']:.4f} a token" in weights.metadata["card"]


def test_a_recipe_says_how_the_base_is_packed_unless_a_setting_does(
    given: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict] = []
    monkeypatch.setattr(train, "open_base", lambda settings, *_, **__: asked.append(settings.packing) or tiny_base)
    (given / "echo.toml").write_text(f'{RECIPE}quantization = "nf4"\nuse_double_quant = true\n')
    made = told("train", "echo.toml", "--steps", "1")
    told("train", "echo.toml", "--steps", "1", "--quantization", "none")
    assert [(a["quantization"], a["double_quant"]) for a in asked] == [("nf4", True), ("none", True)]
    assert made["config"]["quantization"] == tiny_base.quantization["scheme"], "what it was really trained on"

    (given / "other.toml").write_text(f'{RECIPE}quantization = "int4"\n'.replace("echo", "second"))
    done = runner.invoke(app, ["train", "echo.toml", "other.toml", "--state-dir", "state"])
    assert "ask for quantization nf4 and int4" in str(done.exception)
    (given / "other.toml").write_text(f'{RECIPE}quantization = "int3"\n')
    done = runner.invoke(app, ["train", "other.toml", "--state-dir", "state"])
    assert "quantization" in str(done.exception) and "int4" in str(done.exception)


@pytest.mark.parametrize(
    ("asked", "most"), [("--rank 4 --prune-to 4", 4), ("--rank 2", 2), ("--rank 1 --auto-rank --prune-to 4", 4)]
)
def test_what_would_cut_nothing_is_refused(given: Path, asked: str, most: int) -> None:
    (given / "echo.toml").write_text(f"prune_to = 3\n{RECIPE}")
    done = runner.invoke(app, ["train", "echo.toml", *asked.split(), "--state-dir", "state"])
    assert f"echo: prune_to must be below the highest rank that is trained, {most}:" in str(done.exception)
    assert not (given / "trained").exists()


@pytest.mark.parametrize(
    ("asked", "most"), [("--rank 65", 65), ("--rank 17 --auto-rank", 68), ("--rank 128 --prune-to 65", 65)]
)
def test_a_rank_that_a_server_would_refuse_is_refused_before(given: Path, asked: str, most: int) -> None:
    done = runner.invoke(app, ["train", "echo.toml", *asked.split(), "--state-dir", "state"])
    assert f"echo: its rank may be {most}" in str(done.exception) and not (given / "trained").exists()
    assert f"a server takes up to 64 (--max-rank): ask for less, or give --max-rank {most} here and to" in str(
        done.exception
    )
    assert ("auto_rank may give a module 4 times lora_rank" in str(done.exception)) == ("--auto-rank" in asked)


def test_a_rank_that_is_asked_of_the_server_too_or_cut_is_trained(given: Path) -> None:
    command = ["train", "echo.toml", "--rank", "65", "--steps", "1"]
    assert max(peft_format.read_folder(given / told(*command, "--max-rank", "65")["path"], name="e", max_rank=65).ranks)
    assert told(*command)["skipped"], "what is finished is"
    (given / "loramux.toml").write_text("max_rank = 65\n")
    assert not told(*command, "--seed", "5")["skipped"]
    (given / "loramux.toml").unlink()
    made = told(*command, "--prune-to", "2")
    assert max(peft_format.read_folder(given / made["path"], name="echo").ranks) == 2


def test_evaluations_need_something_to_evaluate_on(given: Path) -> None:
    (given / "echo.toml").write_text(RECIPE + "eval_steps = 1\npatience = 1\n")
    done = runner.invoke(app, ["train", "echo.toml", "--state-dir", "state"])
    assert "echo: eval_steps needs" in str(done.exception) and not (given / "trained").exists()


def test_a_rank_of_its_own_can_be_cut(given: Path, tiny_base: Base) -> None:
    path = next(iter(tiny_base.shapes()))
    (given / "echo.toml").write_text(f'prune_to = 3\n{RECIPE}lora_rank = 2\nlora_rank_of = {{ "{path}" = 4 }}\n')
    made = told("train", "echo.toml", "--steps", "1")
    assert peft_format.read_folder(given / made["path"], name="echo").ranks == [2, 3]


@pytest.mark.parametrize("line", ["auto_rank = 1", "prune_to = 0", "prune_to = true"])
def test_a_recipe_says_both_and_what_is_wrong_with_them(given: Path, line: str) -> None:
    (given / "echo.toml").write_text(f"auto_rank = true\nprune_to = 3\n{RECIPE}")
    recipe = read_recipe(given / "echo.toml")
    assert recipe.auto_rank and recipe.prune_to == 3
    (given / "echo.toml").write_text(f"{line}\n{RECIPE}")
    done = runner.invoke(app, ["train", "echo.toml", "--state-dir", "state"])
    assert line.split(" ")[0] in str(done.exception)


def test_the_plot_of_a_search_marks_what_was_chosen(tmp_path: Path) -> None:
    points = [(1, 1000, 0.8, 0.0, 10), (2, 2000, 0.9, 0.02, 30)]
    assert plots.quality(tmp_path / "q.png", "title", "accuracy", points, 2).stat().st_size > 1000
    assert not plots._pyplot().get_fignums(), "it is not kept"


def test_a_gpu_trains_where_there_is_one_to_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.cli.train import training_backend
    from server.kernels import cuda

    assert training_backend("cpu").name == "reference"
    monkeypatch.setattr(cuda, "unavailable", lambda: "there is no GPU")
    assert training_backend("auto").name == "reference"
    with pytest.raises(BadSetting, match="there is no GPU"):
        training_backend("cuda")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert [training_backend(device).name for device in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "reference"]


def test_a_search_that_does_not_begin_leaves_what_one_before_has_found(given: Path) -> None:
    (given / "search" / "echo").mkdir(parents=True)
    (given / "search" / "echo" / "trials.jsonl").write_text("found")
    done = runner.invoke(app, ["search", "echo.toml", "--ranks", "1,x", "--state-dir", "state"])
    assert (
        "whole numbers" in str(done.exception) and (given / "search" / "echo" / "trials.jsonl").read_text() == "found"
    )


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_who_stops_a_search_is_told_where_its_trials_lie(
    given: Path,
    heeded: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    metric: str,
) -> None:
    train_, trials, stopped_at = training.train, [], 2

    def stopping(*arguments: Any, **how: Any) -> LoraWeights:
        trials.append(how["name"])
        if len(trials) == stopped_at:
            os.kill(os.getpid(), heeded)
            until(how["stop"])  # beside an engine it trains on a thread, which hears of it a little later
        return train_(*arguments, **how)

    monkeypatch.setattr("server.jobs.rank_trials.train", stopping)
    command = ["search", "echo.toml", "--ranks", "1,2,4", "--steps", "9", "--share", "1", "--metric", metric, "--json"]
    monkeypatch.setattr(sys, "argv", ["loramux", *command, "--state-dir", "state"])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for place in (", and what was found is in search/echo/trials.jsonl", ""):
            with pytest.raises(SystemExit) as ended:
                main()
            printed, said = capsys.readouterr(), f"interrupted{place}"
            assert ended.value.code == 130 and printed.err == f"{said}\n"
            assert json.loads(printed.out)["error"]["message"] == said
            assert (given / "search" / "echo" / "trials.jsonl").exists() == bool(place)
            trials, stopped_at = [], 1  # before any is over
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_search_replaces_what_was_found_of_its_own_recipe_alone(given: Path) -> None:
    (given / "other.toml").write_text(RECIPE.replace('"echo"', '"second"'))
    command = ["--ranks", "1", "--metric", "loss", "--share", "1", "--steps"]
    for recipe in ("echo.toml", "other.toml"):
        told("search", recipe, *command, "2")
    told("search", "echo.toml", *command, "3")
    kept = [json.loads((given / "search" / name / "search.json").read_text()) for name in ("echo", "second")]
    assert [(one["recipe"], one["steps_of_full_grid"]) for one in kept] == [("echo", 3), ("second", 2)]
    trials = (given / "search" / "echo" / "trials.jsonl").read_text()
    done = runner.invoke(
        app, ["search", "other.toml", *command, "2", "--output", "search/echo", "--state-dir", "state"]
    )
    said = "search/echo has the search of echo, which second's would replace: choose another --output, or remove it"
    assert str(done.exception) == said and (given / "search" / "echo" / "trials.jsonl").read_text() == trials
    for odd in ("[]", "{", "{}"):  # nothing that a search has found
        (given / "search" / "echo" / "search.json").write_text(odd)
        told("search", "other.toml", *command, "2", "--output", "search/echo")


def test_what_a_search_has_found_is_told_though_it_cannot_be_written(given: Path) -> None:
    (given / "search" / "echo" / "search.json").mkdir(parents=True)
    command = ["search", "echo.toml", "--ranks", "1,2", "--metric", "loss", "--steps", "18", "--state-dir", "state"]
    for how in ([], ["--json"]):
        done = runner.invoke(app, [*command, *how])
        assert done.exit_code == 1 and "Take rank" in done.stdout and "search/echo cannot be written" in done.stderr
    found = json.loads(done.stdout)
    assert found["chosen"] in (1, 2) and found["plot"] is None and "cannot be written" in found["error"]["message"]
    assert (found["error"]["type"], found["error"]["param"]) == ("BadSetting", "output")
    tried = [json.loads(line) for line in (given / "search" / "echo" / "trials.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in tried] == [1, 2, 1, 2], "as each is over, for whoever does not wait for the end"
    assert tried[2:] == found["table"]
    best = next(row for row in found["table"] if row["rank"] == found["chosen"])
    assert f"score {best['loss']:.4f}" in found["advice"], "a loss as people know it"
