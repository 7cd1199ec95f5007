"""What is published of a result, by rule, where somebody else publishes too or the server ends at a bad moment; and
that a job keeps the template that it was asked with.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from adapters.peft_format import save
from adapters.registry import Registry
from adapters.store import Store
from adapters.weights import LowRank, Version, sealed
from server.jobs.files import Files
from server.jobs.publishing import Publishing, Verdict
from server.jobs.records import TRAINING, Records
from server.jobs.requests import Asked, Ground, Lora, checked, spec_of
from server.jobs.runner import Active
from server.jobs.spec import RESULT, BaseSource
from server.tasks.definitions import Fixed, Task, parse

SHAPES = {f"model.layers.0.self_attn.{part}": (6, 4) for part in ("q_proj", "v_proj")}
SPEC: Any = SimpleNamespace(max_rank=64)


def write(folder: Path, seed: int) -> Path:
    """A tiny adapter; equal seeds are equal content."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        path: LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator), 1.0)
        for path, (out, into) in SHAPES.items()
    }
    save(sealed("x", modules), folder, shapes=SHAPES)
    return folder


class Judged(Publishing):
    """Publishes by a verdict that a test gives. `meanwhile` is called while the result is judged."""

    verdict: Verdict | None = None

    def meanwhile(self) -> None:
        pass

    def _judge(self, active: Active, spec: Any, rival: Version | None) -> Verdict | None:
        self.meanwhile()
        return self.verdict


class Scene:
    """A registry, and a training job `m` whose result is there."""

    def __init__(self, root: Path, rule: str) -> None:
        self.root = root
        self.registry = Registry(Store(root / "store"), shapes=SHAPES, ram_bytes=1 << 20)
        self.records = Records(root / "jobs")
        nothing: Any = SimpleNamespace(find=lambda name: None)
        self.publishing = Judged(
            self.registry, nothing, nothing, Files(root / "files"), nothing, shapes=SHAPES, base_id="b"
        )
        job = self.records.prepare(TRAINING, "m", {"lora": {"publish": rule, "task": None}}, "ftjob", {})
        self.records.enter(job)
        write(self.records.folder(job.id) / RESULT, 1)
        self.job = job

    def publish(self) -> dict[str, Any]:
        """Publish in a server that has just started: all that it knows is on the disk. Answers the result."""
        records = Records(self.root / "jobs")
        job = records.jobs[self.job.id]
        self.publishing.publish(Active(job, records), SPEC)
        return job.result


@pytest.fixture
def scene(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    scene = Scene(tmp_path, request.param)
    yield scene
    scene.registry.close()


@pytest.mark.parametrize("scene", ["always", "if_better"], indirect=True)
def test_a_result_is_published_once_however_often_the_server_ends(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Ended(Exception):
        """Stands in for the end of the process."""

    def end(*_: Any, **__: Any) -> None:
        raise Ended

    with monkeypatch.context() as patch:
        patch.setattr(scene.publishing, "_leave_files", end)  # served, and nothing of it written down
        with pytest.raises(Ended):
            scene.publish()
    served = scene.registry.current("m")
    first = scene.publish()
    assert first["model"] == "m" and first["version"] == served.label and len(first["files"]) == 1
    assert scene.publish() == first and scene.registry.current("m") == served
    assert not (scene.records.folder(scene.job.id) / RESULT).exists()


@pytest.mark.parametrize("scene", ["if_better"], indirect=True)
def test_what_came_while_a_result_was_judged_is_compared_with_too(scene: Scene) -> None:
    tries = []

    def meanwhile() -> None:
        if not tries:
            scene.registry.publish_now("m", write(scene.root / "other", 2))
            scene.publishing.verdict = Verdict("accuracy", 10, 0.1, None)
        else:
            scene.publishing.verdict = Verdict("accuracy", 10, 0.1, 0.9)
        tries.append(scene.registry.current("m"))

    scene.publishing.meanwhile = meanwhile  # type: ignore[method-assign]
    result = scene.publish()
    assert len(tries) == 2 and result["model"] is None and result["evaluation"]["replaced"] == 0.9
    assert scene.registry.current("m") == tries[0], "the better one stays"


def test_a_job_keeps_the_template_that_it_was_asked_with(tmp_path: Path) -> None:
    def task(prompt: str) -> Task:
        return parse("say", {"prompt": prompt, "format": "raw"}, default_route=Fixed(), source="api")

    files = Files(tmp_path / "files")
    file = files.add(lambda path: path.write_text('{"input": "a", "output": "b"}'), "x.jsonl", "fine-tune")
    tasks = {"say": task("Translate: {input}")}
    ground = Ground(
        origin=BaseSource(tmp_path, "tiny", "reference", "int4", None, False, 8, tmp_path, "0" * 64),
        base_name="tiny",
        max_rank=64,
        threads=1,
        files=files,
        registry=SimpleNamespace(names=lambda: [], resolve=lambda choice: None),  # type: ignore[arg-type]
        store=None,  # type: ignore[arg-type]
        tasks=SimpleNamespace(find=tasks.get),  # type: ignore[arg-type]
    )
    request = checked(Asked(file.id, suffix="say"), ground)
    plain = checked(Asked(file.id, suffix="m", lora=Lora()), ground)
    asked = spec_of("say", request, ground, tmp_path)
    assert asked.template["prompt"] == "Translate: {input}" and asked.task == {"task": "say", **asked.template}
    for changed in ({"say": task("Other: {input}")}, {}):
        tasks.clear()
        tasks.update(changed)
        assert spec_of("say", request, ground, tmp_path) == asked
    bare = spec_of("m", plain, ground, tmp_path)
    assert bare.template == {} and bare.task is None
