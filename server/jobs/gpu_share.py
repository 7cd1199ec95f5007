"""Where training runs, and what a server lends to it of its GPU: a share of the memory, and its own matrices.

Owns how a process takes it. What there is to lend is the runner's to say (engine/cuda_runner.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from server.jobs.errors import JobError
from server.jobs.worker_messages import NOTE
from server.kernels.cuda import shared_memory
from server.model.loader import Base


def device_of(base: Base) -> torch.device:
    """Where a base is trained on: on the GPU, if its kernels are for one and there is one. With its number, which some
    of torch's functions want."""
    if base.backend.name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def at(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """What is made within is made on that device."""
    return contextlib.nullcontext() if device.type == "cpu" else device


def take(base: Base, loan: Mapping[str, Any], device: torch.device, tell: Callable[[dict[str, Any]], None]) -> Base:
    """The base on `device`: the server's matrices where it lends them, copies of what it does not.

    From here on this process takes no more than `memory` bytes of the device, so that a step of the server finds what
    is its own. Raises JobError if that is nothing.
    """
    if loan["memory"] <= 0:
        raise JobError("no_memory", "the server leaves no GPU memory to training; lower --gpu-memory")
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, loan["memory"] / total), device)
        torch.zeros(1, device=device)  # the context that mapping wants
    lent = {}
    if loan["base"] is not None:
        try:
            lent = shared_memory.opened(loan["base"], device)
        except OSError as error:
            message = f"the server's matrices could not be shared ({error}); this job has a copy of its own"
            tell({"kind": NOTE, "message": message})
    for path, weight in lent.items():
        own = base.weights[path]
        assert (weight.scheme, weight.shape, weight.group) == (own.scheme, own.shape, own.group), "it is one base"
    own_part = {path: weight for path, weight in base.weights.items() if path not in lent}
    placed = replace(base, weights=own_part).to(device)
    return replace(placed, weights={**placed.weights, **lent})
