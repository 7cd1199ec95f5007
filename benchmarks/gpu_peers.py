"""Transformers + PEFT on the same card and the same shape: a mixed batch, each request on its own adapter."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch


def peers(bench: Any) -> None:
    """32 requests on 32 adapters: our tokens a second over theirs, in bf16 and, if it is there, bitsandbytes'."""
    if bench.check or any(importlib.util.find_spec(name) is None for name in ("transformers", "peft")):
        bench.tell("Transformers + PEFT", "not measured")
        return
    n = bench.rows
    ours = n / bench.mixed_step_seconds(bench.running_seconds, bench.kinds[0])
    kinds = ["bf16"] + (["bitsandbytes"] if importlib.util.find_spec("bitsandbytes") else [])
    for kind in kinds:
        theirs = _tokens_a_second(bench, kind)
        ratio = ours / theirs
        met = {"target": 10, "met": ratio >= 10} if kind == "bf16" else {}
        bench.tell(f"decode of {n} mixed requests over Transformers + PEFT {kind}", round(ratio, 2), **met,
                   ours=ours, theirs=theirs)  # fmt: skip


def _tokens_a_second(bench: Any, weights: str) -> float:
    """Of a decoding batch, from the difference of two generations, so that the prefill does not count."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from benchmarks.shapes import QWEN_7B

    shape = {k: v for k, v in QWEN_7B.items() if k != "architectures"}
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            model = Qwen2ForCausalLM(Qwen2Config(**shape, eos_token_id=None))
    finally:
        torch.set_default_dtype(torch.float32)
    if weights == "bitsandbytes":
        _into_four_bits(model)
    names = [f"a{i}" for i in range(bench.rows)]
    kind = bench.kinds[0]
    options: dict[str, Any] = {"r": kind.rank, "target_modules": list(kind.linears)}
    wrapped: Any = get_peft_model(model, LoraConfig(**options), adapter_name=names[0], autocast_adapter_dtype=False)
    for name in names[1:]:
        wrapped.add_adapter(name, LoraConfig(**options), autocast_adapter_dtype=False)
    wrapped.to(bench.device).eval()
    prompt = torch.randint(1, 1000, (bench.rows, bench.context), device=bench.device)
    times = []
    for count in (2, 2, 18):  # the first warms up
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.inference_mode():
            wrapped.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), adapter_names=names, do_sample=False,
                min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
            )  # fmt: skip
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    del wrapped, model
    torch.cuda.empty_cache()
    return 16 * bench.rows / (times[2] - times[1])


def _into_four_bits(model: Any) -> None:
    """Make the model's linears bitsandbytes' NF4 with double quantization, of the weights that they have; the head
    stays. (Transformers' own way makes empty ones, which a checkpoint is then read into.)"""
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
