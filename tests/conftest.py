"""Shared fixtures: test isolation, a tiny random model and its adapters, and skips for missing programs."""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hypothesis
import pytest

if TYPE_CHECKING:
    from adapters.weights import LoraWeights
    from server.engine.backends.torch.runner import TorchRunner
    from server.model.loader import Base
    from server.model.vocabulary import Vocabulary

# Set before torch is imported: tiny tensors are faster on one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Waiting OpenMP threads sleep instead of spinning. Spinning slows down steps a lot when other processes need the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Set before Triton is imported: without a GPU, its interpreter runs the kernels on CPU tensors.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
"""Hypothesis deadlines are off, because the time per example depends on the machine."""

hypothesis.settings.register_profile("fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "400")), deadline=None)
"""The profile of `make fuzz`."""

REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1"

ASYNCIO = ("asyncio_mode", "asyncio_default_fixture_loop_scope")
"""Settings of pytest-asyncio. pytest rejects unknown settings, and GPU machines do not have the plugin."""


def pytest_addoption(parser: pytest.Parser) -> None:
    if importlib.util.find_spec("pytest_asyncio") is None:
        for name in ASYNCIO:
            parser.addini(name, "setting of pytest-asyncio, which is not installed")


def part_missing(reason: str) -> NoReturn:
    """Skip the calling test, or fail it if REQUIRE_ALL=1."""
    if REQUIRE_ALL:
        pytest.fail(f"REQUIRE_ALL=1, but {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture(autouse=True)
def _restore_torch_threads() -> Iterator[None]:
    """Restore torch's thread count after each test. Commands change it, and results depend on it in the last bit."""
    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    yield
    if torch is not None and torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _clear_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the caller's LORAMUX_* variables."""
    for name in [n for n in os.environ if n.startswith("LORAMUX_")]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _restore_logging() -> Iterator[None]:
    """Restore the root logger after each test. Commands add handlers whose streams are closed afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in [h for h in root.handlers if h not in handlers]:
        root.removeHandler(handler)
    root.setLevel(level)


gc.disable()


def pytest_collection_finish() -> None:
    """Exclude everything imported during collection from garbage collection."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Unfreeze at the end, because Triton's bindings report objects that are left over."""
    gc.unfreeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("part"):
        for command in mark.args:
            if shutil.which(command) is None:
                part_missing(f"{command} is not on the path")
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "Ġ the", "i n", "Ġ a", "o n", "e r", "r e", "a n", "an d", "Ġ and", "i s", "Ġ is")


@pytest.fixture
def tiny_vocabulary() -> Vocabulary:
    """Byte-level BPE over all 256 bytes with a few merges and ChatML's special tokens. It encodes any text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    from server.model.vocabulary import Vocabulary

    pairs = [tuple(merge.split()) for merge in MERGES]
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return Vocabulary(
        tokenizer=tokenizer,
        chat_template=CHATML,
        eos_ids=frozenset({0, 2}),
        bos_id=None,
        special={token: i for i, token in enumerate(SPECIAL)},
        add_bos=False,
        eos_id=0,
    )


PIECES = (
    'he ▁a the ▁an ▁and ▁the in ▁o ▁s re ther as er то ▁i ▁sa ▁other ": es ga me na no or th ▁" ▁h ▁w ▁э ▁he ▁in ▁is '
    "gain ▁has ▁say ▁это ▁again ▁there \", ', af al ap at ds ea gr id io ne oo qu sw té ue ve {\" öß ес же ▁' ▁b ▁c ▁t "
    "▁y ▁é ▁т afé apt ase est ing ion naï ome ory val ест ▁ad"
)
LETTERS = "▁eanthsrodi\".,т1gy2:wéо'3fmuvеэ!04bclpq{}ßïöжс"
RUNS = (2, 3, 4, 5, 8)


@pytest.fixture(scope="session")
def spm_metadata() -> dict[str, Any]:
    """GGUF metadata of a small SentencePiece vocabulary: 3 special tokens, 256 bytes, 5 runs of spaces, 118 pieces.

    It was trained like Llama's (`model_type="bpe"`, byte fallback, split digits). As in Llama's and Mistral's
    vocabularies, the runs of spaces share one score.
    """
    import numpy as np

    trained = [*PIECES.split(), *LETTERS]
    runs = ["▁" * length for length in RUNS]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *runs, *trained]
    scores = [0.0] * 259 + [-1e9] * len(runs) + [-float(i) for i in range(len(trained))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array(scores, np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.fixture
def tiny_base(tiny_vocabulary: Vocabulary) -> Base:
    """A random Llama: hidden size 64, 2 layers, 4 heads, 2 KV heads, context 256, float32, reference kernels."""
    import torch

    from server.kernels import choose
    from server.model.config import from_hf
    from server.model.loader import Base
    from server.model.quantization import quantize

    config = from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": tiny_vocabulary.tokenizer.get_vocab_size(),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
        }
    )
    backend, generator = choose("reference"), torch.Generator().manual_seed(0)
    weights = {}
    for path, shape in (config.linear_shapes() | config.table_shapes()).items():
        weights[path] = backend.pack(quantize(torch.randn(shape, generator=generator) * 0.15, "none", name=path))
    return Base(
        name="tiny",
        id="0" * 64,
        config=config,
        weights=weights,
        tensors={
            name: 1 + 0.1 * torch.randn(shape, generator=generator) for name, shape in config.tensor_shapes().items()
        },
        vocabulary=tiny_vocabulary,
        backend=backend,
        notes=(),
        quantization={"scheme": "none"},
    )


@pytest.fixture
def tiny_runner(tiny_base: Base) -> TorchRunner:
    """A runner for `tiny_base` with 8 adapter slots and 64 KV blocks of 16 tokens."""
    from server.engine.backends.torch.runner import TorchRunner

    runner = TorchRunner(tiny_base, max_slots=8, threads=1)
    runner.allocate(64, 16)
    return runner


@pytest.fixture
def tiny_adapter(tiny_base: Base) -> Callable[..., LoraWeights]:
    """Return `make(seed, rank=4, targets=("q_proj", "v_proj"), size=0.2)`, which makes a prepared random adapter."""
    import hashlib

    import torch

    from adapters.weights import LoraWeights, LowRank

    def make(
        seed: int, rank: int = 4, targets: tuple[str, ...] = ("q_proj", "v_proj"), size: float = 0.2
    ) -> LoraWeights:
        generator = torch.Generator().manual_seed(1000 + seed)
        modules = {
            path: LowRank(
                torch.randn(rank, inputs, generator=generator) * size,
                torch.randn(outputs, rank, generator=generator) * size,
                2.0,
            )
            for path, (outputs, inputs) in tiny_base.config.linear_shapes().items()
            if path.rsplit(".", 1)[-1] in targets
        }
        digest = hashlib.sha256(f"{seed} {rank} {targets} {size}".encode()).hexdigest()
        return tiny_base.prepare(LoraWeights(f"tiny-{seed}", digest, modules, {"base": "tiny"}))

    return make


@pytest.fixture
def tiny_folder(tiny_base: Base, tmp_path: Path) -> Path:
    """`tiny_base` as a Hugging Face model folder in bfloat16."""
    import torch
    from safetensors.torch import save_file

    from server.model.config import to_hf
    from server.model.vocabulary import write_folder

    folder = tmp_path / "tiny"
    folder.mkdir()
    tensors = {f"{p}.weight": tiny_base.backend.dequantize(w).bfloat16() for p, w in tiny_base.weights.items()}
    tensors |= {n: t.to(torch.bfloat16) for n, t in tiny_base.tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(tiny_base.config)))
    write_folder(tiny_base.vocabulary, folder)
    return folder
