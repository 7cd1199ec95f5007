"""What judges the trials of a search: no example that an engine would refuse, after all that was trained for it."""

from __future__ import annotations

import json
from pathlib import Path

from adapters.training import TrainingConfig
from server.jobs.recipe import Recipe
from server.jobs.searching import examples
from server.model.loader import Base


def test_what_no_engine_can_answer_judges_no_trial(tiny_base: Base, tmp_path: Path) -> None:
    lines = [{"input": "the 1", "output": "good"}, {"input": "", "output": "good"}, {"input": "x " * 90, "output": "b"}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = TrainingConfig(max_length=50, data="d.jsonl")
    recipe = Recipe("m", "d.jsonl", {"prompt": "{input}", "format": "raw"}, config, validation="d.jsonl")
    found = examples(recipe, tiny_base, tmp_path, 10)
    assert [record.line for record in found.judges] == [1]
    assert len(found.judged.examples) == len(found.learned.examples) == 2, "the loss can have an empty prompt"


def test_what_is_held_out_is_not_learned_though_fewer_judge(tiny_base: Base, tmp_path: Path) -> None:
    lines = [{"input": f"the {i // 2}", "output": "good"} for i in range(200)]  # each twice
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = Recipe("m", "d.jsonl", {"prompt": "{input}", "format": "raw"}, TrainingConfig(data="d.jsonl"))
    every, few = (examples(recipe, tiny_base, tmp_path, most) for most in (500, 5))
    assert len(every.judged.examples) == 20 and len(few.judged.examples) == 5
    assert few.learned == every.learned and len(few.learned.examples) == 180
    assert not set(few.judged.examples) & set(few.learned.examples)
