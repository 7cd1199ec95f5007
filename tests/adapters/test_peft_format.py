"""Reading and writing PEFT folders; PEFT itself is the reference."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft import LoraConfig as PeftConfig
from peft.tuners.lora.config import MontecloraConfig, VeloraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from adapters import peft_config, peft_format
from adapters.atomic_files import replace_file
from adapters.errors import AdapterError, BaseMismatch, InvalidAdapter, StoreFailed, UnsupportedAdapter
from adapters.weights import LoraWeights, LowRank, with_digest

Shapes = dict[str, tuple[int, int]]
MakePeft = Callable[..., tuple[Any, Path]]

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft.*"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:peft.*"),
]
IDS = torch.tensor([[1, 5, 9, 2, 30, 41]])


def logits_with(base: torch.nn.Module, weights: LoraWeights, scale: float = 1.0) -> torch.Tensor:
    """Return the logits of the base with the adapter's deltas added to its weights, without PEFT."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for module in weights.modules:
            model.get_submodule(module).weight += scale * weights.delta(module)
        return model(IDS).logits


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    config.update(changes)
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "DROP"}))


def edit_tensors(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file(change(tensors), file)


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "rslora": {"r": 5, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "target_modules": ["q_proj", "k_proj", "up_proj"],
        # PEFT sorts the keys when it writes them, so these are in the order that the file will have
        "rank_pattern": {r"layers\.1\.self_attn\.[qk]_proj": 7, "q_proj": 2, "up_proj": 1},
        "alpha_pattern": {".*k_proj": 12, "model.layers.2.mlp.up_proj": 3, "proj": 99},
    },
    "a key that is no suffix": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"^model.layers.1.self_attn.q_proj": 6, "_proj": 2, "layers.0": 3, "q_proj|k_proj": 5},
    },
    "regex": {"r": 4, "target_modules": r".*\.(q_proj|gate_proj)"},
    "regex with lookahead": {"r": 4, "target_modules": r"(?!.*layers\.1)(?:model)(\.\w+)*\.(self_attn\.)?[qkv]_proj"},
    "excluded names": {"r": 4, "target_modules": "all-linear", "exclude_modules": ["q_proj", "layers.1.mlp.up_proj"]},
    "excluded pattern": {"r": 4, "target_modules": ["q_proj", "o_proj"], "exclude_modules": r".*layers\.[02]\..*"},
    "one layer": {"r": 4, "target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "layers": {
        "r": 4,
        "target_modules": ["q_proj", "model.layers.1.self_attn.k_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
    },
    "layers by patterns": {
        "r": 4,
        "target_modules": ["q_proj"],
        "layers_to_transform": [2],
        "layers_pattern": ["blocks", "lay.*"],
    },
    "full names": {"r": 2, "target_modules": ["model.layers.0.self_attn.q_proj", "layers.2.mlp.down_proj"]},
    "gaussian": {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "gaussian", "lora_dropout": 0.3},
    "alpha 0 and below": {"r": 2, "lora_alpha": 0, "target_modules": ["q_proj"], "alpha_pattern": {"0.*q_proj": -3}},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_logits_and_scales_equal_pefts(feature, llama, shapes, make_peft):
    model, folder = make_peft(**FEATURES[feature])
    weights = peft_format.read_folder(folder, name="a", shapes=shapes)
    without_shapes = peft_format.read_folder(folder, name="a")
    with torch.no_grad():
        wanted = model(IDS).logits
    assert (logits_with(llama, weights) - wanted).abs().max() < 2e-5
    assert without_shapes.digest == weights.digest
    if feature != "alpha 0 and below":
        assert (wanted - llama(IDS).logits).abs().max() > 1e-2
    peft_scales = {
        name.removeprefix("base_model.model."): module.scaling["default"]
        for name, module in model.named_modules()
        if isinstance(getattr(module, "scaling", None), dict)
    }
    assert {path: m.scale for path, m in weights.modules.items()} == pytest.approx(peft_scales, rel=1e-12)


@pytest.mark.parametrize("feature", FEATURES)
def test_peft_loads_a_written_adapter_with_equal_logits(feature, llama, shapes, make_peft, tmp_path):
    model, folder = make_peft(**FEATURES[feature])
    weights = peft_format.read_folder(folder, name="a", shapes=shapes)
    for out, known in ((tmp_path / "full", None), (tmp_path / "short", shapes)):
        peft_format.save(weights, out, shapes=known)
        assert peft_format.read_folder(out, name="a", shapes=shapes).digest == weights.digest
        loaded = PeftModel.from_pretrained(copy.deepcopy(llama), out).eval()
        with torch.no_grad():
            assert (loaded(IDS).logits - model(IDS).logits).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_kept(dtype, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    edit_tensors(folder, lambda ts: {k: v.to(dtype) for k, v in ts.items()})
    weights = peft_format.read_folder(folder, name="a", shapes=shapes)
    assert {m.A.dtype for m in weights.modules.values()} == {dtype}


@pytest.mark.parametrize(
    "rename",
    [
        lambda k: k.removeprefix("base_model.model."),
        lambda k: k.replace(".weight", ".default.weight"),
        lambda k: k.replace(".lora_", ".base_layer.lora_"),
    ],
)
def test_other_tensor_name_prefixes_are_the_same_version(rename, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    before = peft_format.read_folder(folder, name="a", shapes=shapes)
    edit_tensors(folder, lambda ts: {rename(k): v for k, v in ts.items()})
    assert peft_format.read_folder(folder, name="b", shapes=shapes).digest == before.digest


def test_the_digest_depends_on_the_content_only(make_peft, shapes):
    _, folder = make_peft(r=2, lora_alpha=4, target_modules=["v_proj", "q_proj"])
    first = peft_format.read_folder(folder, name="a", shapes=shapes)
    edit_config(
        folder, target_modules=["q_proj", "v_proj"], lora_dropout=0.9, revision="x", base_model_name_or_path="other"
    )
    same = peft_format.read_folder(folder, name="a", shapes=shapes)
    assert same.digest == first.digest and same.metadata["base"] == "other"
    edit_config(folder, lora_alpha=5)
    assert peft_format.read_folder(folder, name="a", shapes=shapes).digest != first.digest


def test_metadata_lists_honoured_and_harmless_keys(make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"], lora_dropout=0.1)
    edit_config(folder, a_key_of_tomorrow=None, another=[], third=False, fan_in_fan_out=True)
    (folder / "README.md").write_text("# A card")
    (folder / "task.json").write_text('{"prompt": "{input}"}')
    metadata = peft_format.read_folder(folder, name="a", shapes=shapes).metadata
    assert {"r", "lora_alpha", "target_modules", "peft_type"} <= set(metadata["honoured"])
    assert {"lora_dropout", "qalora_group_size", "megatron_core", "a_key_of_tomorrow", "bias"} <= set(
        metadata["harmless"]
    )
    assert metadata["card"] == "# A card" and metadata["task"] == {"prompt": "{input}"}
    assert "fan_in_fan_out" in metadata["notes"][0]
    json.dumps(metadata)


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "use_dora.*; retrain without it"),
    "lora_bias": ({"lora_bias": True}, "lora_bias.*; retrain without it"),
    "bias": ({"bias": "some"}, "bias"),
    "biases of all": ({"bias": "all"}, 'if none was trained, set "none"'),
    "biases beside": ({"bias": "lora_only"}, "a trained bias is not a low-rank update"),
    **{f"a bias of {value!r}": ({"bias": value}, 'if none was trained, set "none"') for value in (None, False, "", [])},
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "embeddings": ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
    "lm_head": ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "pissa_niter": ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "loftq": ({"init_lora_weights": "loftq"}, "init_lora_weights"),
    "corda": ({"init_lora_weights": "corda"}, "init_lora_weights"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
    "an unknown init": ({"init_lora_weights": "tomorrow"}, "init_lora_weights"),
    "alora": ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens.*; retrain without it"),
    "target_parameters": (
        {"target_parameters": ["mlp.experts.weight"]},
        "target_parameters.*; retrain with target_modules only",
    ),
    "trainable tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices.*; retrain without it"),
    "layer_replication": (
        {"layer_replication": [[0, 2], [1, 3]]},
        "layer_replication.*; retrain without it, on the served base",
    ),
    "another type": ({"peft_type": "IA3"}, "IA3"),
    "qalora": ({"use_qalora": True}, "use_qalora.*; retrain without it"),
    "a group of qalora": ({"use_qalora": True, "qalora_group_size": 32}, "use_qalora"),
    "megatron": ({"megatron_config": {"hidden_size": 8}, "megatron_core": "megatron.other"}, "megatron_config"),
    "an embedding by its path": ({"target_modules": ["q_proj", "model.embed_tokens"]}, "embed_tokens"),
    "a head beside an exclusion": (
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["embed_tokens"]},
        "lm_head.*retrain without that target",
    ),
    "arrow": ({"arrow_config": {"top_k": 3}}, "arrow_config"),
    "arrow by default": ({"arrow_config": {}}, "arrow_config"),
    "kasa by default": ({"kasa_config": {}}, "kasa_config.*; retrain without it"),
    "block-diagonal by default": ({"use_bdlora": {}}, "use_bdlora.*; retrain without it"),
    "an unknown key": ({"warp_factor": 9}, "warp_factor"),
    "a number that is false": ({"warp_factor": 0}, "warp_factor"),
}


@pytest.mark.parametrize(
    "changes",
    [
        {"qalora_group_size": 32},
        {"use_qalora": False, "qalora_group_size": 7},
        {"corda_config": {"cache_file": None}, "loftq_config": {"loftq_bits": 4}},
        {"exclude_modules": "all-linear"},
        {"layers_to_transform": []},
        {"megatron_core": "megatron.other"},
        {"ensure_weight_tying": True},
        {"target_modules": ["q_proj", "wte", "word_embeddings", "embed_out", "other.lm_head"]},
        {"target_modules": ["q_proj", "lm_head", "embed_tokens"], "exclude_modules": ["lm_head", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ".*head"},
        {"target_modules": ["q_proj", "embed_tokens"], "layers_to_transform": [0, 1, 2]},
    ],
)
def test_keys_without_effect_change_nothing(changes, llama, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    before = peft_format.read_folder(folder, name="a", shapes=shapes)
    edit_config(folder, **changes)
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    for known in (shapes, None):
        weights = peft_format.read_folder(folder, name="a", shapes=known)
        assert weights.digest == before.digest
    with torch.no_grad():
        assert (logits_with(llama, weights) - loaded(IDS).logits).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("variant", "extra"),
    [
        ({"velora_config": VeloraConfig(num_groups=4)}, "lora_velora_embed"),
        ({"monteclora_config": MontecloraConfig(num_samples=3, buffer_size=2)}, "lora_monteclora_sampler"),
    ],
)
def test_training_only_tensors_are_ignored(variant, extra, llama, shapes, make_peft):
    model, folder = make_peft(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"], **variant)
    assert any(extra in key for key in load_file(folder / "adapter_model.safetensors"))
    weights = peft_format.read_folder(folder, name="a", shapes=shapes)
    with torch.no_grad():
        live, loaded = model(IDS).logits, PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()(IDS).logits
        merged = model.merge_and_unload()(IDS).logits
    for wanted in (live, loaded, merged):
        assert (logits_with(llama, weights) - wanted).abs().max() < 2e-5
    assert (live - llama(IDS).logits).abs().max() > 1e-2
    edit_tensors(folder, lambda ts: {k: v for k, v in ts.items() if extra in k})
    with pytest.raises(InvalidAdapter, match="no LoRA tensors"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_eva_modules_of_rank_0_have_no_tensors(llama, shapes, make_peft):
    _, folder = make_peft(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights="eva")
    edit_tensors(folder, drop("layers.1.self_attn"))
    weights = peft_format.read_folder(folder, name="a", shapes=shapes)
    assert "model.layers.1.self_attn.q_proj" not in weights.modules and len(weights.modules) == 5
    loaded = PeftModel.from_pretrained(copy.deepcopy(llama), folder).eval()
    with torch.no_grad():
        assert (logits_with(llama, weights) - loaded(IDS).logits).abs().max() < 2e-5
    edit_config(folder, init_lora_weights=True)
    with pytest.raises(InvalidAdapter, match="lacks the tensors of 1 modules"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    edit_config(folder, init_lora_weights="eva", target_modules=["q_proj"])
    with pytest.raises(InvalidAdapter, match="that the config does not adapt"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    edit_tensors(folder, drop("0.self_attn.q_proj.lora_B"))
    with pytest.raises(InvalidAdapter, match="lora_B.weight is missing"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_an_eva_adapter_saved_by_peft_is_read(tmp_path: Path) -> None:
    """From 20 modules on PEFT names them in short, and so those again that EVA left out."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=48, initializer_range=0.2)).eval()
    linears = [(name, module) for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)]
    shapes = {name: (module.out_features, module.in_features) for name, module in linears if name != "lm_head"}
    config = PeftConfig(
        task_type="CAUSAL_LM",
        r=1,
        target_modules="all-linear",
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    )
    model = get_peft_model(copy.deepcopy(base), config)
    batches = [{"input_ids": torch.randint(0, 48, (2, 64)), "attention_mask": torch.ones(2, 64)} for _ in range(4)]
    initialize_lora_eva_weights(model, dataloader=batches, show_progress_bar=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
        wanted = model.eval()(IDS).logits
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    named = json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]
    weights = peft_format.read_folder(tmp_path, name="a", shapes=shapes)
    assert len(weights.modules) < len(shapes) and "q_proj" in named
    assert (logits_with(base, weights) - wanted).abs().max() < 2e-5


@pytest.mark.parametrize("what", REFUSALS)
def test_unsupported_config_keys_are_refused_by_name(what, make_peft, shapes):
    changes, named = REFUSALS[what]
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    edit_config(folder, **changes)
    for known in (shapes, None):
        with pytest.raises(UnsupportedAdapter, match=named):
            peft_format.read_folder(folder, name="a", shapes=known)


RANK, FINITE = "a rank must be a positive integer", "must be a finite number"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(({"r": value}, f"^r: {RANK}") for value in (0, -4, 2.5, True, None)),
        *(({"rank_pattern": {"q_proj": value}}, rf"^rank_pattern.*{RANK}") for value in (0, True, None)),
        ({"r": "8"}, "not '8'"),
        ({"r": 3}, "the config gives the rank 3"),
        ({"r": 1 << 21}, "out of range"),
        ({"lora_alpha": float("nan")}, FINITE),
        ({"lora_alpha": 1e308}, FINITE),
        ({"lora_alpha": "16"}, "not '16'"),
        ({"lora_alpha": True}, f"{FINITE}, not True"),
        ({"alpha_pattern": {"q_proj": True}}, f"{FINITE}, not True"),
        ({"alpha_pattern": {"q_proj": None}}, FINITE),
        ({"rank_pattern": {"q_proj": 5}}, "the config gives the rank 5"),
        ({"rank_pattern": {"(": 2}}, "not a valid pattern"),
        ({"rank_pattern": ["q_proj"]}, "must be an object"),
        ({"use_rslora": 1}, "true or false, not 1"),
        ({"use_rslora": "8"}, "not '8'"),
        ({"target_modules": None}, "missing or empty"),
        ({"target_modules": []}, "missing or empty"),
        ({"target_modules": "DROP"}, "missing or empty"),
        ({"target_modules": [1]}, "a pattern or a list"),
        ({"target_modules": "("}, "not a valid pattern"),
        ({"target_modules": "x" * 5000}, "over the limit"),
        ({"target_modules": ["q_proj", "k_proj"]}, "lacks the tensors of 3 modules"),
        ({"target_modules": ["k_proj"]}, "that the config does not adapt"),
        ({"exclude_modules": ["q_proj"]}, "that the config does not adapt"),
        ({"layers_to_transform": [0]}, "that the config does not adapt"),
        ({"layers_to_transform": 1.5}, "an integer or a list"),
        ({"layers_pattern": "layers"}, "needs layers_to_transform"),
        ({"target_modules": ".*q_proj", "layers_to_transform": [0, 1, 2]}, "when target_modules is a pattern"),
        ({"peft_type": "DROP"}, "peft_type is missing"),
    ],
)
def test_invalid_configs_are_refused(changes, reason, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    edit_config(folder, **changes)
    with pytest.raises(InvalidAdapter, match=reason):
        peft_format.read_folder(folder, name="a", shapes=shapes)


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_to_transform"])
def test_lists_over_the_limit_are_refused(key):
    entries = [0 if key == "layers_to_transform" else "q_proj"] * (peft_config.MAX_LIST + 1)
    with pytest.raises(InvalidAdapter, match=rf"^{key} must be .* list of at most 16384 "):
        peft_config.parse({"peft_type": "LORA", "target_modules": ["q_proj"], key: entries})


def drop(part: str) -> Any:
    return lambda ts: {k: v for k, v in ts.items() if part not in k}


def put(key: str, tensor: torch.Tensor) -> Any:
    return lambda ts: {**ts, key: tensor}


def rename_all(part: str, replacement: str) -> Any:
    return lambda ts: {k.replace(part, replacement, 1): v for k, v in ts.items()}


Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (drop("layers.0"), InvalidAdapter, "lacks the tensors of 1 modules"),
        (drop("0.self_attn.q_proj.lora_B"), InvalidAdapter, "lora_B.weight is missing"),
        (drop("lora"), InvalidAdapter, "no LoRA tensors"),
        (put(f"{Q0}.lora_A.weight", torch.full((2, 16), torch.nan)), InvalidAdapter, "not finite"),
        (put(f"{Q0}.lora_B.weight", torch.full((16, 2), torch.inf)), InvalidAdapter, "not finite"),
        (put(f"{Q0}.lora_A.weight", torch.zeros(0, 16)), InvalidAdapter, "rank"),
        (put(f"{Q0}.lora_A.weight", torch.tensor(1.0)), InvalidAdapter, "must be a matrix"),
        (put(f"{Q0}.lora_A.weight", torch.ones(2, 16, 1)), InvalidAdapter, "must be a matrix"),
        (put(f"{Q0}.lora_A.weight", torch.ones(2, 8)), BaseMismatch, "another base"),
        (put(f"{Q0}.lora_B.weight", torch.ones(8, 2)), BaseMismatch, "another base"),
        (put(f"{Q0}.lora_A.weight", torch.ones(2, 16, dtype=torch.float64)), UnsupportedAdapter, "float64"),
        (put(f"{Q0}.lora_A.weight", torch.ones(2, 16, dtype=torch.int8)), UnsupportedAdapter, "int8"),
        (put(f"{Q0}.lora_A.default.weight", torch.ones(2, 16)), InvalidAdapter, "twice"),
        (put(f"{Q0}.lora_magnitude_vector", torch.ones(16)), UnsupportedAdapter, "DoRA.*; retrain without"),
        (put(f"{Q0}.lora_B.bias", torch.ones(16)), UnsupportedAdapter, "lora_bias.*; retrain without it"),
        (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, 48)), UnsupportedAdapter, "embed"),
        (put("base_model.model.lm_head.weight", torch.ones(48, 16)), UnsupportedAdapter, "lm_head"),
        *(
            (put(key, torch.ones(1)), UnsupportedAdapter, "classification or value head.*CAUSAL_LM")
            for key in (
                "v_head.summary.weight",
                "v_head.summary.bias",
                "base_model.model.score.weight",
                "base_model.model.score.modules_to_save.weight",
                "base_model.model.classifier.out_proj.bias",
            )
        ),
        (put("base_model.model.model.norm.weight", torch.ones(16)), InvalidAdapter, "not a lora_A or lora_B weight"),
        (put(f"{Q0}.base_layer.bias", torch.ones(16)), UnsupportedAdapter, "trained bias"),
        (put("base_model.model.model.layers.0.mlp.up_proj.bias", torch.ones(24)), UnsupportedAdapter, "trained bias"),
        (put("base_model.model.lm_head.lora_A.weight", torch.ones(2, 16)), UnsupportedAdapter, "retrain without that"),
        (
            put("base_model.model.model.embed_tokens.base_layer.weight", torch.ones(48, 16)),
            UnsupportedAdapter,
            "LoRA on .*'model.embed_tokens'.* retrain without that target",
        ),
        (put(f"{Q0}.lora_A.weight", torch.ones(2, 16, dtype=torch.float8_e4m3fn)), UnsupportedAdapter, "cast it"),
        (put(f"{Q0}.lora_A.weight", torch.zeros(0)), InvalidAdapter, "gather the parameters before saving"),
        (put(f"{Q0}.lora_B.weight", torch.zeros(0, 2)), InvalidAdapter, "gather the parameters before saving"),
        (drop("layers.0"), InvalidAdapter, "exclude_modules if they were not trained"),
        (rename_all("base_model.", "module.base_model."), InvalidAdapter, "'module'.*DataParallel.*unwrap"),
        (rename_all("base_model.model.", "base_model.model.module."), InvalidAdapter, "'module'.*unwrap"),
        (rename_all("base_model.model.", "_orig_mod.base_model.model."), InvalidAdapter, "torch.compile.*unwrap"),
        (rename_all(".self_attn.", "._orig_mod.self_attn."), InvalidAdapter, "torch.compile.*unwrap"),
        (rename_all(".self_attn.", "._fsdp_wrapped_module.self_attn."), InvalidAdapter, "FSDP.*unwrap"),
        (
            rename_all(".self_attn.", "._checkpoint_wrapped_module.self_attn."),
            InvalidAdapter,
            "activation checkpointing.*unwrap",
        ),
        (
            rename_all("base_model.model.", "base_model.model.base_model.model."),
            InvalidAdapter,
            "twice: merge_and_unload",
        ),
        (put("", torch.ones(16)), InvalidAdapter, "not a lora_A or lora_B weight; save the adapter"),
        (rename_all("lora_A.weight", "lora_A.mine.weight"), InvalidAdapter, "name 'mine'; save_pretrained"),
        (rename_all("lora_B.weight", "lora_B"), InvalidAdapter, r"names end in \.weight"),
        (rename_all("lora_A.weight", "lora_a"), InvalidAdapter, "mlx-lm.*convert"),
        (rename_all("lora_A.weight", "lora_down.weight"), InvalidAdapter, "kohya.*convert"),
        (put(f"{Q0}.alpha", torch.tensor(1.0)), InvalidAdapter, "kohya.*convert"),
        (put(f"{Q0}.lora_diag", torch.ones(2)), InvalidAdapter, "KaSA"),
        (
            put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", torch.ones(2, 16)),
            InvalidAdapter,
            "without trainable_token_indices",
        ),
    ],
)
def test_invalid_tensors_are_refused_with_advice(change, error, named, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    edit_tensors(folder, change)
    with pytest.raises(error, match=named):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_an_adapter_for_another_base_is_a_mismatch(make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    fewer = {k: v for k, v in shapes.items() if "layers.2" not in k}
    with pytest.raises(BaseMismatch, match="layers.2"):
        peft_format.read_folder(folder, name="a", shapes=fewer)
    wider = {k: (2 * o, 2 * i) for k, (o, i) in shapes.items()}
    with pytest.raises(BaseMismatch, match="another base"):  # it lacks the modules of a layer too
        peft_format.read_folder(
            folder, name="a", shapes={**wider, **{k.replace("layers.2", "layers.9"): s for k, s in wider.items()}}
        )
    other = {k: (o, i + 16) for k, (o, i) in shapes.items()}
    with pytest.raises(BaseMismatch, match="another base"):
        peft_format.read_folder(folder, name="a", shapes=other)


def test_the_rank_limit(make_peft, shapes):
    _, folder = make_peft(r=6, target_modules=["q_proj"], rank_pattern={"layers.1.self_attn.q_proj": 9})
    assert peft_format.read_folder(folder, name="a", shapes=shapes, max_rank=9).ranks == [6, 9]
    with pytest.raises(InvalidAdapter, match="over the limit of 8"):
        peft_format.read_folder(folder, name="a", shapes=shapes, max_rank=8)


class Trap:
    """A pickle that creates a folder when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def test_a_folder_without_an_adapter_is_refused_with_advice(make_peft, shapes, tmp_path):
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json is missing$"):
        peft_format.read_folder(tmp_path, name="a")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InvalidAdapter, match=r"is missing: this is a whole model, .* serve it with --model"):
        peft_format.read_folder(tmp_path, name="a")
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    folder.rename(tmp_path / "named")
    advice = r"is missing, but 'named' in it has one.* move the files of 'named' up .* give \S+/named in its place"
    with pytest.raises(InvalidAdapter, match=advice):
        peft_format.read_folder(tmp_path, name="a", shapes=shapes)
    for name in ("task_0", "task_1", "arrow_router"):
        shutil.copytree(tmp_path / "named", tmp_path / "arrow" / name)
    advice = "but 3 subfolders have one, for example 'task_0': give arrow/task_0 .*, or choose another"
    with pytest.raises(InvalidAdapter, match=advice):
        peft_format.read_folder(tmp_path / "arrow", name="a", shapes=shapes)
    with pytest.raises(InvalidAdapter, match="peft_type is missing: .* of mlx-lm: convert"):
        peft_config.parse({"fine_tune_type": "lora", "num_layers": 16, "lora_parameters": {"rank": 8}})


@pytest.mark.parametrize(
    ("start", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "`git lfs pull`"),
        (b"PK\x03\x04", "a pickle"),
        (b"<!doc", "web"),
    ],
)
def test_a_tensor_file_of_another_format_is_named(start, advice, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").write_bytes(start)
    with pytest.raises(InvalidAdapter, match=advice):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_long_tensor_names_are_refused_quickly(make_peft, shapes):
    """A search that is not linear in the name would take minutes."""
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    for name in ("x" * (1 << 20), ".lora_A." * (1 << 17), "._" * (1 << 19), "a.alpha" * (1 << 17) + "!"):
        edit_tensors(folder, lambda ts, name=name: {**ts, name: torch.zeros(1)})
        with pytest.raises(AdapterError):
            peft_format.read_folder(folder, name="a", shapes=shapes)


def test_a_pickle_is_never_opened(make_peft, shapes, tmp_path):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "mark")))
    with pytest.raises(UnsupportedAdapter, match=r"adapter_model\.bin is a pickle"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    (folder / "adapter_model.bin").rename(folder / "adapter_model.safetensors")
    with pytest.raises(InvalidAdapter, match="safetensors"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "file",
    [
        "adapter_model-00001-of-00002.safetensors",
        "adapter_model.pt",
        "pytorch_model.bin",
    ],
)
def test_other_files_that_may_hold_the_tensors_are_named(file, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    (folder / "adapter_model.safetensors").unlink()
    for name in ("tokenizer.json", "optimizer.pt", "training_args.bin", "README.md"):
        (folder / name).write_text("")
    with pytest.raises(InvalidAdapter, match=r"adapter_model\.safetensors is missing$"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    (folder / file).write_bytes(b"tensors")
    with pytest.raises(InvalidAdapter, match=rf"is missing, but '{file}' is there: .* save_pretrained.* one file"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_links_out_and_special_files_are_refused(file, make_peft, shapes, tmp_path):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    inside = folder / "real"
    (folder / file).rename(inside)
    (folder / file).symlink_to("real")
    assert peft_format.read_folder(folder, name="a", shapes=shapes).modules
    (folder / file).unlink()
    inside.rename(tmp_path / "outside")
    (folder / file).symlink_to(tmp_path / "nothing")
    with pytest.raises(InvalidAdapter, match="link to nothing: copy the files themselves"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidAdapter, match="leads out of its folder: copy the files themselves"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(InvalidAdapter, match="not a regular file"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    (folder / file).unlink()
    (folder / file).symlink_to(file)
    with pytest.raises(InvalidAdapter, match="cannot be read") as looped:
        peft_format.read_folder(folder, name="a", shapes=shapes)
    assert str(tmp_path) not in looped.value.message and str(folder) not in looped.value.message
    (folder / file).unlink()
    with pytest.raises(InvalidAdapter, match="is missing"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_files_over_the_size_limit_are_not_read(make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    with open(folder / "adapter_config.json", "r+b") as config:
        config.truncate(5 << 20)
    with pytest.raises(InvalidAdapter, match="over the limit"):
        peft_format.read_folder(folder, name="a", shapes=shapes)
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    with open(folder / "adapter_model.safetensors", "r+b") as tensors:
        tensors.truncate(1 << 40)
    with pytest.raises(InvalidAdapter, match=r"over the limit .* no adapter of rank 64 \(--max-rank\) needs"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


TABLE = torch.zeros(48, 16)


@pytest.mark.parametrize(
    ("changes", "tensors", "error", "named"),
    [
        ({"modules_to_save": ["lm_head"]}, {"lm_head.weight": TABLE}, UnsupportedAdapter, "modules_to_save.*retrain"),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            {"lm_head.base_layer.weight": TABLE, "model.embed_tokens.weight": TABLE},
            UnsupportedAdapter,
            "LoRA on .*'lm_head'.* retrain without that target",
        ),
        ({}, {"lm_head.weight": TABLE}, UnsupportedAdapter, "layers=False, and if it was .* resized, retrain"),
        ({}, {"model.layers.9.mlp.up_proj.lora_A.weight": TABLE}, InvalidAdapter, "lora_B.weight is missing"),
        (
            {},
            {f"model.layers.9.mlp.up_proj.lora_{s}.weight": TABLE for s in "AB"},
            BaseMismatch,
            "modules that this base does not have",
        ),
        (
            {},
            {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 32)},
            BaseMismatch,
            "made for another base",
        ),
    ],
)
def test_a_file_over_the_limit_is_refused_for_the_tensors_in_its_header(
    changes, tensors, error, named, make_peft, shapes, monkeypatch
):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    edit_tensors(folder, lambda ts: {**ts, **{f"base_model.model.{k}": v.clone() for k, v in tensors.items()}})
    edit_config(folder, **changes)
    monkeypatch.setattr(peft_format, "_tensor_limit", lambda shapes, max_rank: 100)
    with pytest.raises(error, match=named):
        peft_format.read_folder(folder, name="a", shapes=shapes)


@pytest.mark.parametrize(
    "header",
    [
        b"[",
        b"[1]",
        b"[" * 10_000,
        b'{"a": 1}',
        b'{"a": {"shape": [-1]}}',
        b'{"a": {"shape": ["x"]}}',
        b'{"a": {"shape": [99999999999999999999]}}',
        b'{"a": {"shape": [4611686018427387904, 4611686018427387904]}}',
    ],
)
def test_a_damaged_header_over_the_limit_is_too_large(header, make_peft, shapes, monkeypatch):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    monkeypatch.setattr(peft_format, "_tensor_limit", lambda shapes, max_rank: 4)
    for length in (len(header), 1 << 62):
        file.write_bytes(length.to_bytes(8, "little") + header)
        with pytest.raises(InvalidAdapter, match="over the limit of 4"):
            peft_format.read_folder(folder, name="a", shapes=shapes)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "null", '{"peft_type": "LORA"', "[" * 100_000, "\xff", '{"a": ' * 65 + "1" + "}" * 65]
)
def test_invalid_json_is_refused(text, make_peft):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidAdapter, match=r"adapter_config\.json"):
        peft_format.read_folder(folder, name="a")


@pytest.mark.parametrize(
    ("file", "text", "why"),
    [
        ("adapter_config.json", '{"peft_type": "LORA", "r": 1, "r": 2}', "the key 'r' is there twice"),
        ("task.json", '{"prompt": "a", "prompt": "b"}', "the key 'prompt' is there twice"),
        ("task.json", '{"prompt": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_duplicate_keys_and_surrogates_are_refused(file, text, why, make_peft, shapes):
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    (folder / file).write_text(text)
    with pytest.raises(InvalidAdapter, match=f"^{file} .*{why}"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_messages_and_metadata_are_shortened(make_peft, shapes):
    long = "x" * 1_000_000
    changes: list[Any] = [
        lambda folder: edit_config(folder, peft_type=long),
        lambda folder: edit_config(folder, **{long: "what?"}),
        lambda folder: edit_tensors(folder, lambda tensors: {**tensors, f"{long}.bias": torch.ones(2)}),
        lambda folder: edit_config(folder, target_modules=[long]),
    ]
    for number, change in enumerate(changes):
        _, folder = make_peft(folder=f"long-{number}", r=2, target_modules=["q_proj"])
        change(folder)
        with pytest.raises(AdapterError) as refused:
            peft_format.read_folder(folder, name="a", shapes=shapes)
        assert len(refused.value.message) < 1100 and len(str(refused.value)) < 1100
        assert len(refused.value.param or "") < 1100
    _, folder = make_peft(folder="named", r=2, target_modules=["q_proj"])
    edit_config(folder, base_model_name_or_path=f"begin{long}end", **{f"begin{long}end": None})
    metadata = peft_format.read_folder(folder, name="a", shapes=shapes).metadata
    for text in (metadata["base"], *metadata["harmless"]):
        assert len(text) < 1100
    assert metadata["base"].startswith("begin") and metadata["base"].endswith("end")


def test_truncated_files_are_refused(make_peft, shapes):
    _, folder = make_peft(r=1, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = file.read_bytes()
    for size in [*range(0, len(tensors), 37), len(tensors) - 1]:
        file.write_bytes(tensors[:size])
        with pytest.raises(InvalidAdapter):
            peft_format.read_folder(folder, name="a", shapes=shapes)


def test_nan_is_found_among_several_dtypes(
    make_peft: MakePeft, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = make_peft(r=2, target_modules=["q_proj"])
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[min(tensors)] = torch.full_like(tensors[min(tensors)], torch.nan, dtype=torch.bfloat16)
    save_file(tensors, file)
    monkeypatch.setattr(peft_format, "all_finite_in", lambda data, dtype: True)  # as the NaN of another dtype may look
    with pytest.raises(InvalidAdapter, match="not finite"):
        peft_format.read_folder(folder, name="a", shapes=shapes)


def test_the_largest_allowed_adapter_is_under_the_size_limit(
    make_peft: MakePeft, shapes: Shapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 on every layer; the slack for a header hides what small models take."""
    monkeypatch.setattr(peft_format, "HEADER_SLACK", 16 << 10)
    _, folder = make_peft(r=64, target_modules="all-linear")
    assert len(peft_format.read_folder(folder, name="a", shapes=shapes, max_rank=64).modules) == len(shapes)


def test_all_linear_is_case_insensitive_as_in_peft() -> None:
    configs = [{"peft_type": "LORA", "target_modules": value} for value in ("all-linear", "All-Linear")]
    first, second = map(peft_config.parse, configs)
    assert first == second and peft_config.select(first, ["a.b", "lm_head"]) == ["a.b"]


def test_layer_numbers_are_those_that_peft_finds() -> None:
    names = ["layers.0.q_proj", "model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.1.q_proj", "a.b.c.0"]
    asked: dict[str, Any] = {"target_modules": ["q_proj", "0"], "layers_to_transform": [0]}
    wanted = [name for name in names if check_target_module_exists(PeftConfig(**asked), name)]
    assert peft_config.select(peft_config.parse({"peft_type": "LORA", **asked}), names) == wanted


def test_save_writes_the_config_last(tmp_path: Path, write_adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash, there is no adapter rather than half of one."""
    written: list[str] = []

    def noted(path: Path, data: bytes) -> None:
        written.append(path.name)
        replace_file(path, data)

    monkeypatch.setattr(peft_format, "replace_file", noted)
    write_adapter(tmp_path / "a", card="# card", task={"prompt": "{input}"})
    assert written[-1] == "adapter_config.json" and set(written) == {path.name for path in (tmp_path / "a").iterdir()}


def test_metadata_survives_save_and_read(tmp_path: Path) -> None:
    saved = {key: {"a": [1, "é"]} for key in ("quantization", "training", "composition", "pruning", "auto_lora")}
    modules = {"x": LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)}
    weights = with_digest("a", modules, {**saved, "unknown": 1})
    peft_format.save(weights, tmp_path / "a", card="# card", task={"prompt": "é {input}"})
    peft_format.save(peft_format.read_folder(tmp_path / "a", name="a"), tmp_path / "b")
    metadata = peft_format.read_folder(tmp_path / "b", name="b").metadata
    assert {key: metadata[key] for key in saved} == saved and "unknown" not in metadata
    assert metadata["card"] == "# card" and metadata["task"] == {"prompt": "é {input}"}
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreFailed, match="could not be written"):
        peft_format.save(weights, tmp_path / "file")
