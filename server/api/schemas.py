"""The bodies of our own routes, in and out: field names, types and bounds, as the OpenAPI document shows them.

Bounds are those of `tasks.sampling`. Knows nothing of how a request is answered.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from adapters.weights import AT_DIGEST, MAX_ABS_WEIGHT, MAX_TERMS, MIN_DIGEST, NAME, NAME_IN_WORDS
from server.tasks import definitions as d
from server.tasks import sampling as s

MAX_PROMPT_LENGTH = 8 << 20
MAX_FIELDS = 100
"""More than any body of ours has, so that those which are not known can be named."""
NAME_PATTERN = f"^{NAME.pattern}$"
REFERENCE_PATTERN = f"^{NAME.pattern}({AT_DIGEST})?$"
VERSION_PATTERN = f"^{NAME.pattern}{AT_DIGEST}$"
INPUT_PATTERN = r"\{input\}"
MIN_TOKENS = "no end before so many tokens, unless `response_format` allows nothing but the end"
PATTERNS = {
    NAME_PATTERN: f"a name: {NAME_IN_WORDS}",
    REFERENCE_PATTERN: f"a name ({NAME_IN_WORDS}), or name@digest with {MIN_DIGEST} or more digits of the digest",
    VERSION_PATTERN: f"name@digest, with {MIN_DIGEST} or more digits of the digest",
    INPUT_PATTERN: "a text with {input} where the request's prompt goes",
}
"""Every pattern of these bodies, in words."""


def _characters(text: str) -> str:
    """Raises ValueError for a text with half of a surrogate pair, which JSON can say and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from None
    return text


def few_fields(data: Any) -> Any:
    """Raises ValueError for an object of too many fields: each may be a problem, and all requests wait while those of
    one are gathered.
    """
    if isinstance(data, dict) and len(data) > MAX_FIELDS:
        raise ValueError(f"{len(data)} fields are too many; /docs lists those that there are")
    return data


Text = Annotated[str, AfterValidator(_characters)]
"""For texts without another bound: where there is one, pydantic looks at the characters itself."""
AdapterName = Annotated[str, Field(pattern=NAME_PATTERN)]
StopString = Annotated[str, Field(min_length=1, max_length=s.MAX_STOP_LENGTH)]
Label = Annotated[str, Field(min_length=1, max_length=d.MAX_LABEL_LENGTH)]
DeadlineMs = Annotated[
    int,
    Field(ge=1, le=86_400_000, description="most milliseconds to take; more than the server's `--deadline` is that"),
]


class Body(BaseModel):
    """A body of ours: types as JSON has them, no unknown fields, no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _few(cls, data: Any) -> Any:
        return few_fields(data)


class Out(BaseModel):
    """A body that we send."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


class ErrorDetail(Out):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(Out):
    """Every body that is not 2xx."""

    error: ErrorDetail


def _one_if_null(weight: Any) -> Any:
    return 1.0 if weight is None else weight


class Weighted(Body):
    """One adapter of a mix: `name` or `name@digest`."""

    name: Annotated[str, Field(pattern=REFERENCE_PATTERN)]
    weight: Annotated[
        float, BeforeValidator(_one_if_null), Field(ge=-MAX_ABS_WEIGHT, le=MAX_ABS_WEIGHT, description="1 if left out")
    ] = 1.0


Mix = Annotated[
    list[Weighted],
    Field(max_length=MAX_TERMS, description="what answers; absent is the task's own mix, `[]` the base alone"),
]


TopK = Annotated[int, Field(ge=0, le=s.MAX_TOKENS)]
Stop = StopString | Annotated[list[StopString], Field(max_length=s.MAX_STOP)]


def _within(name: str, description: str | None = None) -> Any:
    """The field of a number, by the bounds that task files are held to as well."""
    of = s.NUMBERS[name]
    above, least = (of.low, None) if of.above else (None, of.low)
    return Field(gt=above, ge=least, le=of.high, description=description)


class SamplingFields(BaseModel):
    """How an answer is drawn, and when it ends: what a request may say, and a task for it."""

    max_tokens: Annotated[int, _within("max_tokens")] | None = None
    min_tokens: Annotated[int, _within("min_tokens", description=MIN_TOKENS)] | None = None
    temperature: Annotated[float, _within("temperature")] | None = None
    top_p: Annotated[float, _within("top_p")] | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, _within("min_p")] | None = None
    seed: Annotated[int, _within("seed")] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=s.MAX_STOP_TOKENS)] | None = None
    ignore_eos: bool | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None


class GenerationFields(SamplingFields):
    """The fields that every generator takes. Absent ones are the task's, then the server's."""

    max_completion_tokens: Annotated[int, _within("max_tokens")] | None = None
    stream: Annotated[bool, Field(description="answer as server-sent events, the last `data: [DONE]`")] | None = None
    adapters: Mix | None = None
    deadline_ms: DeadlineMs | None = None


