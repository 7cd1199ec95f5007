"""`Task`: a name that clients use, with its prompt template, labels, defaults and route. Parses and validates tasks."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from adapters.weights import MAX_TERMS, MIN_DIGEST, NAME, NAME_RULE, RESERVED, Choice, check_weight, is_nonzero
from server.errors import InvalidRequest
from server.model.tokenizer import INPUT, Format
from server.tasks.sampling import check_defaults

MAX_PROMPT = 100_000
MAX_LABELS = 64
MAX_LABEL_LENGTH = 256
MAX_CANDIDATES = 16
MIN_SAMPLES = 200
Metric = Literal["accuracy", "exact_match", "rougeL", "bleu", "chrf", "loss"]
METRICS: tuple[str, ...] = get_args(Metric)
ScoreSource = Literal["feedback", "evaluation"]
SOURCES: tuple[str, ...] = get_args(ScoreSource)
FEEDBACK_METRIC = "accuracy"
"""The metric of feedback scores."""
DEFAULT = "default"
"""The task of requests to /generate that name none, if it is defined."""

Source = Literal["file", "api"]


@dataclass(frozen=True)
class BestRoute:
    """A route to the best of several adapters, found by feedback or evaluations."""

    candidates: tuple[str, ...]
    metric: str = "accuracy"
    source: str = "feedback"
    min_samples: int = MIN_SAMPLES

    def allows(self, choice: Choice) -> bool:
        """Whether the route itself may select this choice, in any versions."""
        return any(_without_versions(choice) == _without_versions([(name, 1.0)]) for name in self.candidates)

    def describe(self) -> dict[str, Any]:
        return {
            "best": list(self.candidates),
            "metric": self.metric,
            "source": self.source,
            "min_samples": self.min_samples,
        }


@dataclass(frozen=True)
class FixedRoute:
    """A route to one choice of adapters; the empty choice is the base model."""

    choice: tuple[tuple[str, float], ...] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.choice)

    def allows(self, choice: Choice) -> bool:
        """Whether this is the route's choice, in any versions."""
        return _without_versions(choice) == _without_versions(self.choice)

    def describe(self) -> dict[str, Any]:
        return {"choice": [{"name": name, "weight": weight} for name, weight in self.choice]}


Route = FixedRoute | BestRoute


