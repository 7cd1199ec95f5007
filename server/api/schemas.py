"""Request and response bodies of our own routes: fields, types and bounds, as the OpenAPI document shows them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from adapters.weights import DIGEST_SUFFIX, MAX_ABS_WEIGHT, MAX_TERMS, MIN_DIGEST, NAME, NAME_RULE
from server.tasks import definitions as d
from server.tasks import sampling as s

MAX_PROMPT_LENGTH = 8 << 20
MAX_FIELDS = 100
"""More than any object of ours has. Each unknown field is an error, and collecting them blocks the event loop."""
NAME_PATTERN = f"^{NAME.pattern}$"
REFERENCE_PATTERN = f"^{NAME.pattern}({DIGEST_SUFFIX})?$"
VERSION_PATTERN = f"^{NAME.pattern}{DIGEST_SUFFIX}$"
INPUT_PATTERN = r"\{input\}"
PATTERNS = {
    NAME_PATTERN: f"a name: {NAME_RULE}",
    REFERENCE_PATTERN: f"a name ({NAME_RULE}), or name@digest with {MIN_DIGEST} or more digits of the digest",
    VERSION_PATTERN: f"name@digest, with {MIN_DIGEST} or more digits of the digest",
    INPUT_PATTERN: "a text with {input} in place of the request's prompt",
}
"""Every pattern, described for error messages and /docs."""


def _no_surrogates(text: str) -> str:
    """Raises ValueError for lone surrogates: JSON can escape them, but no tokenizer can encode them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair") from None
    return text


def limit_fields(data: Any) -> Any:
    """Raises ValueError for an object with more than MAX_FIELDS fields."""
    if isinstance(data, dict) and len(data) > MAX_FIELDS:
        raise ValueError(f"{len(data)} fields are too many; /docs lists all fields")
    return data


Text = Annotated[str, AfterValidator(_no_surrogates)]
"""A string without other bounds: with bounds pydantic checks surrogates itself."""
AdapterName = Annotated[str, Field(pattern=NAME_PATTERN)]
StopString = Annotated[str, Field(min_length=1, max_length=s.MAX_STOP_LENGTH)]
Label = Annotated[str, Field(min_length=1, max_length=d.MAX_LABEL_LENGTH)]
DeadlineMs = Annotated[
    int,
    Field(ge=1, le=86_400_000, description="time limit in milliseconds; at most the server's `--deadline`"),
]


class Body(BaseModel):
    """A request body: JSON types without coercion, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, data: Any) -> Any:
        return limit_fields(data)


class Out(BaseModel):
    """A response body."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorDetail(Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Out):
    """The body of every response that is not 2xx."""

    error: ErrorDetail


class Weighted(Body):
    """One adapter of a mix: `name` or `name@digest`."""

    name: Annotated[str, Field(pattern=REFERENCE_PATTERN)]
    weight: Annotated[
        float,
        BeforeValidator(lambda weight: 1.0 if weight is None else weight),
        Field(ge=-MAX_ABS_WEIGHT, le=MAX_ABS_WEIGHT, description="1 by default"),
    ] = 1.0


Mix = Annotated[
    list[Weighted],
    Field(max_length=MAX_TERMS, description="the mix; by default the task's own, `[]` is the base alone"),
]


Stop = StopString | Annotated[list[StopString], Field(max_length=s.MAX_STOP)]


def bounds(name: str) -> Any:
    """Bounds and description of a generation field, from its row in `NUMBERS`."""
    row = s.NUMBERS[name]
    above, least = (row.low, None) if row.above else (None, row.low)
    return Field(gt=above, ge=least, le=row.high, description=row.description)


Logprobs = Annotated[int, bounds("logprobs")]
_NUMBERS: dict[str, Any] = {
    name: (Annotated[row.kind, bounds(name)] | None, None) for name, row in s.NUMBERS.items() if name != "logprobs"
}


class SamplingFields(create_model("_Numbers", **_NUMBERS)):  # type: ignore[misc]
    """How tokens are sampled and when the answer ends: the rows of `NUMBERS`, and fields of other types."""

    stop: Stop | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=s.MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None


class GenerationFields(SamplingFields):
    """Fields of all generation routes. The default of each is the task's, then the server's."""

    max_completion_tokens: Annotated[int, bounds("max_tokens")] | None = None
    stream: Annotated[bool, Field(description="answer with server-sent events, ending with `data: [DONE]`")] | None = (
        None
    )
    adapters: Mix | None = None
    deadline_ms: DeadlineMs | None = None


class TaskQuery(BaseModel):
    """`?task=`. Other parameters are refused: a typo would be answered by the base."""

    model_config = ConfigDict(extra="forbid")

    task: (
        Annotated[str, Field(max_length=64, description="task name; by default the task `default`, else the base")]
        | None
    ) = None


class NoQuery(BaseModel):
    """No query parameters: `DELETE /adapters/a?version=...` must not retire all of `a`."""

    model_config = ConfigDict(extra="forbid")


class GenerateBody(GenerationFields, Body):
    """`POST /generate`. Defaults of the server: `max_tokens` 64, `temperature` 0 (greedy)."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "A stirring, funny film.", "max_tokens": 4},
                {"prompt": "Once upon a time", "adapters": [{"name": "sentiment", "weight": 0.7}], "stream": True},
            ]
        }
    )

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
    logprobs: Logprobs | None = None


class ClassifyBody(Body):
    """`POST /classify`. `labels` are the task's by default."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
    labels: Annotated[list[Label], Field(max_length=d.MAX_LABELS)] | None = None
    adapters: Mix | None = None
    deadline_ms: DeadlineMs | None = None


