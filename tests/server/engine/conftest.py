"""A fake runner, and an engine on it that a test steps.

The runner's logits are a pure function of tokens, positions and mix. It reads earlier tokens through the block tables
only, so a wrong block, a wrong slot or another mix's prefix changes its answers. `solo` computes the expected answer
of a request without an engine.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from adapters.weights import BASE_MIX, LoraWeights, LowRank, Mix
from server.engine.batch import Batch, Logits
from server.engine.engine import Engine
from server.engine.overlap import OverlappedEngine
from server.engine.request import Delivery, Request, Sampling, State
from server.engine.sampler import DeviceSampler
from server.model.tokenizer import ModelTokenizer
from server.model.vocabulary import Vocabulary
from tests.waiting import SECONDS

EOS = 2
TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def prompt(seed: int, length: int = 10) -> list[int]:
    """Random ordinary tokens."""
    rng = random.Random(seed)
    return [rng.randrange(3, 250) for _ in range(length)]


def digest_of(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def adapter(name: str) -> LoraWeights:
    ones = torch.ones(1, 4)
    return LoraWeights(name, digest_of(name), {"linear": LowRank(ones, ones.T.contiguous(), 1.0)})


def mix_of(*names: str) -> Mix:
    """Equal weights, in canonical order."""
    return Mix(tuple(sorted((digest_of(name), 1.0) for name in names)))


def logits_for(history: Sequence[int], mix: Sequence[tuple[str, float]], vocab: int) -> np.ndarray:
    """Pseudo-random logits, a function of the tokens `history` and `mix`."""
    h = hashlib.blake2b(np.asarray(history, np.int64).tobytes(), digest_size=8)
    for digest, weight in mix:
        h.update(digest.encode() + struct.pack("<d", weight))
    noise = np.random.default_rng(int.from_bytes(h.digest(), "little"))
    return noise.standard_normal(vocab).astype(np.float32) * 3


class FakeRunner:
    """See the module. `before` is called with each batch. It may raise, and its result is added to the logits."""

    draw: DeviceSampler | None = None

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab
        self.adapters: dict[int, LoraWeights] = {}
        self.steps: list[Batch] = []
        self.before: Callable[[Batch], Any] = lambda batch: None
        self.on_place: Callable[[LoraWeights], None] = lambda weights: None

    def allocate(self, blocks: int, block_size: int) -> None:
        self.store = np.full((blocks, block_size), -1, np.int64)
        self.mixes = np.full((blocks, block_size), None, object)

    def load_adapter(self, slot: int, weights: LoraWeights) -> None:
        self.on_place(weights)
        assert slot not in self.adapters
        self.adapters[slot] = weights

    def unload_adapter(self, slot: int) -> None:
        self.adapters.pop(slot, None)

    def run(self, batch: Batch) -> Logits:
        self.steps.append(batch)
        added = self.before(batch)
        size = self.store.shape[1]
        starts, blocks, context = batch.row_start.tolist(), batch.blocks, batch.context.tolist()
        rows: dict[int, np.ndarray] = {}
        wanted = set(batch.logit_rows.tolist())
        written: Counter[tuple[int, int]] = Counter()
        for s, mix in enumerate(batch.mixes):
            named = tuple((self.adapters[slot].digest, weight) for slot, weight in mix)
            for row in range(starts[s], starts[s + 1]):
                position = int(batch.positions[row])
                place = int(blocks[s, position // size]), position % size
                assert place[0] >= 0
                written[place] += 1
                self.store[place] = int(batch.tokens[row])
                self.mixes[place] = named
            assert position + 1 == context[s]
            for row in range(starts[s], starts[s + 1]):
                if row not in wanted:
                    continue
                n = int(batch.positions[row]) + 1
                places = [(int(blocks[s, i // size]), i % size) for i in range(n)]
                assert all(self.mixes[p] == named for p in places), "another mix's keys and values"
                rows[row] = logits_for([int(self.store[p]) for p in places], named, self.vocab)
        assert max(written.values()) == 1, "two rows write to one position"
        logits = torch.from_numpy(
            np.stack([rows[r] for r in batch.logit_rows.tolist()]) if rows else np.zeros((0, self.vocab), np.float32)
        )
        return Logits(logits if added is None else logits + added)

    def block_bytes(self, block_size: int) -> int:
        return block_size

    def nbytes(self) -> dict[str, int]:
        return {}


class LateRunner(FakeRunner):
    """A device whose tokens are read later. `events` records the order of launches and reads."""

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self.drawn = np.zeros(0, np.int32)
        self.draws = 0
        self.events: list[tuple[str, int]] = []
        self.fault: Exception | None = None
        """The error after which it cannot be used again."""

    def wait_until_nearly_done(self) -> None:
        """Returns at once."""

    def wait(self) -> None:
        if self.fault is not None:
            raise self.fault

    def run(self, batch: Batch) -> Logits:
        self.events.append(("run", self.draws))
        tokens = batch.tokens
        late = tokens < 0
        tokens[late] = self.drawn[-1 - tokens[late]]
        tokens[late & (tokens < 0)] = 0  # sampled from a row that was not finite
        return super().run(batch)

    def draw(self, logits: Logits, how: np.ndarray, top_k: np.ndarray) -> LateTokens:
        """Sample by temperature and random number only."""
        values = logits.rows.numpy().astype(np.float64)
        fine = np.isfinite(values).all(1)
        tokens = values.argmax(1) if len(values) else np.zeros(0, np.int64)
        for row in np.flatnonzero(fine & (how[:, 0] > 0)):
            sums = np.exp((values[row] - values[row].max()) / how[row, 0]).cumsum()
            tokens[row] = min(int(np.searchsorted(sums, how[row, 3] * sums[-1], side="right")), len(sums) - 1)
        self.drawn = np.where(fine, tokens, -1).astype(np.int32)
        self.draws += 1
        return LateTokens(self.drawn.copy(), self.draws - 1, self.events)


@dataclass
class LateTokens:
    """Tokens that `LateRunner` has sampled."""

    tokens: np.ndarray
    number: int
    events: list[tuple[str, int]]

    def read(self) -> np.ndarray:
        self.events.append(("read", self.number))
        return self.tokens


@dataclass
class Fetcher:
    """A `fetch` whose loads end by `finish`, or at once for names in `ready` (None: all)."""

    ready: set[str] | None = None
    pending: list[tuple[Mix, Future[tuple[LoraWeights, ...]]]] = field(default_factory=list)
    asked: list[Mix] = field(default_factory=list)
    known: dict[str, LoraWeights] = field(
        default_factory=lambda: {digest_of(n): adapter(n) for n in [f"a{i}" for i in range(64)]}
    )

    def __call__(self, mix: Mix) -> Future[tuple[LoraWeights, ...]]:
        future: Future[tuple[LoraWeights, ...]] = Future()
        self.asked.append(mix)
        if self.ready is None or all(self.known[d].name in self.ready for d in mix.digests):
            future.set_result(self.weights(mix))
        else:
            self.pending.append((mix, future))
        return future

    def weights(self, mix: Mix) -> tuple[LoraWeights, ...]:
        return tuple(self.known[d] for d in mix.digests)

    def finish(self, index: int = 0, error: Exception | None = None) -> None:
        mix, future = self.pending.pop(index)
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(self.weights(mix))


class Heard:
    """A request and its deliveries."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.deliveries: list[Delivery] = []

    def __call__(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)

    @property
    def reason(self) -> str | None:
        return self.deliveries[-1].finish_reason if self.deliveries else None

    @property
    def error(self) -> Exception | None:
        return self.deliveries[-1].error if self.deliveries else None

    @property
    def tokens(self) -> list[int]:
        return [t for d in self.deliveries for t in d.tokens]

    @property
    def text(self) -> str:
        return "".join(d.text for d in self.deliveries)

    @property
    def logprobs(self) -> list[Any]:
        return [p for d in self.deliveries for p in d.logprobs]


