"""The `openai` package against loramux: a task, an adapter, a mix, a stream, and an answer that follows a schema.

pip install openai
python examples/clients/with_openai.py http://127.0.0.1:8000 [key]
"""

from __future__ import annotations

import sys
from typing import Any

import openai

REVIEW = "A stirring, funny film that never lets go."


def main(url: str, key: str = "none") -> None:
    # The client retries after 429 and 503, as `Retry-After` says.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=5)
    for model in client.models.list():
        print(model.id, (model.model_extra or {}).get("kind"))

    # A task: its template wraps the message, its adapter answers.
    question: Any = [{"role": "user", "content": REVIEW}]
    answer = client.chat.completions.create(model="sentiment", messages=question)
    print("sentiment:", answer.choices[0].message.content)

    # A weighted mix of adapters, for this request only. An empty list is the base.
    mix = [{"name": "sentiment", "weight": 0.7}]
    completion = client.completions.create(
        model="adapter:sentiment", prompt="The film was", max_tokens=12, temperature=0, extra_body={"adapters": mix}
    )
    print("mix:", repr(completion.choices[0].text))

    print("stream: ", end="")
    story: Any = [{"role": "user", "content": "Tell me about lighthouses in one sentence."}]
    base = next(m.id for m in client.models.list() if (m.model_extra or {}).get("kind") == "base")
    for chunk in client.chat.completions.create(model=base, messages=story, max_tokens=40, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    # Forbid additional properties: a small base may generate them until its tokens are used up.
    stars = {"type": "integer", "minimum": 1, "maximum": 5}
    schema = {"type": "object", "properties": {"stars": stars}, "required": ["stars"], "additionalProperties": False}
    form: Any = {"type": "json_schema", "json_schema": {"name": "rating", "schema": schema}}
    rated = client.chat.completions.create(model=base, messages=question, response_format=form, max_tokens=40)
    print("schema:", rated.choices[0].message.content)

    try:
        client.completions.create(model="nobody", prompt="x")
    except openai.NotFoundError as error:
        print("refused:", error.message)


if __name__ == "__main__":
    main(*sys.argv[1:])
