"""What a step costs in Python, beside the runner: scheduling, batching, sampling, text, delivery.

The runner answers prepared logits after a given time in which it holds no GIL, as the native one does. Run it as
`python -m benchmarks.step_overhead`; `--busy` adds a thread that does nothing but Python, as a loaded event loop
would, and `--switch` sets the interpreter's switch interval in seconds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import threading
import time
from concurrent.futures import Future

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from adapters.weights import LoraWeights, Mix
from server.engine.batch import Batch, Logits
from server.engine.engine import Engine
from server.engine.request import Delivery, Request, Sampling
from server.engine.sampler import DeviceSampler
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary


class PreparedRunner:
    """Answers rows of one random matrix."""

    draw: DeviceSampler | None = None

    def __init__(self, vocab: int, rows: int, seconds: float) -> None:
        self._logits = Logits(torch.randn(rows, vocab))
        self._seconds = seconds

    def allocate(self, blocks: int, block_size: int) -> None:
        pass

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        pass

    def unload_adapter(self, slot: int) -> None:
        pass

    def run(self, batch: Batch) -> Logits:
        if self._seconds:
            time.sleep(self._seconds)
        count = len(batch.logit_rows)
        return Logits(self._logits.rows[:count], self._logits.largest[:count])

    def block_bytes(self, block_size: int) -> int:
        return 1

    def nbytes(self) -> dict[str, int]:
        return {}


def byte_text() -> ModelTokenizer:
    """A vocabulary of the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return ModelTokenizer(Vocabulary(tokenizer, None, frozenset({0}), None, {}, False, 0))


def fetch(mix: Mix) -> Future[tuple[LoraWeights, ...]]:
    future: Future[tuple[LoraWeights, ...]] = Future()
    future.set_result(tuple(LoraWeights(d[:4], d, {}) for d in mix.digests))
    return future


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--busy", action="store_true")
    parser.add_argument("--switch", type=float, help="after the engine has set its own")
    options = parser.parse_args()
    engine = Engine(
        PreparedRunner(options.vocab, max(64, 2 * options.sequences), options.step_ms / 1e3),
        fetch=fetch,
        tokenizer=byte_text(),
        eos_ids=frozenset({0}),
        vocab_size=options.vocab,
        context_length=4096,
        base_id="none",
        blocks=options.sequences * 256,
        max_batch=options.sequences,
        max_slots=2 * options.sequences,
    )
    engine.start()
    if options.switch:
        sys.setswitchinterval(options.switch)
    entered = threading.Semaphore(0)

    def deliver(delivery: Delivery) -> None:
        if len(delivery.tokens) and delivery.finish_reason is None:
            entered.release()

    sampling = Sampling(max_tokens=3000, ignore_eos=True, temperature=options.temperature, top_p=options.top_p, seed=1)
    for i in range(options.sequences):
        mix = Mix(tuple((f"{i + j:064x}", 1.0) for j in range(2)))
        prompt = tuple(random.Random(i).randrange(256) for _ in range(128))
        engine.submit(Request(f"r{i}", prompt, sampling, deliver, mix=mix, fair_key=str(i)))
    for _ in range(options.sequences * 4):
        entered.acquire()
    over = threading.Event()
    if options.busy:
        threading.Thread(target=lambda: [None for _ in iter(over.is_set, True)], daemon=True).start()
    outside = []
    for _ in range(5):
        before, began = engine.stats(), time.perf_counter()
        while engine.stats()["steps"] - before["steps"] < options.steps // 5:
            time.sleep(0.01)
        seconds, after = time.perf_counter() - began, engine.stats()
        steps = after["steps"] - before["steps"]
        outside.append((after["outside_seconds"] - before["outside_seconds"]) / steps * 1e3)
    over.set()
    print(
        f"{options.sequences} sequences: {statistics.median(outside):.3f} ms a step outside the runner "
        f"(of five runs: {min(outside):.3f} to {max(outside):.3f}); last in all {seconds / steps * 1e3:.2f} ms"
    )
    engine.stop()


if __name__ == "__main__":
    main()
