"""Everything that is claimed of the GPU, in one run of less than ten minutes: one table, and JSON.

    python benchmarks/gpu.py [--json FILE] [--only NAME ...] [--answers PART ...] [--check]

Needs one GPU, torch and the numpy that it shares arrays with, triton, safetensors, tokenizers and prometheus-client; no
network, and nothing of this project installed. Speed is measured on random weights of Qwen2.5-7B's shape. `--answers`
takes a folder that `loramux quantize` wrote, or several that hold its files in parts (NAME.part0, NAME.part1, ... are
joined), and compares greedy answers with the reference on the CPU.
`--check` runs everything on a tiny model, without a GPU in Triton's interpreter: that it runs, not how fast. Without
either, the table says of each claim that it is not measured, and the exit status is 1. JSON goes to gpu.json, or to
the FILE; the end of the resident set is drawn beside it, as cliff.svg.

A fraction of the roofline is the time that the bytes of a step take at the bandwidth that is measured here first (base
without its embedding table, distinct adapters, keys and values), over the time of the step: tokens drawn and brought to
the host included. "By its bytes" is what a ratio would be if reading were all that takes time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import statistics
import sys
import threading
import time

BEGAN = time.monotonic()
"""What is imported next takes seconds of the ten minutes."""

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not __package__:
    sys.path.insert(
        0, str(Path(__file__).resolve().parents[1])
    )  # as a file: the folder of these scripts is there alone

if __name__ == "__main__" and "--check" in sys.argv and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import numpy as np
import torch

try:
    import triton.language.target_info
except ImportError:  # it is not installed, or older than what brought this
    from server.errors import install_command

    sys.exit(f"the kernels are written in Triton, 3.5 or newer: {install_command('cuda')}")

from adapters.atomic_files import replace_file
from adapters.weights import LoraWeights
from benchmarks import gpu_answers, gpu_ceilings, gpu_kernels, gpu_load, gpu_peers, gpu_products
from benchmarks.gpu_base import Kind, RandomBase, random_adapters, random_base
from benchmarks.shapes import QWEN_7B
from server.engine.backends.cuda.runner import CudaRunner, gpu_memory
from server.engine.batch import Batch, SlotWeights
from server.kernels.cuda import Cuda, unavailable
from server.kernels.cuda.launch import options
from server.kernels.lora import TARGET_MODULES
from server.model.config import ModelConfig, from_hf

BLOCK = 16
SECONDS = 480.0
"""No section begins later than this, so that the table is there within ten minutes."""
CUT_OFF_SECONDS = 580
"""Whatever is measured then is cut off, and the table is what is known: an engine that is within a step may take ten
seconds more to end."""
LEFT_SECONDS = 20
"""Before that, whatever looks at the clock ends by itself."""
HUNG_SECONDS = 595
"""Whoever has not ended by then waits for a device that answers no more."""
REASON = 800
"""Characters of a failure's reason that the table has, from its end; the JSON has them all."""
FOUR = str(Kind(16, TARGET_MODULES[:4]))
"""The adapters that S-LoRA has."""
CLAIMS: dict[str, dict[str, Any]] = {
    "memory": {"base resident, bytes": "<= 4.7e9"},
    "decode": {
        "decode, batch 1, no adapter: of the roofline": 0.5,
        "decode, batch 32, 32 adapters of rank 16 on all linears: of the base's step time": "<= 1.25",
        f"decode, batch 32, 32 adapters of {FOUR}: of the base's step time": "<= 1.25",
        "rank 16 on all linears: of the roofline with the adapters counted": 0.5,
        f"{FOUR}: of the roofline with the adapters counted": 0.5,
    },
    "placing": {
        "adapter host to device, ms": "< 4",
        "a copy before each step: of its time, seen in the steps'": "<= 0.2",
    },
    "load": {
        "1000 adapters in RAM (copies of 32 buffers) against 5, rank 16 on all linears": 0.95,
        f"1000 adapters in RAM (copies of 32 buffers) against 5, {FOUR}": 0.95,
    },
    "peers": {"decode of 32 mixed requests over Transformers + PEFT bf16": 10},
    "answers": {gpu_answers.CLAIM: 200},
}
"""What is claimed, by section, and at least what, as the table tells it."""
DRIVER = Path("/proc/driver/nvidia/version")
"""Torch does not know it."""
TINY: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip


