"""An engine in this process, without HTTP, for the comparison with in-process peers."""

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
BLOCK_SIZE = 16
SLOTS = 64
"""Default of --max-slots."""
STEP_TOKENS = 512
"""Default of --max-step-tokens."""
GREEDY = Sampling()


class LocalEngine:
    """An engine with all adapters in RAM and without prefix cache. Use it as a context manager.

    Args:
        adapters: PEFT folders; each has a slot.
        max_batch, max_step_tokens: as the server's settings. If they hold all requests, all decode together.
    """

    def __init__(
        self,
        base: Base,
        adapters: Sequence[Path] = (),
        *,
        threads: int = 2,
        max_batch: int = 32,
        max_step_tokens: int = STEP_TOKENS,
    ) -> None:
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
            blocks=max_batch * CONTEXT // BLOCK_SIZE // 2,
            block_size=BLOCK_SIZE,
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
        self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int, sampling: Sampling = GREEDY
    ) -> float:
        """Generate exactly `new_tokens` for each prompt, all submitted at once.

        Returns:
            Seconds until the last token.

        Raises:
            Exception: the error of the first request that failed.
        """
        return self._generate(prompts, mixes, new_tokens, sampling)[1]

    def rates(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int) -> tuple[float, float]:
        """Like `run`, returns the seconds until all first tokens and until all last tokens."""
        return self._generate(prompts, mixes, new_tokens, GREEDY)

    def decode_costs(self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int) -> list[Cost]:
        """Roofline costs of the decode steps of `rates`, if all prompts decode together."""
        weights = [[self._by_digest[digest] for digest in mix.digests] for mix in mixes]
        return [
            decode_cost(self._base, [len(prompt) + new for prompt in prompts], weights) for new in range(1, new_tokens)
        ]

    def _generate(
        self, prompts: Sequence[Sequence[int]], mixes: Sequence[Mix], new_tokens: int, sampling: Sampling
    ) -> tuple[float, float]:
        finished = threading.Semaphore(0)
        failures: list[Exception] = []
        first_token: dict[int, float] = {}

        def deliver(number: int, delivery: Delivery) -> None:
            if delivery.tokens:
                first_token.setdefault(number, time.perf_counter())
            if delivery.finish_reason is not None:
                if delivery.error is not None:
                    failures.append(delivery.error)
                finished.release()

        sampling = replace(sampling, max_tokens=new_tokens, ignore_eos=True)
        start = time.perf_counter()
        for i, (prompt, mix) in enumerate(zip(prompts, mixes, strict=True)):
            request = Request(f"b{start}-{i}", tuple(prompt), sampling, partial(deliver, i), mix=mix, fair_key="bench")
            self.engine.submit(request)
        for _ in prompts:
            finished.acquire()
        if failures:
            raise failures[0]
        return max(first_token.values()) - start, time.perf_counter() - start

    def _fetch(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        future: Future[tuple[LoraWeights, ...]] = Future()
        future.set_result(tuple(self._by_digest[digest] for digest in mix.digests))
        return future
