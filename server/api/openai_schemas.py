"""Request and response bodies of OpenAI's routes, and the handling of fields that are not supported.

Null, values without effect, and bookkeeping fields are accepted. Fields that would change the answer are refused. The
types are ours because importing those of the `openai` package takes 0.4 s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.api.schemas import GenerationFields, Logprobs, Out, Stop, Text, bounds
from server.engine.grammar import ANY_OBJECT, check_size
from server.errors import InvalidRequest, UnsupportedParameter
from server.tasks import sampling as s

BOOKKEEPING = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    },
)
NOTHING: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "best_of": (1,),
    "continue_final_message": (False,),
    "echo": (False,),
    "function_call": ("none",),
    "include_stop_str_in_output": (False,),
    "is_3d_lora_weight": (False,),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "priority": (0,),
    "reasoning_content": ("",),
    "reasoning_effort": ("none",),
    "return_token_ids": (False,),
    "skip_special_tokens": (True,),
    "suffix": ("",),
    "tool_choice": ("none",),
    "top_logprobs": (0,),
    "use_beam_search": (False,),
}
"""Values without effect of unsupported fields."""
USE_RESPONSE_FORMAT = " (use response_format json_schema to get an answer that matches a schema)"
INSTEAD: Mapping[str, str] = {
    "tools": USE_RESPONSE_FORMAT,
    "tool_choice": USE_RESPONSE_FORMAT,
    "functions": USE_RESPONSE_FORMAT,
    "function_call": USE_RESPONSE_FORMAT,
    "structured_outputs": USE_RESPONSE_FORMAT,
    "guided_json": USE_RESPONSE_FORMAT,
    "guided_choice": USE_RESPONSE_FORMAT,
    "echo": " (use POST /classify for the probabilities of given texts)",
}
"""Alternatives to unsupported fields. If a body has several, the first one here is named in the error."""
NOTES = frozenset(("parsed", "provider_specific_fields", "cache_control", "prompt_cache_breakpoint"))
"""Fields that clients add to messages and send back. They do not change the answer."""
MAX_NOTES = 1000
"""Most entries of a bookkeeping field, nested ones included. It stays in memory while the request waits."""
MAX_MESSAGES = 4096
MAX_SEQUENCES = 128
"""Prompts times `n` of one call."""


class V1(BaseModel):
    """A body of OpenAI's. `refuse_unserved` checks its extra fields."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


def empty_as_none(value: Any) -> Any:
    return None if value in ([], {}, "") else value


def _minus_one_as_zero(value: Any) -> Any:
    """vLLM's top_k has -1 for "off"."""
    return 0 if type(value) is int and value == -1 else value


def _one_of(supported: tuple[str, ...]) -> Any:
    """A string that `refuse_unserved` checks: other values of OpenAI's are unsupported, not malformed."""
    return Field(max_length=64, json_schema_extra={"enum": list(supported)})


class StreamOptions(V1):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(V1):
    """The schema of an answer. It is always enforced, whatever `strict` is."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


FORMATS = ("text", "json_object", "json_schema")


class ResponseFormat(V1):
    """The format of an answer: text, a JSON object, or JSON that matches a schema."""

    type: Annotated[str, _one_of(FORMATS)]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The schema to enforce, None for text. Raises InvalidRequest."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise InvalidRequest("response_format of type json_schema needs json_schema", "response_format")
            return self.json_schema.schema_
        if self.json_schema is not None:
            raise InvalidRequest(f"response_format of type {self.type} does not take json_schema", "response_format")
        return ANY_OBJECT if self.type == "json_object" else None


class V1Fields(GenerationFields, V1):
    """Fields of both generation routes of /v1."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Annotated[int, Field(ge=1, le=s.MAX_N)] | None = None
    top_k: Annotated[Annotated[int, bounds("top_k")] | None, BeforeValidator(_minus_one_as_zero)] = None
    stop: Annotated[Stop | None, BeforeValidator(empty_as_none)] = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[ResponseFormat | None, BeforeValidator(empty_as_none)] = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1, max_length=s.MAX_TOKENS)]
"""Validation stops at the first bad entry: collecting a million errors would block the event loop for a minute."""


