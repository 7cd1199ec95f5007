"""`loramux doctor`: reports what this machine offers and what would keep the server from starting.

It downloads nothing, changes nothing, and reads only the headers and the tokenizer of the model.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters import memory
from server.cli.checks import check_state_dir, listen
from server.errors import ServerError
from server.settings import Settings

if TYPE_CHECKING:
    from server.model.checkpoint import Checkpoint

INSTRUCTION_SETS = {
    "x86_64": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "sve"),
}
"""CPU features that the kernels use, as /proc/cpuinfo names them."""
WEIGHT_FILES = (".safetensors", ".gguf")
MIN_OPEN_FILES = 1024
MIN_DISK = 1 << 20
"""Free bytes below which the disk counts as full."""


@dataclass
class Report:
    """Result of the checks: facts in display order, problems that prevent a start, and warnings."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {"ok": not self.problems, "facts": self.facts, "problems": self.problems, "notes": self.warnings}


def examine(settings: Settings) -> Report:
    """Check installation, processor, memory, GPU, kernels, model, state directory, keys and address."""
    report = Report()
    checks: tuple[Callable[[Settings, Report], None], ...] = (
        _installation,
        _processor,
        _memory,
        _torch,
        _kernels,
        _model,
        _state_dir,
        _keys,
        _address,
    )
    for check in checks:
        try:
            check(settings, report)
        except ServerError as error:
            report.problems.append(error.message)
        except (ImportError, OSError) as error:  # several checks import torch
            message = f"{type(error).__name__}: {error}"
            if message not in report.problems:
                report.problems.append(message)
    return report


def _installation(settings: Settings, report: Report) -> None:
    owners = packages_distributions()
    for package in ("adapters", "server"):
        installed = sorted(set(owners.get(package, ())))
        if len(installed) > 1:
            report.problems.append(
                f"{' and '.join(installed)} each install a Python package named {package!r} and may have overwritten "
                "each other's files. Install loramux in a separate environment."
            )


def _processor(settings: Settings, report: Report) -> None:
    from server.kernels import cpu_info
    from server.kernels.threads import available_cpus

    cores = available_cpus()
    threads = settings.threads or cores
    report.facts["cores"] = f"{cores} of {os.cpu_count()}"
    report.facts["threads"] = str(threads)
    if threads > cores:
        report.warnings.append(f"{threads} threads are slower than {cores} on {cores} cores. Omit --threads.")
    features = cpu_info.features()
    found = [name for name in INSTRUCTION_SETS.get(platform.machine(), ()) if name in features]
    name = cpu_info.cpuinfo_field("model name") or platform.machine()
    report.facts["processor"] = f"{name} ({', '.join(found) or 'no vector extensions'})"


def _memory(settings: Settings, report: Report) -> None:
    free, limit, most = memory.free(), memory.limit(), memory.most()
    if limit is not None:
        report.facts["memory limit"] = f"{_gib(limit)} for this container"
    report.facts["memory"] = f"{_gib(free)} free of {_gib(memory.total())}"
    kv_cache = 0 if _uses_gpu(settings) else settings.kv_cache or 0
    adapter_ram = settings.adapter_ram if "adapter_ram" in settings.model_fields_set else 0
    if kv_cache > most:
        report.problems.append(f"--kv-cache is larger than the memory of this machine ({_gib(most)}). Lower it.")
    elif kv_cache + adapter_ram > free:
        sizes = {"--adapter-ram": adapter_ram, "--kv-cache": kv_cache}
        flags = " and ".join(flag for flag, size in sizes.items() if size)
        report.warnings.append(
            f"{flags} may use {_gib(kv_cache + adapter_ram)}, but only {_gib(free)} is free. Lower the limits."
        )
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # the server raises its limit to this
    report.facts["open files"] = "no limit" if files == resource.RLIM_INFINITY else str(files)
    if 0 <= files <= MIN_OPEN_FILES:
        report.warnings.append(f"{files} open files may be too few for many clients. Raise the limit (ulimit -Hn).")


def _uses_gpu(settings: Settings) -> bool:
    from server.kernels import cuda

    return settings.device != "cpu" and settings.kernels in ("auto", "cuda") and cuda.unavailable() is None


