"""Peak memory of a load, in a process of its own; benchmarks/large_base.py does the same at the size of 7B."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from server.model.config import from_hf
from server.model.vocabulary import Vocabulary, write_folder

SHAPE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from server.kernels.reference import Reference
from server.model.loader import load_base
from transformers import AutoConfig, PreTrainedTokenizerFast

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))

torch.set_num_threads(1)
AutoConfig.for_model("llama")  # its imports take tens of megabytes, and are not measured
cache = Path(sys.argv[2]) if len(sys.argv) > 2 else None
before, peak, done = private(), [0], threading.Event()
def sample():
    while not done.wait(0.002):
        peak[0] = max(peak[0], private() - before)
thread = threading.Thread(target=sample)
thread.start()
base = load_base(Path(sys.argv[1]), name="x", backend=Reference(), double_quant=True, cache_dir=cache)
done.set()
thread.join()
print(json.dumps([base.nbytes, base.bits, max(peak[0], private() - before)]))
"""
WORK = 72e6
"""Bytes that quantizing a few rows takes whatever the model's size: temporaries, and modules that are imported."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    config, generator = from_hf(SHAPE), torch.Generator().manual_seed(0)
    (path / "config.json").write_text(json.dumps(SHAPE))
    matrices = {f"{p}.weight": s for p, s in (config.linear_shapes() | config.table_shapes()).items()}
    weight_map = {}
    for name, shape in (matrices | config.tensor_shapes()).items():
        file = f"{len(weight_map):05d}.safetensors"
        save_file({name: (torch.randn(shape, generator=generator) * 0.02).bfloat16()}, path / file)
        weight_map[name] = file
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def measured(*arguments: Path) -> tuple[int, float, int]:
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    nbytes, bits, peak = json.loads(done.stdout)
    return nbytes, bits, peak


@pytest.mark.e2e
def test_peak_private_memory_stays_near_the_result(folder: Path, tiny_vocabulary: Vocabulary, tmp_path: Path) -> None:
    write_folder(tiny_vocabulary, folder)
    nbytes, bits, peak = measured(folder)
    assert bits <= 4.3
    assert peak <= 1.3 * nbytes + WORK
    source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert nbytes < 0.5 * source
    cold, warm = measured(folder, tmp_path), measured(folder, tmp_path)
    assert cold[0] == warm[0] == nbytes
    assert cold[2] <= WORK, "a base that is packed into a mapped file is no private memory"
    assert warm[2] <= WORK / 3