class Bench:
    """The model, the runner on it once it is made, and how things are timed here."""

    def __init__(self, check: bool, file: Path | None) -> None:
        self.check = check
        self.file = file
        """Where what is told is written as JSON, if anywhere."""
        self.section = ""
        self.is_last = False
        """Whether no other section comes after this one."""
        self.cut_off = math.inf if check else BEGAN + CUT_OFF_SECONDS - LEFT_SECONDS
        """When nothing may be measured any more, on the monotonic clock; what is only checked has no such end."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.machine = _machine(self.device)
        """Asked for once: after a fault the device tells nothing, and what was measured before it is to be told."""
        backend = Cuda(torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.shape = TINY if check else QWEN_7B
        self.config: ModelConfig = from_hf(self.shape)
        self.backend = backend
        self.kinds = (Kind(4), Kind(2, TARGET_MODULES[:4])) if check else (Kind(16), Kind(16, TARGET_MODULES[:4]))
        """The adapters that are claimed about: on all linears, and on those alone that S-LoRA's change."""
        self.rows = 2 if check else 32
        self.context = 20 if check else 256
        self.results: list[dict[str, Any]] = []
        self.bandwidth = self.peak = 1.0
        self.blocks = 12 if check else 32 * 64
        self.folders: list[Path] = []
        """A real base, whose answers are compared."""
        self.pictures = None if file is None else file.parent
        """Where pictures go, if anywhere."""
        self.runner: CudaRunner
        self.made = False
        """Whether there is a runner, and no stuck engine has it: see `model`."""
        self.base_allocated = 0
        """Bytes of the device that loading the base took, as torch counts them there."""
        self._adapters: dict[Kind, list[LoraWeights]] = {}

    def tell(self, name: str, value: Any, target: Any = None, met: bool | None = None, **more: Any) -> None:
        """Print it, and write down all that is known: what is measured next may end the process."""
        met = None if self.check else met  # a tiny model proves nothing
        row = {"name": name, "section": self.section, "value": value, "target": target, "met": met, **more}
        self.results.append(row)
        if self.file is not None:
            replace_file(self.file, json.dumps({**self.machine, "results": self.results}, indent=1).encode())
        limits = ("" if target is None else f"   (at least: {target})") + _by_bytes(more, "   (by its bytes: {})")
        print(f"  {name}: {value}{limits}", flush=True)

    @property
    def is_late(self) -> bool:
        """Whether nothing long should begin any more."""
        return not self.check and time.monotonic() > BEGAN + SECONDS

    def seconds(self, call: Callable[[], object], rounds: int = 30) -> float:
        """Median of the time of `call`, which may be asynchronous, after three to warm up."""
        rounds = 1 if self.check else rounds
        for _ in range(1 if self.check else 3):
            call()
        times = []
        for _ in range(rounds):
            self.wait()
            began = time.perf_counter()
            call()
            self.wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes that torch has allocated on the device now."""
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0

    def batch(self, sequences: int, mixes: tuple[SlotWeights, ...]) -> Batch:
        """One new token for each sequence, of `context` before it."""
        each = self.context // BLOCK + 1
        rows = np.arange(sequences)
        return Batch(
            tokens=rows % self.config.vocab_size,
            positions=np.full(sequences, self.context),
            row_start=np.arange(sequences + 1, dtype=np.int32),
            context=np.full(sequences, self.context + 1, np.int32),
            blocks=(np.arange(sequences * each, dtype=np.int32) % self.blocks).reshape(sequences, each),
            logit_rows=rows,
            mixes=mixes,
        )

    def prompt(self, tokens: int, mix: SlotWeights = ()) -> Batch:
        """The first tokens of one sequence, and the logits of the last."""
        ids, blocks = np.arange(tokens) % self.config.vocab_size, np.arange(-(-tokens // BLOCK), dtype=np.int32)[None]
        starts, context = np.array([0, tokens], np.int32), np.array([tokens], np.int32)
        return Batch(ids, np.arange(tokens), starts, context, blocks, np.array([tokens - 1]), (mix,))

    def step_seconds(self, sequences: int, mixes: tuple[SlotWeights, ...]) -> float:
        """A step from a batch on the host to its greedy tokens on the host, and nothing beside it."""
        batch = self.batch(sequences, mixes)
        how, top_k = np.zeros((sequences, 4), np.float32), np.zeros(sequences, np.int32)
        return self.seconds(lambda: self.runner.draw(self.runner.run(batch), how, top_k).read())

    def running_seconds(
        self, sequences: int, mixes: tuple[SlotWeights, ...], before_each: Callable[[], object] = lambda: None
    ) -> float:
        """A step among others, as the engine runs them: each goes on from the tokens of the one before, which are read
        while it computes, and `before_each` comes before it is launched. The mean of 30 in a row, the median of five
        such runs."""
        batch = self.batch(sequences, mixes)
        batch.tokens[:] = -1 - np.arange(sequences)
        how, top_k = np.zeros((sequences, 4), np.float32), np.zeros(sequences, np.int32)
        count = 2 if self.check else 30

        def steps() -> None:
            before_each()
            before = self.runner.draw(self.runner.run(batch), how, top_k)
            for _ in range(count - 1):
                before_each()
                drawn = self.runner.draw(self.runner.run(batch), how, top_k)
                before.read()
                before = drawn
            before.read()

        return self.seconds(steps, 5) / count

    def adapters(self, kind: Kind) -> list[LoraWeights]:
        """Random ones, one a row. They are made once, as each takes the host a third of a second."""
        if kind not in self._adapters:
            self._adapters[kind] = random_adapters(self.config, self.backend, self.rows, kind)
        return self._adapters[kind]

    def mixed_step_seconds(self, seconds: Callable[[int, tuple[SlotWeights, ...]], float], kind: Kind) -> float:
        """A step of `rows` sequences, each on an adapter of its own."""
        for slot, weights in enumerate(self.adapters(kind)):
            self.runner.load_adapter(slot, weights)
        taken = seconds(self.rows, tuple(((slot, 1.0),) for slot in range(self.rows)))
        for slot in range(self.rows):
            self.runner.unload_adapter(slot)
        return taken

    def step_bytes(self, sequences: int, adapters: float, kind: Kind) -> int:
        """Bytes that a step has to read, with so many distinct adapters in it."""
        config = self.config
        table = config.vocab_size * config.hidden_size * (1 + 2 / 32)
        cache = sequences * self.context * self.runner.block_bytes(1)
        return int(self.runner.nbytes()["base"] - table + self.adapters(kind)[0].nbytes * adapters + cache)


def model(bench: Bench) -> None:
    """The base on the device and its runner: the kernels compiled, the graphs of steps with few adapters made."""
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # what the ceilings were measured on
    began, before = time.perf_counter(), bench.allocated()
    base: RandomBase = random_base(bench.config, bench.backend, bench.device)
    bench.runner = CudaRunner(
        base, bench.rows, memory=gpu_memory(None) if bench.device.type == "cuda" else 1 << 31, device=bench.device,
        adapters=(1 << 20) if bench.check else 20 << 30,
        kv_cache=(1 << 20) if bench.check else 8 << 30,
        context=64 if bench.check else 4096,
    )  # fmt: skip
    base.weights.clear()  # the runner has its own, side by side
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()  # or what packing them took would be told as activations
    others = bench.runner._pool.nbytes + bench.runner._results.nbytes
    bench.base_allocated = bench.allocated() - before - others
    bench.runner.allocate(bench.blocks, BLOCK)
    bench.made = True
    bench.tell("seconds to compile the kernels and make the first graphs", round(time.perf_counter() - began, 1))
    if bench.device.type == "cuda":  # without them steps are launched one kernel at a time, and no figure is worth much
        graphs, overlap = len(bench.runner._graphs), "launch_pdl" in options()
        bench.tell("graphs made at the start", graphs, "> 0", graphs > 0, kernels_overlap=overlap)


def memory(bench: Bench) -> None:
    held = bench.runner.nbytes()
    for kind, size in held.items():
        bench.tell(f"memory: {kind}, GB", round(size / 1e9, 3))
    on_device = bench.base_allocated if bench.device.type == "cuda" else "not measured: no GPU"
    bench.tell("base resident, bytes by the device's own account", on_device)
    bench.tell("base resident, bytes", held["base"], "<= 4.7e9", held["base"] <= 4.7e9)


def decode(bench: Bench) -> None:
    """Steps of single rows at one sequence and many, without adapters and with one for each, among others: the latter
    between two without, as a card's clock goes on changing."""
    kind = bench.kinds[0]
    for n in sorted({1, bench.rows}):
        seconds = bench.running_seconds(n, ((),) * n)
        by_itself = bench.step_seconds(n, ((),) * n)
        share = bench.step_bytes(n, 0, kind) / bench.bandwidth / seconds
        target = (0.5, share >= 0.5) if n == 1 else (None, None)
        bench.tell(
            f"decode, batch {n}, no adapter: of the roofline", round(share, 3), *target, milliseconds=seconds * 1e3,
            milliseconds_by_itself=by_itself * 1e3,
        )  # fmt: skip
        alone = seconds
    n = bench.rows
    for kind in bench.kinds:
        before, seconds = alone, bench.mixed_step_seconds(bench.running_seconds, kind)
        alone = bench.running_seconds(n, ((),) * n)
        base = (before + alone) / 2
        by_itself = bench.mixed_step_seconds(bench.step_seconds, kind)
        share = bench.step_bytes(n, n, kind) / bench.bandwidth / seconds
        bench.tell(
            f"decode, batch {n}, {n} adapters of {kind}: of the base's step time", round(seconds / base, 3),
            "<= 1.25", seconds <= 1.25 * base,
            by_bytes=bench.step_bytes(n, n, kind) / bench.step_bytes(n, 0, kind),
            milliseconds=seconds * 1e3, milliseconds_by_itself=by_itself * 1e3, milliseconds_of_base=base * 1e3,
        )  # fmt: skip
        bench.tell(f"{kind}: of the roofline with the adapters counted", round(share, 3), 0.5, share >= 0.5)


