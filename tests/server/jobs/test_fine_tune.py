"""One training run from its spec: results, losses, notes, resuming, and too little memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapters import data
from adapters.errors import InvalidAdapter, TrainingStopped
from adapters.peft_format import read_folder, save
from adapters.training import Event
from adapters.weights import LoraWeights, LowRank, with_digest
from server.jobs import fine_tune as fine_tune_module
from server.jobs import training_data
from server.jobs.errors import JobError
from server.jobs.fine_tune import StepEvents, fine_tune
from server.jobs.train_recipe import _evaluated, as_written
from server.jobs.trainable_model import TrainableModel, loss_of
from server.jobs.training_data import prepare
from server.jobs.worker_messages import WorkerSpec
from server.model.loader import Base
from tests.server.jobs.conftest import CONFIG
from tests.server.jobs.test_training_data import RAW, write

Train = Callable[..., list[dict[str, Any]]]
ONE_STEP = replace(CONFIG, max_steps=1)


@pytest.fixture
def train(tiny_base: Base, tmp_path: Path) -> Train:
    """`train(spec, folder)`: the messages of a run."""

    def run(spec: WorkerSpec, folder: str = "job") -> list[dict[str, Any]]:
        (tmp_path / folder).mkdir(exist_ok=True)
        messages: list[dict[str, Any]] = []
        fine_tune(spec, tiny_base, tmp_path / folder, messages.append, lambda: False)
        return messages

    return run


def notes(messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    return [m for m in messages if m["kind"] == "note" and key in m["data"]]


@pytest.mark.parametrize("auto", [False, True])
def test_a_stopped_run_resumes_bit_for_bit(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, train: Train, auto: bool
) -> None:
    spec = replace(spec, auto_rank=auto, held_out=0.2)
    messages = train(spec, "whole")
    steps = [m["step"] for m in messages if m["kind"] == "step"]
    assert steps == list(range(1, messages[0]["steps"] + 1))
    assert messages[0]["held_out"] == 2 and messages[0]["examples"] == 8 and messages[-1]["kind"] == "trained"
    assert json.dumps(messages, allow_nan=False)
    (tmp_path / "parts").mkdir()
    for last in (1, 3):
        seen: list[int] = []
        with pytest.raises(TrainingStopped):
            fine_tune(
                spec,
                tiny_base,
                tmp_path / "parts",
                lambda m, seen=seen: seen.append(m["step"]) if m["kind"] == "step" else None,
                lambda seen=seen, last=last: last in seen,
            )
        assert seen[-1] == last
    parts = fine_tune(spec, tiny_base, tmp_path / "parts", lambda m: None, lambda: False)
    assert parts.digest == messages[-1]["digest"]
    read = read_folder(tmp_path / "parts" / "result", name="x", shapes=tiny_base.shapes())
    assert read.metadata["task"] is None and "POST /generate" not in read.metadata["card"]


def test_a_job_stops_while_its_files_are_read(spec: WorkerSpec, tiny_base: Base, tmp_path: Path) -> None:
    looks = iter([False] * 3 + [True])
    with pytest.raises(TrainingStopped):
        fine_tune(spec, tiny_base, tmp_path, lambda m: None, lambda: next(looks))
    assert not next(looks, False) and not (tmp_path / "checkpoints").exists()


def test_losses_of_the_result_and_of_the_version_that_it_would_replace(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, train: Train
) -> None:
    spec = replace(spec, validation=spec.data, validation_name="v")
    first = train(spec, "first")[-1]["losses"]
    before = tmp_path / "first" / "result"
    end = train(replace(spec, replaced=before, init=before, init_name="first"), "again")[-1]
    assert end["losses"]["replaced"] == pytest.approx(first["eval"], rel=1e-2), "it was stored in bf16"
    assert end["losses"]["eval"] < end["losses"]["replaced"]
    replaced = read_folder(before, name="x", shapes=tiny_base.shapes())
    assert end["losses"]["replaced_digest"] == replaced.digest and "replaced_digest" not in first
    assert end["training"]["from"] == f"first@{replaced.digest[:12]}"


@pytest.mark.parametrize("key", [{"bias": None}, {"bias": "all"}, {"kasa_config": {}}])
def test_a_stored_version_that_today_would_be_refused_can_be_started_from(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, train: Train, key: dict[str, Any]
) -> None:
    once = replace(spec, config=ONE_STEP, held_out=0.2)
    train(once, "first")
    before = tmp_path / "first" / "result"
    config = json.loads((before / "adapter_config.json").read_text())
    (before / "adapter_config.json").write_text(json.dumps(config | key))
    with pytest.raises(InvalidAdapter):
        read_folder(before, name="x", shapes=tiny_base.shapes())
    end = train(replace(once, replaced=before, init=before, init_name="x"), "again")[-1]
    digest = read_folder(before, name="x", shapes=tiny_base.shapes(), stored=True).digest
    assert end["losses"]["replaced"] > 0 and end["losses"]["replaced_digest"] == digest
    assert end["training"]["from"] == f"x@{digest[:12]}"


def test_notes_about_pruning_and_about_validation_examples_that_are_learned(spec: WorkerSpec, train: Train) -> None:
    messages = train(replace(spec, validation=spec.data, validation_name="v", prune_to=1))
    learned, cut, after = (m for m in messages if m["kind"] == "note")
    assert learned["data"] == {"learned_too": 10} and learned["message"].startswith("10 of 10 evaluation examples")
    assert cut["data"]["error"] > 0 and after["data"] == {"valid_loss": messages[-1]["losses"]["eval"]}
    assert not notes(train(replace(spec, held_out=0.2), "held"), "learned_too")


def test_evaluation_examples_that_are_learned_are_counted_among_all(
    spec: WorkerSpec, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_data, "MAX_VALIDATION", 4)
    monkeypatch.setattr(training_data, "MAX_EVALUATED", 12)
    other = [{"input": f"other {i}", "output": "good"} for i in range(5)]
    known = [{"input": f"the {i}", "output": "good"} for i in range(10)]
    for i, (records, text) in enumerate(
        (
            (other + known, "7 of 12 "),
            ([*other[:2], {"input": "", "output": "good"}, *known], "9 of 11 "),
            ([*known[:1], *other, {"prompt": "no", "completion": "pair"}], "1 of 4 "),
        )
    ):
        held = write(tmp_path / "held", records)
        messages = train(
            replace(spec, validation=held, validation_name="v", template=RAW, config=ONE_STEP), folder := str(i)
        )
        [note] = notes(messages, "learned_too")
        assert note["message"].startswith(text)
        pairs = tmp_path / folder / "judged.jsonl"
        assert f"of {len(data.read(pairs)) if pairs.exists() else 4} " in note["message"]


def test_skipped_evaluation_examples_are_noted(spec: WorkerSpec, tmp_path: Path, train: Train) -> None:
    held = write(tmp_path / "held", [{"input": "the 1", "output": "good"}, {"input": "the " * 40, "output": "b"}])
    spec = replace(spec, config=ONE_STEP, validation=held, validation_name="v", context_length=40)
    [note] = notes(train(spec), "left_out")
    assert note["message"].startswith("1 validation examples are skipped") and note["data"] == {"left_out": 1}


def test_the_result_is_in_bf16_and_its_loss_is_that_of_the_files(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, train: Train
) -> None:
    end = train(replace(spec, held_out=0.2))[-1]
    tensors = load_file(tmp_path / "job" / "result" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    result = read_folder(tmp_path / "job" / "result", name="x", shapes=tiny_base.shapes())
    held = prepare(replace(spec, held_out=0.2), tiny_base).validation
    assert held is not None and end["losses"]["eval"] == loss_of(TrainableModel(tiny_base, "float32"), result, held)


def cancelling_module(into: int, out: int, seed: int) -> LowRank:
    """An update that is a thousandth of its two halves, as PEFT converts PiSSA adapters."""
    draw = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, into, generator=draw), torch.randn(out, 2, generator=draw)
    trained = a + 1e-3 * torch.randn(2, into, generator=draw), b + 1e-3 * torch.randn(out, 2, generator=draw)
    return LowRank(torch.cat([trained[0], a]), torch.cat([trained[1], -b], 1), 1.0)


@pytest.fixture
def cancelling(tiny_base: Base) -> LoraWeights:
    found = {path: shape for path, shape in tiny_base.shapes().items() if path.endswith("q_proj")}
    modules = {path: cancelling_module(into, out, i) for i, (path, (out, into)) in enumerate(found.items())}
    return with_digest("x", modules)


def assert_same_update(result: LoraWeights, expected: LoraWeights) -> None:
    for path, module in expected.modules.items():
        assert torch.dist(result.delta(path), expected.delta(path)) < 0.02 * expected.delta(path).norm()
        assert result.modules[path].rank == module.rank


def test_an_adapter_whose_halves_cancel_is_not_lost_by_rounding(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, cancelling: LoraWeights, train: Train
) -> None:
    save(cancelling, tmp_path / "first")
    assert_same_update(as_written(fine_tune_module._read_adapter(spec, tiny_base, tmp_path / "first", "x")), cancelling)
    config = replace(CONFIG, max_steps=1, learning_rate=1e-9, compute_dtype="bfloat16")
    first = tmp_path / "first"
    again = replace(spec, init=first, init_name="x", replaced=first, config=config, held_out=0.2)
    losses, held = train(again)[-1]["losses"], prepare(again, tiny_base).validation
    assert_same_update(read_folder(tmp_path / "job" / "result", name="x", shapes=tiny_base.shapes()), cancelling)
    assert held is not None
    exact = loss_of(TrainableModel(tiny_base, "float32"), cancelling, held)
    assert losses["replaced"] == pytest.approx(exact, rel=1e-2) and losses["replaced_digest"] == cancelling.digest


TRAINING = {"training": {"steps": 1, "best_step": 1, "evaluations": [], "from": None, "samples": 1}}


def test_a_trained_adapter_whose_halves_cancel_is_not_lost_by_rounding(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, cancelling: LoraWeights, train: Train, monkeypatch: Any
) -> None:
    monkeypatch.setattr(fine_tune_module, "_train", lambda *_: replace(cancelling, metadata=TRAINING))
    train(spec)
    assert_same_update(read_folder(tmp_path / "job" / "result", name="x", shapes=tiny_base.shapes()), cancelling)


def test_the_error_of_pruning_is_that_of_the_files(
    spec: WorkerSpec, tiny_base: Base, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding to bf16 costs more than cutting a rank of almost no weight."""
    draw, faint = torch.Generator().manual_seed(0), torch.tensor([1.0, 1.0, 1.0, 1e-5])
    modules = {
        path: LowRank(torch.randn(4, into, generator=draw), torch.randn(out, 4, generator=draw) * faint, 1.0)
        for path, (out, into) in tiny_base.shapes().items()
    }
    trained = with_digest("x", modules, TRAINING)
    monkeypatch.setattr(fine_tune_module, "_train", lambda *_: trained)
    [error] = [m["data"]["error"] for m in notes(train(replace(spec, prune_to=3)), "error")]
    result = read_folder(tmp_path / "job" / "result", name="x", shapes=tiny_base.shapes())
    off = sum(float(torch.dist(result.delta(path), trained.delta(path))) ** 2 for path in modules)
    exact = (off / sum(float(trained.delta(path).norm()) ** 2 for path in modules)) ** 0.5
    assert error == pytest.approx(exact, rel=1e-2) and error > 1e-3
    recipe: Any = SimpleNamespace(prune_to=3, name="x")
    nothing: Any = None
    of_recipe = _evaluated(recipe, nothing, trained, nothing, None)
    assert of_recipe.metadata["training"]["pruned"]["error"] == error


