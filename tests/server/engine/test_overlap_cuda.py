"""The overlapped engine on the CUDA runner: requests hear what the plain engine on it tells them.

All of the runner but the decoder's kernels, which Triton's interpreter takes seconds a step for: in their place is a
function of what a step's numbers lead to on the device, tokens, keys and values by block tables, and adapters by lanes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None and os.environ.get("REQUIRE_ALL") != "1":
    pytest.skip("Triton is not installed", allow_module_level=True)

from server.engine.backends.cuda.device_model import DeviceModel, DeviceStep
from server.engine.backends.cuda.memory import GRAPH_BYTES, work_bytes
from server.engine.backends.cuda.runner import CudaRunner
from server.engine.engine import Engine
from server.engine.overlap import OverlappedEngine
from server.engine.request import State
from server.errors import NoCapacity
from server.kernels.cuda import Cuda
from server.kernels.cuda.lora import DeviceAdapters
from server.kernels.reference import Reference
from tests.server.kernels import tiny
from tests.server.kernels.conftest import _interpreter  # noqa: F401
from tests.server.kernels.tiny import BLOCK, Tiny, adapter, llama

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a graph holds no function of the host")

VOCAB, MAX_BATCH, STEP_TOKENS = 61, 3, 12
RANKS = {"a0": 3, "a1": 16, "a2": 20}


@pytest.fixture(scope="module")
def base() -> Tiny:
    config = llama(
        vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=256, qk_norm=True,
    )  # fmt: skip
    return tiny.bases(config, "int4", 32, False, "int8", Cuda(torch.float32), Reference())[0]


def adapters_of(row: int, step: DeviceStep, pool: DeviceAdapters) -> tuple[tuple[bytes, float], ...]:
    """What a row is multiplied with: the first values of each adapter, as its lanes and the pool's tables tell."""
    lanes, found = step.lanes, {}
    weights = lanes.weights[int(step.sequence[row])]
    for first, rows, lane, count in lanes.tiles.tolist() if step.adapters else ():
        if not first <= row < first + rows:
            continue
        for i in range(lane, lane + count):
            slot, weight = int(lanes.slot[i]), float(weights[lanes.adapter[i]])
            if int(lanes.index[i]) == 0 and weight:
                at = int(pool.offsets[slot, 0, 0])
                found[slot] = pool.values[at : at + 16].numpy().tobytes(), weight
    return tuple(sorted(found.values()))


