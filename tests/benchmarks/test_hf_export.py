"""The base as peers read it: one folder for each base, whole or not there."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import hf_export
from benchmarks.hf_export import export_base
from server.errors import BadSetting
from server.model.config import RopeScaling, from_hf

if TYPE_CHECKING:
    from server.model.loader import Base


def test_another_base_has_another_folder(tiny_base: Base, tmp_path: Path) -> None:
    other = replace(tiny_base, id="f" * 64, config=replace(tiny_base.config, rms_norm_eps=0.5))
    folders = [export_base(base, tmp_path / "exported") for base in (tiny_base, other)]
    told = [json.loads((folder / "config.json").read_text())["rms_norm_eps"] for folder in folders]
    assert told == [tiny_base.config.rms_norm_eps, 0.5]
    weights = load_file(folders[0] / "model.safetensors")
    name, tensor = next(iter(tiny_base.tensors.items()))
    assert torch.equal(weights[name], tensor.bfloat16())


def test_peers_are_told_all_of_the_model(tiny_base: Base, tmp_path: Path) -> None:
    """By Transformers' words and by its older ones."""
    scaling = RopeScaling("llama3", 8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)
    model = replace(tiny_base.config, rope_scaling=scaling, rope_theta=5e5)
    folder = export_base(replace(tiny_base, config=model), tmp_path)
    told = json.loads((folder / "config.json").read_text())
    assert from_hf(told) == model
    older = {name: value for name, value in told.items() if name != "rope_parameters"}
    assert from_hf(older) == model and (told["rope_theta"], told["rope_scaling"]["factor"]) == (5e5, 8.0)
    assert told["eos_token_id"] == sorted(tiny_base.vocabulary.eos_ids)


def test_the_same_base_is_written_once(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = export_base(tiny_base, tmp_path)
    monkeypatch.setattr(hf_export, "save_file", lambda *_, **__: pytest.fail("it was written again"))
    assert export_base(tiny_base, tmp_path) == folder


def test_one_that_breaks_off_leaves_nothing(tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as broken:
        broken.setattr(hf_export, "save_file", full)
        with pytest.raises(OSError, match="no space"):
            export_base(tiny_base, tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert (export_base(tiny_base, tmp_path) / "model.safetensors").is_file()


def test_what_is_no_llama_is_refused(tiny_base: Base, tmp_path: Path) -> None:
    qwen = replace(tiny_base, config=replace(tiny_base.config, architecture="Qwen2ForCausalLM"))
    with pytest.raises(BadSetting, match="only a Llama can be exported.*Qwen2ForCausalLM.*--model"):
        export_base(qwen, tmp_path)