class TaskQuery(BaseModel):
    """`?task=`. A query that says anything else is refused: a slip of the pen would be answered by the base."""

    model_config = ConfigDict(extra="forbid")

    task: Annotated[str, Field(max_length=64, description="without it the task `default`, else the base")] | None = None


class NoQuery(BaseModel):
    """No query at all: `DELETE /adapters/a?version=...` would else retire all of `a`, not what was meant."""

    model_config = ConfigDict(extra="forbid")


class GenerateBody(GenerationFields, Body):
    """`POST /generate`. What neither the request nor its task says: `max_tokens` 64, `temperature` 0, the most likely
    token each time.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"prompt": "A stirring, funny film.", "max_tokens": 4},
                {"prompt": "Once upon a time", "adapters": [{"name": "sentiment", "weight": 0.7}], "stream": True},
            ]
        }
    )

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
    logprobs: Annotated[int, Field(ge=0, le=s.MAX_LOGPROBS)] | None = None


class ClassifyBody(Body):
    """`POST /classify`: `labels` may be left out where the task has them."""

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
    """What served: in the order of the request."""

    name: str
    version: str
    weight: float


class Usage(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int


class Timings(Out):
    """Milliseconds, and the rate after the first token."""

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
    """`POST /adapters`: `source` is a folder inside the adapter directory, `org/name@rev`, or an allowed URL."""

    name: AdapterName
    source: Annotated[str, Field(min_length=1, max_length=1024)]


Terms = Annotated[list[Weighted], Field(min_length=1, max_length=MAX_TERMS)]
Rank = Annotated[int, Field(ge=1, le=4096)]


class PublishBody(Body):
    """`PUT /adapters/{name}`: new content, from a source or as a sum, or a version that the name had before."""

    source: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    version: Annotated[str, Field(pattern=VERSION_PATTERN)] | None = None
    from_: Annotated[Terms | None, Field(alias="from")] = None
    rank: Rank | None = None


class ComposeBody(Body):
    """`POST /adapters/compose`: the exact weighted sum as an adapter of its own, cut to `rank` if that is given."""

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
    """A name that was set aside: it has no version that could be told of."""

    name: str


class ComposedAnswer(AdapterAnswer):
    """`error` is the relative Frobenius error of the cut: 0 for the exact sum."""

    error: float


class Rejected(Out):
    path: str
    reason: str
    since: float


class AdapterList(Out):
    adapters: list[AdapterSummary]
    rejected: list[Rejected]


class Route(Body):
    """Either `choice`, or `best` with its rule."""

    choice: Annotated[list[Weighted], Field(max_length=MAX_TERMS)] | None = None
    best: Annotated[list[str], Field(min_length=2, max_length=d.MAX_CANDIDATES)] | None = None
    metric: d.Metric | None = None
    source: d.ScoreSource | None = None
    min_samples: Annotated[int, Field(ge=1, le=1_000_000)] | None = None


class TaskDefaults(SamplingFields, Body):
    """Generation fields of a task."""

    logprobs: Annotated[int, Field(ge=0, le=s.MAX_LOGPROBS)] | None = None


class TaskBody(Body):
    """`PUT /tasks/{task}`. `name`, `task` and `source` are those of an answer, and ignored."""

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
    """`POST /tasks/{task}/feedback`: either a score from 0 to 1, or what the answer should have been."""

    id: Annotated[str, Field(min_length=1, max_length=128)]
    score: Annotated[float, Field(ge=0, le=1)] | None = None
    expected: Annotated[str, Field(max_length=d.MAX_PROMPT)] | None = None


class Percentiles(Out):
    """Seconds."""

    p50: float | None
    p95: float | None
    p99: float | None


class QualityEntry(Out):
    """Scores by one metric from one source; the interval holds at every moment at once."""

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
    samples: Annotated[int, Field(description="of the metric and the source that have most")]
    quality: list[QualityEntry]
    ttft: Percentiles
    tpot: Percentiles
    e2e: Percentiles
    requests: int
    errors: int
    tokens: dict[str, int]


class Performance(Out):
    """What is known of a task's versions, and which a `best` route has found."""

    task: str
    versions: list[VersionPerformance]
    best: dict[str, Any] | None


class Health(Out):
    status: str


class Stats(Out):
    """Memory by kind in bytes, the engine's counters, slots, and a table by task, where a mean of nothing is null."""

    base: dict[str, Any]
    memory: dict[str, int]
    engine: dict[str, Any]
    slots: dict[str, Any]
    adapters: dict[str, int]
    tasks: dict[str, dict[str, float | None]]