def logits(self: DeviceModel, step: DeviceStep, cache: torch.Tensor, pool: DeviceAdapters) -> torch.Tensor:
    """In the decoder's place: random numbers of all tokens up to a row and of what each was multiplied with."""
    places = {}
    for row, (token, position) in enumerate(zip(step.tokens.tolist(), step.positions.tolist(), strict=True)):
        if position >= 0:
            table = step.blocks[int(step.sequence[row])].tolist()
            seed = hashlib.sha256(repr((token, adapters_of(row, step, pool))).encode()).digest()
            cache[0, table[position // BLOCK], 0, 0, position % BLOCK, :3] = torch.tensor(list(seed[:3])).float()
            places[row] = [(table[i // BLOCK], i % BLOCK) for i in range(position + 1)]
    result = torch.zeros(len(step.logit_rows), VOCAB)
    for i, row in enumerate(step.logit_rows.tolist()):
        if row in places:
            seen = [cache[0, block, 0, 0, at, :3].tolist() for block, at in places[row]]
            seed = hashlib.sha256(repr(seen).encode()).digest()
            result[i] = torch.from_numpy(np.random.default_rng(list(seed)).standard_normal(VOCAB) * 3)
    return result


@pytest.fixture(autouse=True)
def _decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeviceModel, "logits", logits)


def bench_on(base: Tiny, tools: Any, kind: type[Engine], blocks: int = 24) -> Any:
    """A bench whose engine, of that kind, is on a CUDA runner of its own, with room for two of three adapters."""
    known = {
        tools.digest_of(name): replace(base.prepare(adapter(base.config, seed, rank)), digest=tools.digest_of(name))
        for seed, (name, rank) in enumerate(RANKS.items())
    }
    sizes = sorted(weights.nbytes for weights in known.values())
    room = sum(sizes[1:]) + sizes[0] // 2
    memory = work_bytes(base.config, STEP_TOKENS, MAX_BATCH) + GRAPH_BYTES + (4 << 20) + room
    runner = CudaRunner(
        base, MAX_BATCH, memory=memory, device=torch.device("cpu"), max_step_tokens=STEP_TOKENS, kv_cache=1 << 20,
        adapters=room,
    )  # fmt: skip
    made = tools.Bench(tools.make_text(), fetch=tools.Fetcher(known=known))
    made.engine = kind(
        runner, adapter_memory=runner.room, fetch=made.fetch, tokenizer=made.text,
        eos_ids=made.text.vocabulary.eos_ids, vocab_size=VOCAB, context_length=128, base_id="base", blocks=blocks,
        block_size=BLOCK, max_batch=MAX_BATCH, max_slots=4, max_step_tokens=STEP_TOKENS,
    )  # fmt: skip
    made.engine._inbox.open()
    return made


ASKED: list[tuple[int, tuple[str, ...], dict[str, Any]]] = [
    (26, ("a0",), {"max_tokens": 8}),  # longer than a step: of its first rows no logits are wanted
    (3, ("a1",), {"max_tokens": 4, "temperature": 2.0}),
    (14, ("a0", "a1"), {"max_tokens": 6}),
    (1, (), {"max_tokens": 2}),
    (5, ("a2",), {"max_tokens": 6, "temperature": 3.0, "stop_token_ids": tuple(range(3, 8))}),
    (15, ("a1",), {"max_tokens": 5, "logprobs": 2}),
    (6, ("a0", "a2"), {"max_tokens": 5, "repetition_penalty": 1.5}),
    (4, ("a2",), {"scored": 2}),
    (12, ("a0",), {"max_tokens": 3, "top_k": 7, "temperature": 1.0}),
    (13, (), {"max_tokens": 14}),
]
"""Prompt tokens, adapters and options of requests: more than run together, on more adapters than have room."""


@pytest.mark.parametrize("blocks", [24, 4], ids=["roomy", "tight"])
def test_answers_are_those_of_the_plain_engine(base: Tiny, tools: Any, blocks: int) -> None:
    told = []
    for kind in (OverlappedEngine, Engine):
        rng = random.Random(3)
        made = bench_on(base, tools, kind, blocks)
        heard = []
        for i, (length, names, options) in enumerate(ASKED):
            prompt = [rng.randrange(3, VOCAB) for _ in range(length)]
            heard.append(made.submit(prompt, mix=tools.mix_of(*names), seed=i, **options))
            if i % 3 == 2:
                made.engine.step()
        gone = made.submit([5, 6, 7], max_tokens=40, mix=tools.mix_of("a1"))
        while not gone.tokens:
            assert made.engine.step()
        made.engine.cancel(gone.request.id)
        made.engine.unload(tools.digest_of("a1"))
        made.settle()
        made.check_empty()
        assert gone.reason == "cancelled" and gone.request.output == gone.tokens
        assert all(h.request.state is State.DONE and h.error is None for h in heard)
        stats = made.engine.stats()
        assert stats["slots"]["evictions"] > 0 and (stats["preemptions"] > 0) == (blocks == 4)
        told.append([(h.tokens, h.text, h.reason, h.request.output, h.logprobs, h.request.scores) for h in heard])
    assert told[0] == told[1]


def test_a_step_without_memory_takes_nothing_from_the_one_before(
    base: Tiny, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer whose last token has been drawn is whole, another one goes on; the prompt that there is no room for
    ends, and its adapter can be used again."""
    made = bench_on(base, tools, OverlappedEngine)
    whole = made.submit([5, 6, 7], max_tokens=2, mix=tools.mix_of("a0"))
    other = made.submit([5, 6, 8], max_tokens=9)
    for _ in range(2):
        made.engine.step()
    prompt = made.submit([7, 8, 9, 10], mix=tools.mix_of("a0"))

    def lacks(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as lacking, pytest.raises(NoCapacity) as raised:
        lacking.setattr(DeviceModel, "logits", lacks)
        lacking.setattr(torch.cuda, "empty_cache", lambda: None)
        made.engine.step()
    made.engine._recover(raised.value)
    assert (whole.reason, len(whole.tokens)) == ("length", 2)
    assert isinstance(prompt.error, NoCapacity) and not prompt.tokens and other.reason is None
    again = [made.submit(h.request.prompt, max_tokens=4, mix=h.request.mix) for h in (other, prompt)]
    made.settle()
    assert (other.reason, other.tokens[:4]) == ("length", again[0].tokens) and again[1].reason == "length"
    made.check_empty()
