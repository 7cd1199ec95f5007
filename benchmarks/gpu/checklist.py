"""The GPU checklist: measures what docs/benchmarks.md claims about GPUs in less than ten minutes.

    python -m benchmarks.gpu [--json FILE] [--only NAME ...] [--answers PART ...] [--check]

Needs a GPU, torch, triton, safetensors, tokenizers and prometheus-client, but no network. Speed is measured on random
weights with the shape of Qwen2.5-7B. `--answers` takes a folder written by `loramux quantize`, or several folders with
its parts (NAME.part0, NAME.part1, ...), and compares greedy answers with the CPU reference kernels. `--check` runs all
sections on a tiny model, without a GPU in Triton's interpreter, to test the scripts. The exit status is 1 if a section
fails or nothing can be measured.

A share of the roofline is the time to read the bytes of a step at the measured bandwidth, over the time of the step.
`by_bytes` is the ratio that results from the bytes alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import answers, kernels, load, peers
from benchmarks.gpu.base import Kind
from benchmarks.gpu.bench import DEADLINE, LAST_START, START, Bench, device_seconds
from server.kernels.cuda import unavailable
from server.kernels.cuda.launch import options as launch_options
from server.kernels.lora import TARGET_MODULES

HANG_TIMEOUT = 595.0
"""Seconds after which the process is killed, because the device does not respond."""
REASON_LENGTH = 800
"""Characters of a traceback in the table."""
ATTENTION = str(Kind(16, TARGET_MODULES[:4]))
CLAIMS: dict[str, dict[str, Any]] = {
    "memory": {"base resident, bytes": "<= 4.7e9"},
    "decode": {
        "decode, batch 1, no adapter: of the roofline": 0.5,
        "decode, batch 32, 32 adapters of rank 16 on all linears: of the base's step time": "<= 1.25",
        f"decode, batch 32, 32 adapters of {ATTENTION}: of the base's step time": "<= 1.25",
        "rank 16 on all linears: of the roofline with the adapters counted": 0.5,
        f"{ATTENTION}: of the roofline with the adapters counted": 0.5,
    },
    "placing": {
        "adapter host to device, ms": "< 4",
        "a copy before each step: of its time, seen in the steps'": "<= 0.2",
    },
    "load": {
        "1000 adapters in RAM (copies of 32 buffers) against 5, rank 16 on all linears": 0.95,
        f"1000 adapters in RAM (copies of 32 buffers) against 5, {ATTENTION}": 0.95,
    },
    "peers": {"decode of 32 mixed requests over Transformers + PEFT bf16": 10},
    "answers": {answers.CLAIM: 200},
}
"""Claims by section, with their targets (at least, unless given with a sign)."""


def ceilings(bench: Bench) -> None:
    """Measure the bandwidth (of a copy or a sum, whichever is higher) and the rate of a large bf16 product."""
    size = 1 << (16 if bench.check else 31)
    source = torch.rand(size // 4, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * size / _minimum_seconds(bench, lambda: target.copy_(source))
    read = size / _minimum_seconds(bench, lambda: source.sum())
    n = 64 if bench.check else 8192
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.backend.dtype) for _ in range(2))
    bench.peak = 2 * n**3 / _minimum_seconds(bench, lambda: a @ b)
    bench.bandwidth = max(copied, read)
    bench.record("bandwidth, GB/s", round(bench.bandwidth / 1e9, 1), copied=copied / 1e9, read=read / 1e9)
    bench.record("bf16 products, TFLOP/s", round(bench.peak / 1e12, 1))


def _minimum_seconds(bench: Bench, call: Callable[[], object]) -> float:
    """The minimum of ten measurements, after a second of work to raise the clocks of the card."""
    if bench.device.type != "cuda":
        return bench.seconds(call)
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        device_seconds(call, 10)
    return min(device_seconds(call, 10) for _ in range(10))


def model(bench: Bench) -> None:
    """Load the base on the device, compile the kernels and capture the graphs."""
    start = time.perf_counter()
    bench.load_model()
    bench.record("seconds to compile the kernels and make the first graphs", round(time.perf_counter() - start, 1))
    if bench.device.type == "cuda":
        graphs = len(bench.runner._graphs)
        bench.record("graphs made at the start", graphs, "> 0", graphs > 0,
                     kernels_overlap="launch_pdl" in launch_options())  # fmt: skip


def memory(bench: Bench) -> None:
    """Device memory by purpose."""
    held = bench.runner.nbytes()
    for kind, size in held.items():
        bench.record(f"memory: {kind}, GB", round(size / 1e9, 3))
    on_device = bench.base_allocated if bench.device.type == "cuda" else "not measured: no GPU"
    bench.record("base resident, bytes according to torch", on_device)
    bench.record("base resident, bytes", held["base"], "<= 4.7e9", held["base"] <= 4.7e9)


def decode(bench: Bench) -> None:
    """Decode steps of one and of many sequences, without adapters and with one each.

    A step with adapters is measured between two without, because the clock of the card changes.
    """
    kind, n = bench.kinds[0], bench.rows
    base_seconds = 0.0
    for count in sorted({1, n}):
        base_seconds = bench.running_seconds(count, ((),) * count)
        single = bench.step_seconds(count, ((),) * count)
        share = bench.step_bytes(count, 0, kind) / bench.bandwidth / base_seconds
        target = (0.5, share >= 0.5) if count == 1 else (None, None)
        bench.record(
            f"decode, batch {count}, no adapter: of the roofline", round(share, 3), *target,
            milliseconds=base_seconds * 1e3, milliseconds_by_itself=single * 1e3,
        )  # fmt: skip
    for kind in bench.kinds:
        before, seconds = base_seconds, bench.mixed_step_seconds(bench.running_seconds, kind)
        base_seconds = bench.running_seconds(n, ((),) * n)
        base = (before + base_seconds) / 2
        single = bench.mixed_step_seconds(bench.step_seconds, kind)
        share = bench.step_bytes(n, n, kind) / bench.bandwidth / seconds
        bench.record(
            f"decode, batch {n}, {n} adapters of {kind}: of the base's step time", round(seconds / base, 3),
            "<= 1.25", seconds <= 1.25 * base,
            by_bytes=bench.step_bytes(n, n, kind) / bench.step_bytes(n, 0, kind),
            milliseconds=seconds * 1e3, milliseconds_by_itself=single * 1e3, milliseconds_of_base=base * 1e3,
        )  # fmt: skip
        bench.record(f"{kind}: of the roofline with the adapters counted", round(share, 3), 0.5, share >= 0.5)


def placing(bench: Bench) -> None:
    """Copy an adapter from RAM to the device, alone and before each step."""
    weights, n = bench.adapters(bench.kinds[0])[0], bench.rows

    def place() -> None:
        bench.runner.unload_adapter(n)
        bench.runner.load_adapter(n, weights)

    seconds = bench.seconds(place, 20)
    bench.record("adapter host to device, ms", round(seconds * 1e3, 3), "< 4", seconds < 4e-3, bytes=weights.nbytes)
    bench.record("the same, GB/s", round(weights.nbytes / seconds / 1e9, 1))
    alone = bench.running_seconds(n, ((),) * n)
    beside = bench.running_seconds(n, ((),) * n, place)
    bench.runner.unload_adapter(n)
    seen = (beside - alone) / seconds
    bench.record("a copy before each step: of its time, seen in the steps'", round(seen, 3), "<= 0.2", seen <= 0.2,
                 milliseconds_alone=alone * 1e3, milliseconds_beside=beside * 1e3)  # fmt: skip


def prefill(bench: Bench) -> None:
    """Prefill of prompts of several lengths."""
    for n in (24,) if bench.check else (64, 128, 512):
        seconds = bench.seconds(partial(bench.runner.run, bench.prompt(n)), 10)
        bench.record(f"prefill of {n} tokens, tokens/s", round(n / seconds), milliseconds=seconds * 1e3)


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "model": model,
    "memory": memory,
    "decode": decode,
    "placing": placing,
    "prefill": prefill,
    "load": load.load,
    "answers": answers.answers,
    "peers": peers.peers,
    "kernels": kernels.kernels,
}
"""Sections in their order: the claims first, details last."""
ALWAYS = ("ceilings", "model")
WITHOUT_MODEL = ("ceilings", "model", "answers")


def measure(bench: Bench, names: list[str]) -> bool:
    """Run the sections. Returns whether all succeeded; failures are recorded with their traceback."""
    succeeded = True
    for name in names:
        print(f"{name} ({time.strftime('%X')})", flush=True)
        bench.section, bench.is_last = name, name == names[-1]
        error, reason = "", ""
        if bench.is_late:
            error, reason = "TimeoutError", f"{LAST_START:.0f} s have passed"
        elif name not in WITHOUT_MODEL and not bench.ready:
            error, reason = "RuntimeError", "the model is not loaded"
        else:
            try:
                SECTIONS[name](bench)
            except (SystemExit, KeyboardInterrupt):
                bench.record(name, "cut off", met=False)
                raise
            except Exception as failure:  # measure the other sections
                traceback.print_exc()
                error, reason = type(failure).__name__, traceback.format_exc()
        if error:
            bench.record(name, f"failed: {error}", met=False, reason=reason)
            succeeded = False
    return succeeded


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the results [gpu.json]")
    parser.add_argument("--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS], help="sections to run")
    parser.add_argument("--answers", nargs="+", type=Path, default=[], help="a quantized folder, or its parts")
    parser.add_argument("--check", action="store_true", help="run on a tiny model, without measurements")
    given = parser.parse_args(arguments)
    why = None if given.check else unavailable()
    file = given.json or (None if given.check or why is not None else Path("gpu.json"))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
    bench = Bench(given.check, file)
    bench.folders = given.answers
    names = [name for name in SECTIONS if name in given.only or name in ALWAYS]
    if why is not None:
        for bench.section, claims in CLAIMS.items():
            for name, target in claims.items():
                bench.record(name, "not measured", target)
        print_table(bench)
        print(f"nothing is measured (--check tests the scripts): {why}", file=sys.stderr)
        return 1
    watch = threading.Timer(max(0.0, START + HANG_TIMEOUT - time.monotonic()), _kill, (bench, names))
    watch.daemon = True
    if not given.check:
        watch.start()
    try:
        succeeded = measure(bench, names)
    finally:
        watch.cancel()
        _finish(bench, names)
    return 0 if succeeded else 1


def run_with_deadline() -> int:
    """Run `main`, and stop it at the deadline with the results so far."""
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, lambda *_: sys.exit(1))
    if "--check" not in sys.argv:
        signal.alarm(max(1, math.ceil(START + DEADLINE - time.monotonic())))
    return main()


def _finish(bench: Bench, names: list[str]) -> None:
    """Record claims without a result as not met, and print the table."""
    last, found = bench.section, {row["name"]: row["value"] for row in bench.results}
    for bench.section in names:
        cause = bench.section if bench.section in found else last
        for name, target in {} if bench.check else CLAIMS.get(bench.section, {}).items():
            if name not in found:
                bench.record(name, "not measured", target, False, reason=f"{cause}: {found.get(cause)}")
    print_table(bench)


def _kill(bench: Bench, names: list[str]) -> None:
    """End the process when the device hangs: the main thread waits in the driver and handles no signals."""
    try:
        bench.record(bench.section, "hung", met=False)
        _finish(bench, names)
    finally:
        os._exit(1)


def print_table(bench: Bench) -> None:
    """Print all results; the details of kernels come first."""
    width = max((len(row["name"]) for row in bench.results), default=0)
    print("\n" + json.dumps(bench.machine))
    print(f"{'name':{width}}  measured        target      by bytes  met")
    for row in sorted(bench.results, key=lambda row: row["section"] != "kernels"):
        met = {True: "yes", False: "no", None: ""}[row["met"]]
        by_bytes = str(round(row["by_bytes"], 3)) if "by_bytes" in row else ""
        print(
            f"{row['name']:{width}}  {row['value']!s:14}  {row['target'] or ''!s:10}  {by_bytes:8}  {met}", flush=True
        )
        if "reason" in row:
            print("    " + " ".join(row["reason"][-REASON_LENGTH:].split()), flush=True)
