"""`quantize_folder`, and loading what it writes."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.errors import BadModel, BadSetting, Conflict
from server.kernels.cpu.packing import pack
from server.model.quantization import bits
from server.model.quantized_folder import quantize_folder
from server.model.vocabulary import Vocabulary
from tests.server.model.tiny_models import TYPES, load, same, saved, to_gguf

STEM = "model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("kind", ["Qwen2", "SmolLM3"])
@pytest.mark.parametrize("settings", [{"double_quant": True}, {"quantization": "nf4"}, {"quantization": "none"}])
def test_a_quantized_folder_loads_without_quantizing(
    tmp_path: Path, kind: str, settings: dict[str, Any], tiny_vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = saved(tmp_path / "m", kind, tiny_vocabulary), tmp_path / "q"
    monkeypatch.setattr("server.model.quantized_folder._SHARD", 60_000)
    summary = quantize_folder(source, target, **settings)
    direct = load(source, **settings)
    assert len(list(target.glob("*.safetensors"))) > 1
    assert {path.stat().st_mode & 0o777 for path in target.iterdir()} == {target.stat().st_mode & 0o666}
    assert summary["bytes"] == direct.nbytes
    assert summary["bits"] == bits(direct.weights[path] for path in direct.shapes())
    monkeypatch.setattr("server.model.checkpoint.quantize", None)
    again = load(target, **settings)
    assert same(direct, again) and again.notes == () and again.config == direct.config
    assert again.quantization == direct.quantization
    other = load(target, quantization="int4", group_size=128)
    assert same(direct, other) and "already quantized" in other.notes[0]
    with pytest.raises(Conflict):
        quantize_folder(source, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_without_quantization_the_dtype_stays(tmp_path: Path, tiny_vocabulary: Vocabulary, dtype: torch.dtype) -> None:
    folder = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    [path] = folder.glob("*.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    quantize_folder(folder, tmp_path / "q", quantization="none")
    for base in (load(folder, quantization="none"), load(tmp_path / "q")):
        assert {weight.tensors["codes"].dtype for weight in base.weights.values()} == {dtype}
        assert {pack(weight).tensors["codes"].dtype for weight in base.weights.values()} == {torch.bfloat16}


def test_failures_leave_nothing(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    source = saved(tmp_path / "m", "Llama", tiny_vocabulary)
    config, target = source / "config.json", tmp_path / "q"
    with pytest.raises(BadModel, match="groups of"):
        quantize_folder(source, target, group_size=256)
    with pytest.raises(BadModel, match="m changed while it was read"):
        quantize_folder(source, target, progress=lambda *_: config.write_bytes(config.read_bytes()))
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(BadSetting, match=r"/q cannot be written: .*File too large") as error:
            quantize_folder(source, target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert error.value.param == "target" and [path.name for path in tmp_path.iterdir()] == ["m"]
    (tmp_path / ".q.partial").mkdir()  # of a run that was killed
    quantize_folder(source, target)
    assert {path.name for path in tmp_path.iterdir()} == {"m", "q"}


def test_a_gguf_that_no_config_json_describes(tmp_path: Path, tiny_vocabulary: Vocabulary) -> None:
    """Qwen2's tensors, whose o_proj has no bias, in a file that says llama."""
    path = to_gguf(tmp_path / "m.gguf", "Qwen2", tiny_vocabulary, TYPES.F32, TYPES.F32)
    path.write_bytes(path.read_bytes().replace(b"qwen2", b"llama"))
    assert load(path).config.architecture == "LlamaForCausalLM"
    with pytest.raises(BadModel, match="output_bias"):
        quantize_folder(path, tmp_path / "q")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9"),
        ({"weights": None}, "damaged"),
        ({"files": []}, "lacks"),
        ({"files": ["../q/x.safetensors"]}, r"names the file '\.\./q/"),
        ({"group": 48}, "groups of 48"),
        ({"group": 128}, "do not divide 192"),
    ],
)
def test_damaged_manifests_are_refused(
    tmp_path: Path, tiny_vocabulary: Vocabulary, change: dict[str, Any], message: str
) -> None:
    target = tmp_path / "q"
    quantize_folder(saved(tmp_path / "m", "Llama", tiny_vocabulary), target)
    manifest = json.loads((target / "loramux.json").read_text())
    if "group" in change:
        manifest["weights"][STEM] |= change
        change = {}
    (target / "loramux.json").write_text(json.dumps(manifest | change))
    with pytest.raises(BadModel, match=message):
        load(target)


@pytest.mark.parametrize("settings", [{"double_quant": True}, {"quantization": "none"}])
def test_wrong_parts_never_reach_a_kernel(
    tmp_path: Path, tiny_vocabulary: Vocabulary, settings: dict[str, Any]
) -> None:
    """Kernels read them by raw pointers."""
    target = tmp_path / "q"
    quantize_folder(saved(tmp_path / "m", "Llama", tiny_vocabulary), target, **settings)
    [path] = target.glob("*.safetensors")
    whole = load_file(path)
    for part in ("codes", "scale_codes", "zero_step") if "double_quant" in settings else ("codes",):
        tensor = whole[f"{STEM}.{part}"]
        for wrong in (tensor[:-1].clone(), tensor[:, :-1].clone(), tensor.to(torch.int16)):
            save_file(whole | {f"{STEM}.{part}": wrong}, path)
            with pytest.raises(BadModel, match="down_proj of the quantized folder is not a matrix of 128 by 192"):
                load(target)
    save_file(whole | {"model.norm.weight": torch.full((128,), float("inf"))}, path)
    with pytest.raises(BadModel, match="holds values that are not finite"):
        load(target)
    save_file({name: tensor for name, tensor in whole.items() if name != f"{STEM}.codes"}, path)
    with pytest.raises(BadModel, match=rf"lacks {STEM}\.codes"):
        load(target)
    save_file(whole | {f"{STEM}.more": torch.ones(1)}, path)
    with pytest.raises(BadModel, match=rf"does not: {STEM}\.more"):
        load(target)
