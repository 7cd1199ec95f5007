"""Training records as tokens, rendered by the same functions that render a request (`server.model.tokenizer`).

Owns which tokens of a record are learned: an answer and the token that ends it, never what was asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from adapters.data import Chat, Completion, Encode, Pair, Record
from adapters.errors import InvalidData
from server.errors import InvalidRequest
from server.model.tokenizer import INPUT, Format, ModelTokenizer


@dataclass(frozen=True)
class Template:
    """A task's prompt (with one `{input}`), its format and system text, as in task.json."""

    prompt: str = INPUT
    format: Format = "chat"
    system: str | None = None

    @staticmethod
    def of(task: Mapping[str, object]) -> Template:
        """The template in a task.json, raw as it is served if no format is said; without a task inputs are a user's."""
        format: Format = "chat" if not task or task.get("format") == "chat" else "raw"
        system = task.get("system")
        return Template(str(task.get("prompt", INPUT)), format, system if isinstance(system, str) else None)


def encoder(text: ModelTokenizer, template: Template, longest: int) -> Encode:
    """A function for `adapters.data.tokenize`. It raises InvalidData for records that cannot be rendered. Of a
    conversation of over `longest` tokens it gives as much as shows that.
    """

    def encode(record: Record) -> tuple[list[int], list[bool]]:
        try:
            if isinstance(record, Chat):
                return _chat(text, record, longest)
            if isinstance(record, Completion):
                ids, learned = text.encode_example(INPUT, "raw", None, record.prompt, record.completion)
            else:
                ids, learned = _pair(text, template, record)
        except InvalidRequest as error:
            raise InvalidData(f"{record.place}: {error.message}") from error
        return ids, [False] * (len(ids) - learned) + [True] * learned

    return encode


def _pair(text: ModelTokenizer, template: Template, record: Pair) -> tuple[list[int], int]:
    return text.encode_example(template.prompt, template.format, template.system, record.input, record.output)


def _chat(text: ModelTokenizer, record: Chat, longest: int) -> tuple[list[int], list[bool]]:
    """Each answer of the assistant is learned from the tokens of all that comes before it, as a server would send it:
    those of weight 0 are a part of that, however the template writes them.

    A template may render a turn otherwise once another follows, and write an answer in other tokens than it is learned
    in. Where the tokens up to one that is learned are not the beginning of the next ones, the record is refused rather
    than learned at the wrong places.

    All that is before an answer is rendered anew for it, so it ends with the first answer that is beyond `longest`.
    """
    messages = list(record.messages)
    ids: list[int] = []
    learned: list[bool] = []
    answer = 0  # the last one that is learned, from 1
    for i, message in enumerate(messages):
        if message["role"] != "assistant" or message.get("weight", 1) != 1:
            continue
        prompt = text.encode_chat(messages[:i])
        prefix_space = not prompt or text.adds_space_after(prompt[-1])
        whole = [*prompt, *text.encode(message["content"], add_bos=False, prefix_space=prefix_space), text.end_of_turn]
        if prompt[: len(ids)] != ids:
            raise InvalidData(
                f"{record.place}: what is before message {i + 1} has other tokens in the chat template than message "
                f"{answer} is learned in; take the spaces from that one's beginning if it has some, or give each "
                "answer in an example of its own, with those before it at weight 0"
            )
        learned += [False] * (len(prompt) - len(ids)) + [True] * (len(whole) - len(prompt))
        ids, answer = whole, i + 1
        if len(ids) > longest:
            break
    return ids, learned
