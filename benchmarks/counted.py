"""`loramux` that tells on a line of its log how many tensors live, whenever it gets SIGUSR1. For benchmarks."""

from __future__ import annotations

import gc
import signal
import sys
from types import FrameType

import torch

from server.cli.main import main

TOLD = "tensors that live: "


def count(number: int, frame: FrameType | None) -> None:
    gc.collect()
    sys.stderr.write(f"{TOLD}{sum(type(thing) is torch.Tensor for thing in gc.get_objects())}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, count)
    main()
