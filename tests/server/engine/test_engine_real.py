"""The engine on real runners: a request's answer does not depend on the other requests.

On the native kernels results are equal bit by bit. On the reference kernels, whose accumulation order depends on
shapes, tokens are equal, and log-probabilities within 1e-4.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from server.engine.backends import make_runner
from server.engine.overlap import engine_on
from server.kernels import choose, cpu
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer

NATIVE = pytest.param("native", marks=pytest.mark.skipif(cpu.unavailable() is not None, reason="no native kernels"))


@pytest.fixture
def bench_on(tiny_base: Base, tiny_adapter: Callable[..., Any], tools: Any) -> Callable[..., Any]:
    """`bench_on(kernels, **options)`: a bench whose engine runs the tiny base with adapters a0 to a5."""

    def make(kernels: str, **options: Any) -> Any:
        base = tiny_base
        if kernels == "native":
            backend = choose("native")
            stored = {path: choose("reference").dequantize(w) for path, w in tiny_base.weights.items()}
            from server.model.quantization import quantize

            weights = {path: backend.pack(quantize(t, "int4", 32)) for path, t in stored.items() if "embed" not in path}
            weights |= {path: backend.pack(quantize(t, "int8", 32)) for path, t in stored.items() if "embed" in path}
            scheme = {"scheme": "int4", "group_size": 32}
            base = replace(tiny_base, weights=weights, backend=backend, quantization=scheme)
        known = {}
        for i in range(6):
            weights_ = tiny_adapter(i, rank=(4, 3, 16, 7, 1, 8)[i])
            known[tools.digest_of(f"a{i}")] = replace(weights_, digest=tools.digest_of(f"a{i}"))
        known = {digest: base.prepare(w) for digest, w in known.items()}
        made = tools.Bench(ModelTokenizer(base.vocabulary), fetch=tools.Fetcher(known=known))
        settings: dict[str, Any] = {
            "fetch": made.fetch,
            "tokenizer": made.text,
            "eos_ids": base.vocabulary.eos_ids,
            "vocab_size": base.config.vocab_size,
            "context_length": 256,
            "base_id": base.id,
            "blocks": 64,
            "block_size": 16,
        }
        runner = make_runner(base, 8, 2)
        made.engine = engine_on(runner, **(settings | {"max_slots": 8} | options))
        made.engine._inbox.open()
        return made

    return make


def requests(tools: Any, logprobs: int | None) -> list[tuple[list[int], dict[str, Any]]]:
    rng = random.Random(5)
    made = []
    for i in range(12):
        tokens = [rng.randrange(3, 270) for _ in range(rng.choice([1, 5, 16, 17, 40]))]
        options: dict[str, Any] = {"max_tokens": 24 + i, "logprobs": logprobs}
        options["mix"] = tools.mix_of(*[f"a{j}" for j in rng.sample(range(6), i % 4)])
        if i % 3 == 1:
            options |= {"temperature": 0.9, "seed": i, "top_p": 0.95}
        if i % 5 == 4:
            options["scored"] = len(tokens) // 2
        made.append((tokens, options))
    return made


@pytest.mark.parametrize("logprobs", [2, None], ids=["synchronous", "asynchronous"])
@pytest.mark.parametrize("kernels", ["reference", NATIVE])
def test_answers_do_not_depend_on_the_batch(
    bench_on: Callable[..., Any], tools: Any, kernels: str, logprobs: int | None
) -> None:
    alone = []
    for tokens, options in requests(tools, logprobs):
        b = bench_on(kernels, prefix_cache=False)
        alone.append(b.submit(tokens, **options))
        b.settle()
        b.check_empty()
    crowded = bench_on(kernels, max_step_tokens=24, max_batch=5, max_slots=4)
    tight = bench_on(kernels, blocks=6, max_batch=12, prefix_cache=False)
    for b in (crowded, tight):
        heard = [b.submit(tokens, **options) for tokens, options in requests(tools, logprobs)]
        again = [b.submit(tokens, **options) for tokens, options in requests(tools, logprobs)]
        b.settle()
        for one, many in zip(alone * 2, heard + again, strict=True):
            assert many.reason == one.reason != "error" and many.tokens == one.tokens
            if kernels == "native":
                assert many.logprobs == one.logprobs
            assert [p.logprob for p in many.logprobs] == pytest.approx([p.logprob for p in one.logprobs], abs=1e-4)
        b.check_empty()
    assert tight.engine.stats()["preemptions"] > 0
    assert crowded.engine.stats()["prefix_cache"]["found_tokens"] > 0