class TopToken(Out):
    token: str
    logprob: float


class TokenEntry(TopToken):
    top: list[TopToken]


class ServedAdapter(Out):
    """An adapter that answered, in the order of the request."""

    name: str
    version: str
    weight: float


class Usage(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class Timings(Out):
    """Milliseconds; the rate excludes the first token."""

    queue_ms: float
    load_ms: float
    ttft_ms: float
    total_ms: float
    tokens_per_second: float


class Served(Out):
    id: str
    task: str | None
    adapters: list[ServedAdapter]
    usage: Usage
    timings: Timings


class GenerateAnswer(Served):
    text: str
    finish_reason: Literal["stop", "length", "cancelled", "error"]
    logprobs: list[TokenEntry] | None


class ClassifyAnswer(Served):
    label: str
    scores: dict[str, float]


class RegisterBody(Body):
    """`POST /adapters`. `source` is a folder inside the adapter directory, `org/name@rev`, or an allowed URL."""

    name: AdapterName
    source: Annotated[str, Field(min_length=1, max_length=1024)]


Terms = Annotated[list[Weighted], Field(min_length=1, max_length=MAX_TERMS)]
Rank = Annotated[int, Field(ge=1, le=4096)]


class PublishBody(Body):
    """`PUT /adapters/{name}`: one of new content from a source, a sum of adapters, or an earlier version."""

    source: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    version: Annotated[str, Field(pattern=VERSION_PATTERN)] | None = None
    from_: Annotated[Terms | None, Field(alias="from")] = None
    rank: Rank | None = None


class ComposeBody(Body):
    """`POST /adapters/compose`: stores the weighted sum as an adapter, truncated to `rank` if given."""

    name: AdapterName
    from_: Annotated[Terms, Field(alias="from")]
    rank: Rank | None = None


class AdapterSummary(Out):
    name: str
    version: str
    ranks: list[int]
    targets: list[str]
    bytes: int
    tier: Literal["disk", "ram", "device"]
    leases: int
    loaded_at: float | None
    base: str | None
    pinned: bool
    tasks: list[str]


class AdapterAnswer(AdapterSummary):
    versions: list[dict[str, Any]]
    honoured: list[str]
    harmless: list[str]
    notes: list[str]
    card: str | None


class UnservedAnswer(Out):
    """An adapter that was registered but not served."""

    name: str


class ComposedAnswer(AdapterAnswer):
    """`error` is the relative Frobenius error of the truncation; 0 for the exact sum."""

    error: float


class Rejected(Out):
    path: str
    reason: str
    since: float


class AdapterList(Out):
    adapters: list[AdapterSummary]
    rejected: list[Rejected]


class Route(Body):
    """Either `choice`, or `best` with `metric`, `source` and `min_samples`."""

    choice: Annotated[list[Weighted], Field(max_length=MAX_TERMS)] | None = None
    best: Annotated[list[str], Field(min_length=2, max_length=d.MAX_CANDIDATES)] | None = None
    metric: d.Metric | None = None
    source: d.ScoreSource | None = None
    min_samples: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class TaskDefaults(SamplingFields, Body):
    """Default sampling fields of a task."""

    logprobs: Logprobs | None = None


class TaskBody(Body):
    """`PUT /tasks/{task}`. `name`, `task` and `source` are ignored: answers have them."""

    prompt: Annotated[str, Field(max_length=d.MAX_PROMPT, pattern=INPUT_PATTERN)]
    format: Literal["raw", "chat"] | None = None
    system: Annotated[str, Field(max_length=d.MAX_PROMPT)] | None = None
    labels: Annotated[list[Label], Field(max_length=d.MAX_LABELS)] | None = None
    defaults: TaskDefaults | None = None
    route: Route | None = None
    name: Any = None
    task: Any = None
    source: Any = None


class TaskAnswer(Out):
    name: str
    source: d.Source
    prompt: str
    format: Literal["raw", "chat"]
    system: str | None
    labels: list[str]
    defaults: dict[str, Any]
    route: dict[str, Any]


class TaskList(Out):
    tasks: list[TaskAnswer]


class FeedbackBody(Body):
    """`POST /tasks/{task}/feedback`: either a score from 0 to 1, or the expected answer."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    expected: Annotated[str, Field(max_length=d.MAX_PROMPT)] | None = None


class Percentiles(Out):
    """Seconds."""

    p50: float | None
    p95: float | None
    p99: float | None


class QualityEntry(Out):
    """Scores by one metric from one source, with a confidence interval that holds at all times."""

    metric: str
    source: d.ScoreSource
    samples: int
    mean: float
    low: float
    high: float


class VersionPerformance(Out):
    version: str
    adapters: list[dict[str, Any]]
    base: str
    samples: Annotated[int, Field(description="of the metric and source with most samples")]
    quality: list[QualityEntry]
    ttft: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    requests: int
    errors: int
    tokens: dict[str, int]


class Performance(Out):
    """Quality and latency of a task's versions, and the leader of a `best` route."""

    task: str
    versions: list[VersionPerformance]
    best: dict[str, Any] | None


class Health(Out):
    status: str


class Stats(Out):
    """Memory in bytes by kind, engine counters, slots, and totals by task. Means without samples are null."""

    base: dict[str, Any]
    memory: dict[str, int]
    engine: dict[str, Any]
    slots: dict[str, Any]
    adapters: dict[str, int]
    tasks: dict[str, dict[str, float | None]]
