"""Which examples are learned, held out and evaluated on, and errors in data files."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import data
from adapters.data import Completion, Pair
from server.jobs import training_data
from server.jobs.errors import JobError
from server.jobs.training_data import answerable, held_out, prepare, write_pairs
from server.jobs.worker_messages import VALIDATION_PAIRS, WorkerSpec
from server.model.loader import Base
from tests.server.jobs.conftest import CONFIG

RAW = {"prompt": "{input}", "format": "raw"}


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize(
    ("count", "fraction", "expected"),
    [(10, 0.0, 0), (9, 0.1, 0), (1, 0.9, 0), (2, 1.0, 1), (100, 0.1, 10), (10_000, 0.1, 200)],
)
def test_how_many_examples_are_held_out(count: int, fraction: float, expected: int) -> None:
    assert len(held_out([Pair(i + 1, f"in {i}", "out") for i in range(count)], fraction)) == expected


@given(st.lists(st.integers(0, 30), max_size=60), st.randoms(use_true_random=False), st.sampled_from([0.1, 0.5]))
def test_held_out_examples_depend_on_content_only(inputs: list[int], random: Any, fraction: float) -> None:
    records = [Pair(i + 1, f"in {n}", "out") for i, n in enumerate(inputs)]
    chosen = {records[i].input for i in held_out(records, fraction)}
    shuffled = [replace(pair, unit="entry") for pair in records]
    random.shuffle(shuffled)
    assert {shuffled[i].input for i in held_out(shuffled, fraction)} == chosen
    kept = held_out(records, fraction)
    assert len(kept) == sum(pair.input in chosen for pair in records), "duplicates stay together"
    assert len(kept) <= fraction * len(records)


def test_chats_with_the_same_content_are_held_out_together() -> None:
    """Merged files write messages differently."""

    def chats(i: int) -> list[dict[str, Any]]:
        asked, answer = {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}
        earlier = {"role": "assistant", "content": "hello", "weight": 0}
        return [
            {"messages": [earlier, asked, answer]},
            {"messages": [earlier, dict(reversed(asked.items())), answer]},
            {"messages": [{**earlier, "weight": False}, {**asked, "weight": 0}, {**answer, "weight": 1}]},
            {"messages": [earlier, {**asked, "name": None}, {**answer, "tool_calls": [], "weight": None}]},
            {"messages": [{**earlier, "weight": 1}, asked, answer]},  # different: the first answer is learned too
            {"messages": [earlier, {**asked, "name": "Ann"}, answer]},
        ]

    records = data.parse(json.dumps([chat for i in range(60) for chat in chats(i)]).encode())
    kept = held_out(records, 0.1)
    same = Counter(i // 6 for i in kept if i % 6 < 4)
    assert set(same.values()) == {4} and len(kept) > sum(same.values()), "the others are held out by themselves"


@pytest.mark.parametrize(
    ("record", "max_length", "fits"),
    [
        (Pair(1, "a", "b"), 3, True),
        (Pair(1, "a", "b"), 2, False),
        (Pair(1, "a", "b" * 100_000), 3, True),
        (Pair(1, "a", "b" * 100_001), 3, False),  # too long to compare
        (Completion(1, "a", "b" * 100_001), 3, True),
    ],
)
def test_which_examples_an_engine_can_be_evaluated_on(record: Any, max_length: int, fits: bool) -> None:
    assert bool(answerable([record], lambda record: ([1, 2, 3], [False, False, True]), max_length)) == fits


def test_what_is_wrong_with_a_file_is_named(spec: WorkerSpec, tiny_base: Base, tmp_path: Path) -> None:
    (tmp_path / "bad").write_text('{"input": "a", "output": "b"}\n{"input": 1, "output": "b"}\n')
    (tmp_path / "chat").write_text(
        '[{"input": "a", "output": "b"}, {"messages": [{"role": "assistant", "content": "x"}]}]'
    )
    no_chat = replace(tiny_base, vocabulary=replace(tiny_base.vocabulary, chat_template=None))
    bad = replace(spec, validation=tmp_path / "bad", validation_name="v.jsonl")
    chat = replace(spec, validation=tmp_path / "chat", validation_name="v", template={"format": "raw"})
    for wrong, base, message, code in (
        (bad, tiny_base, r"^v\.jsonl, line 2: 'input' must be a string", "invalid_validation_file"),
        (chat, no_chat, "^v, entry 2: .*chat template", "invalid_validation_file"),
        (replace(spec, config=replace(CONFIG, max_length=2)), tiny_base, r"d\.jsonl", "invalid_training_file"),
        (
            replace(spec, data=tmp_path / "absent"),
            tiny_base,
            "d.jsonl cannot be read: No such",
            "invalid_training_file",
        ),
    ):
        with pytest.raises(JobError, match=message) as error:
            prepare(wrong, base)
        assert error.value.code == code and f"invalid_{error.value.param}" == code
        assert str(tmp_path) not in error.value.message


def test_examples_that_no_engine_can_answer_are_not_evaluated_on(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path
) -> None:
    """An empty prompt, or one that is over the server's context length."""
    records = [
        {"input": "the 1", "output": "good"},
        {"input": "", "output": "good"},
        {"input": "the " * 40, "output": "b"},
    ]
    held = write(tmp_path / "held", records)
    raw = replace(spec, validation=held, validation_name="v", template=RAW)
    whole, short = prepare(raw, tiny_base), prepare(replace(raw, context_length=20), tiny_base)
    assert [r.line for r in whole.records] == [1, 3] and whole.left_out == 1
    assert [r.line for r in short.records] == [1] and short.left_out == 2
    assert short.validation is not None and whole.validation is not None
    assert short.validation.digest == whole.validation.digest, "a checkpoint resumes with another context length"
    write_pairs(short.records, tmp_path)
    assert len(data.read(tmp_path / VALIDATION_PAIRS)) == 1

    kept = prepare(replace(raw, validation=None, held_out=0.5, context_length=1), tiny_base)
    assert kept.records == () and kept.left_out == kept.held_out == 5

    write(held, [{"prompt": r["input"], "completion": r["output"]} for r in records])
    by_loss = prepare(replace(raw, context_length=20), tiny_base)
    assert len(by_loss.records) == 3 and by_loss.left_out == 0, "the training process evaluates them"


