"""/v1 through `litellm`, in its own process: its import takes seconds and emits warnings."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import Any

from tests.conftest import part_missing

SCRIPT = """
import gc
gc.disable()
import asyncio, json, sys
import litellm
gc.enable()

litellm.suppress_debug_info = True
url = sys.argv[1]
common = {"api_base": f"{url}/v1", "api_key": "none", "max_retries": 0}
messages = [{"role": "user", "content": "hello"}]
found = {}
made = litellm.completion(model="openai/a", messages=messages, max_tokens=8, temperature=0, logprobs=True,
                          top_logprobs=2, ignore_eos=True, **common)
found["whole"] = made.choices[0].message.content
found["finish"] = made.choices[0].finish_reason
found["tokens"] = made.usage.completion_tokens
found["logprobs"] = len(made.choices[0].logprobs.content)
stream = litellm.completion(model="openai/a", messages=messages, max_tokens=8, temperature=0, stream=True,
                            stream_options={"include_usage": True}, ignore_eos=True, **common)
chunks = list(stream)
found["streamed"] = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
found["streamed usage"] = chunks[-1].usage.completion_tokens


async def many():
    asked = [litellm.acompletion(model=f"openai/{m}", messages=messages, max_tokens=8, temperature=0, ignore_eos=True,
                                 **common) for m in ("a", "b", "mood", "adapter:mood", "tiny") * 3]
    return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

found["many"] = asyncio.run(many())
mixed = litellm.completion(model="openai/tiny", messages=messages, max_tokens=8, temperature=0, ignore_eos=True,
                           extra_body={"adapters": [{"name": "a"}]}, **common)
found["mixed"] = mixed.choices[0].message.content
text = litellm.text_completion(model="text-completion-openai/b", prompt="hello", max_tokens=4, temperature=0,
                               ignore_eos=True, **common)
found["text tokens"] = text.usage.completion_tokens
form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer", "maximum": 9, "minimum": 0}}}
found["json"] = litellm.completion(model="openai/a", messages=messages, max_tokens=8, response_format=form,
                                  **common).choices[0].message.content
wrong = {"unknown": {"model": "openai/nobody"}, "context": {"model": "openai/a", "max_tokens": 10**6}}
for name, fields in wrong.items():
    try:
        litellm.completion(messages=messages, **fields, **common)
    except Exception as error:
        found[name] = [type(error).__name__, error.status_code]
json.dump(found, sys.stdout)
"""


def test_litellm(live: Any) -> None:
    if importlib.util.find_spec("litellm") is None:
        part_missing("litellm is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, live.url],
        capture_output=True,
        text=True,
        timeout=120,
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "PATH": "/usr/bin:/bin", "NO_PROXY": "*"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["tokens"] == found["logprobs"] == found["streamed usage"] == 8 and found["finish"] == "length"
    assert found["streamed"] == found["whole"] == found["mixed"] and found["text tokens"] == 4
    assert found["many"] == found["many"][:5] * 3 and found["many"][0] == found["whole"]
    assert len(set(found["many"])) > 2
    assert 0 <= int(found["json"]) <= 9
    assert found["unknown"] == ["NotFoundError", 404] and found["context"] == ["BadRequestError", 400]
    assert live.idle()
