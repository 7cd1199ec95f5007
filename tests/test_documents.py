"""The documentation agrees with the code: docs/api.md lists routes, fields, bounds and codes, and links resolve."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from adapters import data
from adapters.training import TrainingConfig
from server.api import errors, schemas
from server.api.fine_tuning_schemas import EvaluateBody
from server.api.openai_schemas import BOOKKEEPING, NOTES, ChatBody, CompletionBody, LoadAdapterBody
from server.app import create_app
from server.jobs import recipe
from server.jobs.training_request import BATCH, EPOCHS, LEARNING_RATE, Lora, TrainingRequest
from server.settings import Settings
from server.tasks import sampling

REPO = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(path.relative_to(REPO).as_posix() for path in (*REPO.glob("*.md"), *REPO.glob("docs/*.md")))
BODIES: tuple[type[BaseModel], ...] = (
    *(schemas.GenerateBody, schemas.ClassifyBody, CompletionBody, ChatBody, schemas.Weighted),
    *(schemas.TaskBody, schemas.Route, schemas.FeedbackBody, EvaluateBody),
    *(schemas.RegisterBody, schemas.PublishBody, schemas.ComposeBody, LoadAdapterBody),
)
ANSWERS: tuple[type[BaseModel], ...] = (schemas.GenerateAnswer, schemas.ClassifyAnswer, schemas.ErrorBody)
UNDOCUMENTED = {"base_model_name"}
"""Fields that are accepted and ignored."""


@pytest.fixture(scope="module")
def page() -> str:
    return (REPO / "docs" / "api.md").read_text(encoding="utf-8")


def words(page: str) -> set[str]:
    """All inline code of a page."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)))


def fields(*models: type[BaseModel]) -> set[str]:
    return {field.alias or name for model in models for name, field in model.model_fields.items()}


def row(page: str, field: str) -> list[str]:
    """The table cells of a field of /generate."""
    (found,) = re.findall(rf"^\| .*`{field}`.* \|$", page.split("## Who answers")[0], re.MULTILINE)
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_api_page_lists_exactly_the_routes(page: str, tmp_path: Path) -> None:
    paths = create_app(Settings(state_dir=tmp_path)).openapi()["paths"]
    routes = {f"{method.upper()} {path}" for path, operations in paths.items() for method in operations}
    routes |= {"GET /", "GET /docs", "GET /openapi.json"}  # not in the OpenAPI document
    assert {word.partition("?")[0] for word in words(page) if re.match("(GET|PUT|POST|DELETE) /", word)} == routes


def test_api_page_lists_every_field(page: str) -> None:
    documented = words(page)
    assert fields(*BODIES) - UNDOCUMENTED - documented == set()
    assert fields(schemas.ClassifyAnswer) - documented == set()
    assert (BOOKKEEPING | NOTES) - documented == set()
    assert all(row(page, name) for name in fields(schemas.GenerateBody))


def test_api_page_has_the_bounds_and_defaults(page: str) -> None:
    for name, number in sampling.NUMBERS.items():
        if name != "seed":  # documented in bits
            assert row(page, name)[2] == f"{'over ' if number.above else ''}{number.low:g} to {number.high:,}", name
    for name, default in sampling.OWN_DEFAULTS.items():
        assert row(page, name)[1] == f"{default:g}"


def test_api_page_lists_every_code_with_its_status(page: str) -> None:
    known = {(status, code) for status, _, code in errors.TABLE.values()} | set(errors.HTTP_CODES.items())
    known |= {(422, "invalid_request"), (422, "invalid_json"), (400, "invalid_json"), (500, "internal")}
    known |= {(400, errors.INVALID_HTTP)}
    documented = set()
    for statuses, codes in re.findall(r"^\| (\d{3}(?:, \d{3})*) \| (.*?) \|", page, re.MULTILINE):
        documented |= {(int(s), c) for s in statuses.split(", ") for c in re.findall(r"`(\w+)`", codes)}
    assert {code for _, code in documented} == {code for _, code in known}
    assert known <= documented


def test_api_page_lists_every_code_of_failed_jobs(page: str) -> None:
    sources = [path.read_text() for path in sorted((REPO / "server" / "jobs").glob("*.py"))]
    raised = {code for source in sources for code in re.findall(r'(?:JobError\(\s*|"code": )f?"([\w{}.]+)"', source)}
    known = raised - {"invalid_{self.param}"} | {f"invalid_{file}" for file in ("training_file", "validation_file")}
    table = page.split("| what is wrong | `code` |", 1)[1].split("\n\n", 1)[0]
    assert "invalid_{self.param}" in raised and words(table.replace("(of an evaluation)", "")) == known


def test_examples_of_the_api_page_match_the_schemas(page: str) -> None:
    def fits(model: type[BaseModel], value: dict[str, Any]) -> bool:
        try:
            model.model_validate(value)
        except ValidationError:
            return False
        return model not in ANSWERS or set(value) == fields(model)

    blocks = re.findall(r"^```json\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        assert any(fits(model, json.loads(block)) for model in (*BODIES, *ANSWERS)), block


def test_training_page_lists_names_of_recipes_and_jobs() -> None:
    page = (REPO / "docs" / "training.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| in a recipe \| in a job \|\n\|---\|---\|\n((?:\|.*\|\n)+)", page, re.MULTILINE)
    rows = [[words(cell) for cell in line.strip("|").split("|")] for line in table.splitlines()]
    of_recipes, of_jobs = (set().union(*column) for column in zip(*rows, strict=True))
    assert of_recipes - {"[task]"} <= set(recipe._RecipeFile.model_fields) | recipe.TRAINING_KEYS
    names = {field.name for kind in (TrainingRequest, Lora) for field in dataclasses.fields(kind)} - {
        "lora",
        "given",
        "metadata",
    }
    assert of_jobs == names - {"init_from", "publish"}, "these two have no name in recipes"
    config, lora = TrainingConfig(), Lora()
    assert (config.epochs, EPOCHS, config.lora_alpha) == (1, 3, 16) and config.learning_rate == LEARNING_RATE == 5e-4
    assert (config.batch_size, config.lora_rank) == (BATCH, lora.r), "unlisted defaults must be equal"


def test_the_command_that_converts_csv_works(tmp_path: Path) -> None:
    (command,) = re.findall(r"^python3 (-c .* > .*)$", (REPO / "docs" / "training.md").read_text("utf-8"), re.MULTILINE)
    rows = [("text", "label", "note"), ('He said "é,\nno"', "1", "x"), ("b", "2", "")]
    with (tmp_path / "train.csv").open("w", encoding="utf-8-sig", newline="") as stream:
        csv.writer(stream).writerows(rows)
    subprocess.run(f"{shlex.quote(sys.executable)} {command}", shell=True, check=True, cwd=tmp_path)
    assert data.read(tmp_path / "train.jsonl") == [data.Pair(1, *rows[1][:2]), data.Pair(2, *rows[2][:2])]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_resolve(name: str) -> None:
    text = (REPO / name).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        path = (REPO / name).parent / target if target else REPO / name
        assert path.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, anchor


@pytest.mark.parametrize("name", DOCUMENTS)
def test_pages_with_commands_name_the_environment(name: str) -> None:
    """Pages that show `loramux` commands mention `.venv/bin/loramux`, because the command is not on the path."""
    text = (REPO / name).read_text(encoding="utf-8")
    commands = re.findall(
        r"^(?:loramux|python -m) .*$", "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)), re.M
    )
    assert not commands or ".venv/bin/loramux" in text, commands
