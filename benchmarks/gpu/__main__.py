"""Entry point of `python -m benchmarks.gpu`."""

import os
import sys
from pathlib import Path

if "--check" in sys.argv and not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

from benchmarks.gpu.checklist import run_with_deadline

sys.exit(run_with_deadline())
