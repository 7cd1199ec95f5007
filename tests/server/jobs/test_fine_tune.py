"""One run from its spec: what is held out, what is compared, how a run that was stopped goes on, the last words."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import data
from adapters.errors import InvalidAdapter, TrainingStopped
from adapters.peft_format import read_folder, save
from adapters.training import Event, TrainingConfig
from adapters.weights import LoraWeights, LowRank, with_digest
from server.errors import InvalidRequest
from server.jobs import fine_tune as fine_tune_module
from server.jobs import worker
from server.jobs.errors import JobError
from server.jobs.fine_tune import _Told, answerable, fine_tune, held_out, keep_pairs, prepare
from server.jobs.publisher import Verdict, losses_table, shares
from server.jobs.train_recipe import _measured, as_written
from server.jobs.trainable_model import TrainableModel, loss_of
from server.jobs.worker import Words
from server.jobs.worker_messages import BaseSource, WorkerSpec
from server.jobs.worker_process import last_words
from server.model import chat_template
from server.model.chat_template import template_time
from server.model.tokenizer import ModelTokenizer
from server.tasks.evaluation import Score, pairs

CONFIG = TrainingConfig(
    epochs=2, batch_size=4, lora_rank=2, target_modules=("q_proj",), compute_dtype="float32", save_steps=2
)


@pytest.fixture
def spec(tmp_path: Path) -> WorkerSpec:
    content = tmp_path / "content"
    content.write_text("".join(json.dumps({"input": f"the {i}", "output": "good"}) + "\n" for i in range(10)))
    origin = BaseSource(tmp_path, "tiny", "reference", "none", None, False, 8, tmp_path, "0" * 64)
    return WorkerSpec(
        base=origin, name="x", config=CONFIG, data=content, data_name="d.jsonl", template={}, threads=1, max_rank=64
    )


def test_a_spec_is_read_as_it_was_written(spec, tmp_path):
    whole = replace(
        spec,
        loan={"memory": 1, "base": None},
        init=tmp_path,
        task={"task": "x"},
        config=replace(CONFIG, lora_rank_of={"a": 1}),
    )
    whole.write(tmp_path)
    assert WorkerSpec.read(tmp_path) == whole


def run_child(folder: Path, stop_at: int = 0) -> list[dict[str, Any]]:
    """What the process tells, in this one. It is asked to stop once it has told the step."""
    told: list[dict[str, Any]] = []
    stop = threading.Event()

    def tell(line: dict[str, Any]) -> None:
        told.append(line)
        if line["kind"] == "step" and line["step"] == stop_at:
            stop.set()

    worker.run(folder, tell, stop)
    return told


@pytest.fixture
def zone(monkeypatch):
    """Moves this process to a time zone."""

    def move(name: str) -> None:
        monkeypatch.setenv("TZ", name)
        time.tzset()

    yield move
    monkeypatch.undo()
    time.tzset()


def test_a_run_over_a_template_with_the_date_goes_on_on_another_day(spec, tiny_base, tmp_path, monkeypatch, zone):
    """And in another time zone, where it was the next day already when the job was created."""
    zone("HERE0")
    dated = "Today is {{ strftime_now('%d %b %Y') }}\n" + tiny_base.vocabulary.chat_template
    base = replace(tiny_base, vocabulary=replace(tiny_base.vocabulary, chat_template=dated))
    monkeypatch.setattr(worker, "_base", lambda spec: base)
    created = datetime(2030, 5, 4, 12, tzinfo=UTC).timestamp()
    replace(spec, created_at=created, held_out=0.2).write(tmp_path)
    with template_time(created):
        assert "04 May 2030" in ModelTokenizer(base.vocabulary).decode(prepare(spec, base).learned.examples[0].ids)
    assert run_child(tmp_path, stop_at=2)[-1]["kind"] == "stopped"

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(2031, 1, 2)

    monkeypatch.setattr(chat_template, "datetime", Tomorrow)
    zone("ELSEWHERE-14")
    told = run_child(tmp_path)
    assert [line["step"] for line in told if line["kind"] == "step"] == [3, 4] and told[-1]["kind"] == "trained", told
    assert "02 Jan 2031" in ModelTokenizer(base.vocabulary).decode(prepare(spec, base).learned.examples[0].ids)


def test_a_full_disk_is_told_and_kills_no_process(spec, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_base", lambda spec: tiny_base)
    spec.write(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", "/a/secret/judged.jsonl")

    monkeypatch.setattr("server.jobs.fine_tune.keep_pairs", full)
    [end] = run_child(tmp_path)
    assert end["kind"] == "failed" and "No space left on device" in end["message"] and "secret" not in end["message"]
    monkeypatch.undo()
    monkeypatch.setattr(worker, "_base", lambda spec: tiny_base)
    monkeypatch.setattr("adapters.atomic_files.open", full, raising=False)
    end = run_child(tmp_path)[-1]
    assert end["code"] == "failed" and "checkpoint could not be written: No space left" in end["message"]
    assert "secret" not in end["message"]


def test_settings_that_do_not_fit_the_base_fail_the_job(spec, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "_base", lambda spec: tiny_base)
    replace(spec, config=replace(CONFIG, target_modules=("nothing",))).write(tmp_path)
    end = run_child(tmp_path)[-1]
    assert end["kind"] == "failed" and end["code"] == "invalid_settings" and "target_modules" in end["message"]


@pytest.mark.parametrize("auto", [False, True])
def test_a_stopped_run_goes_on_bit_for_bit(spec, tiny_base, tmp_path, auto):
    spec = replace(spec, auto_rank=auto, held_out=0.2)
    told: list[dict[str, Any]] = []
    (tmp_path / "whole").mkdir()
    whole = fine_tune(spec, tiny_base, tmp_path / "whole", told.append, lambda: False)
    steps = [line["step"] for line in told if line["kind"] == "step"]
    assert steps == list(range(1, told[0]["steps"] + 1))
    assert told[0]["held_out"] == 2 and told[0]["examples"] == 8 and told[-1]["kind"] == "trained"
    assert json.dumps(told, allow_nan=False)

    (tmp_path / "parts").mkdir()
    for limit in (1, 1):
        seen = 0

        def stop(limit: int = limit) -> bool:
            nonlocal seen
            seen += 1
            return seen > limit

        with pytest.raises(TrainingStopped):
            fine_tune(spec, tiny_base, tmp_path / "parts", lambda line: None, stop)
    parts = fine_tune(spec, tiny_base, tmp_path / "parts", lambda line: None, lambda: False)
    assert parts.digest == whole.digest
    read = read_folder(tmp_path / "parts" / "result", name="x", shapes=tiny_base.shapes())
    assert read.metadata["task"] is None and "POST /generate" not in read.metadata["card"]


def test_losses_of_result_and_rival(spec, tiny_base, tmp_path):
    told: list[dict[str, Any]] = []
    fine_tune(replace(spec, validation=spec.data, validation_name="v"), tiny_base, tmp_path, told.append, lambda: False)
    (tmp_path / "result").rename(tmp_path / "rival")
    first = told[-1]["losses"]
    again = replace(spec, validation=spec.data, validation_name="v", rival=tmp_path / "rival")
    again = replace(again, init=tmp_path / "rival", init_name="first")
    (tmp_path / "again").mkdir()
    fine_tune(again, tiny_base, tmp_path / "again", told.append, lambda: False)
    losses = told[-1]["losses"]
    assert losses["rival"] == pytest.approx(first["eval"], rel=1e-2), "it was stored in bf16"
    assert losses["eval"] < losses["rival"]
    rival = read_folder(tmp_path / "rival", name="x", shapes=tiny_base.shapes())
    assert losses["rival_digest"] == rival.digest and "rival_digest" not in first
    assert told[-1]["made"]["from"] == f"first@{rival.digest[:12]}", "its own name had no such version"


@pytest.mark.parametrize("key", [{"bias": None}, {"bias": "all"}, {"kasa_config": {}}])
def test_what_was_taken_by_the_rules_of_before_is_started_from_and_compared_with(spec, tiny_base, tmp_path, key):
    """As it is served: a job would lose its result by it at the very end."""
    once = replace(spec, config=replace(CONFIG, max_steps=1), held_out=0.2)
    (tmp_path / "first").mkdir()
    fine_tune(once, tiny_base, tmp_path / "first", lambda line: None, lambda: False)
    before = tmp_path / "first" / "result"
    config = json.loads((before / "adapter_config.json").read_text())
    (before / "adapter_config.json").write_text(json.dumps(config | key))
    with pytest.raises(InvalidAdapter):
        read_folder(before, name="x", shapes=tiny_base.shapes())
    told: list[dict[str, Any]] = []
    again = replace(once, rival=before, init=before, init_name="x")
    fine_tune(again, tiny_base, tmp_path, told.append, lambda: False)
    digest = read_folder(before, name="x", shapes=tiny_base.shapes(), stored=True).digest
    assert told[-1]["losses"]["rival"] > 0 and told[-1]["losses"]["rival_digest"] == digest
    assert told[-1]["made"]["from"] == f"x@{digest[:12]}"


def test_what_a_result_is_worth_once_it_is_pruned_and_what_it_has_learned_of_its_judges(spec, tiny_base, tmp_path):
    told: list[dict[str, Any]] = []
    judged = replace(spec, validation=spec.data, validation_name="v", prune_to=1)
    fine_tune(judged, tiny_base, tmp_path, told.append, lambda: False)
    learned, cut, after = (line for line in told if line["kind"] == "note")
    assert learned["data"] == {"learned_too": 10} and learned["message"].startswith("10 of 10 examples")
    assert cut["data"]["error"] > 0
    assert after["data"] == {"valid_loss": told[-1]["losses"]["eval"]}
    told.clear()
    (tmp_path / "held").mkdir()
    fine_tune(replace(spec, held_out=0.2), tiny_base, tmp_path / "held", told.append, lambda: False)
    assert not [line for line in told if line["kind"] == "note" and "learned_too" in line["data"]]


def test_what_is_measured_is_counted_of_all_that_measures(spec, tiny_base, tmp_path, monkeypatch):
    """Though the run looks at the first ones alone, and at others than the engine where those are no pairs."""
    monkeypatch.setattr(fine_tune_module, "MOST_EVALUATED", 4)
    monkeypatch.setattr(fine_tune_module, "MOST_JUDGED", 12)
    other = [{"input": f"other {i}", "output": "good"} for i in range(5)]
    known = [{"input": f"the {i}", "output": "good"} for i in range(10)]
    for i, (rows, said) in enumerate(
        (
            (other + known, "7 of 12 examples"),
            ([*other[:2], {"input": "", "output": "good"}, *known], "9 of 11 examples"),
            ([*known[:1], *other, {"prompt": "no", "completion": "pair"}], "1 of 4 examples"),
        )
    ):
        held = write(tmp_path / "held", rows)
        raw = {"prompt": "{input}", "format": "raw"}
        judged = replace(spec, validation=held, validation_name="v", template=raw, config=replace(CONFIG, max_steps=1))
        (folder := tmp_path / str(i)).mkdir()
        told: list[dict[str, Any]] = []
        fine_tune(judged, tiny_base, folder, told.append, lambda: False)
        [note] = [line for line in told if line["kind"] == "note" and "learned_too" in line["data"]]
        assert note["message"].startswith(said)
        measured = len(data.read(folder / "judged.jsonl")) if (folder / "judged.jsonl").exists() else 4
        assert f"of {measured} " in note["message"]


def test_a_loss_is_of_what_is_published(spec, tiny_base, tmp_path):
    """In bf16 it is another than that of what was trained."""
    told: list[dict[str, Any]] = []
    fine_tune(replace(spec, held_out=0.2), tiny_base, tmp_path, told.append, lambda: False)
    result = read_folder(tmp_path / "result", name="x", shapes=tiny_base.shapes())
    held = prepare(replace(spec, held_out=0.2), tiny_base).judged
    assert told[-1]["losses"]["eval"] == loss_of(TrainableModel(tiny_base, "float32"), result, held)


def converted(into: int, out: int, seed: int) -> LowRank:
    """As PEFT converts from PiSSA: what was trained less what that began with, which is a thousand times as much."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, into, generator=draw), torch.randn(out, 2, generator=draw)
    trained = a + 1e-3 * torch.randn(2, into, generator=draw), b + 1e-3 * torch.randn(out, 2, generator=draw)
    return LowRank(torch.cat([trained[0], a]), torch.cat([trained[1], -b], 1), 1.0)