def _torch(settings: Settings, report: Report) -> None:
    import torch

    from server.kernels import cuda

    report.facts["torch"] = str(torch.__version__)
    driver = _driver()
    if driver:
        report.facts["GPU driver"] = driver
    if torch.cuda.is_available():
        try:
            free, total = torch.cuda.mem_get_info()
            major, minor = torch.cuda.get_device_capability()
            name = torch.cuda.get_device_name()
            report.facts["GPU"] = f"{name}, capability {major}.{minor}, {_gib(free)} free of {_gib(total)}"
        except RuntimeError as e:
            report.facts["GPU"] = "not responding"
            found = report.warnings if settings.device == "cpu" else report.problems
            found.append(f"The GPU does not respond: {str(e).splitlines()[0]}")
            return
    else:
        report.facts["GPU"] = "none that torch can use"
    reason = cuda.unavailable()
    if driver or torch.cuda.is_available():
        report.facts["CUDA kernels"] = "available" if reason is None else f"not available: {reason}"
        if reason is not None:
            report.warnings.append(f"The GPU is not used: {reason}")


def _driver() -> str:
    """The version line of the NVIDIA driver, empty without one."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].removeprefix("NVRM version:").strip() if path.exists() else ""


def _kernels(settings: Settings, report: Report) -> None:
    from server.kernels import choose, cpu

    reason = cpu.unavailable()
    chosen = choose(settings.kernels, settings.device).name
    report.facts["kernels"] = f"native, for {cpu.instructions()}" if chosen == "native" else chosen
    if reason is not None and chosen != "cuda":
        report.facts["native kernels"] = f"not available: {reason}"
        report.warnings.append("The native kernels are not available. torch operations are used; they are slower.")


def _model(settings: Settings, report: Report) -> None:
    from server.model.checkpoint import open_checkpoint
    from server.model.loader import check_vocabulary
    from server.model.tokenizer import ModelTokenizer
    from server.sources import hub
    from server.sources.models import locate, no_folder

    found = locate(settings.model, settings.state_dir)
    if found is None:
        report.facts["base"] = f"{settings.model}, not downloaded"
        as_id = hub.is_id(settings.model)
        prefix = f"{no_folder(settings.model)} " if as_id else ""
        report.warnings.append(f"{prefix}`loramux pull {settings.model}`, or the first start, downloads the base.")
        return
    folder = [found.path] if found.path.is_file() else list(found.path.iterdir())
    size = sum(p.stat().st_size for p in folder if p.is_file() and (p == found.path or p.suffix in WEIGHT_FILES))
    report.facts["base"] = f"{found.name}, {_gib(size)} at {found.path}"
    checkpoint = open_checkpoint(found.path)
    vocabulary = checkpoint.vocabulary()
    check_vocabulary(vocabulary, checkpoint.config)
    ModelTokenizer(vocabulary)  # raises if the chat template does not parse
    _quantized_size(settings, checkpoint, report)


def _quantized_size(settings: Settings, checkpoint: Checkpoint, report: Report) -> None:
    from server.model.quantization import Quantization, check_group

    served = checkpoint.effective(
        Quantization(settings.quantization, settings.group_size, settings.double_quant, settings.table_bits)
    )
    report.facts["served as"] = served.label
    report.warnings.extend(checkpoint.notes)
    linears, tables = checkpoint.config.linear_shapes(), checkpoint.config.table_shapes()
    quantized = served.scheme != "none"
    if quantized:
        for path, (_, columns) in linears.items():
            check_group(path, columns, served.linear_group)
    size = sum(rows * columns for rows, columns in linears.values()) * (4 if quantized else 16) // 8
    size += sum(rows * columns for rows, columns in tables.values()) * (served.table_bits if quantized else 16) // 8
    free = memory.free()
    if not _uses_gpu(settings) and size > free:
        report.warnings.append(f"The base needs at least {_gib(size)} of memory, but only {_gib(free)} is free.")


def _state_dir(settings: Settings, report: Report) -> None:
    report.facts["state"] = str(settings.state_dir)
    free = shutil.disk_usage(check_state_dir(settings.state_dir)).free
    report.facts["state"] += f", {_gib(free)} of disk free"
    if free <= MIN_DISK:
        report.problems.append(f"The disk of {settings.state_dir} is full. Free some space.")
    elif free < 1 << 30:
        report.warnings.append(f"Only {_gib(free)} of disk is free for adapters and the cache.")


def _keys(settings: Settings, report: Report) -> None:
    from server.api.auth import Keys

    Keys(settings)


def _address(settings: Settings, report: Report) -> None:
    try:
        with listen(settings.host, settings.port) as s:
            report.facts["address"] = f"{settings.host}:{s.getsockname()[1]}, free"
    except ServerError:
        report.facts["address"] = f"{settings.host}:{settings.port}, not available"
        raise


def _gib(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.0f} MiB"
