"""Concurrent requests on many adapters and mixes, while adapters change, give the same answers as PEFT."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer
from tests.e2e.conftest import Live, sentences
from tests.e2e.oracle import Oracle

pytestmark = [
    pytest.mark.e2e,
    # PEFT uses names that newer Transformers versions deprecate.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

RANKS = (3, 4, 8, 12, 16, 17, 24, 32, 33, 40, 48, 50, 56, 60, 63, 64)
NEW_TOKENS = 8


def test_answers_under_traffic_equal_peft(
    reference_server: Live, base: Base, oracle: Oracle, write_random: Callable[..., Path], tmp_path: Path
) -> None:
    live, text = reference_server, ModelTokenizer(base.vocabulary)
    folders: dict[str, Path] = {}
    versions: dict[str, Path] = {}

    def register(name: str, folder: Path, method: str) -> str:
        answer = live.client.request(
            method,
            "/adapters" if method == "POST" else f"/adapters/{name}",
            files={
                "adapter_config.json": (folder / "adapter_config.json").read_bytes(),
                "adapter_model.safetensors": (folder / "adapter_model.safetensors").read_bytes(),
            },
            data={"name": name},
        )
        assert answer.status_code in (200, 201), answer.text
        version = str(answer.json()["version"])
        versions[version] = folder
        return version

    for i, rank in enumerate(RANKS):
        folders[f"a{i}"] = write_random(tmp_path / f"a{i}", rank=rank, seed=i, alpha=rank)
        register(f"a{i}", folders[f"a{i}"], "POST")
    churn = [write_random(tmp_path / f"churn{i}", rank=5 + i, seed=100 + i, alpha=5 + i) for i in range(4)]

    rng = random.Random(7)
    prompts = sentences()
    asked: list[dict] = []
    for i in range(16):
        asked.append({"prompt": prompts[i], "adapters": [{"name": f"a{i}", "weight": 1.0}]})
    for i in range(16):
        members = rng.sample(range(16), 2 + i % 3)
        mix = [{"name": f"a{m}", "weight": rng.choice([-0.5, 0.25, 0.5, 0.75])} for m in members]
        asked.append({"prompt": prompts[(i + 3) % 20], "adapters": mix})
    asked += [{"prompt": p, "adapters": [{"name": "churned"}]} for p in prompts[:8]]
    asked += [{"prompt": p, "adapters": []} for p in prompts[:8]]
    asked += [dict(a, prompt=prompts[(n * 7) % 20]) for n, a in enumerate(asked[:16])]
    assert len(asked) == 64

    register("churned", churn[0], "POST")
    done = threading.Event()

    def change_adapters() -> int:
        turns = 0
        while not done.wait(0.2):  # the pause leaves CPU time to the engine
            turns += 1
            register("churned", churn[turns % 4], "PUT")
            register(f"short{turns}", churn[(turns + 1) % 4], "POST")
            assert live.client.delete(f"/adapters/short{turns}").status_code == 202
        return turns

    def ask(body: dict) -> dict:
        return live.post("/generate", {**body, "max_tokens": NEW_TOKENS, "logprobs": 1})

    with ThreadPoolExecutor(65) as pool:
        changes = pool.submit(change_adapters)
        try:
            answers = list(pool.map(ask, asked))
        finally:
            done.set()
        assert changes.result() > 0

    eos = set(base.vocabulary.eos_ids)
    differing = []
    mixes = []
    for body, answer in zip(asked, answers, strict=True):
        assert [a["name"] for a in answer["adapters"]] == [a["name"] for a in body["adapters"]]
        mixes.append([(oracle.add(versions[a["version"]]), a["weight"]) for a in answer["adapters"]])
    # Sorted by mix, because PEFT takes as long to switch adapters as to answer.
    for body, answer, mix in sorted(zip(asked, answers, mixes, strict=True), key=lambda one: one[2]):
        tokens = [entry["token"] for entry in answer["logprobs"]]
        difference = oracle.compare(text.encode(body["prompt"]), tokens, text.token_text, NEW_TOKENS, mix, eos)
        if difference is not None:
            differing.append(difference)
    assert all(d.margin < 1e-3 for d in differing), differing
    assert len(differing) <= 1, f"{len(differing)} of 64 answers differ within a margin of 1e-3"
