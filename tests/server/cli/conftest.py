"""What commands without a server are tried on: a library with a tiny adapter that brings a task."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters.peft_format import save
from adapters.weights import LoraWeights


@pytest.fixture
def mood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_adapter: Callable[..., LoraWeights]) -> dict[str, Any]:
    """The task `mood` as its task.json has it, which `library/mood` in the working folder, `tmp_path`, brings."""
    monkeypatch.chdir(tmp_path)
    task = {"task": "mood", "prompt": "Mood: {input}", "labels": ["good", "bad"], "defaults": {"max_tokens": 3}}
    save(tiny_adapter(1), tmp_path / "library" / "mood", task=task)
    return task
