"""Request and response bodies of `/v1/files`, `/v1/fine_tuning/jobs`, `/jobs` and `/tasks/{task}/evaluate`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from adapters.weights import MAX_TERMS
from server.api.openai_schemas import V1, empty_as_none
from server.api.schemas import NAME_PATTERN, REFERENCE_PATTERN, Body, Out, Weighted, limit_fields
from server.tasks import definitions as d
from server.tasks import sampling as s

MAX_FILE_ID = 128
MAX_METADATA = 16
Auto = Literal["auto"]
FileId = Annotated[str, Field(min_length=1, max_length=MAX_FILE_ID)]
Metadata = dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]]


class FileObject(Out):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class FileDeleted(Out):
    id: str
    object: Literal["file"]
    deleted: bool


class Hyperparameters(V1):
    """OpenAI's hyperparameters. "auto" is 3 epochs, batch size 16 and multiplier 1, a learning rate of 5e-4."""

    n_epochs: Auto | Annotated[float, Field(gt=0, le=1000)] | None = None
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] | None = None
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] | None = None


class Supervised(V1):
    hyperparameters: Hyperparameters | None = None


class Method(V1):
    """The method of training. Only `supervised` is supported."""

    type: Annotated[str, Field(max_length=64)]
    supervised: Supervised | None = None


class LoraBody(V1):
    """Settings of the adapter, beyond OpenAI's.

    `task` names the prompt template; by default it is the task of the suffix's name. `auto_rank` distributes the
    parameters of rank `r` over the modules. `prune_to` prunes the result to a lower rank. `init_from` continues an
    adapter with its ranks and modules. With `publish: if_better`, the result is published if it is better than the
    current version on the validation file, or on a tenth of the training file that is held out.
    """

    r: Annotated[int, Field(ge=1, le=4096)] | None = None
    alpha: Annotated[float, Field(gt=0, le=65_536)] | None = None
    target_modules: Annotated[
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=64)]
        | None,
        BeforeValidator(empty_as_none),
    ] = None
    rslora: bool | None = None
    auto_rank: bool | None = None
    prune_to: Annotated[int, Field(ge=1, le=4096)] | None = None
    task: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    publish: Literal["always", "if_better", "never"] | None = None
    init_from: Annotated[str, Field(pattern=REFERENCE_PATTERN)] | None = None


class FineTuningBody(V1):
    """`POST /v1/fine_tuning/jobs`. `model` is the base. The result is named `suffix`, or `ft-` and the job's id."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: Hyperparameters | None = None
    method: Annotated[Method | None, BeforeValidator(empty_as_none)] = None
    suffix: Annotated[str, Field(pattern=NAME_PATTERN)] | None = None
    seed: Annotated[int, Field(ge=0, le=s.SEED[1])] | None = None
    metadata: Annotated[Metadata, Field(max_length=MAX_METADATA), BeforeValidator(limit_fields)] | None = None
    lora: LoraBody | None = None


class JobError(Out):
    code: str
    message: str
    param: str | None


class FineTuningJob(Out):
    """A training job. The status `paused` and the field `lora` are not OpenAI's."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    error: JobError | None
    model: str
    fine_tuned_model: str | None
    organization_id: str
    hyperparameters: dict[str, Any]
    method: dict[str, Any]
    training_file: str
    validation_file: str | None
    result_files: list[str]
    trained_tokens: int | None
    seed: int
    metadata: dict[str, str] | None
    user_provided_suffix: str | None
    integrations: list[dict[str, Any]]
    lora: dict[str, Any]


class FineTuningEvent(Out):
    """An event. `data` of the type "metrics" has `step`, losses and accuracies."""

    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class FineTuningCheckpoint(Out):
    """A checkpoint of a job. It is not served. `metrics` are the last ones before it."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuning_job_id: str
    fine_tuned_model_checkpoint: str
    step_number: int
    metrics: dict[str, float]


class Page(Out):
    """A list, newest first. `has_more` says whether older entries follow."""

    object: Literal["list"]
    has_more: bool


class FineTuningJobList(Page):
    data: list[FineTuningJob]


class FineTuningEventList(Page):
    data: list[FineTuningEvent]


class FineTuningCheckpointList(Page):
    data: list[FineTuningCheckpoint]
    first_id: str | None
    last_id: str | None


class FileList(Page):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None


class JobSummary(Out):
    """A job. `progress` is from 0 to 1, `seconds` is working time, `loss` is the last training loss.

    A job that is `pausing` runs until its step ends.
    """

    id: str
    kind: Literal["training", "evaluation"]
    name: str
    status: str
    pausing: bool
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: float
    step: int
    steps: int
    loss: float | None
    tokens: int
    seconds: float
    error: JobError | None
    result: dict[str, Any]


class JobAnswer(JobSummary):
    """A job with its request and its curves: lists of `[step, value]` by metric."""

    asked: dict[str, Any]
    curves: dict[str, list[list[float]]]
    messages: list[dict[str, Any]]


class JobList(Out):
    """The last 200 jobs, newest first."""

    jobs: list[JobSummary]


class Example(Body):
    input: Annotated[str, Field(min_length=1, max_length=d.MAX_PROMPT)]
    output: Annotated[str, Field(min_length=1, max_length=d.MAX_PROMPT)]


class EvaluateBody(Body):
    """`POST /tasks/{task}/evaluate`, with either `data` or `file`.

    A candidate is a mix as in `adapters`; an empty one is the base alone. By default they come from the task's route.
    """

    data: Annotated[list[Example], Field(fail_fast=True, min_length=1, max_length=100_000)] | None = None
    file: FileId | None = None
    candidates: (
        Annotated[
            list[Annotated[list[Weighted], Field(max_length=MAX_TERMS)]],
            Field(min_length=1, max_length=d.MAX_CANDIDATES),
        ]
        | None
    ) = None
    metric: d.Metric | None = None

    @model_validator(mode="after")
    def _one(self) -> EvaluateBody:
        if (self.data is None) == (self.file is None):
            raise ValueError("give either data or file")
        return self
