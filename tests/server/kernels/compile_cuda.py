"""Compiles the kernels of a model's steps to machine code, without a GPU.

`python tests/server/kernels/compile_cuda.py [small|7b] [capability]` builds a model of tensors without data, runs a
prefill and decode steps, and compiles each distinct launch instead of running it. It prints one line per kernel. The
exit status is 1 if a kernel does not compile, needs too much shared memory, or accesses memory before it waits for the
previous kernel.
"""

from __future__ import annotations

import os
import re
import sys
import time
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from server.engine.backends.cuda.batch import GraphShape, device_step
from server.engine.backends.cuda.device_model import DeviceModel
from server.kernels.cuda import packing, sampling
from server.kernels.cuda.lora import DeviceAdapters
from server.kernels.cuda.matmul import dequantized, group_sums
from server.kernels.lora import TARGET_MODULES
from server.kernels.packed_format import stored_parts
from server.kernels.weight import STORED, Weight
from server.model.config import ModelConfig, from_hf

SHARED = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Bytes of shared memory per thread block, by capability."""
META = torch.device("meta")
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.int8: "i8",
}  # fmt: skip


def small() -> ModelConfig:
    return from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"], "vocab_size": 512, "hidden_size": 512, "intermediate_size": 1024,
            "num_hidden_layers": 1, "num_attention_heads": 8, "num_key_value_heads": 2,
            "max_position_embeddings": 512, "tie_word_embeddings": True,
        }
    )  # fmt: skip


def seven_billion() -> ModelConfig:
    from benchmarks.shapes import QWEN_7B

    return from_hf({**QWEN_7B, "num_hidden_layers": 1})


class Shapes:
    """A base model whose tensors have no data."""

    def __init__(self, config: ModelConfig, scheme: str, double: bool) -> None:
        self.config = config
        tables = {path: self._weight(shape, "int8", 32, False) for path, shape in config.table_shapes().items()}
        linears = {path: self._weight(shape, scheme, 64, double) for path, shape in config.linear_shapes().items()}
        self.weights = tables | linears
        self.tensors = {name: torch.empty(shape, device=META) for name, shape in config.tensor_shapes().items()}

    @staticmethod
    def _weight(shape: tuple[int, int], scheme: str, group: int, double: bool) -> Weight:
        parts = {"codes": (torch.bfloat16, shape)} if scheme == "none" else stored_parts(scheme, shape, group, double)
        tensors = {name: torch.empty(size, dtype=dtype, device=META) for name, (dtype, size) in parts.items()}
        return packing.pack(Weight(scheme, STORED, shape, group, tensors))


class Driver:
    """Reports the target to kernels that query it."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target


class Compiler:
    """Replaces `JITFunction.run`: compiles each distinct launch once."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)
        driver.set_active(Driver(self.target))
        self.max_shared = SHARED[capability]
        self.seen: set[Any] = set()
        self.failed: list[str] = []

    def launch(self, kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        names = list(kernel.arg_names)
        options = {k: v for k, v in kwargs.items() if k not in names}
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        signature, constants, attributes = {}, {}, {}
        for i, name in enumerate(names):
            value, parameter = arguments[name], kernel.params[i]
            if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
                signature[name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif isinstance(value, float):
                signature[name] = "fp32"
            else:
                signature[name] = "i32"
                if value % 16 == 0 and not parameter.do_not_specialize:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        key = (kernel.__name__, *map(str, (signature, constants, attributes, options)))
        if key in self.seen:
            return
        self.seen.add(key)
        start = time.monotonic()
        label = f"{kernel.__name__} {list(constants.values())} {options}"
        try:
            source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
            made = triton.compile(source, target=self.target, options=options)
        except Exception as error:
            self.failed.append(label)
            print(f"{label}: {type(error).__name__}: {str(error)[-800:]}", flush=True)
            return
        if made.metadata.shared > self.max_shared or not self._waits(made.asm["ptx"]):
            self.failed.append(label)
        print(f"{label}: {made.metadata.shared} bytes shared, {time.monotonic() - start:.1f} s", flush=True)

    def _waits(self, code: str) -> bool:
        """Whether the kernel waits for the previous one before it accesses memory, if dependent launch is supported."""
        if self.target.arch < 90:
            return "griddepcontrol" not in code
        return "griddepcontrol.wait" in re.split(r"(?:ld|st|atom|red)\.(?:\w+\.)*global|cp\.async", code)[0]


def main(which: str, capability: int) -> int:
    compiler = Compiler(capability)
    JITFunction.run = lambda self, *args, **kwargs: compiler.launch(self, *args, **kwargs)  # type: ignore[method-assign]
    config = small() if which == "small" else seven_billion()
    every = [("none", False), ("int4", True), ("int4", False), ("nf4", True)]
    schemes = [("int4", True)] if which == "small" else every
    sizes = [1] if which == "small" else [1, 16, 32, 64]
    for scheme, double in schemes:
        model = DeviceModel(Shapes(config, scheme, double), META, torch.bfloat16)  # type: ignore[arg-type]
        model.make_rotary_tables(256)
        modules = config.num_hidden_layers * len(TARGET_MODULES)
        adapters = DeviceAdapters(
            torch.empty(1 << 20, dtype=torch.bfloat16 if scheme == "none" else torch.int8, device=META),
            torch.empty(64, modules, 3, dtype=torch.int64, device=META),
            torch.empty(64, modules, dtype=torch.int32, device=META),
            torch.empty(64, modules, device=META),
            torch.bfloat16,
        )
        size = (config.num_hidden_layers, 64, config.num_key_value_heads, 2, 16, config.head_dim)
        cache = torch.empty(size, dtype=torch.bfloat16, device=META)
        widths = (64,) if which == "small" else (0, 64)
        shapes = [
            GraphShape.single_rows(n, 16, width, each) for n in sizes for width in widths for each in (False, width > 0)
        ]
        shapes += [
            GraphShape(n, 3, 16, 2, 1, 4, 5, 64, width, 2)
            for n in ((100,) if which == "small" else (100, 512))
            for width in widths
        ]
        if which != "small":  # prompts that are scored have many logits
            shapes += [GraphShape(512, 3, 16, logits, 1, 4, 5, 64, 0, 2) for logits in (100, 200)]
        for shape in shapes:
            memory = torch.empty(shape.elements, dtype=torch.int32, device=META)
            model.logits(device_step(shape, memory), cache, adapters)
    for matrix in model._matrices():  # long prefills, and training
        for dtype in (torch.bfloat16, torch.float32):
            dequantized(matrix._weight, dtype)
    logits = torch.empty(4, config.vocab_size, device=META)
    params, tokens = torch.empty(4, 4, device=META), torch.empty(4, dtype=torch.int32, device=META)
    sampling.sample(logits, params, tokens, tokens)
    sampling.resolve_placeholders(tokens, tokens)
    for matrix in model._matrices():  # as benchmarks use them
        sums = torch.empty(1, matrix.width // matrix.group, device=META)
        group_sums(torch.empty(1, matrix.width, dtype=torch.bfloat16, device=META), matrix.group, sums)
    print(f"{len(compiler.seen)} kernels for capability {capability}, {len(compiler.failed)} failed", flush=True)
    return 1 if compiler.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "small", int(sys.argv[2]) if len(sys.argv) > 2 else 90))
