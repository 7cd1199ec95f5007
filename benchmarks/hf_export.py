"""Exports a base as a Hugging Face folder with dequantized weights, for peers."""

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
    """Write config.json, tokenizer and model.safetensors (bfloat16) to a folder in `parent`, named by the base's id.

    An existing folder is reused.

    Raises:
        BadSetting: the base is not a Llama.
        BadModel: the base cannot be described by a config.json.
    """
    if base.config.architecture != "LlamaForCausalLM":
        raise BadSetting(
            f"Only a LlamaForCausalLM can be exported for the peers, but {base.name} is a {base.config.architecture}. "
            "Choose another --model.",
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
    config["rope_theta"] = rope.pop("rope_theta")  # older versions of Transformers read this
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
