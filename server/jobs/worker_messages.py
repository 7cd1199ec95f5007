"""What the server and the training process exchange: a spec before the process starts, JSON lines while it runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.training import TrainingConfig

SPEC = "spec.json"
# Files and folders in the folder of a job.
RESULT, PARTIAL_RESULT = "result", ".result"
"""The PEFT folder of the result, and the same while it is written."""
CANDIDATE = "candidate"
"""The copy of the result that is published for its evaluation."""
INIT, REPLACED = "init", "rival"
"""Copies of adapter versions: the one that training starts from, and the one that the result would replace."""
CHECKPOINTS = "checkpoints"
VALIDATION_PAIRS = "judged.jsonl"
"""The examples that the result is evaluated on, if the engine can answer them."""
DATA = "data.jsonl"
"""The examples of an evaluation job that came with its request."""
TEMPORARY_FILES = (PARTIAL_RESULT, CANDIDATE)
RESUME_FILES = (INIT, REPLACED, CHECKPOINTS, VALIDATION_PAIRS, DATA, RESULT)
"""What only a job that runs or can be resumed needs."""

# The field `kind` of a message. The process ends after TRAINED, STOPPED or FAILED.
VALIDATED, STEP, EVALUATED, CHECKPOINT, NOTE = "validated", "step", "eval", "checkpoint", "note"
TRAINED, STOPPED, FAILED = "trained", "stopped", "failed"


@dataclass(frozen=True)
class BaseSource:
    """How to load the base that the server serves, so that both map the same packed file.

    `id` is the id that the loaded base must have.
    """

    source: Path
    name: str
    kernels: str
    quantization: str
    group_size: int | None
    double_quant: bool
    table_bits: int
    cache_dir: Path
    id: str


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a training process needs to know.

    Attributes:
        data_name, validation_name: File names for messages.
        template: Prompt, format and system text of the task, as in task.json.
        held_out: Fraction of the training file that is held out if there is no validation file.
        task: The task.json of the result, or None.
        init, init_name: Folder and name of the adapter that training starts from.
        replaced: Folder of the version that the result would replace. Its loss is reported beside the result's.
        gpu_share: What the server shares of its GPU; see `gpu_share.py`.
        created_at: The time that chat templates see, so that a resumed job has the same tokens. None is now.
        context_length: Maximum number of tokens of prompt and answer that the server accepts.
    """

    base: BaseSource
    name: str
    config: TrainingConfig
    data: Path
    data_name: str
    template: Mapping[str, Any]
    threads: int
    max_rank: int
    validation: Path | None = None
    validation_name: str = ""
    held_out: float = 0.0
    task: Mapping[str, Any] | None = None
    init: Path | None = None
    init_name: str = ""
    replaced: Path | None = None
    auto_rank: bool = False
    prune_to: int | None = None
    gpu_share: Mapping[str, Any] | None = None
    created_at: float | None = None
    context_length: int | None = None

    def write(self, folder: Path) -> None:
        """Write the spec to a job's folder."""
        (folder / SPEC).write_text(json.dumps(asdict(self), default=str, indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> WorkerSpec:
        """Read the spec in a job's folder."""
        raw: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        base, config = raw.pop("base"), raw.pop("config")
        for key in ("source", "cache_dir"):
            base[key] = Path(base[key])
        for key in ("data", "validation", "init", "replaced"):
            raw[key] = Path(raw[key]) if raw[key] is not None else None
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return WorkerSpec(base=BaseSource(**base), config=TrainingConfig(**config), **raw)