def placing(bench: Bench) -> None:
    """An adapter from RAM to the device; and what is seen of that where one is copied before each step is launched, as
    the engine has them: beside the step that computes."""
    weights, n = bench.adapters(bench.kinds[0])[0], bench.rows

    def place() -> None:
        bench.runner.unload_adapter(n)
        bench.runner.load_adapter(n, weights)

    seconds = bench.seconds(place, 20)
    rate = weights.nbytes / seconds / 1e9
    bench.tell("adapter host to device, ms", round(seconds * 1e3, 3), "< 4", seconds < 4e-3, bytes=weights.nbytes)
    bench.tell("the same, GB/s", round(rate, 1))
    alone = bench.running_seconds(n, ((),) * n)
    beside = bench.running_seconds(n, ((),) * n, place)
    bench.runner.unload_adapter(n)
    seen = (beside - alone) / seconds
    bench.tell("a copy before each step: of its time, seen in the steps'", round(seen, 3), "<= 0.2", seen <= 0.2,
               milliseconds_alone=alone * 1e3, milliseconds_beside=beside * 1e3)  # fmt: skip


def prefill(bench: Bench) -> None:
    """Chunks of one prompt: tokens a second. Of short ones the host, which launches each kernel, may set the time."""
    for n in (24,) if bench.check else (64, 128, 512):
        seconds = bench.seconds(partial(bench.runner.run, bench.prompt(n)), 10)
        bench.tell(f"prefill of {n} tokens, tokens/s", round(n / seconds), milliseconds=seconds * 1e3)


