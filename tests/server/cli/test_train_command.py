"""`loramux train` on the tiny base."""

from __future__ import annotations

import errno
import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapters import peft_format, training
from adapters.errors import AdapterError, Diverged, StoreFailed, TrainingStopped
from adapters.weights import LoraWeights
from server.cli import app, train
from server.cli.main import _same_as_ctrl_c
from server.errors import BadSetting, ServerError
from server.jobs import train_recipe
from server.jobs.recipe import Recipe, read_recipe
from server.model.loader import Base

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
LONG = "\n" + json.dumps({"input": "long", "output": "yes " * 200})


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_base: Base) -> Path:
    """The working directory with a recipe `echo` and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load_model", lambda settings, backend, quiet: tiny_base)
    write_recipe("echo")
    lines = [json.dumps({"input": f"text {i}", "output": "yes" if i % 2 else "no"}) for i in range(24)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.jsonl").write_text("\n".join(lines[:8]))
    return tmp_path


def write_recipe(name: str, first: str = "", last: str = "") -> None:
    Path(f"{name}.toml").write_text(f"{first}\n{RECIPE.replace('echo', name)}{last}\n")


def run(*arguments: str, command: str = "train") -> dict:
    """The JSON output of a successful command."""
    done = runner.invoke(app, [command, *arguments, "--json", "--state-dir", "state"])
    assert done.exit_code == 0, done.output + repr(done.exception)
    return json.loads(done.stdout)


def error(*arguments: str) -> str:
    """The error of a failing command."""
    return str(runner.invoke(app, ["train", *arguments, "--state-dir", "state"]).exception)


def printed(*arguments: str) -> str:
    return " ".join(runner.invoke(app, ["train", *arguments, "--state-dir", "state"]).stdout.split())


def read(path: str, **options: int) -> LoraWeights:
    return peft_format.read_folder(Path(path), name="echo", **options)


def test_options_override_the_recipe(folder: Path) -> None:
    torch.set_num_threads(2)
    options = ["--rank", "4", "--auto-rank", "--prune-to", "2", "--steps", "3", "--seed", "5", "--threads", "1"]
    result = run("echo.toml", *options)
    assert torch.get_num_threads() == 1 and result["config"]["seed"] == 5
    assert max(read(result["path"]).ranks) <= 2
    assert result["version"] == read(result["path"]).version.label


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ('nam = "x"\n' + RECIPE, "nam"),
        (RECIPE.replace('name = "echo"', ""), "name"),
        (RECIPE + "ranks = 3", "ranks"),
        (RECIPE + "eval_steps = 1\npatience = 1\n", "eval_steps"),
        (f"auto_rank = 1\n{RECIPE}", "auto_rank"),
        (f"prune_to = 0\n{RECIPE}", "prune_to"),
        (f"{RECIPE}seed = {2**64}\n", "seed"),
        (f'{RECIPE}quantization = "int3"\n', "quantization"),
        (RECIPE.replace("data.jsonl", "absent.jsonl"), "absent.jsonl"),
    ],
)
def test_invalid_recipes_are_named(folder: Path, recipe: str, message: str) -> None:
    write_recipe("second")
    (folder / "mine").mkdir()
    (folder / "mine" / "recipe.toml").write_text(recipe)
    failure = error("second.toml", "mine/recipe.toml")
    assert message in failure and ("mine/recipe.toml" in failure or failure.startswith("echo: "))
    assert not (folder / "trained").exists()


def test_invalid_data_of_any_recipe_is_reported_before_training(folder: Path) -> None:
    write_recipe("second")
    Path("second.toml").write_text(Path("second.toml").read_text().replace("data.jsonl", "bad.jsonl"))
    (folder / "bad.jsonl").write_text('{"input": "a"}')
    for order in (("echo.toml", "second.toml"), ("second.toml", "echo.toml")):
        assert error(*order).startswith("second: bad.jsonl, line 1: ") and not (folder / "trained").exists()
    assert "echo" in error("echo.toml", "echo.toml")


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ("--rank 4 --prune-to 4", ""),
        ("--rank 2", "prune_to = 3"),
        ("--rank 65", ""),
        ("--rank 17 --auto-rank", ""),
        (f"--seed={2**64}", ""),
    ],
)
def test_useless_or_invalid_ranks_and_seeds_are_rejected(folder: Path, options: str, first: str) -> None:
    write_recipe("echo", first)
    failure = runner.invoke(app, ["train", "echo.toml", *options.split(), "--state-dir", "state"]).exception
    assert isinstance(failure, AdapterError | ServerError) and not (folder / "trained").exists()


def test_higher_ranks_need_max_rank_or_pruning(folder: Path) -> None:
    command = ["echo.toml", "--rank", "65", "--steps", "1"]
    assert max(read(run(*command, "--max-rank", "65")["path"], max_rank=65).ranks) == 65
    assert run(*command)["skipped"]
    assert max(read(run(*command, "--prune-to", "2")["path"]).ranks) == 2


def test_home_directory_in_a_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "home").mkdir()
    for name in ("data.jsonl", "held.jsonl"):
        shutil.move(name, folder / "home")
    monkeypatch.setenv("HOME", str(folder / "home"))
    (folder / "echo.toml").write_text('validation = "~/held.jsonl"\n' + RECIPE.replace('"data', '"~/data'))
    assert not run("echo.toml", "--steps", "1", "--output=~/made")["skipped"]
    assert (folder / "home" / "made" / "echo").is_dir() and not (folder / "~").exists()


def fail(monkeypatch: pytest.MonkeyPatch, name: str, failure: Exception) -> None:
    """Make the training of one recipe fail."""
    original = train_recipe.run

    def failing(recipe: Recipe, *arguments: object, **options: object) -> LoraWeights:
        if recipe.name == name:
            raise failure
        return original(recipe, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(train_recipe, "run", failing)


@pytest.mark.parametrize("failure", [Diverged("diverged", "lr"), BadSetting("locked"), StoreFailed("damaged")])
def test_other_recipes_are_trained_if_one_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failure: AdapterError | ServerError
) -> None:
    for name in ("second", "third"):
        write_recipe(name)
    fail(monkeypatch, "second", failure)
    command = ["train", "echo.toml", "second.toml", "third.toml", "--steps", "1", "--state-dir", "state"]
    done = runner.invoke(app, command)
    errors = [f"error: second: {failure.message}", "error: 1 of 3 recipes failed: second"]
    assert done.exit_code == 1 and [line for line in done.stderr.splitlines() if "error" in line] == errors
    assert "trained/echo: 1 steps" in done.stdout and "trained/third: 1 steps" in done.stdout
    done = runner.invoke(app, [*command, "--json"])
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 1 and [row["name"] for row in rows] == ["echo", "second", "third"]
    body = {"message": f"second: {failure.message}", "type": type(failure).__name__, "param": failure.param}
    assert rows[1] == {"name": "second", "error": body} and "error" not in rows[2]


@pytest.mark.parametrize(
    "failure",
    [
        MemoryError("no memory"),
        RuntimeError("DefaultCPUAllocator: you tried to allocate 7 bytes"),
        torch.OutOfMemoryError("no block"),
    ],
)
def test_lack_of_memory_gives_advice(folder: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    fail(monkeypatch, "echo", failure)
    message = error("echo.toml", "--steps", "1")
    assert message.startswith("echo: ") and "memory" in message and "activation_checkpointing = true" in message
    fail(monkeypatch, "echo", RuntimeError("something else"))
    assert error("echo.toml", "--steps", "1") == "something else"


def test_a_full_disk_ends_the_command(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe("second")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(peft_format, "replace_file", full)
    message = error("echo.toml", "second.toml", "--steps", "1")
    assert message.startswith("echo: ") and "No space left on device" in message
    assert not (folder / "trained" / "second").exists()


def count_updates(monkeypatch: pytest.MonkeyPatch, fail_at: int = 0) -> list[int]:
    """The step of each update from now on; update number `fail_at` fails."""
    steps: list[int] = []
    update = training._Run._update

    def counting(self: training._Run) -> training.Event:
        if len(steps) + 1 == fail_at:
            raise TrainingStopped("stopped by the test")
        steps.append(self.progress.step)
        return update(self)

    monkeypatch.setattr(training._Run, "_update", counting)
    return steps


def test_resume_trains_only_what_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe("second", last="save_steps = 1")
    command = ["echo.toml", "second.toml", "--steps", "4"]
    with monkeypatch.context() as patch:
        count_updates(patch, fail_at=7)
        assert "stopped by the test" in error(*command)
    steps = count_updates(monkeypatch)
    text = printed(*command)
    assert steps == [2, 3] and "trained/echo is already finished" in text and "trained/second: 4 steps" in text
    again = run("echo.toml", "--steps", "4")
    assert again["skipped"] and again["version"] == read("trained/echo").version.label and len(steps) == 2


@pytest.mark.parametrize("change", ["steps", "data", "removed"])
def test_a_changed_recipe_is_trained_again(folder: Path, change: str) -> None:
    run("echo.toml", "--steps", "1")
    if change == "data":
        (folder / "data.jsonl").write_text((folder / "held.jsonl").read_text())
    if change == "removed":
        shutil.rmtree(folder / "trained" / "echo")
    assert not run("echo.toml", "--steps", "2" if change == "steps" else "1")["skipped"]


def test_resume_on_another_day_with_a_dated_template(
    folder: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "Today is {{ strftime_now('%d %b %Y') }}\n" + (tiny_base.vocabulary.chat_template or "")
    base = replace(tiny_base, vocabulary=replace(tiny_base.vocabulary, chat_template=template))
    monkeypatch.setattr(train, "load_model", lambda settings, backend, quiet: base)
    write_recipe("echo", last="save_steps = 1")
    with monkeypatch.context() as patch:
        patch.setattr("server.jobs.train_recipe.time.time", lambda: 1e9)
        count_updates(patch, fail_at=3)
        assert "stopped by the test" in error("echo.toml", "--steps", "4")
    steps = count_updates(monkeypatch)
    assert not run("echo.toml", "--steps", "4")["skipped"] and steps == [2, 3]


@pytest.fixture(params=[signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def stop_signal(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that is not ignored, as it may be under nohup."""
    before = signal.signal(request.param, signal.default_int_handler)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_saves_a_checkpoint(
    folder: Path, stop_signal: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run("echo.toml", "--steps", "4", "--output", "whole")["version"]
    steps = count_updates(monkeypatch)
    update = training._Run._update

    def interrupting(self: training._Run) -> training.Event:
        event = update(self)
        if event.step == 2:
            signal.raise_signal(stop_signal)
        return event

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_update", interrupting)
        done = runner.invoke(app, ["train", "echo.toml", "--steps", "4", "--state-dir", "state"])
    assert isinstance(done.exception, TrainingStopped), done.output
    assert done.exception.message.startswith("echo: ") and "to resume" in done.exception.message
    assert run("echo.toml", "--steps", "4")["version"] == whole and steps == [0, 1, 2, 3]
    assert signal.getsignal(stop_signal) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_second_signal_ends_at_once(number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {each: signal.signal(each, _same_as_ctrl_c) for each in (signal.SIGTERM, signal.SIGHUP)}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with train._stop_requested() as stop:
            assert not stop()
            for _ in range(2):  # a repeated signal within REPEAT_WINDOW is the same one
                signal.raise_signal(number)
                assert stop()
            monkeypatch.setattr(train, "REPEAT_WINDOW", 0.0)
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(number)
        assert signal.getsignal(signal.SIGTERM) is _same_as_ctrl_c
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_skipped_and_overlapping_examples_are_reported(folder: Path) -> None:
    for name in ("data.jsonl", "held.jsonl"):
        with (folder / name).open("a") as lines:
            lines.write(LONG)
    write_recipe("echo", 'validation = "held.jsonl"\nprune_to = 1')
    command = ["echo.toml", "--rank", "2", "--steps", "2"]
    text = printed(*command)
    result = run(*command)
    assert result["skipped"] and result["learned_too"] == 8
    assert "8 validation examples are also in the training data" in text
    assert "skipped 1 of the 25 training examples" in text and "skipped 1 of the validation examples" in text
    pruned = result["pruned"]
    assert pruned["rank"] == max(read(result["path"]).ranks) == 1 and pruned["error"] > 0.01
    assert f"pruned to rank 1, relative error {pruned['error']:.4f}, validation loss {pruned['loss']:.4f}" in text


def test_rank_per_module_can_be_pruned(folder: Path, tiny_base: Base) -> None:
    path = next(iter(tiny_base.shapes()))
    write_recipe("echo", "prune_to = 3", f'lora_rank = 2\nlora_rank_of = {{ "{path}" = 4 }}')
    assert read(run("echo.toml", "--steps", "1")["path"]).ranks == [2, 3]


def test_quantization_of_the_recipe_unless_a_flag_is_given(
    folder: Path, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[dict] = []
    monkeypatch.setattr(train, "load_model", lambda settings, *_, **__: used.append(settings.packing) or tiny_base)
    write_recipe("echo", last='quantization = "nf4"\nuse_double_quant = true')
    result = run("echo.toml", "--steps", "1")
    run("echo.toml", "--steps", "1", "--quantization", "none")
    assert [(u["quantization"], u["double_quant"]) for u in used] == [("nf4", True), ("none", True)]
    assert result["config"]["quantization"] == tiny_base.quantization["scheme"]
    write_recipe("second", last='quantization = "int4"')
    failure = error("echo.toml", "second.toml")
    assert "nf4" in failure and "int4" in failure
    assert read_recipe(folder / "echo.toml").name == "echo"


def test_training_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.kernels import cuda

    assert train.training_backend("cpu").name == "reference"
    monkeypatch.setattr(cuda, "unavailable", lambda: "there is no GPU")
    assert train.training_backend("auto").name == "reference"
    with pytest.raises(BadSetting, match="there is no GPU"):
        train.training_backend("cuda")
    monkeypatch.setattr(cuda, "unavailable", lambda: None)
    assert [train.training_backend(device).name for device in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "reference"]
