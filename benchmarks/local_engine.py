"""Our engine in this process, without HTTP: what the in-process peers are measured against.

Owns an engine over one base and the adapters that it was given. Measures what the peers' scripts measure.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from adapters.peft_format import read_folder
from adapters.weights import LoraWeights, Mix, Version, canonical_mix
from benchmarks.roofline import Cost, decode_cost
from server.engine.backends import make_runner
from server.engine.overlap import engine_on
from server.engine.request import Delivery, Request, Sampling
from server.kernels.threads import run_in_thread
from server.model.loader import Base
from server.model.tokenizer import ModelTokenizer

CONTEXT = 2048
BLOCK = 16
SLOTS = 64
"""As a server has by default."""
STEP_TOKENS = 512
"""Most new tokens of a step, as a server has by default."""
GREEDY = Sampling()


class LocalEngine:
    """An engine with every adapter in RAM. Use as a context; the prefix cache is off."""

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Path] = (),
        *,
        threads: int = 2,
        max_batch: int = 32,
        max_step_tokens: int = STEP_TOKENS,
    ) -> None:
        """`max_batch` and `max_step_tokens`, the server's settings of these names, may hold all requests and their
        prompts: then all decode together. There is a slot for each adapter, and at least as many as a server has."""
        max_slots = max(SLOTS, len(adapters))
        shapes = base.shapes()
        self._weights = run_in_thread(
            lambda: [base.prepare(read_folder(path, name=f"a{i}", shapes=shapes)) for i, path in enumerate(adapters)]
        )
        self._base = base
        self._by_digest = {w.digest: w for w in self._weights}
        self.runner = make_runner(base, max_slots, threads)
        self.engine = engine_on(
            self.runner,
            fetch=self._fetch,
            tokenizer=ModelTokenizer(base.vocabulary),
            eos_ids=base.vocabulary.eos_ids,
            vocab_size=base.config.vocab_size,
            context_length=min(CONTEXT, base.config.context_length),
            base_id=base.id,
            blocks=max_batch * CONTEXT // BLOCK // 2,
            block_size=BLOCK,
            max_batch=max_batch,
            max_slots=max_slots,
            max_step_tokens=max_step_tokens,
            prefix_cache=False,
        )

    def __enter__(self) -> LocalEngine:
        self.engine.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.engine.stop()

    def mix(self, choice: Sequence[tuple[int, float]]) -> Mix:
        """The mix of `(adapter number, weight)` pairs."""
        pairs = [(Version(f"a{n}", self._weights[n].digest), w) for n, w in choice]
        return canonical_mix(pairs, max_mix=16)

    def run(
        self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int, how: Sampling = GREEDY
    ) -> float:
        """Generate exactly `new_tokens` for each prompt, all submitted at once. Returns seconds to the last token.

        Raises the first request's error, if one failed.
        """
        return self._generate(prompts, mixes, new_tokens, how)[1]

    def rates(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int) -> tuple[float, float]:
        """(seconds to all first tokens, seconds to all last tokens), of one run as vLLM's are: the difference of two
        runs has the noise of both prefills. Raises as `run`."""
        return self._generate(prompts, mixes, new_tokens, GREEDY)

    def decode_costs(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int) -> list[Cost]:
        """What the steps of `rates` between its two times can not avoid, as all prompts decode together: each has one
        token more in the cache than the step before."""
        weights = [[self._by_digest[digest] for digest in mix.digests] for mix in mixes]
        return [
            decode_cost(self._base, [len(prompt) + new for prompt in prompts], weights) for new in range(1, new_tokens)
        ]

    def _generate(
        self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int, how: Sampling
    ) -> tuple[float, float]:
        done = threading.Semaphore(0)
        failures: list[Exception] = []
        began: dict[int, float] = {}
        """When the first token of each came."""

        def heard(number: int, delivery: Delivery) -> None:
            if delivery.tokens:
                began.setdefault(number, time.perf_counter())
            if delivery.finish_reason is not None:
                if delivery.error is not None:
                    failures.append(delivery.error)
                done.release()

        sampling = replace(how, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        for i, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
            tell = partial(heard, i)
            self.engine.submit(Request(f"b{start}-{i}", tuple(prompt), sampling, tell, mix=mix, fair_key="bench"))
        for _ in prompts:
            done.acquire()
        if failures:
            raise failures[0]
        return max(began.values()) - start, time.perf_counter() - start

    def _fetch(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        future: Future[tuple[LoraWeights, ...]] = Future()
        future.set_result(tuple(self._by_digest[digest] for digest in mix.digests))
        return future
