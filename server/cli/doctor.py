"""`examine`: what this machine offers, what would be used, and what would go wrong, before anything is served.

Fetches nothing, reads no more of the base than headers and tokenizer, changes nothing. Knows the other parts only by
asking them what they would choose.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

from adapters import memory
from adapters.catalog_state import CatalogState
from server.errors import BadSetting, ServerError
from server.settings import Settings
from server.tasks.quality_file import LEAST_ROOM

ISA = {
    "x86_64": ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    "aarch64": ("asimd", "asimddp", "i8mm", "bf16", "sve"),
}
"""Processor features that matter to the kernels, as the kernel's cpuinfo names them."""

_WEIGHTS = (".safetensors", ".gguf")

FEW_FILES = 1024
"""Open files at or below which a busy server may run out."""


@dataclass
class Report:
    """`facts` for people, in order; `problems` keep the server from starting, `remarks` make it slower or smaller."""

    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def describe(self) -> dict[str, Any]:
        return {"ok": not self.problems, "facts": self.facts, "problems": self.problems, "notes": self.remarks}


def examine(settings: Settings) -> Report:
    """Look at what is installed, processor, memory, GPU, kernels, base, disk, keys and port."""
    report = Report()
    checks: tuple[Callable[[Settings, Report], None], ...] = (
        _installed,
        _processor,
        _memory,
        _torch,
        _kernels,
        _base,
        _state_dir,
        _keys,
        _listening,
    )
    for check in checks:
        try:
            check(settings, report)
        except ServerError as error:
            report.problems.append(error.message)
        except (ImportError, OSError) as error:  # of torch's libraries, which several checks want, or of a path
            told = f"{type(error).__name__}: {error}"
            if told not in report.problems:
                report.problems.append(told)
    return report


def _installed(settings: Settings, report: Report) -> None:
    owners = packages_distributions()
    for package in ("adapters", "server"):
        installed = sorted(set(owners.get(package, ())))
        if len(installed) > 1:
            report.problems.append(
                f"{' and '.join(installed)} each install a Python package named {package!r}, and files of one may lie "
                "in place of another's; install loramux in a new environment without the others"
            )


def _processor(settings: Settings, report: Report) -> None:
    from server.kernels import cpu_info
    from server.kernels.threads import available_cpus

    cores = available_cpus()
    report.facts["cores"] = f"{cores} of {os.cpu_count()}"
    threads = settings.threads or cores
    report.facts["threads"] = str(threads)
    if threads > cores:
        report.remarks.append(f"{threads} threads on {cores} cores get in each other's way; leave --threads out")
    known, has = ISA.get(platform.machine(), ()), cpu_info.features()
    found = [name for name in known if name in has]
    report.facts["processor"] = (
        f"{cpu_info.cpuinfo_field('model name') or platform.machine()} ({', '.join(found) or 'plain'})"
    )


def _memory(settings: Settings, report: Report) -> None:
    free, limit, most = memory.free(), memory.limit(), memory.most()
    if limit is not None:
        report.facts["memory limit"] = f"{_gib(limit)} for this container"
    report.facts["memory"] = f"{_gib(free)} free of {_gib(memory.total())}"
    kv_cache = 0 if _on_gpu(settings) else settings.kv_cache or 0
    wanted = kv_cache + (settings.adapter_ram if "adapter_ram" in settings.model_fields_set else 0)
    if kv_cache > most:
        report.problems.append(f"--kv-cache is over the {_gib(most)} that this process may have; lower it")
    elif wanted > free:
        flags = " and ".join(
            flag for flag, nbytes in (("--adapter-ram", wanted - kv_cache), ("--kv-cache", kv_cache)) if nbytes
        )
        report.remarks.append(f"{flags} may take {_gib(wanted)}, but only {_gib(free)} is free; lower what they say")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # a server takes what it may
    report.facts["open files"] = "no limit" if files == resource.RLIM_INFINITY else str(files)
    if 0 <= files <= FEW_FILES:
        report.remarks.append(f"{files} open files may be too few for many clients; raise the hard limit, ulimit -Hn")


def _on_gpu(settings: Settings) -> bool:
    """Whether the base and the KV cache would be on a GPU."""
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
        except RuntimeError as e:  # it is full, busy, or has a fault
            report.facts["GPU"] = "one that does not answer"
            told = report.remarks if settings.device == "cpu" else report.problems
            told.append(f"the GPU does not answer: {str(e).splitlines()[0]}")
            return
    else:
        report.facts["GPU"] = "none that torch can use"
    reason = cuda.unavailable()
    if driver or torch.cuda.is_available():
        report.facts["CUDA kernels"] = "can run" if reason is None else f"not here: {reason}"
        if reason is not None:
            report.remarks.append(f"there is a GPU, but {reason}")


def _driver() -> str:
    """The NVIDIA driver's own line about its version; empty without one."""
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0].removeprefix("NVRM version:").strip() if path.exists() else ""


