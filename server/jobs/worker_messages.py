"""What the training process is told, and what it tells back: a file before it starts, lines of JSON while it runs.

Owns both forms. Whoever writes a spec and the process that reads it are of one version: a spec is written anew at each
start. The last one is read again where a trained job is still to be published, perhaps by a later version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from adapters.training import TrainingConfig
from server.jobs.errors import JobError, refused

SPEC = "spec.json"
RESULT = "result"
"""The folder, within that of the job, which holds the PEFT folder once it is whole."""
PART, CANDIDATE = f".{RESULT}", "candidate"
"""Folders there: the result while it is written, and the copy of it that is measured."""
UNFINISHED = (PART, CANDIDATE)
"""What lies there where a process was killed over it."""
INIT, RIVAL, CHECKPOINTS = "init", "rival", "checkpoints"
"""Folders there: the adapter to start from, the one that the result would replace, and where a run can go on from."""
JUDGED = "judged.jsonl"
"""What the result is compared on, if the engine can answer it."""
DATA = "data.jsonl"
"""What an evaluation asks, where the examples came with the request."""
NEEDED_TO_RUN = (INIT, RIVAL, CHECKPOINTS, JUDGED, DATA)
"""What lies there for a run alone."""

VALIDATED, STEP, EVALUATED, CHECKPOINT = "validated", "step", "eval", "checkpoint"
TRAINED, STOPPED, FAILED, NOTE = "trained", "stopped", "failed", "note"
"""Kinds of a line; `kind` is its field. The process ends after one of the first three of these four."""


@dataclass(frozen=True)
class BaseSource:
    """How to load the base that is served, so that the very same packed file is mapped. `id` is what must come out."""

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
    """One training run. `template` and `task` are as in task.json; `task` is None if the adapter brings no task.

    `data_name` and `validation_name` are what people called the files. `held_out` is the share of the examples that
    is kept for validation if there is no file for that. `init` is the adapter to start from, `init_name` what it is
    called, `rival` the one that the result would replace: its loss is told beside the result's. `loan` is what the
    server lends of its GPU (see loan.py), if it has one. `created_at` is when the job was created, in seconds since
    the epoch: the time that a chat template is told, whenever the process starts; None is the present. `context` is
    how many tokens of prompt and answer the server takes, if that is less than what the base does.
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
    rival: Path | None = None
    auto_rank: bool = False
    prune_to: int | None = None
    loan: Mapping[str, Any] | None = None
    created_at: float | None = None
    context: int | None = None

    def write(self, folder: Path) -> None:
        """Put the spec where the process looks for it."""
        (folder / SPEC).write_text(json.dumps(asdict(self), default=str, indent=1), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> WorkerSpec:
        """The spec in a job's folder. Raises JobError for one that cannot be read."""
        try:
            return WorkerSpec._read(folder)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = refused(error) if isinstance(error, OSError) else error
            raise JobError(
                "spec_damaged", f"what the job was trained by cannot be read ({reason}): ask anew"
            ) from error

    @staticmethod
    def _read(folder: Path) -> WorkerSpec:
        raw: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        base, config = raw.pop("base"), raw.pop("config")
        for key in ("source", "cache_dir"):
            base[key] = Path(base[key])
        for key in ("data", "validation", "init", "rival"):
            raw[key] = Path(raw[key]) if raw[key] is not None else None
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}
        return WorkerSpec(base=BaseSource(**base), config=TrainingConfig(**config), **raw)