class Bench:
    """An engine on the fake runner. The test calls `step`, or starts the thread."""

    def __init__(self, text: ModelTokenizer, **options: Any) -> None:
        self.text = text
        overlapped = options.pop("overlapped", False)
        late = options.pop("late", overlapped)
        self.runner = (LateRunner if late else FakeRunner)(options.pop("vocab", text.size))
        self.fetch = options.pop("fetch", None) or Fetcher()
        settings: dict[str, Any] = {
            "tokenizer": text,
            "eos_ids": text.vocabulary.eos_ids,
            "vocab_size": self.runner.vocab,
            "context_length": 512,
            "base_id": "base",
            "blocks": 64,
            "block_size": 4,
            "max_batch": 8,
            "max_slots": 8,
            "max_step_tokens": 32,
        }
        self.engine = (OverlappedEngine if overlapped else Engine)(
            self.runner, fetch=self.fetch, **(settings | options)
        )
        self.engine._inbox.open()
        self._ids = itertools.count()

    def submit(self, prompt: Sequence[int], *, mix: Mix = BASE_MIX, **options: Any) -> Heard:
        kept = {
            key: options.pop(key)
            for key in ("fair_key", "tenant", "priority", "deadline", "scored", "constraint")
            if key in options
        }
        options = {"max_tokens": 8, "ignore_eos": True} | options
        request = Request(f"r{next(self._ids)}", tuple(prompt), Sampling(**options), lambda d: None, mix=mix, **kept)
        heard = Heard(request)
        request.deliver = heard
        self.engine.submit(request)
        return heard

    def settle(self, limit: int = 2000) -> int:
        """Step until nothing runs. Returns the number of steps."""
        steps = 0
        while self.engine.step():
            steps += 1
            assert steps < limit, "too many steps"
        return steps

    def run_until(self, done: Callable[[], bool], seconds: float = SECONDS) -> None:
        """Step until `done`, in real time."""
        end = time.monotonic() + seconds
        while not done():
            self.engine.step()
            assert time.monotonic() < end, "timed out"

    def check_empty(self) -> None:
        """Check that nothing is reserved or queued any more."""
        stats = self.engine.stats()
        assert stats["running"] == stats["waiting"] == stats["loading"] == 0
        assert stats["kv_blocks"]["used"] == 0
        assert stats["slots"]["in_use"] == 0
        assert not self.engine._live
        assert len(self.engine._scheduler.loader) == 0
        assert not any(self.engine._scheduler.waiting._present.values())
        assert not self.engine._scheduler.admission.aging and not self.engine._scheduler.admission.pending_prefixes
        assert self.engine._inbox.waiting == 0 and self.engine._inbox._tokens == 0 and not self.engine._inbox._count_of


