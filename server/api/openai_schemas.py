"""The bodies of OpenAI's routes that we serve, and the rule for the fields that we do not.

Null, values that ask for nothing, and bookkeeping are accepted; what would change the answer is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.api.schemas import GenerationFields, Out, Stop, Text, TopK
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
"""Values of fields that are not served, which ask for nothing."""
HELD_TO_A_SCHEMA = " (response_format json_schema holds an answer to a schema)"
INSTEAD: Mapping[str, str] = {
    "tools": HELD_TO_A_SCHEMA,
    "tool_choice": HELD_TO_A_SCHEMA,
    "functions": HELD_TO_A_SCHEMA,
    "function_call": HELD_TO_A_SCHEMA,
    "structured_outputs": HELD_TO_A_SCHEMA,
    "guided_json": HELD_TO_A_SCHEMA,
    "guided_choice": HELD_TO_A_SCHEMA,
    "echo": " (POST /classify tells how likely texts are after a prompt)",
}
"""What serves much of what some fields ask for; of several that a body has, the first here is told."""
NOTES = frozenset(("parsed", "provider_specific_fields", "cache_control", "prompt_cache_breakpoint"))
"""What clients write into messages and their parts for themselves, and send back with them: of an answer what they made
of its text, and what other servers may keep. None of it changes an answer."""
MAX_NOTES = 1000
"""Entries of a bookkeeping field, in all that it has."""
MAX_MESSAGES = 4096
MAX_SEQUENCES = 128
"""Prompts times `n` of one call."""


class V1(BaseModel):
    """A body of OpenAI's: extra fields are looked at by `refuse_unserved`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())


def asked(value: Any) -> Any:
    """None for an empty list, map or text, which asks for nothing."""
    return None if value in ([], {}, "") else value


def off(value: Any) -> Any:
    """0 for -1, as vLLM has it of a limit that is off."""
    return 0 if type(value) is int and value == -1 else value


def one_of(served: tuple[str, ...]) -> Any:
    """One of a few. Others are no bad type: OpenAI or vLLM has them, and `refuse_unserved` names the field."""
    return Field(max_length=64, json_schema_extra={"enum": list(served)})


class StreamOptions(V1):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(V1):
    """The schema that an answer follows. It is held to whatever `strict` says."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    strict: bool | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


ANSWERS = ("text", "json_object", "json_schema")


class ResponseFormat(V1):
    """What an answer's text is: anything, a JSON object, or what a schema says."""

    type: Annotated[str, one_of(ANSWERS)]
    json_schema: JsonSchema | None = None

    def schema_of_answer(self) -> Mapping[str, Any] | None:
        """The schema to hold the answer to; None is any text. Raises InvalidRequest."""
        if self.type == "json_schema":
            if self.json_schema is None:
                raise InvalidRequest("response_format of type json_schema needs json_schema", "response_format")
            return self.json_schema.schema_
        if self.json_schema is not None:
            raise InvalidRequest(f"response_format of type {self.type} has no json_schema", "response_format")
        return ANY_OBJECT if self.type == "json_object" else None


class V1Fields(GenerationFields, V1):
    """What both generators of /v1 take beside the generation fields."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Annotated[int, Field(ge=1, le=s.MAX_N)] | None = None
    top_k: Annotated[TopK | None, BeforeValidator(off)] = None
    stop: Annotated[Stop | None, BeforeValidator(asked)] = None
    stream_options: StreamOptions | None = None
    response_format: Annotated[ResponseFormat | None, BeforeValidator(asked)] = None


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True, min_length=1, max_length=s.MAX_TOKENS)]
"""Long lists are refused for their first bad entry: to gather and tell a million takes a minute, in which all wait."""


class CompletionBody(V1Fields):
    """`POST /v1/completions`. What neither the request nor its task says: `max_tokens` 16, `temperature` 1."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_SEQUENCES)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_SEQUENCES)]
    )
    logprobs: Annotated[
        Annotated[int, Field(ge=0, le=s.MAX_LOGPROBS)] | Literal[False] | None,
        BeforeValidator(lambda asked: 1 if asked is True else asked),
    ] = None
    """False and true, as chat has them, are none and one."""


PARTS = ("text",)


class Part(V1):
    """A piece of a message's content; only text is served."""

    type: Annotated[str, one_of(PARTS)]
    text: Text | None = None


ROLES = ("system", "developer", "user", "assistant")


class ChatMessage(V1):
    role: Annotated[str, one_of(ROLES)]
    name: Annotated[str, Field(max_length=256)] | None = None
    content: Text | Annotated[list[Part], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None = None

    def text(self) -> str:
        """All of its content."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or ()]
        return "".join(part or "" for part in parts)


class ChatBody(V1Fields):
    """`POST /v1/chat/completions`. What neither the request nor its task says: what is left of the context, and
    `temperature` 1.
    """

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=s.MAX_LOGPROBS)] | None = None


def refuse_unserved(body: V1Fields) -> None:
    """Raises UnsupportedParameter for the first field that asks for something we do not serve, and InvalidRequest for a
    message without content, or a schema that is missing or too long."""
    refuse_fields(body, "", BOOKKEEPING)
    if body.response_format is not None:
        _refuse_word(body.response_format.type, ANSWERS, "response_format.type")
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
    _refuse_word(message.role, ROLES, f"{prefix}role")
    refuse_fields(message, prefix, NOTES)
    if message.content is None:
        raise InvalidRequest(f"{prefix}content is missing", f"{prefix}content")
    if isinstance(message.content, str):
        return
    for j, part in enumerate(message.content):
        _refuse_word(part.type, PARTS, f"{prefix}content.{j}.type")
        refuse_fields(part, f"{prefix}content.{j}.", NOTES)
        if part.text is None:
            raise InvalidRequest(f"{prefix}content.{j}.text is missing", f"{prefix}content.{j}.text")


def _refuse_word(word: str, served: tuple[str, ...], name: str) -> None:
    if word not in served:
        raise UnsupportedParameter(f"{name} {word!r} is not served; served: {', '.join(served)}", name)


def refuse_fields(body: BaseModel, prefix: str, unused: Collection[str] = ()) -> None:
    """Raises UnsupportedParameter for a field that the body does not have and that asks for something, unless it is one
    of those that are accepted and `unused`, and InvalidRequest for one of these that is large."""
    asked = body.model_extra or {}
    first = [name for name in INSTEAD if name in asked]  # what comes with it goes with it
    for name in (*first, *(name for name in asked if name not in INSTEAD)):
        value = asked[name]
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
        raise UnsupportedParameter(f"{shown} is not served; leave it out{INSTEAD.get(name, '')}", shown)


def _is_large(value: Any) -> bool:
    """Whether what nobody reads has more entries than anybody needs: it would lie in memory while its request waits."""
    left, todo = MAX_NOTES, [value]
    while todo and left >= 0:
        each = todo.pop()
        parts = each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()
        left -= len(parts)
        if left >= 0:
            todo.extend(parts)
    return left < 0


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
    """Another base is no reason to refuse: whether the adapter fits is."""
    load_inplace: bool | None = None


class UnloadAdapterBody(V1):
    """vLLM's `POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