def test_the_step_of_the_result_is_noted_if_it_is_not_the_last(spec: WorkerSpec, train: Train) -> None:
    messages = train(replace(spec, config=replace(CONFIG, learning_rate=3.0), held_out=0.2))
    best = min((m for m in messages if m["kind"] == "eval"), key=lambda m: m["loss"])
    assert best["step"] < best["steps"], "training at this rate makes it worse"
    [note] = [m for m in messages if m["kind"] == "note"]
    assert f"from step {best['step']}, which has the lowest validation loss: {best['loss']:.4f}" in note["message"]
    assert note["data"] == {"best_step": best["step"], "valid_loss": best["loss"]}
    assert not [m for m in train(replace(spec, held_out=0.2), "last") if m["kind"] == "note"]


def test_limits_of_an_adapter_to_start_from(spec: WorkerSpec, tmp_path: Path, train: Train) -> None:
    once = replace(spec, config=ONE_STEP)
    train(once, "first")
    again = replace(once, init=tmp_path / "first" / "result", init_name="first")
    with pytest.raises(JobError, match="prune_to must be below the rank of the adapter to start from, 2") as error:
        train(replace(again, prune_to=2))
    assert (error.value.code, error.value.param) == ("invalid_settings", "lora.prune_to")
    with pytest.raises(InvalidAdapter, match="over the limit of 1"):
        train(replace(again, max_rank=1))


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        (torch.OutOfMemoryError("no block"), "lower --gpu-memory"),
        (RuntimeError("CUDA error: out of memory"), "lower --gpu-memory"),
        (lambda: torch.empty(10**14), "out of memory: .*; use shorter examples or a smaller rank"),
        (lambda: bytearray(10**16), "out of memory: .*; use shorter examples or a smaller rank"),
        (RuntimeError("something else"), None),
    ],
)
def test_too_little_memory_is_a_job_error(
    spec: WorkerSpec, train: Train, monkeypatch: pytest.MonkeyPatch, fail: Any, message: str | None
) -> None:
    def lacking(*_: Any) -> None:
        if isinstance(fail, Exception):
            raise fail
        fail()

    monkeypatch.setattr(fine_tune_module, "prepare", lacking)
    with pytest.raises(RuntimeError if message is None else JobError, match=message) as error:
        train(spec)
    assert message is None or error.value.code == "no_memory"  # type: ignore[attr-defined]


def test_the_runs_of_auto_lora_are_counted_as_one() -> None:
    sent: list[dict[str, Any]] = []
    events = StepEvents(sent.append, 9)
    for steps in (3, 2, 4):
        events(Event("done", steps, steps, tokens=10 * steps, seconds=float(steps)))
    events(Event("step", 1, 4, tokens=7, seconds=0.5))
    [message] = sent
    assert [message[k] for k in ("step", "steps", "tokens", "seconds")] == [10, 9, 97, 9.5]
