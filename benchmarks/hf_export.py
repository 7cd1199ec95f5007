"""The base as an ordinary Hugging Face folder of dequantized weights, for peers that cannot read its packed form."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from server.errors import BadSetting
from server.model.config import to_hf
from server.model.loader import Base


def export_base(base: Base, parent: Path) -> Path:
    """The folder below `parent` with this base's config.json, tokenizer and model.safetensors (bfloat16).

    It is named by the base's id, so that another base, or another quantization, has one of its own; it is written once,
    and appears when it is whole. Raises BadSetting for what is no Llama: the peers' table is about the embedded base;
    and BadModel for a Llama that no config.json can describe.
    """
    if base.config.architecture != "LlamaForCausalLM":
        raise BadSetting(
            f"only a Llama can be exported for the peers, and {base.name} is {base.config.architecture}: "
            "give another --model",
            "model",
        )
    folder = parent / base.id[:32]
    if folder.exists():
        return folder
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir(parents=True)
    try:
        _write(base, partial)
        os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _write(base: Base, folder: Path) -> None:
    config = to_hf(base.config)
    rope = dict(config["rope_parameters"])
    config["rope_theta"] = rope.pop("rope_theta")  # as peers read it that know Transformers' older words alone
    if rope["rope_type"] != "default":
        config["rope_scaling"] = rope
    config |= {
        "bos_token_id": base.vocabulary.bos_id,
        "eos_token_id": sorted(base.vocabulary.eos_ids),
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": base.vocabulary.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1))
    base.vocabulary.tokenizer.save(str(folder / "tokenizer.json"))
    state = {
        f"{path}.weight": base.backend.dequantize(weight).to(torch.bfloat16) for path, weight in base.weights.items()
    }
    state |= {name: tensor.to(torch.bfloat16) for name, tensor in base.tensors.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