def _without_versions(choice: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Names without versions and nonzero weights, sorted."""
    return sorted((name.partition("@")[0], check_weight(weight)) for name, weight in choice if is_nonzero(weight))


@dataclass(frozen=True)
class Task:
    """The definition of a task. `prompt` contains `{input}` once.

    `by_name` means that no route was given: the route is the adapter of the task's name, if there is one.
    """

    name: str
    prompt: str
    route: Route
    format: Format = "raw"
    system: str | None = None
    labels: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    source: Source = "api"
    by_name: bool = False

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters in the route, without versions."""
        return tuple(dict.fromkeys(name.partition("@")[0] for name in self.route.candidates))

    def versions(self, adapter: str) -> set[str]:
        """Version prefixes of an adapter that the route names."""
        parts = (name.partition("@") for name in self.route.candidates)
        return {version.lower() for name, _, version in parts if name == adapter and version}

    def body(self) -> dict[str, Any]:
        """JSON that `parse` accepts."""
        return {
            "prompt": self.prompt,
            "format": self.format,
            "system": self.system,
            "labels": list(self.labels),
            "defaults": dict(self.defaults),
            "route": None if self.by_name else self.route.describe(),
        }

    def describe(self) -> dict[str, Any]:
        """The answer of `GET /tasks/{task}`."""
        return {"name": self.name, "source": self.source, **self.body(), "route": self.route.describe()}


_FIELDS = frozenset({"task", "name", "source", "prompt", "format", "system", "labels", "defaults", "route"})


def parse(name: str, body: Mapping[str, Any], *, default_route: Route, source: Source) -> Task:
    """A task from its JSON. Raises InvalidRequest, which names the field, and InvalidChoice for a bad weight."""
    check_task_name(name)
    for key in body:
        if key not in _FIELDS:
            raise InvalidRequest(f"a task has no field {str(key)[:64]!r}", str(key)[:64])
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or prompt.count(INPUT) != 1 or len(prompt) > MAX_PROMPT:
        raise InvalidRequest(f"prompt must be a string that contains {INPUT} once", "prompt")
    system, format = body.get("system"), body.get("format") or "raw"
    if format not in ("raw", "chat"):
        raise InvalidRequest("format must be raw or chat", "format")
    if system is not None and (not isinstance(system, str) or len(system) > MAX_PROMPT):
        raise InvalidRequest("system must be a string or null", "system")
    if system is not None and format == "raw":
        raise InvalidRequest("a raw prompt has no system message; set format to chat", "system")
    defaults = body.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        raise InvalidRequest("defaults must be an object of generation fields", "defaults")
    route = body.get("route")
    return Task(
        name=name,
        prompt=prompt,
        route=default_route if route is None else _parse_route(route),
        format=cast(Format, format),
        system=system,
        labels=check_labels(body.get("labels") or []),
        defaults=check_defaults(defaults),
        source=source,
        by_name=route is None,
    )


def from_folder(adapter: str, body: Any, *, reserved: Collection[str] = (), vocabulary: int | None = None) -> Task:
    """The task in an adapter's task.json. Its name and its route default to the adapter.

    Args:
        reserved: names that a task may not have, besides those that are always reserved.
        vocabulary: size of the vocabulary; stop tokens must be below it.

    Raises:
        InvalidRequest, InvalidChoice: as `parse`.
    """
    if not isinstance(body, Mapping):
        raise InvalidRequest("it must be an object")
    name = body.get("task") or adapter
    if not isinstance(name, str) or name in RESERVED or name in reserved:
        raise InvalidRequest(f"{str(name)[:64]!r} cannot be the name of a task", "task")
    task = parse(name, body, default_route=FixedRoute(((adapter, 1.0),)), source="file")
    check_consistency(task, vocabulary)
    return task


def check_consistency(task: Task, vocabulary: int | None) -> None:
    """Raises InvalidRequest for defaults that contradict each other or the vocabulary."""
    least, most = task.defaults.get("min_tokens", 0), task.defaults.get("max_tokens")
    if most is not None and least > most:
        raise InvalidRequest(f"min_tokens is {least}, more than max_tokens, which is {most}", "defaults.min_tokens")
    for token in task.defaults.get("stop_token_ids", ()):
        if vocabulary is not None and token >= vocabulary:
            raise InvalidRequest(f"{token} is no token id; the vocabulary has {vocabulary}", "defaults.stop_token_ids")


def check_task_name(name: str) -> None:
    """Raises InvalidRequest if it cannot be the name of a task."""
    if not NAME.fullmatch(name):
        raise InvalidRequest(f"a name is of {NAME_RULE}", "task")


def check_labels(labels: Any) -> tuple[str, ...]:
    """Distinct, nonempty labels. Raises InvalidRequest."""
    if not isinstance(labels, list) or len(labels) > MAX_LABELS:
        raise InvalidRequest(f"labels must be a list of up to {MAX_LABELS} strings", "labels")
    if not all(isinstance(label, str) and 0 < len(label) <= MAX_LABEL_LENGTH for label in labels):
        raise InvalidRequest(f"a label is a string of 1 to {MAX_LABEL_LENGTH} characters", "labels")
    if len(set(labels)) != len(labels):
        raise InvalidRequest("labels contains a label twice", "labels")
    return tuple(labels)


def _parse_route(route: Any) -> Route:
    if not isinstance(route, Mapping) or ("choice" in route) == ("best" in route):
        raise InvalidRequest("route must have either `choice` or `best`", "route")
    if "choice" in route:
        if set(route) != {"choice"}:
            raise InvalidRequest("a route with `choice` has no other field", "route")
        choice = parse_choice(route["choice"], "route.choice")
        names = [name.partition("@")[0] for name, _ in choice]
        if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
            raise InvalidRequest(f"the adapter {twice!r} is named twice; give it one weight", "route")
        return FixedRoute(tuple(choice))
    return _parse_best(route)


def _parse_best(route: Mapping[str, Any]) -> BestRoute:
    unknown = set(route) - {"best", "metric", "source", "min_samples"}
    if unknown:
        raise InvalidRequest(f"a route has no field {sorted(map(str, unknown))[0][:64]!r}", "route")
    names = route["best"]
    if not isinstance(names, list) or not 2 <= len(names) <= MAX_CANDIDATES:
        raise InvalidRequest(f"route.best must list 2 to {MAX_CANDIDATES} adapters", "route.best")
    for name in names:
        _check_adapter_name(name, "route.best")
    if len(set(names)) != len(names):
        raise InvalidRequest("route.best lists an adapter twice", "route.best")
    metric = route.get("metric") or FEEDBACK_METRIC
    source = route.get("source") or ("feedback" if metric == FEEDBACK_METRIC else "evaluation")
    if metric not in METRICS:
        raise InvalidRequest(f"route.metric must be one of {', '.join(METRICS)}", "route.metric")
    if source not in SOURCES:
        raise InvalidRequest(f"route.source must be one of {', '.join(SOURCES)}", "route.source")
    if source == "feedback" and metric != FEEDBACK_METRIC:
        raise InvalidRequest(
            f"the metric of feedback is {FEEDBACK_METRIC}; for {metric} set source to evaluation", "route.source"
        )
    least = route.get("min_samples", MIN_SAMPLES)
    if not isinstance(least, int) or isinstance(least, bool) or not 1 <= least <= 1_000_000:
        raise InvalidRequest("route.min_samples must be a whole number from 1 to 1000000", "route.min_samples")
    return BestRoute(tuple(names), metric, source, least)


def parse_choice(entries: Any, param: str) -> Choice:
    """A choice from `[{"name", "weight"}, ...]`; the weight defaults to 1.0.

    Raises InvalidRequest, and InvalidChoice for a weight that is not finite or out of range.
    """
    if not isinstance(entries, Sequence) or isinstance(entries, str) or len(entries) > MAX_TERMS:
        raise InvalidRequest(f"{param} must be a list of up to {MAX_TERMS} adapters with their weights", param)
    choice: Choice = []
    for entry in entries:
        if not isinstance(entry, Mapping) or set(entry) - {"name", "weight"}:
            raise InvalidRequest(f'each of {param} must be {{"name": ..., "weight": ...}}', param)
        weight = entry.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise InvalidRequest(f"a weight of {param} must be a number", param)
        check_weight(weight, param)
        choice.append((_check_adapter_name(entry.get("name"), param), float(weight)))  # not the float32 of the check
    return choice


def _check_adapter_name(name: Any, param: str) -> str:
    base, at, digest = name.partition("@") if isinstance(name, str) else ("", "", "")
    if not NAME.fullmatch(base) or (at and not MIN_DIGEST <= len(digest) <= 64):
        raise InvalidRequest(f"{param} must name adapters, as `name` or `name@digest`", param)
    return cast(str, name)
