"""`loramux compose` and `loramux prune`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from adapters import peft_format
from adapters.errors import AdapterError
from adapters.weights import LowRank, with_digest
from server.cli.main import app

PATHS = tuple(f"model.layers.{i}.self_attn.q_proj" for i in range(3))


def module(rank: int, seed: int, a: torch.dtype = torch.float32, b: torch.dtype = torch.float32) -> LowRank:
    draw = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, 8, generator=draw).to(a), torch.randn(12, rank, generator=draw).to(b), 0.5)


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two adapter folders of ranks 4 and 6."""
    for i, rank in enumerate((4, 6)):
        modules = {path: module(rank, 10 * i + j) for j, path in enumerate(PATHS[:2])}
        peft_format.save(with_digest(f"a{i}", modules), tmp_path / f"a{i}")
    return [tmp_path / "a0", tmp_path / "a1"]


def run(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    result: dict[str, Any] = json.loads(done.output)
    output = Path(str(arguments[list(arguments).index("--output") + 1]))
    saved = peft_format.read_folder(output, name=output.resolve().name)
    assert result["version"] == saved.version.label
    return result


def error(*arguments: object) -> Exception:
    done = CliRunner().invoke(app, list(map(str, arguments)))
    assert done.exit_code != 0 and isinstance(done.exception, Exception)
    return done.exception


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_compose_is_the_weighted_sum(folders: list[Path], tmp_path: Path) -> None:
    result = run("compose", f"{folders[0]}=0.5", f"{folders[1]}=-2", "--output", tmp_path / "sum")
    one, two, both = (peft_format.read_folder(f, name="x") for f in (*folders, tmp_path / "sum"))
    for path in both.modules:
        assert torch.allclose(both.delta(path), 0.5 * one.delta(path) - 2 * two.delta(path), atol=1e-5)
    assert result["ranks"] == [10] and result["error"] == 0.0
    smaller = run("compose", *folders, "--rank", 3, "--output", tmp_path / "small")
    assert smaller["ranks"] == [3] and 0 < smaller["error"] < 1


@pytest.mark.parametrize("method", [("--rank", 2), ("--budget", 100), ("--energy", 0.7), ("--drop", 0.5)])
def test_prune_reports_its_error(method: tuple[str, object], folders: list[Path], tmp_path: Path) -> None:
    result = run("prune", folders[1], *method, "--output", tmp_path / "cut")
    assert result["parameters"] < result["parameters_before"] == 240 and 0 < result["error"] < 1
    assert result["of"] == peft_format.read_folder(folders[1], name="a1").version.label


def test_prune_to_the_same_rank_changes_nothing(tmp_path: Path) -> None:
    before = module(4, 4, torch.bfloat16, torch.bfloat16)
    peft_format.save(with_digest("half", {PATHS[0]: before}), tmp_path / "half")
    result = run("prune", tmp_path / "half", "--rank", 4, "--output", tmp_path / "cut")
    (after,) = peft_format.read_folder(tmp_path / "cut", name="x").modules.values()
    assert result["error"] == 0 and torch.equal(before.A, after.A) and torch.equal(before.B, after.B)


def test_prune_keeps_dtypes_and_reports_the_error_of_the_saved_weights(tmp_path: Path) -> None:
    dtypes = ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32), (torch.float16, torch.float32))
    before = {path: module(4, i, *dtypes[i]) for i, path in enumerate(PATHS)}
    peft_format.save(with_digest("mixed", before), tmp_path / "mixed")
    result = run("prune", tmp_path / "mixed", "--rank", 3, "--output", tmp_path / "cut")
    after = peft_format.read_folder(tmp_path / "cut", name="x").modules
    assert [(m.A.dtype, m.B.dtype) for m in after.values()] == [(m.A.dtype, m.B.dtype) for m in before.values()]

    def dense(m: LowRank) -> torch.Tensor:
        return m.B.double() @ m.A.double() * m.scale

    lost = sum(float(torch.dist(dense(after[path]), dense(before[path]))) ** 2 for path in PATHS)
    total = sum(float(dense(before[path]).norm()) ** 2 for path in PATHS)
    assert result["error"] == pytest.approx((lost / total) ** 0.5, rel=1e-4)


def test_the_card_mentions_the_pruning(folders: list[Path], tmp_path: Path) -> None:
    (folders[1] / "README.md").write_text("# b\n\n- **Accuracy**: 0.9\n")
    for output in (tmp_path / "cut", folders[1]):
        run("prune", folders[1], "--rank", 1, "--output", output, "--force")
        card = (output / "README.md").read_text()
        assert card.startswith("# b\n\n- **Accuracy**: 0.9\n- **Pruned**: ") and " of 240 parameters" in card


def test_output_folder_gives_the_name(folders: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run("compose", folders[0], "--output", ".")["version"].startswith("here@")


def test_equals_sign_in_a_folder_name(folders: list[Path], tmp_path: Path) -> None:
    named = folders[0].rename(tmp_path / "lr=2e-4")
    once = run("compose", named, "--output", tmp_path / "once")
    twice = run("compose", f"{named}=2", "--output", tmp_path / "twice")
    assert once["ranks"] == twice["ranks"] and once["version"].split("@")[1] != twice["version"].split("@")[1]


@pytest.mark.parametrize("command", ["compose", "prune"])
def test_replacing_an_adapter_needs_force(folders: list[Path], command: str) -> None:
    (folders[1] / "task.json").write_text('{"task": "old", "prompt": "{input}"}')
    (folders[1] / "README.md").write_text("# old\n")
    before = files(folders[1])
    arguments = [command, folders[0], *(["--rank", 2] if command == "prune" else []), "--output", folders[1]]
    assert "--force" in str(error(*arguments)) and files(folders[1]) == before
    run(*arguments, "--force")
    assert not (folders[1] / "task.json").exists() and not (folders[1] / "README.md").exists()


def test_errors(folders: list[Path], tmp_path: Path) -> None:
    output = ["--output", tmp_path / "x"]
    assert "exactly one" in str(error("prune", folders[0], *output))
    assert "not a number" in str(error("compose", f"{folders[0]}=much", *output))
    failure = error("compose", folders[0], "--method", "dare_linear", "--seed", 10**30, *output)
    assert isinstance(failure, AdapterError) and not (tmp_path / "x").exists()
    (folders[1] / peft_format.TENSOR_FILE).unlink()
    for command in (["compose", folders[0]], ["prune", "--rank", 2]):
        for folder in (tmp_path / "nothing", folders[1]):
            assert str(error(*command, folder, *output)).startswith(f"{folder}: ")


def test_overflow_leaves_the_existing_adapter(folders: list[Path], tmp_path: Path) -> None:
    large = LowRank(torch.full((2, 4), 1e20), torch.full((4, 2), 1e20), 1.0)
    peft_format.save(with_digest("large", {"m": large}, {}), tmp_path / "large")
    before = files(folders[0])
    failure = error("prune", tmp_path / "large", "--rank", "1", "--force", "--output", folders[0])
    assert "finite" in str(failure) and files(folders[0]) == before