def buckets(bench: Bench) -> None:
    """One row in batches of several sizes: how far its logits are from those it has alone."""
    alone = bench.runner.run(bench.batch(1, ((),))).rows[0].clone()
    for n in (2,) if bench.check else (2, 8, 16, 32):
        among = bench.runner.run(bench.batch(n, ((),) * n)).rows[0]
        far = float((among - alone).abs().max() / alone.std())
        same = bool(among.argmax() == alone.argmax())
        bench.tell(f"one row among {n}: largest difference, of the logits' deviation", round(far, 5), same_token=same)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": gpu_ceilings.ceilings,
    "model": model,
    "memory": memory,
    "products": gpu_products.errors,
    "decode": decode,
    "placing": placing,
    "prefill": prefill,
    "buckets": buckets,
    "load": gpu_load.load,
    "answers": gpu_answers.answers,
    "peers": gpu_peers.peers,
    "kernels": gpu_kernels.kernels,
    "cliff": gpu_load.cliff,
    "ceilings-again": gpu_ceilings.again,
}
"""In this order: first what is claimed, with the kernels that serve, and what takes them two seconds; then what only
explains it. After a fault in a kernel nothing more can be measured, and whoever lends a card may take it back."""
ALWAYS = ("ceilings", "model")
WITHOUT_MODEL = ("ceilings", "model", "answers", "ceilings-again")
"""What needs no runner on the random base."""