class CompletionBody(V1Fields):
    """`POST /v1/completions`. Defaults of the server: `max_tokens` 16, `temperature` 1."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES)]
    )
    logprobs: Annotated[
        Logprobs | Literal[False] | None,
        BeforeValidator(lambda value: 1 if value is True else value),
    ] = None
    """False and true are accepted too, as in chat."""


PARTS = ("text",)


class Part(V1):
    """A part of a message's content. Only text is supported."""

    type: Annotated[str, _one_of(PARTS)]
    text: Text | None = None


ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(V1):
    role: Annotated[str, _one_of(ROLES)]
    name: Annotated[str, Field(max_length=256)] | None = None
    content: Text | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None

    def text(self) -> str:
        """The text of all parts."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        return "".join(part or "" for part in parts)


class ChatBody(V1Fields):
    """`POST /v1/chat/completions`. Defaults of the server: `temperature` 1, `max_tokens` up to the context."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None


def refuse_unserved(body: V1Fields) -> None:
    """Check what the schema does not.

    Raises:
        UnsupportedParameter: a field would change the answer and is not supported.
        InvalidRequest: a message has no content, or the response format no valid schema.
    """
    refuse_fields(body, "", BOOKKEEPING)
    if body.response_format is not None:
        _refuse_other(body.response_format.type, FORMATS, "response_format.type")
        refuse_fields(body.response_format, "response_format.")
        if body.response_format.json_schema is not None:
            refuse_fields(body.response_format.json_schema, "response_format.json_schema.")
        check_size(body.response_format.schema_of_answer() or {})
    if body.stream_options is not None:
        refuse_fields(body.stream_options, "stream_options.")
    if isinstance(body, ChatBody):
        for i, message in enumerate(body.messages):
            _refuse_message(message, f"messages.{i}.")


def _refuse_message(message: ChatMessage, prefix: str) -> None:
    _refuse_other(message.role, ROLES, f"{prefix}role")
    refuse_fields(message, prefix, NOTES)
    if message.content is None:
        raise InvalidRequest(f"{prefix}content is missing", f"{prefix}content")
    if isinstance(message.content, str):
        return
    for j, part in enumerate(message.content):
        _refuse_other(part.type, PARTS, f"{prefix}content.{j}.type")
        refuse_fields(part, f"{prefix}content.{j}.", NOTES)
        if part.text is None:
            raise InvalidRequest(f"{prefix}content.{j}.text is missing", f"{prefix}content.{j}.text")


def _refuse_other(value: str, supported: tuple[str, ...], name: str) -> None:
    if value not in supported:
        raise UnsupportedParameter(f"{name} {value!r} is not supported; use {' or '.join(supported)}", name)


def refuse_fields(body: BaseModel, prefix: str, unused: Collection[str] = ()) -> None:
    """Refuse extra fields of a body that have an effect.

    Args:
        prefix: prepended to field names in errors.
        unused: bookkeeping fields, which are accepted.

    Raises:
        UnsupportedParameter: a field would change the answer.
        InvalidRequest: a bookkeeping field is too large.
    """
    extra = body.model_extra or {}
    first = [name for name in INSTEAD if name in extra]
    for name in (*first, *(name for name in extra if name not in INSTEAD)):
        value = extra[name]
        if name in unused:
            if _is_large(value):
                raise InvalidRequest(f"{prefix}{name} has more than {MAX_NOTES} entries", f"{prefix}{name}")
            continue
        if value is None or value in ([], {}):
            continue
        if any(type(value) is type(nothing) and value == nothing for nothing in NOTHING.get(name, ())):
            continue
        if name == "best_of" and value == getattr(body, "n", None):
            continue
        shown = f"{prefix}{name}"[:96]
        raise UnsupportedParameter(f"{shown} is not supported; leave it out{INSTEAD.get(name, '')}", shown)


def _is_large(value: Any) -> bool:
    """Whether a bookkeeping field has more than MAX_NOTES entries."""
    entries, stack = 0, [value]
    while stack and entries <= MAX_NOTES:
        item = stack.pop()
        children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
        entries += len(children)
        if entries <= MAX_NOTES:
            stack.extend(children)
    return entries > MAX_NOTES


class CompletionChoice(Out):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class PromptTokensDetails(Out):
    cached_tokens: int


class V1Usage(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(Out):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: V1Usage


class ChatChoice(Out):
    index: int
    message: dict[str, Any]
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletion(Out):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: V1Usage


class ModelEntry(Out):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    kind: Literal["base", "adapter", "task"]
    parent: str | None
    root: str
    max_model_len: int


class ModelList(Out):
    object: Literal["list"]
    data: list[ModelEntry]


class LoadAdapterBody(V1):
    """vLLM's `POST /v1/load_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
    lora_path: Annotated[str, Field(min_length=1, max_length=1024)]
    base_model_name: Annotated[str, Field(max_length=256)] | None = None
    """Ignored: the shapes decide whether an adapter fits."""
    load_inplace: bool | None = None


class UnloadAdapterBody(V1):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
