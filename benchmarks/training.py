"""Training speed and memory compared with Transformers + PEFT, on the same base, data and configuration.

    python -m benchmarks.training BASE.gguf DATA.jsonl TASK.json [--batches 8,16] [--steps 8]

Each contestant runs in its own process with the same number of threads. Tokens do not include padding. Memory is the
peak resident size above that after the imports, including the base. "ours-recompute" uses activation checkpointing,
"ours-unshared" does not share the common prefix of prompts (like PEFT), and "ours-full" trains all linear layers
instead of a LoRA.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch

from adapters import data, memory
from adapters.data import Example
from adapters.training import Event, TrainingConfig, train, train_dense
from server.jobs.encoding import Template, encoder
from server.jobs.trainable_model import TrainableModel
from server.kernels import choose
from server.model.loader import Base, load_base
from server.model.tokenizer import ModelTokenizer
from server.settings import keep_few_kernels

WARM_UP = 2
"""Steps that are not timed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("base", "data", "task"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--batches", default="8,16")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", default="*", help="patterns of contestants, for example ours,peft-bfloat16-*")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--micro-tokens", type=int, default=2048, help="micro_tokens of ours")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(one(args, args.one)))
        return
    contestants = ["ours", "ours-recompute", "ours-unshared", "ours-full"]
    contestants += [f"peft-{dtype}-{batch}" for dtype in ("bfloat16", "float32") for batch in args.batches.split(",")]
    for _ in range(args.rounds):
        for name in contestants:
            if not any(fnmatch(name, pattern) for pattern in args.only.split(",")):
                continue
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--one", name], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"{name:20} failed: {done.stderr.strip().splitlines()[-1]}")
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            speed, mib = row["tokens_per_second"], row["peak"] / 2**20
            print(f"{name:20} {speed:8.0f} tokens/s {mib:8.0f} MiB loss {row['loss']:.4f}")


def one(args: argparse.Namespace, who: str) -> dict[str, Any]:
    """Tokens per second, peak bytes and mean loss of one contestant."""
    peft = who.startswith("peft")
    if peft:
        import peft as _peft  # noqa: F401  # so that imports do not count
        import transformers  # noqa: F401
    base = load_base(args.base, name="base", backend=choose("reference"), cache_dir=None)
    text = ModelTokenizer(base.vocabulary)
    template = Template.of(json.loads(args.task.read_text()))
    size = int(who.rsplit("-", 1)[1]) if peft else 16
    count = (WARM_UP + args.steps) * size
    tokens = data.tokenize(data.read(args.data)[:count], encoder(text, template, 1024), 1024)
    if peft:
        return theirs(base, list(tokens.examples), size, getattr(torch, who.split("-")[1]), args.steps)
    watch = memory.PeakMeter()
    model = TrainableModel(base, share_prefix=who != "ours-unshared")
    held = sum(w.nbytes for w in base.weights.values())
    events: list[Event] = []
    keep_few_kernels()
    made = watch.peak().peak or 0  # the run resets the meter
    config = TrainingConfig(
        max_steps=WARM_UP + args.steps,
        batch_size=size,
        micro_tokens=args.micro_tokens,
        activation_checkpointing=who == "ours-recompute",
    )
    if who == "ours-full":
        train_dense(model, tokens, replace(config, learning_rate=1e-5), events.append)
    else:
        train(model, tokens, config, on_event=events.append)
    steps = [e for e in events if e.kind == "step"]
    timed = steps[WARM_UP - 1], steps[-1]
    peak = watch.peak()
    return {
        "tokens_per_second": (timed[1].tokens - timed[0].tokens) / (timed[1].seconds - timed[0].seconds),
        "peak": max(made, peak.peak or 0) - (peak.before or 0) + held,
        "loss": sum(e.loss for e in steps[WARM_UP:]) / args.steps,
    }


def theirs(base: Base, examples: list[Example], size: int, dtype: torch.dtype, steps: int) -> dict[str, Any]:
    """Transformers + PEFT: batches of similar length, dynamic padding, AdamW, loss on the same tokens."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    c = base.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("vocab_size", "rms_norm_eps", "tie_word_embeddings", "max_position_embeddings")
    config = LlamaConfig(
        **{n: getattr(c, n) for n in names}, rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta}
    )
    state = {f"{path}.weight": base.backend.dequantize(w).to(dtype) for path, w in base.weights.items()}
    state |= {name: tensor.to(dtype) for name, tensor in base.tensors.items()}
    watch = memory.PeakMeter()
    before = (watch.before or 0) - sum(t.nbytes for t in state.values())
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    del state
    spec = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, spec).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-4)
    # Batches of similar lengths, in shuffled order.
    ordered = sorted(examples, key=lambda e: len(e.ids))
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    batches = [batches[(i * 7) % len(batches)] for i in range(len(batches))] if len(batches) % 7 else batches
    loss_sum = seconds = 0.0
    tokens = 0
    for i, batch in enumerate(batches[: WARM_UP + steps]):
        started = time.perf_counter()
        width = max(len(e.ids) for e in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, e in enumerate(batch):
            n = len(e.ids)
            ids[row, :n], mask[row, :n] = torch.tensor(e.ids), 1
            labels[row, :n] = torch.where(torch.tensor(e.learned), ids[row, :n], -100)
        loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if i >= WARM_UP:
            seconds += time.perf_counter() - started
            tokens += sum(len(e.ids) for e in batch)
            loss_sum += float(loss.detach())
    peak = watch.peak()
    return {
        "tokens_per_second": tokens / seconds,
        "peak": (peak.peak or 0) - before,
        "loss": loss_sum / steps if steps else math.nan,
    }


if __name__ == "__main__":
    main()