def measure(bench: Bench, wanted: list[str]) -> bool:
    """Run the sections of these names; whether all went well. Of one that did not, the reason is told."""
    fine = True
    for name in wanted:
        print(f"{name} ({time.strftime('%X')})", flush=True)
        bench.section, bench.is_last = name, name == wanted[-1]
        failed, reason = "", ""
        if bench.is_late:
            failed, reason = "TimeoutError", f"{SECONDS:.0f} s have passed"
        elif name not in WITHOUT_MODEL and not bench.made:
            failed, reason = "RuntimeError", "there is no model to measure"
        else:
            try:
                SECTIONS[name](bench)
            except (SystemExit, KeyboardInterrupt):
                bench.tell(name, "cut off", met=False)
                raise
            except Exception as error:  # the time on a card is short: what else can be measured is measured
                traceback.print_exc()
                failed, reason = type(error).__name__, traceback.format_exc()
        if failed:
            bench.tell(name, f"failed: {failed}", met=False, reason=reason)
            fine = False
    return fine


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="gpu.json, if none is given and something measured")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS])
    parser.add_argument("--answers", nargs="+", type=Path, default=[], help="a quantized folder, or its parts")
    parser.add_argument("--check", action="store_true", help="a tiny model, and no claim")
    given = parser.parse_args(arguments)
    why = None if given.check else unavailable()
    file = given.json or (None if given.check or why is not None else Path("gpu.json"))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.check, file)
    bench.folders = given.answers
    wanted = [name for name in SECTIONS if name in given.only or name in ALWAYS]
    if why is not None:
        for section, claims in CLAIMS.items():
            bench.section = section
            for name, target in claims.items():
                bench.tell(name, "not measured", target)
        _print(bench)
        print(f"nothing is measured (--check runs it all on a tiny model): {why}", file=sys.stderr)
        return 1
    watch = threading.Timer(max(0.0, BEGAN + HUNG_SECONDS - time.monotonic()), _give_up, (bench, wanted))
    watch.daemon = True
    if not given.check:
        watch.start()
    try:
        fine = measure(bench, wanted)
    finally:  # whoever ends it early sees what is known
        watch.cancel()
        _close(bench, wanted)
    return 0 if fine else 1


def _close(bench: Bench, wanted: list[str]) -> None:
    """Tell of each claim that has no row yet, as it is not met and not forgotten; then print the table."""
    last, told = bench.section, {row["name"]: row["value"] for row in bench.results}
    for bench.section in wanted:
        why = bench.section if bench.section in told else last
        for name, target in {} if bench.check else CLAIMS.get(bench.section, {}).items():
            if name not in told:
                bench.tell(name, "not measured", target, False, reason=f"{why}: {told.get(why)}")
    _print(bench)


def _give_up(bench: Bench, wanted: list[str]) -> None:
    """End a process whose device hangs: while its first thread waits in the driver, no signal is handled there."""
    try:
        bench.tell(bench.section, "hung", met=False)
        _close(bench, wanted)
    finally:
        os._exit(1)


def _print(bench: Bench) -> None:
    """The table. What is claimed comes last, as that is what is seen where only an end is kept."""
    results = bench.results
    width = max((len(row["name"]) for row in results), default=0)
    print("\n" + ", ".join(f"{name} {value}" for name, value in bench.machine.items()))
    print(f"{'what':{width}}  measured        at least    by its bytes  met")
    for row in sorted(results, key=lambda row: row["section"] != "kernels"):
        met = {True: "yes", False: "no", None: ""}[row["met"]]
        limit, bound = row["target"] or "", _by_bytes(row, "{}")
        print(f"{row['name']:{width}}  {row['value']!s:14}  {limit!s:10}  {bound:12}  {met}", flush=True)
        if "reason" in row:
            print("    " + " ".join(row["reason"][-REASON:].split()), flush=True)


def _by_bytes(row: dict[str, Any], form: str) -> str:
    """What the bytes alone would make of a result, if it is told."""
    return form.format(round(row["by_bytes"], 3)) if "by_bytes" in row else ""


def _machine(device: torch.device) -> dict[str, str]:
    """What the numbers are of."""
    found = {"card": "none (interpreted, no measurement)"}
    if device.type == "cuda":
        driver = DRIVER.read_text().partition("\n")[0] if DRIVER.exists() else "unknown"
        found = {"card": torch.cuda.get_device_name(), "driver": driver, "CUDA": str(torch.version.cuda)}
    return {**found, "torch": torch.__version__, "triton": triton.__version__}


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit(1))  # the table is printed on the way out
    if "--check" not in sys.argv:
        signal.alarm(max(1, math.ceil(BEGAN + CUT_OFF_SECONDS - time.monotonic())))
    sys.exit(main())