def test_a_run_validates_on_part_of_a_long_file(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "MAX_VALIDATION", 2)
    monkeypatch.setattr(training_data, "MAX_EVALUATED", 5)
    long, short = {"input": "the " * 80, "output": "good"}, {"input": "the", "output": "good"}
    held = replace(spec, validation=tmp_path / "held", validation_name="v", config=replace(CONFIG, max_length=60))
    for records, seen in (
        ([short] * 6, 2),
        ([long, short, short, short], 1),
    ):
        write(tmp_path / "held", records)
        found = prepare(held, tiny_base)
        assert found.validation is not None and len(found.validation.examples) == seen
        assert len(found.records) == records[:5].count(short) and len(found.training.examples) == 10
    write(tmp_path / "held", [long] * 5 + [short])
    with pytest.raises(JobError, match="all 2 examples are longer than 60"):
        prepare(held, tiny_base)


def test_only_pairs_are_written_for_the_engine(spec: WorkerSpec, tiny_base: Base, tmp_path: Path) -> None:
    held = prepare(replace(spec, held_out=0.2), tiny_base)
    write_pairs(held.records, tmp_path)
    kept = data.read(tmp_path / VALIDATION_PAIRS)
    assert len(kept) == held.held_out == 2 and len(held.training.examples) == 8
    assert {pair.input for pair in kept if isinstance(pair, Pair)} < {f"the {i}" for i in range(10)}
    mixed = data.parse(b'{"input": "a", "output": "b"}\n{"prompt": "a", "completion": "b"}\n')
    for records in (mixed, []):
        write_pairs([Pair(1, "a", "b")], tmp_path)  # of an earlier run
        write_pairs(records, tmp_path)
        assert not (tmp_path / VALIDATION_PAIRS).exists()
