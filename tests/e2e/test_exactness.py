"""Adapter mixes on the embedded base equal PEFT: many weights in one batch, and unusual LoRA configs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from adapters.peft_format import read_folder
from adapters.weights import LoraWeights
from server.engine.backends import make_runner
from server.engine.batch import Batch
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from tests.e2e.conftest import Live, sentences
from tests.e2e.oracle import Oracle, config_of, write_peft

pytestmark = [
    pytest.mark.e2e,
    # PEFT uses names that newer Transformers versions deprecate.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

PROMPT = "The committee met on Tuesday and decided nothing."
WEIGHTS = (-1.0, -0.5, 0.0, 0.25, 0.5, 1.0, 1.5, 2.0)
TOP = 20


def prefill(runner, prompt: Sequence[int], mixes: Sequence[tuple[tuple[int, float], ...]]) -> torch.Tensor:
    """All logits [len(mixes), tokens, vocab] of one prompt under several mixes, in one batch."""
    n, count = len(prompt), len(mixes)
    per = -(-n // 16)
    return runner.run(
        Batch(
            tokens=np.array(list(prompt) * count),
            positions=np.tile(np.arange(n), count),
            row_start=np.arange(count + 1, dtype=np.int32) * n,
            context=np.full(count, n, np.int32),
            blocks=np.arange(count * per, dtype=np.int32).reshape(count, per),
            logit_rows=np.arange(n * count),
            mixes=tuple(mixes),
        )
    ).rows.reshape(count, n, -1)


@pytest.fixture
def two(base: Base, write_random: Callable[..., Path], tmp_path: Path) -> list[tuple[Path, LoraWeights]]:
    folders = [write_random(tmp_path / f"s{i}", rank=8 + 5 * i, seed=40 + i, alpha=12) for i in range(2)]
    return [(f, base.prepare(read_folder(f, name=f.name, shapes=base.shapes()))) for f in folders]


def test_mixes_with_many_weights_equal_peft(base: Base, oracle: Oracle, two: list[tuple[Path, LoraWeights]]) -> None:
    runner = make_runner(base, max_slots=4, threads=2)
    runner.allocate(64, 16)
    for slot, (_, weights) in enumerate(two):
        runner.load_adapter(slot, weights)
    prompt = ModelTokenizer(base.vocabulary).encode(PROMPT)
    # The server drops members with weight 0, so a batch never contains one.
    mixes = [((0, w),) if w else () for w in WEIGHTS] + [((0, 0.5), (1, 0.5))]
    together = prefill(runner, prompt, mixes).clone()
    alone = torch.cat([prefill(runner, prompt, [mix]) for mix in mixes])
    assert (together - alone).abs().max() < 1e-4

    names = [oracle.add(folder) for folder, _ in two]
    wanted = [[(names[0], w)] if w else [] for w in WEIGHTS] + [[(names[0], 0.5), (names[1], 0.5)]]
    for row, mix in zip(together, wanted, strict=True):
        assert (row - oracle.logits(prompt, mix)).abs().max() < 1e-4, mix
    runner.unload_adapter(0)
    runner.unload_adapter(1)
    zero = WEIGHTS.index(0.0)
    assert torch.equal(alone[zero], prefill(runner, prompt, [()])[0])


ODD = (
    {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
    {"r": 5, "lora_alpha": 9, "target_modules": "all-linear"},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 9, r"layers\.1\d\..*v_proj": 3},
     "alpha_pattern": {"q_proj": 6}, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    {"r": 7, "lora_alpha": 7, "target_modules": r".*\.(5|6|7)\.mlp\.(gate|up)_proj"},
    {"r": 17, "lora_alpha": 12, "target_modules": ["o_proj", "down_proj"], "layers_to_transform": [0, 3, 29]},
    {"r": 64, "lora_alpha": 32, "target_modules": ["q_proj"], "layers_to_transform": 11, "layers_pattern": "layers"},
    {"r": 1, "lora_alpha": 2, "target_modules": "all-linear", "exclude_modules": ["k_proj", "gate_proj"]},
    {"r": 33, "lora_alpha": 6, "use_rslora": True, "rank_pattern": {"down_proj": 2}, "target_modules": "all-linear"},
)  # fmt: skip
MIXES = (
    ((0, 1.0), (1, -0.5)),
    ((2, 0.7), (3, 0.6), (4, -0.25)),
    ((0, 0.4), (1, 0.4), (2, 0.4), (5, 1.5)),
    ((1, -1.0), (3, 0.5), (5, 0.5), (6, 2.0), (7, 0.3)),
)


def test_adapters_of_unusual_configs_equal_peft(
    default_server: Live, base: Base, oracle: Oracle, tmp_path: Path
) -> None:
    """First-token log-probabilities on the default kernels, one batch, against PEFT in float32."""
    folders = [write_peft(tmp_path / f"odd{i}", config_of(base), seed=i, **config) for i, config in enumerate(ODD)]
    for i, folder in enumerate(folders):
        files = {n: (folder / n).read_bytes() for n in ("adapter_config.json", "adapter_model.safetensors")}
        answer = default_server.client.post("/adapters", files=files, data={"name": f"odd{i}"})
        assert answer.status_code == 201, answer.text
    names = [oracle.add(folder) for folder in folders]
    text = ModelTokenizer(base.vocabulary)
    mixes, prompts = [*(((i, 1.0),) for i in range(len(ODD))), *MIXES], sentences()[:6]
    cases = [(p, mix) for mix in mixes for p in prompts]
    answers = default_server.post_all(
        "/generate",
        [
            {"prompt": p, "max_tokens": 1, "logprobs": TOP,
             "adapters": [{"name": f"odd{i}", "weight": w} for i, w in mix]}
            for p, mix in cases
        ],
    )  # fmt: skip
    differences, agree, clear = [], 0, 0
    encoded = [text.encode(prompt) for prompt in prompts]
    theirs = [oracle.next_logits(encoded, [(names[i], w) for i, w in mix]).log_softmax(-1) for mix in mixes]
    for row, answer in zip(torch.cat(theirs), answers, strict=True):
        best = row.topk(2)
        top = answer["logprobs"][0]["top"]
        if best.values[0] - best.values[1] > 0.2:
            clear += 1
            agree += top[0]["token"] == text.token_text(int(best.indices[0]))
        by_text = {text.token_text(int(t)): float(row[t]) for t in row.topk(60).indices}
        differences += [abs(by_text[t["token"]] - t["logprob"]) for t in top[:5] if t["token"] in by_text]
    ordered = sorted(differences)
    assert clear > 20 and agree / clear >= 0.98, (agree, clear)
    assert statistics.median(ordered) <= 0.08
    assert ordered[int(0.95 * len(ordered))] <= 0.25
