"""Turns training records into tokens with the functions that render requests. Only answers are learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.data import Chat, Completion, Encode, Record
from adapters.errors import InvalidData
from server.errors import InvalidRequest
from server.model.tokenizer import INPUT, Format, ModelTokenizer


@dataclass(frozen=True)
class Template:
    """A task's prompt (with one `{input}`), format and system text, as in task.json."""

    prompt: str = INPUT
    format: Format = "chat"
    system: str | None = None

    @staticmethod
    def of(task: Mapping[str, object]) -> Template:
        """The template of a task.json. The format is raw by default, but chat if there is no task."""
        format: Format = "chat" if not task or task.get("format") == "chat" else "raw"
        system = task.get("system")
        return Template(str(task.get("prompt", INPUT)), format, system if isinstance(system, str) else None)


def encoder(tokenizer: ModelTokenizer, template: Template, max_length: int) -> Encode:
    """A function for `adapters.data.tokenize`. It raises InvalidData for records that cannot be rendered.

    Chats longer than `max_length` tokens are cut after the answer that exceeds it. `tokenize` drops them.
    """

    def encode(record: Record) -> tuple[list[int], list[bool]]:
        try:
            if isinstance(record, Chat):
                return _chat(tokenizer, record, max_length)
            if isinstance(record, Completion):
                ids, learned = tokenizer.encode_example(INPUT, "raw", None, record.prompt, record.completion)
            else:
                ids, learned = tokenizer.encode_example(
                    template.prompt, template.format, template.system, record.input, record.output
                )
        except InvalidRequest as error:
            raise InvalidData(f"{record.place}: {error.message}") from error
        return ids, [False] * (len(ids) - learned) + [True] * learned

    return encode


def _chat(tokenizer: ModelTokenizer, record: Chat, max_length: int) -> tuple[list[int], list[bool]]:
    """Encode a chat. Each assistant answer of weight 1 is learned after the prompt that a server would send.

    A template may render a message differently once another follows. If an earlier answer then has other tokens than
    the ones that are learned, the record is refused.

    The prompt of each answer is rendered from the start, so long chats are cut to bound the cost.
    """
    messages = list(record.messages)
    ids: list[int] = []
    learned: list[bool] = []
    answer = 0  # number of the last learned message, from 1
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight", 1) != 1:
            continue
        prompt = tokenizer.encode_chat(messages[:i])
        prefix_space = not prompt or tokenizer.adds_space_after(prompt[-1])
        whole = [
            *prompt,
            *tokenizer.encode(message["content"], add_bos=False, prefix_space=prefix_space),
            tokenizer.end_of_turn,
        ]
        if prompt[: len(ids)] != ids:
            raise InvalidData(
                f"{record.place}: the chat template renders message {answer} differently before message {i + 1}; "
                "remove leading spaces from it, or put each answer in its own example with the earlier ones at weight 0"
            )
        learned += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids, answer = whole, i + 1
        if len(ids) > max_length:
            break
    return ids, learned