@pytest.fixture
def cancelling(tiny_base) -> LoraWeights:
    found = {path: shape for path, shape in tiny_base.shapes().items() if path.endswith("q_proj")}
    return with_digest("x", {path: converted(into, out, i) for i, (path, (out, into)) in enumerate(found.items())})


def assert_same_update(made: LoraWeights, given: LoraWeights) -> None:
    for path, module in given.modules.items():
        assert torch.dist(made.delta(path), given.delta(path)) < 0.02 * given.delta(path).norm()
        assert made.modules[path].rank == module.rank


def test_an_adapter_whose_ranks_cancel_is_started_from_and_written_like_any_other(
    spec, tiny_base, tmp_path, cancelling
):
    """Each of its two halves rounded to bf16 would leave more than the update is."""
    save(cancelling, tmp_path / "first")
    assert_same_update(as_written(fine_tune_module._adapter(spec, tiny_base, tmp_path / "first", "x")), cancelling)
    told: list[dict[str, Any]] = []
    hardly = replace(CONFIG, max_steps=1, learning_rate=1e-9, compute_dtype="bfloat16")
    again = replace(spec, init=tmp_path / "first", init_name="x", rival=tmp_path / "first", config=hardly, held_out=0.2)
    fine_tune(again, tiny_base, tmp_path, told.append, lambda: False)
    assert_same_update(read_folder(tmp_path / "result", name="x", shapes=tiny_base.shapes()), cancelling)
    losses, held = told[-1]["losses"], prepare(again, tiny_base).judged
    exact = loss_of(TrainableModel(tiny_base, "float32"), cancelling, held)
    assert losses["rival"] == pytest.approx(exact, rel=1e-2) and losses["rival_digest"] == cancelling.digest
    assert told[-1]["made"]["from"] == f"x@{cancelling.digest[:12]}"


