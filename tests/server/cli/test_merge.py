"""`loramux compose` and `prune` on folders, as a person runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from adapters import peft_format
from adapters.errors import AdapterError
from adapters.weights import LowRank, with_digest
from server.cli.main import app


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for i, rank in enumerate((4, 6)):
        draw = torch.Generator().manual_seed(i)
        modules = {
            path: LowRank(torch.randn(rank, 8, generator=draw), torch.randn(12, rank, generator=draw), 0.5)
            for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
        }
        peft_format.save(with_digest(f"a{i}", modules), tmp_path / f"a{i}")
        made.append(tmp_path / f"a{i}")
    return made


def run(*arguments: object) -> dict[str, object]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.output)


def test_compose_is_the_weighted_sum(folders: list[Path], tmp_path: Path) -> None:
    told = run("compose", f"{folders[0]}=0.5", f"{folders[1]}=-2", "--output", tmp_path / "sum")
    one, two, both = (peft_format.read_folder(f, name="x") for f in (*folders, tmp_path / "sum"))
    for path in both.modules:
        assert torch.allclose(both.delta(path), 0.5 * one.delta(path) - 2 * two.delta(path), atol=1e-5)
    assert told["ranks"] == [10] and told["error"] == 0.0
    smaller = run("compose", *folders, "--rank", 3, "--output", tmp_path / "small")
    assert smaller["ranks"] == [3] and 0 < smaller["error"] < 1


def test_a_folder_is_called_as_it_is_called(
    folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert str(run("compose", folders[0], "--output", ".")["version"]).startswith("here@")


@pytest.mark.parametrize("how", [("--rank", 2), ("--budget", 100), ("--energy", 0.7), ("--drop", 0.5)])
def test_prune_tells_its_error(how: tuple[str, object], folders: list[Path], tmp_path: Path) -> None:
    told = run("prune", folders[1], *how, "--output", tmp_path / "cut")
    assert told["parameters"] < told["parameters_before"] == 240 and 0 < told["error"] < 1
    assert peft_format.read_folder(tmp_path / "cut", name="x").modules


def test_what_is_not_cut_is_as_it_was(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(4)
    a, b = torch.randn(4, 8, generator=draw).bfloat16(), torch.randn(12, 4, generator=draw).bfloat16()
    whole = with_digest("half", {"model.layers.0.self_attn.q_proj": LowRank(a, b, 0.5)})
    peft_format.save(whole, tmp_path / "half")
    told = run("prune", tmp_path / "half", "--rank", 4, "--output", tmp_path / "cut")
    (module,) = peft_format.read_folder(tmp_path / "cut", name="x").modules.values()
    assert told["error"] == 0 and torch.equal(module.A, a) and torch.equal(module.B, b)


def test_each_module_keeps_its_own_precision(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(5)
    paths = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    of = {
        path: LowRank(torch.randn(4, 8, generator=draw).to(a), torch.randn(12, 4, generator=draw).to(b), 0.5)
        for path, a, b in zip(
            paths,
            (torch.bfloat16, torch.float32, torch.float16),
            (torch.bfloat16, torch.float32, torch.float32),
            strict=True,
        )
    }
    peft_format.save(with_digest("mixed", of), tmp_path / "mixed")
    told = run("prune", tmp_path / "mixed", "--rank", 3, "--output", tmp_path / "cut")
    made = peft_format.read_folder(tmp_path / "cut", name="x").modules
    assert [(m.A.dtype, m.B.dtype) for m in made.values()] == [(m.A.dtype, m.B.dtype) for m in of.values()]

    def dense(module: LowRank) -> torch.Tensor:
        return module.B.double() @ module.A.double() * module.scale

    lost = sum(float(torch.dist(dense(made[path]), dense(of[path]))) ** 2 for path in paths)
    whole = sum(float(dense(of[path]).norm()) ** 2 for path in paths)
    assert told["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4), "it is that of what lies there"


def test_the_card_of_what_is_cut_says_so(folders: list[Path], tmp_path: Path) -> None:
    (folders[1] / "README.md").write_text("# b\n\n- **Accuracy**: 0.9\n")
    run("prune", folders[1], "--rank", 1, "--output", tmp_path / "cut")
    card = (tmp_path / "cut" / "README.md").read_text()
    assert card.startswith("# b\n\n- **Accuracy**: 0.9\n- **Pruned** afterwards: ") and " of 240 parameters" in card


def test_the_version_told_is_the_one_that_lies_in_the_folder(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 8, generator=draw).bfloat16(), torch.randn(12, 4, generator=draw).bfloat16()
    peft_format.save(with_digest("half", {"model.layers.0.self_attn.q_proj": LowRank(a, b, 0.5)}), tmp_path / "half")
    commands: list[list[object]] = [["prune", tmp_path / "half", "--rank", 2], ["compose", f"{tmp_path / 'half'}=0.3"]]
    for command in commands:
        told = run(*command, "--output", tmp_path / "made", "--force")
        assert told["version"] == peft_format.read_folder(tmp_path / "made", name="made").version.label


def test_wrong_arguments_are_named(folders: list[Path], tmp_path: Path) -> None:
    for arguments in (["prune", folders[0]], ["compose", f"{folders[0]}=much"], ["compose", tmp_path / "nothing"]):
        done = CliRunner().invoke(app, [*map(str, arguments), "--output", str(tmp_path / "x")])
        assert done.exit_code != 0 and done.exception is not None and str(done.exception)


def test_a_folder_may_have_an_equals_sign_in_its_name(folders: list[Path], tmp_path: Path) -> None:
    named = folders[0].rename(tmp_path / "lr=2e-4")
    told = run("compose", named, "--output", tmp_path / "once")
    twice = run("compose", f"{named}=2", "--output", tmp_path / "twice")
    assert told["ranks"] == twice["ranks"] and told["version"].split("@")[1] != twice["version"].split("@")[1]


@pytest.mark.parametrize("command", ["compose", "prune"])
def test_an_adapter_is_replaced_only_if_that_is_said(folders: list[Path], tmp_path: Path, command: str) -> None:
    (folders[1] / "task.json").write_text('{"task": "old", "prompt": "{input}"}')
    (folders[1] / "README.md").write_text("# old\n")
    before = {path.name: path.read_bytes() for path in folders[1].iterdir()}
    asked = [command, folders[0], *(["--rank", 2] if command == "prune" else []), "--output", folders[1]]
    done = CliRunner().invoke(app, [*map(str, asked)])
    assert done.exit_code != 0 and "--force" in str(done.exception)
    assert {path.name: path.read_bytes() for path in folders[1].iterdir()} == before
    told = run(*asked, "--force")
    assert told["version"] == peft_format.read_folder(folders[1], name=folders[1].name).version.label
    assert not (folders[1] / "task.json").exists(), "it is another adapter's"
    assert not (folders[1] / "README.md").exists()


def test_what_is_cut_in_its_place_keeps_its_card(folders: list[Path]) -> None:
    (folders[1] / "README.md").write_text("# mine\n")
    run("prune", folders[1], "--rank", 2, "--output", folders[1], "--force")
    assert (folders[1] / "README.md").read_text().startswith("# mine\n- **Pruned** afterwards")


def test_an_error_says_which_folder_it_is_about(folders: list[Path], tmp_path: Path) -> None:
    (folders[1] / peft_format.TENSOR_FILE).unlink()
    for command in (["compose", folders[0]], ["prune", "--rank", 2]):
        for folder, message in ((tmp_path / "nothing", "is no folder"), (folders[1], "is missing")):
            done = CliRunner().invoke(app, [*map(str, command), str(folder), "--output", str(tmp_path / "x")])
            assert str(done.exception).startswith(f"{folder}: ") and message in str(done.exception)


def test_what_overflows_is_refused_and_the_adapter_that_was_there_stays(folders: list[Path], tmp_path: Path) -> None:
    large = LowRank(torch.full((2, 4), 1e20), torch.full((4, 2), 1e20), 1.0)
    peft_format.save(with_digest("large", {"m": large}, {}), tmp_path / "large")
    before = {file.name: file.read_bytes() for file in folders[0].iterdir()}
    command = ["prune", str(tmp_path / "large"), "--rank", "1", "--force", "--output", str(folders[0])]
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0 and "m.lora_A would have values that are not finite" in str(done.exception)
    assert {file.name: file.read_bytes() for file in folders[0].iterdir()} == before


def test_a_seed_that_no_generator_takes(folders: list[Path], tmp_path: Path) -> None:
    asked = ["compose", folders[0], "--method", "dare_linear", "--seed", 10**30, "--output", tmp_path / "out"]
    done = CliRunner().invoke(app, list(map(str, asked)))
    assert isinstance(done.exception, AdapterError) and "64 bits" in done.exception.message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [("--rank", 2), ("--budget", 100), ("--drop", 0.5)])
def test_what_is_cut_names_the_version_that_it_was(
    how: tuple[str, object], folders: list[Path], tmp_path: Path
) -> None:
    told = run("prune", folders[1], *how, "--output", tmp_path / "cut")
    assert told["of"] == peft_format.read_folder(folders[1], name="a1").version.label
    assert told["version"].startswith("cut@")
