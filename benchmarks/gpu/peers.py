"""Decode speed compared with Transformers + PEFT on the same GPU, with a different adapter for each request."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
import traceback
from contextlib import suppress
from typing import Any

import torch

from benchmarks.gpu.bench import Bench

KINDS = {"bf16": ("transformers", "peft"), "bitsandbytes": ("transformers", "peft", "bitsandbytes")}
"""Peers and their packages."""
TOKENS = 4
"""Difference in length of two generations. PEFT applies about 6,000 adapter layers one by one in a pass."""
DIFFERENCES = 3
"""Number of measurements; fewer if the time is over."""


def peers(bench: Bench) -> None:
    """Compare 32 requests on 32 adapters with PEFT in bf16 and in bitsandbytes' NF4.

    Raises the first error of a peer after all are measured.
    """
    n, ours = bench.rows, None
    failed: list[Exception] = []
    for kind, needed in KINDS.items():
        name = f"decode of {n} mixed requests over Transformers + PEFT {kind}"
        target = 10 if kind == "bf16" else None
        missing = "the time is over" if bench.is_late else _missing(needed)
        if missing is not None:
            bench.record(name, f"not measured: {missing}", target, None if target is None else False)
            continue
        ours = ours or n / bench.mixed_step_seconds(bench.running_seconds, bench.kinds[0])
        try:
            theirs = _tokens_a_second(bench, kind)
        except Exception as error:
            traceback.print_exc()
            bench.record(name, f"failed: {type(error).__name__}", target, False, reason=traceback.format_exc())
            failed.append(error.with_traceback(None))  # its frames hold the model
            continue
        finally:
            gc.collect()  # modules have reference cycles
            if bench.device.type == "cuda":
                with suppress(RuntimeError):  # fails during a broken graph capture
                    torch.cuda.empty_cache()
        ratio = ours / theirs
        bench.record(
            name, round(ratio, 2), target, None if target is None else ratio >= target, ours=ours, theirs=theirs
        )
    if failed:
        raise failed[0]


def _missing(names: tuple[str, ...]) -> str | None:
    """Why the packages cannot be imported, or None."""
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError) as error:
            return f"{name} cannot be imported ({type(error).__name__})"
    return None


def _tokens_a_second(bench: Bench, weights: str) -> float:
    """Decode speed from the differences of two generations, which cancel the prefill."""
    model = _model(bench, weights)
    prompt = torch.randint(1, bench.config.vocab_size, (bench.rows, bench.context), device=bench.device)
    _seconds(bench, model, prompt, 2)  # warms up
    more: list[float] = []
    while not more or (len(more) < DIFFERENCES and not bench.is_late):
        more.append(_seconds(bench, model, prompt, 2 + TOKENS) - _seconds(bench, model, prompt, 2))
    return TOKENS * bench.rows / statistics.median(more)


def _seconds(bench: Bench, model: Any, prompt: torch.Tensor, count: int) -> float:
    """Seconds to generate `count` greedy tokens for each prompt, each with its own adapter."""
    bench.wait()
    began = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
            adapter_names=[f"a{i}" for i in range(bench.rows)], min_new_tokens=count, max_new_tokens=count,
        )  # fmt: skip
    bench.wait()
    return time.perf_counter() - began


def _model(bench: Bench, weights: str) -> Any:
    """A PEFT model of our shape with as many adapters, in bf16 on the device."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = {k: v for k, v in bench.shape.items() if k != "architectures"}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            model = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=None))
    finally:
        torch.set_default_dtype(before)
    if weights == "bitsandbytes":
        _into_four_bits(model)
    kind = bench.kinds[0]
    options: dict[str, Any] = {"r": kind.rank, "target_modules": list(kind.linears)}
    with torch.device(bench.device):  # random initialization is slow on the CPU
        wrapped: Any = get_peft_model(model, LoraConfig(**options), adapter_name="a0", autocast_adapter_dtype=False)
        for number in range(1, bench.rows):
            wrapped.add_adapter(f"a{number}", LoraConfig(**options), autocast_adapter_dtype=False)
    wrapped.to(bench.device).eval()
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # PEFT keeps them in float32 for quantized weights
            parameter.data = parameter.data.to(torch.bfloat16)
    return wrapped


def _into_four_bits(model: Any) -> None:
    """Replace the linear layers except the head with bitsandbytes NF4 layers (double quantization) of their weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for name, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        with torch.device("meta"):
            made = Linear4bit(
                module.in_features, module.out_features, module.bias is not None,
                compute_dtype=torch.bfloat16, quant_type="nf4",
            )  # fmt: skip
        made.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4")
        made.bias = module.bias
        model.set_submodule(name, made.to(module.weight.device))
    model.is_loaded_in_4bit = True  # PEFT looks here