MADE = {"training": {"steps": 1, "best_step": 1, "evaluations": [], "from": None, "samples": 1}}


def test_ranks_that_cancel_once_it_is_trained_are_written_anew_before_they_are_rounded(
    spec, tiny_base, tmp_path, cancelling, monkeypatch
):
    """As of a run that goes on from a checkpoint of before."""
    monkeypatch.setattr(fine_tune_module, "_train", lambda *_: replace(cancelling, metadata=MADE))
    fine_tune(spec, tiny_base, tmp_path, lambda line: None, lambda: False)
    assert_same_update(read_folder(tmp_path / "result", name="x", shapes=tiny_base.shapes()), cancelling)


def test_the_error_of_pruning_is_that_of_the_files(spec, tiny_base, tmp_path, monkeypatch):
    """Rounding them to bf16 costs more than the cut of a rank that says nothing."""
    draw, faint = torch.Generator().manual_seed(0), torch.tensor([1.0, 1.0, 1.0, 1e-5])
    trained = with_digest(
        "x",
        {
            path: LowRank(torch.randn(4, into, generator=draw), torch.randn(out, 4, generator=draw) * faint, 1.0)
            for path, (out, into) in tiny_base.shapes().items()
        },
        MADE,
    )
    monkeypatch.setattr(fine_tune_module, "_train", lambda *_: trained)
    told: list[dict[str, Any]] = []
    fine_tune(replace(spec, prune_to=3), tiny_base, tmp_path, told.append, lambda: False)
    [error] = [line["data"]["error"] for line in told if "error" in line.get("data", {})]
    result = read_folder(tmp_path / "result", name="x", shapes=tiny_base.shapes())
    assert error == pytest.approx(off_by(result, trained), rel=1e-2) and error > 1e-3
    of_recipe = _measured(SimpleNamespace(prune_to=3, name="x"), None, trained, None, None)
    assert of_recipe.metadata["training"]["pruned"]["error"] == error