def solo(heard: Heard, vocab: int, count: int | None = None) -> list[int]:
    """The greedy answer to a request alone, without end tokens."""
    request = heard.request
    tokens = list(request.prompt)
    for _ in range(count or request.sampling.max_tokens):
        tokens.append(int(logits_for(tokens, request.mix.entries, vocab).argmax()))
    return tokens[len(request.prompt) :]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE over all bytes with a few merges and three special tokens, ids 0 to 2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o"), ("p", "o"), ("po", "s")]
    tokens = [*specials, *alphabet, *["".join(m) for m in merges]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    return tokenizer


def make_text(template: str | None = TEMPLATE, *, add_bos: bool = False) -> ModelTokenizer:
    tokenizer = make_tokenizer()
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    return ModelTokenizer(Vocabulary(tokenizer, template, frozenset({EOS}), 0, special, add_bos, EOS))


@pytest.fixture(scope="session")
def text() -> ModelTokenizer:
    return make_text()


@pytest.fixture
def bench(text: ModelTokenizer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bench]]:
    """A function that creates a `Bench`. Its options are those of `Engine`, and `overlapped`."""
    late: list[Delivery] = []
    monkeypatch.setattr("server.engine.engine._ignore", late.append)
    yield lambda **options: Bench(text, **options)
    assert not late, "deliveries after the last one"


class Panic(BaseException):
    """Like the exception that a Rust library raises when it panics."""


class Tools:
    """Helpers for the tests of this package."""

    Bench, Fetcher, Heard, State = Bench, Fetcher, Heard, State
    FakeRunner, LateRunner, LateTokens = FakeRunner, LateRunner, LateTokens
    solo = staticmethod(solo)
    mix_of = staticmethod(mix_of)
    digest_of = staticmethod(digest_of)
    adapter = staticmethod(adapter)
    logits_for = staticmethod(logits_for)
    make_text = staticmethod(make_text)
    make_tokenizer = staticmethod(make_tokenizer)
    EOS = EOS
    TEMPLATE = TEMPLATE


@pytest.fixture(scope="session")
def tools() -> type[Tools]:
    return Tools
