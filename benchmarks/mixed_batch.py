"""One batch of requests, each on its own adapter: this engine against Transformers + PEFT (`adapter_names`).

    python -m benchmarks.mixed_batch BASE.gguf [--kernels aten] [--requests 16] [--rounds 5] [--tokens 32]

Each runs in a process of its own, so that neither has the other's threads beside its own, on the same weights (PEFT's
are the dequantized ones, in bf16), with random adapters of ranks 8 to 32 on q, k, v and o, prompts of 128 random tokens
and greedy decoding, taking turns: a round begins with the one that the last began with second. Prints medians in tokens
a second and the ratio; nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from adapters.peft_format import save
from adapters.weights import LowRank, with_digest
from benchmarks.local_engine import LocalEngine
from server.kernels import choose
from server.model.config import to_hf
from server.model.loader import Base, load_base

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANKS = (8, 16, 24, 32)


def write_adapters(base: Base, folder: Path, count: int) -> list[Path]:
    """PEFT folders of random adapters."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(count):
        rank = RANKS[i % len(RANKS)]
        modules = {
            path: LowRank(
                torch.randn(rank, width, generator=generator) * width**-0.5,
                torch.randn(out, rank, generator=generator) * 0.01,
                2.0,
            )
            for path, (out, width) in base.shapes().items()
            if path.endswith(TARGETS)
        }
        paths.append(folder / f"a{i}")
        save(with_digest(f"a{i}", modules), paths[-1], dtype=torch.bfloat16, shapes=base.shapes())
    return paths


def peft_model(base: Base, adapters: list[Path]) -> Any:
    """The same weights in Transformers, bf16, with every adapter loaded."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = to_hf(base.config)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    state = {f"{path}.weight": base.backend.dequantize(weight) for path, weight in base.weights.items()}
    model.load_state_dict(state | dict(base.tensors), strict=False)
    tuned = PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for i, path in enumerate(adapters[1:], 1):
        tuned.load_adapter(path, adapter_name=f"a{i}")
    return tuned.to(torch.bfloat16).eval()


def serve_ours(pipe: Connection, args: argparse.Namespace, paths: list[Path]) -> None:
    """In a child: (tokens) -> (seconds to all first tokens, seconds to all last ones), until the pipe is closed."""
    base = load_base(args.base, name="base", backend=choose(args.kernels))
    prompts = prompts_of(args, base.config.vocab_size).tolist()
    every_prompt = args.requests * args.prompt
    with LocalEngine(base, paths, threads=args.threads, max_batch=args.requests, max_step_tokens=every_prompt) as ours:
        mixes = [ours.mix([(i, 1.0)]) for i in range(args.requests)]
        for tokens in iter(pipe.recv, None):
            pipe.send(ours.rates(prompts, mixes, tokens))


def serve_peft(pipe: Connection, args: argparse.Namespace, paths: list[Path]) -> None:
    """The same for Transformers + PEFT."""
    torch.set_num_threads(args.threads)
    base = load_base(args.base, name="base", backend=choose(args.kernels))
    prompts = prompts_of(args, base.config.vocab_size)
    model = peft_model(base, paths)
    for tokens in iter(pipe.recv, None):
        pipe.send((peft_seconds(model, prompts, 1), peft_seconds(model, prompts, tokens)))


def prompts_of(args: argparse.Namespace, vocab_size: int) -> torch.Tensor:
    """int64 [requests, prompt]."""
    shape = (args.requests, args.prompt)
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(1))


def peft_seconds(model: Any, prompts: torch.Tensor, tokens: int) -> float:
    """Seconds to the last of `tokens` tokens of every prompt, in one mixed batch."""
    start = time.perf_counter()
    with torch.no_grad():
        model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
            adapter_names=[f"a{i}" for i in range(len(prompts))],
        )
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("--kernels", default="aten")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {"loramux": [], "peft": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_pipes:
        base = load_base(args.base, name="base", backend=choose(args.kernels))
        paths = write_adapters(base, Path(folder), args.requests)
        context = get_context("spawn")
        pipes: dict[str, Connection] = {}
        for name, serve in (("loramux", serve_ours), ("peft", serve_peft)):
            pipes[name], theirs = context.Pipe()
            child = context.Process(target=serve, args=(theirs, args, paths), daemon=True)
            child.start()
            theirs.close()
            open_pipes.callback(child.join)
            open_pipes.callback(pipes[name].send, None)
        for pipe in pipes.values():  # the first call of each is not counted
            pipe.send(2)
            pipe.recv()
        for turn in range(args.rounds):
            for name in sorted(pipes, reverse=turn % 2 == 1):
                pipes[name].send(args.tokens)
                times[name].append(pipes[name].recv())
    result: dict[str, Any] = {"kernels": args.kernels, "requests": args.requests}
    for name, pairs in times.items():
        result[name] = {
            "prefill": statistics.median(args.requests * args.prompt / first for first, _ in pairs),
            "decode": statistics.median(args.requests * (args.tokens - 1) / (last - first) for first, last in pairs),
            "whole": statistics.median(args.requests * args.tokens / last for _, last in pairs),
        }
    result["ratio"] = {key: result["loramux"][key] / result["peft"][key] for key in ("prefill", "decode", "whole")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