def off_by(made: LoraWeights, given: LoraWeights) -> float:
    """Of all modules together, in the Frobenius norm."""
    off = sum(float(torch.dist(made.delta(path), given.delta(path))) ** 2 for path in given.modules)
    return (off / sum(float(given.delta(path).norm()) ** 2 for path in given.modules)) ** 0.5


def test_where_the_first_that_judge_are_too_long_later_ones_do(spec, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(fine_tune_module, "MOST_EVALUATED", 2)
    monkeypatch.setattr(fine_tune_module, "MOST_JUDGED", 5)
    long, short = {"input": "the " * 80, "output": "good"}, {"input": "the", "output": "good"}
    config = replace(CONFIG, max_length=60)
    for rows, looked_at in (([long, long, short, short, long, short], 2), ([long, short, short, short], 1)):
        held = replace(spec, validation=write(tmp_path / "held", rows), validation_name="v", config=config)
        found = prepare(held, tiny_base)
        assert (len(found.judged.examples), len(found.records)) == (looked_at, rows[:5].count(short))
    write(tmp_path / "held", [long] * 5 + [short])
    with pytest.raises(JobError, match="all 5 examples are longer than 60"):
        prepare(held, tiny_base)


def test_which_step_the_result_is_of_is_told(spec, tiny_base, tmp_path):
    rising = replace(spec, config=replace(CONFIG, learning_rate=3.0), held_out=0.2)
    told: list[dict[str, Any]] = []
    fine_tune(rising, tiny_base, tmp_path, told.append, lambda: False)
    best = min((line for line in told if line["kind"] == "eval"), key=lambda line: line["loss"])
    assert best["step"] < best["steps"], "training at such a rate makes it worse"
    [note] = [line for line in told if line["kind"] == "note"]
    said = f"The result is that of step {best['step']}, whose validation loss is the lowest: {best['loss']:.4f}."
    assert note["message"] == said and note["data"] == {"best_step": best["step"], "valid_loss": best["loss"]}
    told.clear()
    (tmp_path / "last").mkdir()
    fine_tune(replace(spec, held_out=0.2), tiny_base, tmp_path / "last", told.append, lambda: False)
    assert not [line for line in told if line["kind"] == "note"], "the last is what one takes it for"


def test_what_is_wrong_names_file_and_line(spec, tiny_base, tmp_path):
    (tmp_path / "bad").write_text('{"input": "a", "output": "b"}\n{"input": 1, "output": "b"}\n')
    with pytest.raises(JobError, match=r"^v\.jsonl, line 2: 'input' must be a string") as wrong:
        prepare(replace(spec, validation=tmp_path / "bad", validation_name="v.jsonl"), tiny_base)
    assert (wrong.value.code, wrong.value.param) == ("invalid_validation_file", "validation_file")
    with pytest.raises(JobError, match=r"d\.jsonl") as wrong:
        prepare(replace(spec, config=replace(CONFIG, max_length=2)), tiny_base)
    assert wrong.value.code == "invalid_training_file"
    with pytest.raises(JobError) as wrong:
        prepare(replace(spec, data=tmp_path / "absent"), tiny_base)
    assert str(tmp_path) not in wrong.value.message


def test_what_is_held_out():
    def some(count: int) -> list[data.Pair]:
        return [data.Pair(i + 1, f"in {i}", f"out {i}") for i in range(count)]

    assert held_out(some(10), 0.0) == () and held_out(some(9), 0.1) == () and held_out(some(1), 0.9) == ()
    assert len(held_out(some(100), 0.1)) == 10 and len(held_out(some(100_000), 0.1)) == 200


def test_what_is_held_out_is_by_what_is_said_wherever_it_stands():
    pairs = [data.Pair(i + 1, f"in {i}", f"out {i}") for i in range(100)]

    def said(records: list[data.Pair]) -> set[str]:
        return {records[i].input for i in held_out(records, 0.1)}

    moved = [replace(pair, line=i + 1, unit="entry") for i, pair in enumerate(reversed(pairs))]
    assert said(moved) == said(pairs)
    twice = [*pairs, *moved]
    kept = set(held_out(twice, 0.1))
    assert len(kept) == 20 and not {twice[i].input for i in kept} & {
        p.input for i, p in enumerate(twice) if i not in kept
    }
    assert held_out([data.Pair(i, "the same", "of all") for i in range(100)], 0.1) == ()


def test_chats_that_say_the_same_are_held_out_together():
    """However their messages are written: files are merged from what several tools have exported."""

    def chats(i: int) -> list[dict[str, Any]]:
        asked, answer = {"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": f"a{i}"}
        earlier = {"role": "assistant", "content": "hello", "weight": 0}
        return [
            {"messages": [earlier, asked, answer]},
            {"messages": [earlier, dict(reversed(asked.items())), answer]},
            {"messages": [{**earlier, "weight": False}, {**asked, "weight": 0}, {**answer, "weight": 1}]},
            {"messages": [earlier, {**asked, "name": None}, {**answer, "tool_calls": [], "weight": None}]},
            {"messages": [{**earlier, "weight": 1}, asked, answer]},  # another: the first answer is learned too
            {"messages": [earlier, {**asked, "name": "Ann"}, answer]},
        ]

    records = data.parse(json.dumps([chat for i in range(60) for chat in chats(i)]).encode())
    kept = held_out(records, 0.1)
    alike = Counter(i // 6 for i in kept if i % 6 < 4)
    assert set(alike.values()) == {4} and len(kept) > sum(alike.values()), "the others are held out by themselves"


def test_only_pairs_are_judged_by_the_engine(spec, tiny_base, tmp_path):
    held = prepare(replace(spec, held_out=0.2), tiny_base)
    keep_pairs(held.records, tmp_path)
    kept = data.read(tmp_path / "judged.jsonl")
    assert len(kept) == held.held_out == 2 and len(held.learned.examples) == 8
    assert {pair.input for pair in kept} < {f"the {i}" for i in range(10)}
    mixed = data.parse(b'{"input": "a", "output": "b"}\n{"prompt": "a", "completion": "b"}\n')
    for records in (mixed, []):
        keep_pairs(records, tmp_path)
        assert not (tmp_path / "judged.jsonl").exists()


def write(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


MEASURED = [
    {"input": "the 1", "output": "good"},
    {"input": "", "output": "good"},
    {"input": "the " * 40, "output": "b"},
]


def test_what_no_engine_can_answer_judges_nothing(spec, tiny_base, tmp_path):
    """Neither an empty prompt nor one that is over the server's context, which trains all the same."""
    held = write(tmp_path / "held", MEASURED)
    raw = replace(spec, validation=held, validation_name="v", template={"prompt": "{input}", "format": "raw"})
    whole, short = prepare(raw, tiny_base), prepare(replace(raw, context=20), tiny_base)
    assert [r.line for r in whole.records] == [1, 3] and whole.left_out == 1
    assert [r.line for r in short.records] == [1] and short.left_out == 2
    assert short.judged.digest == whole.judged.digest, "a checkpoint goes on under another context"
    keep_pairs(short.records, tmp_path)
    assert len(data.read(tmp_path / "judged.jsonl")) == 1

    kept = prepare(replace(raw, validation=None, held_out=0.5, context=1), tiny_base)
    assert kept.records == () and kept.left_out == kept.held_out == 5

    said = [{"prompt": r["input"], "completion": r["output"]} for r in MEASURED]
    by_loss = prepare(replace(raw, validation=write(held, said), context=20), tiny_base)
    assert len(by_loss.records) == 3 and by_loss.left_out == 0, "the training process takes them"


def long_at_the_end(wanted: tuple[int, ...]) -> list[dict[str, str]]:
    """Ten examples, the last two of them long, of which a fifth held out is those that are wanted."""
    for i in range(10_000):
        lines = [{"input": f"{i} {k} " + "the " * 80 * (k >= 8), "output": "good"} for k in range(10)]
        if held_out(data.parse(json.dumps(lines).encode()), 0.2) == wanted:
            return lines
    raise AssertionError("no such file")


def test_where_all_that_would_be_held_out_is_too_long_none_is(spec, tiny_base, tmp_path):
    """As of too few examples: the others are learned, and nothing compares the result."""
    held = replace(spec, held_out=0.2, config=replace(CONFIG, max_length=60))
    write(spec.data, long_at_the_end((8, 9)))
    told: list[dict[str, Any]] = []
    fine_tune(held, tiny_base, tmp_path, told.append, lambda: False)
    valid, note = told[:2]
    assert (valid["examples"], valid["validation_examples"], valid["held_out"], valid["too_long"]) == (8, 0, 0, 2)
    assert note["message"].startswith("All 2 examples that would be held out are longer than a sequence may be")
    assert note["data"] == {"left_out": 2}
    assert told[-1]["kind"] == "trained" and "losses" not in told[-1] and not (tmp_path / "judged.jsonl").exists()

    write(spec.data, long_at_the_end((7, 8)))
    found = prepare(held, tiny_base)
    assert (found.held_out, found.left_out, len(found.records)) == (2, 1, 1), "one that is not is enough"
    assert (len(found.learned.examples), found.learned.too_long) == (7, 1)


def test_what_judges_nothing_is_told(spec, tiny_base, tmp_path):
    held = write(tmp_path / "held", MEASURED)
    told: list[dict[str, Any]] = []
    config = replace(CONFIG, max_steps=1)
    measured = replace(spec, config=config, validation=held, validation_name="v", context=40)
    fine_tune(measured, tiny_base, tmp_path, told.append, lambda: False)
    [note] = [line for line in told if line["kind"] == "note" and "left_out" in line["data"]]
    assert note["message"].startswith("1 examples that the result would be measured on are left out")
    assert note["data"] == {"left_out": 1}


def test_a_fault_names_the_entry_of_a_list(spec, tiny_base, tmp_path):
    held = tmp_path / "held"
    held.write_text('[{"input": "a", "output": "b"}, {"messages": [{"role": "assistant", "content": "x"}]}]')
    with pytest.raises(InvalidRequest, match="^entry 2: an evaluation needs"):
        pairs(data.read(held))
    base = replace(tiny_base, vocabulary=replace(tiny_base.vocabulary, chat_template=None))
    with pytest.raises(JobError, match=r"^v, entry 2: this base has no chat template"):
        prepare(replace(spec, validation=held, validation_name="v", template={"format": "raw"}), base)


def test_last_words_have_no_path(tmp_path):
    (tmp_path / "log").write_text("x" * 5000 + '\n  File "/home/somebody/lib/torch/nn.py", line 3\nMemoryError: /a/b/c')
    said = last_words(tmp_path / "log")
    assert "/" not in said and said.endswith('File "nn.py", line 3\nMemoryError: c') and len(said) <= 600
    assert last_words(tmp_path / "none") == ""


def test_better_is_better_and_an_equal_is_not():
    assert Verdict("accuracy", 9, 0.9, 0.8).better and not Verdict("accuracy", 9, 0.8, 0.8).better
    assert Verdict("loss", 9, 0.1, 0.2).better and not Verdict("loss", 9, 0.2, 0.1).better
    assert not Verdict("accuracy", 9, 0.9, None).better
    assert shares(Score("loss", 1.0, (0.0, 1e9))) == [0.0, 1.0] and shares(Score("accuracy", 1.0, (1.0,))) == [1.0]


def test_the_table_of_losses_has_a_row_for_each_step():
    def event(step: int, **data: float) -> dict[str, Any]:
        return {"type": "metrics", "data": {"step": step, **data}}

    events = [event(1, train_loss=2.0), event(2, train_loss=1.0), event(2, valid_loss=1.5), {"type": "message"}]
    rows = losses_table(events).splitlines()
    assert rows[1:] == ["1,2,,,", "2,1,,1.5,"]


def test_what_a_server_that_is_gone_does_not_hear_is_told_to_the_next(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as gone:
        words = Words(gone, tmp_path / "untold")
        for line in ({"kind": "step", "step": 6}, {"kind": "stopped"}):
            words.tell(line)
    heard = io.StringIO()
    with (tmp_path / "untold").open("a") as torn:
        torn.write('{"kind": "st')
    Words(heard, tmp_path / "untold").tell_untold()
    Words(heard, tmp_path / "untold").tell_untold()
    assert heard.getvalue() == '{"kind": "step", "step": 6, "again": true}\n'


def test_what_the_next_server_does_not_hear_either_is_kept(tmp_path):
    lines = [{"kind": "step", "step": step} for step in (1, 2, 3)]
    (tmp_path / "untold").write_text("".join(json.dumps(line) + "\n" for line in lines))
    reader, writer = os.pipe()
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as gone:
        Words(gone, tmp_path / "untold").tell_untold()
    heard = io.StringIO()
    Words(heard, tmp_path / "untold").tell_untold()
    assert [json.loads(line)["step"] for line in heard.getvalue().splitlines()] == [1, 2, 3]


def test_what_was_on_its_way_to_a_server_that_went_is_told_again(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "ON_THEIR_WAY", 3)
    reader, writer = os.pipe()
    with contextlib.suppress(BrokenPipeError), os.fdopen(writer, "w") as gone:
        words = Words(gone, tmp_path / "untold")
        for step in range(1, 6):
            words.tell({"kind": "step", "step": step})
        os.close(reader)
        for step in (6, 7):
            words.tell({"kind": "step", "step": step})
    heard = io.StringIO()
    Words(heard, tmp_path / "untold").tell_untold()
    told = [json.loads(line) for line in heard.getvalue().splitlines()]
    assert [line["step"] for line in told] == [3, 4, 5, 6, 7] and all(line["again"] for line in told)


def test_a_job_waits_for_the_process_of_a_server_that_was_killed(tmp_path):
    def held(stop: threading.Event) -> bool:
        with worker._alone(tmp_path, stop) as held:
            return held

    stop = threading.Event()
    with ThreadPoolExecutor() as pool:
        with (tmp_path / worker.LOCK).open("w") as orphan:
            fcntl.flock(orphan, fcntl.LOCK_EX)
            waiting, stopped = pool.submit(held, threading.Event()), pool.submit(held, stop)
            stop.set()
            assert stopped.result(10) is False, "it ends when it is asked to"
            assert not waiting.done()
        assert waiting.result(10) is True


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no block"), RuntimeError("CUDA error: out of memory")])
def test_a_device_without_room_is_no_fault_of_ours(spec, tiny_base, tmp_path, monkeypatch, error):
    def lacking(*_: Any) -> None:
        raise error

    monkeypatch.setattr(fine_tune_module, "prepare", lacking)
    with pytest.raises(JobError, match="lower --gpu-memory") as told:
        fine_tune(spec, tiny_base, tmp_path, lambda line: None, lambda: False)
    assert told.value.code == "no_memory"
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        fine_tune(spec, tiny_base, tmp_path, lambda line: None, lambda: False)


@pytest.mark.parametrize("wanted", [lambda: torch.empty(10**14), lambda: bytearray(10**16)])
def test_nor_is_a_machine_with_too_little_memory(spec, tiny_base, tmp_path, monkeypatch, wanted):
    monkeypatch.setattr(fine_tune_module, "prepare", lambda *_: wanted())
    with pytest.raises(JobError, match="out of memory: .*; shorter examples or a smaller rank take less") as told:
        fine_tune(spec, tiny_base, tmp_path, lambda line: None, lambda: False)
    assert told.value.code == "no_memory"


def test_of_a_long_validation_file_some_are_looked_at_and_more_judge(spec, tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr("server.jobs.fine_tune.MOST_EVALUATED", 2)
    monkeypatch.setattr("server.jobs.fine_tune.MOST_JUDGED", 3)
    found = prepare(replace(spec, validation=spec.data, validation_name="v"), tiny_base)
    assert len(found.judged.examples) == 2 and [r.line for r in found.records] == [1, 2, 3] and found.left_out == 0
    assert len(found.learned.examples) == 10, "all of the training file"


def test_an_example_that_fills_the_context_judges():
    pair = data.Pair(1, "a", "b")
    assert answerable([pair], lambda record: ([1, 2, 3], [False, False, True]), 3) == [pair]
    assert answerable([pair], lambda record: ([1, 2, 3], [False, False, True]), 2) == []


def test_an_example_whose_answer_is_too_long_to_be_compared_does_not_judge():
    """It would be refused when the result is measured, and with it the result."""
    texts = [data.Pair(1, "a", "b" * 100_001), data.Completion(2, "a", "b" * 100_001), data.Pair(3, "a", "b" * 100_000)]
    assert answerable(texts, lambda record: ([1, 2, 3], [False, False, True]), 3) == texts[1:]


def test_a_job_is_stopped_while_its_files_are_read(spec, tiny_base, tmp_path):
    looks = iter([False] * 3 + [True])
    with pytest.raises(TrainingStopped):
        fine_tune(spec, tiny_base, tmp_path, lambda line: None, lambda: next(looks))
    assert not next(looks, False) and not (tmp_path / "checkpoints").exists()


def test_what_is_held_out_is_as_many_as_the_share_asks():
    pairs = [data.Pair(i + 1, f"in {i}", f"out {i}") for i in range(2)]
    assert len(held_out(pairs, 0.5)) == 1 and len(held_out(pairs, 1.0)) == 1, "one is left to learn from"


def test_what_judged_an_earlier_run_is_gone(tmp_path):
    keep_pairs([data.Pair(1, "a", "b")], tmp_path)
    keep_pairs([], tmp_path)
    assert not (tmp_path / "judged.jsonl").exists()


def test_the_result_is_in_half_the_bytes_and_an_adapter_of_too_high_a_rank_is_refused(spec, tiny_base, tmp_path):
    once = replace(spec, config=replace(CONFIG, max_steps=1))
    fine_tune(once, tiny_base, tmp_path, lambda line: None, lambda: False)
    tensors = load_file(tmp_path / "result" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    (tmp_path / "result").rename(tmp_path / "first")
    again = replace(once, init=tmp_path / "first", init_name="first")
    with pytest.raises(JobError, match="prune_to must be below the rank of the adapter that is started from, 2") as no:
        fine_tune(replace(again, prune_to=2), tiny_base, tmp_path, lambda line: None, lambda: False)
    assert (no.value.code, no.value.param) == ("invalid_settings", "lora.prune_to")
    with pytest.raises(InvalidAdapter, match="over the limit of 1"):
        fine_tune(replace(again, max_rank=1), tiny_base, tmp_path, lambda line: None, lambda: False)


def test_the_seconds_of_two_runs_are_those_of_both():
    told: list[dict[str, Any]] = []
    tell = _Told(told.append, 9)
    for steps in (3, 2, 4):
        tell(Event("done", steps, steps, tokens=10 * steps, seconds=float(steps)))
    tell(Event("step", 1, 4, tokens=7, seconds=0.5))
    [line] = told
    assert (line["step"], line["steps"], line["tokens"], line["seconds"]) == (10, 9, 97, 9.5)


def test_a_signal_ends_the_wait_for_another_process(tmp_path, monkeypatch):
    """Whose handler runs on the thread that waits: it wants nothing which that holds."""
    stop = threading.Event()
    monkeypatch.setattr(worker, "time", SimpleNamespace(sleep=lambda seconds: signal.raise_signal(signal.SIGTERM)))
    monkeypatch.setattr(stop, "wait", lambda timeout: pytest.fail("it holds the lock that `set` wants"))
    before = signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    try:
        with (tmp_path / worker.LOCK).open("w") as other:
            fcntl.flock(other, fcntl.LOCK_EX)
            with worker._alone(tmp_path, stop) as held:
                assert not held
    finally:
        signal.signal(signal.SIGTERM, before)