def _kernels(settings: Settings, report: Report) -> None:
    from server.kernels import choose, cpu

    reason = cpu.unavailable()
    chosen = choose(settings.kernels, settings.device).name
    report.facts["kernels"] = f"native, for {cpu.instructions()}" if chosen == "native" else chosen
    if reason is not None and chosen != "cuda":
        report.facts["native kernels"] = f"not here: {reason}"
        report.remarks.append("without the native kernels torch's own ops serve, which is slower")


def _base(settings: Settings, report: Report) -> None:
    from server.model.checkpoint import open_checkpoint
    from server.model.loader import check_vocabulary
    from server.model.quantization import Quantization, check_group
    from server.model.tokenizer import ModelTokenizer
    from server.sources import hub
    from server.sources.models import locate, no_folder

    found = locate(settings.model, settings.state_dir)
    if found is None:
        report.facts["base"] = f"{settings.model}, not on this machine yet"
        as_id = f"{no_folder(settings.model)} " if hub.is_id(settings.model) else ""
        report.remarks.append(f"{as_id}`loramux pull {settings.model}`, or the first start, fetches the base")
        if as_id:
            hub.check_client(settings.model)
        return
    files = (
        [found.path]
        if found.path.is_file()
        else [p for p in found.path.iterdir() if p.suffix in _WEIGHTS and p.is_file()]
    )
    size = sum(p.stat().st_size for p in files)
    report.facts["base"] = f"{found.name}, {_gib(size)} at {found.path}"
    checkpoint = open_checkpoint(found.path)
    vocabulary = checkpoint.vocabulary()
    check_vocabulary(vocabulary, checkpoint.config)
    ModelTokenizer(vocabulary)  # how it decodes, and whether its chat template parses
    served = checkpoint.effective(
        Quantization(settings.quantization, settings.group_size, settings.double_quant, settings.table_bits)
    )
    report.facts["served as"] = served.label
    report.remarks.extend(checkpoint.notes)
    linears, tables = checkpoint.config.linear_shapes(), checkpoint.config.table_shapes()
    quantized = served.scheme != "none"
    if quantized:
        for path, (_, columns) in linears.items():
            check_group(path, columns, served.linear_group)
    least = sum(rows * columns for rows, columns in linears.values()) * (4 if quantized else 16) // 8
    least += sum(rows * columns for rows, columns in tables.values()) * (served.table_bits if quantized else 16) // 8
    free = memory.free()
    if not _on_gpu(settings) and least > free:
        report.remarks.append(f"the base takes {_gib(least)} of memory or more, but only {_gib(free)} is free")


def _state_dir(settings: Settings, report: Report) -> None:
    report.facts["state"] = str(settings.state_dir)
    free = shutil.disk_usage(check_state_dir(settings.state_dir)).free
    report.facts["state"] += f", {_gib(free)} of disk free"
    names = settings.state_dir / "store" / "names.json"
    try:
        if names.exists():
            CatalogState.from_json(json.loads(names.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        report.problems.append(f"{names} cannot be read ({error}); put a good copy back, or move it away")
    if free <= LEAST_ROOM:
        report.problems.append(f"the disk of {settings.state_dir} is full: nothing could be kept there; make room")
    elif free < 1 << 30:
        report.remarks.append(f"only {_gib(free)} of disk is free for adapters and the cache")


def check_state_dir(state_dir: Path) -> Path:
    """Raises BadSetting unless a server could write there, and none has it; leaves nothing behind.

    Returns the folder that is there already: the state directory, or what it would be made in.
    """
    store = state_dir / "store"
    try:
        place = next(folder for folder in (state_dir, *state_dir.absolute().parents) if _is_there(folder))
        for folder in (place, store, store / "versions", store / "incoming"):
            if folder == place or _is_there(folder):
                tempfile.TemporaryFile(dir=folder).close()
        if _is_there(store / "lock"):
            with (store / "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadSetting(
            f"the state directory {state_dir} is in use by another process; stop that, or name another with "
            "--state-dir",
            "state_dir",
        ) from None
    except OSError as e:
        who = f"the user {os.geteuid()} must be able to, or " if isinstance(e, PermissionError) else ""
        raise BadSetting(
            f"the state directory {state_dir} can not be written: {e.strerror or e}; {who}--state-dir names another",
            "state_dir",
        ) from None
    return place


def _is_there(path: Path) -> bool:
    """Raises OSError where that cannot be told, for which Python's own answer is no since 3.14."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _keys(settings: Settings, report: Report) -> None:
    from server.api.auth import Keys

    Keys(settings)


def _listening(settings: Settings, report: Report) -> None:
    from server.cli.serve import listen

    try:
        with listen(settings.host, settings.port) as s:
            report.facts["address"] = f"{settings.host}:{s.getsockname()[1]}, free"
    except ServerError:
        report.facts["address"] = f"{settings.host}:{settings.port}, not to be had"
        raise


def _gib(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB" if n >= 1 << 30 else f"{n / (1 << 20):.0f} MiB"
