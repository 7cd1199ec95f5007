"""The embedded base: tokens and weights equal those of Transformers and gguf, and a packed base loads quickly."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from tokenizers import Tokenizer, pre_tokenizers

from server.kernels.packed_format import dequantize_stored
from server.kernels.reference import Reference
from server.model.loader import Base, load_base

pytestmark = pytest.mark.e2e

REPO = Path(__file__).resolve().parents[2]


def texts() -> list[str]:
    rng = random.Random(0)
    ranges = [(32, 127), (32, 127), (160, 0x2FFF), (0x3000, 0xD7FF), (0x1F300, 0x1F6FF)]
    found = [path.read_text(encoding="utf-8") for path in sorted((REPO / "server").rglob("*.py"))]
    found += [path.read_text(encoding="utf-8") for path in sorted(REPO.glob("*.md"))]
    found += json.loads((Path(__file__).parent / "sentences.json").read_text())
    found += ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(60)) for _ in range(500)]
    found += ["  7,  200   and\u00a0 3-9\r\n 1:  10:", "½ ² Ⅷ ４５ ٣٤", "<|im_start|>user\nhi<|im_end|>", ""]
    return [text for text in found if isinstance(text, str)]


def test_token_ids_equal_transformers(embedded: Path, base: Base) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(embedded.parent, gguf_file=embedded.name)
    # A copy that parses special tokens in text, as theirs does. The shared tokenizer may be set to treat them as text.
    ours = Tokenizer.from_str(base.vocabulary.tokenizer.to_str())
    lines = [line for text in texts() for line in text.splitlines(keepends=True)]
    without_digits = [line for line in lines if not any(c.isnumeric() for c in line)]
    assert sum(map(len, without_digits)) > 10_000
    for text in without_digits:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    # The pre-tokenizer `smollm` splits digits before it applies GPT-2's pattern, as the model's own tokenizer does.
    # Transformers' GGUF reader omits the split, which makes a difference after two spaces.
    backend = theirs.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    for text in texts():
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text, add_special_tokens=False)
    assert base.vocabulary.eos_ids == {theirs.eos_token_id}
    assert base.vocabulary.chat_template == theirs.chat_template
    assert set(theirs.all_special_tokens) <= set(base.vocabulary.special)


def test_weights_are_bit_equal_to_gguf(embedded: Path, base: Base) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(embedded).tensors}

    def read(name: str, heads: int = 0) -> torch.Tensor:
        values = gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        if heads:  # llama.cpp interleaves the two halves of a head
            values = values.reshape(heads, len(values) // heads // 2, 2, -1).swapaxes(1, 2).reshape(values.shape)
        return torch.from_numpy(values.copy())

    names = {"self_attn.q_proj": ("attn_q", 9), "self_attn.k_proj": ("attn_k", 3), "mlp.down_proj": ("ffn_down", 0)}
    for layer in (0, 29):
        for path, (name, heads) in names.items():
            weight = base.weights[f"model.layers.{layer}.{path}"]
            assert torch.equal(dequantize_stored(weight), read(f"blk.{layer}.{name}.weight", heads))
    assert torch.equal(dequantize_stored(base.weights["model.embed_tokens"]), read("token_embd.weight"))
    assert torch.equal(base.tensors["model.norm.weight"], read("output_norm.weight"))
    assert base.notes == ()


def test_the_base_takes_at_most_five_bits_per_parameter(base: Base) -> None:
    assert base.bits <= 5.1


def test_a_packed_base_equals_the_original_and_is_mapped(embedded: Path, base: Base, tmp_path: Path) -> None:
    packed = load_base(embedded, name="x", backend=Reference(), cache_dir=tmp_path)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.packed")}
    again = load_base(embedded, name="x", backend=Reference(), cache_dir=tmp_path)
    assert again.id == packed.id == base.id
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.packed")} == written != {}, "packed only once"
    codes = [b.weights["model.embed_tokens"].tensors["codes"] for b in (again, base)]
    assert torch.equal(*codes)
    assert ".packed\n" in Path("/proc/self/maps").read_text(), "the file is mapped, not read"


def test_loading_imports_no_slow_packages(embedded: Path) -> None:
    """Importing Transformers takes seconds, which every start of a server or a training job would pay."""
    script = (
        "import sys; from pathlib import Path; from server.kernels.reference import Reference;"
        "from server.model.loader import load_base;"
        "load_base(Path(sys.argv[1]), name='x', backend=Reference());"
        "print(sorted({'transformers', 'gguf', 'fastapi'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script, embedded], check=True, stdout=subprocess.PIPE, cwd=REPO)
    assert done.stdout.strip() == b"[]"
