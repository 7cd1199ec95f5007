"""The device of a training process, and the share of the server's GPU that it may use."""

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
    """The device to train on: the GPU if the base has CUDA kernels and there is a GPU. With its index."""
    if base.backend.name == "cuda" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def use_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within this context, new tensors are on the device."""
    return contextlib.nullcontext() if device.type == "cpu" else device


def place_base(
    base: Base, share: Mapping[str, Any], device: torch.device, send: Callable[[dict[str, Any]], None]
) -> Base:
    """Put the base on the device. Weights that the server shares are mapped, the others are copied.

    Limits this process to the share's `memory` bytes of the device.

    Raises:
        JobError: The share has no memory.
    """
    if share["memory"] <= 0:
        raise JobError("no_memory", "the server leaves no GPU memory for training; lower --gpu-memory")
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction(min(1.0, share["memory"] / total), device)
        torch.zeros(1, device=device)  # creates the CUDA context, which mapping needs
    mapped = {}
    if share["base"] is not None:
        try:
            mapped = shared_memory.open_shared(share["base"], device)
        except OSError as error:
            message = f"the server's weights could not be shared ({error}); this job uses its own copy"
            send({"kind": NOTE, "message": message})
    for path, weight in mapped.items():
        own = base.weights[path]
        assert (weight.scheme, weight.shape, weight.group) == (own.scheme, own.shape, own.group), "it is one base"
    rest = {path: weight for path, weight in base.weights.items() if path not in mapped}
    placed = replace(base, weights=rest).to(device)
    return replace(placed, weights={**placed.weights, **mapped})
